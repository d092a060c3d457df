/* SPDX-License-Identifier: Apache-2.0
 * run.h - one run: a model on a machine under one combination of policies. Built from the JSON that a scenario made
 * of it, so that a run can be repeated from its manifest alone. */
#ifndef RUN_H
#define RUN_H

#include "cache.h"
#include "exchange.h"
#include "layer.h"
#include "machine.h"
#include "metrics.h"
#include "policy.h"
#include "routing_metrics.h"
#include "workload.h"

enum { MAX_BALANCERS = 8 };

/* Layers without experts: n_first before the first MoE layer, interleave - 1 before each. */
struct dense_layers { int32_t n_first, interleave, width; };

/* Accesses of one device, recorded by a first pass for policies that know the next use. */
struct sequence { uint32_t *key; int64_t n, room; int64_t *next; int64_t at; };

/* n_steps: of both passes where the accesses are recorded first. */
struct run_progress { volatile int32_t step, n_steps; };

/* What a layer of the step needs on one device, kept for the check of times. */
struct layer_needs {
    int32_t entry, exit; /* tasks: tokens are ready; tokens are complete as dispatch says. entry -1: from the start */
    double foreign;      /* rows of other devices' tokens that it computes */
    bool at_home;        /* it computes rows of its own tokens */
};

struct trained_layer { struct moe_routes routes; int32_t room_routes; int32_t *to, *replica; int64_t room_to; };

struct run {
    json_t *spec;              /* what it was opened from */
    char where[256];           /* "FILE:LINE", starts messages */
    struct moe_model model;
    enum precision precision;
    struct attention_shape attention;
    struct dense_layers dense;
    int32_t vocab;             /* 0: no embedding and no head */
    int32_t tp;                /* neighbouring devices that split attention, dense layers and head */
    int32_t ep, etp, edp;      /* edp groups with all experts each, of ep slots, of etp devices that split experts */
    struct topology *topology;
    struct machine machine;
    bool machine_open;
    enum net_tier tier;        /* of a simulated machine; N_NET_TIERS: it has none */
    uint64_t seed;
    struct policy_context context;

    struct policy router, balancer[MAX_BALANCERS], placement, dispatch, offload;
    int n_balancers;
    uint32_t needs;            /* of all policies together */

    struct workload workload;
    struct moe_graph graph;
    struct tally tally;        /* of the layer's exchanges */
    struct metrics metrics;
    struct routing_metrics routing;

    /* of the current layer */
    struct moe_routes routes, before; /* before: the same tokens one layer earlier */
    int32_t room_routes, room_before;
    int32_t *n_free;           /* [L] experts that cost nothing, as the router says */
    int32_t max_free;          /* of them in any layer; E' = E + n_free */
    float *scores;             /* [T][E'] room for a router's */
    const float *gate_scores;  /* [T][E'] what selection looked at: those, the trace's logits, or NULL */
    struct moe_bias bias;      /* [E'] */
    int32_t *to, *replica;     /* [n routes]; replica: in `placed`, the first shard of those that are the expert */
    int64_t room_to;
    int64_t *load;             /* [E] tokens routed to each expert */
    int64_t *device_load;      /* [D] routes computed on each device */
    int64_t *device_tokens;    /* [D] tokens that live there */
    int32_t *entry, *exit;     /* [D] tasks */
    int32_t *leaves;           /* [T] device after the layer */
    struct layer_needs *needs_of; /* [N_PASSES][L][D] of this step */
    double *placed_bytes;      /* [D] experts that a device holds, or caches at most */
    double *placed_updated;    /* [D] weights of them that its optimiser updates */
    uint32_t *turn;            /* [groups][L*E] which replica is next */
    int32_t *near_first, *near;/* [E*N + 2], [replicas of a layer]: by (expert, node), placement_stage.c */

    struct trained_layer *trained; /* [L] decisions of the forward pass, kept for the backward; NULL: no training */
    int32_t reduced;           /* task after which the last gradients were reduced; -1 */

    struct placement placed;
    struct policy_context slots; /* devices in groups: one group as placement sees it, a slot as a device; else unset */
    struct placement chosen;   /* and what it made of that, of which `placed` has a copy per group */
    int32_t *token_slot;       /* [T] where a token is, in that sense; NULL: as in the batch */
    struct statistics window;  /* since the last placement; kept when the placement has a due hook */
    int32_t window_steps;
    struct moe_part *migration;/* what the next step must move first */
    int32_t n_migration;
    struct moe_part *moves;    /* weights that the layer's plans send */
    int32_t n_moves;

    bool offloading;           /* experts come and go: the offload policy inserts and evicts */
    double cache_share;        /* of all experts; 0: what fits in the device's memory */
    struct cache *cache;       /* [D] */
    int32_t *last_use;         /* [n_objects] task of this step that used an object last, per device 0..D-1 */
    struct sequence *sequence; /* [D] */
    bool recording;            /* first pass: decisions only */
    int32_t n_warmup;          /* steps left out of the figures */
    int32_t n_repetitions;     /* of a step where its time is real, after one that does not count */

    json_t *extrapolated;      /* what models were asked outside of their ranges; NULL: nothing */
    struct run_progress *progress; /* written as steps end, for whoever watches; NULL: nobody */
    uint64_t decisions;        /* hash over every route and device chosen */
    struct err *err;
};

/* Opens everything; every message starts with the scenario's file and line. */
int run_open(struct run *, json_t *spec, struct err *);
/* The same in a process that is one of several ranks. */
int run_open_rank(struct run *, json_t *spec, struct team *, struct err *);
/* Runs all steps. */
int run_go(struct run *);
/* {"metrics": {...}, "decisions": "...", "machine": "flow", ...} */
json_t *run_result(const struct run *);
/* The specification with every default filled in, of a run that is open: resolve.c. */
json_t *run_resolve(const struct run *);
/* Seconds that those who wait for an open run will wait, 0: not long; text: what it is that takes so long. Dispatch
 * in one exchange each way is assumed; it is for a warning, not for a result. forecast.c. */
double run_forecast(const struct run *, char *text, size_t room);
void run_close(struct run *);

/* Stored bytes of one whole expert. */
static inline double run_expert_bytes(const struct run *r)
{
    return moe_expert_bytes(&r->model);
}

static inline bool run_grouped(const struct run *r)
{
    return r->edp > 1 || r->etp > 1;
}

static inline const struct policy_context *run_placing(const struct run *r)
{
    return run_grouped(r) ? &r->slots : &r->context;
}

static inline const struct placement *run_chosen(const struct run *r)
{
    return run_grouped(r) ? &r->chosen : &r->placed;
}

/* Of every expert's width, as placements and tasks say it. */
static inline float run_shard(const struct run *r)
{
    return 1.0f / (float)r->etp;
}

/* How many devices compute route i, *first and those after it; 0: it costs nothing. */
static inline int32_t run_holders(const struct run *r, int64_t i, int32_t *first)
{
    *first = r->to[i] == MOE_SHARDED ? r->placed.replica[r->replica[i]].device : r->to[i];
    return r->to[i] == MOE_SHARDED ? r->etp : r->to[i] >= 0;
}

/* A specification's numbers, with defaults (NAN: required): run_model.c */
int run_number(struct run *, const json_t *from, const char *table, const char *key, double def, double min,
               double max, double *out);
int run_whole(struct run *, const json_t *from, const char *table, const char *key, double def, int32_t min,
              int32_t max, int32_t *out);
int run_read_model(struct run *, const json_t *model);
int run_read_layout(struct run *, const json_t *layout);

/* ---- stages, in the order of the pipeline (pipeline.c and the file named) ---- */

int pipeline_step(struct run *, int32_t step);
/* Adds what a policy says that deciding cost, if it can be charged. */
int pipeline_charge(struct run *, const struct policy *, const struct moe_cost *own, struct moe_cost *sum);
/* What a layer computes before its experts, with the dense layers before it (step_layout.c). Leaves in entry[d] the
 * task after which device d's tokens are ready, in shared[d] its shared experts' task or -1. */
int step_lay_out_plain(struct run *, const struct moe_batch *, const struct moe_cost *own, int32_t *shared);
int step_lay_out_head(struct run *);
/* Norm to output of what is before a layer's experts, once more or backwards (graph.pass). */
int step_lay_out_again(struct run *, const struct moe_batch *, int32_t *shared);
int step_lay_out_shared(struct run *, int32_t *shared);
int step_lay_out_gate_backward(struct run *, int32_t layer);
int step_lay_out_attention(struct run *);
int step_lay_out_dense_ffn(struct run *);
/* A device's kernels after what it did last. */
int step_after_entry(struct run *, int32_t device, enum moe_op, const struct kernels *);
/* Dispatch, experts and combine; moves entries on. traffic.backward: graph.pass. (pipeline.c) */
int pipeline_lay_out_experts(struct run *, const struct moe_batch *, const int32_t *shared);
/* Training (train_stage.c): refuses what it does not do; keeps a layer's decisions; lays out all after the head. */
int train_open(struct run *);
int train_keep(struct run *, int32_t layer);
int train_lay_out(struct run *, int32_t step);
void train_close(struct run *);
/* A gate that is trained (gate_stage.c): a layer's losses once it is routed; SGD after the last; figures by step. */
int gate_stage_layer(struct run *, const struct moe_batch *);
int gate_stage_step(struct run *, int32_t step);
json_t *gate_stage_curve(const struct run *);
int step_dense_before(const struct run *, int32_t layer); /* dense layers right before an MoE layer */
/* That every model is asked within its range; `allow`: else that is noted in `extrapolated`. validity.c */
int validity_check(struct run *, bool allow);
/* That the tasks which dispatch appended do the layer's work: layout_check.c */
int layout_check(struct run *, const struct moe_batch *, int32_t first_task, int64_t first_edge);
/* That nothing was used before it was there: after a step on a simulated machine (layout_times.c). */
int layout_times(struct run *);
/* Elements: of what tp devices split in so many layers, of one layer's gate and shared experts, of embedding and head,
 * and of all that a device's optimiser updates. device_memory.c */
int32_t step_dense_all(const struct run *); /* dense layers */
double memory_split_weights(const struct run *, int32_t n_dense, int32_t n_moe);
double memory_whole_weights(const struct run *);
double memory_vocabulary(const struct run *);
double memory_updated(const struct run *, int32_t device);
/* Bytes of each kind on the device that has most of it, as results give them. */
json_t *device_memory_json(const struct run *);
double device_memory_fixed(const struct run *);    /* bytes on every device beside routed experts: device_memory.c */
int64_t device_memory_objects(const struct run *); /* experts that fit beside them on the smallest device */
/* That every device holds what is placed there, or its cache; ERR_INPUT with the figures. */
int device_memory_check(struct run *, const struct moe_placement *);
/* That devices hold what plans of the layer (r->moves) send them as well; `who` planned last. */
int device_memory_moves(struct run *, const char *who);
/* Groups of devices that hold all experts each, and experts in shards: expert_groups.c. `open` once there is a context,
 * `check` once there are policies. */
int groups_open(struct run *);
int groups_check(struct run *);
void groups_close(struct run *);
/* `chosen` in every group, shard after shard. */
int groups_expand(struct run *, struct placement *out, const char *who);
/* The batch as a placement's select sees it; devices in token_slot. */
void groups_batch(struct run *, const struct moe_batch *, struct moe_batch *out);
/* A replica of `chosen` as the group of `device` has it: in `placed`, its first shard. */
int32_t groups_replica(const struct run *, int32_t chosen, int32_t device);
int placement_start(struct run *);                     /* placement_stage.c */
int placement_assign(struct run *, const struct moe_batch *, struct moe_cost *own);
int placement_observe(struct run *, int32_t step);
int offload_open(struct run *);                        /* offload_stage.c */
void offload_close(struct run *);
int offload_restart(struct run *);                     /* between the recording pass and the run */
/* Turns the experts tasks appended since `first_task` (their edges: since `first_edge`) into resident parts, loads
 * and late parts. */
int offload_expand(struct run *, const struct moe_batch *, int32_t first_task, int64_t first_edge);

#endif
