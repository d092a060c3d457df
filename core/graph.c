/* SPDX-License-Identifier: Apache-2.0
 * graph.c - building and ordering task graphs. */
#include "config.h"

#include "graph.h"
#include "memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void graph_reset(struct moe_graph *g)
{
    g->n_tasks = g->n_parts = g->n_experts = g->n_kernels = g->n_sums = 0;
    g->n_edges = g->n_items = g->n_sides = 0;
    g->layer = g->micro = 0;
    g->pass = PASS_FORWARD;
    g->names_paths = false;
    g->n_route_layers = g->n_score_layers = g->n_tokens = 0;
    memset(g->last_list, 0, sizeof g->last_list);
}

void graph_free(struct moe_graph *g)
{
    free(g->task);
    free(g->edge);
    free(g->part);
    free(g->part_item);
    free(g->sum);
    free(g->side);
    free(g->expert);
    free(g->rows);
    free(g->kernel);
    free(g->item);
    free(g->route);
    free(g->route_first);
    free(g->score);
    free(g->token_device);
    memset(g, 0, sizeof *g);
}

/* Room for `need` elements of `bytes` each; doubles. */
static int reserve(void **array, int64_t *room, int64_t need, size_t bytes, struct err *e)
{
    if (need <= *room)
        return 0;
    int64_t grown = *room ? *room : 64;
    while (grown < need)
        grown *= 2;
    void *p = realloc(*array, (size_t)grown * bytes);
    if (!p)
        return err_set(e, ERR_MEMORY, "out of memory for the task graph");
    *array = memory_large(p, (size_t)grown * bytes);
    *room = grown;
    return 0;
}

#define RESERVE(array, room, need, e)                                                                                 \
    do {                                                                                                              \
        int64_t room_ = (room);                                                                                       \
        void *p_ = (array);                                                                                           \
        if (reserve(&p_, &room_, (need), sizeof *(array), e) < 0)                                                     \
            return ERR_MEMORY;                                                                                        \
        (array) = p_;                                                                                                 \
        (room) = (__typeof__(room))room_;                                                                             \
    } while (0)

static int32_t add(struct moe_graph *g, const struct task *t, struct err *e)
{
    RESERVE(g->task, g->room_tasks, (int64_t)g->n_tasks + 1, e);
    g->task[g->n_tasks] = *t;
    g->task[g->n_tasks].layer = g->layer;
    g->task[g->n_tasks].micro = g->micro;
    g->task[g->n_tasks].pass = g->pass;
    g->task[g->n_tasks].sum = g->task[g->n_tasks].load = -1;
    return g->n_tasks++;
}

/* Where policies put work: streams from STREAM_COPY on are the core's. */
static int check_place(const struct moe_graph *g, int32_t device, int32_t stream, struct err *e)
{
    if (device < 0 || device >= g->n_devices)
        return err_set(e, ERR_RUN, "task on device %d, expected 0 to %d", device, g->n_devices - 1);
    if (stream < 0 || stream >= STREAM_COPY)
        return err_set(e, ERR_RUN, "task on stream %d, expected 0 to %d", stream, STREAM_COPY - 1);
    return 0;
}

static int check_fused(bool fused, struct err *e)
{
    return fused ? err_set(e, ERR_RUN, "fused task: this version's machines model kernels of their own alone") : 0;
}

int32_t graph_compute(struct moe_graph *g, const struct moe_work *w, struct err *e)
{
    if (check_place(g, w->device, w->stream, e) < 0)
        return ERR_RUN;
    if (check_fused(w->fused, e) < 0)
        return ERR_RUN;
    if ((int)w->op < 0 || w->op > MOE_OP_OTHER)
        return err_set(e, ERR_RUN, "compute task with op %d, expected 0 to %d", (int)w->op, MOE_OP_OTHER);
    if (!(w->flops >= 0) || !(w->bytes >= 0) || !isfinite(w->flops + w->bytes))
        return err_set(e, ERR_RUN, "compute task with flops %g, bytes %g", w->flops, w->bytes);
    return add(g, &(struct task){ .kind = TASK_COMPUTE, .op = w->op, .device = w->device, .stream = w->stream,
                                  .flops = w->flops, .bytes = w->bytes }, e);
}

int32_t graph_kernels(struct moe_graph *g, int32_t device, int32_t stream, enum moe_op op, int32_t n,
                      const struct kernel *kernel, struct err *e)
{
    if (check_place(g, device, stream, e) < 0)
        return ERR_RUN;
    int32_t *last = g->last_list[op];
    struct task t = { .kind = TASK_COMPUTE, .op = op, .device = device, .stream = stream, .first = last[0], .n = n,
                      .listed = true };
    if (last[1] == n && n > 0 && !memcmp(g->kernel + last[0], kernel, sizeof *kernel * (size_t)n))
        return add(g, &t, e);
    last[0] = t.first = g->n_kernels;
    last[1] = n;
    RESERVE(g->kernel, g->room_kernels, (int64_t)g->n_kernels + n, e);
    if (n > 0)
        memcpy(g->kernel + g->n_kernels, kernel, sizeof *kernel * (size_t)n);
    g->n_kernels += n;
    return add(g, &t, e);
}

int32_t graph_experts(struct moe_graph *g, const struct moe_expert_work *w, struct err *e)
{
    if (check_place(g, w->device, w->stream, e) < 0)
        return ERR_RUN;
    struct task t = { .kind = TASK_EXPERTS, .op = MOE_OP_EXPERTS, .device = w->device, .stream = w->stream,
                      .first = g->n_experts, .n = w->n, .first_item = g->n_items, .fraction = w->fraction };
    if (check_fused(w->fused, e) < 0)
        return ERR_RUN;
    if (w->layer != g->layer)
        return err_set(e, ERR_RUN, "experts task of layer %d, expected %d", w->layer, g->layer);
    if (w->n < 0)
        return err_set(e, ERR_RUN, "experts task with %d experts", w->n);
    if (!(w->fraction > 0 && w->fraction <= 1))
        return err_set(e, ERR_RUN, "experts task with fraction %g, expected within (0, 1]", (double)w->fraction);
    int64_t rows = 0;
    for (int32_t i = 0; i < w->n; i++) {
        if (w->rows[i] < 0 || w->expert[i] < 0)
            return err_set(e, ERR_RUN, "experts task: expert %d with %lld rows", w->expert[i], (long long)w->rows[i]);
        rows += w->rows[i];
    }
    int64_t room = g->room_experts;
    void *p = g->expert;
    if (reserve(&p, &room, (int64_t)g->n_experts + w->n, sizeof *g->expert, e) < 0)
        return ERR_MEMORY;
    g->expert = p;
    RESERVE(g->rows, g->room_experts, (int64_t)g->n_experts + w->n, e);
    if (w->n > 0) {
        memcpy(g->expert + g->n_experts, w->expert, sizeof *w->expert * (size_t)w->n);
        memcpy(g->rows + g->n_experts, w->rows, sizeof *w->rows * (size_t)w->n);
    }
    g->n_experts += w->n;
    if (g->keep_items && w->items && rows > 0) {
        RESERVE(g->item, g->room_items, g->n_items + rows, e);
        memcpy(g->item + g->n_items, w->items, sizeof *w->items * (size_t)rows);
        g->n_items += rows;
        t.n_items = rows;
    }
    return add(g, &t, e);
}

int graph_check_exchange(const struct moe_exchange *x, struct err *e)
{
    if ((int)x->payload < 0 || x->payload > MOE_PAY_BYTES)
        return err_set(e, ERR_RUN, "exchange with payload %d, expected 0 to %d", (int)x->payload, MOE_PAY_BYTES);
    if (x->n_parts < 0)
        return err_set(e, ERR_RUN, "exchange with %d parts", x->n_parts);
    if (!(x->message_bytes >= 0) || !isfinite(x->message_bytes) || x->sms < 0)
        return err_set(e, ERR_RUN, "exchange with messages of %g bytes, %d SMs", x->message_bytes, x->sms);
    return 0;
}

int graph_check_part(const struct moe_graph *g, const struct moe_part *p, struct err *e)
{
    if (check_place(g, p->src, 0, e) < 0 || check_place(g, p->dst, 0, e) < 0)
        return ERR_RUN;
    if (!(p->bytes >= 0) || !isfinite(p->bytes) || p->n_items < 0)
        return err_set(e, ERR_RUN, "exchange from %d to %d with %g bytes, %lld items", p->src, p->dst, p->bytes,
                       (long long)p->n_items);
    if (p->path < 0)
        return err_set(e, ERR_RUN, "exchange from %d to %d on path %d, expected 0 or more", p->src, p->dst, p->path);
    return 0;
}

int32_t graph_exchange_alone(struct moe_graph *g, const struct moe_exchange *x, double bytes, struct err *e)
{
    return add(g, &(struct task){ .kind = TASK_EXCHANGE, .payload = x->payload, .first = g->n_parts,
                                  .message_bytes = x->message_bytes, .sms = x->sms, .fused = x->fused,
                                  .bytes = bytes }, e);
}

int32_t graph_exchange(struct moe_graph *g, const struct moe_exchange *x, struct err *e)
{
    double bytes = 0;
    const int32_t first = g->n_parts;
    if (graph_check_exchange(x, e) < 0)
        return e->code;
    if (g->keep_items)
        RESERVE(g->part_item, g->room_part_item, (int64_t)g->n_parts + x->n_parts, e);
    RESERVE(g->part, g->room_parts, (int64_t)g->n_parts + x->n_parts, e);
    for (int32_t i = 0; i < x->n_parts; i++) {
        const struct moe_part *p = &x->part[i];
        if (!graph_part_fits(g, p))
            return graph_check_part(g, p, e);
        g->names_paths |= p->path > 1;
        if (g->keep_items) {
            g->part_item[g->n_parts] = g->n_items;
            if (p->items && p->n_items > 0) {
                RESERVE(g->item, g->room_items, g->n_items + p->n_items, e);
                memcpy(g->item + g->n_items, p->items, sizeof *p->items * (size_t)p->n_items);
                g->n_items += p->n_items;
            }
        }
        g->part[g->n_parts] = *p;
        g->part[g->n_parts++].items = NULL;
        bytes += p->src == p->dst ? 0 : p->bytes;
    }
    const int32_t task = graph_exchange_alone(g, x, bytes, e);
    if (task >= 0) {
        g->task[task].first = first;
        g->task[task].n = x->n_parts;
    }
    return task;
}

int32_t graph_arrival(struct moe_graph *g, int32_t exchange, int32_t device, struct err *e)
{
    if (check_place(g, device, 0, e) < 0)
        return ERR_RUN;
    if (exchange < 0 || exchange >= g->n_tasks || g->task[exchange].kind != TASK_EXCHANGE)
        return err_set(e, ERR_RUN, "arrival from task %d, which is not an exchange", exchange);
    return add(g, &(struct task){ .kind = TASK_ARRIVAL, .device = device, .exchange = exchange,
                                  .payload = g->task[exchange].payload }, e);
}

int32_t graph_load(struct moe_graph *g, int32_t device, int32_t source, uint32_t object, double bytes, struct err *e)
{
    return add(g, &(struct task){ .kind = TASK_LOAD, .device = device, .stream = STREAM_COPY, .source = source,
                                  .object = object, .victim = NO_OBJECT, .bytes = bytes }, e);
}

int32_t graph_join(struct moe_graph *g, struct err *e)
{
    return add(g, &(struct task){ .kind = TASK_JOIN }, e);
}

int graph_after(struct moe_graph *g, int32_t task, int32_t before, struct err *e)
{
    if (task < 0 || task >= g->n_tasks || before < 0 || before >= g->n_tasks || task == before)
        return err_set(e, ERR_RUN, "edge from task %d to task %d, expected different ids from 0 to %d", before, task,
                       g->n_tasks - 1);
    if (g->task[task].kind == TASK_ARRIVAL)
        return err_set(e, ERR_RUN, "task %d is an arrival: it waits for its exchange alone", task);
    RESERVE(g->edge, g->room_edges, g->n_edges + 1, e);
    g->edge[g->n_edges++] = (struct edge){ before, task };
    return 0;
}

static int reserve_sum(struct moe_graph *g, int32_t n_sides, struct err *e)
{
    RESERVE(g->sum, g->room_sums, (int64_t)g->n_sums + 1, e);
    RESERVE(g->side, g->room_sides, g->n_sides + n_sides, e);
    return 0;
}

struct exchange_sum *graph_sum(struct moe_graph *g, int32_t n_sides, struct err *e)
{
    if (reserve_sum(g, n_sides, e) < 0)
        return NULL;
    struct exchange_sum *sum = &g->sum[g->n_sums++];
    *sum = (struct exchange_sum){ .first_side = g->n_sides, .n_sides = n_sides };
    g->n_sides += n_sides;
    return sum;
}

int graph_keep_routes(struct moe_graph *g, const struct moe_routes *r, const int32_t *device, struct err *e)
{
    const int32_t layer = g->n_route_layers;
    if (r->form != MOE_TOKENS)
        return err_set(e, ERR_INPUT, "layer %d: routes mix tokens (soft or merged routing), which only simulated "
                       "machines run", layer);
    RESERVE(g->route_first, g->room_route_layers, (int64_t)layer + 2, e);
    int64_t at = layer > 0 ? g->route_first[layer] : 0;
    RESERVE(g->route, g->room_routes, at + r->n, e);
    RESERVE(g->token_device, g->room_tokens, r->n_tokens, e);
    for (int32_t t = 0; t < r->n_tokens; t++) {
        g->token_device[t] = device[t];
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++)
            g->route[at + i] = (struct graph_route){ t, r->expert[i], r->combine ? r->combine[i] : r->weight[i] };
    }
    g->n_tokens = r->n_tokens;
    g->route_first[layer] = at;
    g->route_first[layer + 1] = at + r->n;
    g->n_route_layers++;
    return 0;
}

int graph_keep_scores(struct moe_graph *g, const float *scores, int32_t n_experts, struct err *e)
{
    const int64_t n = (int64_t)g->n_tokens * n_experts, at = g->n_score_layers * n;
    if (!g->keep_scores || !scores || g->n_score_layers != g->n_route_layers - 1)
        return 0;
    RESERVE(g->score, g->room_scores, at + n, e);
    memcpy(g->score + at, scores, sizeof *scores * (size_t)n);
    g->n_score_layers++;
    return 0;
}

void graph_order_free(struct graph_order *o)
{
    free(o->first);
    free(o->next);
    free(o->n_before);
    memset(o, 0, sizeof *o);
}

static int check_acyclic(const struct moe_graph *g, const struct graph_order *o, struct err *e)
{
    int32_t n = g->n_tasks, n_ready = 0, n_done = 0;
    int32_t *left = malloc(sizeof *left * (size_t)(n + 1)), *ready = malloc(sizeof *ready * (size_t)(n + 1));
    if (!left || !ready) {
        err_set(e, ERR_MEMORY, "out of memory for the task graph");
        goto out;
    }
    memcpy(left, o->n_before, sizeof *left * (size_t)n);
    for (int32_t t = 0; t < n; t++)
        if (left[t] == 0)
            ready[n_ready++] = t;
    while (n_done < n_ready) {
        int32_t t = ready[n_done++];
        for (int64_t i = o->first[t]; i < o->first[t + 1]; i++)
            if (--left[o->next[i]] == 0)
                ready[n_ready++] = o->next[i];
    }
    if (n_done < n) {
        /* Every task that is left has one before it that is left: going back n times ends on the cycle. */
        int32_t *from = ready, at = 0;
        for (int32_t t = 0; t < n; t++)
            for (int64_t i = o->first[t]; left[t] > 0 && i < o->first[t + 1]; i++) {
                from[o->next[i]] = t;
                at = o->next[i];
            }
        for (int32_t t = 0; t < n; t++)
            at = from[at];
        err_set(e, ERR_RUN, "the task graph has a cycle: task %d (%s, layer %d) waits for itself", at,
                task_phase(&g->task[at]), g->task[at].layer);
    }
out:
    free(left);
    free(ready);
    return e->code;
}

int graph_order(const struct moe_graph *g, struct graph_order *o, struct err *e)
{
    size_t n = (size_t)g->n_tasks;
    int64_t n_next = g->n_edges;
    for (size_t t = 0; t < n; t++)
        n_next += g->task[t].kind == TASK_ARRIVAL;
    o->first = calloc(n + 2, sizeof *o->first);
    o->next = malloc(sizeof *o->next * (size_t)(n_next + 1));
    o->n_before = calloc(n + 1, sizeof *o->n_before);
    if (!o->first || !o->next || !o->n_before) {
        graph_order_free(o);
        return err_set(e, ERR_MEMORY, "out of memory for the task graph");
    }
    for (int64_t i = 0; i < g->n_edges; i++)
        o->first[g->edge[i].before + 2]++;
    for (size_t t = 0; t < n; t++)
        if (g->task[t].kind == TASK_ARRIVAL)
            o->first[g->task[t].exchange + 2]++;
    for (size_t t = 2; t < n + 2; t++)
        o->first[t] += o->first[t - 1];
    for (int64_t i = 0; i < g->n_edges; i++) {
        o->next[o->first[g->edge[i].before + 1]++] = g->edge[i].task;
        o->n_before[g->edge[i].task]++;
    }
    for (size_t t = 0; t < n; t++)
        if (g->task[t].kind == TASK_ARRIVAL) {
            o->next[o->first[g->task[t].exchange + 1]++] = (int32_t)t;
            o->n_before[t]++;
        }
    if (check_acyclic(g, o, e) < 0)
        graph_order_free(o);
    return e->code;
}

const char *task_phase(const struct task *t)
{
    static const char *const op[] = { "attention", "gate", "permute", "experts", "shared", "combine", "other" };
    static const char *const payload[] = { "dispatch_a2a", "combine_a2a", "transfer" };
    switch (t->kind) {
    case TASK_COMPUTE:
    case TASK_EXPERTS: return op[t->op];
    case TASK_EXCHANGE:
    case TASK_ARRIVAL: return payload[t->payload];
    case TASK_LOAD: return "load";
    case TASK_JOIN: return "join";
    }
    return "?";
}
