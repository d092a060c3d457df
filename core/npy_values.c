/* SPDX-License-Identifier: Apache-2.0
 * npy_values.c - the elements of an open .npy file: checks, conversions, half precision. */
#include "config.h"

#include "npy.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* ---- checks ---- */

const char *npy_element(const struct npy *a, int64_t i, char text[96])
{
    int64_t at[NPY_MAX_DIMS];
    for (int d = a->n_dims - 1; d >= 0; d--) {
        at[d] = a->shape[d] ? i % a->shape[d] : 0;
        i = a->shape[d] ? i / a->shape[d] : 0;
    }
    int n = snprintf(text, 96, "[");
    for (int d = 0; d < a->n_dims; d++)
        n += snprintf(text + n, 96 - (size_t)n, "%s%" PRId64, d ? "," : "", at[d]);
    snprintf(text + n, 96 - (size_t)n, "]");
    return text;
}

/* A block's worth of exponents is folded into one flag so that compilers vectorise it; only a block with something
 * in it is searched. A value is not finite when all of its exponent bits are set. */
#define FINITE_SCAN(NAME, TYPE, EXPONENT)                                \
    static int64_t NAME(const TYPE *x, int64_t n)                        \
    {                                                                    \
        enum { BLOCK = 256 };                                            \
        int64_t i = 0;                                                   \
        for (; i + BLOCK <= n; i += BLOCK) {                             \
            TYPE bad = 0;                                                \
            for (int j = 0; j < BLOCK; j++)                              \
                bad |= (TYPE) - ((x[i + j] & (EXPONENT)) == (EXPONENT)); \
            if (bad)                                                     \
                break;                                                   \
        }                                                                \
        for (; i < n; i++)                                               \
            if ((x[i] & (EXPONENT)) == (EXPONENT))                       \
                return i;                                                \
        return -1;                                                       \
    }
FINITE_SCAN(first_bad_f2, uint16_t, UINT16_C(0x7c00))
FINITE_SCAN(first_bad_f4, uint32_t, UINT32_C(0x7f800000))
FINITE_SCAN(first_bad_f8, uint64_t, UINT64_C(0x7ff0000000000000))

int npy_expect_finite(const struct npy *a, struct err *err)
{
    if (a->kind != 'f')
        return 0;
    int64_t i = a->item_bytes == 2   ? first_bad_f2(a->data, a->count)
                : a->item_bytes == 4 ? first_bad_f4(a->data, a->count)
                                     : first_bad_f8(a->data, a->count);
    if (i < 0)
        return 0;
    char text[96];
    double x = npy_real(a, i);
    return err_set(err, ERR_INPUT, "%s%s: found %s, expected a finite number", a->path, npy_element(a, i, text),
                   isnan(x) ? "NaN"
                   : x > 0  ? "+infinity"
                            : "-infinity");
}

int npy_expect_range(const struct npy *a, int64_t min, int64_t max, struct err *err)
{
    for (int64_t i = 0; i < a->count; i++) {
        int64_t x = npy_int(a, i);
        char text[96];
        if (x < min || x > max)
            return err_set(err, ERR_INPUT, "%s%s: found %" PRId64 ", expected %" PRId64 "..%" PRId64, a->path,
                           npy_element(a, i, text), x, min, max);
    }
    return 0;
}

/* ---- elements ---- */

double npy_real(const struct npy *a, int64_t i)
{
    if (a->kind == 'f')
        return a->item_bytes == 2   ? (double)npy_half_to_float(((const uint16_t *)a->data)[i])
               : a->item_bytes == 4 ? (double)((const float *)a->data)[i]
                                    : ((const double *)a->data)[i];
    if (a->kind == 'u' && a->item_bytes == 8)
        return (double)((const uint64_t *)a->data)[i];
    return (double)npy_int(a, i);
}

int64_t npy_int(const struct npy *a, int64_t i)
{
    if (a->kind == 'f') {
        double x = npy_real(a, i);
        return isnan(x) ? 0 : x >= 0x1p63 ? INT64_MAX : x < -0x1p63 ? INT64_MIN : (int64_t)x;
    }
    if (a->kind == 'i')
        switch (a->item_bytes) {
        case 1:
            return ((const int8_t *)a->data)[i];
        case 2:
            return ((const int16_t *)a->data)[i];
        case 4:
            return ((const int32_t *)a->data)[i];
        default:
            return ((const int64_t *)a->data)[i];
        }
    switch (a->item_bytes) { /* 'u' and 'b' */
    case 1:
        return ((const uint8_t *)a->data)[i];
    case 2:
        return ((const uint16_t *)a->data)[i];
    case 4:
        return ((const uint32_t *)a->data)[i];
    default: {
        uint64_t x = ((const uint64_t *)a->data)[i];
        return x > INT64_MAX ? INT64_MAX : (int64_t)x;
    }
    }
}

void npy_floats(const struct npy *a, int64_t i, int64_t n, float *out)
{
    if (n <= 0)
        return;
    if (a->kind == 'f' && a->item_bytes == 4) {
        memcpy(out, (const float *)a->data + i, (size_t)n * sizeof *out);
    } else if (a->kind == 'f' && a->item_bytes == 2) {
        const uint16_t *x = (const uint16_t *)a->data + i;
        for (int64_t j = 0; j < n; j++)
            out[j] = npy_half_to_float(x[j]);
    } else {
        for (int64_t j = 0; j < n; j++)
            out[j] = (float)npy_real(a, i + j);
    }
}

/* ---- half precision (IEEE 754 binary16) ---- */

static float bits_to_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint32_t float_to_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

float npy_half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) /* infinity, NaN */
        return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* The exponent moves from bias 15 to 127 by multiplication, which makes subnormals right as well. */
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

uint16_t npy_float_to_half(float f)
{
    uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, x = bits & 0x7fffffff;
    if (x > 0x7f800000) /* NaN: quiet, keeping the top of its payload */
        return (uint16_t)(sign | 0x7e00 | (x >> 13 & 0x3ff));
    if (x >= 0x477ff000) /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (x < 0x38800000) { /* below 2^-14: adding 0.5 lets the FPU round to multiples of 2^-24 */
        uint32_t y = float_to_bits(bits_to_float(x) + 0.5f);
        return (uint16_t)(sign | (y - 0x3f000000));
    }
    x += 0xfff + (x >> 13 & 1); /* nearest, ties to even */
    return (uint16_t)(sign | (x - 0x38000000) >> 13);
}
