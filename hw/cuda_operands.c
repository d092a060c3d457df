/* SPDX-License-Identifier: Apache-2.0
 * cuda_operands.c - kernels of other tasks than experts: products of the shapes that simulated machines price, on
 * numbers that mean nothing. */
#include "config.h"

#include "cuda_rank.h"

/* Operands follow one another around their buffer, so that weights come from memory, as those of a layer that ran long
 * ago. */
const char *cuda_operand(struct cuda_rank *r, size_t bytes)
{
    bytes = (bytes + 255) / 256 * 256;
    if (r->at_operands + bytes > r->operands.room)
        r->at_operands = 0;
    r->at_operands += bytes;
    return (const char *)r->operands.at + r->at_operands - bytes;
}

static size_t element(const struct cuda *c, const struct kernel *k)
{
    return k->precision == PREC_FP8 ? 1 : c->element;
}

/* One product's rows, its weights behind them, and what it writes. */
static size_t rows_in(const struct cuda *c, const struct kernel *k)
{
    return cuda_aligned(element(c, k) * (size_t)(k->shape.rows * k->shape.k));
}

static size_t kernel_in(const struct cuda *c, const struct kernel *k)
{
    return rows_in(c, k) + element(c, k) * (size_t)(k->shape.k * k->shape.n);
}

static size_t kernel_out(const struct cuda *c, const struct kernel *k)
{
    return cuda_aligned(c->element * (size_t)(k->shape.rows * k->shape.n));
}

void cuda_kernel_room(const struct cuda *c, const struct kernel *k, size_t *in, size_t *out)
{
    const size_t writes = (size_t)k->groups * kernel_out(c, k);
    *in = kernel_in(c, k) > *in ? kernel_in(c, k) : *in;
    *out = writes > *out ? writes : *out;
}

int cuda_kernel_list(struct cuda *c, struct cuda_rank *r, const struct kernel *k, int64_t *call, struct err *e)
{
    *call = cuda_products_call(&c->products, k->precision == PREC_FP8, e);
    for (int32_t i = 0; i < k->groups && k->shape.rows > 0 && !e->code; i++) {
        const char *a = cuda_operand(r, kernel_in(c, k));
        const struct cuda_product p = { k->shape.rows, k->shape.n, k->shape.k, a, a + rows_in(c, k),
                                        (char *)r->results.at + (size_t)i * kernel_out(c, k), NULL };
        cuda_products_add(&c->products, &p, r->rank, e);
    }
    return e->code;
}

int cuda_run_kernel(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, const struct kernel *k, int64_t call,
                    struct err *e)
{
    if (k->groups == 0)
        return cuda_run_plain(c, r, s, k->flops, k->traffic, e);
    return cuda_products_run(&c->products, call, c->half, s, r->rank, e);
}
