/* SPDX-License-Identifier: Apache-2.0
 * policy_data.c - routes, placements, graphs and cache replays for tests of policies: see policy_host.h. */
#include "policy_host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void *must(void *p)
{
    if (p == NULL) {
        fprintf(stderr, "policy_data: out of memory\n");
        abort();
    }
    return p;
}

/* ---- routes ---- */

void policy_routes_init(struct moe_routes *r, int32_t n_tokens)
{
    memset(r, 0, sizeof *r);
    r->n_tokens = n_tokens;
    r->offset = must(calloc((size_t)n_tokens + 1, sizeof *r->offset));
}

void policy_routes_push(struct moe_routes *r, int32_t token, int32_t expert, float weight)
{
    if (r->n == r->capacity) {
        r->capacity = r->capacity * 2 + 16;
        r->expert = must(realloc(r->expert, (size_t)r->capacity * sizeof *r->expert));
        r->weight = must(realloc(r->weight, (size_t)r->capacity * sizeof *r->weight));
    }
    r->expert[r->n] = expert;
    r->weight[r->n++] = weight;
    for (int32_t t = token; t < r->n_tokens; t++)
        r->offset[t + 1] = r->n;
}

void policy_routes_copy(struct moe_routes *out, const struct moe_routes *r)
{
    policy_routes_init(out, r->n_tokens);
    for (int32_t t = 0; t < r->n_tokens; t++)
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++)
            policy_routes_push(out, t, r->expert[i], r->weight[i]);
    out->n_free = r->n_free;
}

void policy_routes_free(struct moe_routes *r)
{
    free(r->offset);
    free(r->expert);
    free(r->weight);
}

/* ---- placements ---- */

void policy_placement_init(struct policy_placement *p)
{
    memset(p, 0, sizeof *p);
}

void policy_placement_seal(struct policy_placement *p, const struct moe_model *m)
{
    size_t n = (size_t)p->view.n, n_layers = (size_t)m->n_layers, n_experts = (size_t)m->n_experts, at = 0;
    struct moe_replica *sorted = must(calloc(n + 1, sizeof *sorted));
    p->layer_first = must(calloc(n_layers + 1, sizeof *p->layer_first));
    p->expert_first = must(calloc(n_layers * n_experts + 1, sizeof *p->expert_first));
    p->by_expert = must(calloc(n + 1, sizeof *p->by_expert));
    for (int32_t l = 0; l < m->n_layers; l++) {
        for (size_t i = 0; i < n; i++)
            if (p->replica[i].layer == l)
                sorted[at++] = p->replica[i];
        p->layer_first[l + 1] = (int32_t)at;
    }
    free(p->replica);
    p->replica = sorted;
    at = 0;
    for (int32_t l = 0; l < m->n_layers; l++) {
        for (int32_t e = 0; e < m->n_experts; e++) {
            size_t begin = at;
            for (int32_t i = p->layer_first[l]; i < p->layer_first[l + 1]; i++) {
                if (sorted[i].expert != e)
                    continue;
                size_t j = at++; /* lowest device first, equal ones in physical order */
                for (; j > begin && sorted[p->by_expert[j - 1]].device > sorted[i].device; j--)
                    p->by_expert[j] = p->by_expert[j - 1];
                p->by_expert[j] = i;
            }
            p->expert_first[(size_t)l * n_experts + (size_t)e + 1] = (int32_t)at;
        }
    }
    p->view.replica = p->replica;
    p->view.layer_first = p->layer_first;
    p->view.expert_first = p->expert_first;
    p->view.by_expert = p->by_expert;
}

void policy_placement_free(struct policy_placement *p)
{
    free(p->replica);
    free(p->layer_first);
    free(p->expert_first);
    free(p->by_expert);
}

/* ---- graphs ---- */

void policy_graph_free(struct moe_graph *g)
{
    for (int32_t i = 0; i < g->n; i++) {
        struct policy_task *t = &g->task[i];
        if (t->kind == TASK_EXPERTS) {
            free((void *)(uintptr_t)t->experts.expert);
            free((void *)(uintptr_t)t->experts.rows);
            free((void *)(uintptr_t)t->experts.items);
        } else if (t->kind == TASK_EXCHANGE) {
            for (int32_t p = 0; p < t->exchange.n_parts; p++)
                free((void *)(uintptr_t)t->exchange.part[p].items);
            free((void *)(uintptr_t)t->exchange.part);
        }
    }
    free(g->task);
    free(g->edge);
    memset(g, 0, sizeof *g);
}

/* ---- cache replays ---- */

void policy_next_use(const uint32_t *object, int64_t n, uint32_t n_objects, int64_t *next_use)
{
    int64_t *next = must(malloc(((size_t)n_objects + 1) * sizeof *next));
    for (uint32_t o = 0; o < n_objects; o++)
        next[o] = INT64_MAX;
    for (int64_t i = n - 1; i >= 0; i--) {
        next_use[i] = next[object[i]];
        next[object[i]] = i;
    }
    free(next);
}

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Evicts once. MOE_OK, MOE_BYPASS when the policy would rather not keep what comes in, or < 0 when it failed or named
 * a victim that it must not. */
static int make_room(struct policy *policy, const struct moe_access *a, const struct moe_pinned *pinned,
                     uint8_t *resident)
{
    const struct moe_env *env = &policy->host->env;
    uint32_t victim = UINT32_MAX;
    if (policy->plugin->ops.offload.evict == NULL)
        return env->host->fail(env, MOE_EFAIL, "layer %d expert %d does not fit beside the %lld experts there is room "
                               "for", a->layer, a->expert, (long long)env->cache_objects);
    int rc = policy->plugin->ops.offload.evict(policy->state, 0, a, pinned, &victim);
    policy_host_end_hook(policy->host);
    if (rc != MOE_OK)
        return rc;
    if (victim >= env->n_objects || !resident[victim] || moe_is_pinned(pinned, victim))
        return env->host->fail(env, MOE_EFAIL, "%s evicted object %u, which is %s", policy->plugin->name, victim,
                               victim >= env->n_objects ? "out of range" : resident[victim] ? "in use"
                                                                                              : "not resident");
    resident[victim] = 0;
    return MOE_OK;
}

int64_t policy_replay(struct policy *policy, const uint32_t *object, int64_t n, const int64_t *next_use, int32_t pin,
                      double *seconds)
{
    const struct moe_env *env = &policy->host->env;
    struct moe_offload_ops ops = policy->plugin->ops.offload;
    void *self = policy->state;
    uint32_t n_objects = env->n_objects;
    uint8_t *resident = must(calloc(n_objects + 1u, 1));
    uint64_t *mark = must(calloc(n_objects + 1u, sizeof *mark));
    int32_t *layer = must(calloc(n_objects + 1u, sizeof *layer));
    int32_t *expert = must(calloc(n_objects + 1u, sizeof *expert));
    int64_t misses = 0, used = 0;
    struct moe_pinned pinned = {.mark = pin > 0 ? mark : NULL, .now = 1};
    for (uint32_t o = 0; o < n_objects; o++) {
        layer[o] = (int32_t)o / env->model->n_experts;
        expert[o] = (int32_t)o % env->model->n_experts;
    }
    double begin = seconds_now();
    for (int64_t i = 0; i < n; i++) {
        uint32_t o = object[i];
        struct moe_access a = {.index = i, .next_use = next_use != NULL ? next_use[i] : -1, .layer = layer[o],
                               .expert = expert[o], .n_tokens = 1};
        if (pin > 0) {
            pinned.now = (uint64_t)(i / pin) + 1;
            mark[o] = pinned.now;
            for (int32_t p = 0; p < pin && i % pin == 0; p++)
                mark[moe_mix((uint64_t)(i + p) + 1) % n_objects] = pinned.now;
        }
        if (resident[o]) {
            if (ops.hit != NULL && ops.hit(self, 0, o, &a) < 0)
                misses = -1;
        } else {
            int rc = MOE_OK;
            misses++;
            if (used == env->cache_objects && (rc = make_room(policy, &a, &pinned, resident)) == MOE_OK)
                used--;
            if (rc == MOE_OK && (rc = ops.insert != NULL ? ops.insert(self, 0, o, &a) : MOE_OK) == MOE_OK) {
                resident[o] = 1;
                used++;
            }
            if (rc < 0)
                misses = -1;
        }
        if (misses < 0)
            break;
    }
    if (seconds != NULL)
        *seconds = seconds_now() - begin;
    free(resident);
    free(mark);
    free(layer);
    free(expert);
    return misses;
}
