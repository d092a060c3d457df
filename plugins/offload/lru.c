/* SPDX-License-Identifier: Apache-2.0
 * lru.c - evicts the expert that was used longest ago.
 *
 * Source:  field practice (least recently used)
 * Differs: nothing; experts in use are passed over
 * Cost:    O(1) per hit and insert, O(1 + experts in use at the cold end) per eviction; 8 bytes per object and device,
 *          allocated once */
#include <moelab.h>

struct node {
    uint32_t prev, next;
};

/* One circular list per device, most recent first. Node n_objects is the list's head: head.next is the most recent
 * object, head.prev the one used longest ago. Objects that are not resident are in no list. */
struct state {
    const struct moe_env *env;
    struct node *node; /* [D][n_objects + 1] */
    uint32_t head;     /* n_objects */
};

static struct node *list_of(const struct state *s, int32_t device)
{
    return s->node + (size_t)device * ((size_t)s->head + 1);
}

static void push_front(struct node *list, uint32_t head, uint32_t object)
{
    uint32_t first = list[head].next;
    list[object] = (struct node){.prev = head, .next = first};
    list[first].prev = object;
    list[head].next = object;
}

static void unlink_node(struct node *list, uint32_t object)
{
    struct node at = list[object];
    list[at.prev].next = at.next;
    list[at.next].prev = at.prev;
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    (void)conf;
    s->env = env;
    s->head = env->n_objects;
    s->node = env->host->alloc(env, (size_t)env->topology->n_devices * ((size_t)s->head + 1), sizeof *s->node);
    if (s->node == NULL)
        return MOE_ENOMEM;
    for (int32_t d = 0; d < env->topology->n_devices; d++)
        list_of(s, d)[s->head] = (struct node){.prev = s->head, .next = s->head};
    return MOE_OK;
}

static int hit(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    const struct state *s = self;
    struct node *list = list_of(s, device);
    (void)access;
    if (list[object].prev != s->head) {
        unlink_node(list, object);
        push_front(list, s->head, object);
    }
    return MOE_OK;
}

static int insert(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    const struct state *s = self;
    (void)access;
    push_front(list_of(s, device), s->head, object);
    return MOE_OK;
}

static int evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                 uint32_t *victim)
{
    const struct state *s = self;
    struct node *list = list_of(s, device);
    uint32_t object = list[s->head].prev;
    (void)cause;
    while (object != s->head && moe_is_pinned(pinned, object))
        object = list[object].prev;
    if (object == s->head)
        return s->env->host->fail(s->env, MOE_EFAIL, "device %d: nothing to evict: every resident expert is in use",
                                  device);
    unlink_node(list, object);
    *victim = object;
    return MOE_OK;
}

static int forget(void *self, int32_t device, uint32_t object)
{
    const struct state *s = self;
    unlink_node(list_of(s, device), object);
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_OFFLOAD,
    .name = "lru",
    .summary = "evicts the expert used longest ago",
    .source = "field practice",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.offload = {.hit = hit, .insert = insert, .evict = evict, .remove = forget},
};
