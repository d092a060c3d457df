/* SPDX-License-Identifier: Apache-2.0
 * zero-compute-experts.c - top-k among the experts and some that cost nothing, so that easy tokens compute less.
 *
 * Source:  Z. Zeng et al. 2024, AdaMoE: Token-Adaptive Routing with Null Experts, arXiv 2406.13233 (rule = null);
 *          P. Jin et al. 2024, MoE++, arXiv 2410.07348 (rule = moe++: zero, copy and constant experts)
 * Differs: gates of free experts are trained with the model, and traces have no logits for them: they get `free_logit`
 *          here, each `free_step` lower than the one before. MoE++'s W_g is `residual` times the identity
 * Cost:    O(T (E + free))
 *
 *   logits   of the layer, + residual * those of the layer before (moe++), and the free experts'
 *   score    s = softmax over E + free
 *   select   the k largest of scale * s + add
 *   weight   null: s / sum over the chosen true experts, 0 for null ones;  moe++: s, free ones included
 *
 * Free experts have the ids E to E + free - 1: they carry their weight, no work and no traffic. */
#include <moelab.h>

enum { RULE_NULL, RULE_MOEPP };

struct conf {
    int64_t top_k, free;
    int32_t rule;
    double free_logit, free_step, residual;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "per token, free ones included; 0: the model's" },
    { "free", MOE_INT, offsetof(struct conf, free), 4, 1, 1 << 12, NULL, "experts", "that cost nothing" },
    { "rule", MOE_ENUM, offsetof(struct conf, rule), RULE_NULL, 0, 0, "null|moe++", "", "how weights come about" },
    { "free_logit", MOE_REAL, offsetof(struct conf, free_logit), 0, -1e6, 1e6, NULL, "logit",
      "of the first free expert" },
    { "free_step", MOE_REAL, offsetof(struct conf, free_step), 0, 0, 1e6, NULL, "logit",
      "by which each further one is lower" },
    { "residual", MOE_REAL, offsetof(struct conf, residual), 0, -1e3, 1e3, NULL, "",
      "moe++: times the logits of the layer before" },
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

static int32_t n_free(void *self, int32_t layer)
{
    (void)layer;
    return (int32_t)((const struct state *)self)->conf->free;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts, m = (int32_t)c->free, width = n + m;
    const float residual = c->rule == RULE_MOEPP && batch->previous_logits != NULL ? (float)c->residual : 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *row = scores + (int64_t)t * width;
        for (int32_t e = 0; e < n; e++) {
            row[e] = batch->router_logits[(int64_t)t * n + e];
            if (residual != 0)
                row[e] += residual * batch->previous_logits[(int64_t)t * n + e];
        }
        for (int32_t f = 0; f < m; f++)
            row[n + f] = (float)(c->free_logit - c->free_step * f);
        moe_softmax(row, width, row);
    }
    own->flops = 4.0 * (double)batch->n_tokens * width + (residual != 0 ? 2.0 * (double)batch->n_tokens * n : 0);
    own->bytes = 2.0 * sizeof(float) * (double)batch->n_tokens * width;
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, width = n + (int32_t)s->conf->free;
    const int32_t k = s->conf->top_k > 0 ? (int32_t)s->conf->top_k : batch->top_k;
    if (k > width)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts and %lld free ones", batch->layer,
                               k, n, (long long)s->conf->free);
    float *choice = env->host->scratch(env, (size_t)width * sizeof *choice);
    int rc = choice != NULL ? env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k) : MOE_ENOMEM;
    if (rc < 0)
        return rc;
    out->n_free = (int32_t)s->conf->free;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * width;
        int32_t *expert = out->expert + (int64_t)t * k;
        float *weight = out->weight + (int64_t)t * k, sum = 0;
        for (int32_t e = 0; e < width; e++)
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
        moe_top_k(choice, width, k, expert);
        for (int32_t i = 0; i < k; i++) {
            weight[i] = s->conf->rule == RULE_MOEPP || expert[i] < n ? p[expert[i]] : 0;
            sum += weight[i];
        }
        for (int32_t i = 0; s->conf->rule == RULE_NULL && sum > 0 && i < k; i++)
            weight[i] /= sum; /* none but null ones: all 0 */
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_NEEDS_PREVIOUS_LOGITS,
    .name = "zero-compute-experts",
    .summary = "top-k among the experts and some that cost nothing: null, zero, copy, constant",
    .source = "Z. Zeng et al. 2024, arXiv 2406.13233; P. Jin et al. 2024, arXiv 2410.07348",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .n_free = n_free, .score = score, .select = select },
};
