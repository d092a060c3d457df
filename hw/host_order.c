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

static bool brings_outputs(const struct task *t)
{
    return t->kind == TASK_EXCHANGE && t->payload == MOE_PAY_OUTPUT;
}

/* Tasks that only wait: sums go through. */
static bool is_meeting(const struct task *t)
{
    return t->kind == TASK_JOIN || t->kind == TASK_ARRIVAL;
}

static bool outputs_leave(const struct moe_graph *g, const struct graph_order *o, int32_t id)
{
    for (int64_t i = o->first[id]; i < o->first[id + 1]; i++) {
        const struct task *next = &g->task[o->next[i]];
        if (brings_outputs(next) || (is_meeting(next) && outputs_leave(g, o, o->next[i])))
            return true;
    }
    return false;
}

void host_find_sums(const struct moe_graph *g, const struct graph_order *o, const int32_t *sequence, bool *sums)
{
    memset(sums, 0, sizeof *sums * (size_t)g->n_tasks);
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const int32_t id = sequence[i];
        const struct task *t = &g->task[id];
        if (t->kind == TASK_COMPUTE && t->op == MOE_OP_COMBINE)
            sums[id] = outputs_leave(g, o, id);
        for (int64_t j = o->first[id]; sums[id] && j < o->first[id + 1]; j++)
            sums[o->next[j]] |= brings_outputs(&g->task[o->next[j]]) || is_meeting(&g->task[o->next[j]]);
    }
}

int64_t host_row_items(const struct moe_graph *g, const struct task *t, int32_t part, int64_t from, bool sums)
{
    const int64_t *item = g->item + g->part_item[part], n = g->part[part].n_items;
    const struct graph_route *route = g->route + g->route_first[t->layer];
    int64_t end = from + 1;
    while (sums && end < n && route[item[end]].token == route[item[from]].token)
        end++;
    return end - from;
}

int64_t host_part_rows(const struct moe_graph *g, const struct task *t, int32_t part, bool sums)
{
    int64_t n = 0;
    if (!sums)
        return g->part[part].n_items;
    for (int64_t j = 0; j < g->part[part].n_items; j += host_row_items(g, t, part, j, true))
        n++;
    return n;
}

/* With those that stay. */
static size_t rows_sent(const struct moe_graph *g, const struct task *t, int32_t rank, bool sums)
{
    size_t n = 0;
    for (int32_t i = t->first; i < t->first + t->n; i++)
        if (g->part[i].src == rank)
            n += (size_t)host_part_rows(g, t, i, sums);
    return n;
}

/* What waits lies one behind another; when nothing waits, the buffer is empty. */
struct buffer { const bool *sums; size_t end, most; int32_t n_waiting; };

static void put(const struct moe_graph *g, int32_t exchange, int32_t rank, struct buffer *b, size_t *at, bool *packed)
{
    if (packed[exchange])
        return;
    packed[exchange] = true;
    if (at)
        at[exchange] = b->end;
    b->n_waiting++;
    b->end += rows_sent(g, &g->task[exchange], rank, b->sums && b->sums[exchange]);
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

/* Sums of outputs that leave after a task, as far as some of them may be here by then. */
static void put_sums(const struct moe_graph *g, const struct graph_order *o, int32_t id, int32_t rank,
                     struct buffer *b, size_t *at, bool *packed)
{
    for (int64_t i = o->first[id]; i < o->first[id + 1]; i++) {
        const int32_t next = o->next[i];
        const bool carries = brings_outputs(&g->task[next]), new = carries && !packed[next];
        if (carries)
            put(g, next, rank, b, at, packed);
        if (new || g->task[next].kind == TASK_JOIN)
            put_sums(g, o, next, rank, b, at, packed);
    }
}

size_t host_place_sends(const struct moe_graph *g, const struct graph_order *o, const int32_t *sequence, int32_t rank,
                        const bool *sums, size_t *at, bool *packed)
{
    struct buffer b = { sums, 0, 0, 0 };
    memset(packed, 0, sizeof *packed * (size_t)g->n_tasks);
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const int32_t id = sequence[i];
        const struct task *t = &g->task[id];
        const bool packs = t->kind == TASK_EXPERTS || (t->kind == TASK_COMPUTE && t->op == MOE_OP_PERMUTE);
        if (packs && t->device == rank)
            put_next(g, o, id, t->kind == TASK_EXPERTS, rank, &b, at, packed);
        else if (sums && sums[id] && t->kind == TASK_COMPUTE && t->device == rank)
            put_sums(g, o, id, rank, &b, at, packed);
        if (!carries_rows(t))
            continue;
        put(g, id, rank, &b, at, packed);
        if (--b.n_waiting == 0)
            b.end = 0;
    }
    return b.most;
}

static uint64_t mix(uint64_t h, uint64_t v)
{
    return moe_mix(h ^ v) + UINT64_C(0x9E3779B97F4A7C15);
}

static uint64_t mix_real(uint64_t h, double v)
{
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    return mix(h, bits);
}

/* Field by field: structures have holes. */
uint64_t host_graph_hash(const struct moe_graph *g)
{
    uint64_t h = mix(mix(0, (uint64_t)g->n_tasks), (uint64_t)g->n_parts);
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const struct task *t = &g->task[i];
        const int64_t whole[] = { t->kind, t->op, t->payload, t->device, t->stream, t->layer, t->micro, t->exchange,
                                  t->source, t->object, t->victim, t->passes, t->first, t->n, t->first_item,
                                  t->n_items };
        for (size_t j = 0; j < sizeof whole / sizeof *whole; j++)
            h = mix(h, (uint64_t)whole[j]);
        h = mix_real(mix_real(mix_real(h, t->flops), t->bytes), (double)t->fraction);
    }
    for (int64_t i = 0; i < g->n_edges; i++)
        h = mix(mix(h, (uint64_t)g->edge[i].before), (uint64_t)g->edge[i].task);
    for (int32_t i = 0; i < g->n_parts; i++) {
        const struct moe_part *p = &g->part[i];
        h = mix(mix(mix(mix(h, (uint64_t)p->src), (uint64_t)p->dst), (uint64_t)p->n_items),
                (uint64_t)g->part_item[i]);
        h = mix_real(h, p->bytes);
    }
    for (int32_t i = 0; i < g->n_experts; i++)
        h = mix(mix(h, (uint64_t)g->expert[i]), (uint64_t)g->rows[i]);
    for (int64_t i = 0; i < g->n_items; i++)
        h = mix(h, (uint64_t)g->item[i]);
    for (int64_t i = 0; i < g->route_first[g->n_route_layers]; i++) {
        h = mix(mix(h, (uint64_t)g->route[i].token), (uint64_t)g->route[i].expert);
        h = mix_real(h, (double)g->route[i].weight);
    }
    for (int32_t i = 0; i < g->n_tokens; i++)
        h = mix(h, (uint64_t)g->token_device[i]);
    return h;
}
