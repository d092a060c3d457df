/* SPDX-License-Identifier: Apache-2.0
 * cuda_store.c - where a rank's experts are: on the device for good, or in the host's pinned memory with slots on the
 * device that loads fill. Slots go to loads as in host_store.c: in the order of their tasks. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_e4m3.h"
#include "cuda_rank.h"
#include "host_model.h"

#include <stdlib.h>
#include <string.h>

size_t cuda_matrix_bytes(const struct cuda *c, int32_t width)
{
    return cuda_aligned((c->fp8 ? 1 : c->element) * (size_t)c->model->d_model * (size_t)width);
}

size_t cuda_expert_bytes(const struct cuda *c, int64_t object)
{
    const int32_t layer = (int32_t)(object / c->model->n_experts), expert = (int32_t)(object % c->model->n_experts);
    return 3 * cuda_matrix_bytes(c, host_width(c->model, layer, expert)) + (c->fp8 ? CUDA_ALIGNED : 0);
}

/* n rows of m numbers, column by column. */
static float *turned(const float *from, size_t n, size_t m)
{
    float *to = malloc(n * m * sizeof *to);
    for (size_t i = 0; to && i < n; i++)
        for (size_t j = 0; j < m; j++)
            to[j * n + i] = from[i * m + j];
    return to;
}

/* Codes, and the scales of the three matrices behind them. False: no memory. */
static bool make_fp8(const struct cuda *c, const float *w, size_t d, size_t width, char *made)
{
    const size_t bytes = cuda_matrix_bytes(c, (int32_t)width);
    for (size_t i = 0; i < 3; i++) {
        float *columns = turned(w + i * d * width, i < 2 ? d : width, i < 2 ? width : d);
        if (!columns)
            return false;
        const float scale = cuda_e4m3_codes(d * width, columns, (uint8_t *)made + i * bytes);
        memcpy(made + 3 * bytes + i * sizeof scale, &scale, sizeof scale);
        free(columns);
    }
    return true;
}

/* In the elements that the device computes with; free() it. */
static void *make(const struct cuda *c, int64_t object, struct err *e)
{
    const int32_t layer = (int32_t)(object / c->model->n_experts), expert = (int32_t)(object % c->model->n_experts);
    const int32_t width = host_width(c->model, layer, expert);
    const size_t bytes = cuda_matrix_bytes(c, width), n = (size_t)c->model->d_model * (size_t)width;
    float *w = host_weights(c->model, layer, expert);
    char *made = w ? calloc(1, cuda_expert_bytes(c, object)) : NULL;
    if (!made || (c->fp8 && !make_fp8(c, w, (size_t)c->model->d_model, (size_t)width, made)))
        err_set(e, ERR_MEMORY, "out of memory for the weights of layer %d, expert %d", layer, expert);
    for (size_t i = 0; made && !c->fp8 && i < 3; i++)
        cuda_from_floats(c, n, w + i * n, made + i * bytes);
    free(w);
    if (e->code) {
        free(made);
        return NULL;
    }
    return made;
}

/* ---- kept ---- */

static int keep(struct cuda *c, struct cuda_rank *r, int64_t object, struct err *e)
{
    const size_t bytes = cuda_expert_bytes(c, object);
    void *w = make(c, object, e);
    if (w && cuda_take(&r->weights[object], bytes, r->rank, "an expert's weights", e) == 0)
        CUDA_TRY(e, r->rank, cudaMemcpy(r->weights[object], w, bytes, cudaMemcpyHostToDevice));
    free(w);
    return e->code;
}

static int find_kept(struct cuda *c, struct cuda_rank *r, const struct moe_graph *g, struct err *e)
{
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        for (int32_t i = t->first; t->kind == TASK_EXPERTS && t->device == r->rank && i < t->first + t->n; i++) {
            const int64_t object = (int64_t)t->layer * c->model->n_experts + g->expert[i];
            if (g->rows[i] > 0 && !r->weights[object] && keep(c, r, object, e) < 0)
                return e->code;
            r->expert_weights[i] = r->weights[object];
        }
    }
    return 0;
}

/* ---- loaded ---- */

static size_t slot_bytes(const struct cuda *c)
{
    size_t most = 0;
    for (int64_t i = 0; i < (int64_t)c->model->n_layers * c->model->n_experts; i++)
        most = cuda_expert_bytes(c, i) > most ? cuda_expert_bytes(c, i) : most;
    return most;
}

static int32_t free_slot(struct cuda *c, struct cuda_rank *r, struct err *e)
{
    for (int32_t i = 0; i < r->n_slots; i++)
        if (r->slot[i].planned < 0)
            return i;
    struct cuda_slot *grown = realloc(r->slot, sizeof *grown * ((size_t)r->n_slots + 1)), s = { NULL, -1, -1, -1 };
    if (!grown)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for %d slots", r->rank, r->n_slots + 1);
    r->slot = grown;
    if (cuda_take(&s.weights, slot_bytes(c), r->rank, "a slot of an offloaded expert", e) < 0)
        return e->code;
    r->slot[r->n_slots] = s;
    return r->n_slots++;
}

/* What passed through in other layers than this one is not needed any more. */
static void let_go(struct cuda_rank *r, int32_t layer)
{
    for (int32_t i = 0; i < r->n_slots; i++)
        if (r->slot[i].passing >= 0 && r->slot[i].passing != layer) {
            r->slot_of[r->slot[i].planned] = -1;
            r->slot[i].planned = r->slot[i].passing = -1;
        }
}

static int pin(struct cuda *c, int64_t object, struct err *e)
{
    const size_t bytes = cuda_expert_bytes(c, object);
    void *w = make(c, object, e);
    if (w && CUDA_TRY(e, 0, cudaHostAlloc(&c->pinned[object], bytes, cudaHostAllocDefault)) == 0)
        memcpy(c->pinned[object], w, bytes);
    free(w);
    return e->code;
}

static int plan_load(struct cuda *c, struct cuda_rank *r, const struct task *t, int32_t id, struct err *e)
{
    const int64_t object = t->object;
    int32_t slot = t->victim == NO_OBJECT ? -1 : r->slot_of[t->victim];
    let_go(r, t->layer);
    if (r->slot_of[object] >= 0 || (t->victim != NO_OBJECT && slot < 0))
        return err_set(e, ERR_RUN, "rank %d: task %d loads layer %d, expert %d, %s", r->rank, id,
                       (int32_t)(object / c->model->n_experts), (int32_t)(object % c->model->n_experts),
                       slot < 0 ? "in place of what has no slot" : "which has a slot already");
    if (slot >= 0)
        r->slot_of[t->victim] = -1;
    else if ((slot = free_slot(c, r, e)) < 0)
        return e->code;
    r->slot[slot].planned = object;
    r->slot[slot].passing = t->passes ? t->layer : -1;
    r->slot_of[object] = slot;
    r->load_of[id] = r->n_loads;
    r->load[r->n_loads++] = (struct cuda_load){ slot, object };
    return c->pinned[object] ? 0 : pin(c, object, e);
}

static int find_loaded(struct cuda *c, struct cuda_rank *r, const struct moe_graph *g, struct err *e)
{
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        if (t->kind == TASK_LOAD && t->device == r->rank && plan_load(c, r, t, id, e) < 0)
            return e->code;
        for (int32_t i = t->first; t->kind == TASK_EXPERTS && t->device == r->rank && i < t->first + t->n; i++) {
            const int32_t slot = r->slot_of[(int64_t)t->layer * c->model->n_experts + g->expert[i]];
            if (slot < 0 && g->rows[i] > 0)
                return err_set(e, ERR_RUN, "rank %d: layer %d, expert %d is computed and no load brings it", r->rank,
                               t->layer, g->expert[i]);
            r->expert_weights[i] = slot < 0 ? NULL : r->slot[slot].weights;
        }
    }
    return 0;
}

/* Addresses of slots are not known while slots are still being added, but slots never move: only the list of them. */
static int open_slots(struct cuda *c, struct cuda_rank *r, const struct moe_graph *g, struct err *e)
{
    const size_t all = (size_t)c->model->n_layers * (size_t)c->model->n_experts, n = (size_t)g->n_tasks + 1;
    if (!r->slot_of) {
        r->slot_of = malloc(all * sizeof *r->slot_of);
        if (r->slot_of)
            memset(r->slot_of, 0xff, all * sizeof *r->slot_of);
    }
    free(r->load);
    free(r->load_of);
    r->n_loads = 0;
    r->load = malloc(n * sizeof *r->load);
    r->load_of = malloc(n * sizeof *r->load_of);
    if (!r->slot_of || !r->load || !r->load_of)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for %zu tasks", r->rank, n);
    let_go(r, -1);
    for (int32_t i = 0; i < r->n_slots; i++)
        r->slot[i].at_start = r->slot[i].planned;
    return 0;
}

int cuda_store_prepare(struct cuda *c, struct cuda_rank *r, const struct moe_graph *g, bool offloads, struct err *e)
{
    for (int32_t i = 0; i < g->n_experts; i++)
        r->expert_weights[i] = NULL;
    if (!offloads && !r->slot_of)
        return find_kept(c, r, g, e);
    if (open_slots(c, r, g, e) < 0 || find_loaded(c, r, g, e) < 0)
        return e->code;
    free(r->slot_ops);
    r->slot_ops = malloc(sizeof *r->slot_ops * ((size_t)r->n_slots + 1));
    if (!r->slot_ops)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for %d slots", r->rank, r->n_slots);
    memset(r->slot_ops, 0xff, sizeof *r->slot_ops * (size_t)r->n_slots);
    return 0;
}

/* What the slots had when the step began. */
int cuda_store_rewind(struct cuda *c, struct cuda_rank *r, struct err *e)
{
    for (int32_t i = 0; i < r->n_slots && !e->code; i++) {
        const struct cuda_slot *s = &r->slot[i];
        CUDA_TRY(e, r->rank, cudaMemset(s->weights, 0xff, slot_bytes(c)));
        if (s->at_start >= 0)
            CUDA_TRY(e, r->rank, cudaMemcpy(s->weights, c->pinned[s->at_start], cuda_expert_bytes(c, s->at_start),
                                            cudaMemcpyHostToDevice));
    }
    return e->code;
}
