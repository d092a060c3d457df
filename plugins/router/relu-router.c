/* SPDX-License-Identifier: Apache-2.0
 * relu-router.c - every expert with a positive logit, whatever their number.
 *
 * Source:  Z. Wang et al. 2024, ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, arXiv 2412.14711;
 *          norm = rms: BlockFFN 2025, arXiv 2507.08771 (from the abstract)
 * Differs: the loss that keeps the number of experts near k is training's; `shift` takes its place on logits that were
 *          trained for another gate
 * Cost:    O(T E)
 *
 *   score    g = max(0, logit - shift);   norm = rms: g / sqrt(mean(g^2) + 1e-6), the mean over all experts
 *   select   experts with scale * g + add > 0: none, or all of them
 *   weight   g */
#include <moelab.h>

enum { NORM_NONE, NORM_RMS };

struct conf {
    double shift;
    int32_t norm;
};

static const struct moe_param params[] = {
    { "shift", MOE_REAL, offsetof(struct conf, shift), 0, -1e6, 1e6, NULL, "logit", "what logits have to exceed" },
    { "norm", MOE_ENUM, offsetof(struct conf, norm), NORM_NONE, 0, 0, "none|rms", "", "what weights are divided by" },
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
    const int32_t n = batch->n_experts;
    const float shift = (float)s->conf->shift;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *g = scores + (int64_t)t * n, squares = 0;
        for (int32_t e = 0; e < n; e++) {
            g[e] = fmaxf(0, batch->router_logits[(int64_t)t * n + e] - shift);
            squares += g[e] * g[e];
        }
        const float by = s->conf->norm == NORM_RMS ? 1 / sqrtf(squares / (float)n + 1e-6f) : 1;
        for (int32_t e = 0; e < n; e++)
            g[e] *= by;
    }
    own->flops = (s->conf->norm == NORM_RMS ? 5.0 : 2.0) * (double)batch->n_tokens * n;
    own->bytes = 2.0 * sizeof(float) * (double)batch->n_tokens * n;
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const int32_t n = batch->n_experts;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *g = scores + (int64_t)t * n;
        if (s->env->host->routes_reserve(s->env, out, out->n + n + 1) < 0)
            return MOE_ENOMEM;
        int64_t m = out->n; /* written whether it counts or not: a branch per expert would be guessed wrongly */
        for (int32_t e = 0; e < n; e++) {
            out->expert[m] = e;
            out->weight[m] = g[e];
            m += (bias != NULL ? bias->scale[e] * g[e] + bias->add[e] : g[e]) > 0;
        }
        out->n = m;
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "relu-router",
    .summary = "every expert with a positive logit",
    .source = "Z. Wang et al. 2024, arXiv 2412.14711; BlockFFN 2025, arXiv 2507.08771",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
