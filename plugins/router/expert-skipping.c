/* SPDX-License-Identifier: Apache-2.0
 * expert-skipping.c - top-k, less those whose probability matters too little in this layer, for this kind of token.
 *
 * Source:  MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic Expert Skipping, arXiv
 *          2511.15690 (from the abstract); layer_k: LaDiMo: Layer-wise Distillation Inspired MoEfier, its policy of
 *          fewer experts in layers where the top gate weight dominates (from the abstract)
 * Differs: importance of layers, their k and thresholds are inputs: profiles, calibration and the search for thresholds
 *          are not here; at_least and which weights remain are ours, as the abstract does not say them
 * Cost:    O(T E) and a short insertion, as softmax-top-k
 *
 *   score    s = softmax(logits)
 *   select   the k (or layer_k) largest of scale * s + add; of these, skip those with alpha_l s < threshold of the
 *            token's modality (label 0: `threshold`; any other: `other`); the first at_least of them stay
 *   weight   s / sum over all k, as if nobody had been skipped;   rescale: over those that stay
 *
 * Where `other` is not given it is `threshold`, and nobody asks for labels. */
#include <moelab.h>

struct conf {
    int64_t top_k, at_least;
    double threshold, other;
    bool rescale;
    struct moe_tensor alpha, layer_k;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "experts per token before skipping; 0: the model's" },
    { "threshold", MOE_REAL, offsetof(struct conf, threshold), 0.05, 0, 1e6, NULL, "",
      "of alpha times the probability, below which an expert is skipped" },
    { "other", MOE_REAL, offsetof(struct conf, other), -1, -1, 1e6, NULL, "",
      "the same for tokens whose label is not 0 (a second modality); -1: no difference" },
    { "at_least", MOE_INT, offsetof(struct conf, at_least), 1, 0, 1 << 16, NULL, "experts", "that are never skipped" },
    { "rescale", MOE_BOOL, offsetof(struct conf, rescale), 0, 0, 1, NULL, "",
      "weights of those that stay add up to 1; false: they keep what they had" },
    { "alpha", MOE_TENSOR, offsetof(struct conf, alpha), 0, 0, 0, "L", "", "importance of layers; without it 1 each" },
    { "layer_k", MOE_TENSOR, offsetof(struct conf, layer_k), 0, 0, 0, "L", "experts",
      "per token in each layer, instead of top_k" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    const struct conf *c = conf;
    *(struct state *)self = (struct state){ .env = env, .conf = c };
    for (int64_t l = 0; c->alpha.data != NULL && l < c->alpha.shape[0]; l++)
        if (!(c->alpha.data[l] >= 0) || !isfinite(c->alpha.data[l]))
            return env->host->fail(env, MOE_EINVAL, "alpha: layer %lld: found %g, expected 0 or more", (long long)l,
                                   (double)c->alpha.data[l]);
    for (int64_t l = 0; c->layer_k.data != NULL && l < c->layer_k.shape[0]; l++) {
        const float k = c->layer_k.data[l];
        if (!(k >= 1 && k <= 1 << 16 && k <= floorf(k)))
            return env->host->fail(env, MOE_EINVAL, "layer_k: layer %lld: found %g, expected a whole number of experts",
                                   (long long)l, (double)k);
    }
    if (c->layer_k.data != NULL && c->top_k > 0)
        return env->host->fail(env, MOE_EINVAL, "top_k = %lld and layer_k: expected one of them", (long long)c->top_k);
    if (c->other < 0 && c->other > -1)
        return env->host->fail(env, MOE_EINVAL, "other = %g: expected 0 or more, or -1", c->other);
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const int64_t n = batch->n_experts, n_scores = batch->n_tokens * n;
    for (int64_t i = 0; i < n_scores; i++)
        if (!isfinite(batch->router_logits[i]))
            return s->env->host->fail(s->env, MOE_EINVAL,
                                      "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                      batch->layer, (int)(i / n), (int)(i % n), (double)batch->router_logits[i]);
    for (int64_t i = 0; i < n_scores; i += n)
        moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    own->flops = 4.0 * (double)n_scores;
    own->bytes = 2.0 * sizeof(float) * (double)n_scores;
    return MOE_OK;
}

static int refuse(const struct state *s, const struct moe_batch *batch, int32_t k)
{
    const struct moe_env *env = s->env;
    const struct moe_tensor *alpha = &s->conf->alpha;
    if (k < 1 || k > batch->n_experts)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, k,
                               batch->n_experts);
    if (s->conf->other >= 0 && batch->label == NULL)
        return env->host->fail(env, MOE_EINVAL, "other = %g: the workload has no labels", s->conf->other);
    if (alpha->data != NULL && batch->layer >= alpha->shape[0])
        return env->host->fail(env, MOE_EINVAL, "alpha: %lld layers, found layer %d", (long long)alpha->shape[0],
                               batch->layer);
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts;
    const int32_t most = c->layer_k.data != NULL ? (int32_t)c->layer_k.data[batch->layer]
                         : c->top_k > 0          ? (int32_t)c->top_k
                                                 : batch->top_k;
    int rc = refuse(s, batch, most);
    if (rc < 0)
        return rc;
    const double alpha = c->alpha.data != NULL ? (double)c->alpha.data[batch->layer] : 1;
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    if (choice == NULL || env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most) < 0)
        return MOE_ENOMEM;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const double threshold = c->other >= 0 && batch->label[t] != 0 ? c->other : c->threshold;
        const float *p = scores + (int64_t)t * n;
        int32_t *expert = out->expert + out->n, there = 0, stay = 0;
        float sum = 0, staying = 0;
        for (int32_t e = 0; e < n; e++) {
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
            there += choice[e] > -INFINITY;
        }
        const int32_t k = most < there ? most : there;
        if (k > 0)
            moe_top_k(choice, n, k, expert);
        for (int32_t i = 0; i < k; i++) {
            const float own = p[expert[i]];
            sum += own;
            if (i >= c->at_least && alpha * (double)own < threshold)
                continue;
            expert[stay++] = expert[i];
            staying += own;
        }
        const float by = c->rescale ? staying : sum;
        for (int32_t i = 0; i < stay; i++)
            out->weight[out->n++] = by > 0 ? p[expert[i]] / by : 1 / (float)(c->rescale ? stay : k);
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "expert-skipping",
    .summary = "top-k, less those whose probability matters too little in this layer",
    .source = "MoDES: Dynamic Expert Skipping, arXiv 2511.15690",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
