/* SPDX-License-Identifier: Apache-2.0
 * k-schedule.c - top-k whose k falls while a model is trained, in all layers or in the first ones alone.
 *
 * Source:  VER: Vision Expert Transformer for Robot Learning via Foundation Distillation and Dynamic Routing; layers:
 *          Sigma-Moe-Tiny Technical Report (both from the abstract)
 * Differs: the abstracts give no curve: here k is linear in the step. After the last step it is softmax-top-k with
 *          k = to, which is what a model is served with
 * Cost:    O(T E) and a short insertion for k << E
 *
 *   k        from + (to - from) min(1, step / steps), rounded, halves up; in the first `layers` layers (0: in all). The
 *            others have `to` from the start
 *   score    s = softmax(logits)
 *   select   the k largest of scale * s + add
 *   weight   s / sum of the chosen s;   renormalise = false: s */
#include <moelab.h>

struct conf {
    int64_t from, to, steps, layers;
    bool renormalise;
};

static const struct moe_param params[] = {
    { "from", MOE_INT, offsetof(struct conf, from), 0, 0, 1 << 16, NULL, "experts",
      "experts per token at step 0; 0: all" },
    { "to", MOE_INT, offsetof(struct conf, to), 0, 0, 1 << 16, NULL, "experts",
      "experts per token at the end; 0: the model's top_k" },
    { "steps", MOE_INT, offsetof(struct conf, steps), 100, 1, INT32_MAX, NULL, "steps", "until k is `to`" },
    { "layers", MOE_INT, offsetof(struct conf, layers), 0, 0, 1 << 16, NULL, "layers",
      "the first ones, where k changes; 0: all" },
    { "renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
      "weights of a token add up to 1; false: probabilities among all experts" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){ .env = env, .conf = conf };
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

static int32_t k_now(const struct conf *c, const struct moe_batch *batch, int64_t from, int64_t to)
{
    const int64_t step = batch->step < c->steps ? batch->step : c->steps;
    if (c->layers > 0 && batch->layer >= c->layers)
        return (int32_t)to;
    return (int32_t)floor((double)from + (double)(to - from) * (double)step / (double)c->steps + 0.5);
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts;
    const int64_t from = c->from > 0 ? c->from : n, to = c->to > 0 ? c->to : batch->top_k;
    if (from > n || to > n || to < 1)
        return env->host->fail(env, MOE_EINVAL, "layer %d: from = %lld, to = %lld of %d experts", batch->layer,
                               (long long)from, (long long)to, n);
    const int32_t most = k_now(c, batch, from, to);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    if (choice == NULL || env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most) < 0)
        return MOE_ENOMEM;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        int32_t *expert = out->expert + out->n, there = 0;
        float sum = 0;
        for (int32_t e = 0; e < n; e++) {
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
            there += choice[e] > -INFINITY;
        }
        const int32_t k = most < there ? most : there;
        if (k > 0)
            moe_top_k(choice, n, k, expert);
        for (int32_t i = 0; i < k; i++)
            sum += p[expert[i]];
        for (int32_t i = 0; i < k; i++)
            out->weight[out->n++] = !c->renormalise ? p[expert[i]] : sum > 0 ? p[expert[i]] / sum : 1 / (float)k;
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "k-schedule",
    .summary = "top-k whose k falls while a model is trained",
    .source = "VER: Vision Expert Transformer for Robot Learning; Sigma-Moe-Tiny Technical Report",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
