/* SPDX-License-Identifier: Apache-2.0
 * cuda_fp8.c - see cuda_fp8.h. cuBLASLt goes by columns and wants its first matrix transposed: that is our weights, of
 * which each column's numbers lie behind each other; its second is our rows, as they are. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_fp8.h"

#include <stdlib.h>
#include <string.h>

static int set(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t what, const void *value, size_t size,
               int32_t rank, struct err *e)
{
    return BLAS_TRY(e, rank, cublasLtMatmulDescSetAttribute(d, what, value, size));
}

static int open_once(struct cuda_fp8 *f, int32_t rank, struct err *e)
{
    static const cublasLtMatmulPreferenceAttributes_t matrices[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES };
    const cublasOperation_t transposed = CUBLAS_OP_T, as_it_is = CUBLAS_OP_N;
    const uint64_t workspace = CUDA_FP8_WORKSPACE;
    const uint32_t aligned = CUDA_FP8_STEP;
    const float one = 1;
    if (f->lt)
        return e->code;
    cuda_take(&f->one, sizeof one, rank, "a scale", e);
    CUDA_TRY(e, rank, cudaMemcpy(f->one, &one, sizeof one, cudaMemcpyHostToDevice));
    BLAS_TRY(e, rank, cublasLtCreate(&f->lt));
    BLAS_TRY(e, rank, cublasLtMatmulDescCreate(&f->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(f->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed, rank, e);
    set(f->desc, CUBLASLT_MATMUL_DESC_TRANSB, &as_it_is, sizeof as_it_is, rank, e);
    /* Algorithms are chosen with scales in mind. */
    set(f->desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &f->one, sizeof f->one, rank, e);
    set(f->desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &f->one, sizeof f->one, rank, e);
    BLAS_TRY(e, rank, cublasLtMatmulPreferenceCreate(&f->preference));
    BLAS_TRY(e, rank, cublasLtMatmulPreferenceSetAttribute(f->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                           &workspace, sizeof workspace));
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        BLAS_TRY(e, rank, cublasLtMatmulPreferenceSetAttribute(f->preference, matrices[i], &aligned, sizeof aligned));
    return e->code;
}

static int choose(struct cuda_fp8 *f, struct cuda_fp8_shape *s, int32_t rank, struct err *e)
{
    cublasLtMatmulHeuristicResult_t found = { .workspaceSize = 0 };
    int n = 0;
    BLAS_TRY(e, rank, cublasLtMatrixLayoutCreate(&s->weights, CUDA_R_8F_E4M3, (uint64_t)s->k, (uint64_t)s->n, s->k));
    BLAS_TRY(e, rank, cublasLtMatrixLayoutCreate(&s->rows, CUDA_R_8F_E4M3, (uint64_t)s->k, (uint64_t)s->m, s->k));
    BLAS_TRY(e, rank, cublasLtMatrixLayoutCreate(&s->out, CUDA_R_16BF, (uint64_t)s->n, (uint64_t)s->m, s->n));
    BLAS_TRY(e, rank, cublasLtMatmulAlgoGetHeuristic(f->lt, f->desc, s->weights, s->rows, s->out, s->out, f->preference,
                                                     1, &found, &n));
    if (!e->code && n == 0)
        err_set(e, ERR_RUN, "rank %d: cuBLASLt has no product of %lld x %lld and %lld x %lld in fp8", rank,
                (long long)s->m, (long long)s->k, (long long)s->k, (long long)s->n);
    s->algo = found.algo;
    return e->code;
}

static void close_shape(struct cuda_fp8_shape *s)
{
    if (s->weights)
        cublasLtMatrixLayoutDestroy(s->weights);
    if (s->rows)
        cublasLtMatrixLayoutDestroy(s->rows);
    if (s->out)
        cublasLtMatrixLayoutDestroy(s->out);
}

int64_t cuda_fp8_shape(struct cuda_fp8 *f, int64_t m, int64_t n, int64_t k, int32_t rank, struct err *e)
{
    struct cuda_fp8_shape s = { .m = m, .n = n, .k = k };
    for (int64_t i = 0; i < f->n_shapes; i++)
        if (f->shape[i].m == m && f->shape[i].n == n && f->shape[i].k == k)
            return i;
    if (!e->code && (n % CUDA_FP8_STEP != 0 || k % CUDA_FP8_STEP != 0))
        err_set(e, ERR_INPUT, "rank %d: a product with weights of %lld x %lld in fp8: expected multiples of %d", rank,
                (long long)k, (long long)n, CUDA_FP8_STEP);
    if (e->code || open_once(f, rank, e) < 0 || choose(f, &s, rank, e) < 0 ||
        !cuda_grow(&f->shape, &f->room, f->n_shapes + 1, sizeof *f->shape, e)) {
        close_shape(&s);
        return -1;
    }
    f->shape[f->n_shapes] = s;
    return f->n_shapes++;
}

int cuda_fp8_run(const struct cuda_fp8 *f, int64_t shape, const void *rows, const void *weights, const float *scale,
                 void *to, void *workspace, cudaStream_t stream, int32_t rank, struct err *e)
{
    const struct cuda_fp8_shape *s = &f->shape[shape];
    const float one = 1, zero = 0;
    const void *at = scale ? (const void *)scale : f->one;
    set(f->desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &at, sizeof at, rank, e);
    return BLAS_TRY(e, rank, cublasLtMatmul(f->lt, f->desc, &one, weights, s->weights, rows, s->rows, &zero, to, s->out,
                                            to, s->out, &s->algo, workspace, CUDA_FP8_WORKSPACE, stream));
}

void cuda_fp8_close(struct cuda_fp8 *f)
{
    for (int64_t i = 0; i < f->n_shapes; i++)
        close_shape(&f->shape[i]);
    free(f->shape);
    cudaFree(f->one);
    if (f->preference)
        cublasLtMatmulPreferenceDestroy(f->preference);
    if (f->desc)
        cublasLtMatmulDescDestroy(f->desc);
    if (f->lt)
        cublasLtDestroy(f->lt);
    memset(f, 0, sizeof *f);
}
