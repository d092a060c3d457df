/* SPDX-License-Identifier: Apache-2.0
 * cuda_rank.h - the state of machine cuda within its module.
 *
 * Before a step's clock starts, its graph becomes a plan (cuda_plan.c): which rows each task reads and writes, and what
 * each waits for. All row numbers are uploaded then; running a step (cuda_step.c) only queues calls on streams. A row
 * is written once in a step, so nothing overwrites what another stream still reads; buffers that are used again (what
 * waits to be sent, experts' hidden layers, slots of offloaded experts) belong to one stream or are waited for. */
#ifndef CUDA_RANK_H
#define CUDA_RANK_H

#include "cuda_check.h"
#include "cuda_comm.h"
#include "cuda_graph.h"
#include "cuda_pad.h"
#include "cuda_products.h"
#include "err.h"
#include "graph.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <time.h>

/* A rank's streams: those of the graph, one for exchanges. */
enum { COMM_STREAM = N_STREAMS, RANK_STREAMS };

struct cuda_stream {
    cudaStream_t stream;            /* NULL: no task has been on it */
    cublasHandle_t blas;            /* its own: handles have a workspace; NULL likewise */
    struct cuda_buffer gathered, gate, up; /* of all experts of the task that computes */
    struct cuda_buffer hidden, row_scale, hidden_scale, workspace; /* in fp8 */
    int64_t kept;                   /* rows of hidden layers that are not written again in this step */
};

enum cuda_what {
    CUDA_PACK,    /* n rows, listed from `index`, to row `row` of the send buffer */
    CUDA_EXPERTS, /* n rows, listed from `index`, through the plan's task of experts `entry`, to rows from `row` */
    CUDA_COMBINE, /* n tokens to rows from `row`; lists from `index`: before[n], first[n + 1], row[m], weight[m] */
    CUDA_LOAD,    /* load `entry` of this rank */
    CUDA_CHOOSE,  /* the experts of own tokens in layer `entry` */
    CUDA_KERNEL,  /* kernel `entry` of the graph; its products are call `index` */
    CUDA_PLAIN    /* FLOPs or bytes, the plan's `entry` */
};
struct cuda_act { enum cuda_what what; int32_t n, entry; int64_t index, row; };

/* One expert's n rows: of those of its task from `first`, in the lists as in the rows that are written. Each expert's
 * begin where products may (cuda_row_step()); rows before them mean nothing, nor do those from `real` on (padding).
 * entry: in the graph's experts; item: its first among those of its task. */
struct cuda_expert { int32_t entry, n, first, real; int64_t item; };
/* Experts of a task that have rows: those of the plan from `first`; gate and up are one call, down is the next. kept:
 * in fp8, rows in front of its hidden layers on its stream. */
struct cuda_experts { int32_t first, n, call; int64_t kept; };

/* Bytes of rows, or of weights that move, which mean nothing. */
struct cuda_transfer { int32_t peer, round; bool sends; int64_t at; size_t bytes; };

/* One task, as far as it is one rank's. */
struct cuda_op {
    int32_t task, rank, stream; /* task -1: after the step; stream: rank's place here * RANK_STREAMS + its number */
    int32_t first_act, n_acts, first_wait, n_waits, first_transfer, n_transfers;
};

struct cuda_plan {
    struct graph_order order;
    int32_t *sequence;
    int32_t *task_op;     /* [tasks] first operation, or -1; of exchanges one for each rank here, in order */
    int32_t *task_join;   /* [tasks] a join's place in `join`, or -1 */
    int32_t *join;        /* [joins][streams] the last operation on each stream that it waits for, or -1 */
    struct cuda_op *op;
    struct cuda_act *act;
    struct cuda_experts *experts;
    struct cuda_expert *expert;
    struct cuda_transfer *transfer;
    struct cuda_plain { double flops, bytes; } *plain;
    int32_t *wait;        /* operations */
    int32_t *index;       /* rows, and weights as their bits */
    int64_t n_op, room_op, n_act, room_act, n_transfer, room_transfer, n_wait, room_wait, n_index, room_index;
    int64_t n_experts, room_experts, n_expert, room_expert, n_plain, room_plain;
    int32_t n_joins;
    /* While it is made: */
    int32_t *need;        /* [streams] */
    int32_t *waited;      /* [streams][streams] the last operation of the second that the first has waited for */
    int32_t *pred;        /* by task */
    int64_t *pred_first;
    bool *packed;         /* [ranks here][tasks] */
    int32_t *experts_left;/* [ranks here][tasks] of joins, tasks of experts that are not done */
};

struct cuda_slot { void *weights; int64_t planned, passing, at_start; };
struct cuda_load { int32_t slot; int64_t object; };

struct cuda_rank {
    int32_t rank;
    int64_t n_rows, room_rows;     /* planned; row_op's room */
    int32_t *row_op;               /* by row, what writes it; -1: an input */
    int64_t *token_row, *route_row;/* as in host_rank.h */
    int32_t *place, *own, n_own;   /* likewise */
    struct cuda_buffer rows, send, operands, results, scores, chosen;
    size_t send_rows;              /* most that wait at one time */
    size_t *send_at;               /* [tasks] */
    struct cuda_sent { int32_t op; size_t from, to; } *sent; /* exchanges so far */
    int64_t n_sent, room_sent;
    size_t operand_bytes, result_bytes;
    size_t at_operands;
    void **weights;                /* [L * E] on the device, of what is not offloaded */
    const void **expert_weights;   /* [experts of all tasks] */
    /* Offloaded experts. */
    struct cuda_slot *slot;
    int32_t n_slots;
    int32_t *slot_of;              /* [L * E] or -1; NULL: nothing was ever loaded */
    int32_t (*slot_ops)[RANK_STREAMS]; /* [slots] what used it last, by stream */
    struct cuda_load *load;
    int32_t *load_of, n_loads;     /* [tasks] */
};

struct cuda {
    const struct moe_model *model;
    int32_t n_ranks, n_here;       /* of all processes, in this one */
    bool half;                     /* bf16: rows, and what products give */
    bool fp8;                      /* products of experts, and those that simulated machines have in fp8 */
    bool keeps;                    /* hidden layers of all tasks, in fp8, to be verified */
    size_t element;                /* bytes */
    int64_t decided;               /* choices of the GPU that were the host's decisions, with verify, so far */
    int32_t draw;                  /* of inputs, so far */
    struct team *team;             /* NULL: all ranks are here */
    struct cuda_comm *comm;        /* NULL: no step has run */
    struct cuda_rank *rank;        /* [n_here] */
    struct cuda_stream *stream;    /* [n_here * RANK_STREAMS] */
    struct cuda_plan plan;
    void **pinned;                 /* [L * E] offloaded experts in the host's memory */
    int64_t *route_of;             /* [L * (T + 1)] */
    struct cuda_buffer index;      /* plan.index on the device */
    struct cuda_products products; /* of the plan */
    size_t ring;                   /* bytes of operands, if no kernel needs more */
    cudaEvent_t *event, zero;      /* [2 * operations] */
    int64_t n_events;
    double *time;                  /* [tasks][2] */
    double queue_s;                /* that queueing the last step took, on the host's clock */
    struct cuda_pad pad;
    struct cuda_graphs graphs;
};

/* cuda_gpu.c: this process's GPU becomes the current one, and can compute what is asked of it. Ranks in several
 * processes all call this. */
int cuda_take_gpu(struct cuda *, struct err *);
/* cuda_prepare.c: checks the graph, makes its plan, and room for all that it touches. */
int cuda_prepare(struct cuda *, const struct moe_graph *, struct err *);
/* cuda_plan.c */
int cuda_plan(struct cuda *, const struct moe_graph *, struct err *);
void cuda_plan_free(struct cuda_plan *);
/* cuda_rows.c: what a task reads and writes. */
/* Where in the send buffer exchanges put their rows when those are padded: each where no other does. */
int cuda_plan_sends(struct cuda *, const struct moe_graph *, struct cuda_rank *, struct err *);
int cuda_plan_task(struct cuda *, const struct moe_graph *, struct cuda_rank *, int32_t id, int32_t op, struct err *);
int cuda_plan_end(struct cuda *, const struct moe_graph *, struct cuda_rank *, int32_t op, struct err *);
/* cuda_pad.c: places of a task's experts when those are padded. */
int cuda_pad_experts(struct cuda *, const struct moe_graph *, int32_t rank, int32_t task, struct cuda_experts *,
                     struct err *);
/* cuda_store.c: where weights are. */
int cuda_store_prepare(struct cuda *, struct cuda_rank *, const struct moe_graph *, bool offloads, struct err *);
int cuda_store_rewind(struct cuda *, struct cuda_rank *, struct err *);
size_t cuda_expert_bytes(const struct cuda *, int64_t object);
/* One of an expert's three matrices, which lie behind each other: W1, W3, W2. In fp8 column by column, with a scale
 * each behind them, of 4 bytes. */
size_t cuda_matrix_bytes(const struct cuda *, int32_t width);
/* Queues the whole plan, between the start that all streams wait for and what runs after the step's last task. */
int cuda_queue_plan(struct cuda *, const struct moe_graph *, struct err *);
/* cuda_step.c: the plan once, with poisoned rows and new inputs; then c->time holds each task's. */
int cuda_step(struct cuda *, const struct moe_graph *, bool captured, struct err *);
/* cuda_experts.c: before the step, room on a task's stream, and its products among those of the plan; then all. */
int cuda_experts_room(struct cuda *, struct cuda_rank *, struct cuda_stream *, const struct moe_graph *, int32_t layer,
                      const struct cuda_act *, struct err *);
int cuda_experts_list(struct cuda *, struct cuda_rank *, const struct cuda_stream *, const struct moe_graph *,
                      int32_t layer, const struct cuda_act *, struct err *);
int cuda_experts_run(struct cuda *, struct cuda_rank *, struct cuda_stream *, const struct moe_graph *, int32_t layer,
                     const struct cuda_act *, struct err *);
/* cuda_operands.c: kernels of other tasks. Their products are listed before the step; *call: which. */
const char *cuda_operand(struct cuda_rank *, size_t bytes);
void cuda_kernel_room(const struct cuda *, const struct kernel *, size_t *in, size_t *out);
int cuda_kernel_list(struct cuda *, struct cuda_rank *, const struct kernel *, int64_t *call, struct err *);
int cuda_run_kernel(struct cuda *, struct cuda_rank *, struct cuda_stream *, const struct kernel *, int64_t call,
                    struct err *);
/* cuda_math.c */
int cuda_run_plain(struct cuda *, struct cuda_rank *, struct cuda_stream *, double flops, double bytes, struct err *);
/* Bytes that the tasks of a device want at a time of numbers to read, and room to write. */
void cuda_math_room(const struct cuda *, const struct moe_graph *, int32_t device, size_t *in, size_t *out);

/* cuda_choose.c: top-k of the scores that decisions were made from, if the graph has them; scores are uploaded before
 * the step. verify: adds to *decided the (layer, token) whose experts are those of the decision. */
bool cuda_chooses(const struct cuda *, const struct moe_graph *);
int cuda_choose_prepare(struct cuda *, struct cuda_rank *, const struct moe_graph *, struct err *);
int cuda_choose(struct cuda *, struct cuda_rank *, struct cuda_stream *, int32_t layer, struct err *);
int cuda_choose_verify(const struct cuda *, const struct cuda_rank *, const struct moe_graph *, int64_t *decided,
                       struct err *);
int cuda_top_k_check(int32_t rank, struct err *);

/* cuda_verify.c: every layer of every token against the reference. */
int cuda_verify(struct machine *, struct cuda *, const struct moe_graph *, struct err *);
/* cuda_verify_fp8.c: what a rank's experts computed. */
int cuda_verify_fp8(const struct cuda *, const struct cuda_rank *, const struct moe_graph *, struct err *);
void cuda_from_floats(const struct cuda *, size_t n, const float *from, void *to);
void cuda_to_floats(const struct cuda *, size_t n, const void *from, float *to);

/* s, on the host's clock. */
static inline double cuda_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline size_t row_bytes(const struct cuda *c)
{
    return c->element * (size_t)c->model->d_model;
}

/* Rows of an expert begin at multiples of this: products read 16 bytes at a time. */
static inline int64_t cuda_row_step(const struct cuda *c)
{
    int64_t step = 1;
    while (step * (int64_t)row_bytes(c) % CUDA_ALIGNED != 0)
        step *= 2;
    return step;
}

static inline int64_t *token_row(const struct cuda_rank *r, const struct moe_graph *g, int32_t layer, int32_t token)
{
    return &r->token_row[(size_t)layer * (size_t)g->n_tokens + (size_t)token];
}

static inline int64_t route_of(const struct cuda *c, const struct moe_graph *g, int32_t layer, int32_t token)
{
    return c->route_of[(size_t)layer * ((size_t)g->n_tokens + 1) + (size_t)token];
}

#endif
