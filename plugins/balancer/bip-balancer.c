/* SPDX-License-Identifier: Apache-2.0
 * bip-balancer.c - prices of experts from the dual of the assignment problem, improved a few times per batch.
 *
 * Source:  Binary-Integer-Programming Based Algorithm for Expert Load Balancing in Mixture-of-Experts
 *          Models, 2025, arXiv 2502.15451
 * Differs: the update is derived from the linear program's dual as below; the paper's abstract does not print it
 * Cost:    O(rounds T E): two selections per round; [T][E] of scratch once
 *
 *   maximise sum s_ij x_ij, each of T tokens with k experts at most, each of E experts with k T / E tokens at most.
 *   Dual: minimise k sum p_i + (k T / E) sum q_j + sum max(0, s_ij - p_i - q_j) over p, q >= 0, one after the other:
 *   p_i = max(0, (k + 1)-th largest over j of s_ij - q_j)
 *   q_j = max(0, (k T / E + 1)-th largest over i of s_ij - p_i), rounds times; q is kept from batch to batch
 *   Select on s - q; gate weights keep s. */
#include <moelab.h>

struct conf {
    int64_t top_k, rounds;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "experts per token that the router takes; 0: the model's" },
    { "rounds", MOE_INT, offsetof(struct conf, rounds), 4, 1, 1 << 20, NULL, "rounds", "of improvement per batch" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    float *price; /* [L][E] q */
    int32_t width;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    *s = (struct state){ .env = env, .conf = conf, .width = env->model->n_experts };
    s->price = env->host->alloc(env, (size_t)env->model->n_layers * (size_t)s->width, sizeof *s->price);
    return s->price != NULL ? MOE_OK : MOE_ENOMEM;
}

/* The k-th largest of x[i] - y[i], at least 0; 0 where there are fewer. room: [n] */
static float kth_above(const float *x, const float *y, int64_t n, int64_t k, float *room)
{
    enum { LONG = 512, FEW = 16 };
    int32_t best[FEW];
    if (k > n)
        return 0;
    for (int64_t i = 0; i < n; i++)
        room[i] = x[i] - y[i];
    float value;
    if (k <= FEW && n <= LONG) {
        moe_top_k(room, (int32_t)n, (int32_t)k, best);
        value = room[best[k - 1]];
    } else {
        value = moe_kth_largest(room, n, k);
    }
    return value > 0 ? value : 0;
}

/* scores: [T][stride], of which the first n columns are experts. */
static int improve(const struct state *s, const struct moe_batch *b, const float *scores, int32_t k, float *q)
{
    const struct moe_env *env = s->env;
    const int32_t n = b->n_experts, n_tokens = b->n_tokens, stride = n + b->n_free;
    const int64_t share = (int64_t)k * n_tokens / n;
    const size_t wide = (size_t)(n > n_tokens ? n : n_tokens) + 1;
    float *column = env->host->scratch(env, ((size_t)n * (size_t)n_tokens + 1) * sizeof *column); /* [E][T] */
    float *p = env->host->scratch(env, ((size_t)n_tokens + 1) * sizeof *p);
    float *room = env->host->scratch(env, wide * sizeof *room);
    if (column == NULL || p == NULL || room == NULL)
        return MOE_ENOMEM;
    enum { TILE = 32 }; /* transposed tile by tile: both sides stay in the cache */
    for (int32_t t0 = 0; t0 < n_tokens; t0 += TILE)
        for (int32_t e = 0; e < n; e++)
            for (int32_t t = t0; t < t0 + TILE && t < n_tokens; t++)
                column[(int64_t)e * n_tokens + t] = scores[(int64_t)t * stride + e];
    for (int64_t round = 0; round < s->conf->rounds; round++) {
        for (int32_t t = 0; t < n_tokens; t++)
            p[t] = kth_above(scores + (int64_t)t * stride, q, n, k + 1, room);
        for (int32_t e = 0; e < n; e++)
            q[e] = kth_above(column + (int64_t)e * n_tokens, p, n_tokens, share + 1, room);
    }
    return MOE_OK;
}

static int adjust(void *self, const struct moe_batch *batch, const float *scores, struct moe_bias *bias,
                  struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t k = s->conf->top_k > 0 ? (int32_t)s->conf->top_k : batch->top_k, n = batch->n_experts;
    float *q = s->price + (size_t)batch->layer * (size_t)s->width;
    if (k > n)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, k, n);
    int rc = batch->n_tokens > 0 ? improve(s, batch, scores, k, q) : MOE_OK;
    for (int32_t e = 0; e < n && rc == MOE_OK; e++)
        bias->add[e] -= q[e];
    const double cells = (double)batch->n_tokens * n * (double)s->conf->rounds;
    own->flops = 8 * cells; /* two selections of about four passes */
    own->bytes = 2 * sizeof(float) * cells;
    return rc;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_CROSS_BATCH, /* prices depend on all tokens */
    .name = "bip-balancer",
    .summary = "prices of experts from the dual of the assignment problem, within the batch",
    .source = "BIP-based expert load balancing 2025, arXiv 2502.15451",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.balancer = { .adjust = adjust },
};
