/* SPDX-License-Identifier: Apache-2.0
 * lt.c - see standin.h: the part of cuBLASLt that the module uses, for FP8. What a GPU's would refuse is refused. */
#include "standin.h"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

/* Fields of the library's opaque structures, as they are used here. */
enum { DESC_TRANS_A, DESC_TRANS_B, DESC_SCALE_A, DESC_SCALE_B, DESC_COMPUTE, DESC_TYPE };
enum { LAYOUT_TYPE, LAYOUT_ROWS, LAYOUT_COLS, LAYOUT_LD };
enum { PREF_WORKSPACE, PREF_ALIGNED = 1 /* of A, B, C, D */ };
struct cublasLtContext { int unused; };

static void *made(size_t size)
{
    void *p = calloc(1, size);
    if (!p)
        abort();
    standin_count(1);
    return p;
}

static cublasStatus_t unmade(void *p)
{
    standin_count(-1);
    free(p);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { *h = made(sizeof **h); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { return unmade(h); }
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return unmade(d); }
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return unmade(l); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return unmade(p); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute, cudaDataType_t scale)
{
    *d = made(sizeof **d);
    (*d)->data[DESC_COMPUTE] = (uint64_t)compute;
    (*d)->data[DESC_TYPE] = (uint64_t)scale;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t what,
                                              const void *value, size_t size)
{
    const int field = what == CUBLASLT_MATMUL_DESC_TRANSA ? DESC_TRANS_A
                      : what == CUBLASLT_MATMUL_DESC_TRANSB ? DESC_TRANS_B
                      : what == CUBLASLT_MATMUL_DESC_A_SCALE_POINTER ? DESC_SCALE_A
                      : what == CUBLASLT_MATMUL_DESC_B_SCALE_POINTER ? DESC_SCALE_B : -1;
    if (field < 0 || size != (field >= DESC_SCALE_A ? sizeof(void *) : sizeof(cublasOperation_t)))
        return CUBLAS_STATUS_INVALID_VALUE;
    d->data[field] = 0;
    memcpy(&d->data[field], value, size);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t ld)
{
    *l = made(sizeof **l);
    (*l)->data[LAYOUT_TYPE] = (uint64_t)type;
    (*l)->data[LAYOUT_ROWS] = rows;
    (*l)->data[LAYOUT_COLS] = cols;
    (*l)->data[LAYOUT_LD] = (uint64_t)ld;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p)
{
    *p = made(sizeof **p);
    for (int i = 0; i < 4; i++)
        (*p)->data[PREF_ALIGNED + i] = 256;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                    cublasLtMatmulPreferenceAttributes_t what, const void *value,
                                                    size_t size)
{
    const int aligned = (int)what - (int)CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    if (what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES && size == sizeof(uint64_t)) {
        memcpy(&p->data[PREF_WORKSPACE], value, size);
    } else if (aligned >= 0 && aligned < 4 && size == sizeof(uint32_t)) {
        p->data[PREF_ALIGNED + aligned] = 0;
        memcpy(&p->data[PREF_ALIGNED + aligned], value, size);
    } else {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* A (k x m) is transposed, B is k x n, D m x n; all as dense as they can be. */
static bool supported(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                      cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d)
{
    const uint64_t k = a->data[LAYOUT_ROWS], m = a->data[LAYOUT_COLS], n = b->data[LAYOUT_COLS];
    return desc->data[DESC_TRANS_A] == CUBLAS_OP_T && desc->data[DESC_TRANS_B] == CUBLAS_OP_N &&
           desc->data[DESC_SCALE_A] != 0 && desc->data[DESC_SCALE_B] != 0 &&
           desc->data[DESC_COMPUTE] == CUBLAS_COMPUTE_32F && desc->data[DESC_TYPE] == CUDA_R_32F && c == d &&
           a->data[LAYOUT_TYPE] == CUDA_R_8F_E4M3 && b->data[LAYOUT_TYPE] == CUDA_R_8F_E4M3 &&
           d->data[LAYOUT_TYPE] == CUDA_R_16BF && b->data[LAYOUT_ROWS] == k && d->data[LAYOUT_ROWS] == m &&
           d->data[LAYOUT_COLS] == n && a->data[LAYOUT_LD] == k && b->data[LAYOUT_LD] == k &&
           d->data[LAYOUT_LD] == m && m % 16 == 0 && k % 16 == 0 && m > 0 && n > 0 && k > 0;
}

/* What an algorithm was found for. */
static void describe(cublasLtMatmulAlgo_t *algo, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t d)
{
    memset(algo, 0, sizeof *algo);
    algo->data[0] = a->data[LAYOUT_ROWS];
    algo->data[1] = d->data[LAYOUT_ROWS];
    algo->data[2] = d->data[LAYOUT_COLS];
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t p, int most,
                                              cublasLtMatmulHeuristicResult_t *found, int *n)
{
    *n = h && most > 0 && supported(desc, a, b, c, d);
    for (int i = 0; i < 4; i++)
        *n = *n && p->data[PREF_ALIGNED + i] <= 16;
    if (*n > 0)
        describe(&found->algo, a, d);
    return CUBLAS_STATUS_SUCCESS;
}

struct product { uint64_t m, n, k; const uint8_t *a, *b; const float *scale[2]; uint16_t *d; };

/* Doubled as often as the exponent says. */
static float value(uint8_t code)
{
    float size = (float)(code & 7) / 512;
    for (int i = 1; i <= (code >> 3 & 15); i++)
        size = i == 1 ? size + 1.0f / 64 : 2 * size;
    if ((code & 0x7f) == 0x7f)
        memset(&size, 0xff, sizeof size);
    return code & 0x80 ? -size : size;
}

static void multiply(const void *work)
{
    const struct product *p = work;
    float table[256];
    for (int i = 0; i < 256; i++)
        table[i] = value((uint8_t)i);
    for (uint64_t j = 0; j < p->n; j++)
        for (uint64_t i = 0; i < p->m; i++) {
            float sum = 0;
            for (uint64_t l = 0; l < p->k; l++)
                sum += table[p->a[i * p->k + l]] * table[p->b[j * p->k + l]];
            p->d[j * p->m + i] = standin_half(*p->scale[0] * *p->scale[1] * sum);
        }
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t desc, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t al, const void *b, cublasLtMatrixLayout_t bl, const void *beta,
                              const void *c, cublasLtMatrixLayout_t cl, void *d, cublasLtMatrixLayout_t dl,
                              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t size, cudaStream_t stream)
{
    cublasLtMatmulAlgo_t expected;
    float one, zero;
    struct product p = { dl->data[LAYOUT_ROWS], dl->data[LAYOUT_COLS], al->data[LAYOUT_ROWS], a, b, { NULL, NULL }, d };
    memcpy(&one, alpha, sizeof one);
    memcpy(&zero, beta, sizeof zero);
    memcpy(p.scale, &desc->data[DESC_SCALE_A], sizeof p.scale);
    describe(&expected, al, dl);
    if (!h || !supported(desc, al, bl, cl, dl) || memcmp(algo, &expected, sizeof expected) != 0 || one < 1 || one > 1 ||
        zero < 0 || zero > 0 || c != d || !workspace || size == 0 || (uintptr_t)a % 16 || (uintptr_t)b % 16 ||
        (uintptr_t)d % 16)
        return CUBLAS_STATUS_INVALID_VALUE;
    standin_blas_note((struct standin_product){ (int)p.m, (int)p.n, (int)p.k, a, b, d });
    return standin_queue(stream, "gemm in fp8", 2.0 * (double)p.m * (double)p.n * (double)p.k, multiply, &p, sizeof p)
           == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
