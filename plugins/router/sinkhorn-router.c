/* SPDX-License-Identifier: Apache-2.0
 * sinkhorn-router.c - top-k of a transport plan between tokens and experts, whose rows and columns add up alike.
 *
 * Source:  A. Clark et al. 2022, Unified Scaling Laws for Routed Language Models (S-BASE), arXiv 2202.01169, as in
 *          NVIDIA's Megatron-LM (kernel = logits); Selective Sinkhorn Routing for Improved Sparse Mixture of Experts,
 *          2025, arXiv 2511.08972 (kernel = probabilities, share < 1)
 * Differs: the noise of Selective Sinkhorn's other steps is training's and left out; equal entries go to the lower id
 * Cost:    O(rounds T E) and an array of [T][E]
 *
 *   K = exp(logits), or exp(softmax(logits) / xi); u = r / (K v), v = s / (K' u) until v moves by less than `tolerance`
 *   on average; rows add up to r = 1 / T and columns to s = 1 / E (kernel = logits, as Megatron's), or to 1 and T / E.
 *   select   the k largest of a token's row of the plan diag(u) K diag(v)
 *   weight   logits: sigmoid of the logit where k = 1, else the softmax over all
 *            probabilities: plan / sum of the chosen
 *   share    of the steps use the plan, drawn for each step and layer; the others take the k largest probabilities */
#include <moelab.h>

enum { KERNEL_LOGITS, KERNEL_PROBABILITIES };
enum { HOOK_STEP };

struct conf {
    int64_t top_k, rounds;
    int32_t kernel;
    double xi, tolerance, share;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "experts per token; 0: the model's" },
    { "kernel", MOE_ENUM, offsetof(struct conf, kernel), KERNEL_LOGITS, 0, 0, "logits|probabilities", "",
      "what is exponentiated" },
    { "xi", MOE_REAL, offsetof(struct conf, xi), 0.5, 1e-3, 1e3, NULL, "",
      "kernel = probabilities: they are divided by it (0.5 to 1)" },
    { "tolerance", MOE_REAL, offsetof(struct conf, tolerance), 1e-4, 0, 1, NULL, "",
      "mean change of v at which it ends" },
    { "rounds", MOE_INT, offsetof(struct conf, rounds), 100, 1, 100000, NULL, "rounds", "at most" },
    { "share", MOE_REAL, offsetof(struct conf, share), 1, 0, 1, NULL, "",
      "of steps that use the plan (Selective Sinkhorn: 0.001 to 0.01)" },
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

/* cell: [T][E] the kernel on entry, the plan on exit. u: [T]; v: [E], [E]. Rounds that it took. */
static int64_t sinkhorn(const struct conf *c, int32_t n, int32_t n_experts, float *cell, double *u, double *v,
                        double *was)
{
    const bool logits = c->kernel == KERNEL_LOGITS;
    const double row = logits ? 1.0 / n : 1, column = logits ? 1.0 / n_experts : (double)n / n_experts;
    const double least = logits ? 1e-8 : 0; /* as Megatron has it, against 1 / 0 */
    int64_t round = 0;
    for (int32_t e = 0; e < n_experts; e++)
        v[e] = 1;
    for (double change = INFINITY; change > c->tolerance && round < c->rounds; round++) {
        for (int32_t e = 0; e < n_experts; e++) {
            was[e] = v[e];
            v[e] = 0;
        }
        for (int32_t t = 0; t < n; t++) {
            const float *k = cell + (int64_t)t * n_experts;
            double sum = 0;
            for (int32_t e = 0; e < n_experts; e++)
                sum += was[e] * (double)k[e];
            u[t] = row / (sum + least);
            for (int32_t e = 0; e < n_experts; e++)
                v[e] += u[t] * (double)k[e];
        }
        change = 0;
        for (int32_t e = 0; e < n_experts; e++) {
            v[e] = column / (v[e] + least);
            change += fabs(v[e] - was[e]) / n_experts;
        }
    }
    for (int32_t t = 0; t < n; t++)
        for (int32_t e = 0; e < n_experts; e++)
            cell[(int64_t)t * n_experts + e] = (float)(u[t] * (double)cell[(int64_t)t * n_experts + e] * v[e]);
    return round;
}

/* Exponentials that do not overflow: a factor of a row or of all is one of u's. */
static void make_kernel(const struct conf *c, const struct moe_batch *b, float *cell)
{
    const int64_t n = b->n_experts;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        float *row = cell + t * n;
        const float *logits = b->router_logits + t * n;
        if (c->kernel == KERNEL_LOGITS) {
            for (int64_t e = 0; e < n; e++)
                row[e] = expf(logits[e]);
            continue;
        }
        moe_softmax(logits, b->n_experts, row);
        for (int64_t e = 0; e < n; e++)
            row[e] = expf((row[e] - 1) / (float)c->xi);
    }
}

static void weigh(const struct conf *c, const struct moe_batch *b, int32_t t, const float *plan, const int32_t *expert,
                  int32_t k, bool planned, float *p, float *weight)
{
    const float *logits = b->router_logits + (int64_t)t * b->n_experts;
    float sum = 0;
    if (c->kernel == KERNEL_LOGITS && k == 1) {
        weight[0] = 1 / (1 + expf(-logits[expert[0]]));
        return;
    }
    moe_softmax(logits, b->n_experts, p);
    for (int32_t i = 0; i < k; i++)
        sum += weight[i] = c->kernel == KERNEL_PROBABILITIES && planned ? plan[expert[i]] : p[expert[i]];
    for (int32_t i = 0; c->kernel == KERNEL_PROBABILITIES && i < k; i++)
        weight[i] = sum > 0 ? weight[i] / sum : 1 / (float)k;
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts, k = c->top_k > 0 ? (int32_t)c->top_k : batch->top_k;
    const size_t cells = (size_t)batch->n_tokens * (size_t)n;
    const bool planned = moe_unit(moe_rand(env, HOOK_STEP, batch->step, batch->layer, 0)) < c->share;
    (void)bias; /* it would undo the plan's sums */
    if (k > n)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, k, n);
    float *cell = env->host->scratch(env, (cells + 1) * sizeof *cell),
          *p = env->host->scratch(env, (size_t)n * sizeof *p);
    double *u = env->host->scratch(env, ((size_t)batch->n_tokens + 2 * (size_t)n + 1) * sizeof *u);
    int rc = cell && p && u ? env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k) : MOE_ENOMEM;
    if (rc < 0)
        return rc;
    int64_t rounds = 0;
    if (planned && batch->n_tokens > 0) {
        make_kernel(c, batch, cell);
        rounds = sinkhorn(c, batch->n_tokens, n, cell, u, u + batch->n_tokens, u + batch->n_tokens + n);
    }
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *row = (planned ? cell : batch->router_logits) + (int64_t)t * n;
        moe_top_k(row, n, k, out->expert + (int64_t)t * k);
        weigh(c, batch, t, row, out->expert + (int64_t)t * k, k, planned, p, out->weight + (int64_t)t * k);
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    own->flops = (4.0 * (double)rounds + 6) * (double)cells;
    own->bytes = sizeof(float) * (1.0 * (double)rounds + 4) * (double)cells;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_CROSS_BATCH, /* columns are made to add up over all tokens */
    .name = "sinkhorn-router",
    .summary = "top-k of a transport plan in which every expert gets as much",
    .source = "A. Clark et al. 2022, arXiv 2202.01169; Selective Sinkhorn Routing 2025, arXiv 2511.08972",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .route = route },
};
