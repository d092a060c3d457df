/* SPDX-License-Identifier: Apache-2.0
 * host_order.c - see host_order.h. */
#include "config.h"

#include "host_order.h"

#include <string.h>

void host_sequence(const struct moe_graph *g, struct graph_order *o, int32_t *sequence)
{
    int32_t n = 0;
    for (int32_t i = 0; i < g->n_tasks; i++)
        if (o->n_before[i] == 0)
            sequence[n++] = i;
    for (int32_t i = 0; i < n; i++)
        for (int64_t j = o->first[sequence[i]]; j < o->first[sequence[i] + 1]; j++)
            if (--o->n_before[o->next[j]] == 0)
                sequence[n++] = o->next[j];
}

/* With those that stay. */
static size_t rows_sent(const struct moe_graph *g, const struct task *t, int32_t rank)
{
    size_t n = 0;
    for (int32_t i = t->first; i < t->first + t->n; i++)
        n += g->part[i].src == rank ? (size_t)g->part[i].n_items : 0;
    return n;
}

/* What waits lies one behind another; when nothing waits, the buffer is empty. */
struct buffer { size_t end, most; int32_t n_waiting; };

static void put(const struct moe_graph *g, int32_t exchange, int32_t rank, struct buffer *b, size_t *at, bool *packed)
{
    if (packed[exchange])
        return;
    packed[exchange] = true;
    if (at)
        at[exchange] = b->end;
    b->n_waiting++;
    b->end += rows_sent(g, &g->task[exchange], rank);
    b->most = b->end > b->most ? b->end : b->most;
}

static bool carries_rows(const struct task *t)
{
    return t->kind == TASK_EXCHANGE && t->payload != MOE_PAY_BYTES;
}

/* What waits for a task, or for joins after it: some experts of a device may be tasks of their own. */
static void put_next(const struct moe_graph *g, const struct graph_order *o, int32_t id, bool joins, int32_t rank,
                     struct buffer *b, size_t *at, bool *packed)
{
    for (int64_t i = o->first[id]; i < o->first[id + 1]; i++) {
        const int32_t next = o->next[i];
        if (carries_rows(&g->task[next]))
            put(g, next, rank, b, at, packed);
        else if (joins && g->task[next].kind == TASK_JOIN)
            put_next(g, o, next, false, rank, b, at, packed);
    }
}

size_t host_place_sends(const struct moe_graph *g, const struct graph_order *o, const int32_t *sequence, int32_t rank,
                        size_t *at, bool *packed)
{
    struct buffer b = { 0, 0, 0 };
    memset(packed, 0, sizeof *packed * (size_t)g->n_tasks);
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const int32_t id = sequence[i];
        const struct task *t = &g->task[id];
        const bool packs = t->kind == TASK_EXPERTS || (t->kind == TASK_COMPUTE && t->op == MOE_OP_PERMUTE);
        if (packs && t->device == rank)
            put_next(g, o, id, t->kind == TASK_EXPERTS, rank, &b, at, packed);
        if (!carries_rows(t))
            continue;
        put(g, id, rank, &b, at, packed);
        if (--b.n_waiting == 0)
            b.end = 0;
    }
    return b.most;
}
