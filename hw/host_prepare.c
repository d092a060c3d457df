/* SPDX-License-Identifier: Apache-2.0
 * host_prepare.c - what a rank does before a step's clock starts: checks, weights, rows, inputs. */
#include "config.h"

#include "host_rank.h"
#include "host_model.h"
#include "host_need.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

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

static int check_experts(const struct host *h, const struct moe_graph *g, const struct task *t, struct err *e)
{
    int64_t rows = 0;
    const int64_t *item = g->item + t->first_item;
    if (t->fraction < 1)
        return err_set(e, ERR_INPUT, "layer %d: an expert is sharded over devices, which machine host does not run",
                       t->layer);
    for (int32_t i = 0; i < t->n; i++)
        rows += g->rows[t->first + i];
    if (rows != t->n_items)
        return err_set(e, ERR_INPUT, "layer %d, device %d: the layout names %lld of the %lld routes that its experts "
                       "compute: machine host needs them", t->layer, t->device, (long long)t->n_items,
                       (long long)rows);
    for (int32_t i = 0; i < t->n; i++)
        for (int64_t j = 0; j < g->rows[t->first + i]; j++, item++) {
            int32_t expert = g->expert[t->first + i];
            int64_t r = g->route_first[t->layer] + *item;
            if (expert >= h->model->n_experts || *item < 0 || r >= g->route_first[t->layer + 1] ||
                g->route[r].expert != expert)
                return err_set(e, ERR_RUN, "layer %d, device %d: item %lld is not a route to expert %d", t->layer,
                               t->device, (long long)*item, expert);
        }
    return 0;
}

static int check_parts(const struct moe_graph *g, const struct task *t, struct err *e)
{
    if (t->payload == MOE_PAY_BYTES)
        return 0;
    int64_t n_routes = g->route_first[t->layer + 1] - g->route_first[t->layer];
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &g->part[i];
        if ((p->n_items == 0 && p->bytes > 0) || g->part_item[i] + p->n_items > g->n_items)
            return err_set(e, ERR_INPUT, "layer %d: a part from device %d to device %d does not name its routes: "
                           "machine host needs them", t->layer, p->src, p->dst);
        for (int64_t j = g->part_item[i]; j < g->part_item[i] + p->n_items; j++)
            if (g->item[j] < 0 || g->item[j] >= n_routes)
                return err_set(e, ERR_RUN, "layer %d: a part carries item %lld, expected 0 to %lld", t->layer,
                               (long long)g->item[j], (long long)n_routes - 1);
    }
    return 0;
}

/* Room for `need` floats. Touches what is new, so that no timed task meets a page for the first time. */
static void reserve(struct pool *p, size_t need, struct err *e)
{
    if (need <= p->room || e->code)
        return;
    free(p->data);
    p->data = malloc(sizeof *p->data * need);
    p->room = p->data ? need : 0;
    if (p->data)
        memset(p->data, 0, sizeof *p->data * need);
    else
        err_set(e, ERR_MEMORY, "out of memory for %zu bytes of rows", sizeof *p->data * need);
}

/* Makes sure that everything this rank will touch is there: weights, rows, buffers. */
static int reserve_step(struct host *h, const struct moe_graph *g, struct err *e)
{
    const size_t d = (size_t)h->model->d_model;
    struct host_step all[h->n_ranks], *need = &all[h->rank];
    host_count(h->model, g, h->n_ranks, all);
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        for (int32_t i = 0; t->kind == TASK_EXPERTS && t->device == h->rank && i < t->n; i++) {
            int32_t expert = g->expert[t->first + i];
            float **w = &h->weights[(size_t)t->layer * (size_t)h->model->n_experts + (size_t)expert];
            if (!*w && !(*w = host_weights(h->model, t->layer, expert)))
                return err_set(e, ERR_MEMORY, "rank %d: out of memory for the weights of layer %d, expert %d",
                               h->rank, t->layer, expert);
        }
    }
    if (need->rows > INT_MAX) /* MPI counts rows in int */
        return err_set(e, ERR_INPUT, "rank %d: %zu rows in one step, expected at most %d", h->rank, need->rows,
                       INT_MAX);
    reserve(&h->rows, need->rows * d, e);
    reserve(&h->send, need->sent * d, e);
    reserve(&h->gathered, need->gathered * d, e);
    reserve(&h->gate, need->hidden, e);
    reserve(&h->up, need->hidden, e);
    return e->code;
}

static int64_t *absent(int64_t *old, size_t n, struct err *e)
{
    free(old);
    int64_t *p = malloc(sizeof *p * (n + 1));
    if (p)
        memset(p, 0xff, sizeof *p * (n + 1));
    else
        err_set(e, ERR_MEMORY, "out of memory for %zu rows", n);
    return p;
}

static int reset_tables(struct host *h, const struct moe_graph *g, struct err *e)
{
    size_t n_tokens = (size_t)g->n_tokens, n_layers = (size_t)g->n_route_layers;
    h->token_row = absent(h->token_row, (n_layers + 1) * n_tokens, e);
    h->route_row = absent(h->route_row, (size_t)g->route_first[n_layers], e);
    h->route_of = absent(h->route_of, n_layers * (n_tokens + 1), e);
    free(h->place);
    h->place = malloc(sizeof *h->place * (2 * n_tokens + 1));
    if (!h->place)
        err_set(e, ERR_MEMORY, "out of memory for %zu tokens", n_tokens);
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
    for (int32_t i = 0; i < g->n_tasks && !e->code; i++) {
        const struct task *t = &g->task[i];
        if (t->kind == TASK_LOAD)
            err_set(e, ERR_INPUT, "machine host has no slower memory to load experts from: expected offload none");
        else if (t->kind == TASK_EXPERTS)
            check_experts(h, g, t, e);
        else if (t->kind == TASK_EXCHANGE)
            check_parts(g, t, e);
    }
    h->n_rows = 0;
    if (e->code || reset_tables(h, g, e) < 0 || reserve_step(h, g, e) < 0)
        return e->code;
    for (int32_t i = 0; i < h->n_own; i++) {
        int64_t row = (int64_t)h->n_rows++;
        *token_row(h, g, 0, h->own[i]) = row;
        host_input(h->model, h->step, h->own[i], row_at(h, row));
    }
    return 0;
}
