/* SPDX-License-Identifier: Apache-2.0
 * cuda_e4m3.h - FP8 numbers as GPUs multiply them: a sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity.
 * Magnitudes reach 448; below 2^-6 steps are 2^-9. Kernels and the processor share what is here. */
#ifndef CUDA_E4M3_H
#define CUDA_E4M3_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define E4M3_FN static __host__ __device__ inline
#else
#define E4M3_FN static inline
#endif

/* The nearest, of two the even one; beyond 448 that, with its sign; not-a-number for that. */
E4M3_FN uint8_t cuda_e4m3_of(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    const uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size > 0x7f800000)
        return (uint8_t)(sign | 0x7f);
    if (size >= 0x43e00000) /* 448 */
        return (uint8_t)(sign | 0x7e);
    if (size < 0x3c800000) /* 2^-6 */
        return (uint8_t)(sign | (uint32_t)rintf(fabsf(v) * 512));
    return (uint8_t)(sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

/* What numbers of which this is the largest magnitude are divided by: the least power of two that brings them to 448 or
 * below. A power, so that neither dividing nor multiplying rounds. 1 for zeros and for what is not a number. */
E4M3_FN float cuda_e4m3_scale(float largest)
{
    uint32_t bits;
    float scale;
    memcpy(&bits, &largest, sizeof bits);
    int32_t exponent = (int32_t)(bits >> 23 & 0xff) - 127 - 8 + ((bits & 0x7fffff) > 0x600000); /* 448 = 1.75 * 2^8 */
    if (!(largest > 0))
        exponent = 0;
    exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
    bits = (uint32_t)(exponent + 127) << 23;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

#ifndef __CUDACC__
float cuda_e4m3_value(uint8_t code);
/* n numbers with one scale, which is returned. */
float cuda_e4m3_codes(size_t n, const float *from, uint8_t *to);
/* The same, as the numbers that the codes stand for. */
void cuda_e4m3_round(size_t n, float *v);
#endif

#endif
