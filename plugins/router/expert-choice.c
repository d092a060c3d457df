/* SPDX-License-Identifier: Apache-2.0
 * expert-choice.c - experts choose tokens: each takes the same number of those that score it highest.
 *
 * Source:  Y. Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368; per = request: M.
 *          Chowdhury et al. 2023, Patch-level Routing in Mixture-of-Experts, arXiv 2306.04073 (from the abstract)
 * Differs: k = n c / e is rounded up, so that it is never less than one token; equal scores go to the earlier token
 * Cost:    O(T E): each expert selects from its column; with limit O(projections T E) and two arrays of [E][T]
 *
 *   S = softmax(logits) over experts. Each expert takes its k = ceil(n factor / E) best of the n tokens of a batch (or
 *   of each request), by scale * S + add; weight = S. A token may have many experts, or none.
 *
 *   limit = b > 0: A maximises <S', A> + lambda H(A) where rows (experts) add up to k, columns (tokens) to b at most,
 *   and entries lie in [0, 1], by Dykstra's projections; experts take their k largest A. As published there are 100 of
 *   them with lambda = 0.001, which is not always enough: then rows add up to less, and tokens may get more. */
#include <moelab.h>

#include <string.h>

enum { PER_BATCH, PER_REQUEST };

struct conf {
    double factor, lambda;
    int64_t limit, projections;
    int32_t per;
};

static const struct moe_param params[] = {
    { "factor", MOE_REAL, offsetof(struct conf, factor), 2, 1e-6, 1e6, NULL, "experts",
      "experts per token on average: the capacity factor" },
    { "limit", MOE_INT, offsetof(struct conf, limit), 0, 0, 1 << 16, NULL, "experts",
      "experts of a token that the capped form aims at; 0: it is not capped" },
    { "lambda", MOE_REAL, offsetof(struct conf, lambda), 0.001, 1e-6, 1e3, NULL, "", "limit: weight of the entropy" },
    { "projections", MOE_INT, offsetof(struct conf, projections), 100, 1, 1 << 24, NULL, "rounds", "limit: at most" },
    { "per", MOE_ENUM, offsetof(struct conf, per), PER_BATCH, 0, 0, "batch|request", "",
      "whose tokens an expert chooses among" },
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
    for (int64_t i = 0; i < n_scores; i += n)
        moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    own->flops = (s->conf->limit > 0 ? 30.0 * (double)s->conf->projections : 6.0) * (double)n_scores;
    own->bytes = (s->conf->limit > 0 ? 8.0 * (double)s->conf->projections : 3.0) * sizeof(float) * (double)n_scores;
    return MOE_OK;
}

/* ---- the capped form ---- */

static float log_sum(const float *x, int32_t n, int64_t stride)
{
    float top = -INFINITY, sum = 0;
    for (int32_t i = 0; i < n; i++)
        top = fmaxf(top, x[i * stride]);
    for (int32_t i = 0; i < n; i++)
        sum += expf(x[i * stride] - top);
    return top + logf(sum);
}

/* a: [E][n] logarithms, in and out. Corrections of the sets that are not affine: of columns one each, as their entries
 * shrink alike; of entries one each, [E][n]. */
static void project(int64_t rounds, float *a, int32_t n_experts, int32_t n, float k, float b, float *of_column,
                    float *of_entry)
{
    memset(of_column, 0, (size_t)n * sizeof *of_column);
    memset(of_entry, 0, (size_t)n_experts * (size_t)n * sizeof *of_entry);
    for (int64_t round = 0; round < rounds; round++) {
        for (int32_t e = 0; e < n_experts; e++) { /* rows add up to k */
            float *row = a + (int64_t)e * n, by = logf(k) - log_sum(row, n, 1);
            for (int32_t t = 0; t < n; t++)
                row[t] += by;
        }
        for (int32_t t = 0; t < n; t++) { /* columns to b at most */
            for (int32_t e = 0; e < n_experts; e++)
                a[(int64_t)e * n + t] += of_column[t];
            const float over = fmaxf(log_sum(a + t, n_experts, n) - logf(b), 0);
            for (int32_t e = 0; e < n_experts; e++)
                a[(int64_t)e * n + t] -= over;
            of_column[t] = over;
        }
        for (int64_t i = 0; i < (int64_t)n_experts * n; i++) { /* entries to 1 at most */
            const float with = a[i] + of_entry[i];
            a[i] = fminf(with, 0);
            of_entry[i] = with - a[i];
        }
    }
}

/* ---- choosing ---- */

/* Rows of the batch that choose together, in order. */
struct group {
    const int32_t *token;
    int32_t n;
};

/* The k largest of x[0..n), ties to the earlier, in order of their places. room: [n] */
static void take(const float *x, int32_t n, int32_t k, const int32_t *token, float *room, int32_t *out)
{
    int32_t above = 0, found = 0;
    memcpy(room, x, (size_t)n * sizeof *room);
    const float least = moe_kth_largest(room, n, k);
    for (int32_t i = 0; i < n; i++)
        above += x[i] > least;
    for (int32_t i = 0, equal = k - above; i < n && found < k; i++)
        if (x[i] > least || (x[i] >= least && equal-- > 0))
            out[found++] = token[i];
}

/* Experts that choose: all but those that a bias says do not exist. expert: [E]. Returns how many. */
static int32_t find_existing(const struct moe_batch *b, const struct moe_bias *bias, int32_t *expert)
{
    int32_t n = 0;
    for (int32_t e = 0; e < b->n_experts; e++)
        if (bias == NULL || bias->add[e] > -INFINITY)
            expert[n++] = e;
    return n;
}

/* column: [experts that exist][n] scale * score + add; tile by tile, so that both sides stay in the cache. */
static void transpose(const struct moe_batch *b, const float *scores, const struct moe_bias *bias, struct group g,
                      const int32_t *expert, int32_t n_there, float by, float *column)
{
    enum { TILE = 32 };
    for (int32_t i0 = 0; i0 < g.n; i0 += TILE)
        for (int32_t r = 0; r < n_there; r++) {
            const int32_t e = expert[r];
            const float scale = bias != NULL ? bias->scale[e] : 1, add = bias != NULL ? bias->add[e] : 0;
            for (int32_t i = i0; i < i0 + TILE && i < g.n; i++)
                column[(int64_t)r * g.n + i] = (scale * scores[(int64_t)g.token[i] * b->n_experts + e] + add) * by;
        }
}

/* What every expert that exists takes of one group: [n_there][k]. */
static int choose(const struct state *s, const struct moe_batch *b, const float *scores, const struct moe_bias *bias,
                  struct group g, const int32_t *expert, int32_t n_there, int32_t k, int32_t *picked)
{
    const struct moe_env *env = s->env;
    const size_t n = (size_t)g.n, cells = n * (size_t)n_there;
    const bool capped = s->conf->limit > 0;
    float *a = env->host->scratch(env, (cells + 1) * sizeof *a);
    float *room = env->host->scratch(env, (n + 1) * sizeof *room);
    float *entry = capped ? env->host->scratch(env, (cells + 1) * sizeof *entry) : room;
    if (!a || !room || !entry)
        return MOE_ENOMEM;
    transpose(b, scores, bias, g, expert, n_there, capped ? 1 / (float)s->conf->lambda : 1, a);
    if (capped)
        project(s->conf->projections, a, n_there, g.n, (float)k, (float)s->conf->limit, room, entry);
    for (int32_t r = 0; r < n_there; r++)
        take(a + (int64_t)r * g.n, g.n, k, g.token, room, picked + (int64_t)r * k);
    return MOE_OK;
}

/* Tokens of one request behind each other, requests in order of their first token; first: [n_groups + 1]. Returns
 * n_groups, or < 0. */
static int32_t sort_requests(const struct state *s, const struct moe_batch *b, int32_t *token, int32_t *first)
{
    const struct moe_env *env = s->env;
    int32_t n_groups = 0, at = 0;
    uint8_t *done = env->host->scratch(env, (size_t)b->n_tokens + 1);
    if (done == NULL)
        return MOE_ENOMEM;
    memset(done, 0, (size_t)b->n_tokens + 1);
    for (int32_t t = 0; t < b->n_tokens; t++) {
        if (done[t])
            continue;
        first[n_groups++] = at;
        for (int32_t u = t; u < b->n_tokens; u++)
            if (!done[u] && b->request[u] == b->request[t]) {
                done[u] = 1;
                token[at++] = u;
            }
    }
    first[n_groups] = at;
    return n_groups;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_tokens, n_experts = batch->n_experts;
    int32_t *token = env->host->scratch(env, ((size_t)n + 1) * sizeof *token);
    int32_t *first = env->host->scratch(env, ((size_t)n + 2) * sizeof *first), n_groups = n > 0;
    int64_t *start = env->host->scratch(env, ((size_t)n_experts + 1) * sizeof *start), picks = 0, at = 0;
    int32_t *expert = env->host->scratch(env, ((size_t)n_experts + 1) * sizeof *expert);
    if (!token || !first || !start || !expert)
        return MOE_ENOMEM;
    const int32_t n_there = find_existing(batch, bias, expert);
    if (s->conf->per == PER_REQUEST && batch->request == NULL)
        return env->host->fail(env, MOE_EINVAL, "per = request: the workload does not say whose tokens are whose");
    for (int32_t t = 0; t < n; t++)
        token[t] = t;
    first[0] = 0;
    first[1] = n;
    if (s->conf->per == PER_REQUEST && (n_groups = sort_requests(s, batch, token, first)) < 0)
        return n_groups;
    for (int32_t g = 0; g < n_groups; g++) {
        const int32_t of = first[g + 1] - first[g];
        const double k = ceil(of * s->conf->factor / n_experts);
        picks += k < of ? (int64_t)k : of;
    }
    int32_t *taken = env->host->scratch(env, ((size_t)picks * (size_t)n_experts + 1) * sizeof *taken);
    int32_t *sorted = env->host->scratch(env, ((size_t)picks * (size_t)n_experts + 1) * sizeof *sorted);
    float *weight = env->host->scratch(env, ((size_t)picks * (size_t)n_experts + 1) * sizeof *weight);
    if (!taken || !sorted || !weight)
        return MOE_ENOMEM;
    for (int32_t g = 0; g < n_groups; g++) { /* each group's [E][k], then all by expert */
        const struct group own = { token + first[g], first[g + 1] - first[g] };
        const double ideal = ceil(own.n * s->conf->factor / n_experts);
        const int32_t k = ideal < own.n ? (int32_t)ideal : own.n;
        int rc = choose(s, batch, scores, bias, own, expert, n_there, k, taken);
        if (rc < 0)
            return rc;
        for (int32_t r = 0; r < n_there; r++)
            memcpy(sorted + (int64_t)r * picks + at, taken + (int64_t)r * k, (size_t)k * sizeof *sorted);
        at += k;
    }
    start[0] = 0;
    for (int32_t e = 0, r = 0; e < n_experts; e++) {
        const bool there = r < n_there && expert[r] == e;
        start[e + 1] = start[e] + (there ? picks : 0);
        r += there;
    }
    for (int64_t i = 0; i < picks * n_there; i++)
        weight[i] = scores[(int64_t)sorted[i] * n_experts + expert[i / picks]];
    return env->host->routes_transpose(env, n, n_experts, start, sorted, weight, out);
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_CROSS_BATCH, /* tokens compete for experts */
    .name = "expert-choice",
    .summary = "every expert takes the same number of the tokens that score it highest",
    .source = "Y. Zhou et al. 2022, arXiv 2202.09368",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
