/* SPDX-License-Identifier: Apache-2.0
 * lfu.c - evicts the expert with the fewest uses since it was brought in.
 *
 * Source:  field practice (least frequently used); constant-time lists after Shah, Mitra, Matani 2010, arXiv 2110.11602
 * Differs: nothing; the count starts at 1 on every insert (history does not survive an eviction), and among equal
 *          counts the object that reached the count first goes first, as in libCacheSim; experts in use are passed over
 * Cost:    O(1) per hit and insert, O(1 + experts in use among the coldest) per eviction; 44 bytes per object and
 *          device, allocated once
 *
 *   buckets   a chain in order of falling age of use: count 1 -> 2 -> 5 -> ...
 *   bucket    the objects with that count, oldest arrival first
 *   hit       move the object to the end of the bucket count + 1, making it if absent */
#include <moelab.h>

#define NONE UINT32_MAX

struct object {
    uint32_t prev, next; /* in its bucket */
    uint32_t bucket;
};

struct bucket {
    uint64_t count;
    uint32_t prev, next;  /* in the chain, by rising count; next also links free buckets */
    uint32_t first, last; /* objects */
};

/* There are never more buckets than resident objects, so n_objects + 1 suffice: one is the chain's head. */
struct device_lists {
    struct object *object; /* [n_objects] */
    struct bucket *bucket; /* [n_objects + 1]; bucket 0 is the head of the circular chain, its count is 0 */
    uint32_t free;
};

struct state {
    const struct moe_env *env;
    struct device_lists *device; /* [D] */
};

/* An empty bucket for `count`, linked behind `before`. */
static uint32_t open_bucket(struct device_lists *d, uint32_t before, uint64_t count)
{
    uint32_t b = d->free, after = d->bucket[before].next;
    d->free = d->bucket[b].next;
    d->bucket[b] = (struct bucket){.count = count, .prev = before, .next = after, .first = NONE, .last = NONE};
    d->bucket[before].next = b;
    d->bucket[after].prev = b;
    return b;
}

static void close_bucket(struct device_lists *d, uint32_t b)
{
    d->bucket[d->bucket[b].prev].next = d->bucket[b].next;
    d->bucket[d->bucket[b].next].prev = d->bucket[b].prev;
    d->bucket[b].next = d->free;
    d->free = b;
}

static void append(struct device_lists *d, uint32_t b, uint32_t object)
{
    uint32_t last = d->bucket[b].last;
    d->object[object] = (struct object){.prev = last, .next = NONE, .bucket = b};
    if (last == NONE)
        d->bucket[b].first = object;
    else
        d->object[last].next = object;
    d->bucket[b].last = object;
}

static void take_out(struct device_lists *d, uint32_t object)
{
    struct object at = d->object[object];
    struct bucket *b = &d->bucket[at.bucket];
    if (at.prev == NONE)
        b->first = at.next;
    else
        d->object[at.prev].next = at.next;
    if (at.next == NONE)
        b->last = at.prev;
    else
        d->object[at.next].prev = at.prev;
    if (b->first == NONE)
        close_bucket(d, at.bucket);
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    size_t n = env->n_objects;
    (void)conf;
    s->env = env;
    s->device = env->host->alloc(env, (size_t)env->topology->n_devices, sizeof *s->device);
    if (s->device == NULL)
        return MOE_ENOMEM;
    for (int32_t i = 0; i < env->topology->n_devices; i++) {
        struct device_lists *d = &s->device[i];
        d->object = env->host->alloc(env, n, sizeof *d->object);
        d->bucket = env->host->alloc(env, n + 1, sizeof *d->bucket);
        if (d->object == NULL || d->bucket == NULL)
            return MOE_ENOMEM;
        for (uint32_t b = 1; b <= n; b++)
            d->bucket[b].next = b < n ? b + 1 : NONE;
        d->free = n > 0 ? 1 : NONE;
    }
    return MOE_OK;
}

static int hit(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    struct device_lists *d = &((struct state *)self)->device[device];
    uint32_t from = d->object[object].bucket;
    struct bucket *b = &d->bucket[from];
    uint64_t count = b->count + 1;
    uint32_t to = b->next;
    bool alone = b->first == b->last, exists = d->bucket[to].count == count;
    (void)access;
    if (alone && !exists) { /* the bucket itself moves up */
        b->count = count;
        return MOE_OK;
    }
    if (!exists)
        to = open_bucket(d, from, count);
    take_out(d, object);
    append(d, to, object);
    return MOE_OK;
}

static int insert(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    struct device_lists *d = &((struct state *)self)->device[device];
    uint32_t b = d->bucket[0].next;
    (void)access;
    if (d->bucket[b].count != 1)
        b = open_bucket(d, 0, 1);
    append(d, b, object);
    return MOE_OK;
}

static int evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                 uint32_t *victim)
{
    const struct state *s = self;
    struct device_lists *d = &s->device[device];
    (void)cause;
    for (uint32_t b = d->bucket[0].next; b != 0; b = d->bucket[b].next) {
        for (uint32_t object = d->bucket[b].first; object != NONE; object = d->object[object].next) {
            if (!moe_is_pinned(pinned, object)) {
                take_out(d, object);
                *victim = object;
                return MOE_OK;
            }
        }
    }
    return s->env->host->fail(s->env, MOE_EFAIL, "device %d: nothing to evict: every resident expert is in use",
                              device);
}

static int forget(void *self, int32_t device, uint32_t object)
{
    take_out(&((struct state *)self)->device[device], object);
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_OFFLOAD,
    .name = "lfu",
    .summary = "evicts the expert with the fewest uses since it was brought in",
    .source = "field practice",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.offload = {.hit = hit, .insert = insert, .evict = evict, .remove = forget},
};
