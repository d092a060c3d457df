/* SPDX-License-Identifier: Apache-2.0
 * cuda_kernels.cu - see cuda_kernels.h. All of these are bound by memory: rows are read 16 bytes a thread where their
 * size allows it. */
#include "cuda_kernels.h"
#include "cuda_e4m3.h"

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

/* ---- FP8: rows of 8 n numbers, 8 to a thread at a time, a block for each row ---- */

struct eight { float v[8]; };

static __device__ eight get8(const __nv_bfloat16 *p)
{
    const uint4 words = *(const uint4 *)p;
    const uint32_t word[] = { words.x, words.y, words.z, words.w };
    eight e;
    for (int i = 0; i < 4; i++) { /* bf16 is the upper half of a float */
        e.v[2 * i] = __uint_as_float(word[i] << 16);
        e.v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
    return e;
}

static __device__ eight activated(float scale, const eight &gate, const eight &up)
{
    eight e;
    for (int i = 0; i < 8; i++) {
        const float g = scale * gate.v[i];
        e.v[i] = g / (1 + expf(-g)) * (scale * up.v[i]);
    }
    return e;
}

/* Of all numbers that the block's threads have seen, the largest magnitude: to every thread. */
static __device__ float largest_of(float mine)
{
    __shared__ float part[THREADS / 32], all;
    for (int o = 16; o > 0; o /= 2)
        mine = fmaxf(mine, __shfl_down_sync(0xffffffffu, mine, o));
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        float most = 0;
        for (int w = 0; w < THREADS / 32; w++)
            most = fmaxf(most, part[w]);
        all = most;
    }
    __syncthreads();
    const float most = all;
    __syncthreads(); /* before the next row's */
    return most;
}

static __device__ float largest8(float most, const eight &e)
{
    for (int i = 0; i < 8; i++)
        most = fmaxf(most, fabsf(e.v[i]));
    return most;
}

static __device__ void put8(uint8_t *to, const eight &e, float scale)
{
    uint32_t word[2] = { 0, 0 };
    for (int i = 0; i < 8; i++)
        word[i / 4] |= (uint32_t)cuda_e4m3_of(e.v[i] / scale) << 8 * (i % 4);
    *(uint2 *)to = make_uint2(word[0], word[1]);
}

__global__ void gather_e4m3(int32_t d, int32_t n, const int32_t *index, const __nv_bfloat16 *from, uint8_t *to,
                            float *scale)
{
    for (int32_t i = blockIdx.x; i < n; i += gridDim.x) {
        const __nv_bfloat16 *row = from + (size_t)index[i] * d;
        float most = 0;
        for (int32_t j = 8 * threadIdx.x; j < d; j += 8 * blockDim.x)
            most = largest8(most, get8(row + j));
        const float s = cuda_e4m3_scale(largest_of(most));
        for (int32_t j = 8 * threadIdx.x; j < d; j += 8 * blockDim.x)
            put8(to + (size_t)i * d + j, get8(row + j), s);
        if (threadIdx.x == 0)
            scale[i] = s;
    }
}

cudaError_t cuda_gather_e4m3(cudaStream_t s, int32_t d, int32_t n, const int32_t *index, const void *from, uint8_t *to,
                             float *scale)
{
    if (n == 0)
        return cudaSuccess;
    gather_e4m3<<<blocks(n), THREADS, 0, s>>>(d, n, index, (const __nv_bfloat16 *)from, to, scale);
    return cudaGetLastError();
}

__global__ void activate_e4m3(int32_t d, int32_t n, const float *scale, const __nv_bfloat16 *gate,
                              const __nv_bfloat16 *up, uint8_t *to, float *to_scale)
{
    for (int32_t i = blockIdx.x; i < n; i += gridDim.x) {
        const size_t at = (size_t)i * d;
        float most = 0;
        for (int32_t j = 8 * threadIdx.x; j < d; j += 8 * blockDim.x)
            most = largest8(most, activated(scale[i], get8(gate + at + j), get8(up + at + j)));
        const float s = cuda_e4m3_scale(largest_of(most));
        for (int32_t j = 8 * threadIdx.x; j < d; j += 8 * blockDim.x)
            put8(to + at + j, activated(scale[i], get8(gate + at + j), get8(up + at + j)), s);
        if (threadIdx.x == 0)
            to_scale[i] = s;
    }
}

cudaError_t cuda_activate_e4m3(cudaStream_t s, int32_t d, int32_t n, const float *scale, const void *gate,
                               const void *up, uint8_t *to, float *to_scale)
{
    if (n == 0)
        return cudaSuccess;
    activate_e4m3<<<blocks(n), THREADS, 0, s>>>(d, n, scale, (const __nv_bfloat16 *)gate, (const __nv_bfloat16 *)up, to,
                                                to_scale);
    return cudaGetLastError();
}

__global__ void scale_rows(int32_t d, int32_t n, const float *scale, __nv_bfloat16 *rows)
{
    for (int32_t i = blockIdx.x; i < n; i += gridDim.x)
        for (int32_t j = threadIdx.x; j < d; j += blockDim.x)
            put(rows + (size_t)i * d + j, scale[i] * get(rows + (size_t)i * d + j));
}

cudaError_t cuda_scale_rows(cudaStream_t s, int32_t d, int32_t n, const float *scale, void *rows)
{
    if (n == 0)
        return cudaSuccess;
    scale_rows<<<blocks(n), THREADS, 0, s>>>(d, n, scale, (__nv_bfloat16 *)rows);
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
