/* SPDX-License-Identifier: Apache-2.0
 * cuda_check.c - see cuda_check.h. */
#include "config.h"

#include "cuda_check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failed(struct err *e, int32_t rank, const char *call, const char *text)
{
    int device = -1;
    cudaGetDevice(&device);
    return err_set(e, ERR_RUN, "rank %d, GPU %d: %.*s: %s", rank, device, (int)strcspn(call, "("), call, text);
}

int cuda_check(struct err *e, int32_t rank, cudaError_t code, const char *call)
{
    return code == cudaSuccess ? 0 : failed(e, rank, call, cudaGetErrorString(code));
}

int cuda_blas_check(struct err *e, int32_t rank, cublasStatus_t code, const char *call)
{
    return code == CUBLAS_STATUS_SUCCESS ? 0 : failed(e, rank, call, cublasGetStatusString(code));
}

int cuda_take(void **p, size_t bytes, int32_t rank, const char *what, struct err *e)
{
    size_t left = 0, all = 0;
    *p = NULL;
    if (e->code)
        return e->code;
    const cudaError_t code = cudaMalloc(p, bytes ? bytes : 1);
    if (code == cudaErrorMemoryAllocation) {
        cudaGetLastError(); /* it would be the next call's */
        if (cudaMemGetInfo(&left, &all) != cudaSuccess)
            left = all = 0;
        return err_set(e, ERR_MEMORY, "rank %d: out of device memory: %.3f GB for %s, of which %.0f%% would fit: "
                       "%.3f GB of %.3f GB are free. Keep fewer experts on the device (offload and cache), run fewer "
                       "tokens, or fewer virtual ranks", rank, (double)bytes / 1e9, what,
                       100 * (double)left / (double)bytes, (double)left / 1e9, (double)all / 1e9);
    }
    if (cuda_check(e, rank, code, "cudaMalloc") == 0)
        CUDA_TRY(e, rank, cudaMemset(*p, 0xff, bytes ? bytes : 1));
    return e->code;
}

int cuda_take_more(void **p, size_t *room, size_t bytes, int32_t rank, const char *what, struct err *e)
{
    if (*p && bytes <= *room)
        return e->code;
    CUDA_TRY(e, rank, cudaFree(*p));
    *p = NULL;
    *room = 0;
    if (cuda_take(p, bytes, rank, what, e) == 0)
        *room = bytes;
    return e->code;
}

bool cuda_grow(void *list, int64_t *room, int64_t need, size_t size, struct err *e)
{
    void *old;
    if (need <= *room)
        return !e->code;
    const int64_t more = need + need / 2 + 64;
    memcpy(&old, list, sizeof old); /* of whatever type the list is */
    void *grown = more < INT64_MAX / (int64_t)size ? realloc(old, (size_t)more * size) : NULL;
    if (!grown) {
        err_set(e, ERR_MEMORY, "out of memory for a list of %lld entries", (long long)need);
        return false;
    }
    memcpy(list, &grown, sizeof grown);
    *room = more;
    return !e->code;
}

int cuda_find_device(struct err *e)
{
    int driver = 0, runtime = 0, n = 0;
    const cudaError_t code = cudaGetDeviceCount(&n); /* leaves n alone when it fails */
    if (cudaDriverGetVersion(&driver) != cudaSuccess)
        driver = 0;
    if (cudaRuntimeGetVersion(&runtime) != cudaSuccess)
        runtime = 0;
    if (code == cudaErrorInsufficientDriver && driver > 0)
        return err_set(e, ERR_INPUT, "the driver is for CUDA %d.%d, expected %d.%d or newer: install a newer one, or "
                       "build moelab with an older toolkit", driver / 1000, driver % 1000 / 10, runtime / 1000,
                       runtime % 1000 / 10);
    if (driver == 0)
        return err_set(e, ERR_INPUT, "no GPU: there is no driver (%s)", cudaGetErrorString(code));
    if (code != cudaSuccess || n == 0)
        return err_set(e, ERR_INPUT, "no GPU: %s", code == cudaSuccess ? "the driver knows of none" :
                       cudaGetErrorString(code));
    return 0;
}
