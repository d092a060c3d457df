/* SPDX-License-Identifier: Apache-2.0
 * cuda_pad.c - see cuda_pad.h. */
#include "config.h"

#include "cuda_pad.h"
#include "cuda_rank.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

double cuda_pad_round(double n)
{
    int exponent;
    if (n <= 0)
        return 0;
    frexp(n, &exponent); /* n = m 2^exponent, 1/2 <= m < 1 */
    const double step = ldexp(1, exponent - 4);
    return n <= 8 ? ldexp(1, (int)ceil(log2(n))) : ceil(n / step) * step;
}

/* ---- the table ---- */

static double *find(struct cuda_table *t, uint64_t key)
{
    size_t at = (size_t)moe_mix(key) & (t->room - 1);
    while (t->key[at] != 0 && t->key[at] != key)
        at = (at + 1) & (t->room - 1);
    t->n += t->key[at] == 0;
    t->key[at] = key;
    return &t->value[at];
}

static int grow(struct cuda_table *t, struct err *e)
{
    struct cuda_table bigger = { .room = t->room ? 2 * t->room : 256 };
    bigger.key = calloc(bigger.room, sizeof *bigger.key);
    bigger.value = calloc(bigger.room, sizeof *bigger.value);
    if (!bigger.key || !bigger.value) {
        free(bigger.key);
        free(bigger.value);
        return err_set(e, ERR_MEMORY, "out of memory for %zu padded sizes", bigger.room);
    }
    for (size_t i = 0; i < t->room; i++)
        if (t->key[i] != 0)
            *find(&bigger, t->key[i]) = t->value[i];
    free(t->key);
    free(t->value);
    *t = bigger;
    return 0;
}

/* The value of a key, 0 at first; NULL: no memory. */
static double *at(struct cuda_table *t, uint64_t key, struct err *e)
{
    if (2 * t->n >= t->room && grow(t, e) < 0)
        return NULL;
    return find(t, key);
}

/* ---- sizes ---- */

static uint64_t mix(uint64_t key, int64_t v)
{
    return moe_mix(key ^ (uint64_t)(v + 0x5bd1)) | 1;
}

static uint64_t kind_of(const struct task *t)
{
    uint64_t key = mix(1, t->layer);
    key = mix(key, t->kind);
    key = mix(key, t->kind == TASK_EXCHANGE ? (int)t->payload : (int)t->op);
    return mix(key, t->kind == TASK_EXCHANGE ? -1 : t->device * (N_STREAMS + 1) + t->stream);
}

int cuda_pad_begin(struct cuda_pad *p, const struct moe_graph *g, struct err *e)
{
    struct cuda_table count = { 0 };
    p->rows = p->padding = 0;
    free(p->number);
    p->number = calloc((size_t)g->n_tasks + 1, sizeof *p->number);
    if (!p->number)
        return err_set(e, ERR_MEMORY, "out of memory for %d tasks", g->n_tasks);
    for (int32_t i = 0; p->on && i < g->n_tasks && !e->code; i++) {
        double *n = at(&count, kind_of(&g->task[i]), e);
        if (n)
            p->number[i] = (int32_t)(*n)++;
    }
    free(count.key);
    free(count.value);
    return e->code;
}

double cuda_pad(struct cuda_pad *p, const struct moe_graph *g, int32_t task, enum cuda_padded what, int32_t rank,
                int32_t place, double n, struct err *e)
{
    if (!p->on)
        return n;
    uint64_t key = mix(kind_of(&g->task[task]), p->number[task]);
    key = mix(mix(mix(key, (int)what), rank), place);
    double *most = at(&p->most, key, e);
    if (!most)
        return n;
    *most = fmax(*most, what == PAD_EXPERTS ? n : cuda_pad_round(n));
    return *most;
}

static int by_rows(const void *left, const void *right)
{
    const struct cuda_expert *a = left, *b = right;
    if (a->real != b->real)
        return a->real > b->real ? -1 : 1;
    return (a->entry > b->entry) - (a->entry < b->entry);
}

/* Padded, the busiest comes first, and places have sizes: which expert is at one lies in the device's memory. Places
 * without an expert of this step compute rows of the first's that mean nothing. */
int cuda_pad_experts(struct cuda *c, const struct moe_graph *g, int32_t rank, int32_t task, struct cuda_experts *own,
                     struct err *e)
{
    struct cuda_plan *p = &c->plan;
    const int32_t real = own->n, n = (int32_t)cuda_pad(&c->pad, g, task, PAD_EXPERTS, rank, 0, real, e);
    if (real == 0 || e->code ||
        !cuda_grow(&p->expert, &p->room_expert, p->n_expert + n - real, sizeof *p->expert, e))
        return e->code;
    struct cuda_expert *x = p->expert + own->first;
    qsort(x, (size_t)real, sizeof *x, by_rows);
    for (int32_t i = 0; i < n && !e->code; i++) {
        if (i >= real)
            x[i] = (struct cuda_expert){ .entry = x[0].entry };
        x[i].n = (int32_t)cuda_pad(&c->pad, g, task, PAD_EXPERT, rank, i, x[i].real, e);
        c->pad.rows += x[i].n;
        c->pad.padding += x[i].n - x[i].real;
    }
    p->n_expert += n - real;
    own->n = n;
    return e->code;
}

void cuda_pad_free(struct cuda_pad *p)
{
    free(p->most.key);
    free(p->most.value);
    free(p->number);
    memset(p, 0, sizeof *p);
}
