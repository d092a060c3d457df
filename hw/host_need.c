/* SPDX-License-Identifier: Apache-2.0
 * host_need.c - see host_need.h. */
#include "config.h"

#include "host_kernels.h"
#include "host_need.h"
#include "host_model.h"
#include "host_order.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One rank's process before it holds anything: what is private to it (5 MB measured with Open MPI 4.1 and OpenBLAS
 * 0.3), and the libraries that all of them share (14 MB). MPI keeps shared memory for each pair of ranks that has
 * talked: 0.2 MB measured. */
#define PROCESS_BYTES 8e6
#define LIBRARY_BYTES 20e6
#define PAIR_BYTES 0.25e6
/* The allocator's own bytes, and what MPI holds of a message on its way. */
#define SLACK 1.05

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static double expert_bytes(const struct moe_model *m, int32_t layer, int32_t expert)
{
    return (double)host_taken(3 * sizeof(float) * (size_t)m->d_model * (size_t)host_width(m, layer, expert));
}

static void count_exchange(const struct moe_graph *g, const struct task *t, bool sums, struct host_step *count)
{
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &g->part[i];
        if (p->src == p->dst && !sums)
            continue;
        if (t->payload == MOE_PAY_BYTES)
            count[p->dst].piece += fmin(p->bytes, HOST_PIECE);
        else
            count[p->dst].rows += (size_t)host_part_rows(g, t, i, sums);
    }
}

static int count_exchanges(const struct moe_graph *g, int32_t n_ranks, struct host_step *count, struct err *e)
{
    const size_t n = (size_t)g->n_tasks + 1;
    struct graph_order order = { 0 };
    int32_t *sequence = malloc(n * sizeof *sequence);
    bool *packed = malloc(n * sizeof *packed), *sums = malloc(n * sizeof *sums);
    if (!sequence || !packed || !sums)
        err_set(e, ERR_MEMORY, "out of memory for %zu tasks", n);
    else if (graph_order(g, &order, e) == 0) {
        host_sequence(g, &order, sequence);
        host_find_sums(g, &order, sequence, sums);
        for (int32_t id = 0; id < g->n_tasks; id++)
            if (g->task[id].kind == TASK_EXCHANGE)
                count_exchange(g, &g->task[id], sums[id], count);
        for (int32_t r = 0; r < n_ranks; r++)
            count[r].sent = host_place_sends(g, &order, sequence, r, sums, NULL, packed);
    }
    graph_order_free(&order);
    free(sequence);
    free(packed);
    free(sums);
    return e->code;
}

int host_count(const struct moe_model *m, const struct moe_graph *g, int32_t n_ranks, struct host_step *count,
               struct err *e)
{
    memset(count, 0, sizeof *count * (size_t)n_ranks);
    for (int32_t t = 0; t < g->n_tokens; t++)
        count[g->token_device[t]].n_own++;
    for (int32_t r = 0; r < n_ranks; r++) {
        count[r].rows = count[r].n_own * ((size_t)m->n_layers + 1);
        count[r].rings = host_rings_room(g, r);
    }
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        for (int32_t i = 0; t->kind == TASK_EXPERTS && i < t->n; i++) {
            struct host_step *c = &count[t->device];
            size_t rows = (size_t)g->rows[t->first + i];
            c->rows += rows;
            c->gathered = larger(c->gathered, rows);
            c->hidden = larger(c->hidden, rows * (size_t)host_width(m, t->layer, g->expert[t->first + i]));
        }
    }
    if (count_exchanges(g, n_ranks, count, e) < 0)
        return e->code;
    for (int32_t r = 0; r < n_ranks; r++)
        count[r].piece = fmin(count[r].piece, (double)HOST_PIECE * n_ranks);
    return 0;
}

int host_need_open(struct host_need *n, const struct moe_model *m, int32_t n_ranks, int32_t n_tokens, bool verify,
                   struct err *e)
{
    const size_t ranks = (size_t)n_ranks, n_objects = (size_t)m->n_layers * (size_t)m->n_experts;
    *n = (struct host_need){ .model = m, .n_ranks = n_ranks, .verify = verify };
    n->held = calloc(ranks * n_objects / 8 + 1, 1);
    n->most = calloc(ranks, sizeof *n->most);
    n->step = calloc(ranks, sizeof *n->step);
    n->kept = calloc(ranks, sizeof *n->kept);
    n->passing = calloc(ranks, sizeof *n->passing);
    if (!n->held || !n->most || !n->step || !n->kept || !n->passing)
        return err_set(e, ERR_MEMORY, "out of memory for %zu ranks", ranks);
    for (size_t r = 0; r < ranks; r++) {
        n->most[r].n_own = (size_t)n_tokens * (r + 1) / ranks - (size_t)n_tokens * r / ranks;
        n->most[r].rows = n->most[r].n_own * ((size_t)m->n_layers + 1);
    }
    n->tables = 8.0 * ((2.0 * m->n_layers + 1) * n_tokens + (double)n_objects);
    return 0;
}

static void count_weights(struct host_need *n, const struct moe_graph *g, const struct task *t)
{
    const struct moe_model *m = n->model;
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const int32_t expert = g->expert[i];
        if (expert >= m->n_experts) /* costs nothing, and a rank refuses to run it */
            continue;
        size_t bit = ((size_t)t->device * (size_t)m->n_layers + (size_t)t->layer) * (size_t)m->n_experts +
                     (size_t)expert;
        if (n->held[bit / 8] >> (bit % 8) & 1)
            continue;
        double bytes = expert_bytes(m, t->layer, expert);
        n->held[bit / 8] |= (unsigned char)(1u << (bit % 8));
        n->n_experts++;
        n->weights += bytes;
        n->widest = fmax(n->widest, bytes);
    }
}

/* Tables by token, by route and by task: token_row, route_of, place; route_row; sequence, time, brings, send_at,
 * packed, sums, experts_left and graph_order(); by entry of experts. */
static double table_bytes(const struct moe_model *m, const struct moe_graph *g)
{
    double layers = m->n_layers, tokens = g->n_tokens, tasks = g->n_tasks;
    return 8 * ((2 * layers + 1) * tokens + layers + tokens) + 8.0 * (double)g->route_first[g->n_route_layers] +
           (4 + 16 + 4 + 8 + 2 + 4 + 8 + 4) * tasks + 8.0 * g->n_experts + 4.0 * ((double)g->n_edges + tasks) +
           8 * layers * m->n_experts;
}

/* A load without a victim takes one more slot for good; what passes has one until its layer is over. */
static void count_loads(struct host_need *n, const struct moe_graph *g)
{
    int64_t in_layer[n->n_ranks];
    int32_t layer = -1;
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        if (t->kind != TASK_LOAD)
            continue;
        if (t->layer != layer)
            memset(in_layer, 0, sizeof in_layer);
        layer = t->layer;
        n->offloads = true;
        n->kept[t->device] += t->victim == NO_OBJECT && !t->passes;
        in_layer[t->device] += t->passes;
        if (in_layer[t->device] > n->passing[t->device])
            n->passing[t->device] = in_layer[t->device];
    }
}

int host_need_step(struct host_need *n, const struct moe_graph *g, struct err *e)
{
    if (!n->counted) /* what was there is a first idea of this */
        memset(n->most, 0, sizeof *n->most * (size_t)n->n_ranks);
    n->counted = true;
    if (host_count(n->model, g, n->n_ranks, n->step, e) < 0)
        return e->code;
    for (int32_t r = 0; r < n->n_ranks; r++) {
        struct host_step *most = &n->most[r];
        const struct host_step *s = &n->step[r];
        most->n_own = larger(most->n_own, s->n_own);
        most->rows = larger(most->rows, s->rows);
        most->sent = larger(most->sent, s->sent);
        most->gathered = larger(most->gathered, s->gathered);
        most->hidden = larger(most->hidden, s->hidden);
        most->piece = fmax(most->piece, s->piece);
        most->rings = (struct host_room){ larger(most->rings.in, s->rings.in), larger(most->rings.out, s->rings.out) };
    }
    count_loads(n, g);
    for (int32_t id = 0; id < g->n_tasks; id++)
        if (g->task[id].kind == TASK_EXPERTS)
            count_weights(n, g, &g->task[id]);
    n->tables = fmax(n->tables, table_bytes(n->model, g));
    return 0;
}

void host_need_bytes(const struct host_need *n, double own, struct host_bytes *b)
{
    const double row = (double)sizeof(float) * n->model->d_model, ranks = n->n_ranks;
    *b = (struct host_bytes){ .weights = n->offloads ? ranks * n->widest : n->weights };
    for (int32_t r = 0; r < n->n_ranks; r++) {
        const struct host_step *s = &n->most[r];
        b->weights += n->offloads ? (double)(n->kept[r] + n->passing[r]) * n->widest : 0;
        b->rows += (double)s->rows * row;
        b->buffers += (double)(s->sent + s->gathered) * row + 2.0 * sizeof(float) * (double)s->hidden;
        b->buffers += sizeof(float) * (double)(s->rings.in + s->rings.out);
        b->buffers += s->piece > 0 ? s->piece + HOST_PIECE : 0;
        if (n->verify) /* inputs as floats, outputs as doubles, one expert's weights made anew */
            b->buffers += 3 * row * (double)s->n_own + n->widest;
    }
    b->processes = LIBRARY_BYTES + ranks * (PROCESS_BYTES + PAIR_BYTES * (ranks - 1) + n->tables + own);
    b->sum = SLACK * (b->weights + b->rows + b->buffers + b->processes);
}

void host_need_close(struct host_need *n)
{
    free(n->held);
    free(n->kept);
    free(n->passing);
    free(n->most);
    free(n->step);
    *n = (struct host_need){ 0 };
}
