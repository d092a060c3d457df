/* SPDX-License-Identifier: Apache-2.0
 * cuda_products.h - products of matrices on a stream, those of a task in one call of cuBLAS.
 *
 * A grouped call (cuBLAS 12.5) reads from the device's memory where its matrices are. So all products of a plan are
 * listed and uploaded before a step's clock starts, and running them only queues calls. Where the library is older, the
 * products of a call are queued one by one. */
#ifndef CUDA_PRODUCTS_H
#define CUDA_PRODUCTS_H

#include "cuda_fp8.h"
#include "err.h"

#include <cublas_v2.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Matrices have to begin at multiples of so many bytes: a grouped call does not look where each begins, as a call for
 * one does. */
enum { CUDA_ALIGNED = 16 };

struct cuda_buffer { void *at; size_t room; };

/* C (m x n) = A (m x k) B (k x n), row by row; in fp8 B lies column by column, and is multiplied by what is at `scale`
 * on the device, if anything. */
struct cuda_product { int64_t m, n, k; const void *a, *b; void *to; const float *scale; };

struct cuda_stream;
/* listed: never as a call for one, which would be given places. */
struct cuda_call { int32_t first, n; bool fp8, listed; };

/* Of all calls behind one another. To cuBLAS, which goes by columns, a product is C' = B' A'. */
struct cuda_products {
    struct cuda_call *call;
    int *m, *n, *k, *one_each;     /* cuBLAS's m is our n */
    cublasOperation_t *as_it_is;
    float *one, *zero;
    void **at;                     /* B, A and C of each */
    void **sorted;                 /* as uploaded: all B, all A, all C */
    struct cuda_buffer device;
    const float **scale;           /* of those in fp8 */
    int64_t *shape;                /* likewise, in `fp8` */
    struct cuda_fp8 fp8;
    int64_t n_calls, room_calls, n_products, room[11];
    bool one_by_one;               /* by choice: whatever the library can */
};

/* Whether the library that was found has grouped calls. */
bool cuda_products_grouped(void);
void cuda_products_clear(struct cuda_products *);
/* The next call, which has no products yet; its number, or -1. */
int64_t cuda_products_call(struct cuda_products *, bool fp8, struct err *);
/* To the last call. What is written must not overlap with anything else of the call. */
int cuda_products_add(struct cuda_products *, const struct cuda_product *, int32_t rank, struct err *);
int cuda_products_upload(struct cuda_products *, int32_t rank, struct err *);
/* Whether a call reads from the device's memory where its matrices are. */
bool cuda_products_by_list(const struct cuda_products *, int64_t call);
/* In bf16 where `half`, else in fp32 (not TF32), or in fp8, one by one; sums are in fp32. */
int cuda_products_run(const struct cuda_products *, int64_t call, bool half, const struct cuda_stream *, int32_t rank,
                      struct err *);
/* One that is not listed. */
int cuda_product_run(const struct cuda_product *, bool half, cublasHandle_t, int32_t rank, struct err *);
void cuda_products_free(struct cuda_products *);

static inline size_t cuda_aligned(size_t bytes)
{
    return (bytes + CUDA_ALIGNED - 1) / CUDA_ALIGNED * CUDA_ALIGNED;
}

#endif
