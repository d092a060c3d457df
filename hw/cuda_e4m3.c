/* SPDX-License-Identifier: Apache-2.0
 * cuda_e4m3.c - see cuda_e4m3.h. */
#include "config.h"

#include "cuda_e4m3.h"

float cuda_e4m3_value(uint8_t code)
{
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = (code & 0x7f) == 0x7f ? NAN
                       : exponent == 0 ? ldexpf((float)mantissa, -9) : ldexpf((float)(8 + mantissa), exponent - 10);
    return code & 0x80 ? -size : size;
}

static float scale_of(size_t n, const float *v)
{
    float largest = 0;
    for (size_t i = 0; i < n; i++)
        largest = fmaxf(largest, fabsf(v[i]));
    return cuda_e4m3_scale(largest);
}

float cuda_e4m3_codes(size_t n, const float *from, uint8_t *to)
{
    const float scale = scale_of(n, from);
    for (size_t i = 0; i < n; i++)
        to[i] = cuda_e4m3_of(from[i] / scale);
    return scale;
}

void cuda_e4m3_round(size_t n, float *v)
{
    const float scale = scale_of(n, v);
    for (size_t i = 0; i < n; i++)
        v[i] = scale * cuda_e4m3_value(cuda_e4m3_of(v[i] / scale));
}
