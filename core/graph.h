/* SPDX-License-Identifier: Apache-2.0
 * graph.h - the task graph of one step: what dispatch lays out and a machine runs.
 *
 * Tasks are appended and never removed; ids are indices. Lists that belong to a task (parts, experts, items) lie in
 * the graph's pools, so a graph is emptied by setting counters to zero and costs no allocation from the second step
 * on. Edges may be added until the graph runs. */
#ifndef GRAPH_H
#define GRAPH_H

#include "err.h"
#include "machine.h"
#include "moelab.h"

#include <float.h>

enum task_kind {
    TASK_COMPUTE,  /* (device, stream): flops, bytes; or a list of kernels, one after another */
    TASK_EXPERTS,  /* (device, stream): expert/rows/items */
    TASK_EXCHANGE, /* parts */
    TASK_ARRIVAL,  /* ends when `exchange` has delivered to `device` */
    TASK_LOAD,     /* (device, stream): `bytes` from endpoint `source`, one after another per stream */
    TASK_JOIN      /* ends when everything before it has ended */
};

/* An expert as offload knows it is layer x E + expert. */
#define NO_OBJECT UINT32_MAX

/* Streams of a device. Dispatch uses those below STREAM_COPY freely. */
enum { STREAM_COPY = 14, STREAM_HOST = 15, N_STREAMS = 16 };

/* What a layer's tasks are part of; training has all three, in this order, the last two from the last layer on. */
enum graph_pass { PASS_FORWARD, PASS_AGAIN /* recomputed */, PASS_BACKWARD, N_PASSES };

struct task {
    enum task_kind kind;
    enum moe_op op;
    enum moe_payload payload;
    int32_t device, stream, layer, micro;
    enum graph_pass pass;
    int32_t exchange;             /* TASK_ARRIVAL */
    int32_t source;               /* TASK_LOAD: an endpoint of the topology */
    uint32_t object, victim;      /* TASK_LOAD: what arrives, and whose slot it takes; NO_OBJECT: a free one */
    bool passes;                  /* TASK_LOAD: it is used and not kept, so it needs room beside the cache */
    int32_t first, n;             /* TASK_EXCHANGE: parts; TASK_EXPERTS: experts and rows; TASK_COMPUTE: kernels */
    int64_t first_item, n_items;  /* TASK_EXPERTS */
    float fraction;               /* TASK_EXPERTS */
    double message_bytes;         /* TASK_EXCHANGE: size of its messages; 0: a part is one */
    int32_t sms;                  /* TASK_EXCHANGE: that it takes from computing */
    bool fused;                   /* TASK_EXCHANGE: no start-up of its own */
    bool listed;                  /* TASK_COMPUTE: kernels, not flops and bytes */
    bool collective;              /* TASK_EXCHANGE: of attention, dense layers and gradients, not of tokens */
    int32_t sum, load;            /* TASK_EXCHANGE without its parts: index into sums, the machine's; else -1 */
    bool moves_weights;           /* TASK_EXCHANGE: migration or a plan's transfers, not a layer's traffic */
    double flops, bytes;
    double start, end;            /* set by the machine, in seconds of its clock */
};

struct edge { int32_t before, task; };

/* What items index, kept with them: route i of layer l is route[route_first[l] + i]. */
struct graph_route { int32_t token, expert; float weight; };

/* What a device is to an exchange: sends bytes to others, gets some, is named in a part at all. */
enum { SIDE_SENDS = 1, SIDE_GETS = 2, SIDE_NAMED = 4 };
struct exchange_side { int32_t device; uint8_t is; };
/* Of an exchange that has given its parts back: exchange.c. */
struct exchange_sum { double intra, inter, even_s; int64_t first_side; int32_t n_sides; };

struct moe_graph {
    struct task *task;
    int32_t n_tasks, room_tasks;
    struct edge *edge;
    int64_t n_edges, room_edges;
    struct moe_part *part; /* items of part i: item + (intptr_t)part.items, see graph_part_items */
    int32_t n_parts, room_parts;
    int32_t *expert;
    int64_t *rows;
    int32_t n_experts, room_experts;
    struct kernel *kernel;
    int32_t n_kernels, room_kernels;
    int32_t last_list[MOE_OP_OTHER + 1][2]; /* of each op, first and n: the next is likely the same */
    int64_t *item;
    int64_t n_items, room_items;
    int64_t *part_item; /* [n_parts] first item of a part in `item`; where items are kept */
    int32_t room_part_item;
    struct exchange_sum *sum;
    struct exchange_side *side; /* of each sum, every device that is named, once */
    int32_t n_sums, room_sums;
    int64_t n_sides, room_sides;
    int32_t n_devices;
    int32_t layer, micro; /* stamped on new tasks */
    enum graph_pass pass; /* so is this */
    bool names_paths;     /* a part so far had a path above 1: how many there are, the machine knows */
    bool keep_items;      /* a real machine will run this */
    struct graph_route *route;
    int64_t room_routes;
    int64_t *route_first; /* [n_route_layers + 1] */
    int32_t n_route_layers, room_route_layers;
    bool keep_scores;     /* ... and choose experts again, to compare */
    float *score;         /* [n_score_layers][n_tokens][n_experts of the model] what selection looked at */
    int64_t room_scores;
    int32_t n_score_layers; /* up to the first layer that has none */
    int32_t *token_device; /* [n_tokens] where a token enters and leaves every layer */
    int32_t n_tokens, room_tokens;
};

void graph_reset(struct moe_graph *);
void graph_free(struct moe_graph *);
int32_t graph_compute(struct moe_graph *, const struct moe_work *, struct err *);
/* The core's own computation: n kernels, launched one after another; none takes no time. */
int32_t graph_kernels(struct moe_graph *, int32_t device, int32_t stream, enum moe_op, int32_t n, const struct kernel *,
                      struct err *);
int32_t graph_experts(struct moe_graph *, const struct moe_expert_work *, struct err *);
int32_t graph_exchange(struct moe_graph *, const struct moe_exchange *, struct err *);
/* An exchange whose parts are not kept here; bytes: between devices. */
int32_t graph_exchange_alone(struct moe_graph *, const struct moe_exchange *, double bytes, struct err *);
/* What is wrong with an exchange but for its parts, and with a part; 0: nothing. */
int graph_check_exchange(const struct moe_exchange *, struct err *);
int graph_check_part(const struct moe_graph *, const struct moe_part *, struct err *);
static inline bool graph_part_fits(const struct moe_graph *g, const struct moe_part *p)
{
    return (uint32_t)p->src < (uint32_t)g->n_devices && (uint32_t)p->dst < (uint32_t)g->n_devices && p->bytes >= 0 &&
           p->bytes <= DBL_MAX && p->n_items >= 0 && p->path >= 0;
}
int32_t graph_arrival(struct moe_graph *, int32_t exchange, int32_t device, struct err *);
int32_t graph_load(struct moe_graph *, int32_t device, int32_t source, uint32_t object, double bytes, struct err *);
int32_t graph_join(struct moe_graph *, struct err *);
int graph_after(struct moe_graph *, int32_t task, int32_t before, struct err *);
/* One more sum, with so many sides to be filled in; NULL: no memory. */
struct exchange_sum *graph_sum(struct moe_graph *, int32_t n_sides, struct err *);
/* Routes of the next layer, 0 first; device: [T]. Only tokens that go to experts: a mix of tokens is no item. */
int graph_keep_routes(struct moe_graph *, const struct moe_routes *, const int32_t *device, struct err *);

/* What the layer's selection looked at, [T][n_experts], after its routes; NULL: nothing is known. */
int graph_keep_scores(struct moe_graph *, const float *scores, int32_t n_experts, struct err *);

/* Successor lists in CSR form and predecessor counts, by counting; both freed by the caller. Fails when the graph
 * has a cycle (arrivals count as successors of their exchange). */
struct graph_order { int64_t *first; int32_t *next; int32_t *n_before; };
int graph_order(const struct moe_graph *, struct graph_order *, struct err *);
void graph_order_free(struct graph_order *);

/* "attention", "gate", "permute", "dispatch", "experts", "combine", ...: what results call a task's phase. */
const char *task_phase(const struct task *);

#endif
