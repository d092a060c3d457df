/* SPDX-License-Identifier: Apache-2.0
 * cuda.c - the module hw/cuda.so: task graphs on a GPU.
 *
 * Either all ranks of a run are in this process, each a set of streams on one GPU, and what they send each other is
 * copied (cuda_virtual.c); or each is a process with a GPU of its own, and NCCL carries it (cuda_nccl.c). What is
 * computed, and what is not: doc/gpu.md. */
#include "config.h"

#include "cuda.h"
#include "cuda_check.h"
#include "cuda_rank.h"
#include "host_model.h"
#include "host_order.h"

#include <math.h>
#include <stdlib.h>

enum { MAX_VIRTUAL = 64, RING = 1 << 26 /* more than caches have */ };

/* Start and end of every task, on the machine's clock. */
static void set_times(struct machine *m, struct moe_graph *g)
{
    const struct cuda *c = m->priv;
    const struct graph_order *o = &c->plan.order;
    double last = 0, *time = c->time;
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const int32_t id = c->plan.sequence[i];
        struct task *t = &g->task[id];
        double *own = &time[2 * id];
        if (t->kind == TASK_JOIN) { /* the latest end before it, collected below */
            own[0] = own[1] = fmax(own[0], 0);
        } else if (t->kind == TASK_ARRIVAL) {
            own[0] = time[2 * t->exchange];
            own[1] = fmax(own[0], own[1]);
        }
        for (int64_t j = o->first[id]; j < o->first[id + 1]; j++)
            if (g->task[o->next[j]].kind == TASK_JOIN)
                time[2 * o->next[j]] = fmax(time[2 * o->next[j]], own[1]);
        t->start = m->now + own[0];
        t->end = m->now + own[1];
        last = fmax(last, own[1]);
    }
    m->now += last;
}

static int share_error(struct cuda *c, double *max_error, struct err *e)
{
    double *all = malloc(sizeof *all * (size_t)c->team->size);
    if (!all)
        err_set(e, ERR_MEMORY, "rank %d: out of memory for %d ranks", c->team->rank, c->team->size);
    if (team_agree(c->team, e) == 0 && c->team->ops->gather(c->team, max_error, sizeof *all, all, e) == 0)
        for (int i = 0; i < c->team->size; i++)
            *max_error = fmax(*max_error, all[i]);
    free(all);
    return e->code;
}

static int run_once(struct machine *m, struct moe_graph *g, bool captured, struct err *e)
{
    struct cuda *c = m->priv;
    if (cuda_step(c, g, captured, e) < 0)
        return e->code;
    set_times(m, g);
    m->queue_s = c->queue_s;
    m->padding = c->pad.rows > 0 ? (double)c->pad.padding / (double)c->pad.rows : 0;
    m->graphs_captured = c->graphs.captured;
    m->graphs_launched = c->graphs.launched;
    for (int32_t i = 0; m->verify && i < c->n_here && !e->code; i++)
        cuda_choose_verify(c, &c->rank[i], g, &c->decided, e);
    if (m->verify && !e->code)
        cuda_verify(m, c, g, e);
    if (m->verify && c->team)
        share_error(c, &m->max_error, e);
    c->draw++;
    return e->code;
}

/* Before the first step, when all ranks are known to be there. */
static int connect(struct cuda *c, struct err *e)
{
    if (cuda_take_gpu(c, e) < 0)
        return e->code;
    cuda_top_k_check(c->rank[0].rank, e);
    if (team_agree(c->team, e) < 0)
        return e->code;
    return c->team ? cuda_comm_nccl(&c->comm, c->team, e) : cuda_comm_virtual(&c->comm, c->n_ranks, e);
}

static int cuda_run(struct machine *m, struct moe_graph *g, struct err *e)
{
    struct cuda *c = m->priv;
    if (g->n_route_layers != c->model->n_layers)
        err_set(e, ERR_RUN, "the graph keeps the routes of %d layers, expected %d", g->n_route_layers,
                c->model->n_layers);
    if (e->code || team_same_graph(c->team, c->team ? host_graph_hash(g) : 0, e) < 0)
        return e->code;
    if (!c->comm && connect(c, e) < 0)
        return e->code;
    cuda_prepare(c, g, e);
    return team_agree(c->team, e) < 0 ? e->code : run_once(m, g, false, e);
}

/* What was queued call by call once, so that everything is loaded, is captured. */
static int cuda_again(struct machine *m, struct moe_graph *g, struct err *e)
{
    const struct cuda *c = m->priv;
    return run_once(m, g, c->pad.on, e);
}

static void close_rank(const struct cuda *c, struct cuda_rank *r)
{
    const size_t n = (size_t)c->model->n_layers * (size_t)c->model->n_experts;
    for (size_t i = 0; r->weights && i < n; i++)
        cudaFree(r->weights[i]);
    for (int32_t i = 0; i < r->n_slots; i++)
        cudaFree(r->slot[i].weights);
    cudaFree(r->rows.at);
    cudaFree(r->send.at);
    cudaFree(r->operands.at);
    cudaFree(r->results.at);
    cudaFree(r->scores.at);
    cudaFree(r->chosen.at);
    free(r->weights);
    free(r->slot);
    free(r->slot_of);
    free(r->slot_ops);
    free(r->load);
    free(r->load_of);
    free(r->row_op);
    free(r->token_row);
    free(r->route_row);
    free(r->place);
    free(r->send_at);
    free(r->sent);
    free(r->expert_weights);
}

static void cuda_close(struct machine *m)
{
    struct cuda *c = m->priv;
    if (!c)
        return;
    for (int32_t i = 0; c->rank && i < c->n_here; i++)
        close_rank(c, &c->rank[i]);
    for (int32_t i = 0; c->stream && i < c->n_here * RANK_STREAMS; i++) {
        struct cuda_stream *s = &c->stream[i];
        if (s->blas)
            cublasDestroy(s->blas);
        if (s->stream)
            cudaStreamDestroy(s->stream);
        cudaFree(s->gathered.at);
        cudaFree(s->gate.at);
        cudaFree(s->up.at);
        cudaFree(s->hidden.at);
        cudaFree(s->row_scale.at);
        cudaFree(s->hidden_scale.at);
        cudaFree(s->workspace.at);
    }
    for (int64_t i = 0; i < c->n_events; i++)
        cudaEventDestroy(c->event[i]);
    if (c->zero)
        cudaEventDestroy(c->zero);
    for (int64_t i = 0; c->pinned && i < (int64_t)c->model->n_layers * c->model->n_experts; i++)
        cudaFreeHost(c->pinned[i]);
    if (c->comm)
        c->comm->ops->close(c->comm);
    cuda_graph_free(c);
    cuda_pad_free(&c->pad);
    cudaFree(c->index.at);
    cuda_products_free(&c->products);
    cuda_plan_free(&c->plan);
    free(c->rank);
    free(c->stream);
    free(c->pinned);
    free(c->route_of);
    free(c->event);
    free(c->time);
    free(c);
    m->priv = NULL;
}

static const struct machine_ops cuda_ops = { .name = "cuda", .run = cuda_run, .again = cuda_again,
                                             .close = cuda_close };

/* What products in fp8 can be of. */
static int check_model(const struct moe_model *m, struct err *e)
{
    const struct { const char *name; int32_t n; } width[] = { { "d_model", m->d_model }, { "d_expert", m->d_expert } };
    for (int i = 0; i < 2; i++)
        if (width[i].n % CUDA_FP8_STEP != 0)
            return err_set(e, ERR_INPUT, "model.%s: fp8 needs a multiple of %d, found %d", width[i].name, CUDA_FP8_STEP,
                           width[i].n);
    for (int64_t i = 0; m->expert_width && i < (int64_t)m->n_layers * m->n_experts; i++)
        if (host_width(m, (int32_t)(i / m->n_experts), (int32_t)(i % m->n_experts)) != m->d_expert)
            return err_set(e, ERR_INPUT, "layer %d, expert %d: in fp8 experts are as wide as model.d_expert, %d, found "
                           "%d", (int32_t)(i / m->n_experts), (int32_t)(i % m->n_experts), m->d_expert,
                           host_width(m, (int32_t)(i / m->n_experts), (int32_t)(i % m->n_experts)));
    return 0;
}

/* What a graph cannot hold: matrices that a call is given as places. */
static int check_graphs(const struct machine *m, struct err *e)
{
    if (m->precision == PREC_FP8)
        return err_set(e, ERR_INPUT, "cuda_graphs: products in fp8 are queued with the places of experts, which differ "
                       "from step to step: use bf16 or fp32, or cuda_graphs = false");
    if (!cuda_products_grouped())
        return err_set(e, ERR_INPUT, "cuda_graphs: cuBLAS has no grouped products: expected 12.5 or newer");
    return 0;
}

static int cuda_open(struct machine *m, struct err *e)
{
    struct team *t = m->team;
    const int32_t n = m->topology->n_devices, n_here = t ? 1 : n;
    const size_t experts = (size_t)m->model->n_layers * (size_t)m->model->n_experts;
    if (!t && n > MAX_VIRTUAL)
        return err_set(e, ERR_INPUT, "%d virtual ranks, expected at most %d: make the machine's nodes fewer", n,
                       MAX_VIRTUAL);
    if (t && t->size != n)
        return err_set(e, ERR_INPUT, "%d ranks, expected one for each of the %d devices of %s", t->size, n,
                       m->topology->name);
    if (m->graphs && check_graphs(m, e) < 0)
        return e->code;
    if ((m->precision == PREC_FP8 && check_model(m->model, e) < 0) || cuda_find_device(e) < 0)
        return e->code;
    struct cuda *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(e, ERR_MEMORY, "out of memory for the machine");
    m->ops = &cuda_ops;
    m->priv = c;
    m->rank = t ? t->rank : 0;
    m->products = cuda_products_grouped() && m->precision != PREC_FP8 ? "grouped" : "one by one";
    c->model = m->model;
    c->team = t;
    c->n_ranks = n;
    c->n_here = n_here;
    c->fp8 = m->precision == PREC_FP8;
    c->half = m->precision == PREC_BF16 || c->fp8;
    c->keeps = c->fp8 && m->verify;
    c->ring = RING;
    c->pad.on = m->graphs;
    c->element = c->half ? 2 : sizeof(float);
    c->rank = calloc((size_t)n_here, sizeof *c->rank);
    c->stream = calloc((size_t)n_here * RANK_STREAMS, sizeof *c->stream);
    c->pinned = calloc(experts, sizeof *c->pinned);
    if (!c->rank || !c->stream || !c->pinned)
        return err_set(e, ERR_MEMORY, "out of memory for the machine");
    for (int32_t i = 0; i < n_here; i++) {
        c->rank[i].rank = m->rank + i;
        if (!(c->rank[i].weights = calloc(experts, sizeof *c->rank[i].weights)))
            return err_set(e, ERR_MEMORY, "out of memory for the machine");
    }
    return 0;
}

const struct cuda_module moelab_cuda_module = {
    .abi = CUDA_ABI,
    .size = sizeof(struct cuda_module),
    .machine_size = sizeof(struct machine),
    .graph_size = sizeof(struct moe_graph),
    .task_size = sizeof(struct task),
    .kernel_size = sizeof(struct kernel),
    .model_size = sizeof(struct moe_model),
    .open = cuda_open,
    .calibrate = cuda_calibrate,
};
