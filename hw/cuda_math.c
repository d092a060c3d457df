/* SPDX-License-Identifier: Apache-2.0
 * cuda_math.c - what computes on a stream: routed experts for real, everything else in the shapes that simulated
 * machines price, on numbers that mean nothing. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_kernels.h"
#include "cuda_rank.h"
#include "host_model.h"

#include <math.h>
#include <stdlib.h>

/* C (m x n) = A (m x k) B (k x n), row by row: to cuBLAS, which goes by columns, that is C' = B' A'. */
static int gemm(const struct cuda *c, int32_t rank, cublasHandle_t blas, int64_t m, int64_t n, int64_t k, const void *a,
                const void *b, void *to, struct err *e)
{
    const float one = 1, zero = 0;
    const cudaDataType type = c->half ? CUDA_R_16BF : CUDA_R_32F;
    return BLAS_TRY(e, rank, cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, (int)n, (int)m, (int)k, &one, b, type, (int)n,
                                          a, type, (int)k, &zero, to, type, (int)n, CUBLAS_COMPUTE_32F,
                                          CUBLAS_GEMM_DEFAULT));
}

/* One expert's FFN over n gathered rows. A call of cuBLAS for each product: all experts of a task in one grouped call
 * would take this function's place. */
int cuda_run_expert(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, const struct moe_graph *g,
                    int32_t layer, const struct cuda_act *act, struct err *e)
{
    const int64_t d = c->model->d_model, n = act->n;
    const int64_t width = host_width(c->model, layer, g->expert[act->entry]);
    const char *w1 = r->expert_weights[act->entry], *w3 = w1 + (size_t)(d * width) * c->element;
    const char *w2 = w3 + (size_t)(d * width) * c->element;
    char *out = (char *)r->rows.at + (size_t)act->row * row_bytes(c);
    CUDA_TRY(e, r->rank, cuda_gather(s->stream, row_bytes(c), act->n, (const int32_t *)c->index.at + act->index,
                                     r->rows.at, s->gathered.at));
    gemm(c, r->rank, s->blas, n, width, d, s->gathered.at, w1, s->gate.at, e);
    gemm(c, r->rank, s->blas, n, width, d, s->gathered.at, w3, s->up.at, e);
    CUDA_TRY(e, r->rank, cuda_activate(s->stream, c->half, n * width, s->gate.at, s->up.at));
    return gemm(c, r->rank, s->blas, n, d, width, s->gate.at, w2, out, e);
}

/* ---- what has no operands of its own ---- */

enum { BLOCK = 1024, MOVED = 1 << 26 /* bytes at a time */ };
/* Fewer FLOPs per byte than this, and memory is what takes time on any GPU in bf16 or fp32. */
#define FLOPS_PER_BYTE 20

static size_t kernel_in(const struct cuda *c, const struct kernel *k)
{
    return c->element * (size_t)(k->shape.rows * k->shape.k + k->shape.k * k->shape.n);
}

static void room_plain(const struct cuda *c, double flops, double bytes, size_t *in, size_t *out)
{
    const bool multiplies = flops > FLOPS_PER_BYTE * bytes;
    const size_t moved = (size_t)fmin(bytes / 2 + 16, MOVED), block = c->element * BLOCK * BLOCK;
    const size_t reads = multiplies ? 2 * block : moved, writes = multiplies ? block : moved;
    *in = reads > *in ? reads : *in;
    *out = writes > *out ? writes : *out;
}

void cuda_math_room(const struct cuda *c, const struct moe_graph *g, int32_t device, size_t *in, size_t *out)
{
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        if (t->kind != TASK_COMPUTE || t->device != device)
            continue;
        if (!t->listed)
            room_plain(c, t->flops, t->bytes, in, out);
        for (int32_t i = t->first; t->listed && i < t->first + t->n; i++) {
            const struct kernel *k = &g->kernel[i];
            if (k->groups == 0) {
                room_plain(c, k->flops, k->traffic, in, out);
                continue;
            }
            const size_t writes = c->element * (size_t)(k->shape.rows * k->shape.n);
            *in = kernel_in(c, k) > *in ? kernel_in(c, k) : *in;
            *out = writes > *out ? writes : *out;
        }
    }
}

/* Operands follow one another around their buffer, so that weights come from memory, as those of a layer that ran long
 * ago. */
static const char *operand(struct cuda_rank *r, size_t bytes)
{
    bytes = (bytes + 255) / 256 * 256;
    if (r->at_operands + bytes > r->operands.room)
        r->at_operands = 0;
    r->at_operands += bytes;
    return (const char *)r->operands.at + r->at_operands - bytes;
}

int cuda_run_plain(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, double flops, double bytes,
                   struct err *e)
{
    if (flops <= FLOPS_PER_BYTE * bytes) {
        for (double left = bytes / 2; left >= (double)sizeof(float) && !e->code; left -= MOVED) {
            const size_t some = (size_t)fmin(left, MOVED);
            CUDA_TRY(e, r->rank, cuda_move(s->stream, (int64_t)(some / sizeof(float)),
                                           (const float *)(const void *)operand(r, some), r->results.at));
        }
        return e->code;
    }
    const size_t block = c->element * BLOCK * BLOCK;
    for (double left = flops; left > 0 && !e->code; left -= 2.0 * BLOCK * BLOCK * BLOCK) {
        const char *a = operand(r, 2 * block);
        gemm(c, r->rank, s->blas, BLOCK, BLOCK, BLOCK, a, a + block, r->results.at, e);
    }
    return e->code;
}

int cuda_run_kernel(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, const struct kernel *k, struct err *e)
{
    if (k->groups == 0)
        return cuda_run_plain(c, r, s, k->flops, k->traffic, e);
    for (int32_t i = 0; i < k->groups && k->shape.rows > 0 && !e->code; i++) {
        const char *a = operand(r, kernel_in(c, k));
        gemm(c, r->rank, s->blas, k->shape.rows, k->shape.n, k->shape.k, a,
             a + c->element * (size_t)(k->shape.rows * k->shape.k), r->results.at, e);
    }
    return e->code;
}
