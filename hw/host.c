/* SPDX-License-Identifier: Apache-2.0
 * host.c - the module hw/host.so: one MPI rank per device runs the task graph for real.
 *
 * Every rank holds the whole graph and goes through its tasks in one order that is the same everywhere, so that
 * exchanges, which are collective, meet. It computes the tasks of its own device and takes part in all exchanges.
 * What is computed, and what is not: doc/host.md. */
#include "config.h"

#include "host.h"
#include "host_model.h"
#include "host_need.h"
#include "host_rank.h"
#include "memory.h"

#include <cblas.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- what ranks agree on ---- */

/* Graphs that differ would hang in their first exchange. */
static int compare_graphs(const struct host *h, const struct moe_graph *g, struct err *e)
{
    uint64_t mine = host_graph_hash(g), all[h->n_ranks];
    MPI_Allgather(&mine, 1, MPI_UINT64_T, all, 1, MPI_UINT64_T, MPI_COMM_WORLD);
    for (int r = 1; r < h->n_ranks; r++)
        if (all[r] != all[0])
            return err_set(e, ERR_RUN, "rank %d decided otherwise than rank 0 (task graphs %016llx and %016llx): a "
                           "policy depends on more than its inputs and the seed", r, (unsigned long long)all[r],
                           (unsigned long long)all[0]);
    return 0;
}

/* The first failure, by rank, becomes every rank's: all stop together and say the same. */
static int agree(const struct host *h, struct err *e)
{
    int mine = e->code ? h->rank : INT_MAX, first;
    MPI_Allreduce(&mine, &first, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (first != INT_MAX)
        MPI_Bcast(e, (int)sizeof *e, MPI_BYTE, first, MPI_COMM_WORLD);
    return e->code;
}

/* ---- tasks ---- */

/* The token's hidden state after a layer, if all its experts' outputs are here; entering the next layer, it is one
 * more row. False: something is still missing. */
static bool combine(struct host *h, const struct moe_graph *g, int32_t layer, int32_t token)
{
    const int32_t d = h->model->d_model;
    const int64_t *before = token_row(h, g, layer, token);
    int64_t *after = token_row(h, g, layer + 1, token);
    int64_t first = route_of(h, g, layer, token), end = route_of(h, g, layer, token + 1);
    if (*after >= 0)
        return true;
    if (*before < 0 && (layer == 0 || !combine(h, g, layer - 1, token)))
        return false;
    for (int64_t r = first; r < end; r++)
        if (g->route[r].expert < h->model->n_experts && h->route_row[r] < 0)
            return false;
    *after = (int64_t)h->n_rows++;
    float *out = row_at(h, *after);
    memcpy(out, row_at(h, *before), sizeof *out * (size_t)d);
    for (int64_t r = first; r < end; r++)
        if (g->route[r].expert < h->model->n_experts)
            cblas_saxpy(d, g->route[r].weight, row_at(h, h->route_row[r]), 1, out, 1);
    host_normalise(out, d);
    return true;
}

/* The row that an item of a layer means, or -1. */
static int64_t row_of(const struct host *h, const struct moe_graph *g, const struct task *t, enum moe_payload payload,
                      int64_t item)
{
    int64_t r = g->route_first[t->layer] + item;
    return payload == MOE_PAY_OUTPUT ? h->route_row[r] : *token_row(h, g, t->layer, g->route[r].token);
}

static int run_experts(struct host *h, const struct moe_graph *g, const struct task *t, struct err *e)
{
    const int32_t d = h->model->d_model;
    const int64_t *item = g->item + t->first_item;
    for (int32_t i = 0; i < t->n; i++) {
        int32_t expert = g->expert[t->first + i], n = (int32_t)g->rows[t->first + i];
        int32_t width = host_width(h->model, t->layer, expert);
        const float *w1 = h->weights[(size_t)t->layer * (size_t)h->model->n_experts + (size_t)expert];
        const float *w3 = w1 + (size_t)d * (size_t)width, *w2 = w3 + (size_t)d * (size_t)width;
        if (n == 0)
            continue;
        float *out = row_at(h, (int64_t)h->n_rows);
        for (int32_t j = 0; j < n; j++, item++) {
            int64_t row = row_of(h, g, t, MOE_PAY_HIDDEN, *item);
            if (row < 0)
                return err_set(e, ERR_RUN, "rank %d, layer %d: route %lld is computed before its token is here",
                               h->rank, t->layer, (long long)*item);
            memcpy(h->gathered.data + (size_t)j * (size_t)d, row_at(h, row), sizeof(float) * (size_t)d);
            h->route_row[g->route_first[t->layer] + *item] = (int64_t)h->n_rows++;
        }
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, width, d, 1, h->gathered.data, d, w1, width, 0,
                    h->gate.data, width);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, width, d, 1, h->gathered.data, d, w3, width, 0,
                    h->up.data, width);
        for (size_t j = 0; j < (size_t)n * (size_t)width; j++)
            h->up.data[j] *= h->gate.data[j] / (1 + expf(-h->gate.data[j]));
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, d, width, 1, h->up.data, width, w2, d, 0, out, d);
    }
    return 0;
}

/* Displacements from counts; returns the sum. */
static int displace(const int *count, int n, int *displacement)
{
    int at = 0;
    for (int i = 0; i < n; i++) {
        displacement[i] = at;
        at += count[i];
    }
    return at;
}

/* Rows between a pair of ranks keep the order of parts and items, which both sides know. */
static int exchange_rows(struct host *h, const struct moe_graph *g, const struct task *t, struct err *e)
{
    const size_t d = (size_t)h->model->d_model;
    int *n_out = h->count, *out_at = n_out + h->n_ranks, *n_in = out_at + h->n_ranks, *in_at = n_in + h->n_ranks;
    const struct moe_part *part = g->part + t->first;
    memset(h->count, 0, sizeof *h->count * 4 * (size_t)h->n_ranks);
    for (int32_t i = 0; i < t->n; i++) {
        if (part[i].src == part[i].dst)
            continue;
        n_out[part[i].dst] += part[i].src == h->rank ? (int)part[i].n_items : 0;
        n_in[part[i].src] += part[i].dst == h->rank ? (int)part[i].n_items : 0;
    }
    displace(n_out, h->n_ranks, out_at);
    int n_new = displace(n_in, h->n_ranks, in_at);
    for (int32_t i = 0; i < t->n; i++) {
        const int64_t *item = g->item + g->part_item[t->first + i];
        for (int64_t j = 0; part[i].src == h->rank && part[i].dst != h->rank && j < part[i].n_items; j++) {
            int64_t row = row_of(h, g, t, t->payload, item[j]);
            if (row < 0)
                return err_set(e, ERR_RUN, "rank %d, layer %d: route %lld is sent before its %s is here", h->rank,
                               t->layer, (long long)item[j], t->payload == MOE_PAY_OUTPUT ? "output" : "token");
            memcpy(h->send.data + (size_t)out_at[part[i].dst]++ * d, row_at(h, row), sizeof(float) * d);
        }
    }
    displace(n_out, h->n_ranks, out_at);
    MPI_Alltoallv(h->send.data, n_out, out_at, h->row, row_at(h, (int64_t)h->n_rows), n_in, in_at, h->row,
                  MPI_COMM_WORLD);
    for (int32_t i = 0; i < t->n; i++) {
        const int64_t *item = g->item + g->part_item[t->first + i];
        for (int64_t j = 0; part[i].dst == h->rank && part[i].src != h->rank && j < part[i].n_items; j++) {
            int64_t r = g->route_first[t->layer] + item[j], row = (int64_t)h->n_rows + in_at[part[i].src]++;
            if (t->payload == MOE_PAY_OUTPUT)
                h->route_row[r] = row;
            else
                *token_row(h, g, t->layer, g->route[r].token) = row;
        }
    }
    h->n_rows += (size_t)n_new;
    return 0;
}

static int slice(double left)
{
    return left > HOST_PIECE ? HOST_PIECE : left > 0 ? (int)left : 0;
}

/* As many bytes as the parts of each pair say, in rounds of at most one piece. What arrives is not looked at. */
static int exchange_bytes(struct host *h, const struct moe_graph *g, const struct task *t, struct err *e)
{
    const size_t n = (size_t)h->n_ranks, me = (size_t)h->rank;
    int *n_out = h->count, *out_at = n_out + n, *n_in = out_at + n, *in_at = n_in + n;
    double *bytes = calloc(n * n, sizeof *bytes), most = 0; /* [source][destination] */
    if (!h->piece)
        h->piece = calloc(n + 1, HOST_PIECE); /* sent, and one from each */
    if (!bytes || !h->piece) {
        free(bytes);
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for an exchange", h->rank);
    }
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &g->part[i];
        double *pair = &bytes[(size_t)p->src * n + (size_t)p->dst];
        *pair += p->src == p->dst ? 0 : p->bytes;
        most = fmax(most, *pair);
    }
    for (double sent = 0; sent < most; sent += HOST_PIECE) {
        for (size_t r = 0; r < n; r++) {
            n_out[r] = slice(bytes[me * n + r] - sent);
            n_in[r] = slice(bytes[r * n + me] - sent);
            out_at[r] = 0;
            in_at[r] = (int)r * HOST_PIECE;
        }
        MPI_Alltoallv(h->piece, n_out, out_at, MPI_BYTE, h->piece + HOST_PIECE, n_in, in_at, MPI_BYTE, MPI_COMM_WORLD);
    }
    free(bytes);
    return 0;
}

static int run_task(struct host *h, const struct moe_graph *g, const struct task *t, struct err *e)
{
    switch (t->kind) {
    case TASK_EXPERTS:
        return run_experts(h, g, t, e);
    case TASK_EXCHANGE: /* a layout may leave out combining tokens that went nowhere */
        for (int32_t i = 0; t->payload == MOE_PAY_HIDDEN && t->layer > 0 && i < h->n_own; i++)
            combine(h, g, t->layer - 1, h->own[i]);
        return t->payload == MOE_PAY_BYTES ? exchange_bytes(h, g, t, e) : exchange_rows(h, g, t, e);
    case TASK_COMPUTE:
        for (int32_t i = 0; t->op == MOE_OP_COMBINE && i < h->n_own; i++)
            combine(h, g, t->layer, h->own[i]);
        return 0;
    case TASK_ARRIVAL:
    case TASK_LOAD:
    case TASK_JOIN:
        break;
    }
    return 0;
}

static bool is_mine(const struct host *h, const struct task *t)
{
    return t->kind == TASK_EXCHANGE || (t->kind != TASK_JOIN && t->device == h->rank);
}

/* Fills order[] and runs the tasks in it; time[2 i], time[2 i + 1]: when task i began and ended here, in seconds from
 * the barrier, or -infinity. */
static int walk(struct host *h, const struct moe_graph *g, struct graph_order *o, int32_t *order, double *time,
                struct err *e)
{
    int32_t n_ready = 0;
    for (int32_t i = 0; i < g->n_tasks; i++) {
        time[2 * i] = time[2 * i + 1] = -INFINITY;
        if (o->n_before[i] == 0)
            order[n_ready++] = i;
    }
    MPI_Barrier(MPI_COMM_WORLD);
    double zero = MPI_Wtime();
    for (int32_t i = 0; i < n_ready; i++) {
        int32_t id = order[i];
        if (is_mine(h, &g->task[id])) {
            time[2 * id] = MPI_Wtime() - zero;
            if (run_task(h, g, &g->task[id], e) < 0)
                return e->code;
            time[2 * id + 1] = MPI_Wtime() - zero;
            if (g->task[id].kind == TASK_ARRIVAL) /* when its exchange ended here, not when this was looked at */
                time[2 * id + 1] = time[2 * g->task[id].exchange + 1];
        }
        for (int64_t j = o->first[id]; j < o->first[id + 1]; j++)
            if (--o->n_before[o->next[j]] == 0)
                order[n_ready++] = o->next[j];
    }
    return 0;
}

/* Gives every rank the times of all tasks. An exchange begins when the last rank comes to it, as on a simulated
 * machine, where it begins when all before it has ended, and ends when the last rank leaves it. */
static void share_times(struct machine *m, struct moe_graph *g, const struct graph_order *o, const int32_t *order,
                        double *time)
{
    double last = 0;
    MPI_Allreduce(MPI_IN_PLACE, time, 2 * g->n_tasks, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    for (int32_t i = 0; i < g->n_tasks; i++) {
        struct task *t = &g->task[order[i]];
        double *own = &time[2 * order[i]];
        if (t->kind == TASK_ARRIVAL) {
            own[0] = time[2 * t->exchange];
            own[1] = fmax(own[0], own[1]);
        } else if (t->kind == TASK_JOIN) { /* the latest end before it, collected below */
            own[0] = own[1] = fmax(own[0], 0);
        }
        for (int64_t j = o->first[order[i]]; j < o->first[order[i] + 1]; j++)
            if (g->task[o->next[j]].kind == TASK_JOIN)
                time[2 * o->next[j]] = fmax(time[2 * o->next[j]], own[1]);
        t->start = m->now + own[0];
        t->end = m->now + own[1];
        last = fmax(last, own[1]);
    }
    m->now += last;
}

/* ---- after a step ---- */

/* Compares every layer of every own token with the reference, fed with what entered the layer here. The inputs of
 * layer 0 are made anew, and those of the others were compared as outputs: nothing is taken on trust. */
static int verify(struct machine *m, struct host *h, const struct moe_graph *g, struct err *e)
{
    const size_t d = (size_t)h->model->d_model, n = (size_t)h->n_own;
    float *input = malloc(sizeof *input * (n * d + 1));
    double *expected = malloc(sizeof *expected * (n * d + 1));
    const float **in = malloc(sizeof *in * (n + 1));
    if (!input || !expected || !in)
        err_set(e, ERR_MEMORY, "rank %d: out of memory to verify %zu tokens", h->rank, n);
    for (size_t i = 0; i < n && !e->code; i++) {
        host_input(h->model, h->step, h->own[i], input + i * d);
        in[i] = input + i * d;
    }
    for (int32_t l = 0; l < g->n_route_layers && !e->code; l++) {
        int64_t first = g->route_first[l];
        host_reference(h->model, l, g->route + first, g->route_first[l + 1] - first, h->place, h->n_own, in, expected,
                       e);
        for (size_t i = 0; i < n && !e->code; i++) {
            const float *got = row_at(h, *token_row(h, g, l + 1, h->own[i]));
            int32_t at;
            double error = host_error(got, expected + i * d, (int32_t)d, &at);
            m->max_error = fmax(m->max_error, error);
            if (error > HOST_TOLERANCE)
                err_set(e, ERR_RUN, "rank %d: layer %d, token %d, element %d: got %.9g, expected %.9g (relative "
                        "error %.2g, allowed %.2g)", h->rank, l, h->own[i], at, (double)got[at],
                        expected[i * d + (size_t)at], error, HOST_TOLERANCE);
            in[i] = got;
        }
    }
    free(input);
    free(expected);
    free(in);
    MPI_Allreduce(MPI_IN_PLACE, &m->max_error, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return e->code;
}

static int finish(struct host *h, const struct moe_graph *g, struct err *e)
{
    for (int32_t i = 0; i < h->n_own && !e->code; i++)
        if (!combine(h, g, g->n_route_layers - 1, h->own[i]))
            err_set(e, ERR_RUN, "rank %d: token %d did not get all its outputs", h->rank, h->own[i]);
    return e->code;
}

static int host_run(struct machine *m, struct moe_graph *g, struct err *e)
{
    struct host *h = m->priv;
    struct graph_order o = { 0 };
    int32_t *order = malloc(sizeof *order * ((size_t)g->n_tasks + 1));
    double *time = malloc(sizeof *time * 2 * ((size_t)g->n_tasks + 1));
    if (!order || !time)
        err_set(e, ERR_MEMORY, "rank %d: out of memory for the task graph", h->rank);
    if (!e->code && graph_order(g, &o, e) == 0 && g->n_route_layers != h->model->n_layers)
        err_set(e, ERR_RUN, "the graph keeps the routes of %d layers, expected %d", g->n_route_layers,
                h->model->n_layers);
    if (agree(h, e) == 0 && compare_graphs(h, g, e) == 0) {
        host_prepare(h, g, e);
        /* From here on a failure of one rank leaves the others waiting: its process ends, and mpirun ends theirs. */
        if (agree(h, e) == 0 && walk(h, g, &o, order, time, e) == 0) {
            share_times(m, g, &o, order, time);
            finish(h, g, e);
            if (agree(h, e) == 0 && m->verify) {
                verify(m, h, g, e);
                agree(h, e);
            }
        }
    }
    if (!e->code) {
        m->peak_memory = memory_peak();
        MPI_Allreduce(MPI_IN_PLACE, &m->peak_memory, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    }
    h->step++;
    graph_order_free(&o);
    free(order);
    free(time);
    return e->code;
}

static void host_close(struct machine *m)
{
    struct host *h = m->priv;
    if (!h)
        return;
    for (int32_t i = 0; h->weights && i < h->model->n_layers * h->model->n_experts; i++)
        free(h->weights[i]);
    struct pool *const pools[] = { &h->rows, &h->send, &h->gathered, &h->gate, &h->up };
    for (size_t i = 0; i < sizeof pools / sizeof *pools; i++)
        free(pools[i]->data);
    free(h->weights);
    free(h->token_row);
    free(h->route_row);
    free(h->route_of);
    free(h->place);
    free(h->count);
    free(h->piece);
    MPI_Type_free(&h->row);
    free(h);
    m->priv = NULL;
    MPI_Finalize();
}

static const struct machine_ops host_ops = { .name = "host", .run = host_run, .close = host_close };

static int host_open(struct machine *m, struct err *e)
{
    int n_ranks, rank;
    if (MPI_Init(NULL, NULL) != MPI_SUCCESS)
        return err_set(e, ERR_IO, "MPI does not start");
    MPI_Comm_size(MPI_COMM_WORLD, &n_ranks);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    openblas_set_num_threads(1);
    m->rank = rank;
    if (n_ranks != m->topology->n_devices)
        return err_set(e, ERR_INPUT, "%d MPI ranks, expected one for each of the %d devices of %s", n_ranks,
                       m->topology->n_devices, m->topology->name);
    struct host *h = calloc(1, sizeof *h);
    if (!h)
        return err_set(e, ERR_MEMORY, "out of memory for the machine");
    h->model = m->model;
    h->rank = rank;
    h->n_ranks = n_ranks;
    MPI_Type_contiguous(m->model->d_model, MPI_FLOAT, &h->row);
    MPI_Type_commit(&h->row);
    m->ops = &host_ops;
    m->priv = h;
    h->weights = calloc((size_t)m->model->n_layers * (size_t)m->model->n_experts, sizeof *h->weights);
    h->count = calloc(4 * (size_t)n_ranks, sizeof *h->count);
    if (!h->weights || !h->count)
        return err_set(e, ERR_MEMORY, "out of memory for the machine");
    return 0;
}

const struct host_module moelab_host_module = {
    .abi = HOST_ABI,
    .size = sizeof(struct host_module),
    .machine_size = sizeof(struct machine),
    .graph_size = sizeof(struct moe_graph),
    .task_size = sizeof(struct task),
    .model_size = sizeof(struct moe_model),
    .open = host_open,
};
