/* SPDX-License-Identifier: Apache-2.0
 * products.h - matrix products in single precision that give the same bits on every processor: sums are added in one
 * order, whatever the vectors' length, which no BLAS promises. Row-major; results are added to. */
#ifndef PRODUCTS_H
#define PRODUCTS_H

#include <stdint.h>

/* c[m][n] += a[m][k] b[k][n] */
void product_add(const float *a, const float *b, float *c, int64_t m, int64_t k, int64_t n);
/* c[k][n] += transposed a[m][k] times b[m][n] */
void product_add_first(const float *a, const float *b, float *c, int64_t m, int64_t k, int64_t n);
/* c[m][k] += a[m][n] times transposed b[k][n]; room: [n][k] */
void product_add_second(const float *a, const float *b, float *c, int64_t m, int64_t k, int64_t n, float *room);

#endif
