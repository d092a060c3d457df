/* SPDX-License-Identifier: Apache-2.0
 * cache.c - residency and the replay loop. */
#include "config.h"

#include "cache.h"
#include "registry.h"

#include <stdlib.h>
#include <string.h>

int cache_open(struct cache *c, struct policy *p, int32_t device, int64_t capacity, bool pins, struct err *e)
{
    memset(c, 0, sizeof *c);
    c->policy = p;
    c->device = device;
    c->capacity = capacity;
    c->resident = calloc(p->env.n_objects, 1);
    if (pins)
        c->pinned.mark = c->mark = calloc(p->env.n_objects, sizeof *c->mark);
    c->pinned.now = 1; /* marks start at 0: nothing pinned */
    if (!c->resident || (pins && !c->mark)) {
        cache_close(c);
        return err_set(e, ERR_MEMORY, "out of memory for a cache of %u objects", p->env.n_objects);
    }
    return 0;
}

void cache_close(struct cache *c)
{
    free(c->resident);
    free(c->mark);
    memset(c, 0, sizeof *c);
}

static enum cache_result fault(struct cache *c, const char *hook, int code)
{
    policy_leave(c->policy, hook, code);
    return CACHE_ERROR;
}

void cache_unpin(struct cache *c)
{
    c->pinned.now++;
    c->n_pinned = 0;
}

void cache_pin(struct cache *c, uint32_t object)
{
    if (moe_is_pinned(&c->pinned, object))
        return;
    c->mark[object] = c->pinned.now;
    c->n_pinned += c->resident[object];
}

/* The replay loop lives on these being part of it: 150 instead of 100 million accesses a second. */
#define HOT static inline __attribute__((always_inline))

/* Room for one more. Returns CACHE_MISS when there is, CACHE_BYPASSED when everything is pinned. */
HOT enum cache_result make_room(struct cache *c, const struct moe_access *a, uint32_t *victim)
{
    const struct moe_offload_ops *ops = &c->policy->plugin->ops.offload;
    if (c->capacity == 0 || c->n_pinned == c->n_resident)
        return CACHE_BYPASSED;
    if (!ops->evict) {
        err_set(c->policy->context->err, ERR_RUN, "offload %s: keeps every expert resident, and there is room for "
                "%lld: layer %d, expert %d does not fit", c->policy->plugin->name, (long long)c->capacity, a->layer,
                a->expert);
        return CACHE_ERROR;
    }
    uint32_t out = UINT32_MAX;
    int code = ops->evict(c->policy->self, c->device, a, &c->pinned, &out);
    if (code == MOE_BYPASS)
        return CACHE_BYPASSED;
    if (code != 0)
        return fault(c, "evict", code);
    if (out >= c->policy->env.n_objects || !c->resident[out] || moe_is_pinned(&c->pinned, out)) {
        err_set(c->policy->context->err, ERR_RUN, "offload %s: evict chose object %u, which is %s",
                c->policy->plugin->name, out,
                out >= c->policy->env.n_objects ? "no object" : !c->resident[out] ? "not resident" : "in use");
        return CACHE_ERROR;
    }
    c->resident[out] = 0;
    c->n_resident--;
    *victim = out;
    return CACHE_MISS;
}

/* Not resident. On CACHE_MISS it is afterwards. */
HOT enum cache_result miss(struct cache *c, const struct moe_offload_ops *ops, void *self, uint32_t object,
                           const struct moe_access *a, uint32_t *victim)
{
    if (c->n_resident >= c->capacity) {
        enum cache_result r = make_room(c, a, victim);
        if (r != CACHE_MISS)
            return r;
    }
    int code = ops->insert ? ops->insert(self, c->device, object, a) : 0;
    if (code == MOE_BYPASS)
        return CACHE_BYPASSED;
    if (code != 0)
        return fault(c, "insert", code);
    c->resident[object] = 1;
    c->n_resident++;
    c->n_pinned += moe_is_pinned(&c->pinned, object);
    return CACHE_MISS;
}

enum cache_result cache_access(struct cache *c, uint32_t object, const struct moe_access *a, uint32_t *victim)
{
    const struct moe_offload_ops *ops = &c->policy->plugin->ops.offload;
    enum cache_result r = CACHE_HIT;
    *victim = UINT32_MAX;
    policy_enter(c->policy, "access");
    if (!c->resident[object]) {
        r = miss(c, ops, c->policy->self, object, a, victim);
    } else if (ops->hit) {
        int code = ops->hit(c->policy->self, c->device, object, a);
        r = code != 0 ? fault(c, "hit", code) : CACHE_HIT;
    }
    policy_leave(c->policy, "access", 0);
    return r;
}

/* What cache_access() looks up anew for every request stays in registers: a policy's hooks could change
 * none of it, but a compiler cannot know. next_use may be NULL, objects_per_layer 0: there is one layer. */
HOT int replay(struct cache *c, const uint32_t *key, int64_t n, const int64_t *next_use, uint32_t objects_per_layer,
               struct cache_counts *out)
{
    const struct moe_offload_ops *ops = &c->policy->plugin->ops.offload;
    int (*const hit)(void *, int32_t, uint32_t, const struct moe_access *) = ops->hit;
    void *const self = c->policy->self;
    const uint8_t *const resident = c->resident;
    const int32_t device = c->device;
    struct cache_counts counts = { .requests = n };
    struct moe_access a = { .next_use = -1, .n_tokens = 1 };
    policy_enter(c->policy, "replay");
    for (int64_t i = 0; i < n; i++) {
        const uint32_t object = key[i];
        a.index = i;
        if (next_use)
            a.next_use = next_use[i];
        if (objects_per_layer > 0) {
            a.layer = (int32_t)(object / objects_per_layer);
            a.expert = (int32_t)(object % objects_per_layer);
        } else {
            a.expert = (int32_t)object;
        }
        if (resident[object]) {
            int code = hit ? hit(self, device, object, &a) : 0;
            if (code != 0) {
                fault(c, "hit", code);
                return c->policy->context->err->code;
            }
            continue;
        }
        uint32_t victim;
        enum cache_result r = miss(c, ops, self, object, &a, &victim);
        if (r == CACHE_ERROR)
            return c->policy->context->err->code;
        counts.misses++;
        counts.bypassed += r == CACHE_BYPASSED;
    }
    *out = counts;
    return policy_leave(c->policy, "replay", 0);
}

int cache_replay(struct cache *c, const uint32_t *key, int64_t n, const int64_t *next_use, uint32_t objects_per_layer,
                 struct cache_counts *out)
{
    if (objects_per_layer >= c->policy->env.n_objects)
        objects_per_layer = 0;
    if (!next_use && objects_per_layer == 0) /* constants: a loop of its own without these questions */
        return replay(c, key, n, NULL, 0, out);
    return replay(c, key, n, next_use, objects_per_layer, out);
}

int cache_next_use(const uint32_t *key, int64_t n, uint32_t n_objects, int64_t *next_use, struct err *e)
{
    int64_t *seen = malloc(sizeof *seen * (n_objects ? n_objects : 1));
    if (!seen)
        return err_set(e, ERR_MEMORY, "out of memory");
    for (uint32_t o = 0; o < n_objects; o++)
        seen[o] = INT64_MAX;
    for (int64_t i = n - 1; i >= 0; i--) {
        next_use[i] = seen[key[i]];
        seen[key[i]] = i;
    }
    free(seen);
    return 0;
}
