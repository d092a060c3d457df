/* SPDX-License-Identifier: Apache-2.0
 * cuda_graph.c - see cuda_graph.h. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_rank.h"

#include <stdlib.h>
#include <string.h>

/* ---- whether two plans are the same calls ---- */

static void add(struct cuda_bytes *b, const void *data, size_t n, struct err *e)
{
    if (e->code)
        return;
    if (b->n + n > b->room) {
        const size_t room = 2 * (b->n + n) + 4096;
        unsigned char *grown = realloc(b->at, room);
        if (!grown) {
            err_set(e, ERR_MEMORY, "out of memory for a graph of %zu bytes", room);
            return;
        }
        b->at = grown;
        b->room = room;
    }
    memcpy(b->at + b->n, data, n);
    b->n += n;
}

/* Field by field: structures have gaps. */
#define ADD(b, value) add((b), &(value), sizeof(value), e)

static void add_buffer(struct cuda_bytes *b, const struct cuda_buffer *x, struct err *e)
{
    ADD(b, x->at);
}

/* What kernels and copies were given as places. */
static void add_places(struct cuda *c, struct cuda_bytes *b, struct err *e)
{
    for (int32_t i = 0; i < c->n_here; i++) {
        const struct cuda_rank *r = &c->rank[i];
        const struct cuda_buffer *const all[] = { &r->rows, &r->send, &r->operands, &r->results, &r->scores,
                                                  &r->chosen };
        for (size_t j = 0; j < sizeof all / sizeof *all; j++)
            add_buffer(b, all[j], e);
        ADD(b, r->n_own);
    }
    for (int32_t i = 0; i < c->n_here * RANK_STREAMS; i++) {
        const struct cuda_stream *s = &c->stream[i];
        const struct cuda_buffer *const all[] = { &s->gathered, &s->gate, &s->up, &s->workspace };
        for (size_t j = 0; s->stream && j < sizeof all / sizeof *all; j++)
            add_buffer(b, all[j], e);
        ADD(b, s->stream);
    }
    add_buffer(b, &c->index, e);
    add_buffer(b, &c->products.device, e);
    const struct cuda_products *p = &c->products; /* cuBLAS may read shapes where they lie, also when launched again */
    const void *const lists[] = { p->m, p->n, p->k, p->one_each, p->as_it_is, p->one, p->zero };
    add(b, lists, sizeof lists, e);
}

static void add_products(const struct cuda *c, struct cuda_bytes *b, int64_t call, struct err *e)
{
    const struct cuda_products *p = &c->products;
    const struct cuda_call x = p->call[call];
    ADD(b, x.first);
    ADD(b, x.n);
    ADD(b, p->n_products); /* where the places of A and C begin */
    for (int32_t i = x.first; i < x.first + x.n; i++) {
        ADD(b, p->m[i]);
        ADD(b, p->n[i]);
        ADD(b, p->k[i]);
        if (!cuda_products_by_list(p, call))
            add(b, &p->at[3 * i], 3 * sizeof *p->at, e);
    }
}

static void add_act(struct cuda *c, const struct moe_graph *g, const struct cuda_act *a, struct cuda_bytes *b,
                    struct err *e)
{
    const struct cuda_plan *p = &c->plan;
    ADD(b, a->what);
    ADD(b, a->n);
    ADD(b, a->index);
    ADD(b, a->row);
    if (a->what == CUDA_EXPERTS)
        for (int64_t call = 0; call < 2; call++)
            add_products(c, b, p->experts[a->entry].call + call, e);
    else if (a->what == CUDA_PLAIN)
        add(b, &p->plain[a->entry], sizeof p->plain[a->entry], e);
    else if (a->what != CUDA_KERNEL)
        ADD(b, a->entry);
    if (a->what != CUDA_KERNEL)
        return;
    const struct kernel *k = &g->kernel[a->entry];
    ADD(b, k->groups);
    ADD(b, k->flops);
    ADD(b, k->traffic);
    if (k->groups > 0)
        add_products(c, b, a->index, e);
}

static int describe(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    const struct cuda_plan *p = &c->plan;
    struct cuda_bytes *b = &c->graphs.calls;
    b->n = 0;
    add_places(c, b, e);
    for (int64_t i = 0; i < p->n_op; i++) {
        const struct cuda_op *op = &p->op[i];
        const int layer = op->task < 0 ? -1 : g->task[op->task].layer;
        ADD(b, op->stream);
        ADD(b, layer);
        add(b, p->wait + op->first_wait, sizeof *p->wait * (size_t)op->n_waits, e);
        ADD(b, op->n_waits);
        for (int32_t j = op->first_act; j < op->first_act + op->n_acts; j++)
            add_act(c, g, &p->act[j], b, e);
        ADD(b, op->n_acts);
        for (int32_t j = op->first_transfer; j < op->first_transfer + op->n_transfers; j++) {
            const struct cuda_transfer *x = &p->transfer[j];
            ADD(b, x->peer);
            ADD(b, x->round);
            ADD(b, x->sends);
            ADD(b, x->at);
            ADD(b, x->bytes);
        }
        ADD(b, op->n_transfers);
    }
    return e->code;
}

/* ---- capturing ---- */

static int open_done(struct cuda *c, struct err *e)
{
    struct cuda_graphs *k = &c->graphs;
    const int64_t need = c->plan.n_op + c->n_here * RANK_STREAMS + 1;
    int64_t room = k->n_done;
    if (need <= k->n_done || !cuda_grow(&k->done, &room, need, sizeof *k->done, e))
        return e->code;
    for (; k->n_done < need && !e->code; k->n_done += e->code == 0)
        CUDA_TRY(e, 0, cudaEventCreateWithFlags(&k->done[k->n_done], cudaEventDisableTiming));
    return e->code;
}

static struct cuda_stream *first_stream(const struct cuda *c)
{
    struct cuda_stream *s = c->stream;
    while (!s->stream)
        s++;
    return s;
}

/* Every stream comes back to the first. */
static int join(struct cuda *c, struct err *e)
{
    const struct cuda_stream *first = first_stream(c);
    for (int32_t i = 0; i < c->n_here * RANK_STREAMS && !e->code; i++) {
        const struct cuda_stream *s = &c->stream[i];
        cudaEvent_t done = c->graphs.done[c->plan.n_op + i];
        if (!s->stream || s == first)
            continue;
        CUDA_TRY(e, c->rank[0].rank, cudaEventRecord(done, s->stream));
        CUDA_TRY(e, c->rank[0].rank, cudaStreamWaitEvent(first->stream, done, 0));
    }
    return e->code;
}

static int capture(struct cuda *c, const struct moe_graph *g, cudaGraphExec_t *out, struct err *e)
{
    const int32_t rank = c->rank[0].rank;
    cudaStream_t s = first_stream(c)->stream;
    cudaGraph_t graph = NULL;
    if (open_done(c, e) < 0)
        return e->code;
    CUDA_TRY(e, rank, cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    if (e->code)
        return e->code;
    c->graphs.capturing = true;
    cuda_queue_plan(c, g, e);
    join(c, e);
    c->graphs.capturing = false;
    const cudaError_t ended = cudaStreamEndCapture(s, &graph); /* also after an error: the stream is to be used again */
    CUDA_TRY(e, rank, ended);
    CUDA_TRY(e, rank, cudaGraphInstantiateWithFlags(out, graph, 0));
    if (graph)
        cudaGraphDestroy(graph);
    return e->code;
}

/* ---- those that are kept ---- */

static int32_t find(const struct cuda_graphs *k)
{
    for (int32_t i = 0; i < k->n; i++)
        if (k->kept[i].calls.n == k->calls.n && memcmp(k->kept[i].calls.at, k->calls.at, k->calls.n) == 0)
            return i;
    return -1;
}

/* A place for another. */
static int32_t place(struct cuda_graphs *k)
{
    int32_t oldest = 0;
    if (k->n < CUDA_GRAPHS)
        return k->n++;
    for (int32_t i = 1; i < k->n; i++)
        oldest = k->kept[i].used < k->kept[oldest].used ? i : oldest;
    cudaGraphExecDestroy(k->kept[oldest].graph);
    free(k->kept[oldest].calls.at);
    k->kept[oldest] = (struct cuda_kept){ .used = 0 };
    return oldest;
}

static int find_or_capture(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    struct cuda_graphs *k = &c->graphs;
    cudaGraphExec_t graph = NULL;
    if (describe(c, g, e) < 0)
        return e->code;
    k->now = find(k);
    if (k->now >= 0 || capture(c, g, &graph, e) < 0)
        return e->code;
    k->now = place(k);
    k->kept[k->now] = (struct cuda_kept){ .calls = k->calls, .graph = graph };
    k->calls = (struct cuda_bytes){ .n = 0 };
    k->captured++;
    return 0;
}

int cuda_graph_run(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    struct cuda_graphs *k = &c->graphs;
    if (k->now < 0 && find_or_capture(c, g, e) < 0)
        return e->code;
    const double began = cuda_now();
    k->kept[k->now].used = ++k->launched;
    CUDA_TRY(e, c->rank[0].rank, cudaGraphLaunch(k->kept[k->now].graph, first_stream(c)->stream));
    c->queue_s = cuda_now() - began;
    return e->code ? e->code : c->comm->ops->wait(c->comm, first_stream(c)->stream, e);
}

void cuda_graph_forget(struct cuda *c)
{
    c->graphs.now = -1;
}

void cuda_graph_free(struct cuda *c)
{
    struct cuda_graphs *k = &c->graphs;
    for (int32_t i = 0; i < k->n; i++) {
        cudaGraphExecDestroy(k->kept[i].graph);
        free(k->kept[i].calls.at);
    }
    for (int64_t i = 0; i < k->n_done; i++)
        cudaEventDestroy(k->done[i]);
    free(k->done);
    free(k->calls.at);
    memset(k, 0, sizeof *k);
}
