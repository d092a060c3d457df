/* SPDX-License-Identifier: Apache-2.0
 * cuda_check.h - every call of CUDA and cuBLAS goes through one of these. */
#ifndef CUDA_CHECK_H
#define CUDA_CHECK_H

#include "err.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Does nothing once an error is set. The message names the call, what it said, rank and device. */
#define CUDA_TRY(e, rank, call) ((e)->code ? (e)->code : cuda_check((e), (rank), (call), #call))
#define BLAS_TRY(e, rank, call) ((e)->code ? (e)->code : cuda_blas_check((e), (rank), (call), #call))

int cuda_check(struct err *, int32_t rank, cudaError_t, const char *call);
int cuda_blas_check(struct err *, int32_t rank, cublasStatus_t, const char *call);
/* Memory of the device, filled with not-a-number; an error says what for, how much is free and what to do about it. */
int cuda_take(void **, size_t bytes, int32_t rank, const char *what, struct err *);
/* The same where there is less than that; what was there is lost. */
int cuda_take_more(void **, size_t *room, size_t bytes, int32_t rank, const char *what, struct err *);
/* Room for `need` entries of `size` in a list of the host; false: no memory, or an error before. */
bool cuda_grow(void *list, int64_t *room, int64_t need, size_t size, struct err *);
/* 0: there is a GPU that this module's runtime can use. */
int cuda_find_device(struct err *);

#endif
