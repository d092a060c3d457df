/* SPDX-License-Identifier: Apache-2.0
 * test_cuda_device.c - the kernels of machine cuda against plain loops, on a GPU; skipped where there is none. */
#include "core_test.h"

#include "cuda_e4m3.h"
#include "cuda_kernels.h"

#include <cuda_runtime_api.h>

#define CUDA(call) assert_int_equal((call), cudaSuccess)

/* Numbers that are the same in bf16, so that inputs need no rounding: multiples of 1/8 below 2. */
static float number(uint64_t i)
{
    return (float)(moe_mix(i) % 31) / 8 - 1.875f;
}

static float value(bool half, const void *p, size_t i)
{
    uint32_t bits;
    float v;
    if (half)
        bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    else
        bits = ((const uint32_t *)p)[i];
    memcpy(&v, &bits, sizeof v);
    return v;
}

static void *numbers(bool half, size_t n, uint64_t first)
{
    uint32_t *p = malloc(n * sizeof *p + 4), bits;
    assert_non_null(p);
    for (size_t i = 0; i < n; i++) {
        const float v = number(first + i);
        memcpy(&bits, &v, sizeof bits);
        if (half)
            ((uint16_t *)p)[i] = (uint16_t)(bits >> 16);
        else
            p[i] = bits;
    }
    return p;
}

static void *upload(const void *from, size_t bytes)
{
    void *p;
    CUDA(cudaMalloc(&p, bytes));
    CUDA(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return p;
}

static void fetch(void *to, const void *from, size_t bytes)
{
    CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

/* Rows of whole and of broken words of 16 bytes. */
static void gathers(void **state)
{
    static const size_t widths[] = { 16, 4096, 6, 4090 };
    (void)state;
    for (int w = 0; w < 4; w++) {
        enum { FROM = 300, TO = 1000 };
        const size_t bytes = widths[w];
        int32_t index[TO];
        char *from = numbers(true, FROM * bytes / 2, 0), *to = malloc(TO * bytes);
        for (int i = 0; i < TO; i++)
            index[i] = (int32_t)(moe_mix((uint64_t)i) % FROM);
        void *d_from = upload(from, FROM * bytes), *d_index = upload(index, sizeof index);
        void *d_to = upload(to, TO * bytes);
        CUDA(cuda_gather(NULL, bytes, TO, d_index, d_from, d_to));
        fetch(to, d_to, TO * bytes);
        for (size_t i = 0; i < TO; i++)
            assert_memory_equal(to + i * bytes, from + (size_t)index[i] * bytes, bytes);
        cudaFree(d_from);
        cudaFree(d_index);
        cudaFree(d_to);
        free(from);
        free(to);
    }
}

static void activates(void **state)
{
    (void)state;
    for (int half = 0; half < 2; half++) {
        const size_t n = 100003, bytes = n * (half ? 2 : 4);
        void *gate = numbers(half, n, 1), *up = numbers(half, n, 1 << 20), *got = malloc(bytes);
        void *d_gate = upload(gate, bytes), *d_up = upload(up, bytes);
        CUDA(cuda_activate(NULL, half, (int64_t)n, d_gate, d_up));
        fetch(got, d_gate, bytes);
        for (size_t i = 0; i < n; i++) {
            const double g = (double)value(half, gate, i), want = g / (1 + exp(-g)) * (double)value(half, up, i);
            assert_true(fabs((double)value(half, got, i) - want) <= (half ? 1.0 / 256 : 1e-6) * fabs(want) + 1e-7);
        }
        cudaFree(d_gate);
        cudaFree(d_up);
        free(gate);
        free(up);
        free(got);
    }
}

/* Widths below and above what shared memory holds, and one that is no multiple of anything. */
static void combines(void **state)
{
    static const int32_t widths[] = { 64, 4096, 333, 16384 };
    (void)state;
    for (int w = 0; w < 8; w++) {
        enum { TOKENS = 40, ROWS = 200, K = 3 };
        const bool half = w % 2;
        const size_t d = (size_t)widths[w / 2], size = half ? 2 : 4, bytes = TOKENS * d * size;
        int32_t before[TOKENS], first[TOKENS + 1], row[TOKENS * K], n = 0;
        float weight[TOKENS * K];
        for (int i = 0; i < TOKENS; i++) { /* 0 to K outputs each */
            before[i] = i;
            first[i] = n;
            for (int j = 0; j < i % (K + 1); j++, n++) {
                row[n] = (int32_t)(moe_mix((uint64_t)n) % ROWS);
                weight[n] = 0.125f * (float)(n % 7);
            }
        }
        first[TOKENS] = n;
        void *rows = numbers(half, ROWS * d, 5), *got = malloc(bytes), *d_rows = upload(rows, ROWS * d * size);
        void *d_before = upload(before, sizeof before), *d_first = upload(first, sizeof first);
        void *d_row = upload(row, sizeof row), *d_weight = upload(weight, sizeof weight), *d_to = upload(got, bytes);
        CUDA(cuda_combine(NULL, half, (int32_t)d, TOKENS, (struct cuda_combine){ d_before, d_first, d_row, d_weight },
                          d_rows, d_to));
        fetch(got, d_to, bytes);
        for (size_t i = 0; i < TOKENS; i++) {
            double *sum = calloc(d, sizeof *sum), squares = 0;
            for (size_t j = 0; j < d; j++) {
                sum[j] = (double)value(half, rows, (size_t)before[i] * d + j);
                for (int32_t k = first[i]; k < first[i + 1]; k++)
                    sum[j] += (double)weight[k] * (double)value(half, rows, (size_t)row[k] * d + j);
                squares += sum[j] * sum[j];
            }
            for (size_t j = 0; j < d; j++) {
                const double want = sum[j] / sqrt(squares / (double)d + 1e-6);
                assert_true(fabs((double)value(half, got, i * d + j) - want) <= (half ? 1.0 / 200 : 1e-5) * 3);
            }
            free(sum);
        }
        void *const all[] = { d_rows, d_before, d_first, d_row, d_weight, d_to };
        for (int i = 0; i < 6; i++)
            cudaFree(all[i]);
        free(rows);
        free(got);
    }
}

/* Rows of very different sizes, each with the scale and the codes that the processor finds. */
static void gathers_fp8(void **state)
{
    static const int32_t widths[] = { 16, 2048, 4096, 7168 };
    (void)state;
    for (int w = 0; w < 4; w++) {
        enum { FROM = 60, TO = 200 };
        const size_t d = (size_t)widths[w];
        int32_t index[TO];
        float scale[TO], *row = malloc(d * sizeof *row);
        uint16_t *from = numbers(true, FROM * d, 3);
        uint8_t *to = malloc(TO * d), *want = malloc(d);
        for (size_t i = 0; i < FROM * d; i++) /* times 2^-20 to 2^39; row 0 is zeros, signed */
            from[i] = (uint16_t)(i < d ? from[i] & 0x8000
                                 : from[i] & 0x7fff ? from[i] + 128 * ((int)(i / d) - 20) : 0);
        for (int i = 0; i < TO; i++)
            index[i] = (int32_t)(moe_mix((uint64_t)i) % FROM);
        void *d_from = upload(from, FROM * d * 2), *d_index = upload(index, sizeof index);
        void *d_to = upload(to, TO * d), *d_scale = upload(scale, sizeof scale);
        CUDA(cuda_gather_e4m3(NULL, widths[w], TO, d_index, d_from, d_to, d_scale));
        fetch(to, d_to, TO * d);
        fetch(scale, d_scale, sizeof scale);
        for (size_t i = 0; i < TO; i++) {
            for (size_t j = 0; j < d; j++)
                row[j] = value(true, from, (size_t)index[i] * d + j);
            assert_true(scale[i] == cuda_e4m3_codes(d, row, want));
            assert_memory_equal(to + i * d, want, d);
        }
        cudaFree(d_from);
        cudaFree(d_index);
        cudaFree(d_to);
        cudaFree(d_scale);
        free(from);
        free(to);
        free(want);
        free(row);
    }
}

/* Codes are as near as an exponential in single precision comes; then rows are multiplied by their scales. */
static void activates_fp8(void **state)
{
    enum { N = 100, D = 1536 };
    float scale[N], to_scale[N];
    uint16_t *gate = numbers(true, N * D, 1), *up = numbers(true, N * D, 1 << 20);
    uint8_t *to = malloc(N * D);
    (void)state;
    for (int i = 0; i < N; i++)
        scale[i] = ldexpf(1, i % 5 - 2);
    void *d_gate = upload(gate, N * D * 2), *d_up = upload(up, N * D * 2), *d_scale = upload(scale, sizeof scale);
    void *d_to = upload(to, N * D), *d_to_scale = upload(scale, sizeof scale);
    CUDA(cuda_activate_e4m3(NULL, D, N, d_scale, d_gate, d_up, d_to, d_to_scale));
    CUDA(cuda_scale_rows(NULL, D, N, d_scale, d_gate));
    fetch(to, d_to, N * D);
    fetch(to_scale, d_to_scale, sizeof to_scale);
    for (size_t i = 0; i < N; i++) {
        double most = 0;
        for (size_t j = 0; j < D; j++) {
            const double s = (double)scale[i], g = s * (double)value(true, gate, i * D + j);
            const double want = g / (1 + exp(-g)) * s * (double)value(true, up, i * D + j);
            const double got = (double)(to_scale[i] * cuda_e4m3_value(to[i * D + j]));
            most = fmax(most, fabs(want));
            assert_true(fabs(got - want) <= fmax(fabs(want) / 16, (double)to_scale[i] / 1024) * 1.0001);
        }
        assert_true(most <= 448.001 * (double)to_scale[i] && most > 223.999 * (double)to_scale[i]);
    }
    uint16_t *scaled = malloc(N * D * 2);
    fetch(scaled, d_gate, N * D * 2);
    for (size_t i = 0; i < N * D; i++)
        assert_true(value(true, scaled, i) == scale[i / D] * value(true, gate, i));
    void *const all[] = { d_gate, d_up, d_scale, d_to, d_to_scale };
    for (int i = 0; i < 5; i++)
        cudaFree(all[i]);
    free(gate);
    free(up);
    free(to);
    free(scaled);
}

static int has_gpu(void)
{
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess && n > 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(gathers), cmocka_unit_test(activates),
                                        cmocka_unit_test(combines), cmocka_unit_test(gathers_fp8),
                                        cmocka_unit_test(activates_fp8) };
    if (!has_gpu()) {
        puts("1..0 # SKIP no GPU");
        return 0;
    }
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
