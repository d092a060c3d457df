/* SPDX-License-Identifier: Apache-2.0
 * host_prepare.c - what a rank does before a step's clock starts: checks, weights, rows, inputs. */
#include "config.h"

#include "host_rank.h"
#include "host_model.h"
#include "host_need.h"
#include "host_order.h"
#include "items_check.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* Room for `need` floats. Touches what is new, so that no timed task meets a page for the first time. */
static void reserve(struct pool *p, size_t need, struct err *e)
{
    if (need <= p->room || e->code)
        return;
    free(p->data);
    p->data = host_take(sizeof *p->data * need);
    p->room = p->data ? need : 0;
    if (p->data)
        memset(p->data, 0, sizeof *p->data * need);
    else
        err_set(e, ERR_MEMORY, "out of memory for %zu bytes of rows", sizeof *p->data * need);
}

/* Where each of this rank's experts is: offloaded, or made and kept. */
static int find_weights(struct host *h, const struct moe_graph *g, bool offloads, struct err *e)
{
    for (int32_t i = 0; i < g->n_experts; i++)
        h->expert_weights[i] = NULL;
    if (offloads && !h->store) {
        const char *tmp = getenv("TMPDIR");
        if (host_store_open(&h->store, h->model, h->rank, tmp && *tmp ? tmp : "/tmp", e) < 0)
            return e->code;
    }
    if (h->store)
        return host_store_prepare(h->store, g, h->expert_weights, e);
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        for (int32_t i = t->first; t->kind == TASK_EXPERTS && t->device == h->rank && i < t->first + t->n; i++) {
            const int32_t expert = g->expert[i];
            float **w = &h->weights[(size_t)t->layer * (size_t)h->model->n_experts + (size_t)expert];
            if (!*w && !(*w = host_weights(h->model, t->layer, expert)))
                return err_set(e, ERR_MEMORY, "rank %d: out of memory for the weights of layer %d, expert %d",
                               h->rank, t->layer, expert);
            h->expert_weights[i] = *w;
        }
    }
    return 0;
}

/* Makes sure that everything this rank will touch is there: weights, rows, buffers. */
static int reserve_step(struct host *h, const struct moe_graph *g, bool offloads, struct err *e)
{
    const size_t d = (size_t)h->model->d_model;
    struct host_step all[h->n_ranks], *need = &all[h->rank];
    if (host_count(h->model, g, h->n_ranks, all, e) < 0 || find_weights(h, g, offloads, e) < 0)
        return e->code;
    if (need->rows > INT_MAX) /* MPI counts rows in int */
        return err_set(e, ERR_INPUT, "rank %d: %zu rows in one step, expected at most %d", h->rank, need->rows,
                       INT_MAX);
    reserve(&h->rows, need->rows * d, e);
    reserve(&h->send, need->sent * d, e);
    reserve(&h->gathered, need->gathered * d, e);
    reserve(&h->gate, need->hidden, e);
    reserve(&h->up, need->hidden, e);
    return e->code ? e->code : host_rings_open(&h->rings, need->rings, e);
}

static void *again(void *old, size_t n, size_t size, struct err *e)
{
    free(old);
    void *p = malloc((n + 1) * size);
    if (!p)
        err_set(e, ERR_MEMORY, "out of memory for %zu tasks", n);
    return p;
}

/* The order of the tasks, and room for what is known of each. */
static int order_tasks(struct host *h, const struct moe_graph *g, struct err *e)
{
    const size_t n = (size_t)g->n_tasks;
    graph_order_free(&h->order);
    h->sequence = again(h->sequence, n, sizeof *h->sequence, e);
    h->time = again(h->time, 2 * n, sizeof *h->time, e);
    h->brings = again(h->brings, n, sizeof *h->brings, e);
    h->send_at = again(h->send_at, n, sizeof *h->send_at, e);
    h->packed = again(h->packed, n, sizeof *h->packed, e);
    h->sums = again(h->sums, n, sizeof *h->sums, e);
    h->experts_left = again(h->experts_left, n, sizeof *h->experts_left, e);
    h->expert_weights = again(h->expert_weights, (size_t)g->n_experts, sizeof *h->expert_weights, e);
    if (e->code || graph_order(g, &h->order, e) < 0)
        return e->code;
    host_sequence(g, &h->order, h->sequence);
    host_find_sums(g, &h->order, h->sequence, h->sums);
    host_place_sends(g, &h->order, h->sequence, h->rank, h->sums, h->send_at, h->packed);
    return 0;
}

static int make_tables(struct host *h, const struct moe_graph *g, struct err *e)
{
    size_t n_tokens = (size_t)g->n_tokens, n_layers = (size_t)g->n_route_layers;
    h->token_row = again(h->token_row, (n_layers + 1) * n_tokens, sizeof *h->token_row, e);
    h->route_row = again(h->route_row, (size_t)g->route_first[n_layers], sizeof *h->route_row, e);
    h->route_of = again(h->route_of, n_layers * (n_tokens + 1), sizeof *h->route_of, e);
    h->place = again(h->place, 2 * n_tokens, sizeof *h->place, e);
    if (e->code)
        return e->code;
    for (size_t l = 0; l < n_layers; l++) {
        int64_t r = g->route_first[l];
        for (size_t t = 0; t <= n_tokens; t++) {
            while (r < g->route_first[l + 1] && g->route[r].token < (int32_t)t)
                r++;
            h->route_of[l * (n_tokens + 1) + t] = r;
        }
    }
    h->own = h->place + n_tokens;
    h->n_own = 0;
    for (int32_t t = 0; t < g->n_tokens; t++) {
        h->place[t] = g->token_device[t] == h->rank ? h->n_own : -1;
        if (h->place[t] >= 0)
            h->own[h->n_own++] = t;
    }
    return 0;
}

int host_prepare(struct host *h, const struct moe_graph *g, struct err *e)
{
    bool offloads = false;
    for (int32_t i = 0; i < g->n_tasks; i++)
        offloads |= g->task[i].kind == TASK_LOAD;
    return items_check(h->model, g, "host", e) < 0 || order_tasks(h, g, e) < 0 || make_tables(h, g, e) < 0
               ? e->code : reserve_step(h, g, offloads, e);
}

void host_begin(struct host *h, const struct moe_graph *g)
{
    const size_t n_tokens = (size_t)g->n_tokens, n_layers = (size_t)g->n_route_layers;
    memset(h->token_row, 0xff, sizeof *h->token_row * (n_layers + 1) * n_tokens);
    memset(h->route_row, 0xff, sizeof *h->route_row * (size_t)g->route_first[n_layers]);
    memset(h->packed, 0, sizeof *h->packed * (size_t)g->n_tasks);
    memset(h->rows.data, 0xff, sizeof *h->rows.data * h->rows.room); /* not numbers: nothing is left of the last time */
    memset(h->experts_left, 0, sizeof *h->experts_left * (size_t)g->n_tasks);
    for (int32_t id = 0; id < g->n_tasks; id++)
        for (int64_t i = h->order.first[id]; i < h->order.first[id + 1]; i++)
            h->experts_left[h->order.next[i]] += g->task[id].kind == TASK_EXPERTS && g->task[id].device == h->rank;
    h->n_rows = 0;
    for (int32_t i = 0; i < h->n_own; i++) {
        int64_t row = (int64_t)h->n_rows++;
        *token_row(h, g, 0, h->own[i]) = row;
        host_input(h->model, h->draw, h->own[i], row_at(h, row));
    }
    if (h->store)
        host_store_rewind(h->store);
}
