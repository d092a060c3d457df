/* SPDX-License-Identifier: Apache-2.0
 * layer-distance.c - evicts the resident expert whose layer comes up last; ties by popularity.
 *
 * Source:  field practice: a forward pass visits the layers in a fixed order, so a layer just finished is the one
 *          needed again last
 * Differs: nothing
 * Cost:    O(1) per hit, O(log E) per insert, O(L + log E) amortised per eviction: a stale entry that an eviction has
 *          to correct was made stale by hits since the last correction; 24 bytes per object and device, allocated once
 *
 *   distance(l) = (l - layer of the access that causes the eviction) mod L
 *   victim      = the resident, unpinned object with the largest distance; so the layer before the current one goes
 *                 first and the current layer, whose experts may be asked for in a moment, goes last;
 *                 within a layer the expert with the fewest uses in this run so far (history survives evictions, and
 *                 a prefetch is not a use), then the lower expert id */
#include <moelab.h>

struct entry {
    uint64_t uses; /* when the entry was last looked at: never more than the true count, which only grows */
    uint32_t object;
};

/* A min-heap per device and layer over its resident experts. Because uses only grow, a top entry whose `uses` is still
 * true is the minimum; one that is not is corrected and sinks. */
struct heap {
    struct entry *entry; /* [E] */
    int32_t n;
};

struct state {
    const struct moe_env *env;
    uint64_t *uses;    /* [D][n_objects] */
    struct heap *heap; /* [D][L] */
};

static bool fewer(struct entry a, struct entry b)
{
    return a.uses < b.uses || (a.uses == b.uses && a.object < b.object);
}

static void rise(struct heap *h, int32_t at, struct entry e)
{
    for (; at > 0 && fewer(e, h->entry[(at - 1) / 2]); at = (at - 1) / 2)
        h->entry[at] = h->entry[(at - 1) / 2];
    h->entry[at] = e;
}

static void sink(struct heap *h, int32_t at, struct entry e)
{
    for (int32_t child; (child = 2 * at + 1) < h->n; at = child) {
        if (child + 1 < h->n && fewer(h->entry[child + 1], h->entry[child]))
            child++;
        if (!fewer(h->entry[child], e))
            break;
        h->entry[at] = h->entry[child];
    }
    h->entry[at] = e;
}

static void push(struct heap *h, struct entry e)
{
    h->n++;
    rise(h, h->n - 1, e);
}

static struct entry take_out(struct heap *h, int32_t at)
{
    struct entry out = h->entry[at], last = h->entry[--h->n];
    if (at == h->n)
        return out;
    if (fewer(last, out))
        rise(h, at, last);
    else
        sink(h, at, last);
    return out;
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    size_t n_devices = (size_t)env->topology->n_devices, n_layers = (size_t)env->model->n_layers;
    (void)conf;
    s->env = env;
    s->uses = env->host->alloc(env, n_devices * env->n_objects, sizeof *s->uses);
    s->heap = env->host->alloc(env, n_devices * n_layers, sizeof *s->heap);
    struct entry *room = env->host->alloc(env, n_devices * n_layers * (size_t)env->model->n_experts, sizeof *room);
    if (s->uses == NULL || s->heap == NULL || room == NULL)
        return MOE_ENOMEM;
    for (size_t i = 0; i < n_devices * n_layers; i++)
        s->heap[i].entry = room + i * (size_t)env->model->n_experts;
    return MOE_OK;
}

static int hit(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    const struct state *s = self;
    (void)access;
    s->uses[(size_t)device * s->env->n_objects + object]++;
    return MOE_OK;
}

static int insert(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    const struct state *s = self;
    uint64_t *uses = &s->uses[(size_t)device * s->env->n_objects + object];
    if (!access->prefetch)
        ++*uses;
    push(&s->heap[device * s->env->model->n_layers + access->layer], (struct entry){.uses = *uses, .object = object});
    return MOE_OK;
}

/* The least used unpinned object of a layer leaves its heap; false: there is none. `aside` has room for E entries. */
static bool take_coldest(struct heap *h, const uint64_t *uses, const struct moe_pinned *pinned, struct entry *aside,
                         uint32_t *victim)
{
    int32_t n_aside = 0;
    bool found = false;
    while (h->n > 0 && !found) {
        struct entry top = h->entry[0];
        if (top.uses != uses[top.object]) {
            top.uses = uses[top.object];
            sink(h, 0, top);
        } else if (moe_is_pinned(pinned, top.object)) {
            aside[n_aside++] = take_out(h, 0);
        } else {
            *victim = take_out(h, 0).object;
            found = true;
        }
    }
    while (n_aside > 0)
        push(h, aside[--n_aside]);
    return found;
}

static int evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                 uint32_t *victim)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    int32_t n_layers = env->model->n_layers;
    struct heap *heap = s->heap + (size_t)device * (size_t)n_layers;
    const uint64_t *uses = s->uses + (size_t)device * env->n_objects;
    struct entry *aside = env->host->scratch(env, (size_t)env->model->n_experts * sizeof *aside);
    if (aside == NULL)
        return MOE_ENOMEM;
    for (int32_t distance = n_layers - 1; distance >= 0; distance--) {
        int32_t layer = cause->layer + distance;
        layer -= layer >= n_layers ? n_layers : 0;
        if (take_coldest(&heap[layer], uses, pinned, aside, victim))
            return MOE_OK;
    }
    return env->host->fail(env, MOE_EFAIL, "device %d: nothing to evict: every resident expert is in use", device);
}

static int forget(void *self, int32_t device, uint32_t object)
{
    const struct state *s = self;
    const struct moe_model *model = s->env->model;
    struct heap *h = &s->heap[device * model->n_layers + (int32_t)object / model->n_experts];
    for (int32_t i = 0; i < h->n; i++) {
        if (h->entry[i].object == object) {
            take_out(h, i);
            break;
        }
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_OFFLOAD,
    .name = "layer-distance",
    .summary = "evicts the expert whose layer comes up last, the least used first",
    .source = "field practice",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.offload = {.hit = hit, .insert = insert, .evict = evict, .remove = forget},
};
