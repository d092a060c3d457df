/* SPDX-License-Identifier: Apache-2.0
 * layout_times.c - that nothing was used before it was there, read off the times of a step that has run on a
 * simulated machine. A layout whose edges leave out what matters is caught by what it did; one that waits for more is
 * its own loss.
 *
 *   hidden states  leave a device when its own tokens are ready, or others' have come in to be passed on
 *   experts        a device computes as many rows as it has foreign tokens, or more, after the first of them have come
 *   outputs        leave a device when some of its experts are done, or others' outputs have come in
 *   exit           when the last outputs have come in, and after some experts if tokens were computed at home
 *
 * Whether every single row waited for its own token cannot be told from times; `first` is what all layouts share. */
#include "config.h"

#include "exchange.h"
#include "run.h"

#include <math.h>
#include <stdlib.h>

struct layer_times { /* [D] each; INFINITY, or 0 for `last`: there was nothing */
    double *entry, *exit, *hidden_first, *experts_first, *output_first, *output_last, *rows_after;
};

enum { N_TIMES = 7 };

/* Arrivals of each exchange as a list, by task id. */
struct arrivals {
    int32_t *head, *next;
    double *at;    /* [D]; < 0: no arrival of its own */
    uint8_t *side; /* [D] of the exchange that is looked at */
};

static const double SLACK = 1e-9; /* of the time on the clock: sums in another order */

static bool before(double a, double b)
{
    return a < b - SLACK * (fabs(b) + 1e-6);
}

/* When what exchange x brings to each device was there: at[d] if it has an arrival, else the exchange's end. */
static void open_arrivals(const struct moe_graph *g, struct arrivals *a, int32_t x)
{
    for (int32_t t = a->head[x]; t >= 0; t = a->next[t])
        a->at[g->task[t].device] = g->task[t].end;
}

static void close_arrivals(const struct moe_graph *g, struct arrivals *a, int32_t x)
{
    for (int32_t t = a->head[x]; t >= 0; t = a->next[t])
        a->at[g->task[t].device] = -1;
}

static void see_exchange(const struct moe_graph *g, struct arrivals *a, int32_t id, struct layer_times *l)
{
    const struct task *x = &g->task[id];
    const bool out = x->payload == MOE_PAY_OUTPUT;
    open_arrivals(g, a, id);
    exchange_sides(g, x, a->side);
    for (int32_t d = 0; d < g->n_devices; d++) {
        if (!(a->side[d] & SIDE_GETS))
            continue;
        double there = a->at[d] >= 0 ? a->at[d] : x->end;
        double *first = out ? &l->output_first[d] : &l->hidden_first[d];
        *first = fmin(*first, there);
        if (out)
            l->output_last[d] = fmax(l->output_last[d], there);
    }
    close_arrivals(g, a, id);
}

static int fault(struct run *r, int32_t layer, int32_t device, const char *what, double at, double earliest)
{
    return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: device %d %s at %.9g s, expected %.9g s or later: "
                   "something does not wait for what it uses", r->dispatch.plugin->name, layer, device, what, at,
                   earliest);
}

static int check_exchange(struct run *r, const struct task *x, uint8_t *side, const struct layer_times *l)
{
    const bool out = x->payload == MOE_PAY_OUTPUT;
    exchange_sides(&r->graph, x, side);
    for (int32_t d = 0; d < r->graph.n_devices; d++) {
        double ready = out ? fmin(l->experts_first[d], l->output_first[d]) : fmin(l->entry[d], l->hidden_first[d]);
        if ((side[d] & SIDE_SENDS) && before(x->start, ready))
            return fault(r, x->layer, d, out ? "sends outputs" : "sends hidden states", x->start, ready);
    }
    return 0;
}

static double rows_of(const struct moe_graph *g, const struct task *x)
{
    double rows = 0;
    for (int32_t i = x->first; i < x->first + x->n; i++)
        rows += (double)g->rows[i] * (double)x->fraction;
    return rows;
}

/* Tasks of one layer in one pass, listed; key: layer + L x pass. */
static int check_layer(struct run *r, int32_t key, const int32_t *task, int32_t n, struct arrivals *a,
                       struct layer_times *l)
{
    const struct moe_graph *g = &r->graph;
    const int32_t n_devices = r->topology->n_devices;
    const int32_t layer = key % r->model.n_layers;
    const struct layer_needs *needs = &r->needs_of[(size_t)key * (size_t)n_devices];
    if (n == 0)
        return 0;
    for (int32_t d = 0; d < n_devices; d++) {
        l->entry[d] = needs[d].entry >= 0 ? g->task[needs[d].entry].end : 0;
        l->exit[d] = g->task[needs[d].exit].end;
        l->hidden_first[d] = l->experts_first[d] = l->output_first[d] = INFINITY;
        l->output_last[d] = l->rows_after[d] = 0;
    }
    for (int32_t i = 0; i < n; i++) {
        const struct task *x = &g->task[task[i]];
        if (x->kind == TASK_EXCHANGE && x->payload != MOE_PAY_BYTES)
            see_exchange(g, a, task[i], l);
        else if (x->kind == TASK_EXPERTS && rows_of(g, x) > 0)
            l->experts_first[x->device] = fmin(l->experts_first[x->device], x->end);
    }
    for (int32_t i = 0; i < n; i++) {
        const struct task *x = &g->task[task[i]];
        if (x->kind == TASK_EXCHANGE && x->payload != MOE_PAY_BYTES && check_exchange(r, x, a->side, l) < 0)
            return r->err->code;
        if (x->kind != TASK_EXPERTS)
            continue;
        const double rows = rows_of(g, x), ready = fmin(l->entry[x->device], l->hidden_first[x->device]);
        if (rows > 0 && before(x->start, ready))
            return fault(r, layer, x->device, "computes", x->start, ready);
        if (!before(x->start, l->hidden_first[x->device]))
            l->rows_after[x->device] += rows;
    }
    for (int32_t d = 0; d < n_devices; d++) {
        if (l->rows_after[d] < needs[d].foreign * (1 - 1e-6))
            return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: device %d computes %g rows after hidden states "
                           "have come in, expected %g or more", r->dispatch.plugin->name, layer, d, l->rows_after[d],
                           needs[d].foreign);
        if (before(l->exit[d], l->output_last[d]))
            return fault(r, layer, d, "goes on", l->exit[d], l->output_last[d]);
        if (needs[d].at_home && before(l->exit[d], l->experts_first[d]))
            return fault(r, layer, d, "goes on", l->exit[d], l->experts_first[d]);
    }
    return 0;
}

static int32_t key_of(const struct run *r, const struct task *t)
{
    return t->layer + r->model.n_layers * (int32_t)t->pass;
}

/* Tasks by key, in order: counting sort. first: [keys + 1]. */
static void sort_by_layer(const struct run *r, int32_t n_layers, int32_t *first, int32_t *task)
{
    const struct moe_graph *g = &r->graph;
    for (int32_t t = 0; t < g->n_tasks; t++)
        first[key_of(r, &g->task[t]) + 1]++;
    for (int32_t l = 0; l < n_layers; l++)
        first[l + 1] += first[l];
    for (int32_t t = g->n_tasks - 1; t >= 0; t--)
        task[--first[key_of(r, &g->task[t]) + 1]] = t;
    for (int32_t l = 0; l < n_layers; l++) /* filling moved every start one place up */
        first[l] = first[l + 1];
    first[n_layers] = g->n_tasks;
}

int layout_times(struct run *r)
{
    const struct moe_graph *g = &r->graph;
    const size_t n_devices = (size_t)r->topology->n_devices, n_tasks = (size_t)g->n_tasks + 1;
    const int32_t n_layers = r->model.n_layers * N_PASSES;
    int32_t *first = calloc((size_t)n_layers + 2, sizeof *first), *task = malloc(sizeof *task * n_tasks);
    struct arrivals a = { malloc(sizeof *a.head * n_tasks), malloc(sizeof *a.next * n_tasks),
                          malloc(sizeof *a.at * n_devices),
                          malloc(n_devices) };
    double *times = malloc(sizeof *times * N_TIMES * n_devices);
    if (!first || !task || !a.head || !a.next || !a.at || !a.side || !times) {
        err_set(r->err, ERR_MEMORY, "out of memory for %d tasks", g->n_tasks);
        goto out;
    }
    struct layer_times l = { times, times + n_devices, times + 2 * n_devices, times + 3 * n_devices,
                             times + 4 * n_devices, times + 5 * n_devices, times + 6 * n_devices };
    for (size_t d = 0; d < n_devices; d++)
        a.at[d] = -1;
    for (int32_t t = 0; t < g->n_tasks; t++)
        a.head[t] = -1;
    for (int32_t t = 0; t < g->n_tasks; t++)
        if (g->task[t].kind == TASK_ARRIVAL) {
            a.next[t] = a.head[g->task[t].exchange];
            a.head[g->task[t].exchange] = t;
        }
    sort_by_layer(r, n_layers, first, task);
    for (int32_t layer = 0; layer < n_layers && !r->err->code; layer++)
        check_layer(r, layer, task + first[layer], first[layer + 1] - first[layer], &a, &l);
out:
    free(first);
    free(task);
    free(a.head);
    free(a.next);
    free(a.at);
    free(a.side);
    free(times);
    return r->err->code;
}
