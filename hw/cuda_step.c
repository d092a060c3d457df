/* SPDX-License-Identifier: Apache-2.0
 * cuda_step.c - runs a plan: queues everything, waits once, reads the clocks.
 *
 * Each operation lies between two events, whose times are those of its task; the second is what others wait for. All
 * streams begin behind one event, which is the step's start. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_kernels.h"
#include "cuda_rank.h"
#include "host_model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef HAVE_NVTX3_NVTOOLSEXT_H /* what profilers show a task as; costs next to nothing when there is none */
#include <nvtx3/nvToolsExt.h>
#else
static inline int nvtxRangePushA(const char *name) { (void)name; return 0; }
static inline int nvtxRangePop(void) { return 0; }
#endif

/* ---- before ---- */

static int place_inputs(struct cuda *c, struct cuda_rank *r, struct err *e)
{
    const size_t d = (size_t)c->model->d_model, n = (size_t)r->n_own;
    float *row = malloc(d * sizeof *row);
    char *made = malloc(n * row_bytes(c) + 1);
    if (!row || !made)
        err_set(e, ERR_MEMORY, "rank %d: out of memory for %zu inputs", r->rank, n);
    for (size_t i = 0; i < n && !e->code; i++) {
        host_input(c->model, c->draw, r->own[i], row);
        cuda_from_floats(c, d, row, made + i * row_bytes(c));
    }
    if (n > 0)
        CUDA_TRY(e, r->rank, cudaMemcpy(r->rows.at, made, n * row_bytes(c), cudaMemcpyHostToDevice));
    free(row);
    free(made);
    return e->code;
}

static int begin(struct cuda *c, struct err *e)
{
    for (int32_t i = 0; i < c->n_here && !e->code; i++) {
        struct cuda_rank *r = &c->rank[i];
        if (r->n_rows > 0) /* not numbers: nothing is left of the last time */
            CUDA_TRY(e, r->rank, cudaMemset(r->rows.at, 0xff, (size_t)r->n_rows * row_bytes(c)));
        if (r->send_rows > 0)
            CUDA_TRY(e, r->rank, cudaMemset(r->send.at, 0xff, r->send_rows * row_bytes(c)));
        place_inputs(c, r, e);
        cuda_store_rewind(c, r, e);
    }
    return CUDA_TRY(e, c->rank[0].rank, cudaDeviceSynchronize());
}

/* An event with a time. In a graph only those that are called external have one, and none waits for them; `done` is for
 * that, NULL where it is not captured. */
static int mark(struct cuda *c, cudaEvent_t timed, cudaEvent_t done, cudaStream_t s, int32_t rank, struct err *e)
{
    if (!c->graphs.capturing)
        return CUDA_TRY(e, rank, cudaEventRecord(timed, s));
    CUDA_TRY(e, rank, cudaEventRecordWithFlags(timed, s, cudaEventRecordExternal));
    return done ? CUDA_TRY(e, rank, cudaEventRecord(done, s)) : e->code;
}

/* Every stream that this plan uses waits for the start, which ranks in other processes come to together. */
static int start(struct cuda *c, struct err *e)
{
    struct cuda_stream *first = NULL;
    cudaEvent_t first_done = c->graphs.capturing ? c->graphs.done[c->graphs.n_done - 1] : NULL;
    for (int32_t s = 0; s < c->n_here * RANK_STREAMS && !e->code; s++) {
        const int32_t rank = c->rank[s / RANK_STREAMS].rank;
        if (!c->stream[s].stream)
            continue;
        if (!first) {
            first = &c->stream[s];
            c->comm->ops->barrier(c->comm, first->stream, e);
            mark(c, c->zero, first_done, first->stream, rank, e);
        } else {
            CUDA_TRY(e, rank, cudaStreamWaitEvent(c->stream[s].stream, first_done ? first_done : c->zero, 0));
        }
    }
    return e->code;
}

/* ---- one task ---- */

static int run_act(struct cuda *c, const struct moe_graph *g, const struct cuda_op *op, const struct cuda_act *a,
                   struct err *e)
{
    struct cuda_rank *r = &c->rank[op->rank];
    struct cuda_stream *s = &c->stream[op->stream];
    const int32_t *index = (const int32_t *)c->index.at + a->index;
    switch (a->what) {
    case CUDA_PACK:
        return CUDA_TRY(e, r->rank, cuda_gather(s->stream, row_bytes(c), a->n, index, r->rows.at,
                                                (char *)r->send.at + (size_t)a->row * row_bytes(c)));
    case CUDA_EXPERTS:
        return cuda_experts_run(c, r, s, g, g->task[op->task].layer, a, e);
    case CUDA_COMBINE: {
        const int32_t *first = index + a->n, *row = first + a->n + 1, *weight = row + a->entry;
        const struct cuda_combine lists = { index, first, row, (const float *)(const void *)weight };
        return CUDA_TRY(e, r->rank, cuda_combine(s->stream, c->half, c->model->d_model, a->n, lists, r->rows.at,
                                                 (char *)r->rows.at + (size_t)a->row * row_bytes(c)));
    }
    case CUDA_LOAD: {
        const struct cuda_load *l = &r->load[a->entry];
        return CUDA_TRY(e, r->rank, cudaMemcpyAsync(r->slot[l->slot].weights, c->pinned[l->object],
                                                    cuda_expert_bytes(c, l->object), cudaMemcpyHostToDevice,
                                                    s->stream));
    }
    case CUDA_CHOOSE:
        return cuda_choose(c, r, s, a->entry, e);
    case CUDA_KERNEL:
        return cuda_run_kernel(c, r, s, &g->kernel[a->entry], a->index, e);
    case CUDA_PLAIN:
        return cuda_run_plain(c, r, s, c->plan.plain[a->entry].flops, c->plan.plain[a->entry].bytes, e);
    }
    return e->code;
}

static int begin_op(struct cuda *c, const struct moe_graph *g, int32_t id, struct err *e)
{
    const struct cuda_op *op = &c->plan.op[id];
    const int32_t rank = c->rank[op->rank].rank;
    cudaStream_t s = c->stream[op->stream].stream;
    for (int32_t i = op->first_wait; i < op->first_wait + op->n_waits; i++)
        CUDA_TRY(e, rank, cudaStreamWaitEvent(s, c->graphs.capturing ? c->graphs.done[c->plan.wait[i]]
                                                                      : c->event[2 * c->plan.wait[i] + 1], 0));
    mark(c, c->event[2 * id], NULL, s, rank, e);
    for (int32_t i = op->first_act; i < op->first_act + op->n_acts && !e->code; i++)
        run_act(c, g, op, &c->plan.act[i], e);
    return e->code;
}

static int end_op(struct cuda *c, int32_t id, struct err *e)
{
    const struct cuda_op *op = &c->plan.op[id];
    return mark(c, c->event[2 * id + 1], c->graphs.capturing ? c->graphs.done[id] : NULL, c->stream[op->stream].stream,
                c->rank[op->rank].rank, e);
}

/* One group for what all ranks here send and receive in one round. False: there is none of this round. */
static bool exchange(struct cuda *c, int32_t first, int32_t round, bool rows, struct err *e)
{
    const struct cuda_comm_ops *ops = c->comm->ops;
    bool any = false;
    for (int32_t i = 0; i < c->n_here && !e->code; i++) {
        const struct cuda_op *op = &c->plan.op[first + i];
        struct cuda_rank *r = &c->rank[i];
        cudaStream_t s = c->stream[op->stream].stream;
        for (int32_t j = op->first_transfer; j < op->first_transfer + op->n_transfers && !e->code; j++) {
            const struct cuda_transfer *x = &c->plan.transfer[j];
            if (x->round != round)
                continue;
            if (!any)
                ops->group_begin(c->comm, e);
            any = true;
            char *from = rows ? r->send.at : r->operands.at, *to = rows ? r->rows.at : r->results.at;
            if (x->sends)
                ops->send(c->comm, r->rank, from + x->at, x->bytes, x->peer, s, e);
            else
                ops->recv(c->comm, r->rank, to + x->at, x->bytes, x->peer, s, e);
        }
    }
    if (any)
        ops->group_end(c->comm, e);
    return any;
}

static int run_task(struct cuda *c, const struct moe_graph *g, int32_t id, struct err *e)
{
    const int32_t op = c->plan.task_op[id];
    if (op < 0)
        return e->code;
    const bool exchanges = g->task[id].kind == TASK_EXCHANGE;
    const int32_t n = exchanges ? c->n_here : 1;
    char name[64];
    snprintf(name, sizeof name, "layer %d %s", g->task[id].layer, task_phase(&g->task[id]));
    nvtxRangePushA(name);
    for (int32_t i = 0; i < n && !e->code; i++)
        begin_op(c, g, op + i, e);
    for (int32_t round = 0; exchanges && !e->code; round++)
        if (!exchange(c, op, round, g->task[id].payload != MOE_PAY_BYTES, e))
            break;
    for (int32_t i = 0; i < n && !e->code; i++)
        end_op(c, op + i, e);
    nvtxRangePop();
    return e->code;
}

/* ---- after ---- */

static double since_start(const struct cuda *c, int64_t event, struct err *e)
{
    float ms = 0;
    CUDA_TRY(e, c->rank[0].rank, cudaEventElapsedTime(&ms, c->zero, c->event[event]));
    return (double)ms * 1e-3;
}

/* What is here; of an exchange, and of what arrives by it, as far as it is here. -infinity: nothing is. */
static int read_times(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    for (int32_t id = 0; id < g->n_tasks && !e->code; id++) {
        const struct task *t = &g->task[id];
        double *time = &c->time[2 * id];
        const int32_t op = c->plan.task_op[id], n = t->kind == TASK_EXCHANGE ? c->n_here : 1;
        const int32_t place = t->kind == TASK_ARRIVAL ? t->device - c->rank[0].rank : -1;
        time[0] = time[1] = -INFINITY;
        for (int32_t i = 0; op >= 0 && i < n; i++) {
            time[0] = fmax(time[0], since_start(c, 2 * (int64_t)(op + i), e));
            time[1] = fmax(time[1], since_start(c, 2 * (int64_t)(op + i) + 1, e));
        }
        if (place >= 0 && place < c->n_here) /* when the device's own part of the exchange ends */
            time[1] = since_start(c, 2 * ((int64_t)c->plan.task_op[t->exchange] + place) + 1, e);
    }
    return e->code;
}

/* Of all processes the latest: an exchange begins when the last rank has come to it and ends when the last leaves. */
static int share_times(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    const size_t n = 2 * (size_t)g->n_tasks;
    double *all = c->team ? malloc(sizeof *all * n * (size_t)c->team->size + 1) : NULL;
    if (c->team && !all)
        err_set(e, ERR_MEMORY, "rank %d: out of memory for the times of %d tasks", c->team->rank, g->n_tasks);
    if (c->team && team_agree(c->team, e) == 0 && c->team->ops->gather(c->team, c->time, sizeof *all * n, all, e) == 0)
        for (size_t i = 0; i < n * (size_t)c->team->size; i++)
            c->time[i % n] = fmax(c->time[i % n], all[i]);
    free(all);
    return e->code;
}

int cuda_queue_plan(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    const struct cuda_plan *p = &c->plan;
    start(c, e);
    for (int32_t i = 0; i < g->n_tasks && !e->code; i++)
        run_task(c, g, p->sequence[i], e);
    for (int64_t i = p->n_op - c->n_here; i < p->n_op && !e->code; i++) { /* after the step's last task */
        begin_op(c, g, (int32_t)i, e);
        end_op(c, (int32_t)i, e);
    }
    return e->code;
}

static int run_plan(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    const double began = cuda_now();
    cuda_queue_plan(c, g, e);
    c->queue_s = cuda_now() - began;
    for (int32_t s = 0; s < c->n_here * RANK_STREAMS && !e->code; s++)
        if (c->stream[s].stream)
            c->comm->ops->wait(c->comm, c->stream[s].stream, e);
    return e->code;
}

/* captured: as a graph. */
int cuda_step(struct cuda *c, const struct moe_graph *g, bool captured, struct err *e)
{
    begin(c, e);
    if (team_agree(c->team, e) < 0)
        return e->code;
    if ((captured ? cuda_graph_run : run_plan)(c, g, e) < 0) {
        if (c->team) /* others wait for what never comes */
            c->team->lost = true;
        return e->code;
    }
    read_times(c, g, e);
    return share_times(c, g, e);
}
