/* SPDX-License-Identifier: Apache-2.0
 * skeleton.c - an offload policy to start from: first in, first out. It works as it stands.
 *
 * Source:  field practice
 * Differs: nothing
 * Cost:    O(1) per insert, O(1 + experts in use among the oldest) per eviction
 *
 * To make your own: copy this file to NAME.c, rename the plugin below, build it with
 *     cc -std=c11 -shared -fPIC $(pkg-config --cflags moelab) NAME.c -o NAME.so
 * and put it in a directory offload/ under $MOELAB_PLUGIN_PATH. Delete the hooks that you do not need: one that is
 * absent costs nothing. The core keeps the table of what is resident and tells the policy what happens to it; the
 * policy only keeps the order in which to give things up. */
#include <moelab.h>

struct conf {
    bool newest; /* set before init from the table below: defaults, the scenario, --set */
};

static const struct moe_param params[] = {
    {"newest", MOE_BOOL, offsetof(struct conf, newest), 0, 0, 1, NULL, "", "evict the newest instead of the oldest"},
    MOE_PARAM_END,
};

/* A circular list per device, oldest first; node n_objects is its head. */
struct node {
    uint32_t prev, next;
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    struct node *node; /* [D][n_objects + 1] */
};

static struct node *list_of(const struct state *s, int32_t device)
{
    return s->node + (size_t)device * ((size_t)s->env->n_objects + 1);
}

static void unlink_node(struct node *list, uint32_t object)
{
    list[list[object].prev].next = list[object].next;
    list[list[object].next].prev = list[object].prev;
}

/* Optional, as is fini. Once per run. `self` is zeroed and state_size long; conf and env stay valid for the run. */
static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    uint32_t head = env->n_objects;
    s->env = env;
    s->conf = conf;
    s->node = env->host->alloc(env, (size_t)env->topology->n_devices * ((size_t)head + 1), sizeof *s->node);
    if (s->node == NULL)
        return MOE_ENOMEM; /* alloc has already said so */
    for (int32_t d = 0; d < env->topology->n_devices; d++)
        list_of(s, d)[head] = (struct node){.prev = head, .next = head};
    return MOE_OK;
}

/* Optional. Per access of a resident object; keep it short. Here: a hit does not change the order. */
static int hit(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    (void)self, (void)device, (void)object, (void)access;
    return MOE_OK;
}

/* Required. Per miss or prefetch, when there is room (evict comes first if there is none). MOE_BYPASS instead of
 * MOE_OK: use the object once and do not keep it. */
static int insert(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    const struct state *s = self;
    struct node *list = list_of(s, device);
    uint32_t head = s->env->n_objects, last = list[head].prev;
    (void)access;
    list[object] = (struct node){.prev = last, .next = head};
    list[last].next = object;
    list[head].prev = object;
    return MOE_OK;
}

/* Required. When the cache of `device` is full. The victim has to be resident and not pinned: the core checks, and a
 * wrong answer fails the run. The core drops the victim; no remove() follows. */
static int evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                 uint32_t *victim)
{
    const struct state *s = self;
    struct node *list = list_of(s, device);
    uint32_t head = s->env->n_objects;
    uint32_t object = s->conf->newest ? list[head].prev : list[head].next;
    (void)cause;
    while (object != head && moe_is_pinned(pinned, object))
        object = s->conf->newest ? list[object].prev : list[object].next;
    if (object == head)
        return s->env->host->fail(s->env, MOE_EFAIL, "device %d: every resident expert is in use", device);
    unlink_node(list, object);
    *victim = object;
    return MOE_OK;
}

/* Optional, but needed as soon as the policy keeps a record of residents: the core dropped one by itself. */
static int forget(void *self, int32_t device, uint32_t object)
{
    const struct state *s = self;
    unlink_node(list_of(s, device), object);
    return MOE_OK;
}

/* Optional hooks that this policy does without (signatures in moelab.h):
 *   observe    per layer: routes, and with MOE_NEEDS_SCORES the gate scores
 *   prefetch   per layer: objects to bring in early; the core takes as many as the window allows
 *   assign     per layer: which experts the host's CPU computes, and in which order
 *   form       per batch: which waiting requests go together
 *   precision  per load: bits of the stored weights */

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_OFFLOAD,
    .needs = 0,
    .name = "skeleton", /* has to be the file's stem */
    .summary = "a policy to start from: first in, first out",
    .source = "field practice",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .fini = NULL,
    .ops.offload = {.hit = hit, .insert = insert, .evict = evict, .remove = forget},
};
