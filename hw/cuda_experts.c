/* SPDX-License-Identifier: Apache-2.0
 * cuda_experts.c - the experts of a task together: one kernel gathers the rows of all, one call multiplies them with
 * all W1 and W3, one kernel activates, one call multiplies with all W2. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_kernels.h"
#include "cuda_rank.h"
#include "host_model.h"

static int64_t width_of(const struct cuda *c, const struct moe_graph *g, int32_t layer, const struct cuda_expert *x)
{
    return host_width(c->model, layer, g->expert[x->entry]);
}

/* Of an expert's hidden rows, up to where the next one's begin. */
static size_t hidden_bytes(const struct cuda *c, const struct cuda_expert *x, int64_t width)
{
    return cuda_aligned((size_t)(x->n * width) * c->element);
}

static size_t all_hidden(const struct cuda *c, const struct moe_graph *g, int32_t layer, const struct cuda_experts *t)
{
    size_t bytes = 0;
    for (const struct cuda_expert *x = c->plan.expert + t->first; x < c->plan.expert + t->first + t->n; x++)
        bytes += hidden_bytes(c, x, width_of(c, g, layer, x));
    return bytes;
}

int cuda_experts_room(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, const struct moe_graph *g,
                      int32_t layer, const struct cuda_act *act, struct err *e)
{
    const size_t hidden = all_hidden(c, g, layer, &c->plan.experts[act->entry]), rows = (size_t)act->n * row_bytes(c);
    cuda_take_more(&s->gathered.at, &s->gathered.room, rows, r->rank, "rows of experts", e);
    cuda_take_more(&s->gate.at, &s->gate.room, hidden, r->rank, "hidden layers", e);
    return cuda_take_more(&s->up.at, &s->up.room, hidden, r->rank, "hidden layers", e);
}

int cuda_experts_list(struct cuda *c, struct cuda_rank *r, const struct cuda_stream *s, const struct moe_graph *g,
                      int32_t layer, const struct cuda_act *act, struct err *e)
{
    struct cuda_experts *t = &c->plan.experts[act->entry];
    const int64_t d = c->model->d_model;
    for (int down = 0; down < 2 && !e->code; down++) {
        const int64_t call = cuda_products_call(&c->products, e);
        t->call = (int32_t)call - down;
        size_t hidden = 0;
        for (int32_t i = t->first; i < t->first + t->n && !e->code; i++) {
            const struct cuda_expert *x = &c->plan.expert[i];
            const int64_t width = width_of(c, g, layer, x);
            const size_t matrix = cuda_matrix_bytes(c, (int32_t)width);
            const char *w1 = r->expert_weights[x->entry];
            char *in = (char *)s->gathered.at + (size_t)x->first * row_bytes(c);
            char *gate = (char *)s->gate.at + hidden, *up = (char *)s->up.at + hidden;
            char *out = (char *)r->rows.at + (size_t)(act->row + x->first) * row_bytes(c);
            hidden += hidden_bytes(c, x, width);
            const struct cuda_product first = { x->n, width, d, in, w1, gate },
                                      third = { x->n, width, d, in, w1 + matrix, up },
                                      second = { x->n, d, width, gate, w1 + 2 * matrix, out };
            if (!down)
                cuda_products_add(&c->products, &first, e);
            cuda_products_add(&c->products, down ? &second : &third, e);
        }
    }
    return e->code;
}

int cuda_experts_run(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, const struct moe_graph *g,
                     int32_t layer, const struct cuda_act *act, struct err *e)
{
    const struct cuda_experts *t = &c->plan.experts[act->entry];
    const int64_t hidden = (int64_t)(all_hidden(c, g, layer, t) / c->element);
    CUDA_TRY(e, r->rank, cuda_gather(s->stream, row_bytes(c), act->n, (const int32_t *)c->index.at + act->index,
                                     r->rows.at, s->gathered.at));
    cuda_products_run(&c->products, t->call, c->half, s->blas, r->rank, e);
    CUDA_TRY(e, r->rank, cuda_activate(s->stream, c->half, hidden, s->gate.at, s->up.at));
    return cuda_products_run(&c->products, t->call + 1, c->half, s->blas, r->rank, e);
}
