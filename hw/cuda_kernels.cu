/* SPDX-License-Identifier: Apache-2.0
 * cuda_kernels.cu - see cuda_kernels.h. All of these are bound by memory: rows are read 16 bytes a thread where their
 * size allows it. */
#include "cuda_kernels.h"

#include <cuda_bf16.h>

enum { THREADS = 256, MAX_BLOCKS = 1 << 16, SHARED_FLOATS = 12000 /* below 48 KiB, without asking for more */ };

template <typename T>
__global__ void gather(size_t n_words, int32_t n, const int32_t *index, const T *from, T *to)
{
    for (int32_t i = blockIdx.x; i < n; i += gridDim.x)
        for (size_t j = threadIdx.x; j < n_words; j += blockDim.x)
            to[(size_t)i * n_words + j] = from[(size_t)index[i] * n_words + j];
}

static int blocks(int64_t n)
{
    return (int)(n < 1 ? 1 : n < MAX_BLOCKS ? n : MAX_BLOCKS);
}

cudaError_t cuda_gather(cudaStream_t s, size_t bytes, int32_t n, const int32_t *index, const void *from, void *to)
{
    if (n == 0)
        return cudaSuccess;
    if (bytes % sizeof(uint4) == 0)
        gather<<<blocks(n), THREADS, 0, s>>>(bytes / sizeof(uint4), n, index, (const uint4 *)from, (uint4 *)to);
    else
        gather<<<blocks(n), THREADS, 0, s>>>(bytes / 2, n, index, (const uint16_t *)from, (uint16_t *)to);
    return cudaGetLastError();
}

static __device__ float get(const float *p) { return *p; }
static __device__ float get(const __nv_bfloat16 *p) { return __bfloat162float(*p); }
static __device__ void put(float *p, float v) { *p = v; }
static __device__ void put(__nv_bfloat16 *p, float v) { *p = __float2bfloat16(v); }

template <typename T> __global__ void activate(int64_t n, T *gate, const T *up)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        float g = get(gate + i);
        put(gate + i, g / (1 + expf(-g)) * get(up + i));
    }
}

cudaError_t cuda_activate(cudaStream_t s, bool half, int64_t n, void *gate, const void *up)
{
    if (n == 0)
        return cudaSuccess;
    int b = blocks((n + THREADS - 1) / THREADS);
    if (half)
        activate<<<b, THREADS, 0, s>>>(n, (__nv_bfloat16 *)gate, (const __nv_bfloat16 *)up);
    else
        activate<<<b, THREADS, 0, s>>>(n, (float *)gate, (const float *)up);
    return cudaGetLastError();
}

template <typename T> static __device__ float sum_of(const struct cuda_combine &c, const T *rows, int32_t d, int32_t i,
                                                     int32_t j)
{
    float sum = get(rows + (size_t)c.before[i] * d + j);
    for (int32_t k = c.first[i]; k < c.first[i + 1]; k++)
        sum += c.weight[k] * get(rows + (size_t)c.row[k] * d + j);
    return sum;
}

/* A block for each token. Sums wait in shared memory for their mean square; rows too wide for that are summed twice. */
template <typename T> __global__ void combine(int32_t d, int32_t n, struct cuda_combine c, const T *rows, T *to)
{
    extern __shared__ float kept[];
    __shared__ float part[THREADS / 32], scale;
    const bool fits = d <= SHARED_FLOATS;
    for (int32_t i = blockIdx.x; i < n; i += gridDim.x) {
        float squares = 0;
        for (int32_t j = threadIdx.x; j < d; j += blockDim.x) {
            float sum = sum_of(c, rows, d, i, j);
            if (fits)
                kept[j] = sum;
            squares += sum * sum;
        }
        for (int o = 16; o > 0; o /= 2)
            squares += __shfl_down_sync(0xffffffffu, squares, o);
        if (threadIdx.x % 32 == 0)
            part[threadIdx.x / 32] = squares;
        __syncthreads();
        if (threadIdx.x == 0) {
            float all = 0;
            for (int w = 0; w < THREADS / 32; w++)
                all += part[w];
            scale = rsqrtf(all / d + 1e-6f);
        }
        __syncthreads();
        for (int32_t j = threadIdx.x; j < d; j += blockDim.x)
            put(to + (size_t)i * d + j, scale * (fits ? kept[j] : sum_of(c, rows, d, i, j)));
        __syncthreads(); /* the next token's sums and scale go where these are */
    }
}

cudaError_t cuda_combine(cudaStream_t s, bool half, int32_t d, int32_t n, struct cuda_combine c, const void *rows,
                         void *to)
{
    size_t shared = d <= SHARED_FLOATS ? (size_t)d * sizeof(float) : 0;
    if (n == 0)
        return cudaSuccess;
    if (half)
        combine<<<blocks(n), THREADS, shared, s>>>(d, n, c, (const __nv_bfloat16 *)rows, (__nv_bfloat16 *)to);
    else
        combine<<<blocks(n), THREADS, shared, s>>>(d, n, c, (const float *)rows, (float *)to);
    return cudaGetLastError();
}

/* A warp for each token: k times the best of those that come after the last one taken. */
__global__ void top_k(int32_t n, int32_t n_experts, int32_t k, const float *logits, int32_t *ids)
{
    const int32_t lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
    for (int32_t t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; t < n; t += warps) {
        const float *row = logits + (size_t)t * n_experts;
        float last = INFINITY;
        int32_t last_id = -1;
        for (int32_t i = 0; i < k; i++) {
            float best = -INFINITY;
            int32_t id = INT32_MAX;
            for (int32_t e = lane; e < n_experts; e += 32) {
                const float v = row[e];
                const bool left = v < last || (v == last && e > last_id);
                if (left && (v > best || (v == best && e < id))) {
                    best = v;
                    id = e;
                }
            }
            for (int o = 16; o > 0; o /= 2) {
                const float v = __shfl_xor_sync(0xffffffffu, best, o);
                const int32_t e = __shfl_xor_sync(0xffffffffu, id, o);
                if (v > best || (v == best && e < id)) {
                    best = v;
                    id = e;
                }
            }
            if (lane == 0)
                ids[(size_t)t * k + i] = id;
            last = best;
            last_id = id;
        }
    }
}

cudaError_t cuda_top_k(cudaStream_t s, int32_t n, int32_t n_experts, int32_t k, const float *logits, int32_t *ids)
{
    if (n == 0)
        return cudaSuccess;
    top_k<<<blocks((n + THREADS / 32 - 1) / (THREADS / 32)), THREADS, 0, s>>>(n, n_experts, k, logits, ids);
    return cudaGetLastError();
}

__global__ void move(int64_t n, const float *from, float *to)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
        to[i] = 0.5f * from[i];
}

cudaError_t cuda_move(cudaStream_t s, int64_t n, const float *from, float *to)
{
    if (n == 0)
        return cudaSuccess;
    move<<<blocks((n + THREADS - 1) / THREADS), THREADS, 0, s>>>(n, from, to);
    return cudaGetLastError();
}
