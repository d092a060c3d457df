/* SPDX-License-Identifier: Apache-2.0
 * soft-moe.c - no choice at all: each expert gets mixes of all tokens of a group, and each token a mix of all outputs.
 *
 * Source:  Mixture of Tokens: Efficient LLMs through Cross-Example Aggregation (from the abstract); Routers in Vision
 *          Mixture of Experts: An Empirical Study (from the abstract, with From Sparse to Soft Mixtures of Experts,
 *          whose router it compares, completed from memory)
 * Differs: one slot per expert and group, as the gate has one column per expert. The normalisation of gate inputs and
 *          of the gate, by which the soft router scales its logits, is the model's: logits come with it or without. The
 *          abstract of Mixture of Tokens does not say which tokens of different sequences are a group: here those at
 *          one position, `size` of them in the order of their requests, the last group with what is left
 * Cost:    O(T E) exponentials, twice where combine = slots. Mixing tokens into slots and outputs into tokens is work
 *          of the layer, not of deciding: 2 H FLOPs per route and direction, T E routes
 *
 *   group    of the tokens of one request (soft MoE), or of one position in different requests (Mixture of Tokens)
 *   slot     one per group and expert e; its input is the sum over the group's tokens t of weight(t, e) x_t
 *   weight   softmax over the group's tokens of logit(t, e): adds up to 1 in every slot
 *   combine  slots: softmax over the group's slots of logit(t, e), which adds up to 1 for every token;
 *            same: weight
 *
 * Every expert computes as many rows as there are groups, whatever the logits. Where a group is a request, later tokens
 * change what earlier ones get; where it is a position, requests change each other's. */
#include <moelab.h>

#include <stdlib.h>

enum { GROUP_REQUEST, GROUP_POSITION };
enum { COMBINE_SLOTS, COMBINE_SAME };

struct conf {
    int32_t group, combine;
    int64_t size;
};

static const struct moe_param params[] = {
    {"group", MOE_ENUM, offsetof(struct conf, group), GROUP_REQUEST, 0, 0, "request|position", "",
     "whose tokens are mixed: one request's, or those at one position of different requests"},
    {"size", MOE_INT, offsetof(struct conf, size), 0, 0, 1 << 24, NULL, "tokens", "of a group at most; 0: no limit"},
    {"combine", MOE_ENUM, offsetof(struct conf, combine), COMBINE_SLOTS, 0, 0, "slots|same", "",
     "how a token weighs outputs: softmax over slots, or as it was mixed into them"},
    MOE_PARAM_END,
};

struct member { uint64_t key; int32_t token; }; /* key: the group's part in the upper half */

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    int32_t *slot; /* [room] of the last call's routes */
    float *combine;
    int64_t room;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){.env = env, .conf = conf};
    return MOE_OK;
}

static int reserve(struct state *s, int64_t n)
{
    const int64_t room = n > 2 * s->room ? n : 2 * s->room;
    if (n <= s->room)
        return MOE_OK;
    s->slot = s->env->host->alloc(s->env, (size_t)room, sizeof *s->slot);
    s->combine = s->env->host->alloc(s->env, (size_t)room, sizeof *s->combine);
    s->room = room;
    return s->slot == NULL || s->combine == NULL ? MOE_ENOMEM : MOE_OK;
}

static int by_key(const void *a, const void *b)
{
    const struct member *x = a, *y = b;
    return x->key != y->key ? (x->key > y->key) - (x->key < y->key) : (x->token > y->token) - (x->token < y->token);
}

/* Members of a group side by side: by request and then position, or the other way round. */
static int sort_members(const struct state *s, const struct moe_batch *b, struct member *m)
{
    if (s->conf->group == GROUP_POSITION && (b->position == NULL || b->request == NULL))
        return s->env->host->fail(s->env, MOE_EINVAL, "group = position: the workload has no %s of tokens",
                                  b->position == NULL ? "positions" : "requests");
    for (int32_t t = 0; t < b->n_tokens; t++) {
        const uint32_t request = (uint32_t)(b->request != NULL ? b->request[t] : 0);
        const uint32_t position = (uint32_t)(b->position != NULL ? b->position[t] : t);
        const bool whole = s->conf->group == GROUP_REQUEST;
        m[t] = (struct member){(uint64_t)(whole ? request : position) << 32 | (whole ? position : request), t};
    }
    qsort(m, (size_t)b->n_tokens, sizeof *m, by_key);
    return MOE_OK;
}

/* The end of the group that begins at m[from]. */
static int32_t group_end(const struct state *s, const struct member *m, int32_t n, int32_t from)
{
    int32_t to = from + 1;
    while (to < n && m[to].key >> 32 == m[from].key >> 32 && (s->conf->size == 0 || to - from < s->conf->size))
        to++;
    return to;
}

static int check_logits(const struct moe_env *env, const struct moe_batch *batch)
{
    const int64_t n = batch->n_experts;
    for (int64_t i = 0; i < batch->n_tokens * n; i++)
        if (!isfinite(batch->router_logits[i]))
            return env->host->fail(env, MOE_EINVAL,
                                   "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                   batch->layer, (int)(i / n), (int)(i % n), (double)batch->router_logits[i]);
    return MOE_OK;
}

/* Softmax over the group's tokens, expert by expert; a token's row of routes begins at token * E. */
static void mix(const struct moe_batch *b, const struct member *m, int32_t n_members, float *column, float *weight)
{
    const int64_t n = b->n_experts;
    for (int64_t e = 0; e < n; e++) {
        for (int32_t i = 0; i < n_members; i++)
            column[i] = b->router_logits[m[i].token * n + e];
        moe_softmax(column, n_members, column);
        for (int32_t i = 0; i < n_members; i++)
            weight[m[i].token * n + e] = column[i];
    }
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    struct state *s = self;
    const struct moe_env *env = s->env;
    const int64_t n = batch->n_experts, n_routes = batch->n_tokens * n;
    const size_t room = (size_t)batch->n_tokens + 1;
    struct member *m = env->host->scratch(env, room * sizeof *m);
    float *column = env->host->scratch(env, room * sizeof *column);
    int rc = m == NULL || column == NULL ? MOE_ENOMEM : check_logits(env, batch);
    (void)bias; /* nothing is chosen */
    if (rc < 0 || (rc = sort_members(s, batch, m)) < 0 || (rc = reserve(s, n_routes + 1)) < 0 ||
        (rc = env->host->routes_reserve(env, out, n_routes)) < 0)
        return rc;
    int32_t n_groups = 0;
    for (int32_t from = 0, to; from < batch->n_tokens; from = to) {
        to = group_end(s, m, batch->n_tokens, from);
        mix(batch, m + from, to - from, column, out->weight);
        for (int32_t i = from; i < to; i++)
            for (int64_t e = 0; e < n; e++)
                s->slot[m[i].token * n + e] = (int32_t)(n_groups * n + e);
        n_groups++;
    }
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        for (int32_t e = 0; e < batch->n_experts; e++)
            out->expert[t * n + e] = e;
        if (s->conf->combine == COMBINE_SLOTS)
            moe_softmax(batch->router_logits + t * n, batch->n_experts, s->combine + t * n);
        out->offset[t + 1] = (t + 1) * n;
    }
    out->offset[0] = 0;
    out->n = n_routes;
    out->form = MOE_SLOTS;
    out->n_slots = (int32_t)(n_groups * n);
    out->slot = s->slot;
    out->combine = s->conf->combine == COMBINE_SLOTS ? s->combine : NULL;
    const int n_softmax = s->conf->combine == COMBINE_SLOTS ? 2 : 1;
    own->flops = 4.0 * n_softmax * (double)n_routes;
    own->bytes = sizeof(float) * 2.0 * n_softmax * (double)n_routes;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_CROSS_BATCH, /* group = position mixes requests */
    .name = "soft-moe",
    .summary = "experts compute mixes of a group's tokens, and tokens get mixes of their outputs",
    .source = "Mixture of Tokens: Efficient LLMs through Cross-Example Aggregation; Routers in Vision Mixture of "
              "Experts: An Empirical Study",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.route = route},
};
