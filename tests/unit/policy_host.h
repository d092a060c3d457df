/* SPDX-License-Identifier: Apache-2.0
 * policy_host.h - the smallest host a policy can run under, for tests: it loads plugins, keeps what they build, and
 * checks what the core would check. Independent of the core, so that a policy's tests do not depend on the core's. */
#ifndef POLICY_HOST_H
#define POLICY_HOST_H

#include "moelab.h"

struct policy_shape {
    int32_t n_layers, n_experts, top_k, n_devices, n_nodes;
    int64_t cache_objects;
    uint64_t seed;
};

struct policy_block;

/* One run's environment. Not copied once open: env points into it. */
struct policy_host {
    struct moe_env env;
    struct moe_host host;
    struct moe_model model;
    struct moe_topology topology;
    int32_t *node;
    double *figures;
    struct policy_block *memory, *scratch;
    const struct moe_tensor *tensor; /* [n_tensors] that settings may name */
    int32_t n_tensors;
    struct moe_graph *tries; /* of graph_try, until the hook ends */
    int n_failures, n_warnings;
    char failure[512]; /* the first */
};

/* Aborts when there is no memory, as everything in this file does. */
void policy_host_open(struct policy_host *, const struct policy_shape *);
void policy_host_close(struct policy_host *);
/* What ends with a hook: frees scratch memory. */
void policy_host_end_hook(struct policy_host *);

/* A started policy. */
struct policy {
    const struct moe_plugin *plugin;
    struct policy_host *host;
    void *conf, *state;
};

/* The plugin of a shared object, which stays loaded until exit; NULL with a message in `why` (512 bytes). */
const struct moe_plugin *policy_load(const char *path, char why[512]);
/* KIND/NAME.so on $MOELAB_PLUGIN_PATH (directories, ':' between them; "plugins" when unset), or NULL. */
const struct moe_plugin *policy_find(const char *kind, const char *name);
/* Fills conf from the defaults and `settings` ("replicas=288 drop=position table=#0", the last the host's tensor 0),
 * then calls init; its result. */
int policy_start(struct policy *, struct policy_host *, const struct moe_plugin *, const char *settings);
void policy_stop(struct policy *);

/* Routes with room for n_tokens; freed with policy_routes_free. */
void policy_routes_init(struct moe_routes *, int32_t n_tokens);
void policy_routes_push(struct moe_routes *, int32_t token, int32_t expert, float weight); /* tokens in order */
void policy_routes_copy(struct moe_routes *out, const struct moe_routes *);
void policy_routes_free(struct moe_routes *);

/* A placement under construction: `view` is what hooks get. */
struct policy_placement {
    struct moe_placement view;
    struct moe_replica *replica;
    int32_t room;
    int32_t *layer_first, *expert_first, *by_expert;
};
void policy_placement_init(struct policy_placement *);
void policy_placement_seal(struct policy_placement *, const struct moe_model *); /* sorts by layer, fills the views */
void policy_placement_free(struct policy_placement *);

/* A task graph as a list of what was asked for. */
enum policy_task_kind { TASK_COMPUTE, TASK_EXPERTS, TASK_EXCHANGE, TASK_ARRIVAL };
struct policy_task {
    enum policy_task_kind kind;
    struct moe_work work;           /* TASK_COMPUTE */
    struct moe_expert_work experts; /* TASK_EXPERTS: arrays are copies */
    struct moe_exchange exchange;   /* TASK_EXCHANGE: parts and items are copies */
    int32_t of, device;             /* TASK_ARRIVAL */
};
struct moe_graph {
    struct policy_task *task;
    int32_t n, room;
    struct policy_edge { int32_t task, before; } *edge; /* `before` has to end before `task` starts */
    int32_t n_edges, edge_room;
    struct moe_graph *next; /* graphs of graph_try */
};
void policy_graph_free(struct moe_graph *);

/* Replays n accesses on device 0 with a cache of host->env.cache_objects, layer = object / n_experts. Returns the
 * misses, or -1 when the policy failed or broke a rule (see host->failure). `pin`: accesses
 * come in batches of that size; what a batch has touched, and as many objects drawn at random, stay pinned until it
 * ends; 0: nothing is pinned. seconds (may be NULL): the time of the loop. */
int64_t policy_replay(struct policy *, const uint32_t *object, int64_t n, const int64_t *next_use, int32_t pin,
                      double *seconds);
/* Position of each object's next access, INT64_MAX for none. */
void policy_next_use(const uint32_t *object, int64_t n, uint32_t n_objects, int64_t *next_use);

#endif
