/* SPDX-License-Identifier: Apache-2.0
 *
 * moelab.h - the only header a policy author reads.
 *
 * A policy is one shared object that exports one symbol, `const struct moe_plugin moe_plugin`. moelab loads it,
 * compares `abi` and `size`, and then calls its hooks with arrays that the core owns. A policy decides on arrays;
 * only dispatch speaks of tasks; nobody but the machine knows time.
 *
 * Rules for every hook
 *   - returns 0, or a negative enum moe_err after env->host->fail(); the first failure of a run is the one reported
 *   - all state is per run: no globals, clocks, rand(), printf, exit, threads
 *   - within a step, layers come in order (of each micro-batch, if there are several); no other order is promised.
 *     Entropy comes from moe_rand(), which depends on the run's seed and on what is asked, never on the order of calls
 *   - pointers passed in are valid until the hook returns; memory from host->alloc() lives as long as the run
 *
 * Letters: T tokens, E logical experts of the layer, K top_k, L MoE layers, D devices, N nodes, H hidden width.
 * Arrays are row-major. Units are seconds, bytes and FLOPs. Ids count from 0.
 */
#ifndef MOELAB_H
#define MOELAB_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_ABI 4u /* bumped when a layout or a meaning changes: tests/unit/test_abi.c guards it */

#if defined(__GNUC__)
#define MOE_EXPORT __attribute__((visibility("default")))
#define MOE_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define MOE_EXPORT
#define MOE_PRINTF(f, a)
#endif

enum moe_kind { MOE_ROUTER, MOE_BALANCER, MOE_PLACEMENT, MOE_DISPATCH, MOE_OFFLOAD };
#define MOE_N_KINDS 5

enum moe_err {
    MOE_OK = 0,
    MOE_BYPASS = 1,        /* offload.insert, evict: do not keep this object; not an error */
    MOE_EINVAL = -1,       /* an input or a parameter makes no sense */
    MOE_ENOMEM = -2,
    MOE_EUNSUPPORTED = -3, /* this policy cannot do that (no tensor, no solver, wrong shape) */
    MOE_EFAIL = -4
};

/* What a policy must be given (checked before the run starts) and what it does to others. */
enum moe_needs {
    MOE_NEEDS_LOGITS = 1 << 0,     /* batch->router_logits */
    MOE_NEEDS_RECORDED = 1 << 1,   /* batch->recorded */
    MOE_NEEDS_HIDDEN = 1 << 2,     /* batch->hidden */
    MOE_NEEDS_IMPORTANCE = 1 << 3, /* batch->importance */
    MOE_NEEDS_TOKEN_ID = 1 << 4,   /* batch->token_id */
    MOE_NEEDS_PREVIOUS = 1 << 5,   /* batch->previous: the same tokens' routes in the layer before */
    MOE_NEEDS_LABEL = 1 << 6,      /* batch->label */
    MOE_NEEDS_TENSORS = 1 << 7,    /* learned tensors, as parameters of type MOE_TENSOR */
    MOE_NEEDS_NEXT_USE = 1 << 8,   /* offload: access->next_use, known only when a trace is replayed */
    MOE_NEEDS_SCORES = 1 << 9,     /* offload: observe() gets gate scores */
    MOE_AHEAD = 1 << 10,           /* decides for later layers too */
    MOE_CROSS_BATCH = 1 << 11,     /* another request may change this one's experts; undeclared, a test fails it */
    MOE_LOCAL = 1 << 12,           /* decides from its own device's tokens alone */
    MOE_NEEDS_PREVIOUS_LOGITS = 1 << 13, /* batch->previous_logits */
    MOE_NEEDS_TRANSITIONS = 1 << 14,     /* placement: stats->transitions, also while the run goes on */
    MOE_NEEDS_COACTIVATION = 1 << 15,    /* placement: stats->coactivation */
    MOE_NEEDS_SALIENCY = 1 << 16,        /* placement: stats->saliency */
    MOE_NEEDS_SIMILARITY = 1 << 17,      /* placement: stats->similarity */
    MOE_OWN_GATE = 1 << 18,              /* router: `own` is all that deciding costs; there is no gate of 2 T H E */
    MOE_HEEDS_BIAS = 1 << 19             /* router: its route() follows the bias; without score, select and this, balancers
                                            that adjust are refused */
};

enum moe_phase { MOE_PREFILL, MOE_DECODE, MOE_TRAIN };

struct moe_env;
struct moe_graph; /* opaque: built through struct moe_host */
struct moe_placement;
struct moe_routes;
struct moe_work;
struct moe_expert_work;
struct moe_exchange;

/* ---- parameters: one table feeds Lua keys, --set, `moelab plugins show`, the man page and the manifest ---- */

enum moe_type { MOE_INT, MOE_REAL, MOE_BOOL, MOE_STRING, MOE_ENUM, MOE_TENSOR };

struct moe_tensor { /* a learned array, of a .npy or written out, converted to f32; data NULL when not given */
    int32_t n_dims;
    int64_t shape[4];
    const float *data;
};

/* The field at `offset` of the plugin's conf struct is int64_t, double, bool, const char *, int32_t (index into
 * choices) or struct moe_tensor. Out of range, NaN, unknown and mistyped values never reach the plugin. */
struct moe_param {
    const char *name;
    enum moe_type type;
    size_t offset;
    double def, min, max;    /* MOE_INT, MOE_REAL; def alone for MOE_BOOL and MOE_ENUM (index) */
    const char *def_text;    /* MOE_STRING: default; MOE_ENUM: choices, "score|position"; MOE_TENSOR: shape, "L,E,H" */
    const char *unit, *help; /* unit "" when it has none */
};
#define MOE_PARAM_END { NULL, MOE_INT, 0, 0, 0, 0, NULL, NULL, NULL }

/* ---- what every policy may know about the run ---- */

struct moe_model {
    int32_t n_layers;             /* L: MoE layers only */
    int32_t n_experts;            /* E: the largest layer's */
    int32_t top_k;                /* K */
    int32_t n_shared;             /* experts that every token visits on its own device */
    int32_t d_model, d_expert;    /* hidden width; width of one expert's FFN */
    double weight_bytes;          /* bytes of one stored weight (2 for bf16, 0.5 for 4 bit) */
    double act_bytes;             /* bytes of one activation element on the wire in dispatch */
    double combine_bytes;         /* the same in combine */
    const int32_t *layer_experts; /* [L] or NULL: E in every layer */
    const double *expert_width;   /* [L][E] share of d_expert or NULL: 1 everywhere */
    const double *expert_bytes;   /* [L][E] stored or NULL: width x moe_expert_bytes(); less in factored experts */
};

/* Where layouts put devices into groups, a placement decides for one: it sees ep devices, each as much as the etp that
 * split its experts are together, and whatever it places is placed in every group alike. */
struct moe_topology {
    int32_t n_devices, n_nodes;
    const int32_t *node;        /* [D] */
    const double *memory;       /* [D] bytes */
    const double *expert_room;  /* [D] bytes of it for experts: beside attention, gates, shared experts, KV cache, and a
                                   tenth kept for activations */
    const double *flops;        /* [D] peak, at the model's precision */
    const double *mem_bandwidth;/* [D] B/s */
    const double *host_bandwidth;/* [D] B/s from the node's memory to this device */
};

/* Services of the core. A plugin links against nothing but libc; everything it needs is here. */
struct moe_host {
    uint32_t abi, size;
    /* Records the failure and returns `code`, so that a hook can `return host->fail(...)`. */
    int (*fail)(const struct moe_env *, int code, const char *fmt, ...) MOE_PRINTF(3, 4);
    void (*warn)(const struct moe_env *, const char *fmt, ...) MOE_PRINTF(2, 3);
    /* Zeroed memory that lives as long as the run; NULL after fail() when there is none. */
    void *(*alloc)(const struct moe_env *, size_t n, size_t size);
    /* Memory that lives until the hook returns; contents undefined. Cheap: reused, not freed. */
    void *(*scratch)(const struct moe_env *, size_t bytes);

    /* Room for n routes in `out`; keeps what is there. */
    int (*routes_reserve)(const struct moe_env *, struct moe_routes *out, int64_t n);
    /* Expert-major picks (expert e takes token[first[e]..first[e+1])) to token-major routes. first: [E+1]. */
    int (*routes_transpose)(const struct moe_env *, int32_t n_tokens, int32_t n_experts, const int64_t *first,
                            const int32_t *token, const float *weight, struct moe_routes *out);

    /* One replica (fraction 1) or shard (fraction < 1) of an expert on a device. The order of calls within a
     * layer is the physical order: the p-th call for layer l is physical expert p of that layer. */
    int (*place)(const struct moe_env *, struct moe_placement *, int32_t layer, int32_t expert, int32_t device,
                 float fraction);
    /* This expert no longer exists and needs no replica: its tokens go to `instead` (merged), or the router has to do
     * without it (-1: pruned; it may not be selected). */
    int (*leave_out)(const struct moe_env *, struct moe_placement *, int32_t layer, int32_t expert, int32_t instead);

    double (*bandwidth)(const struct moe_env *, int32_t src, int32_t dst); /* B/s of the narrowest link between; from a
                                                                              device to itself INFINITY */
    double (*latency)(const struct moe_env *, int32_t src, int32_t dst);   /* s, one way */
    int32_t (*n_paths)(const struct moe_env *, int32_t src, int32_t dst);  /* parallel ways, for moe_part.path */

    /* Task graph. Builders copy what they are given and return a task id >= 0 or a negative error. Tasks on one
     * (device, stream) run in the order in which they become ready, ties by id; tasks without an edge between them may
     * overlap. */
    int32_t (*task_compute)(const struct moe_env *, struct moe_graph *, const struct moe_work *);
    /* All the FFNs of `n` experts on one device: rows[i] rows through expert[i]; items: route indices, in the
     * order of the experts (what a real machine computes on). Weights not resident are loaded first. */
    int32_t (*task_experts)(const struct moe_env *, struct moe_graph *, const struct moe_expert_work *);
    /* One exchange of any shape: n_parts transfers that start together. */
    int32_t (*task_exchange)(const struct moe_env *, struct moe_graph *, const struct moe_exchange *);
    /* A task that ends when everything that `exchange` carries to `device` has arrived. */
    int32_t (*task_arrival)(const struct moe_env *, struct moe_graph *, int32_t exchange, int32_t device);
    int (*task_after)(const struct moe_env *, struct moe_graph *, int32_t task, int32_t before);
    /* A graph to try: same builders, thrown away at the end of the hook; NULL after fail(). It starts with one empty
     * task per device: in a trial, the task after which device d's tokens are ready is d, not entry[d]. And how long the
     * flow model of the run's machine says it takes (tier flow: concurrent exchanges share links). MOE_EUNSUPPORTED
     * where there is no model: an answer, not a failure, so a policy can go on without. */
    struct moe_graph *(*graph_try)(const struct moe_env *);
    int (*estimate)(const struct moe_env *, struct moe_graph *, double *seconds);
};

struct moe_env {
    const struct moe_host *host;
    const struct moe_model *model;
    const struct moe_topology *topology;
    uint64_t seed;             /* of this run; already mixed with the plugin's name */
    uint32_t n_objects;        /* offload: dense ids are < n_objects; object = layer * E + expert */
    int64_t cache_objects;     /* offload: how many objects of the model's precision one device's cache holds */
    double cache_bytes;        /* the same in bytes */
    void *core;                /* the core's own; not to be touched */
};

/* Counter-based entropy: the same (seed, hook, step, layer, i) gives the same bits, whatever was asked before. */
static inline uint64_t moe_mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static inline uint64_t moe_rand(const struct moe_env *env, uint32_t hook, int64_t step, int64_t layer, int64_t i)
{
    const uint64_t golden = UINT64_C(0x9E3779B97F4A7C15);
    uint64_t z = moe_mix(env->seed + golden * (hook + 1u));
    z = moe_mix(z + golden * (uint64_t)(step + 1));
    z = moe_mix(z + golden * (uint64_t)(layer + 1));
    return moe_mix(z + golden * (uint64_t)(i + 1));
}

/* 53 random bits to [0, 1). */
static inline double moe_unit(uint64_t bits)
{
    return (double)(bits >> 11) * 0x1p-53;
}

/* ---- what travels through the pipeline ---- */

/* Routes of a batch, token-major: the experts of token t are expert[offset[t]..offset[t+1]).
 * Ids E..E+n_free-1 are experts that cost nothing (null, zero, copy, constant): they carry weight, no work, no
 * traffic. A pipeline that does not carry a form or a field refuses it by name; none is ever ignored. */
enum moe_form {
    MOE_TOKENS, /* tokens go to experts */
    MOE_SLOTS,  /* slots go to experts: route i mixes its token into slot[i] (weight) and back (combine) */
    MOE_MERGED  /* tokens go through experts merged from several: route i adds expert[i] to merged expert slot[i] */
};

enum moe_half { MOE_HALF_ATTENTION = 1, MOE_HALF_EXPERTS = 2 }; /* of a layer; bits */

/* The core owns offset, expert and weight (host->routes_reserve). The others are the policy's: from host->alloc or its
 * state, valid until the next call of the same hook. */
struct moe_routes {
    enum moe_form form;
    int32_t n_tokens, n_free;
    int64_t n, capacity;  /* routes in use; room */
    int64_t *offset;      /* [T+1] */
    int32_t *expert;      /* [n] */
    float *weight;        /* [n] dispatch weight, the gate's */
    float *combine;       /* [n] or NULL: equal to weight */
    int32_t *layer;       /* [n] or NULL: MoE layer whose expert this is (pools shared by layers); NULL: the batch's */
    int32_t n_slots, *slot; /* [n] of MOE_SLOTS and MOE_MERGED, 0 to n_slots - 1; a slot's routes name one expert in the
                               first form, one merged expert in the second */
    uint8_t *skip;        /* [T] or NULL: halves of this layer that a token leaves out (depth routers) */
    uint8_t *again;       /* [T] or NULL: halves that its output goes through once more, as batch->round + 1 */
};

/* Tokens that enter one MoE layer. A field that the workload lacks is NULL; needs says which are required. */
struct moe_batch {
    int32_t step, layer, round;        /* round: > 0 when routes->again asked for another */
    enum moe_phase phase;
    int32_t n_tokens, n_experts, top_k, n_hidden;
    int32_t n_free;                    /* the router's; scores and bias have E + n_free columns, written E' */
    const float *router_logits;        /* [T][E] as recorded */
    const struct moe_routes *recorded; /* what the captured model chose */
    const int32_t *token_id, *position, *request, *device, *label; /* [T] each */
    const int32_t *previous_token_id;  /* [T] of the same request; -1 at its first; NULL in eval */
    const float *hidden;               /* [T][H] entering the gate */
    const float *importance;           /* [T] for example attention received */
    const struct moe_routes *previous; /* the same tokens in the previous MoE layer */
    const float *previous_logits;      /* [T][E] of the previous MoE layer; NULL in the first */
    const struct moe_placement *placement; /* where experts are now; NULL where there are no devices (moelab eval) */
};

/* What balancers do to scores before selection: select on scale[e] * score + add[e]; weights keep the score. */
struct moe_bias {
    float *add;   /* [E'] zero at the start */
    float *scale; /* [E'] one at the start */
};

/* What deciding costs on all devices together, per call, beyond the gate's matrix product (2 T H E), which the core
 * counts but for MOE_OWN_GATE. gathered: bytes that every device sends to every other before anyone can decide. */
struct moe_cost { double flops, bytes, gathered; };

struct moe_replica { int32_t layer, expert, device; float fraction; };

/* Written through host->place(); the views are filled by the core before anyone reads them. */
struct moe_placement {
    int32_t n;
    const struct moe_replica *replica;  /* [n] by layer, then in physical order */
    const int32_t *layer_first;         /* [L+1] into replica */
    const int32_t *expert_first;        /* [L*E+1] into by_expert */
    const int32_t *by_expert;           /* [n] replica ids of (layer, expert), lowest device first */
    const int32_t *instead;             /* [L*E] or NULL: all exist; itself, the expert it was merged into, or -1 */
};

/* Statistics that placements see: what was routed, not what will be. */
struct moe_stats {
    int32_t step, n_steps;      /* now; how many steps the counts cover (a profile of recorded requests counts as 1) */
    const double *load;         /* [L][E] tokens routed */
    const double *transitions;  /* [L-1][E][E] tokens that went from e in layer l to f in l+1; NULL if not needed */
    const double *coactivation; /* [L][E][E] tokens that chose both, the diagonal zero; NULL if not needed */
    const double *saliency;     /* [L][E] sum over an expert's tokens of gate weight x norm of its output; or NULL */
    const double *similarity;   /* [L][E][E] cosine of two experts' router logits over tokens; or NULL */
    const struct moe_placement *current; /* NULL before the first placement */
};

/* A balancer's plan after placement: rows from..to-1 of an expert's tokens are computed on a device; the weights
 * listed in transfers travel first. Rows that no split names stay where the placement put them. */
struct moe_split { int32_t expert, device; int64_t from, to; };
struct moe_weight_move { int32_t expert, src, dst; };
struct moe_plan {
    int32_t n_splits, n_moves, max_splits, max_moves; /* room given by the core; never more needed than E * D */
    struct moe_split *split;
    struct moe_weight_move *move;
};

/* ---- tasks ---- */

enum moe_op { /* what a compute task is for: names the phase in results and tells a real machine what to run */
    MOE_OP_ATTENTION, MOE_OP_GATE, MOE_OP_PERMUTE, MOE_OP_EXPERTS, MOE_OP_SHARED, MOE_OP_COMBINE, MOE_OP_OTHER
};

struct moe_work {
    int32_t device, stream; /* streams 0 to 13 are dispatch's; what shares one runs in order */
    enum moe_op op;
    double flops, bytes; /* arithmetic; device memory traffic */
    bool fused;          /* goes on in the kernel of the task before it on this stream: no launch of its own */
};

struct moe_expert_work {
    int32_t device, stream, layer, n;
    const int32_t *expert; /* [n] logical */
    const int64_t *rows;   /* [n] */
    const int64_t *items;  /* [sum of rows] route indices, or NULL when the layout does not know them */
    float fraction;        /* of every expert's width (shards); 1 for whole experts */
    bool fused;            /* as in moe_work; and the weights of experts that ran before in that kernel are at hand */
};

enum moe_payload {
    MOE_PAY_HIDDEN,  /* items are route indices; each carries its token's hidden state to the expert */
    MOE_PAY_OUTPUT,  /* items are route indices; each carries the expert's output back */
    MOE_PAY_BYTES,   /* nothing that a real machine would have to interpret */
    MOE_PAY_WEIGHTS  /* items are experts of the layer: dst may compute them afterwards, whatever `to` says */
};
struct moe_part {
    int32_t src, dst;
    double bytes; /* src == dst: what a kernel pushes through its own device's port all the same; 0 where it need not */
    int64_t n_items;
    const int64_t *items;
    int32_t path; /* 0: as the network chooses; p: the p-th of host->n_paths() */
};
struct moe_exchange {
    enum moe_payload payload;
    int32_t n_parts;
    const struct moe_part *part;
    double message_bytes; /* a part travels in messages of so many bytes; 0: as one */
    int32_t sms;          /* that its kernel takes from computing on each of its devices; 0: none (copy engines, NICs) */
    bool fused;           /* goes on in a kernel that runs already: no start-up of its own */
};

/* One micro-batch of one layer, for dispatch to lay out. */
enum { MOE_NOWHERE = -1, MOE_SHARDED = -2 };
struct moe_traffic {
    int32_t step, layer, micro, n_micro;
    bool backward;                /* gradients travel: in where outputs left, out where hidden states came in */
    const struct moe_routes *routes;
    const int32_t *device;        /* [T] where a token is before the layer */
    const int32_t *to;            /* [n] device that computes the route; MOE_NOWHERE: it costs nothing; MOE_SHARDED:
                                     every holder of a shard of its expert computes its fraction */
    const int32_t *holders;       /* [n] or NULL: none is MOE_SHARDED. Of a route that is: index into placement->replica
                                     of the first of n_shards that follow each other and are the expert together, on
                                     as many neighbouring devices, the first of which n_shards divides */
    int32_t n_shards;             /* 1: experts are whole */
    int32_t n_groups;             /* expert-data-parallel: g x D / n_groups is the first device of group g. Each holds
                                     all experts; its tokens are computed in it. 1: all devices are one */
    const struct moe_placement *placement;
    double dispatch_bytes, combine_bytes; /* of one token's row on the wire */
    const int32_t *entry;         /* [D] task after which a device's tokens are ready */
    int32_t *exit;                /* [D] out: task after which a device's tokens are complete */
    int32_t *leaves;              /* [T] in and out: where a token is after the layer; on entry `device` */
};

struct moe_timings {              /* of the step before, as observed */
    int32_t step, n_phases;
    const char *const *phase;     /* names */
    const double *seconds;
    int32_t n_links;              /* 0 where the machine does not count them */
    const char *const *link;      /* names */
    const double *link_bytes, *link_busy_s;
    int32_t n_flows;              /* 0 where the machine does not keep them */
    const struct moe_flow_time { int32_t src, dst, path; double bytes, seconds; } *flow; /* as parts were sent */
};

/* ---- offload ---- */

struct moe_access {
    int64_t index;             /* position in the device's sequence of accesses */
    int64_t next_use;          /* index of this object's next access; INT64_MAX never again; -1 not known */
    int32_t step, layer, expert;
    enum moe_phase phase;
    int32_t n_tokens;          /* rows that this access serves */
    float score;               /* sum of their gate weights; 0 if not known */
    double bytes;              /* of the object, at the precision it is stored in; 0 where only objects are counted */
    bool prefetch;             /* brought in before it was asked for */
};

struct moe_pinned { const uint64_t *mark; uint64_t now; };
static inline bool moe_is_pinned(const struct moe_pinned *p, uint32_t object)
{
    return p->mark != NULL && p->mark[object] == p->now;
}

enum moe_where { MOE_ON_DEVICE, MOE_ON_HOST, MOE_ON_DISK }; /* on disk: host memory fetches it first */
struct moe_layer_work {        /* one layer's experts on one device, for the split between GPU and CPU */
    int32_t step, layer, n;
    const int32_t *expert;     /* [n] */
    const int64_t *rows;       /* [n] */
    const uint8_t *resident;   /* [n] */
    const double *device_s, *host_s, *load_s; /* [n] cost model's opinion */
};

struct moe_window { /* what a prefetch may use */
    int32_t step, layer;       /* the layer whose experts now run; wanted are those of layers after it */
    double seconds, bytes;     /* link time and bytes expected to be free before that layer; from the step before */
    const uint8_t *resident;   /* [n_objects] 1: on the device or on its way */
    int32_t n_ahead;           /* layers after this one whose experts a predictor names; 0: there is none */
    const struct moe_layer_work *ahead; /* [n_ahead] predicted, with the cost model's opinion */
};

struct moe_assignment { enum moe_where *where; int32_t *order; }; /* [n] each; order: position in its queue */

struct moe_queue {             /* requests that wait, for policies that form batches */
    int32_t n, max_tokens;
    const int32_t *request, *n_tokens; /* [n] */
    const struct moe_routes *path;     /* [L] routes of all that wait, request by request in the queue's order, known or
                                          predicted; NULL if neither */
};
struct moe_batch_plan {
    int32_t n_batches;         /* they run one after another */
    int32_t *batch;            /* [n of the queue] out: 0 to n_batches - 1, or -1: waits on */
};

/* Gradients of a balancer's loss with respect to the trainable gate's tensors, added to. */
struct moe_gate_grad { float *weight; /* [E][H] */ const float *gate; /* [E][H] */ };

/* ---- hooks. Required ones say so; an absent (NULL) hook costs nothing. ---- */

struct moe_router_ops {
    /* Optional: experts of a layer that cost nothing and follow the model's own. E' = E + n_free below. */
    int32_t (*n_free)(void *self, int32_t layer);
    /* Per layer and batch. Either route, or score and select, is required. With score and select the core lets
     * balancers see the scores in between. With all three it calls route where nobody asks for scores; that has to
     * choose as they do, equal scores apart. scores: [T][E'], out; own: may be left at zero. */
    int (*score)(void *self, const struct moe_batch *, float *scores, struct moe_cost *own);
    /* Picks experts on scale * score + add (never one whose add is -INFINITY: it does not exist); weights come from the
     * scores alone. The core has the last word on validity: ids unique per token and < E + n_free, weights finite. */
    int (*select)(void *self, const struct moe_batch *, const float *scores, const struct moe_bias *,
                  struct moe_routes *out);
    int (*route)(void *self, const struct moe_batch *, const struct moe_bias *, struct moe_routes *out,
                 struct moe_cost *own);
    /* Optional: routes of this and the n_layers - 1 layers after it, decided now (pre-gating). out: [n_layers] */
    int (*ahead)(void *self, const struct moe_batch *, int32_t n_layers, struct moe_routes *out);
};

struct moe_balancer_ops { /* at least one is required */
    /* own, here and below: what deciding costs, may be left at zero. */
    int (*adjust)(void *self, const struct moe_batch *, const float *scores, struct moe_bias *in_out,
                  struct moe_cost *own);
    /* After selection; may drop (shrink a token's list), reroute or fill. Routes stay token-major. */
    int (*rewrite)(void *self, const struct moe_batch *, const float *scores, const struct moe_placement *,
                   struct moe_routes *in_out, struct moe_cost *own);
    /* After placement. load: [E] tokens of this layer. */
    int (*plan)(void *self, int32_t layer, const int64_t *load, const struct moe_placement *, struct moe_plan *out,
                struct moe_cost *own);
    int (*observe)(void *self, int32_t layer, const int64_t *load); /* once per layer and step, after routing */
    /* For the trainable gate: adds to the loss and to d_logits [T][E']; d_gate is NULL unless tensors are trained. */
    int (*loss)(void *self, const struct moe_batch *, const float *scores, const struct moe_routes *, double *loss,
                float *d_logits, struct moe_gate_grad *d_gate);
};

struct moe_placement_ops {
    int (*place)(void *self, const struct moe_stats *, struct moe_placement *out); /* required */
    /* Which replica serves each route: replica[i] indexes placement->replica. NULL: the replica on the token's
     * device, else on its node, else in turn. The core checks that it holds the route's expert. */
    int (*select)(void *self, const struct moe_batch *, const struct moe_routes *, const struct moe_placement *,
                  int32_t *replica);
    int (*due)(void *self, const struct moe_stats *, bool *rebalance); /* NULL: never, after the first */
};

struct moe_dispatch_ops {
    int (*lay_out)(void *self, const struct moe_traffic *, struct moe_graph *); /* required, per layer */
    int (*observe)(void *self, const struct moe_timings *);                    /* once per step */
};

/* The core owns the table of residents. A policy with neither insert nor evict keeps every expert on its device; the
 * run is refused if they do not fit. Per access, so keep them small. */
struct moe_offload_ops {
    int (*hit)(void *self, int32_t device, uint32_t object, const struct moe_access *); /* NULL: hits change nothing */
    /* Required with evict; or MOE_BYPASS. */
    int (*insert)(void *self, int32_t device, uint32_t object, const struct moe_access *);
    /* Required with insert. O(1) or O(log n): a resident, unpinned object; called until there is room. The core removes
     * it: no remove() follows. Or MOE_BYPASS: `cause` is worth less than everything resident, so nothing leaves and
     * insert is not called. */
    int (*evict)(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *,
                 uint32_t *victim);
    int (*remove)(void *self, int32_t device, uint32_t object); /* dropped by the core for another reason */
    /* Once per layer: the gate scores of the batch (needs MOE_NEEDS_SCORES) and its routes. own: what a predictor
     * costs, may be left at zero. */
    int (*observe)(void *self, const struct moe_batch *, const float *scores, const struct moe_routes *,
                   struct moe_cost *own);
    /* Objects wanted early, most wanted first; *n holds the room on entry. */
    int (*prefetch)(void *self, int32_t device, const struct moe_window *, uint32_t *want, int32_t *n);
    int (*assign)(void *self, int32_t device, const struct moe_layer_work *, struct moe_assignment *);
    int (*form)(void *self, const struct moe_queue *, struct moe_batch_plan *);
    /* Before every load: bits per weight, scales included. NULL: the model's. */
    int (*precision)(void *self, int32_t device, uint32_t object, const struct moe_access *, double *bits);
};

struct moe_plugin {
    uint32_t abi, size; /* first for ever: MOE_ABI, sizeof(struct moe_plugin); compared before anything else */
    enum moe_kind kind;
    uint32_t needs;     /* enum moe_needs */
    const char *name;   /* equal to the file's stem */
    const char *summary;/* one line */
    const char *source; /* authors, year, arXiv id; or "field practice" */
    const struct moe_param *params; /* ends with MOE_PARAM_END; NULL: none */
    size_t conf_size, state_size;   /* state is zeroed before init */
    int (*init)(void *self, const void *conf, const struct moe_env *); /* conf stays valid for the run; NULL: none */
    void (*fini)(void *self);                                         /* NULL: nothing to do */
    union {
        struct moe_router_ops router;
        struct moe_balancer_ops balancer;
        struct moe_placement_ops placement;
        struct moe_dispatch_ops dispatch;
        struct moe_offload_ops offload;
    } ops;
};

/* The one symbol a plugin exports. */
extern MOE_EXPORT const struct moe_plugin moe_plugin;

/* ---- small things that many policies share ---- */

static inline int32_t moe_experts_of(const struct moe_model *m, int32_t layer)
{
    return m->layer_experts ? m->layer_experts[layer] : m->n_experts;
}

/* Stored bytes of one whole expert: gate, up and down projection. */
static inline double moe_expert_bytes(const struct moe_model *m)
{
    return 3.0 * m->d_model * m->d_expert * m->weight_bytes;
}

#if defined(__GNUC__)
/* Four at a time, in operations that round alike on every processor. */
typedef float moe_f4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t moe_i4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t moe_u4 __attribute__((vector_size(16), aligned(4), may_alias));

/* e^x of x <= 0 within 2e-7 of it; 0 below -87. */
static inline moe_f4 moe_exp4(moe_f4 x)
{
    const moe_f4 round = {0x1.8p23f, 0x1.8p23f, 0x1.8p23f, 0x1.8p23f}; /* adding it leaves an integer in the low bits */
    const moe_f4 n = x * 0x1.715476p0f + round, whole = n - round;
    const moe_f4 r = (x - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f; /* x - whole ln 2, |r| <= ln 2 / 2 */
    moe_f4 p = r * 0x1.6d4328p-10f + 0x1.120b74p-7f;
    p = p * r + 0x1.5554eap-5f;
    p = p * r + 0x1.5554dcp-3f;
    p = (p * r + 0.5f) * (r * r) + r + 1.0f;
    return (moe_f4)(((moe_u4)p + ((moe_u4)n << 23)) & (moe_u4)(x >= -87.0f)); /* below -87 the sum may wrap */
}

/* e^(x[i] - top) of x[0..n) into y; their sum. */
static inline float moe_exp_sum(const float *x, int32_t n, float top, float *y)
{
    moe_f4 sums = {0, 0, 0, 0};
    int32_t i = 0;
    for (; i + 4 <= n; i += 4)
        sums += *(moe_f4 *)(y + i) = moe_exp4(*(const moe_f4 *)(x + i) - top);
    if (i < n) {
        moe_f4 rest = {top - 100, top - 100, top - 100, top - 100};
        for (int32_t l = 0; i + l < n; l++)
            rest[l] = x[i + l];
        sums += rest = moe_exp4(rest - top);
        for (int32_t l = 0; i + l < n; l++)
            y[i + l] = rest[l];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
#else
static inline float moe_exp_sum(const float *x, int32_t n, float top, float *y)
{
    float sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += y[i] = expf(x[i] - top);
    return sum;
}
#endif

/* y[i] = 1 / (1 + e^-x[i]) of x[0..n); y may be x. */
static inline void moe_sigmoid(const float *x, int32_t n, float *y)
{
    int32_t i = 0;
#if defined(__GNUC__)
    for (; i < n; i += 4) {
        moe_f4 v = {0, 0, 0, 0};
        const int32_t few = n - i < 4 ? n - i : 4;
        if (few == 4)
            v = *(const moe_f4 *)(x + i);
        for (int32_t l = 0; few < 4 && l < few; l++)
            v[l] = x[i + l];
        const moe_i4 negative = v < 0, sign = {INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
        const moe_f4 part = moe_exp4((moe_f4)((moe_i4)v | sign));
        const moe_f4 one = {1, 1, 1, 1}, top = (moe_f4)(((moe_i4)part & negative) | ((moe_i4)one & ~negative));
        const moe_f4 s = top / (one + part);
        if (few == 4)
            *(moe_f4 *)(y + i) = s;
        for (int32_t l = 0; few < 4 && l < few; l++)
            y[i + l] = s[l];
    }
#endif
    for (; i < n; i++)
        y[i] = 1 / (1 + expf(-x[i]));
}

/* The largest of x[0..n), n > 0. */
static inline float moe_largest(const float *x, int32_t n)
{
    float top = x[0];
    int32_t i = 0;
#if defined(__SSE2__)
    if (n >= 16) {
        __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + 4), c = _mm_loadu_ps(x + 8), d = _mm_loadu_ps(x + 12);
        for (i = 16; i + 16 <= n; i += 16) {
            a = _mm_max_ps(a, _mm_loadu_ps(x + i));
            b = _mm_max_ps(b, _mm_loadu_ps(x + i + 4));
            c = _mm_max_ps(c, _mm_loadu_ps(x + i + 8));
            d = _mm_max_ps(d, _mm_loadu_ps(x + i + 12));
        }
        a = _mm_max_ps(_mm_max_ps(a, b), _mm_max_ps(c, d));
        a = _mm_max_ps(a, _mm_movehl_ps(a, a));
        top = _mm_cvtss_f32(_mm_max_ps(a, _mm_shuffle_ps(a, a, 1)));
    }
#endif
    for (; i < n; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

/* softmax of x[0..n) into y; safe for large values; y may be x. */
static inline void moe_softmax(const float *x, int32_t n, float *y)
{
    const float scale = 1 / moe_exp_sum(x, n, moe_largest(x, n), y);
    int32_t i = 0;
#if defined(__GNUC__)
    for (; i + 4 <= n; i += 4)
        *(moe_f4 *)(y + i) *= scale;
#endif
    for (; i < n; i++)
        y[i] *= scale;
}

/* As moe_top_k(), by insertion: O(n k) at worst, meant for k << n. */
static inline void moe_top_k_plain(const float *x, int32_t n, int32_t k, int32_t *index)
{
    int32_t have = 0;
    for (int32_t i = 0; i < n; i++) {
        if (have == k && !(x[i] > x[index[k - 1]]))
            continue;
        int32_t at = have < k ? have++ : k - 1;
        for (; at > 0 && x[i] > x[index[at - 1]]; at--)
            index[at] = index[at - 1];
        index[at] = i;
    }
}

#if defined(__SSE2__)
/* Bits of the 16 elements from x on that are at least `bound`. */
static inline uint64_t moe_reach16(const float *x, __m128 bound)
{
    const __m128i a = _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(x), bound));
    const __m128i b = _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(x + 4), bound));
    const __m128i c = _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(x + 8), bound));
    const __m128i d = _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(x + 12), bound));
    return (unsigned)_mm_movemask_epi8(_mm_packs_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d)));
}

/* How many of n values, 16 times a number, are larger. */
static inline int32_t moe_larger(const float *value, int32_t n, float than)
{
    const __m128 own = _mm_set1_ps(than);
    __m128i count = _mm_setzero_si128(); /* downwards */
    for (int32_t j = 0; j < n; j += 16) {
        const __m128i a = _mm_castps_si128(_mm_cmpgt_ps(_mm_loadu_ps(value + j), own));
        const __m128i b = _mm_castps_si128(_mm_cmpgt_ps(_mm_loadu_ps(value + j + 4), own));
        const __m128i c = _mm_castps_si128(_mm_cmpgt_ps(_mm_loadu_ps(value + j + 8), own));
        const __m128i d = _mm_castps_si128(_mm_cmpgt_ps(_mm_loadu_ps(value + j + 12), own));
        count = _mm_add_epi32(count, _mm_add_epi32(_mm_add_epi32(a, b), _mm_add_epi32(c, d)));
    }
    count = _mm_add_epi32(count, _mm_shuffle_epi32(count, 0x4e));
    return -_mm_cvtsi128_si32(_mm_add_epi32(count, _mm_shuffle_epi32(count, 0xb1)));
}

/* As moe_top_k(), with few branches. The least of 8 (or 16) running maxima is a bound that as many elements reach; those that
 * do, some 22 (54) of them, are then ranked against each other. n >= 64, k <= 16; false: too
 * many reach it, or equals are among the first k. */
static inline bool moe_top_k_fast(const float *x, int32_t n, int32_t k, int32_t *index)
{
    enum { FEW = 32, ROOM = 128 };
    __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + 4), c = _mm_loadu_ps(x + 8), d = _mm_loadu_ps(x + 12);
    float value[ROOM];
    int32_t id[ROOM], at[ROOM], n_ids = 0, i = 16;
    for (; i + 16 <= n; i += 16) {
        a = _mm_max_ps(a, _mm_loadu_ps(x + i));
        b = _mm_max_ps(b, _mm_loadu_ps(x + i + 4));
        c = _mm_max_ps(c, _mm_loadu_ps(x + i + 8));
        d = _mm_max_ps(d, _mm_loadu_ps(x + i + 12));
    }
    a = k <= 8 ? _mm_min_ps(_mm_max_ps(a, b), _mm_max_ps(c, d)) : _mm_min_ps(_mm_min_ps(a, b), _mm_min_ps(c, d));
    a = _mm_min_ps(a, _mm_movehl_ps(a, a));
    a = _mm_min_ps(a, _mm_shuffle_ps(a, a, 1));
    const __m128 bound = _mm_shuffle_ps(a, a, 0);
    for (i = 0; i < n; i += 64) {
        uint64_t reach = 0;
        if (i + 64 <= n)
            reach = moe_reach16(x + i, bound) | moe_reach16(x + i + 16, bound) << 16 |
                    moe_reach16(x + i + 32, bound) << 32 | moe_reach16(x + i + 48, bound) << 48;
        for (int32_t j = i; i + 64 > n && j < n; j++)
            reach |= (uint64_t)(x[j] >= _mm_cvtss_f32(bound)) << (j - i);
        if (n_ids > ROOM - 64)
            return false;
        for (; reach != 0; reach &= reach - 1)
            id[n_ids++] = i + __builtin_ctzll(reach);
    }
    for (i = 0; i < n_ids; i++)
        value[i] = x[id[i]];
    for (; i < FEW || i % 16 != 0; i++)
        value[i] = -INFINITY;
    for (i = 0; i < k; i++)
        at[i] = -1;
    for (i = n_ids - 1; i >= 0; i--) /* of equals, which have one rank, the first stays */
        at[n_ids <= FEW ? moe_larger(value, FEW, value[i]) : moe_larger(value, (n_ids + 15) & ~15, value[i])] = id[i];
    int32_t least = 0;
    for (i = 0; i < k; i++) {
        index[i] = at[i];
        least = at[i] < least ? at[i] : least;
    }
    return least == 0;
}
#endif

/* Indices of the k largest of x[0..n), none NaN; largest first, ties to the lower index. */
static inline void moe_top_k(const float *x, int32_t n, int32_t k, int32_t *index)
{
#if defined(__SSE2__)
    if (n >= 64 && k <= 16 && moe_top_k_fast(x, n, k, index))
        return;
#endif
    moe_top_k_plain(x, n, k, index);
}

/* As moe_kth_largest(), by quickselect. */
static inline float moe_kth_plain(float *x, int64_t n, int64_t k)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const float a = x[low], b = x[low + (high - low) / 2], c = x[high];
        const float pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        int64_t i = low, j = high;
        while (i <= j) { /* larger ones to the front */
            while (x[i] > pivot)
                i++;
            while (x[j] < pivot)
                j--;
            if (i <= j) {
                const float swap = x[i];
                x[i++] = x[j];
                x[j--] = swap;
            }
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            break;
    }
    return x[k - 1];
}

/* The k-th largest of x[0..n), 1 <= k <= n, none NaN; x is put in another order. O(n) expected. Of a long list first
 * without a branch per element: counts in bins between the least and the largest, then those of one bin. */
static inline float moe_kth_largest(float *x, int64_t n, int64_t k)
{
    enum { LONG = 512, BINS = 1024 };
    int32_t count[BINS + 1];
    int64_t above = 0, m = 0;
    float low = x[0], high = x[0];
    for (int64_t i = 1; n > LONG && i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    const float width = high - low, scale = BINS / width;
    if (!(width > 0) || !(width < INFINITY) || !(scale < INFINITY)) /* short, all equal, or not all finite */
        return moe_kth_plain(x, n, k);
    for (int32_t b = 0; b <= BINS; b++)
        count[b] = 0;
    for (int64_t i = 0; i < n; i++)
        count[(int32_t)((x[i] - low) * scale)]++;
    int32_t bin = BINS;
    for (; above + count[bin] < k; bin--)
        above += count[bin];
    for (int64_t i = 0; i < n; i++) { /* those of the bin to the front */
        const float own = x[i];
        x[m] = own;
        m += (int32_t)((own - low) * scale) == bin;
    }
    return moe_kth_plain(x, m, k - above);
}

#ifdef __cplusplus
}
#endif
#endif
