/* SPDX-License-Identifier: Apache-2.0
 * cuda_prepare.c - what happens before a step's clock starts: checks, weights, the plan, room on the device. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_rank.h"
#include "host_need.h"
#include "items_check.h"

#include <stdlib.h>
#include <string.h>

enum { BLAS_WORKSPACE = 32 << 20 }; /* bytes: what cuBLAS recommends for Hopper, and more than for others */

static void *again(void *old, size_t n, size_t size, struct err *e)
{
    free(old);
    void *p = malloc((n + 1) * size);
    if (!p)
        err_set(e, ERR_MEMORY, "out of memory for %zu entries", n);
    return p;
}

static int make_rank_tables(struct cuda_rank *r, const struct moe_graph *g, struct err *e)
{
    const size_t n_tokens = (size_t)g->n_tokens, n_layers = (size_t)g->n_route_layers;
    const size_t n_states = (n_layers + 1) * n_tokens, n_routes = (size_t)g->route_first[n_layers];
    r->token_row = again(r->token_row, n_states, sizeof *r->token_row, e);
    r->route_row = again(r->route_row, n_routes, sizeof *r->route_row, e);
    r->place = again(r->place, 2 * n_tokens, sizeof *r->place, e);
    r->send_at = again(r->send_at, (size_t)g->n_tasks, sizeof *r->send_at, e);
    r->expert_weights = again(r->expert_weights, (size_t)g->n_experts, sizeof *r->expert_weights, e);
    if (e->code)
        return e->code;
    memset(r->token_row, 0xff, n_states * sizeof *r->token_row);
    memset(r->route_row, 0xff, n_routes * sizeof *r->route_row);
    r->own = r->place + n_tokens;
    r->n_own = 0;
    r->n_sent = 0;
    r->n_rows = 0;
    for (int32_t t = 0; t < g->n_tokens; t++) {
        r->place[t] = g->token_device[t] == r->rank ? r->n_own : -1;
        if (r->place[t] >= 0)
            r->own[r->n_own++] = t;
    }
    if (!cuda_grow(&r->row_op, &r->room_rows, r->n_own, sizeof *r->row_op, e))
        return e->code;
    for (int32_t i = 0; i < r->n_own; i++) { /* inputs are the first rows */
        r->row_op[i] = -1;
        *token_row(r, g, 0, r->own[i]) = i;
    }
    r->n_rows = r->n_own;
    return 0;
}

static int make_tables(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    const size_t n_tokens = (size_t)g->n_tokens, n_layers = (size_t)g->n_route_layers;
    c->route_of = again(c->route_of, n_layers * (n_tokens + 1), sizeof *c->route_of, e);
    c->time = again(c->time, 2 * (size_t)g->n_tasks, sizeof *c->time, e);
    for (size_t l = 0; l < n_layers && !e->code; l++) {
        int64_t r = g->route_first[l];
        for (size_t t = 0; t <= n_tokens; t++) {
            while (r < g->route_first[l + 1] && g->route[r].token < (int32_t)t)
                r++;
            c->route_of[l * (n_tokens + 1) + t] = r;
        }
    }
    for (int32_t i = 0; i < c->n_here && !e->code; i++)
        make_rank_tables(&c->rank[i], g, e);
    return e->code;
}

/* ---- the device ---- */

/* captured: cuBLAS gets its workspace from us, since what it takes by itself would belong to the graph. */
static int open_stream(struct cuda_stream *s, int32_t rank, bool computes, bool captured, struct err *e)
{
    if (!s->stream)
        CUDA_TRY(e, rank, cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    if (computes && !s->blas) {
        BLAS_TRY(e, rank, cublasCreate(&s->blas));
        BLAS_TRY(e, rank, cublasSetStream(s->blas, s->stream));
        if (captured && cuda_take_more(&s->workspace.at, &s->workspace.room, BLAS_WORKSPACE, rank, "cuBLAS", e) == 0)
            BLAS_TRY(e, rank, cublasSetWorkspace(s->blas, s->workspace.at, s->workspace.room));
    }
    return e->code;
}

/* Streams, and on each what its experts need. */
static int open_streams(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    const struct cuda_plan *p = &c->plan;
    for (int32_t i = 0; i < c->n_here * RANK_STREAMS; i++)
        c->stream[i].kept = 0;
    for (int64_t i = 0; i < p->n_op && !e->code; i++) {
        const struct cuda_op *op = &p->op[i];
        const int32_t rank = c->rank[op->rank].rank;
        struct cuda_stream *s = &c->stream[op->stream];
        const struct task *t = op->task < 0 ? NULL : &g->task[op->task];
        const bool computes = t && (t->kind == TASK_EXPERTS || t->kind == TASK_COMPUTE);
        open_stream(s, rank, computes, c->pad.on, e);
        if (computes && c->fp8)
            cuda_take_more(&s->workspace.at, &s->workspace.room, CUDA_FP8_WORKSPACE, rank, "cuBLASLt", e);
        for (int32_t j = op->first_act; t && j < op->first_act + op->n_acts && !e->code; j++) {
            const struct cuda_act *a = &p->act[j];
            if (a->what == CUDA_EXPERTS)
                cuda_experts_room(c, &c->rank[op->rank], s, g, t->layer, a, e);
        }
    }
    return e->code;
}

/* Once all buffers are where they stay. */
static int list_products(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    cuda_products_clear(&c->products);
    for (int64_t i = 0; i < c->plan.n_op && !e->code; i++) {
        const struct cuda_op *op = &c->plan.op[i];
        struct cuda_rank *r = &c->rank[op->rank];
        for (int32_t j = op->first_act; j < op->first_act + op->n_acts && !e->code; j++) {
            struct cuda_act *a = &c->plan.act[j];
            if (a->what == CUDA_EXPERTS)
                cuda_experts_list(c, r, &c->stream[op->stream], g, g->task[op->task].layer, a, e);
            if (a->what == CUDA_KERNEL)
                cuda_kernel_list(c, r, &g->kernel[a->entry], &a->index, e);
        }
    }
    return cuda_products_upload(&c->products, c->rank[0].rank, e);
}

/* Operands are random: zeros would be computed faster than anything real. */
static int fill_operands(const struct cuda *c, struct cuda_rank *r, struct err *e)
{
    enum { BLOCK = 1 << 20 };
    float *noise = malloc(BLOCK * sizeof *noise);
    void *made = noise ? malloc(BLOCK * sizeof *noise) : NULL;
    if (!made)
        err_set(e, ERR_MEMORY, "rank %d: out of memory for operands", r->rank);
    for (size_t i = 0; made && i < BLOCK; i++)
        noise[i] = (float)(2 * moe_unit(moe_mix(i)) - 1);
    if (made)
        cuda_from_floats(c, BLOCK, noise, made);
    for (size_t at = 0, some; !e->code && at < r->operands.room; at += some) {
        some = r->operands.room - at < BLOCK * c->element ? r->operands.room - at : BLOCK * c->element;
        CUDA_TRY(e, r->rank, cudaMemcpy((char *)r->operands.at + at, made, some, cudaMemcpyHostToDevice));
    }
    free(noise);
    free(made);
    return e->code;
}

static int open_rings(struct cuda *c, struct cuda_rank *r, const struct moe_graph *g, struct err *e)
{
    size_t in = 0, out = 0;
    cuda_math_room(c, g, r->rank, &in, &out);
    for (int64_t i = 0; i < c->plan.n_op; i++) {
        const struct task *t = c->plan.op[i].task < 0 ? NULL : &g->task[c->plan.op[i].task];
        if (t && t->kind == TASK_EXCHANGE && t->payload == MOE_PAY_BYTES) {
            in = in > HOST_PIECE ? in : HOST_PIECE;
            out = out > HOST_PIECE ? out : HOST_PIECE;
        }
    }
    const size_t room = in == 0 ? 0 : in + 256 > c->ring ? in + 256 : c->ring, had = r->operands.room;
    if (in == 0)
        return 0;
    cuda_take_more(&r->operands.at, &r->operands.room, room, r->rank, "operands", e);
    cuda_take_more(&r->results.at, &r->results.room, out, r->rank, "results", e);
    r->at_operands = 0;
    return e->code || had == r->operands.room ? e->code : fill_operands(c, r, e);
}

static int open_events(struct cuda *c, struct err *e)
{
    const int64_t need = 2 * c->plan.n_op;
    int64_t room = c->n_events;
    if (!c->zero)
        CUDA_TRY(e, 0, cudaEventCreate(&c->zero));
    if (need <= c->n_events || !cuda_grow(&c->event, &room, need, sizeof *c->event, e))
        return e->code;
    for (; c->n_events < need && !e->code; c->n_events += e->code == 0)
        CUDA_TRY(e, 0, cudaEventCreate(&c->event[c->n_events]));
    return e->code;
}

static int reserve(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    const size_t bytes = sizeof *c->plan.index * (size_t)c->plan.n_index;
    for (int32_t i = 0; i < c->n_here && !e->code; i++) {
        struct cuda_rank *r = &c->rank[i];
        cuda_take_more(&r->rows.at, &r->rows.room, (size_t)r->n_rows * row_bytes(c), r->rank,
                       "rows of tokens and outputs", e);
        cuda_take_more(&r->send.at, &r->send.room, r->send_rows * row_bytes(c), r->rank, "rows that wait to be sent",
                       e);
        open_rings(c, r, g, e);
        cuda_choose_prepare(c, r, g, e);
    }
    cuda_take_more(&c->index.at, &c->index.room, bytes, 0, "row numbers", e);
    if (bytes > 0)
        CUDA_TRY(e, 0, cudaMemcpy(c->index.at, c->plan.index, bytes, cudaMemcpyHostToDevice));
    if (!e->code && open_streams(c, g, e) == 0)
        list_products(c, g, e);
    return e->code ? e->code : open_events(c, e);
}

int cuda_prepare(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    bool offloads = false;
    for (int32_t i = 0; i < g->n_tasks; i++)
        offloads |= g->task[i].kind == TASK_LOAD;
    if (c->pad.on && offloads)
        return err_set(e, ERR_INPUT, "cuda_graphs: experts are loaded, and a captured step cannot say into which "
                       "slots: use offload = \"none\", or cuda_graphs = false");
    cuda_graph_forget(c);
    if (items_check(c->model, g, "cuda", e) < 0 || make_tables(c, g, e) < 0)
        return e->code;
    for (int32_t i = 0; i < c->n_here && !e->code; i++)
        cuda_store_prepare(c, &c->rank[i], g, offloads, e);
    return e->code || cuda_plan(c, g, e) < 0 ? e->code : reserve(c, g, e);
}
