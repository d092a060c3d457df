/* SPDX-License-Identifier: Apache-2.0
 * cartesian-router.c - an expert is a row and a column; the k best sums, found without looking at all experts.
 *
 * Source:  OmniMoE: An Efficient MoE by Orchestrating Atomic Experts at Scale, arXiv 2602.05711, from the abstract;
 *          each > 0: CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing in
 *          Mixture-of-Experts, from the abstract
 * Differs: a softmax over the chosen sums as weights is a choice made here, as is the product of both sets' softmaxes
 *          with each > 0. The order in which experts run is not the router's. Balancers cannot bias it: not all experts
 *          ever have a score
 * Cost:    2 T H (P + Q) FLOPs instead of 2 T H P Q, and O(T k (P + Q + k log k)) comparisons
 *
 *   expert   i Q + j                for row i of P and column j of Q, P Q = E
 *   r, c     = row h, column h
 *   select   each = 0: the k largest of r_i + c_j. With rows and columns sorted, the pair at ranks (a, b) has (a + 1)
 *            (b + 1) - 1 pairs before it, so only ranks with (a + 1)(b + 1) <= k matter: k ln k of them
 *            each = n: the n best rows with each of the n best columns, n^2 experts
 *   weight   softmax of the chosen sums, which with each = n is the product of softmaxes over the chosen */
#include <moelab_top_k.h>

struct conf {
    struct moe_tensor row, column;
    int64_t top_k, each;
};

static const struct moe_param params[] = {
    {"row", MOE_TENSOR, offsetof(struct conf, row), 0, 0, 0, "L,P,H", "", "gate of P rows"},
    {"column", MOE_TENSOR, offsetof(struct conf, column), 0, 0, 0, "L,Q,H", "", "gate of Q columns, P Q = E"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"each", MOE_INT, offsetof(struct conf, each), 0, 0, 1 << 12, NULL, "",
     "rows and columns that are chosen apart, every pair of them an expert; 0: the k best sums"},
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
    if (c->row.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "row: no tensor given, expected a .npy file [L,P,H]");
    if (c->column.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "column: no tensor given, expected a .npy file [L,Q,H]");
    return MOE_OK;
}

static float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* Hidden states are as wide as the tensor expects. */
static int check_width(const struct moe_env *env, const struct conf *conf, const struct moe_batch *batch)
{
    if (batch->n_hidden != conf->row.shape[2])
        return env->host->fail(env, MOE_EINVAL, "layer %d: hidden states are %d wide, row expects %lld",
                               batch->layer, batch->n_hidden, (long long)conf->row.shape[2]);
    return MOE_OK;
}

/* Scores of one half of the gate; the first that is no finite number, or -1. */
static int32_t half(const float *gate, int32_t n, const float *h, int32_t width, float *score)
{
    for (int32_t i = 0; i < n; i++)
        if (!isfinite(score[i] = dot(gate + (int64_t)i * width, h, width)))
            return i;
    return -1;
}

/* One token: pairs of the n_rows and n_columns best (their ids in `rank`, the rows' first), largest sum first, equal
 * sums by id. Sums are made in double, where those of two floats are equal only if both parts are (but for exponents
 * far apart), so that ranks and sums never disagree. */
static void best_pairs(const float *r, const float *c, const int32_t *rank, int32_t n_rows, int32_t n_columns,
                       int32_t n_all_columns, int32_t k, int32_t *expert, double *sum)
{
    int32_t have = 0;
    for (int32_t a = 0; a < n_rows; a++) {
        for (int32_t b = 0; b < n_columns && ((int64_t)(a + 1) * (b + 1) <= k || n_rows * n_columns == k); b++) {
            const int32_t i = rank[a], j = rank[n_rows + b], id = i * n_all_columns + j;
            const double x = (double)r[i] + (double)c[j];
            int32_t at = have;
            while (at > 0 && (x > sum[at - 1] || (x == sum[at - 1] && id < expert[at - 1])))
                at--;
            if (at == k)
                continue;
            have += have < k;
            for (int32_t m = have - 1; m > at; m--) {
                sum[m] = sum[m - 1];
                expert[m] = expert[m - 1];
            }
            sum[at] = x;
            expert[at] = id;
        }
    }
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    const struct conf *c = s->conf;
    const struct moe_env *env = s->env;
    const int32_t p = (int32_t)c->row.shape[1], q = (int32_t)c->column.shape[1], width = batch->n_hidden;
    const int32_t each = (int32_t)c->each;
    (void)bias;
    if ((int64_t)p * q != batch->n_experts)
        return env->host->fail(env, MOE_EINVAL, "layer %d: row has %d, column has %d, expected a product of %d experts",
                               batch->layer, p, q, batch->n_experts);
    if (c->column.shape[2] != c->row.shape[2])
        return env->host->fail(env, MOE_EINVAL, "column is %lld wide, row %lld", (long long)c->column.shape[2],
                               (long long)c->row.shape[2]);
    if (each > p || each > q)
        return env->host->fail(env, MOE_EINVAL, "layer %d: each = %d of %d rows and %d columns", batch->layer, each, p,
                               q);
    const int32_t k = each > 0 ? each * each : moe_k_of(env, batch, c->top_k);
    int rc = k < 0 ? k : check_width(env, c, batch);
    if (rc < 0 || (rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k)) < 0)
        return rc;
    const int32_t n_rows = each > 0 ? each : k < p ? k : p, n_columns = each > 0 ? each : k < q ? k : q;
    double *sum = env->host->scratch(env, (size_t)k * sizeof *sum);
    float *score = env->host->scratch(env, (size_t)(p + q) * sizeof *score);
    int32_t *rank = env->host->scratch(env, (size_t)(n_rows + n_columns) * sizeof *rank);
    if (sum == NULL || score == NULL || rank == NULL)
        return MOE_ENOMEM;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *h = batch->hidden + (int64_t)t * width;
        int32_t i = half(c->row.data + (int64_t)batch->layer * p * width, p, h, width, score);
        int32_t j = i >= 0 ? 0 : half(c->column.data + (int64_t)batch->layer * q * width, q, h, width, score + p);
        if (i >= 0 || j >= 0)
            return env->host->fail(env, MOE_EINVAL, "layer %d: token %d, expert %d: score is no finite number",
                                   batch->layer, t, i >= 0 ? i * q : j);
        moe_top_k(score, p, n_rows, rank);
        moe_top_k(score + p, q, n_columns, rank + n_rows);
        best_pairs(score, score + p, rank, n_rows, n_columns, q, k, out->expert + (int64_t)t * k, sum);
        float *weight = out->weight + (int64_t)t * k;
        for (int32_t m = 0; m < k; m++)
            weight[m] = (float)(sum[m] - sum[0]);
        moe_softmax(weight, k, weight);
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    /* both halves, ranks, k ln k sums, weights */
    own->flops = (double)batch->n_tokens * ((double)(p + q) * (2.0 * width + 1) + k * (log((double)k) + 5));
    own->bytes = sizeof(float) * ((double)(p + q) * width + (double)batch->n_tokens * width);
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_HIDDEN | MOE_NEEDS_TENSORS | MOE_OWN_GATE,
    .name = "cartesian-router",
    .summary = "an expert is a row and a column, the k best sums are found without scoring all",
    .source = "OmniMoE: An Efficient MoE by Orchestrating Atomic Experts at Scale, arXiv 2602.05711",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.route = route},
};
