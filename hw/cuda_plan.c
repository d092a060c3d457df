/* SPDX-License-Identifier: Apache-2.0
 * cuda_plan.c - turns a step's graph into operations on streams, and works out what each waits for.
 *
 * Tasks are taken in one order that is the same everywhere (host_order.h). A task becomes an operation on the stream
 * that the graph gives it, an exchange one on every rank's stream for exchanges. It waits for what the graph says and
 * for whatever wrote its rows; of each stream the last such operation is enough, and none that is waited for already.
 * Joins and arrivals are no operations: who waits for one waits for what it stands for. */
#include "config.h"

#include "cuda_rank.h"
#include "host_order.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

static int32_t n_streams(const struct cuda *c)
{
    return c->n_here * RANK_STREAMS;
}

static void need_op(struct cuda_plan *p, int32_t op)
{
    int32_t *need = &p->need[p->op[op].stream];
    *need = op > *need ? op : *need;
}

/* rank: whose streams count, or -1 for all. An exchange learns by receiving what other ranks had to wait for. */
static void need_task(struct cuda *c, const struct moe_graph *g, int32_t before, int32_t rank)
{
    struct cuda_plan *p = &c->plan;
    const struct task *t = &g->task[before];
    const int32_t place = rank < 0 ? -1 : rank - c->rank[0].rank;
    if (t->kind == TASK_JOIN) {
        for (int32_t s = 0; s < n_streams(c); s++) {
            const int32_t op = p->join[(int64_t)p->task_join[before] * n_streams(c) + s];
            if (op >= 0 && (place < 0 || s / RANK_STREAMS == place))
                need_op(p, op);
        }
        return;
    }
    const int32_t exchange = t->kind == TASK_ARRIVAL ? t->exchange : t->kind == TASK_EXCHANGE ? before : -1;
    for (int32_t i = 0; exchange >= 0 && i < c->n_here; i++)
        if ((t->kind != TASK_ARRIVAL || t->device == c->rank[i].rank) && (place < 0 || i == place))
            need_op(p, p->task_op[exchange] + i);
    if (exchange < 0 && p->task_op[before] >= 0 && (place < 0 || t->device == rank))
        need_op(p, p->task_op[before]);
}

static void need_before(struct cuda *c, const struct moe_graph *g, int32_t id, int32_t rank)
{
    const struct cuda_plan *p = &c->plan;
    for (int32_t s = 0; s < n_streams(c); s++)
        p->need[s] = -1;
    for (int64_t i = p->pred_first[id]; i < p->pred_first[id + 1]; i++)
        need_task(c, g, p->pred[i], rank);
}

static int32_t add_op(struct cuda *c, int32_t task, int32_t place, int32_t stream, struct err *e)
{
    struct cuda_plan *p = &c->plan;
    if (p->n_op >= INT32_MAX - 1 || !cuda_grow(&p->op, &p->room_op, p->n_op + 1, sizeof *p->op, e))
        return -1;
    p->op[p->n_op] = (struct cuda_op){ .task = task, .rank = place, .stream = place * RANK_STREAMS + stream,
                                       .first_act = (int32_t)p->n_act, .first_wait = (int32_t)p->n_wait,
                                       .first_transfer = (int32_t)p->n_transfer };
    return (int32_t)p->n_op++;
}

/* Its needs are known: what they come to, given what its stream has waited for before. */
static int end_op(struct cuda *c, int32_t id, struct err *e)
{
    struct cuda_plan *p = &c->plan;
    struct cuda_op *op = &p->op[id];
    int32_t *waited = p->waited + (int64_t)op->stream * n_streams(c);
    for (int32_t s = 0; s < n_streams(c) && !e->code; s++) {
        if (s == op->stream || p->need[s] <= waited[s])
            continue;
        waited[s] = p->need[s];
        if (cuda_grow(&p->wait, &p->room_wait, p->n_wait + 1, sizeof *p->wait, e))
            p->wait[p->n_wait++] = p->need[s];
    }
    op->n_acts = (int32_t)(p->n_act - op->first_act);
    op->n_waits = (int32_t)(p->n_wait - op->first_wait);
    op->n_transfers = (int32_t)(p->n_transfer - op->first_transfer);
    return e->code;
}

static int plan_op(struct cuda *c, const struct moe_graph *g, int32_t id, int32_t place, int32_t stream, struct err *e)
{
    const bool exchange = g->task[id].kind == TASK_EXCHANGE;
    need_before(c, g, id, exchange ? c->rank[place].rank : -1);
    const int32_t op = add_op(c, id, place, stream, e);
    if (op < 0 || cuda_plan_task(c, g, &c->rank[place], id, op, e) < 0)
        return e->code;
    return end_op(c, op, e);
}

static int plan_one(struct cuda *c, const struct moe_graph *g, int32_t id, struct err *e)
{
    struct cuda_plan *p = &c->plan;
    const struct task *t = &g->task[id];
    p->task_op[id] = p->task_join[id] = -1;
    switch (t->kind) {
    case TASK_ARRIVAL:
        break;
    case TASK_JOIN:
        need_before(c, g, id, -1);
        p->task_join[id] = p->n_joins++;
        memcpy(p->join + (int64_t)p->task_join[id] * n_streams(c), p->need, sizeof *p->need * (size_t)n_streams(c));
        break;
    case TASK_EXCHANGE:
        p->task_op[id] = (int32_t)p->n_op;
        for (int32_t i = 0; i < c->n_here && !e->code; i++)
            plan_op(c, g, id, i, COMM_STREAM, e);
        break;
    case TASK_COMPUTE:
    case TASK_EXPERTS:
    case TASK_LOAD: {
        const int32_t place = t->device - c->rank[0].rank;
        if (place < 0 || place >= c->n_here)
            break;
        p->task_op[id] = (int32_t)p->n_op;
        plan_op(c, g, id, place, t->stream, e);
        break;
    }
    }
    return e->code;
}

static void *fresh(void *old, size_t n, size_t size, struct err *e)
{
    free(old);
    void *p = calloc(n + 1, size);
    if (!p)
        err_set(e, ERR_MEMORY, "out of memory for a plan of %zu entries", n);
    return p;
}

/* Predecessors by task. */
static void list_before(struct cuda_plan *p, const struct moe_graph *g)
{
    for (int64_t i = 0; i < g->n_edges; i++)
        p->pred_first[g->edge[i].task + 1]++;
    for (int32_t i = 0; i < g->n_tasks; i++)
        p->pred_first[i + 1] += p->pred_first[i];
    for (int64_t i = g->n_edges - 1; i >= 0; i--) /* fills each list from its end; then first[i + 1] is its beginning */
        p->pred[--p->pred_first[g->edge[i].task + 1]] = g->edge[i].before;
    for (int32_t i = 0; i < g->n_tasks; i++)
        p->pred_first[i] = p->pred_first[i + 1];
    p->pred_first[g->n_tasks] = g->n_edges;
}

static int open_plan(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    struct cuda_plan *p = &c->plan;
    const size_t n = (size_t)g->n_tasks, s = (size_t)n_streams(c), here = (size_t)c->n_here;
    size_t joins = 0;
    for (size_t i = 0; i < n; i++)
        joins += g->task[i].kind == TASK_JOIN;
    p->n_op = p->n_act = p->n_transfer = p->n_wait = p->n_index = p->n_experts = p->n_expert = p->n_plain = 0;
    p->n_joins = 0;
    p->sequence = fresh(p->sequence, n, sizeof *p->sequence, e);
    p->task_op = fresh(p->task_op, n, sizeof *p->task_op, e);
    p->task_join = fresh(p->task_join, n, sizeof *p->task_join, e);
    p->join = fresh(p->join, joins * s, sizeof *p->join, e);
    p->need = fresh(p->need, s, sizeof *p->need, e);
    p->waited = fresh(p->waited, s * s, sizeof *p->waited, e);
    p->pred = fresh(p->pred, (size_t)g->n_edges, sizeof *p->pred, e);
    p->pred_first = fresh(p->pred_first, n + 1, sizeof *p->pred_first, e);
    p->packed = fresh(p->packed, n * here, sizeof *p->packed, e);
    p->experts_left = fresh(p->experts_left, n * here, sizeof *p->experts_left, e);
    graph_order_free(&p->order);
    if (e->code || graph_order(g, &p->order, e) < 0)
        return e->code;
    memset(p->waited, 0xff, s * s * sizeof *p->waited);
    list_before(p, g);
    host_sequence(g, &p->order, p->sequence);
    for (int64_t i = 0; i < g->n_edges; i++) {
        const struct task *t = &g->task[g->edge[i].before];
        if (t->kind == TASK_EXPERTS && g->task[g->edge[i].task].kind == TASK_JOIN)
            for (size_t r = 0; r < here; r++)
                p->experts_left[r * n + (size_t)g->edge[i].task] += t->device == c->rank[r].rank;
    }
    for (size_t r = 0; r < here; r++) {
        c->rank[r].send_rows = host_place_sends(g, &p->order, p->sequence, c->rank[r].rank, NULL,
                                                c->rank[r].send_at, p->packed + r * n);
        memset(p->packed + r * n, 0, n * sizeof *p->packed);
        if (c->pad.on)
            cuda_plan_sends(c, g, &c->rank[r], e);
    }
    return e->code;
}

int cuda_plan(struct cuda *c, const struct moe_graph *g, struct err *e)
{
    struct cuda_plan *p = &c->plan;
    if (cuda_pad_begin(&c->pad, g, e) < 0 || open_plan(c, g, e) < 0)
        return e->code;
    for (int32_t i = 0; i < g->n_tasks && !e->code; i++)
        plan_one(c, g, p->sequence[i], e);
    for (int32_t i = 0; i < c->n_here && !e->code; i++) { /* outputs that no task of the graph has combined */
        for (int32_t s = 0; s < n_streams(c); s++)
            p->need[s] = -1;
        const int32_t op = add_op(c, -1, i, 0, e);
        if (op >= 0 && cuda_plan_end(c, g, &c->rank[i], op, e) == 0)
            end_op(c, op, e);
    }
    return e->code;
}

void cuda_plan_free(struct cuda_plan *p)
{
    void *const all[] = { p->sequence, p->task_op, p->task_join, p->join, p->op, p->act, p->transfer, p->wait, p->index,
                          p->experts, p->expert, p->plain, p->need, p->waited, p->pred, p->pred_first, p->packed,
                          p->experts_left };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    graph_order_free(&p->order);
}
