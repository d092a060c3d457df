/* SPDX-License-Identifier: Apache-2.0
 * kernels.c - see standin.h: twins of our own kernels, and the part of cuBLAS that the module uses. Plain loops. */
#include "standin.h"

#include "cuda_kernels.h"

#include <cublas_v2.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- elements ---- */

static float get(bool half, const void *p, size_t i)
{
    uint16_t h;
    uint32_t bits;
    float v;
    if (!half) {
        memcpy(&v, (const char *)p + 4 * i, sizeof v);
        return v;
    }
    memcpy(&h, (const char *)p + 2 * i, sizeof h);
    bits = (uint32_t)h << 16;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static void put(bool half, void *p, size_t i, float v)
{
    uint32_t bits;
    if (!half) {
        memcpy((char *)p + 4 * i, &v, sizeof v);
        return;
    }
    memcpy(&bits, &v, sizeof bits);
    const uint16_t h = (uint16_t)(isnan(v) ? 0xffff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    memcpy((char *)p + 2 * i, &h, sizeof h);
}

uint16_t standin_half(float v)
{
    uint16_t h;
    put(true, &h, 0, v);
    return h;
}

/* ---- kernels ---- */

struct gather { size_t bytes; int32_t n; const int32_t *index; const char *from; char *to; };

static void gather(const void *work)
{
    const struct gather *g = work;
    for (int32_t i = 0; i < g->n; i++)
        memcpy(g->to + (size_t)i * g->bytes, g->from + (size_t)g->index[i] * g->bytes, g->bytes);
}

cudaError_t cuda_gather(cudaStream_t s, size_t bytes, int32_t n, const int32_t *index, const void *from, void *to)
{
    const struct gather g = { bytes, n, index, from, to };
    return standin_queue(s, "gather", n, gather, &g, sizeof g);
}

struct activate { bool half; int64_t n; void *gate; const void *up; };

static void activate(const void *work)
{
    const struct activate *a = work;
    for (size_t i = 0; i < (size_t)a->n; i++) {
        const float g = get(a->half, a->gate, i);
        put(a->half, a->gate, i, g / (1 + expf(-g)) * get(a->half, a->up, i));
    }
}

cudaError_t cuda_activate(cudaStream_t s, bool half, int64_t n, void *gate, const void *up)
{
    const struct activate a = { half, n, gate, up };
    return standin_queue(s, "activate", (double)n, activate, &a, sizeof a);
}

/* ---- FP8 ---- */

/* The nearest of all codes, of two the even one: by looking at each. */
static uint8_t nearest(float v)
{
    uint8_t best = 0;
    float least = INFINITY;
    for (int code = 0; code < 0x7f; code++) {
        const int exponent = code >> 3;
        const float size = ldexpf((float)(exponent ? 8 + code % 8 : code % 8), (exponent ? exponent : 1) - 10);
        const float off = fabsf(fabsf(v) - size);
        if (off < least || (off <= least && code % 2 == 0)) {
            best = (uint8_t)code;
            least = off;
        }
    }
    return (uint8_t)((isnan(v) ? 0x7f : best) | (signbit(v) ? 0x80 : 0));
}

/* Into codes and the row's scale, which is doubled and halved until it is the least that will do. */
static void encode(int32_t d, const float *row, uint8_t *to, float *scale)
{
    float most = 0;
    *scale = 1;
    for (int32_t j = 0; j < d; j++)
        most = fmaxf(most, fabsf(row[j]));
    while (most > 448 * *scale)
        *scale *= 2;
    while (most > 0 && most <= 448 * (*scale / 2))
        *scale /= 2;
    for (int32_t j = 0; j < d; j++)
        to[j] = nearest(row[j] / *scale);
}

struct to_e4m3 {
    int32_t d, n;
    const int32_t *index;
    const float *scale;
    const void *from, *up;
    uint8_t *to;
    float *out;
};

static void to_e4m3(const void *work)
{
    const struct to_e4m3 *a = work;
    const size_t d = (size_t)a->d;
    float *row = malloc(d * sizeof *row);
    for (size_t i = 0; row && i < (size_t)a->n; i++) {
        const size_t from = a->index ? (size_t)a->index[i] : i;
        for (size_t j = 0; j < d; j++) {
            row[j] = get(true, a->from, from * d + j);
            if (a->up) {
                const float g = a->scale[i] * row[j];
                row[j] = g / (1 + expf(-g)) * (a->scale[i] * get(true, a->up, i * d + j));
            }
        }
        encode(a->d, row, a->to + i * d, &a->out[i]);
    }
    free(row);
}

cudaError_t cuda_gather_e4m3(cudaStream_t s, int32_t d, int32_t n, const int32_t *index, const void *from, uint8_t *to,
                             float *scale)
{
    const struct to_e4m3 a = { .d = d, .n = n, .index = index, .from = from, .to = to, .out = scale };
    return standin_queue(s, "gather in fp8", n, to_e4m3, &a, sizeof a);
}

cudaError_t cuda_activate_e4m3(cudaStream_t s, int32_t d, int32_t n, const float *scale, const void *gate,
                               const void *up, uint8_t *to, float *to_scale)
{
    const struct to_e4m3 a = { .d = d, .n = n, .scale = scale, .from = gate, .up = up, .to = to, .out = to_scale };
    return standin_queue(s, "activate in fp8", n, to_e4m3, &a, sizeof a);
}

struct scale_rows { int32_t d, n; const float *scale; void *rows; };

static void scale_rows(const void *work)
{
    const struct scale_rows *a = work;
    for (size_t i = 0; i < (size_t)a->n * (size_t)a->d; i++)
        put(true, a->rows, i, a->scale[i / (size_t)a->d] * get(true, a->rows, i));
}

cudaError_t cuda_scale_rows(cudaStream_t s, int32_t d, int32_t n, const float *scale, void *rows)
{
    const struct scale_rows a = { d, n, scale, rows };
    return standin_queue(s, "scale", n, scale_rows, &a, sizeof a);
}

struct combine { bool half; int32_t d, n; struct cuda_combine lists; const void *rows; void *to; };

static void combine(const void *work)
{
    const struct combine *c = work;
    const size_t d = (size_t)c->d;
    float *sum = malloc(d * sizeof *sum);
    for (size_t i = 0; sum && i < (size_t)c->n; i++) {
        float squares = 0;
        for (size_t j = 0; j < d; j++) {
            sum[j] = get(c->half, c->rows, (size_t)c->lists.before[i] * d + j);
            for (int32_t k = c->lists.first[i]; k < c->lists.first[i + 1]; k++)
                sum[j] += c->lists.weight[k] * get(c->half, c->rows, (size_t)c->lists.row[k] * d + j);
            squares += sum[j] * sum[j];
        }
        for (size_t j = 0; j < d; j++)
            put(c->half, c->to, i * d + j, sum[j] / sqrtf(squares / (float)d + 1e-6f));
    }
    free(sum);
}

cudaError_t cuda_combine(cudaStream_t s, bool half, int32_t d, int32_t n, struct cuda_combine lists, const void *rows,
                         void *to)
{
    const struct combine c = { half, d, n, lists, rows, to };
    return standin_queue(s, "combine", n, combine, &c, sizeof c);
}

struct top_k { int32_t n, n_experts, k; const float *logits; int32_t *ids; };

/* Not as the module's own check goes: by striking out what is chosen. */
static void top_k(const void *work)
{
    const struct top_k *a = work;
    bool *chosen = malloc((size_t)a->n_experts);
    for (int32_t t = 0; chosen && t < a->n; t++) {
        const float *row = a->logits + (size_t)t * (size_t)a->n_experts;
        memset(chosen, 0, (size_t)a->n_experts);
        for (int32_t i = 0; i < a->k; i++) {
            int32_t best = -1;
            for (int32_t e = 0; e < a->n_experts; e++)
                if (!chosen[e] && (best < 0 || row[e] > row[best]))
                    best = e;
            chosen[best] = true;
            a->ids[(size_t)t * (size_t)a->k + (size_t)i] = best;
        }
    }
    free(chosen);
}

cudaError_t cuda_top_k(cudaStream_t s, int32_t n, int32_t n_experts, int32_t k, const float *logits, int32_t *ids)
{
    const struct top_k a = { n, n_experts, k, logits, ids };
    return standin_queue(s, "top-k", n, top_k, &a, sizeof a);
}

struct move { int64_t n; const float *from; float *to; };

static void move(const void *work)
{
    const struct move *m = work;
    for (int64_t i = 0; i < m->n; i++)
        m->to[i] = 0.5f * m->from[i];
}

cudaError_t cuda_move(cudaStream_t s, int64_t n, const float *from, float *to)
{
    const struct move m = { n, from, to };
    return standin_queue(s, "move", (double)n, move, &m, sizeof m);
}

/* ---- cuBLAS: only what is asked for here, columns first ---- */

struct cublasContext { cudaStream_t stream; };

cublasStatus_t cublasCreate(cublasHandle_t *h)
{
    *h = calloc(1, sizeof **h);
    return *h ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasDestroy(cublasHandle_t h)
{
    free(h);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace(cublasHandle_t h, void *at, size_t bytes)
{
    (void)h;
    return at && bytes > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasSetStream(cublasHandle_t h, cudaStream_t s)
{
    h->stream = s;
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusString(cublasStatus_t code)
{
    return code == CUBLAS_STATUS_SUCCESS ? "success" : "an error";
}

/* What is queued: sizes are those of the call, and where matrices are is read when the stream comes to it. */
struct gemm {
    bool half;
    int m, n, k;
    const void *a, *b;
    void *c;
    const void *const *a_at, *const *b_at;
    void *const *c_at;
};

static struct { struct standin_call *call; size_t n; } record;

size_t standin_blas(const struct standin_call **calls)
{
    *calls = record.call;
    return record.n;
}

void standin_blas_clear(void)
{
    for (size_t i = 0; i < record.n; i++)
        free(record.call[i].product);
    free(record.call);
    record.call = NULL;
    record.n = 0;
}

static struct standin_product *note(int n)
{
    record.call = realloc(record.call, (record.n + 1) * sizeof *record.call);
    struct standin_product *p = calloc((size_t)n, sizeof *p);
    if (!record.call || !p)
        abort();
    record.call[record.n++] = (struct standin_call){ n, p };
    return p;
}

void standin_blas_note(struct standin_product p)
{
    *note(1) = p;
}

static void gemm(const void *work)
{
    const struct gemm *g = work;
    const void *a = g->a_at ? *g->a_at : g->a, *b = g->b_at ? *g->b_at : g->b;
    void *c = g->c_at ? *g->c_at : g->c;
    const size_t m = (size_t)g->m, n = (size_t)g->n, k = (size_t)g->k;
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            float sum = 0;
            for (size_t l = 0; l < k; l++)
                sum += get(g->half, a, l * m + i) * get(g->half, b, j * k + l);
            put(g->half, c, j * m + i, sum);
        }
}

/* Matrices lie as densely as they can, and are not transposed or scaled. */
static bool plain(cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, float alpha, float beta, int lda,
                  int ldb, int ldc)
{
    return ta == CUBLAS_OP_N && tb == CUBLAS_OP_N && m > 0 && n > 0 && k > 0 && lda == m && ldb == k && ldc == m &&
           alpha >= 1 && alpha <= 1 && beta >= 0 && beta <= 0;
}

static bool typed(cudaDataType a, cudaDataType b, cudaDataType c, cublasComputeType_t compute)
{
    return a == b && a == c && (a == CUDA_R_16BF || a == CUDA_R_32F) && compute == CUBLAS_COMPUTE_32F;
}

cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType at, int lda, const void *b, cudaDataType bt,
                            int ldb, const void *beta, void *c, cudaDataType ct, int ldc, cublasComputeType_t compute,
                            cublasGemmAlgo_t algo)
{
    float one, zero;
    (void)algo;
    memcpy(&one, alpha, sizeof one);
    memcpy(&zero, beta, sizeof zero);
    if (!plain(ta, tb, m, n, k, one, zero, lda, ldb, ldc) || !typed(at, bt, ct, compute))
        return CUBLAS_STATUS_INVALID_VALUE;
    const struct gemm g = { .half = at == CUDA_R_16BF, .m = m, .n = n, .k = k, .a = a, .b = b, .c = c };
    *note(1) = (struct standin_product){ m, n, k, a, b, c };
    return standin_queue(h->stream, "gemm", 2.0 * m * n * k, gemm, &g, sizeof g) == cudaSuccess ?
           CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

/* As the manual has it: pointers are at multiples of what a row of A has of 16 or 4 bytes. */
static bool aligned(const void *p, size_t row)
{
    return (uintptr_t)p % (row % 16 == 0 ? 16 : row % 4 == 0 ? 4 : 1) == 0;
}

struct grouped { int n; struct gemm gemm[]; };

static void grouped(const void *work)
{
    const struct grouped *g = work;
    for (int i = 0; i < g->n; i++)
        gemm(&g->gemm[i]);
}

cublasStatus_t cublasGemmGroupedBatchedEx(cublasHandle_t h, const cublasOperation_t ta[], const cublasOperation_t tb[],
                                          const int m[], const int n[], const int k[], const void *alpha,
                                          const void *const a[], cudaDataType at, const int lda[],
                                          const void *const b[], cudaDataType bt, const int ldb[], const void *beta,
                                          void *const c[], cudaDataType ct, const int ldc[], int n_groups,
                                          const int size[], cublasComputeType_t compute)
{
    const float *ones = alpha, *zeros = beta;
    const size_t bytes = sizeof(struct grouped) + (size_t)n_groups * sizeof(struct gemm);
    struct grouped *all = calloc(1, bytes);
    struct standin_product *noted = note(n_groups);
    char what[40];
    double flops = 0;
    bool well = all && typed(at, bt, ct, compute);
    if (well)
        all->n = n_groups;
    for (int i = 0; well && i < n_groups; i++) {
        const size_t row = (at == CUDA_R_16BF ? 2 : 4) * (size_t)k[i];
        well &= size[i] == 1 && plain(ta[i], tb[i], m[i], n[i], k[i], ones[i], zeros[i], lda[i], ldb[i], ldc[i]) &&
                aligned(a[i], row) && aligned(b[i], row) && aligned(c[i], row);
        all->gemm[i] = (struct gemm){ .half = at == CUDA_R_16BF, .m = m[i], .n = n[i], .k = k[i], .a_at = a + i,
                                     .b_at = b + i, .c_at = c + i };
        noted[i] = (struct standin_product){ m[i], n[i], k[i], a[i], b[i], c[i] };
        flops += 2.0 * m[i] * n[i] * k[i];
    }
    snprintf(what, sizeof what, "gemms of %d", n_groups);
    const cublasStatus_t code = !well ? CUBLAS_STATUS_INVALID_VALUE
        : standin_queue(h->stream, what, flops, grouped, all, bytes) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                                    : CUBLAS_STATUS_EXECUTION_FAILED;
    free(all);
    return code;
}
