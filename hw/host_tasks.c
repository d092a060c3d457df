/* SPDX-License-Identifier: Apache-2.0
 * host_tasks.c - what a rank does in each task of its own, and in exchanges.
 *
 * Rows are put in order for sending by the permute or experts task that an exchange waits for, as on a GPU, or by the
 * exchange itself where a layout has no such task or passes on what comes in only then. */
#include "config.h"

#include "host_rank.h"
#include "host_model.h"
#include "host_need.h"
#include "host_order.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a route brings to its token, after the n terms so far, or nothing if another brought it; false: not here. */
static bool add_term(const struct host *h, const struct moe_graph *g, int64_t r, const float **row, float *weight,
                     int64_t *n)
{
    const int64_t at = h->route_row[r];
    if (at >= 0 || at <= ROUTE_SUM) {
        row[*n] = row_at(h, at >= 0 ? at : ROUTE_SUM - at);
        weight[(*n)++] = at >= 0 ? g->route[r].weight : 1;
    }
    return at != ROUTE_NOT_HERE;
}

/* The token's hidden state after a layer, if all its experts' outputs are here; entering the next layer, it is one
 * more row. False: something is still missing. */
bool host_combine(struct host *h, const struct moe_graph *g, int32_t layer, int32_t token)
{
    const int32_t d = h->model->d_model;
    const int64_t *before = token_row(h, g, layer, token);
    int64_t *after = token_row(h, g, layer + 1, token);
    int64_t first = route_of(h, g, layer, token), end = route_of(h, g, layer, token + 1);
    if (*after >= 0)
        return true;
    if (*before < 0 && (layer == 0 || !host_combine(h, g, layer - 1, token)))
        return false;
    const float *row[end - first + 1];
    float weight[end - first + 1];
    int64_t n = 0;
    for (int64_t r = first; r < end; r++)
        if (g->route[r].expert < h->model->n_experts && !add_term(h, g, r, row, weight, &n))
            return false;
    *after = (int64_t)h->n_rows++;
    host_add_rows(row_at(h, *after), row_at(h, *before), n, row, weight, d);
    host_normalise(row_at(h, *after), d);
    return true;
}

/* The row that an item of a layer means, or -1. */
static int64_t row_of(const struct host *h, const struct moe_graph *g, const struct task *t, enum moe_payload payload,
                      int64_t item)
{
    int64_t r = g->route_first[t->layer] + item;
    return payload == MOE_PAY_OUTPUT ? h->route_row[r] : *token_row(h, g, t->layer, g->route[r].token);
}

/* One expert's FFN over `rows` gathered rows: gate, up, activation, down. */
static void run_expert(struct host *h, int64_t rows, int32_t width, const float *weights, float *out)
{
    const int64_t d = h->model->d_model;
    const float *w1 = weights, *w3 = w1 + d * width, *w2 = w3 + d * width;
    host_gemm(rows, width, d, h->gathered.data, w1, h->gate.data);
    host_gemm(rows, width, d, h->gathered.data, w3, h->up.data);
    host_activate(h->gate.data, h->up.data, rows * width);
    host_gemm(rows, d, width, h->gate.data, w2, out);
}

static int run_experts(struct host *h, const struct moe_graph *g, const struct task *t, struct err *e)
{
    const size_t d = (size_t)h->model->d_model;
    const int64_t *item = g->item + t->first_item;
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const int64_t n = g->rows[i];
        if (n == 0)
            continue;
        float *out = row_at(h, (int64_t)h->n_rows);
        for (int64_t j = 0; j < n; j++, item++) {
            int64_t row = row_of(h, g, t, MOE_PAY_HIDDEN, *item);
            if (row < 0)
                return err_set(e, ERR_RUN, "rank %d, layer %d: route %lld is computed before its token is here",
                               h->rank, t->layer, (long long)*item);
            memcpy(h->gathered.data + (size_t)j * d, row_at(h, row), sizeof(float) * d);
            h->route_row[g->route_first[t->layer] + *item] = (int64_t)h->n_rows++;
        }
        run_expert(h, n, host_width(h->model, t->layer, g->expert[i]), h->expert_weights[i], out);
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

/* Rows that an exchange sends from here to each rank, and gets: [n_ranks] each. */
static void count_rows(const struct host *h, const struct moe_graph *g, int32_t id, int *n_out, int *n_in)
{
    const struct task *t = &g->task[id];
    memset(n_out, 0, sizeof *n_out * (size_t)h->n_ranks);
    memset(n_in, 0, sizeof *n_in * (size_t)h->n_ranks);
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &g->part[i];
        if (p->src == p->dst && !h->sums[id])
            continue;
        const int n = p->src == h->rank || p->dst == h->rank ? (int)host_part_rows(g, t, i, h->sums[id]) : 0;
        n_out[p->dst] += p->src == h->rank ? n : 0;
        n_in[p->src] += p->dst == h->rank ? n : 0;
    }
}

static bool pack_row(struct host *h, const struct moe_graph *g, const struct task *t, int64_t item, float *to)
{
    const int64_t row = row_of(h, g, t, t->payload, item);
    if (row >= 0)
        memcpy(to, row_at(h, row), sizeof(float) * (size_t)h->model->d_model);
    return row >= 0;
}

/* What some routes of a token bring, added up in `to`; false: some is not here. */
static bool pack_sum(const struct host *h, const struct moe_graph *g, int64_t first, const int64_t *item, int64_t items,
                     float *to)
{
    const float *row[items];
    float weight[items];
    int64_t n = 0;
    for (int64_t j = 0; j < items; j++)
        if (!add_term(h, g, first + item[j], row, weight, &n))
            return false;
    host_add_rows(to, NULL, n, row, weight, h->model->d_model); /* of none: other items bring it */
    return true;
}

/* Copies what exchange `id` sends from here into its place in the send buffer, in order of destination and, between a
 * pair of ranks, of parts and items, which both sides know; behind it, as on a GPU, what stays, which nobody sends.
 * Sums that stay are sent as well: they go through the queues of the others. The first route whose row is not here
 * yet, or -1. */
static int64_t pack(struct host *h, const struct moe_graph *g, int32_t id)
{
    const struct task *t = &g->task[id];
    const size_t d = (size_t)h->model->d_model;
    int *n_out = h->count, *out_at = n_out + h->n_ranks, *n_in = out_at + h->n_ranks;
    float *to = h->send.data + h->send_at[id] * d;
    count_rows(h, g, id, n_out, n_in);
    const int all = displace(n_out, h->n_ranks, out_at);
    out_at[h->rank] = h->sums[id] ? out_at[h->rank] : all;
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &g->part[i];
        const int64_t *item = g->item + g->part_item[i];
        for (int64_t j = 0, n; p->src == h->rank && j < p->n_items; j += n) {
            float *place = to + (size_t)out_at[p->dst]++ * d;
            n = host_row_items(g, t, i, j, h->sums[id]);
            if (h->sums[id] ? !pack_sum(h, g, g->route_first[t->layer], item + j, n, place)
                            : !pack_row(h, g, t, item[j], place))
                return item[j];
        }
    }
    h->packed[id] = true;
    return -1;
}

static int exchange_rows(struct host *h, const struct moe_graph *g, int32_t id, struct err *e)
{
    const struct task *t = &g->task[id];
    const size_t d = (size_t)h->model->d_model;
    int *n_out = h->count, *out_at = n_out + h->n_ranks, *n_in = out_at + h->n_ranks, *in_at = n_in + h->n_ranks;
    const int64_t missing = h->packed[id] ? -1 : pack(h, g, id);
    if (missing >= 0)
        return err_set(e, ERR_RUN, "rank %d, layer %d: route %lld is sent before its %s is here", h->rank, t->layer,
                       (long long)missing, t->payload == MOE_PAY_OUTPUT ? "output" : "token");
    count_rows(h, g, id, n_out, n_in);
    displace(n_out, h->n_ranks, out_at);
    const int n_new = displace(n_in, h->n_ranks, in_at);
    MPI_Alltoallv(h->send.data + h->send_at[id] * d, n_out, out_at, h->row, row_at(h, (int64_t)h->n_rows), n_in, in_at,
                  h->row, MPI_COMM_WORLD);
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &g->part[i];
        const int64_t *item = g->item + g->part_item[i];
        for (int64_t j = 0, n; p->dst == h->rank && (p->src != h->rank || h->sums[id]) && j < p->n_items; j += n) {
            int64_t r = g->route_first[t->layer] + item[j], row = (int64_t)h->n_rows + in_at[p->src]++;
            n = host_row_items(g, t, i, j, h->sums[id]);
            if (t->payload != MOE_PAY_OUTPUT)
                *token_row(h, g, t->layer, g->route[r].token) = row;
            else
                h->route_row[r] = h->sums[id] ? ROUTE_SUM - row : row;
            for (int64_t k = 1; k < n; k++)
                h->route_row[g->route_first[t->layer] + item[j + k]] = ROUTE_IN_SUM;
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

/* Puts in order what the exchanges that wait for this task send, as far as it is here; false: there is nothing. */
static bool permute(struct host *h, const struct moe_graph *g, int32_t id)
{
    bool any = false;
    for (int64_t i = h->order.first[id]; i < h->order.first[id + 1]; i++) {
        const struct task *x = &g->task[h->order.next[i]];
        if (x->kind == TASK_EXCHANGE && x->payload != MOE_PAY_BYTES && !h->packed[h->order.next[i]])
            any |= pack(h, g, h->order.next[i]) < 0;
    }
    return any;
}

/* After experts, of which offload may have made several tasks that a join brings together. */
static void outputs(struct host *h, const struct moe_graph *g, int32_t id)
{
    permute(h, g, id);
    for (int64_t i = h->order.first[id]; i < h->order.first[id + 1]; i++) {
        const int32_t next = h->order.next[i];
        if (g->task[next].kind == TASK_JOIN && --h->experts_left[next] == 0)
            permute(h, g, next);
    }
}

/* Adds up the outputs that leave after a combine task, in the exchanges after it whose rows are all here by now. */
static void sum_outputs(struct host *h, const struct moe_graph *g, int32_t id)
{
    for (int64_t i = h->order.first[id]; i < h->order.first[id + 1]; i++) {
        const int32_t next = h->order.next[i];
        const bool carries = g->task[next].kind == TASK_EXCHANGE && h->sums[next];
        if ((carries && !h->packed[next] && pack(h, g, next) < 0) || g->task[next].kind == TASK_JOIN)
            sum_outputs(h, g, next);
    }
}

static int run_compute(struct host *h, const struct moe_graph *g, int32_t id)
{
    const struct task *t = &g->task[id];
    if (t->op == MOE_OP_COMBINE) {
        if (h->sums[id])
            sum_outputs(h, g, id);
        else
            for (int32_t i = 0; i < h->n_own; i++)
                host_combine(h, g, t->layer, h->own[i]);
        return 0;
    }
    if (t->op == MOE_OP_PERMUTE && permute(h, g, id))
        return 0;
    for (int32_t i = t->first; t->listed && i < t->first + t->n; i++)
        host_run_kernel(&h->rings, &g->kernel[i]);
    if (!t->listed)
        host_run_plain(&h->rings, t->flops, t->bytes);
    return 0;
}

int host_run_task(struct host *h, const struct moe_graph *g, int32_t id, struct err *e)
{
    const struct task *t = &g->task[id];
    switch (t->kind) {
    case TASK_EXPERTS: /* outputs leave in the order in which they are sent, if nothing else comes before that */
        if (run_experts(h, g, t, e) == 0)
            outputs(h, g, id);
        return e->code;
    case TASK_EXCHANGE: /* a layout may leave out combining tokens that went nowhere */
        for (int32_t i = 0; t->payload == MOE_PAY_HIDDEN && t->layer > 0 && !h->packed[id] && i < h->n_own; i++)
            host_combine(h, g, t->layer - 1, h->own[i]);
        return t->payload == MOE_PAY_BYTES ? exchange_bytes(h, g, t, e) : exchange_rows(h, g, id, e);
    case TASK_COMPUTE:
        return run_compute(h, g, id);
    case TASK_ARRIVAL:
    case TASK_LOAD:
    case TASK_JOIN:
        break;
    }
    return 0;
}
