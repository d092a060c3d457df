/* SPDX-License-Identifier: Apache-2.0
 * cache.h - who is resident: the core's table behind every offload policy. Dense ids, no hashing. */
#ifndef CACHE_H
#define CACHE_H

#include "policy.h"

/* One device's cache. The policy orders; the core counts, so no policy can hold more than the capacity. */
struct cache {
    struct policy *policy;
    int32_t device;
    int64_t capacity, n_resident;
    uint8_t *resident;        /* [n_objects] */
    struct moe_pinned pinned; /* marks of this device; mark may be NULL: nothing is ever pinned */
    uint64_t *mark;
    int64_t n_pinned;         /* resident and pinned */
};

enum cache_result { CACHE_HIT, CACHE_MISS, CACHE_BYPASSED, CACHE_ERROR = -1 };

int cache_open(struct cache *, struct policy *, int32_t device, int64_t capacity, bool pins, struct err *);
void cache_close(struct cache *);

/* Forgets all pins; then pins objects, resident or not: what is pinned is never evicted. */
void cache_unpin(struct cache *);
void cache_pin(struct cache *, uint32_t object);

/* One access in program order. On a miss that had to make room, *victim is what left, else UINT32_MAX. With
 * everything resident pinned the object passes through without being kept (CACHE_BYPASSED). */
enum cache_result cache_access(struct cache *, uint32_t object, const struct moe_access *, uint32_t *victim);

/* The whole replay of a key sequence through one cache, for `moelab eval offload` and the bench. next_use: [n] or
 * NULL. Layers of objects: object / objects_per_layer. */
struct cache_counts { int64_t requests, misses, bypassed; };
int cache_replay(struct cache *, const uint32_t *key, int64_t n, const int64_t *next_use, uint32_t objects_per_layer,
                 struct cache_counts *);
/* next_use[i]: index of the next access of key[i], INT64_MAX when there is none. */
int cache_next_use(const uint32_t *key, int64_t n, uint32_t n_objects, int64_t *next_use, struct err *);

#endif
