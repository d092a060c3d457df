/* SPDX-License-Identifier: Apache-2.0
 * cuda_kernels.h - kernels of our own, as C functions that queue them on a stream. Tests have twins of these on the
 * host's memory (tests/standins/kernels.c).
 *
 * Elements are bf16 where `half`, else float. Sums are in float. Each returns what cudaGetLastError() says. */
#ifndef CUDA_KERNELS_H
#define CUDA_KERNELS_H

#include <cuda_runtime_api.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Row i of `to` is row index[i] of `from`; rows of `bytes`. */
cudaError_t cuda_gather(cudaStream_t, size_t bytes, int32_t n, const int32_t *index, const void *from, void *to);
/* gate[i] = silu(gate[i]) * up[i] */
cudaError_t cuda_activate(cudaStream_t, bool half, int64_t n, void *gate, const void *up);
/* Rows of d bf16 numbers, a multiple of 8, in FP8 (e4m3), each with a scale of its own: cuda_e4m3.h. Row index[i] of
 * `from` is row i of `to`, times scale[i]. */
cudaError_t cuda_gather_e4m3(cudaStream_t, int32_t d, int32_t n, const int32_t *index, const void *from, uint8_t *to,
                             float *scale);
/* to[i] * to_scale[i] = silu(scale[i] * gate[i]) * scale[i] * up[i], of n rows of d. */
cudaError_t cuda_activate_e4m3(cudaStream_t, int32_t d, int32_t n, const float *scale, const void *gate, const void *up,
                               uint8_t *to, float *to_scale);
/* rows[i] *= scale[i], of n rows of d bf16 numbers. */
cudaError_t cuda_scale_rows(cudaStream_t, int32_t d, int32_t n, const float *scale, void *rows);
/* to[i] = normalise(rows[before[i]] + sum over first[i] <= j < first[i + 1] of weight[j] * rows[row[j]]), see
 * host_model.h. Token i's list begins at first[i]; to: n rows behind each other, none of which is read. */
struct cuda_combine { const int32_t *before, *first, *row; const float *weight; };
cudaError_t cuda_combine(cudaStream_t, bool half, int32_t d, int32_t n, struct cuda_combine, const void *rows,
                         void *to);
/* The k experts of the highest logits of each of n tokens, highest first, the lower number of equals first. k <= 32. */
cudaError_t cuda_top_k(cudaStream_t, int32_t n, int32_t n_experts, int32_t k, const float *logits, int32_t *ids);
/* to[i] = from[i] / 2, of n floats: moves 8 n bytes. */
cudaError_t cuda_move(cudaStream_t, int64_t n, const float *from, float *to);

#ifdef __cplusplus
}
#endif

#endif
