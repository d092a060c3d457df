/* SPDX-License-Identifier: Apache-2.0
 * capacity-aware.c - experts take no more than a share of each device's own tokens; the rest is dropped before it
 * travels, or first offered to the experts that are at hand.
 *
 * Source:  Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts, 2025, arXiv 2503.05066
 * Differs: nothing of the paper's rule (the published patch writes dropped slots back). Routes that are offered carry
 *          the router's score, in proportion to the token's own weights
 * Cost:    O(n log n) for n routes; expand: O(T E / D) more
 *
 *   C = ceil(factor k T / E), at least 1, for the T tokens of one device; off if T <= 1. Each expert keeps C of that
 *   device's routes to it: those of the largest weight (score), the first (order), the last (reverse), or drawn.
 *   expand          every token is first offered to all experts on its own device that it has not chosen
 *   level = device  the routes of one device to another one's n experts together keep n C */
#include <moelab.h>

#include <stdlib.h>
#include <string.h>

enum { DROP_SCORE, DROP_ORDER, DROP_REVERSE, DROP_RANDOM };
enum { LEVEL_EXPERT, LEVEL_DEVICE };
enum { HOOK_REWRITE };

struct conf {
    double factor;
    int32_t drop, level;
    bool expand;
};

static const struct moe_param params[] = {
    { "factor", MOE_REAL, offsetof(struct conf, factor), 2, 1e-6, 1e6, NULL, "", "gamma: capacity / mean load" },
    { "drop", MOE_ENUM, offsetof(struct conf, drop), DROP_SCORE, 0, 0, "score|order|reverse|random", "", "who stays" },
    { "level", MOE_ENUM, offsetof(struct conf, level), LEVEL_EXPERT, 0, 0, "expert|device", "",
      "what has a capacity: each expert, or each device's experts together" },
    { "expand", MOE_BOOL, offsetof(struct conf, expand), 0, 0, 1, NULL, "",
      "offer tokens to the experts of their own device first (Expanded Drop)" },
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

/* A route, in the list that replaces the token's. */
struct bid {
    float weight, combine;
    int32_t token, expert;
    int64_t group; /* what has a capacity, of one device's tokens */
    double rank;   /* the smallest stay */
    bool kept;
};

struct work {
    const struct state *s;
    const struct moe_batch *batch;
    struct bid *bid;
    int64_t n;
    int32_t *host;  /* [E] device of an expert; -1: none */
    int32_t *size;  /* [D] experts there */
    int32_t *local; /* [D] tokens there */
};

static double rank_of(const struct work *w, const struct bid *b, int64_t i)
{
    switch (w->s->conf->drop) {
    case DROP_ORDER:
        return (double)i;
    case DROP_REVERSE:
        return -(double)i;
    case DROP_RANDOM: {
        const struct moe_batch *x = w->batch;
        const int64_t request = x->request != NULL ? x->request[b->token] : 0;
        const int64_t position = x->position != NULL ? x->position[b->token] : b->token;
        return moe_unit(moe_rand(w->s->env, HOOK_REWRITE, x->step, (int64_t)x->layer * x->n_experts + b->expert,
                                 request * (INT64_C(1) << 31) + position));
    }
    default:
        return -(double)b->weight;
    }
}

static void add_bid(struct work *w, int32_t token, int32_t expert, float weight, float combine)
{
    const struct moe_batch *b = w->batch;
    const int32_t source = b->device != NULL ? b->device[token] : 0;
    const int32_t of = w->s->conf->level == LEVEL_DEVICE ? w->host[expert] : expert;
    const int64_t width = w->s->conf->level == LEVEL_DEVICE ? w->s->env->topology->n_devices : b->n_experts;
    struct bid *x = &w->bid[w->n];
    *x = (struct bid){ .weight = weight,
                       .combine = combine,
                       .token = token,
                       .expert = expert,
                       .kept = true,
                       .group = source * width + of };
    x->rank = rank_of(w, x, w->n++);
}

static bool has(const struct moe_routes *r, int32_t token, int32_t expert)
{
    for (int64_t i = r->offset[token]; i < r->offset[token + 1]; i++)
        if (r->expert[i] == expert)
            return true;
    return false;
}

/* Experts on the token's own device that it has not chosen, at the scale of its weights. */
static void offer(struct work *w, const float *scores, const struct moe_routes *r, int32_t token)
{
    const struct moe_batch *b = w->batch;
    const float *own = scores + (int64_t)token * (b->n_experts + b->n_free);
    float weights = 0, sum = 0;
    for (int64_t i = r->offset[token]; i < r->offset[token + 1]; i++) {
        weights += r->weight[i];
        sum += own[r->expert[i]];
    }
    for (int32_t e = 0; e < b->n_experts && sum > 0; e++)
        if (w->host[e] == b->device[token] && !has(r, token, e))
            add_bid(w, token, e, own[e] * weights / sum, own[e] * weights / sum);
}

static int by_group(const void *left, const void *right)
{
    const struct bid *a = left, *b = right;
    if (a->group != b->group)
        return a->group < b->group ? -1 : 1;
    if (a->rank < b->rank || a->rank > b->rank)
        return a->rank < b->rank ? -1 : 1;
    if (a->token != b->token)
        return a->token < b->token ? -1 : 1;
    return (a->expert > b->expert) - (a->expert < b->expert);
}

static int by_token(const void *left, const void *right)
{
    const struct bid *a = left, *b = right;
    if (a->token != b->token)
        return a->token < b->token ? -1 : 1;
    return (a->expert > b->expert) - (a->expert < b->expert);
}

static int64_t capacity(const struct work *w, const struct bid *b)
{
    const int32_t source = w->batch->device != NULL ? w->batch->device[b->token] : 0, tokens = w->local[source];
    const double each = ceil(w->s->conf->factor * w->batch->top_k * tokens / w->batch->n_experts);
    const int64_t c = each < 1 ? 1 : each > 1e15 ? INT64_MAX / 65536 : (int64_t)each;
    if (tokens <= 1)
        return INT64_MAX;
    return w->s->conf->level == LEVEL_DEVICE ? c * w->size[w->host[b->expert]] : c;
}

static void trim(struct work *w)
{
    qsort(w->bid, (size_t)w->n, sizeof *w->bid, by_group);
    for (int64_t i = 0, first = 0; i < w->n; i++) {
        first = w->bid[i].group != w->bid[first].group ? i : first;
        w->bid[i].kept = i - first < capacity(w, &w->bid[first]);
    }
    qsort(w->bid, (size_t)w->n, sizeof *w->bid, by_token);
}

/* Where experts are: of several replicas the first. */
static int read_hosts(struct work *w, const struct moe_placement *placement)
{
    const struct moe_env *env = w->s->env;
    const int32_t n_devices = env->topology->n_devices;
    memset(w->size, 0, (size_t)n_devices * sizeof *w->size);
    memset(w->local, 0, (size_t)n_devices * sizeof *w->local);
    for (int32_t e = 0; e < w->batch->n_experts; e++) {
        const int64_t at = (int64_t)w->batch->layer * env->model->n_experts + e;
        const bool placed = placement != NULL && placement->expert_first[at] < placement->expert_first[at + 1];
        w->host[e] = placed ? placement->replica[placement->by_expert[placement->expert_first[at]]].device : 0;
        w->size[w->host[e]]++;
    }
    for (int32_t t = 0; t < w->batch->n_tokens; t++)
        w->local[w->batch->device != NULL ? w->batch->device[t] : 0]++;
    return MOE_OK;
}

static int open_work(struct work *w, const struct moe_routes *r)
{
    const struct moe_env *env = w->s->env;
    const size_t n_devices = (size_t)env->topology->n_devices, n = (size_t)w->batch->n_experts;
    const size_t offers = w->s->conf->expand ? (size_t)w->batch->n_tokens * n : 0;
    w->bid = env->host->scratch(env, ((size_t)r->n + offers + 1) * sizeof *w->bid);
    w->host = env->host->scratch(env, n * sizeof *w->host);
    w->size = env->host->scratch(env, n_devices * sizeof *w->size);
    w->local = env->host->scratch(env, n_devices * sizeof *w->local);
    return w->bid && w->host && w->size && w->local ? MOE_OK : MOE_ENOMEM;
}

static int rewrite(void *self, const struct moe_batch *batch, const float *scores,
                   const struct moe_placement *placement, struct moe_routes *r, struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    struct work w = { .s = s, .batch = batch };
    if (batch->device == NULL && env->topology->n_devices > 1)
        return env->host->fail(env, MOE_EINVAL, "the workload does not say which device a token is on");
    if (s->conf->expand && (scores == NULL || batch->device == NULL))
        return env->host->fail(env, MOE_EINVAL, "expand: the router has no scores for experts that it did not choose");
    int rc = open_work(&w, r);
    if (rc < 0 || (rc = read_hosts(&w, placement)) < 0)
        return rc;
    for (int32_t t = 0; t < r->n_tokens; t++) {
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++)
            if (r->expert[i] < batch->n_experts)
                add_bid(&w, t, r->expert[i], r->weight[i], r->combine != NULL ? r->combine[i] : r->weight[i]);
            else
                return env->host->fail(env, MOE_EUNSUPPORTED, "routes to experts that cost nothing");
        if (s->conf->expand)
            offer(&w, scores, r, t);
    }
    trim(&w);
    if ((rc = env->host->routes_reserve(env, r, w.n)) < 0)
        return rc;
    r->n = 0;
    for (int32_t t = 0, i = 0; t < r->n_tokens; t++) {
        for (; i < w.n && w.bid[i].token == t; i++) {
            if (!w.bid[i].kept)
                continue;
            r->expert[r->n] = w.bid[i].expert;
            if (r->combine != NULL)
                r->combine[r->n] = w.bid[i].combine;
            r->weight[r->n++] = w.bid[i].weight;
        }
        r->offset[t + 1] = r->n;
    }
    own->flops = (double)w.n * 20;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_CROSS_BATCH, /* who is dropped depends on who else is there */
    .name = "capacity-aware",
    .summary = "capacity for each device's own tokens, dropped before they travel or offered to experts at hand",
    .source = "Capacity-Aware Inference 2025, arXiv 2503.05066",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.balancer = { .rewrite = rewrite },
};
