/* SPDX-License-Identifier: Apache-2.0
 * eplb.c - replicates the experts with the largest load and packs the replicas so that devices carry alike.
 *
 * Source:  DeepSeek-AI 2025, Expert Parallelism Load Balancer (github.com/deepseek-ai/EPLB, eplb.py): rebalance_experts
 * Differs: sorts are stable where the reference's are not, so replicas of equal load may sit elsewhere than in one run
 *          of the reference (loads per device do not change); before anything was routed (no statistics) all experts
 *          count alike
 * Cost:    O(L P log P) for P replicas a layer, against O(L P (E + D)) of the reference; scratch once per call
 *
 *   groups % nodes == 0 (hierarchical), else groups = nodes = 1 (global):
 *     pack(loads of groups, nodes)                   experts of one group stay on one node
 *     per node: while replicas are left, one more for the expert with the largest load / replicas
 *               pack(loads of replicas, devices of the node)
 *   pack(weights, packs): heaviest first, each to the lightest pack with room; one item per pack: as they come.
 *   Ties: the lower index. Arithmetic is f32, the reference's, because sums decide ties.
 *
 * Every choice is the minimum of (f32, index), held as one 64-bit key: loads are never negative, and the bits of
 * such floats order like the floats. A binary heap of keys is all that the algorithm needs. */
#include <moelab.h>

#include <string.h>

struct conf {
    int64_t replicas, groups, interval;
};

static const struct moe_param params[] = {
    {"replicas", MOE_INT, offsetof(struct conf, replicas), 0, 0, 1 << 20, NULL, "experts",
     "physical experts per layer, a multiple of the devices; 0: as many as logical ones"},
    {"groups", MOE_INT, offsetof(struct conf, groups), 1, 1, 1 << 20, NULL, "groups",
     "expert groups that a node keeps together, where nodes divide them"},
    {"interval", MOE_INT, offsetof(struct conf, interval), 0, 0, 1 << 30, NULL, "steps",
     "place anew every so many steps; 0: once"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

/* Scratch of one call: P replicas, E experts (E <= P), G groups (G <= E). */
struct work {
    float *load;       /* [E] of the layer */
    float *group_load; /* [G] */
    float *share;      /* [P] load of one replica, per node */
    int32_t *order;    /* [E] experts, node by node */
    int32_t *copy_of;  /* [P] index into the node's experts, per node */
    int32_t *count;    /* [E] replicas of each of the node's experts */
    int32_t *pack, *rank; /* [P] of each item: where, and as the how many-th */
    int32_t *room_used;   /* [P] items in each pack */
    float *pack_load;     /* [P] */
    uint64_t *items, *packs; /* [P] heaps */
};

struct shape {
    int32_t n_experts, n_replicas, n_groups, n_nodes, n_devices;
};

static uint64_t lightest_first(float load, int32_t index)
{
    uint32_t bits;
    memcpy(&bits, &load, sizeof bits);
    return (uint64_t)bits << 32 | (uint32_t)index;
}

static uint64_t heaviest_first(float load, int32_t index)
{
    uint32_t bits;
    memcpy(&bits, &load, sizeof bits);
    return (uint64_t)~bits << 32 | (uint32_t)index;
}

static int32_t index_of(uint64_t key)
{
    return (int32_t)(key & UINT32_MAX);
}

static void sink(uint64_t *heap, int32_t n, int32_t at, uint64_t key)
{
    for (int32_t child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= key)
            break;
        heap[at] = heap[child];
    }
    heap[at] = key;
}

static void heapify(uint64_t *heap, int32_t n)
{
    for (int32_t i = n / 2 - 1; i >= 0; i--)
        sink(heap, n, i, heap[i]);
}

static uint64_t pop(uint64_t *heap, int32_t *n)
{
    uint64_t top = heap[0];
    --*n;
    if (*n > 0)
        sink(heap, *n, 0, heap[*n]);
    return top;
}

/* n items into n_packs packs of n / n_packs each: w->pack and w->rank. */
static void pack(struct work *w, const float *load, int32_t n, int32_t n_packs)
{
    int32_t room = n / n_packs, n_items = n, n_open = n_packs;
    for (int32_t i = 0; i < n; i++) {
        w->pack[i] = i;
        w->rank[i] = 0;
        w->items[i] = heaviest_first(load[i], i);
    }
    if (room == 1)
        return;
    heapify(w->items, n);
    for (int32_t p = 0; p < n_packs; p++) {
        w->packs[p] = lightest_first(0, p); /* rising keys: a heap already */
        w->pack_load[p] = 0;
        w->room_used[p] = 0;
    }
    while (n_items > 0) {
        int32_t i = index_of(pop(w->items, &n_items)), p = index_of(w->packs[0]);
        w->pack[i] = p;
        w->rank[i] = w->room_used[p]++;
        w->pack_load[p] += load[i];
        if (w->room_used[p] < room)
            sink(w->packs, n_open, 0, lightest_first(w->pack_load[p], p));
        else
            pop(w->packs, &n_open);
    }
}

/* n experts to n_replicas copies: w->copy_of (the first n are the experts themselves) and w->count. */
static void replicate(struct work *w, const float *load, int32_t n, int32_t n_replicas)
{
    for (int32_t e = 0; e < n; e++) {
        w->copy_of[e] = e;
        w->count[e] = 1;
        w->items[e] = heaviest_first(load[e], e);
    }
    if (n_replicas > n)
        heapify(w->items, n);
    for (int32_t r = n; r < n_replicas; r++) {
        int32_t e = index_of(w->items[0]);
        w->copy_of[r] = e;
        w->count[e]++;
        sink(w->items, n, 0, heaviest_first(load[e] / (float)w->count[e], e));
    }
}

/* w->order: experts in the order of the nodes that their groups were packed to. */
static void order_groups(struct work *w, const struct shape *s, const float *load)
{
    int32_t size = s->n_experts / s->n_groups, per_node = s->n_groups / s->n_nodes;
    for (int32_t g = 0; g < s->n_groups; g++) {
        w->group_load[g] = 0;
        for (int32_t e = g * size; e < (g + 1) * size; e++)
            w->group_load[g] += load[e];
    }
    pack(w, w->group_load, s->n_groups, s->n_nodes);
    for (int32_t g = 0; g < s->n_groups; g++) {
        int32_t at = (w->pack[g] * per_node + w->rank[g]) * size;
        for (int32_t i = 0; i < size; i++)
            w->order[at + i] = g * size + i;
    }
}

/* phy2log: [P], slots of device 0 first. */
static void place_layer(struct work *w, const struct shape *s, const float *load, int32_t *phy2log)
{
    int32_t n = s->n_experts / s->n_nodes, n_copies = s->n_replicas / s->n_nodes;
    int32_t n_devices = s->n_devices / s->n_nodes, slots = s->n_replicas / s->n_devices;
    float *node_load = w->group_load; /* [n]: the groups' loads are done with by then */
    order_groups(w, s, load);
    for (int32_t node = 0; node < s->n_nodes; node++) {
        const int32_t *expert = w->order + node * n;
        for (int32_t i = 0; i < n; i++)
            node_load[i] = load[expert[i]];
        replicate(w, node_load, n, n_copies);
        for (int32_t r = 0; r < n_copies; r++)
            w->share[r] = node_load[w->copy_of[r]] / (float)w->count[w->copy_of[r]];
        pack(w, w->share, n_copies, n_devices);
        for (int32_t r = 0; r < n_copies; r++)
            phy2log[node * n_copies + w->pack[r] * slots + w->rank[r]] = expert[w->copy_of[r]];
    }
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){.env = env, .conf = conf};
    return MOE_OK;
}

/* The layer's shape, or a failure that says which number does not divide. */
static int shape_of(const struct state *s, int32_t layer, struct shape *out)
{
    const struct moe_env *env = s->env;
    int32_t n_experts = moe_experts_of(env->model, layer);
    int32_t n_replicas = s->conf->replicas > 0 ? (int32_t)s->conf->replicas : n_experts;
    *out = (struct shape){n_experts, n_replicas, (int32_t)s->conf->groups, env->topology->n_nodes,
                          env->topology->n_devices};
    if (n_replicas < n_experts)
        return env->host->fail(env, MOE_EINVAL, "replicas = %d is less than the %d experts of layer %d", n_replicas,
                               n_experts, layer);
    if (n_replicas % out->n_devices != 0)
        return env->host->fail(env, MOE_EINVAL, "replicas = %d is not a multiple of the %d devices (layer %d)",
                               n_replicas, out->n_devices, layer);
    if (out->n_groups % out->n_nodes != 0) /* the reference's rule: then groups and nodes are not looked at */
        out->n_groups = out->n_nodes = 1;
    if (n_experts % out->n_groups != 0)
        return env->host->fail(env, MOE_EINVAL, "groups = %d does not divide the %d experts of layer %d",
                               out->n_groups, n_experts, layer);
    if (out->n_devices % out->n_nodes != 0)
        return env->host->fail(env, MOE_EINVAL, "%d devices are not alike on %d nodes", out->n_devices, out->n_nodes);
    return MOE_OK;
}

static int reserve(const struct moe_env *env, struct work *w, size_t n)
{
    uint64_t *wide = env->host->scratch(env, n * (2 * sizeof(uint64_t) + 4 * sizeof(float) + 6 * sizeof(int32_t)));
    if (wide == NULL)
        return MOE_ENOMEM;
    float *real = (float *)(wide + 2 * n);
    int32_t *whole = (int32_t *)(real + 4 * n);
    *w = (struct work){
        .items = wide, .packs = wide + n,
        .load = real, .group_load = real + n, .share = real + 2 * n, .pack_load = real + 3 * n,
        .order = whole, .copy_of = whole + n, .count = whole + 2 * n, .pack = whole + 3 * n, .rank = whole + 4 * n,
        .room_used = whole + 5 * n,
    };
    return MOE_OK;
}

static int place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    struct work w;
    struct shape shape;
    size_t most = (size_t)s->conf->replicas > (size_t)env->model->n_experts ? (size_t)s->conf->replicas
                                                                             : (size_t)env->model->n_experts;
    int32_t *phy2log = env->host->scratch(env, most * sizeof *phy2log);
    int rc = phy2log != NULL ? reserve(env, &w, most) : MOE_ENOMEM;
    for (int32_t layer = 0; rc == MOE_OK && layer < env->model->n_layers; layer++) {
        const double *load = stats->load + (size_t)layer * (size_t)env->model->n_experts;
        rc = shape_of(s, layer, &shape);
        if (rc < 0)
            break;
        for (int32_t e = 0; e < shape.n_experts; e++)
            w.load[e] = stats->n_steps > 0 ? (float)load[e] : 1;
        place_layer(&w, &shape, w.load, phy2log);
        int32_t slots = shape.n_replicas / shape.n_devices;
        for (int32_t p = 0; rc == MOE_OK && p < shape.n_replicas; p++)
            rc = env->host->place(env, out, layer, phy2log[p], p / slots, 1);
    }
    return rc;
}

static int due(void *self, const struct moe_stats *stats, bool *rebalance)
{
    const struct conf *conf = ((const struct state *)self)->conf;
    *rebalance = conf->interval > 0 && stats->step > 0 && stats->step % conf->interval == 0;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_PLACEMENT,
    .name = "eplb",
    .summary = "DeepSeek's load balancer: replicates hot experts, packs replicas evenly",
    .source = "DeepSeek-AI 2025, github.com/deepseek-ai/EPLB",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.placement = {.place = place, .due = due},
};
