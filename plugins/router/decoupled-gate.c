/* SPDX-License-Identifier: Apache-2.0
 * decoupled-gate.c - the gate says which experts, something else says with what weights.
 *
 * Source:  weights = sum: Expertise need not monopolize: Action-Specialized Mixture of Experts for
 *          Vision-Language-Action Learning; weights = equal: ReMix: Reinforcement routing for mixtures of LoRAs in LLM
 *          finetuning; each from the abstract
 * Differs: that the scale adapter is linear is a choice made here, as is that the gate's part is a softmax over the
 *          chosen. How the gate is trained (ReMix: by reinforcement) is not routing. Claims nothing of quality
 * Cost:    O(T E); with weights = sum 2 k H FLOPs per token more. Chooses what softmax-top-k does, with other weights
 *
 *   score    p = softmax(logits)
 *   select   the k largest of scale * p + add
 *   weight   p / sum of the chosen p + adapter[l][e] . h     weights = sum; of any sign
 *            1 / k                                           weights = equal */
#include <moelab_top_k.h>

enum weights { SUM, EQUAL };

struct conf {
    struct moe_tensor adapter;
    int64_t top_k;
    int32_t weights;
};

static const struct moe_param params[] = {
    {"adapter", MOE_TENSOR, offsetof(struct conf, adapter), 0, 0, 0, "L,E,H", "", "weights = sum: the scale adapter"},
    {"weights", MOE_ENUM, offsetof(struct conf, weights), SUM, 0, 0, "sum|equal", "", "what chosen experts weigh"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    const struct conf *c = conf;
    *(struct state *)self = (struct state){.env = env, .conf = c};
    if (c->weights == SUM && c->adapter.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "adapter: no tensor given, expected a .npy file [L,E,H]");
    return MOE_OK;
}

static int check_logits(const struct moe_env *env, const struct moe_batch *batch)
{
    const int64_t n = batch->n_experts;
    for (int64_t i = 0; i < batch->n_tokens * n; i++)
        if (!isfinite(batch->router_logits[i]))
            return env->host->fail(env, MOE_EINVAL,
                                   "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                   batch->layer, (int)(i / n), (int)(i % n), (double)batch->router_logits[i]);
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const int64_t n = batch->n_experts, n_scores = batch->n_tokens * n;
    const int64_t wide = s->conf->weights == SUM ? batch->n_hidden : 0;
    const int64_t k = s->conf->top_k > 0 ? s->conf->top_k : batch->top_k;
    const int rc = check_logits(s->env, batch);
    if (rc < 0)
        return rc;
    if (wide > 0 && s->conf->adapter.shape[2] != wide)
        return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: hidden states are %d wide, adapter expects %lld",
                                  batch->layer, batch->n_hidden, (long long)s->conf->adapter.shape[2]);
    for (int64_t i = 0; i < n_scores; i += n)
        moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    own->flops = 4.0 * (double)n_scores + 2.0 * (double)(batch->n_tokens * k * wide); /* the adapters of the chosen */
    own->bytes = sizeof(float) * (2.0 * (double)n_scores + (double)(n * wide + batch->n_tokens * wide));
    return MOE_OK;
}

static float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* The gate's part of weights. A balancer may force choices whose scores are all 0: they share alike. */
static void weigh(const float *p, const int32_t *expert, int32_t k, float *weight)
{
    float sum = 0;
    for (int32_t i = 0; i < k; i++)
        sum += weight[i] = p[expert[i]];
    for (int32_t i = 0; i < k; i++)
        weight[i] = sum > 0 ? weight[i] / sum : 1 / (float)k;
}

/* Replaces the gate's part of weights by all of them. */
static int finish(const struct state *s, const struct moe_batch *b, int32_t t, const int32_t *expert, int32_t k,
                  float *weight)
{
    const struct moe_tensor *a = &s->conf->adapter;
    for (int32_t i = 0; i < k; i++) {
        if (s->conf->weights == EQUAL) {
            weight[i] = 1 / (float)k;
            continue;
        }
        weight[i] += dot(a->data + (b->layer * a->shape[1] + expert[i]) * a->shape[2],
                         b->hidden + (int64_t)t * a->shape[2], a->shape[2]);
        if (!isfinite(weight[i]))
            return s->env->host->fail(s->env, MOE_EINVAL,
                                      "layer %d: token %d, expert %d: weight %g, expected a finite number", b->layer,
                                      t, expert[i], (double)weight[i]);
    }
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, most = moe_k_of(env, batch, s->conf->top_k);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    if (most < 0 || choice == NULL)
        return most < 0 ? most : MOE_ENOMEM;
    int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most);
    if (rc < 0)
        return rc;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        const int32_t there = moe_bias_scores(p, bias, n, choice);
        const int32_t k = most < there ? most : there;
        if (k > 0)
            moe_top_k(choice, n, k, out->expert + out->n);
        weigh(p, out->expert + out->n, k, out->weight + out->n);
        if ((rc = finish(s, batch, t, out->expert + out->n, k, out->weight + out->n)) < 0)
            return rc;
        out->offset[t + 1] = out->n += k;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_NEEDS_HIDDEN | MOE_NEEDS_TENSORS,
    .name = "decoupled-gate",
    .summary = "the gate says which experts, something else says with what weights",
    .source = "Expertise need not monopolize: Action-Specialized Mixture of Experts; ReMix: Reinforcement routing",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
