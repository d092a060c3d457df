/* SPDX-License-Identifier: Apache-2.0
 * rectify-router.c - what capacity wastes is used: dropped tokens go to an expert of their own device, and experts with
 * room take the tokens that score them highest.
 *
 * Source:  Turn Waste into Worth: Rectifying Top-k Router of MoE, 2024, arXiv 2402.12399 (from the abstract)
 * Differs: a rerouted token goes to the best expert of its device that has room, unless overfull; new routes carry the
 *          router's score, in proportion to the token's own weights
 * Cost:    O(n log n) for n routes, and fill: O(T E log T)
 *
 *   C = ceil(factor * routes / E). Each expert keeps its C largest weights; then
 *   intra   a token that lost an expert gets the best-scored expert on its own device that it does not have: no traffic
 *   fill    an expert with fewer than C tokens takes those of the largest score that it does not have, up to C */
#include <moelab.h>

#include <stdlib.h>
#include <string.h>

struct conf {
    double factor;
    bool intra, fill, overfull;
};

static const struct moe_param params[] = {
    { "factor", MOE_REAL, offsetof(struct conf, factor), 1, 1e-6, 1e6, NULL, "", "capacity / mean load" },
    { "intra", MOE_BOOL, offsetof(struct conf, intra), 1, 0, 1, NULL, "", "dropped tokens go to experts at hand" },
    { "fill", MOE_BOOL, offsetof(struct conf, fill), 1, 0, 1, NULL, "", "experts with room take more tokens" },
    { "overfull", MOE_BOOL, offsetof(struct conf, overfull), 0, 0, 1, NULL, "",
      "experts at hand may get more than their capacity" },
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

struct work {
    const struct state *s;
    const struct moe_batch *batch;
    const float *scores;
    int64_t capacity;
    float *weight;  /* [T][E] NAN: no route */
    float *combine; /* [T][E] where routes have it, else `weight` */
    float *unit;    /* [T] weight per score */
    int64_t *load;  /* [E] */
    int32_t *host;  /* [E] */
    struct wish {
        float score;
        int32_t token;
    } * wish; /* [T] */
};

static int largest_first(const void *left, const void *right)
{
    const struct wish *a = left, *b = right;
    if (a->score < b->score || a->score > b->score)
        return a->score > b->score ? -1 : 1;
    return (a->token > b->token) - (a->token < b->token);
}

static float *cell(const struct work *w, int32_t t, int32_t e)
{
    return &w->weight[(int64_t)t * w->batch->n_experts + e];
}

static float score_of(const struct work *w, int32_t t, int32_t e)
{
    return w->scores[(int64_t)t * (w->batch->n_experts + w->batch->n_free) + e];
}

static void add(struct work *w, int32_t t, int32_t e)
{
    *cell(w, t, e) = score_of(w, t, e) * w->unit[t];
    w->combine[(int64_t)t * w->batch->n_experts + e] = *cell(w, t, e);
    w->load[e]++;
}

/* Each expert keeps the largest weights; lost: [T] how many experts a token has lost. */
static void drop(struct work *w, int32_t *lost)
{
    for (int32_t e = 0; e < w->batch->n_experts; e++) {
        int32_t n = 0;
        for (int32_t t = 0; t < w->batch->n_tokens; t++)
            if (!isnan(*cell(w, t, e)))
                w->wish[n++] = (struct wish){ *cell(w, t, e), t };
        w->load[e] = n;
        if (n <= w->capacity)
            continue;
        qsort(w->wish, (size_t)n, sizeof *w->wish, largest_first);
        for (int32_t i = (int32_t)w->capacity; i < n; i++) {
            *cell(w, w->wish[i].token, e) = NAN;
            lost[w->wish[i].token]++;
        }
        w->load[e] = w->capacity;
    }
}

static void reroute(struct work *w, int32_t *lost)
{
    const struct moe_batch *b = w->batch;
    for (int32_t t = 0; t < b->n_tokens; t++)
        for (; lost[t] > 0; lost[t]--) {
            int32_t best = -1;
            for (int32_t e = 0; e < b->n_experts; e++)
                if (w->host[e] == (b->device != NULL ? b->device[t] : 0) && isnan(*cell(w, t, e)) &&
                    (w->s->conf->overfull || w->load[e] < w->capacity) &&
                    (best < 0 || score_of(w, t, e) > score_of(w, t, best)))
                    best = e;
            if (best < 0)
                break;
            add(w, t, best);
        }
}

static void fill_in(struct work *w)
{
    for (int32_t e = 0; e < w->batch->n_experts; e++) {
        int32_t n = 0;
        for (int32_t t = 0; t < w->batch->n_tokens && w->load[e] < w->capacity; t++)
            if (isnan(*cell(w, t, e)))
                w->wish[n++] = (struct wish){ score_of(w, t, e), t };
        qsort(w->wish, (size_t)n, sizeof *w->wish, largest_first);
        for (int32_t i = 0; i < n && w->load[e] < w->capacity; i++)
            add(w, w->wish[i].token, e);
    }
}

static int open_work(struct work *w, const struct moe_routes *r, const struct moe_placement *placement)
{
    const struct moe_env *env = w->s->env;
    const int32_t n = w->batch->n_experts, n_tokens = w->batch->n_tokens;
    const size_t cells = (size_t)n_tokens * (size_t)n + 1;
    w->weight = env->host->scratch(env, cells * sizeof *w->weight);
    w->combine = env->host->scratch(env, cells * sizeof *w->combine);
    w->unit = env->host->scratch(env, ((size_t)n_tokens + 1) * sizeof *w->unit);
    w->load = env->host->scratch(env, (size_t)n * sizeof *w->load);
    w->host = env->host->scratch(env, (size_t)n * sizeof *w->host);
    w->wish = env->host->scratch(env, ((size_t)n_tokens + 1) * sizeof *w->wish);
    if (!w->weight || !w->combine || !w->unit || !w->load || !w->host || !w->wish)
        return MOE_ENOMEM;
    for (size_t i = 0; i + 1 < cells; i++)
        w->weight[i] = w->combine[i] = NAN;
    for (int32_t t = 0; t < n_tokens; t++) {
        float weights = 0, scores = 0;
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++) {
            if (r->expert[i] >= n)
                return env->host->fail(env, MOE_EUNSUPPORTED, "routes to experts that cost nothing");
            *cell(w, t, r->expert[i]) = r->weight[i];
            w->combine[(int64_t)t * n + r->expert[i]] = r->combine != NULL ? r->combine[i] : r->weight[i];
            weights += r->weight[i];
            scores += score_of(w, t, r->expert[i]);
        }
        w->unit[t] = scores > 0 ? weights / scores : 1;
    }
    for (int32_t e = 0; e < n; e++) {
        const int64_t at = (int64_t)w->batch->layer * env->model->n_experts + e;
        const bool placed = placement != NULL && placement->expert_first[at] < placement->expert_first[at + 1];
        w->host[e] = placed ? placement->replica[placement->by_expert[placement->expert_first[at]]].device : 0;
    }
    return MOE_OK;
}

static int rewrite(void *self, const struct moe_batch *batch, const float *scores,
                   const struct moe_placement *placement, struct moe_routes *r, struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    struct work w = { .s = s, .batch = batch, .scores = scores };
    if (scores == NULL)
        return env->host->fail(env, MOE_EINVAL, "the router has no scores for experts that it did not choose");
    int rc = open_work(&w, r, placement);
    int32_t *lost = env->host->scratch(env, ((size_t)batch->n_tokens + 1) * sizeof *lost);
    if (rc < 0 || lost == NULL)
        return rc < 0 ? rc : MOE_ENOMEM;
    memset(lost, 0, ((size_t)batch->n_tokens + 1) * sizeof *lost);
    w.capacity = (int64_t)ceil(s->conf->factor * (double)r->n / batch->n_experts);
    drop(&w, lost);
    if (s->conf->intra)
        reroute(&w, lost);
    if (s->conf->fill)
        fill_in(&w);
    int64_t n = 0, at = 0;
    for (int32_t e = 0; e < batch->n_experts; e++)
        n += w.load[e];
    if ((rc = env->host->routes_reserve(env, r, n)) < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        for (int32_t e = 0; e < batch->n_experts; e++)
            if (!isnan(*cell(&w, t, e))) {
                r->expert[at] = e;
                if (r->combine != NULL)
                    r->combine[at] = w.combine[(int64_t)t * batch->n_experts + e];
                r->weight[at++] = *cell(&w, t, e);
            }
        r->offset[t + 1] = at;
    }
    r->n = at;
    own->flops = 10.0 * batch->n_tokens * batch->n_experts;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_CROSS_BATCH, /* who is dropped, or taken, depends on who else is there */
    .name = "rectify-router",
    .summary = "capacity, then dropped tokens to experts at hand and room to tokens that score highest",
    .source = "Turn Waste into Worth 2024, arXiv 2402.12399",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.balancer = { .rewrite = rewrite },
};
