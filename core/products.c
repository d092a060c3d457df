/* SPDX-License-Identifier: Apache-2.0
 * products.c - matrix products by tiles of 4 rows and 8 columns that stay in registers. */
#include "config.h"

#include "moelab.h"
#include "products.h"

/* A factor whose element (i, p) is at a[i * row + p * along]: the matrix or its transpose. */
struct factor { const float *a; int64_t row, along; };

#if defined(__GNUC__)
static void tile(struct factor f, const float *b, int64_t n_b, int64_t depth, float *c, int64_t n_c)
{
    const float *a0 = f.a, *a1 = f.a + f.row, *a2 = f.a + 2 * f.row, *a3 = f.a + 3 * f.row;
    float *c0 = c, *c1 = c + n_c, *c2 = c + 2 * n_c, *c3 = c + 3 * n_c;
    moe_f4 s00 = *(moe_f4 *)c0, s01 = *(moe_f4 *)(c0 + 4), s10 = *(moe_f4 *)c1, s11 = *(moe_f4 *)(c1 + 4);
    moe_f4 s20 = *(moe_f4 *)c2, s21 = *(moe_f4 *)(c2 + 4), s30 = *(moe_f4 *)c3, s31 = *(moe_f4 *)(c3 + 4);
    for (int64_t p = 0; p < depth; p++, b += n_b) {
        const moe_f4 left = *(const moe_f4 *)b, right = *(const moe_f4 *)(b + 4);
        const float x0 = a0[p * f.along], x1 = a1[p * f.along], x2 = a2[p * f.along], x3 = a3[p * f.along];
        s00 += x0 * left;
        s01 += x0 * right;
        s10 += x1 * left;
        s11 += x1 * right;
        s20 += x2 * left;
        s21 += x2 * right;
        s30 += x3 * left;
        s31 += x3 * right;
    }
    *(moe_f4 *)c0 = s00;
    *(moe_f4 *)(c0 + 4) = s01;
    *(moe_f4 *)c1 = s10;
    *(moe_f4 *)(c1 + 4) = s11;
    *(moe_f4 *)c2 = s20;
    *(moe_f4 *)(c2 + 4) = s21;
    *(moe_f4 *)c3 = s30;
    *(moe_f4 *)(c3 + 4) = s31;
}
#endif

static void edge(struct factor f, const float *b, int64_t n_b, int64_t depth, float *c, int64_t n_c, int64_t rows,
                 int64_t columns)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            float sum = c[i * n_c + j];
            for (int64_t p = 0; p < depth; p++)
                sum += f.a[i * f.row + p * f.along] * b[p * n_b + j];
            c[i * n_c + j] = sum;
        }
}

/* c[rows][n] += f b, depth deep. */
static void multiply(struct factor f, const float *b, float *c, int64_t rows, int64_t depth, int64_t n)
{
    for (int64_t i = 0; i < rows; i += 4)
        for (int64_t j = 0; j < n; j += 8) {
            const struct factor part = { f.a + i * f.row, f.row, f.along };
#if defined(__GNUC__)
            if (i + 4 <= rows && j + 8 <= n) {
                tile(part, b + j, n, depth, c + i * n + j, n);
                continue;
            }
#endif
            edge(part, b + j, n, depth, c + i * n + j, n, i + 4 <= rows ? 4 : rows - i, j + 8 <= n ? 8 : n - j);
        }
}

void product_add(const float *a, const float *b, float *c, int64_t m, int64_t k, int64_t n)
{
    multiply((struct factor){ a, k, 1 }, b, c, m, k, n);
}

/* So many rows at once as a cache keeps. */
void product_add_first(const float *a, const float *b, float *c, int64_t m, int64_t k, int64_t n)
{
    enum { ROWS = 64 };
    for (int64_t from = 0; from < m; from += ROWS)
        multiply((struct factor){ a + from * k, 1, k }, b + from * n, c, k, from + ROWS <= m ? ROWS : m - from, n);
}

void product_add_second(const float *a, const float *b, float *c, int64_t m, int64_t k, int64_t n, float *room)
{
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < n; j++)
            room[j * k + i] = b[i * n + j];
    product_add(a, room, c, m, n, k);
}
