/* SPDX-License-Identifier: Apache-2.0
 * cuda_products.c - see cuda_products.h. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_rank.h"

#include <stdlib.h>
#include <string.h>

#if CUBLAS_VERSION >= 120500
#pragma weak cublasGemmGroupedBatchedEx /* the module is loaded with an older library too */
#endif

bool cuda_products_grouped(void)
{
#if CUBLAS_VERSION >= 120500
    return cublasGemmGroupedBatchedEx != NULL;
#else
    return false;
#endif
}

/* ---- lists ---- */

void cuda_products_clear(struct cuda_products *p)
{
    p->n_calls = p->n_products = 0;
}

int64_t cuda_products_call(struct cuda_products *p, bool fp8, struct err *e)
{
    if (!cuda_grow(&p->call, &p->room_calls, p->n_calls + 1, sizeof *p->call, e))
        return -1;
    p->call[p->n_calls] = (struct cuda_call){ (int32_t)p->n_products, 0, fp8, false };
    return p->n_calls++;
}

static bool grow(struct cuda_products *p, struct err *e)
{
    const int64_t n = p->n_products + 1;
    if (n > INT32_MAX / 3) {
        err_set(e, ERR_INPUT, "more than %d products in one step", INT32_MAX / 3);
        return false;
    }
    return cuda_grow(&p->m, &p->room[0], n, sizeof *p->m, e) && cuda_grow(&p->n, &p->room[1], n, sizeof *p->n, e) &&
           cuda_grow(&p->k, &p->room[2], n, sizeof *p->k, e) &&
           cuda_grow(&p->one_each, &p->room[3], n, sizeof *p->one_each, e) &&
           cuda_grow(&p->as_it_is, &p->room[4], n, sizeof *p->as_it_is, e) &&
           cuda_grow(&p->one, &p->room[5], n, sizeof *p->one, e) &&
           cuda_grow(&p->zero, &p->room[6], n, sizeof *p->zero, e) &&
           cuda_grow(&p->at, &p->room[7], 3 * n, sizeof *p->at, e) &&
           cuda_grow(&p->sorted, &p->room[8], 3 * n, sizeof *p->sorted, e) &&
           cuda_grow(&p->scale, &p->room[9], n, sizeof *p->scale, e) &&
           cuda_grow(&p->shape, &p->room[10], n, sizeof *p->shape, e);
}

int cuda_products_add(struct cuda_products *p, const struct cuda_product *x, int32_t rank, struct err *e)
{
    const int64_t i = p->n_products;
    const union { const void *read; void *at; } a = { x->a }, b = { x->b }; /* are only read */
    if (!grow(p, e))
        return e->code;
    p->m[i] = (int)x->n;
    p->n[i] = (int)x->m;
    p->k[i] = (int)x->k;
    p->one_each[i] = 1;
    p->as_it_is[i] = CUBLAS_OP_N;
    p->one[i] = 1;
    p->zero[i] = 0;
    p->at[3 * i] = b.at;
    p->at[3 * i + 1] = a.at;
    p->at[3 * i + 2] = x->to;
    p->scale[i] = x->scale;
    p->shape[i] = p->call[p->n_calls - 1].fp8 ? cuda_fp8_shape(&p->fp8, x->m, x->n, x->k, rank, e) : -1;
    p->n_products++;
    p->call[p->n_calls - 1].n++;
    return e->code;
}

int cuda_products_upload(struct cuda_products *p, int32_t rank, struct err *e)
{
    const size_t n = (size_t)p->n_products, bytes = 3 * n * sizeof *p->sorted;
    for (size_t i = 0; i < 3 * n && !e->code; i++)
        p->sorted[i % 3 * n + i / 3] = p->at[i];
    if (n == 0 || cuda_take_more(&p->device.at, &p->device.room, bytes, rank, "places of matrices", e) < 0)
        return e->code;
    return CUDA_TRY(e, rank, cudaMemcpy(p->device.at, p->sorted, bytes, cudaMemcpyHostToDevice));
}

void cuda_products_free(struct cuda_products *p)
{
    void *const all[] = { p->call, p->m, p->n, p->k, p->one_each, p->as_it_is, p->one, p->zero, p->at, p->sorted,
                          p->scale, p->shape };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    cudaFree(p->device.at);
    cuda_fp8_close(&p->fp8);
    memset(p, 0, sizeof *p);
}

/* ---- calls ---- */

static int run_one(int m, int n, int k, const void *a, const void *b, void *c, bool half, cublasHandle_t blas,
                   int32_t rank, struct err *e)
{
    const float one = 1, zero = 0;
    const cudaDataType type = half ? CUDA_R_16BF : CUDA_R_32F;
    return BLAS_TRY(e, rank, cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &one, a, type, m, b, type, k, &zero,
                                          c, type, m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

int cuda_product_run(const struct cuda_product *x, bool half, cublasHandle_t blas, int32_t rank, struct err *e)
{
    return run_one((int)x->n, (int)x->m, (int)x->k, x->b, x->a, x->to, half, blas, rank, e);
}

#if CUBLAS_VERSION >= 120500
static int run_grouped(const struct cuda_products *p, struct cuda_call call, bool half, cublasHandle_t blas,
                       int32_t rank, struct err *e)
{
    const cudaDataType type = half ? CUDA_R_16BF : CUDA_R_32F;
    const int32_t i = call.first;
    void **b = (void **)p->device.at + i, **a = b + p->n_products, **c = a + p->n_products;
    return BLAS_TRY(e, rank, cublasGemmGroupedBatchedEx(
        blas, p->as_it_is + i, p->as_it_is + i, p->m + i, p->n + i, p->k + i, p->one + i, (const void *const *)b, type,
        p->m + i, (const void *const *)a, type, p->k + i, p->zero + i, c, type, p->m + i, call.n, p->one_each + i,
        CUBLAS_COMPUTE_32F));
}
#endif

/* One product alone is not a group: calls for one choose among more kernels. */
bool cuda_products_by_list(const struct cuda_products *p, int64_t call)
{
    const struct cuda_call *c = &p->call[call];
    return !c->fp8 && (c->n > 1 || c->listed) && cuda_products_grouped() && !p->one_by_one;
}

int cuda_products_run(const struct cuda_products *p, int64_t call, bool half, const struct cuda_stream *s, int32_t rank,
                      struct err *e)
{
    const struct cuda_call c = p->call[call];
    for (int32_t i = c.first; c.fp8 && i < c.first + c.n && !e->code; i++)
        cuda_fp8_run(&p->fp8, p->shape[i], p->at[3 * i + 1], p->at[3 * i], p->scale[i], p->at[3 * i + 2],
                     s->workspace.at, s->stream, rank, e);
    if (c.fp8)
        return e->code;
#if CUBLAS_VERSION >= 120500
    if (cuda_products_by_list(p, call))
        return run_grouped(p, c, half, s->blas, rank, e);
#endif
    for (int32_t i = c.first; i < c.first + c.n && !e->code; i++)
        run_one(p->m[i], p->n[i], p->k[i], p->at[3 * i], p->at[3 * i + 1], p->at[3 * i + 2], half, s->blas, rank,
                e);
    return e->code;
}
