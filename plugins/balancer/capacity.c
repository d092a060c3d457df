/* SPDX-License-Identifier: Apache-2.0
 * capacity.c - every expert takes at most C tokens; routes beyond that are dropped.
 *
 * Source:  D. Lepikhin et al. 2020, GShard, arXiv 2006.16668; W. Fedus et al. 2021, Switch Transformers,
 *          arXiv 2101.03961; by score: Megatron-LM, moe_utils.py, drop_policy "probs"
 * Differs: position keeps the earliest tokens, as GShard and Switch do; Megatron's "position" keeps whichever its
 *          top-k over equal values returns
 * Cost:    O(n + E), and O(m log m) for each expert with m > C routes; scratch only
 *
 *   C = ceil(factor * n / E), n the routes to experts that cost something: T * K for a top-K router, so this is
 *       Switch's tokens / experts * factor at K = 1; or the `tokens` given
 *   an expert with more than C routes keeps the C with the largest weights (score; ties: the earlier token) or the
 *   first C in token order (position), or those of the largest numbers drawn for (request, position, expert) (random)
 *   scope = device: every device's tokens compete only among themselves, n and C are those of the device */
#include <moelab.h>

#include <stdlib.h>
#include <string.h>

enum drop { DROP_SCORE, DROP_POSITION, DROP_RANDOM };
enum { HOOK_REWRITE };
enum scope { SCOPE_ALL, SCOPE_DEVICE };

struct conf {
    double factor;
    int64_t tokens;
    int32_t drop, scope;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"factor", MOE_REAL, offsetof(struct conf, factor), 1.25, 1e-6, 1e6, NULL, "",
     "capacity over the mean load of an expert"},
    {"tokens", MOE_INT, offsetof(struct conf, tokens), 0, 0, 1 << 30, NULL, "tokens",
     "capacity of an expert in tokens; 0: from factor"},
    {"drop", MOE_ENUM, offsetof(struct conf, drop), DROP_SCORE, 0, 0, "score|position|random", "",
     "whom an expert keeps: the largest weights, who came first, or whom a draw names"},
    {"scope", MOE_ENUM, offsetof(struct conf, scope), SCOPE_ALL, 0, 0, "all|device", "",
     "who competes for an expert: all tokens of the batch, or those of one device"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 0, 0, 1, NULL, "",
     "scale the weights that a token keeps to the sum it had before"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){.env = env, .conf = conf};
    return MOE_OK;
}

/* Routes grouped by (device, expert), in token order inside a group. */
struct groups {
    int64_t *first; /* [n_groups + 1] */
    int64_t *route; /* [n] */
    int32_t *of;    /* [n] group of a route; -1: costs nothing, is never dropped */
    int64_t n_groups;
};

static int group(const struct moe_env *env, const struct moe_batch *batch, const struct moe_routes *r, int32_t scopes,
                 struct groups *g)
{
    int32_t n_experts = batch->n_experts;
    g->n_groups = (int64_t)scopes * n_experts;
    g->first = env->host->scratch(env, ((size_t)g->n_groups + 2) * sizeof *g->first);
    g->route = env->host->scratch(env, ((size_t)r->n + 1) * sizeof *g->route);
    g->of = env->host->scratch(env, ((size_t)r->n + 1) * sizeof *g->of);
    if (g->first == NULL || g->route == NULL || g->of == NULL)
        return MOE_ENOMEM;
    int64_t *at = g->first + 1; /* counts two places ahead: filling moves at[i] to where first[i + 1] belongs */
    memset(g->first, 0, ((size_t)g->n_groups + 2) * sizeof *g->first);
    for (int32_t t = 0; t < r->n_tokens; t++) {
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++) {
            int32_t e = r->expert[i];
            g->of[i] = e < n_experts ? (scopes > 1 ? batch->device[t] : 0) * n_experts + e : -1;
            if (g->of[i] >= 0)
                at[g->of[i] + 1]++;
        }
    }
    for (int64_t i = 0; i < g->n_groups; i++)
        at[i + 1] += at[i];
    for (int64_t i = 0; i < r->n; i++)
        if (g->of[i] >= 0)
            g->route[at[g->of[i]]++] = i;
    return MOE_OK;
}

struct bid {
    float weight;
    int64_t route;
};

static int by_weight(const void *left, const void *right)
{
    const struct bid *a = left, *b = right;
    if (a->weight != b->weight)
        return a->weight > b->weight ? -1 : 1;
    return (a->route > b->route) - (a->route < b->route);
}

/* Whoever shares the batch: the same for a request's token. */
static float draw(const struct state *s, const struct moe_batch *b, int32_t token, int32_t expert)
{
    const int64_t request = b->request != NULL ? b->request[token] : 0;
    const int64_t position = b->position != NULL ? b->position[token] : token;
    return (float)moe_unit(moe_rand(s->env, HOOK_REWRITE, b->step, (int64_t)b->layer * b->n_experts + expert,
                                    request * (INT64_C(1) << 31) + position));
}

/* Sets keep[i] = 0 for the routes of one overfull group that have to go. */
static void trim(const struct state *s, const struct moe_batch *batch, const struct moe_routes *r,
                 const int64_t *route, int64_t n, int64_t capacity, struct bid *bid, uint8_t *keep)
{
    int32_t token = 0; /* routes of a group are in the tokens' order */
    for (int64_t i = 0; i < n; i++) {
        for (; r->offset[token + 1] <= route[i]; token++)
            ;
        bid[i] = (struct bid){.weight = r->weight[route[i]], .route = route[i]};
        if (s->conf->drop == DROP_RANDOM)
            bid[i].weight = draw(s, batch, token, r->expert[route[i]]);
    }
    if (s->conf->drop != DROP_POSITION)
        qsort(bid, (size_t)n, sizeof *bid, by_weight);
    for (int64_t i = capacity; i < n; i++)
        keep[bid[i].route] = 0;
}

/* Closes the gaps, token by token. */
static void compact(struct moe_routes *r, const uint8_t *keep, bool renormalise)
{
    int64_t to = 0, from = 0;
    for (int32_t t = 0; t < r->n_tokens; t++) {
        int64_t begin = to, end = r->offset[t + 1];
        float before = 0, after = 0;
        for (; from < end; from++) {
            before += r->weight[from];
            if (!keep[from])
                continue;
            after += r->weight[from];
            r->expert[to] = r->expert[from];
            r->weight[to] = r->weight[from];
            if (r->combine != NULL)
                r->combine[to] = r->combine[from];
            to++;
        }
        for (int64_t i = begin; renormalise && after > 0 && i < to; i++)
            r->weight[i] *= before / after;
        r->offset[t + 1] = to;
    }
    r->n = to;
}

static int rewrite(void *self, const struct moe_batch *batch, const float *scores,
                   const struct moe_placement *placement, struct moe_routes *r, struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    int32_t scopes = s->conf->scope == SCOPE_DEVICE ? env->topology->n_devices : 1;
    struct groups g;
    (void)scores, (void)placement, (void)own;
    if (scopes > 1 && batch->device == NULL)
        return env->host->fail(env, MOE_EINVAL, "scope = device: the workload does not say which device a token is on");
    int rc = group(env, batch, r, scopes, &g);
    uint8_t *keep = env->host->scratch(env, (size_t)r->n + 1);
    struct bid *bid = env->host->scratch(env, ((size_t)r->n + 1) * sizeof *bid);
    if (rc < 0 || keep == NULL || bid == NULL)
        return MOE_ENOMEM;
    memset(keep, 1, (size_t)r->n);
    for (int32_t scope = 0; scope < scopes; scope++) {
        const int64_t *first = g.first + (int64_t)scope * batch->n_experts;
        double mean = (double)(first[batch->n_experts] - first[0]) / batch->n_experts;
        int64_t capacity = s->conf->tokens > 0 ? s->conf->tokens : (int64_t)ceil(mean * s->conf->factor);
        for (int32_t e = 0; e < batch->n_experts; e++)
            if (first[e + 1] - first[e] > capacity)
                trim(s, batch, r, g.route + first[e], first[e + 1] - first[e], capacity, bid, keep);
    }
    compact(r, keep, s->conf->renormalise);
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_CROSS_BATCH, /* who is dropped depends on who else is there */
    .name = "capacity",
    .summary = "at most C tokens per expert, the rest dropped by score or by position",
    .source = "D. Lepikhin et al. 2020, arXiv 2006.16668; W. Fedus et al. 2021, arXiv 2101.03961",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.balancer = {.rewrite = rewrite},
};
