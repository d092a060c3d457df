/* SPDX-License-Identifier: Apache-2.0
 * cuda_experts.c - the experts of a task together: one kernel gathers the rows of all, one call multiplies them with
 * all W1 and W3, one kernel activates, one call multiplies with all W2.
 *
 * In fp8 each matrix of weights has a scale, which the product takes along, and each row that enters a product has one,
 * by which the kernel after the product multiplies: rows' scales are powers of two, so that this rounds nothing. */
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
    const size_t hidden = all_hidden(c, g, layer, &c->plan.experts[act->entry]), n = (size_t)act->n;
    const size_t row = c->fp8 ? (size_t)c->model->d_model : row_bytes(c);
    cuda_take_more(&s->gathered.at, &s->gathered.room, n * row, r->rank, "rows of experts", e);
    if (c->fp8) {
        const size_t kept = (size_t)s->kept + n;
        c->plan.experts[act->entry].kept = s->kept;
        s->kept = c->keeps ? (int64_t)kept : 0;
        cuda_take_more(&s->hidden.at, &s->hidden.room, kept * (size_t)c->model->d_expert, r->rank,
                       "hidden layers in fp8", e);
        cuda_take_more(&s->row_scale.at, &s->row_scale.room, n * sizeof(float), r->rank, "scales of rows", e);
        cuda_take_more(&s->hidden_scale.at, &s->hidden_scale.room, kept * sizeof(float), r->rank, "scales of rows", e);
    }
    cuda_take_more(&s->gate.at, &s->gate.room, hidden, r->rank, "hidden layers", e);
    return cuda_take_more(&s->up.at, &s->up.room, hidden, r->rank, "hidden layers", e);
}

/* One expert's product with the first two matrices (`matrix` 0 and 1) or the third. hidden: bytes of hidden layers in
 * front of its own. */
static struct cuda_product product_of(const struct cuda *c, const struct cuda_rank *r, const struct cuda_stream *s,
                                      const struct cuda_act *act, const struct cuda_expert *x, int64_t width,
                                      size_t hidden, size_t matrix)
{
    const int64_t d = c->model->d_model;
    const size_t bytes = cuda_matrix_bytes(c, (int32_t)width), row = c->fp8 ? (size_t)d : row_bytes(c);
    const char *weights = r->expert_weights[x->entry];
    struct cuda_product p = { .m = x->n, .n = width, .k = d, .b = weights + matrix * bytes };
    p.scale = c->fp8 ? (const float *)(const void *)(weights + 3 * bytes) + matrix : NULL;
    p.a = (char *)s->gathered.at + (size_t)x->first * row;
    p.to = (char *)(matrix == 0 ? s->gate.at : s->up.at) + hidden;
    if (matrix == 2) {
        p.n = d;
        p.k = width;
        p.a = c->fp8 ? (char *)s->hidden.at + (c->plan.experts[act->entry].kept + x->first) * width
                     : (char *)s->gate.at + hidden;
        p.to = (char *)r->rows.at + (size_t)(act->row + x->first) * row_bytes(c);
    }
    return p;
}

int cuda_experts_list(struct cuda *c, struct cuda_rank *r, const struct cuda_stream *s, const struct moe_graph *g,
                      int32_t layer, const struct cuda_act *act, struct err *e)
{
    struct cuda_experts *t = &c->plan.experts[act->entry];
    for (size_t down = 0; down < 2 && !e->code; down++) {
        size_t hidden = 0;
        t->call = (int32_t)(cuda_products_call(&c->products, c->fp8, e) - (int64_t)down);
        if (!e->code)
            c->products.call[t->call + (int64_t)down].listed = c->pad.on;
        for (int32_t i = t->first; i < t->first + t->n && !e->code; i++) {
            const struct cuda_expert *x = &c->plan.expert[i];
            const int64_t width = width_of(c, g, layer, x);
            for (size_t matrix = 2 * down; matrix < 2 + down && !e->code; matrix++) {
                const struct cuda_product p = product_of(c, r, s, act, x, width, hidden, matrix);
                cuda_products_add(&c->products, &p, r->rank, e);
            }
            hidden += hidden_bytes(c, x, width);
        }
    }
    return e->code;
}

/* Experts are all of one width, and there are no rows between them. */
static int run_fp8(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, const struct cuda_act *act,
                   struct err *e)
{
    const struct cuda_experts *t = &c->plan.experts[act->entry];
    const int32_t d = c->model->d_model, width = c->model->d_expert;
    uint8_t *hidden = (uint8_t *)s->hidden.at + t->kept * width;
    float *scale = (float *)s->hidden_scale.at + t->kept;
    CUDA_TRY(e, r->rank, cuda_gather_e4m3(s->stream, d, act->n, (const int32_t *)c->index.at + act->index, r->rows.at,
                                          s->gathered.at, s->row_scale.at));
    cuda_products_run(&c->products, t->call, c->half, s, r->rank, e);
    CUDA_TRY(e, r->rank, cuda_activate_e4m3(s->stream, width, act->n, s->row_scale.at, s->gate.at, s->up.at,
                                            hidden, scale));
    cuda_products_run(&c->products, t->call + 1, c->half, s, r->rank, e);
    return CUDA_TRY(e, r->rank, cuda_scale_rows(s->stream, d, act->n, scale, (char *)r->rows.at +
                                                (size_t)act->row * row_bytes(c)));
}

int cuda_experts_run(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, const struct moe_graph *g,
                     int32_t layer, const struct cuda_act *act, struct err *e)
{
    const struct cuda_experts *t = &c->plan.experts[act->entry];
    const int64_t hidden = (int64_t)(all_hidden(c, g, layer, t) / c->element);
    if (c->fp8)
        return run_fp8(c, r, s, act, e);
    CUDA_TRY(e, r->rank, cuda_gather(s->stream, row_bytes(c), act->n, (const int32_t *)c->index.at + act->index,
                                     r->rows.at, s->gathered.at));
    cuda_products_run(&c->products, t->call, c->half, s, r->rank, e);
    CUDA_TRY(e, r->rank, cuda_activate(s->stream, c->half, hidden, s->gate.at, s->up.at));
    return cuda_products_run(&c->products, t->call + 1, c->half, s, r->rank, e);
}
