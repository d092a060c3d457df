/* SPDX-License-Identifier: Apache-2.0
 * routes.c - routes and placements: growing them, closing them, checking what policies made of them. */
#include "config.h"

#include "memory.h"
#include "policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FREE = 1 << 16 }; /* ids stay small */

int routes_reserve(struct moe_routes *r, int64_t n, struct err *e)
{
    if (n <= r->capacity)
        return 0;
    int64_t room = r->capacity ? r->capacity : 256;
    while (room < n)
        room *= 2;
    int32_t *expert = realloc(r->expert, sizeof *expert * (size_t)room);
    if (expert)
        r->expert = memory_large(expert, sizeof *expert * (size_t)room);
    float *weight = realloc(r->weight, sizeof *weight * (size_t)room);
    if (weight)
        r->weight = memory_large(weight, sizeof *weight * (size_t)room);
    if (!expert || !weight)
        return err_set(e, ERR_MEMORY, "out of memory for %lld routes", (long long)n);
    r->capacity = room;
    return 0;
}

int routes_begin(struct moe_routes *r, int32_t n_tokens, int32_t *room_tokens, struct err *e)
{
    if (n_tokens + 1 > *room_tokens) {
        int64_t *offset = realloc(r->offset, sizeof *offset * ((size_t)n_tokens + 1));
        if (!offset)
            return err_set(e, ERR_MEMORY, "out of memory for %d tokens", n_tokens);
        r->offset = offset;
        *room_tokens = n_tokens + 1;
    }
    memset(r->offset, 0, sizeof *r->offset * ((size_t)n_tokens + 1));
    r->form = MOE_TOKENS;
    r->n_tokens = n_tokens;
    r->n_free = 0;
    r->n = 0;
    r->combine = NULL;
    r->layer = NULL;
    r->n_slots = 0;
    r->slot = NULL;
    r->skip = NULL;
    r->again = NULL;
    return 0;
}

void routes_free(struct moe_routes *r)
{
    free(r->offset);
    free(r->expert);
    free(r->weight);
    memset(r, 0, sizeof *r);
}

int routes_check(const struct moe_routes *r, int32_t n_experts, const char *who, struct err *e)
{
    if (r->n_free < 0)
        return err_set(e, ERR_RUN, "%s: routes with %d free experts", who, r->n_free);
    if (r->n < 0 || r->n > r->capacity || r->offset[0] != 0 || r->offset[r->n_tokens] != r->n)
        return err_set(e, ERR_RUN, "%s: routes say %lld entries, offsets run from %lld to %lld", who, (long long)r->n,
                       (long long)r->offset[0], (long long)r->offset[r->n_tokens]);
    for (int32_t t = 0; t < r->n_tokens; t++) /* first: an offset that goes up and down again may lie outside */
        if (r->offset[t + 1] < r->offset[t])
            return err_set(e, ERR_RUN, "%s: token %d: offsets decrease from %lld to %lld", who, t,
                           (long long)r->offset[t], (long long)r->offset[t + 1]);
    if (routes_check_forms(r, who, e) < 0)
        return e->code;
    /* What a token may have only once: an expert; a slot; an expert of one merged expert. */
    const int32_t n_ids = n_experts + r->n_free;
    const int64_t n_keys = r->form == MOE_SLOTS ? r->n_slots : r->form == MOE_MERGED ? (int64_t)r->n_slots * n_ids
                                                                                    : n_ids;
    int32_t *seen = malloc(sizeof *seen * (size_t)(n_keys > 0 ? n_keys : 1));
    if (!seen)
        return err_set(e, ERR_MEMORY, "out of memory");
    memset(seen, 0xff, sizeof *seen * (size_t)(n_keys > 0 ? n_keys : 1)); /* -1: no token */
    for (int32_t t = 0; t < r->n_tokens && !e->code; t++) {
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++) {
            const int32_t x = r->expert[i];
            const int64_t key = r->form == MOE_TOKENS ? x
                              : r->form == MOE_SLOTS ? r->slot[i] : (int64_t)r->slot[i] * n_ids + x;
            if (x < 0 || x >= n_ids)
                err_set(e, ERR_RUN, "%s: token %d: expert %d, expected 0 to %d", who, t, x, n_ids - 1);
            else if (seen[key] == t && r->form == MOE_SLOTS)
                err_set(e, ERR_RUN, "%s: token %d: slot %d twice", who, t, r->slot[i]);
            else if (seen[key] == t)
                err_set(e, ERR_RUN, "%s: token %d: expert %d twice", who, t, x);
            else if (!isfinite(r->weight[i]) || (r->combine && !isfinite(r->combine[i])))
                err_set(e, ERR_RUN, "%s: token %d: expert %d has a weight that is not finite", who, t, x);
            if (e->code)
                break;
            seen[key] = t;
        }
    }
    free(seen);
    return e->code;
}

int policy_n_free(struct policy *p, int32_t layer, int32_t *n_free)
{
    const struct moe_router_ops *ops = &p->plugin->ops.router;
    *n_free = 0;
    if (!ops->n_free)
        return 0;
    policy_enter(p, "n_free");
    *n_free = ops->n_free(p->self, layer);
    if (policy_leave(p, "n_free", *n_free < 0 ? *n_free : 0) < 0)
        return p->context->err->code;
    if (*n_free > MAX_FREE)
        return err_set(p->context->err, ERR_INPUT, "router %s, layer %d: %d experts that cost nothing, expected at "
                       "most %d", p->plugin->name, layer, *n_free, MAX_FREE);
    return 0;
}

void placement_reset(struct placement *p)
{
    p->view.n = 0;
    free(p->instead);
    p->instead = NULL;
}

void placement_free(struct placement *p)
{
    free(p->replica);
    free(p->layer_first);
    free(p->expert_first);
    free(p->by_expert);
    free(p->instead);
    memset(p, 0, sizeof *p);
}

/* Stable counting sort by layer: the order of calls within a layer is the physical order. */
static int sort_by_layer(struct placement *p, int32_t n_layers, struct err *e)
{
    int32_t n = p->view.n;
    p->layer_first = calloc((size_t)n_layers + 2, sizeof *p->layer_first);
    struct moe_replica *sorted = malloc(sizeof *sorted * (size_t)(n > 0 ? n : 1));
    if (!p->layer_first || !sorted) {
        free(sorted);
        return err_set(e, ERR_MEMORY, "out of memory for the placement");
    }
    for (int32_t i = 0; i < n; i++)
        p->layer_first[p->replica[i].layer + 2]++;
    for (int32_t l = 2; l < n_layers + 2; l++)
        p->layer_first[l] += p->layer_first[l - 1];
    for (int32_t i = 0; i < n; i++)
        sorted[p->layer_first[p->replica[i].layer + 1]++] = p->replica[i];
    free(p->replica);
    p->replica = sorted;
    p->room = n > 0 ? n : 1;
    return 0;
}

int placement_finish(struct placement *p, const struct moe_model *m, const char *who, struct err *e)
{
    size_t n_objects = (size_t)m->n_layers * (size_t)m->n_experts;
    int32_t n = p->view.n;
    free(p->layer_first);
    free(p->expert_first);
    free(p->by_expert);
    p->layer_first = p->expert_first = p->by_expert = NULL;
    if (sort_by_layer(p, m->n_layers, e) < 0)
        return e->code;
    p->expert_first = calloc(n_objects + 2, sizeof *p->expert_first);
    p->by_expert = malloc(sizeof *p->by_expert * (size_t)(n > 0 ? n : 1));
    if (!p->expert_first || !p->by_expert)
        return err_set(e, ERR_MEMORY, "out of memory for the placement");
    for (int32_t i = 0; i < n; i++)
        p->expert_first[(size_t)p->replica[i].layer * (size_t)m->n_experts + (size_t)p->replica[i].expert + 2]++;
    for (size_t o = 2; o < n_objects + 2; o++)
        p->expert_first[o] += p->expert_first[o - 1];
    for (int32_t i = 0; i < n; i++) {
        size_t o = (size_t)p->replica[i].layer * (size_t)m->n_experts + (size_t)p->replica[i].expert;
        p->by_expert[p->expert_first[o + 1]++] = i;
    }
    for (size_t o = 0; o < n_objects; o++) /* lowest device first; an expert has few replicas */
        for (int32_t i = p->expert_first[o] + 1; i < p->expert_first[o + 1]; i++)
            for (int32_t at = i; at > p->expert_first[o] && p->replica[p->by_expert[at - 1]].device >
                                                                p->replica[p->by_expert[at]].device; at--) {
                int32_t swap = p->by_expert[at];
                p->by_expert[at] = p->by_expert[at - 1];
                p->by_expert[at - 1] = swap;
            }
    p->view.replica = p->replica;
    p->view.layer_first = p->layer_first;
    p->view.expert_first = p->expert_first;
    p->view.by_expert = p->by_expert;
    p->view.instead = p->instead;
    if (p->instead)
        return err_set(e, ERR_RUN, "%s: leaves experts out (pruned or merged), which this version's pipeline does not "
                       "carry", who);
    for (int32_t l = 0; l < m->n_layers; l++)
        for (int32_t x = 0; x < moe_experts_of(m, l); x++) {
            size_t o = (size_t)l * (size_t)m->n_experts + (size_t)x;
            double whole = 0;
            for (int32_t i = p->expert_first[o]; i < p->expert_first[o + 1]; i++)
                whole += (double)p->replica[p->by_expert[i]].fraction;
            if (whole < 1 - 1e-5)
                return err_set(e, ERR_RUN, "%s: layer %d, expert %d: placed by %g in all, expected 1 or more", who, l,
                               x, whole);
        }
    return 0;
}
