/* SPDX-License-Identifier: Apache-2.0
 * belady.c - evicts the expert whose next use is farthest away: no policy that keeps what it fetched misses less.
 *
 * Source:  L. A. Belady 1966, A study of replacement algorithms for a virtual-storage computer, IBM Systems J. 5(2)
 * Differs: nothing; always inserts (never bypasses); equal next uses (never again) go by the lower object id; experts
 *          in use are passed over. Legal only where the trace is known beforehand: a ceiling, not a policy to deploy.
 * Cost:    O(log n) per insert and eviction, n objects resident; a hit moves its object up from where it is, which for
 *          a popular object (soon needed again, near the bottom) is a step or two; 20 bytes per object and device,
 *          allocated once */
#include <moelab.h>

#define ARITY 4u /* children of a heap node: half the levels of a binary heap, and siblings share a cache line */

struct entry {
    int64_t next_use;
    uint32_t object;
};

/* A heap per device with the farthest next use on top. place[object] is where a resident object sits in it. An eviction
 * leaves a hole on top, because the insert that follows fills it with a cheap step or two: what was just fetched is
 * seldom needed soon. Every other operation closes the hole first. */
struct heap {
    struct entry *entry; /* [n_objects] */
    uint32_t *place;     /* [n_objects] */
    uint32_t n;          /* the hole counts */
    bool hole;
};

struct state {
    const struct moe_env *env;
    struct heap *heap; /* [D] */
};

static bool farther(struct entry a, struct entry b)
{
    return a.next_use > b.next_use || (a.next_use == b.next_use && a.object < b.object);
}

static void put(struct heap *h, uint32_t at, struct entry e)
{
    h->entry[at] = e;
    h->place[e.object] = at;
}

/* `e` belongs at `at` or above it. */
static void rise(struct heap *h, uint32_t at, struct entry e)
{
    while (at > 0 && farther(e, h->entry[(at - 1) / ARITY])) {
        put(h, at, h->entry[(at - 1) / ARITY]);
        at = (at - 1) / ARITY;
    }
    put(h, at, e);
}

/* `e` belongs at `at` or below it. */
static void sink(struct heap *h, uint32_t at, struct entry e)
{
    for (;;) {
        uint32_t child = at * ARITY + 1, end = child + ARITY < h->n ? child + ARITY : h->n, best = child;
        if (child >= h->n)
            break;
        while (++child < end)
            if (farther(h->entry[child], h->entry[best]))
                best = child;
        if (!farther(h->entry[best], e))
            break;
        put(h, at, h->entry[best]);
        at = best;
    }
    put(h, at, e);
}

static struct entry take_out(struct heap *h, uint32_t at)
{
    struct entry out = h->entry[at], last = h->entry[--h->n];
    if (at == h->n)
        return out;
    if (farther(last, out))
        rise(h, at, last);
    else
        sink(h, at, last);
    return out;
}

static void close_hole(struct heap *h)
{
    h->hole = false;
    if (--h->n > 0)
        sink(h, 0, h->entry[h->n]);
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    (void)conf;
    s->env = env;
    s->heap = env->host->alloc(env, (size_t)env->topology->n_devices, sizeof *s->heap);
    if (s->heap == NULL)
        return MOE_ENOMEM;
    for (int32_t d = 0; d < env->topology->n_devices; d++) {
        s->heap[d].entry = env->host->alloc(env, env->n_objects, sizeof *s->heap[d].entry);
        s->heap[d].place = env->host->alloc(env, env->n_objects, sizeof *s->heap[d].place);
        if (s->heap[d].entry == NULL || s->heap[d].place == NULL)
            return MOE_ENOMEM;
    }
    return MOE_OK;
}

static int unknown_future(const struct state *s, const struct moe_access *access)
{
    return s->env->host->fail(s->env, MOE_EINVAL,
                              "access %lld (layer %d, expert %d) has no next use: belady needs a trace that is "
                              "replayed",
                              (long long)access->index, access->layer, access->expert);
}

static int hit(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    const struct state *s = self;
    struct heap *h = &s->heap[device];
    struct entry e = {.next_use = access->next_use, .object = object};
    if (access->next_use < 0)
        return unknown_future(s, access);
    if (h->hole)
        close_hole(h);
    if (farther(e, h->entry[h->place[object]])) /* always so in a replay: the use just made was the next one */
        rise(h, h->place[object], e);
    else
        sink(h, h->place[object], e);
    return MOE_OK;
}

static int insert(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    const struct state *s = self;
    struct heap *h = &s->heap[device];
    struct entry e = {.next_use = access->next_use, .object = object};
    if (access->next_use < 0)
        return unknown_future(s, access);
    if (h->hole)
        sink(h, 0, e);
    else
        rise(h, h->n++, e);
    h->hole = false;
    return MOE_OK;
}

static int evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                 uint32_t *victim)
{
    const struct state *s = self;
    struct heap *h = &s->heap[device];
    struct entry *aside = NULL; /* experts in use that were on top, to be put back */
    uint32_t n_aside = 0;
    (void)cause;
    if (h->hole)
        close_hole(h);
    while (h->n > 0 && moe_is_pinned(pinned, h->entry[0].object)) {
        if (aside == NULL && (aside = s->env->host->scratch(s->env, h->n * sizeof *aside)) == NULL)
            return MOE_ENOMEM;
        aside[n_aside++] = take_out(h, 0);
    }
    bool found = h->n > 0;
    if (found) {
        *victim = h->entry[0].object;
        h->hole = true;
    }
    if (n_aside > 0 && h->hole)
        close_hole(h);
    while (n_aside > 0)
        rise(h, h->n++, aside[--n_aside]);
    if (!found)
        return s->env->host->fail(s->env, MOE_EFAIL, "device %d: nothing to evict: every resident expert is in use",
                                  device);
    return MOE_OK;
}

static int forget(void *self, int32_t device, uint32_t object)
{
    struct heap *h = &((struct state *)self)->heap[device];
    if (h->hole)
        close_hole(h);
    take_out(h, h->place[object]);
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_OFFLOAD,
    .needs = MOE_NEEDS_NEXT_USE,
    .name = "belady",
    .summary = "evicts the expert needed again last; the ceiling for caches that always insert",
    .source = "L. A. Belady 1966, IBM Systems Journal 5(2)",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.offload = {.hit = hit, .insert = insert, .evict = evict, .remove = forget},
};
