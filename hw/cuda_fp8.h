/* SPDX-License-Identifier: Apache-2.0
 * cuda_fp8.h - products of FP8 matrices (e4m3) through cuBLASLt, each a call of its own; what they give is bf16. */
#ifndef CUDA_FP8_H
#define CUDA_FP8_H

#include "err.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

/* Rows and columns of both matrices of weights, and row lengths, have to be multiples of this. */
enum { CUDA_FP8_STEP = 16, CUDA_FP8_WORKSPACE = 32 << 20 /* bytes of a stream: what Hopper's kernels ask for */ };
enum { CUDA_FP8_CAPABILITY = 89 };

/* m rows, n columns of what is computed, k of what is multiplied; `algo` is what cuBLASLt thinks best. */
struct cuda_fp8_shape { int64_t m, n, k; cublasLtMatrixLayout_t weights, rows, out; cublasLtMatmulAlgo_t algo; };

/* All zero: nothing was asked of it yet. */
struct cuda_fp8 {
    cublasLtHandle_t lt;
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulPreference_t preference;
    void *one;                 /* a scale, on the device: what has none is multiplied by this */
    struct cuda_fp8_shape *shape;
    int64_t n_shapes, room;
};

/* The number of a shape, before the step's clock starts; -1: an error. */
int64_t cuda_fp8_shape(struct cuda_fp8 *, int64_t m, int64_t n, int64_t k, int32_t rank, struct err *);
/* to (m x n, bf16) = *scale * rows (m x k) weights' (k x n), the weights column by column; scale is on the device, or
 * NULL for 1. */
int cuda_fp8_run(const struct cuda_fp8 *, int64_t shape, const void *rows, const void *weights, const float *scale,
                 void *to, void *workspace, cudaStream_t, int32_t rank, struct err *);
void cuda_fp8_close(struct cuda_fp8 *);

#endif
