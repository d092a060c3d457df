/* SPDX-License-Identifier: Apache-2.0
 * random-router.c - experts drawn evenly, for a whole batch or for each token.
 *
 * Source:  S. Zuo et al. 2021, Taming Sparsely Activated Transformer with Stochastic Experts (THOR), arXiv 2110.04260
 * Differs: nothing of the routing; the consistency loss of its training is not routing
 * Cost:    O(k^2) per batch, or per token
 *
 *   per = batch  k experts per layer and step, the same for every token: all or nothing for an expert (k = 2 is THOR's
 *                pair while it is trained, 1 its inference)
 *         token  k experts of its own for every token, by its request and position
 *   weight       1 / k */
#include <moelab.h>

enum { PER_BATCH, PER_TOKEN };
enum { HOOK_ROUTE };

struct conf {
    int64_t top_k;
    int32_t per;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "experts per token; 0: the model's" },
    { "per", MOE_ENUM, offsetof(struct conf, per), PER_BATCH, 0, 0, "batch|token", "", "for whom experts are drawn" },
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

/* k different ones, as Floyd has it: draw i of [0, n - k + i], or that number if the draw is taken. */
static void draw(const struct state *s, const struct moe_batch *b, int64_t key, int32_t k, int32_t *expert)
{
    for (int32_t i = 0; i < k; i++) {
        const int32_t last = b->n_experts - k + i;
        const uint64_t bits = moe_rand(s->env, HOOK_ROUTE, b->step, b->layer, key * k + i);
        expert[i] = (int32_t)(bits % (uint64_t)(last + 1));
        for (int32_t j = 0; j < i; j++)
            if (expert[j] == expert[i]) {
                expert[i] = last;
                break;
            }
    }
}

static int64_t key_of(const struct state *s, const struct moe_batch *b, int32_t t)
{
    const int64_t request = b->request != NULL ? b->request[t] : 0, position = b->position != NULL ? b->position[t] : t;
    return s->conf->per == PER_TOKEN ? request * (INT64_C(1) << 31) + position : 0;
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    int32_t k = s->conf->top_k > 0 ? (int32_t)s->conf->top_k : batch->top_k;
    (void)bias, (void)own;
    if (k > batch->n_experts)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, k,
                               batch->n_experts);
    int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k);
    if (rc < 0)
        return rc;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        draw(s, batch, key_of(s, batch, t), k, out->expert + (int64_t)t * k);
        for (int64_t i = (int64_t)t * k; i < (int64_t)(t + 1) * k; i++)
            out->weight[i] = 1 / (float)k;
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_OWN_GATE, /* there is no gate */
    .name = "random-router",
    .summary = "experts drawn evenly, the same for a whole batch or for each token its own",
    .source = "S. Zuo et al. 2021, arXiv 2110.04260",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .route = route },
};
