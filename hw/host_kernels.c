/* SPDX-License-Identifier: Apache-2.0
 * host_kernels.c - see host_kernels.h.
 *
 * Attention's core is what it is: for every request and head of keys, scores, their softmax, and the weighted sum of
 * values. Its keys and values are read from a ring, so a cache larger than that is read as often as it would be, but
 * not from as many places. Prompts attend to half of the context, as the list's arithmetic says, without a mask. */
#include "config.h"

#if defined __GNUC__ && !defined __clang__
#pragma GCC optimize("O3", "no-trapping-math") /* else loops with a choice in them are not vectorised */
#endif

#include "host_kernels.h"
#include "host_model.h"

#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 64 }; /* edge of the product that stands for plain arithmetic */
static const double FLOPS_PER_BYTE = 16; /* above it arithmetic is what takes time on any processor */

/* ---- rings ---- */

/* Touches all of it; random, not zeros: arithmetic on those may be faster. */
static float *ring(size_t floats, struct err *e)
{
    float *p = host_take(floats * sizeof *p);
    if (!p)
        err_set(e, ERR_MEMORY, "out of memory for %zu bytes of made-up operands", floats * sizeof *p);
    for (size_t i = 0; p && i < floats; i++)
        p[i] = (float)(moe_mix(i) >> 40) / (1 << 23) - 1;
    return p;
}

int host_rings_open(struct host_rings *r, struct host_room room, struct err *e)
{
    if (room.in > r->room_in) {
        free(r->in);
        r->in = ring(room.in, e);
        r->room_in = r->in ? room.in : 0;
        r->at_in = 0;
    }
    if (room.out > r->room_out) {
        free(r->out);
        r->out = ring(room.out, e);
        r->room_out = r->out ? room.out : 0;
        r->at_out = 0;
    }
    return e->code;
}

void host_rings_close(struct host_rings *r)
{
    free(r->in);
    free(r->out);
    *r = (struct host_rings){ 0 };
}

/* The next n floats to read, and to write. */
static const float *operand(struct host_rings *r, size_t n)
{
    const size_t at = r->at_in + n > r->room_in ? 0 : r->at_in;
    r->at_in = at + n;
    return r->in + at;
}

static float *result(struct host_rings *r, size_t n)
{
    const size_t at = r->at_out + n > r->room_out ? 0 : r->at_out;
    r->at_out = at + n;
    return r->out + at;
}

/* ---- kernels ---- */

void host_gemm(int64_t m, int64_t n, int64_t k, const float *a, const float *b, float *c)
{
    if (m == 1) /* a product with a vector is faster as one */
        cblas_sgemv(CblasRowMajor, CblasTrans, (int)k, (int)n, 1, b, (int)n, a, 1, 0, c, 1);
    else
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)m, (int)n, (int)k, 1, a, (int)k, b, (int)n, 0, c,
                    (int)n);
}

/* The same for each kind of processor: what the compiler makes for all of them is four numbers wide. */
#if defined __x86_64__ && defined __GNUC__ && !defined __clang__
#define EACH_KIND __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_KIND
#endif

/* e^x for -87 <= x <= 88, relative error below 2e-7: 2^(n + f) with a polynomial for 2^f. expf() would take
 * longer than the products around it, since compilers do not vectorise it. */
static inline float exp_of(float x)
{
    const float clamped = x < -87 ? -87 : x > 88 ? 88 : x;
    const float y = clamped * 1.44269504f, n = (y + 12582912.0f) - 12582912.0f, f = y - n;
    const float p = 1 + f * (0.693147182f + f * (0.240226462f + f * (0.0555040956f +
                    f * (0.00961834099f + f * (0.00133335581f + f * 0.000154035304f)))));
    union { int32_t i; float f; } scale = { .i = ((int32_t)n + 127) << 23 };
    return p * scale.f;
}

EACH_KIND void host_activate(float *gate, const float *up, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        gate[i] = gate[i] / (1 + exp_of(-gate[i])) * up[i];
}

enum { LANES = 16, FEW = 8, SPAN = 128 };

/* Sums and maxima in LANES parts, which a compiler may not make by itself. */
EACH_KIND static void soften(float *score, size_t rows, size_t n)
{
    const size_t whole = n / LANES * LANES;
    for (size_t r = 0; r < rows; r++, score += n) {
        float lane[LANES], most = score[0], sum = 0;
        for (size_t l = 0; l < LANES; l++)
            lane[l] = score[0];
        for (size_t at = 0; at < whole; at += LANES)
            for (size_t l = 0; l < LANES; l++)
                lane[l] = score[at + l] > lane[l] ? score[at + l] : lane[l];
        for (size_t l = 0; l < LANES; l++)
            most = lane[l] > most ? lane[l] : most;
        for (size_t i = whole; i < n; i++)
            most = score[i] > most ? score[i] : most;
        for (size_t i = 0; i < n; i++)
            score[i] = exp_of(score[i] - most);
        for (size_t l = 0; l < LANES; l++)
            lane[l] = 0;
        for (size_t at = 0; at < whole; at += LANES)
            for (size_t l = 0; l < LANES; l++)
                lane[l] += score[at + l];
        for (size_t l = 0; l < LANES; l++)
            sum += lane[l];
        for (size_t i = whole; i < n; i++)
            sum += score[i];
        for (size_t i = 0; i < n; i++)
            score[i] *= 1 / sum;
    }
}

/* Decoding reads every key once for the few queries that share it, and a product's way of putting operands in order
 * first would take longer than that. score: [q][n]. width: a multiple of LANES. */
EACH_KIND static void look_at_keys(const float *keys, size_t n, size_t width, const float *query, size_t q, float scale,
                                   float *score)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < q; j++) {
            float lane[LANES] = { 0 };
            for (size_t at = 0; at < width; at += LANES)
                for (size_t l = 0; l < LANES; l++)
                    lane[l] += keys[i * width + at + l] * query[j * width + at + l];
            for (size_t half = LANES / 2; half > 0; half /= 2)
                for (size_t l = 0; l < half; l++)
                    lane[l] += lane[l + half];
            score[j * n + i] = scale * lane[0];
        }
}

/* out: [q][width] */
EACH_KIND static void add_values(const float *values, size_t n, size_t width, const float *score, size_t q, float *out)
{
    memset(out, 0, q * width * sizeof *out);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < q; j++)
            for (size_t at = 0; at < width; at++)
                out[j * width + at] += score[j * n + i] * values[i * width + at];
}

static void attend(struct host_rings *r, const struct kernel *k)
{
    const size_t n = (size_t)host_seen(k), key = (size_t)k->key.n, value = (size_t)k->key.k, q = host_queries(k);
    const bool prompt = k->key.op == LATENCY_PREFILL;
    const float scale = 1 / sqrtf((float)key);
    const double sequences = prompt ? fmax(1, k->key.rows / k->key.context) : k->key.rows;
    const int64_t blocks = prompt ? (int64_t)ceil(fmin(k->key.rows, k->key.context) / HOST_QUERIES) : 1;
    const int64_t heads = prompt ? k->key.heads : k->key.kv_heads;
    for (int64_t i = 0; i < (int64_t)sequences * heads; i++) {
        const float *keys = operand(r, n * (key + value)), *values = keys + n * key;
        for (int64_t b = 0; b < blocks; b++) {
            const float *query = operand(r, q * key);
            float *score = result(r, q * (n + value));
            const bool few = q <= FEW && key % LANES == 0;
            if (few)
                look_at_keys(keys, n, key, query, q, scale, score);
            else
                cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)q, (int)n, (int)key, scale, query, (int)key,
                            keys, (int)key, 0, score, (int)n);
            soften(score, q, n);
            if (few)
                add_values(values, n, value, score, q, score + q * n);
            else
                host_gemm((int64_t)q, (int64_t)value, (int64_t)n, score, values, score + q * n);
        }
    }
}

/* As much is read as written. */
static void move(struct host_rings *r, double bytes)
{
    const size_t n = (size_t)(bytes / (2 * sizeof(float)));
    for (size_t done = 0, some; done < n; done += some) {
        some = n - done < HOST_MOVED ? n - done : HOST_MOVED;
        const float *from = operand(r, some);
        float *to = result(r, some);
        for (size_t i = 0; i < some; i++)
            to[i] = 0.5f * from[i];
    }
}

/* A span of columns at a time, which stays in registers or next to them. */
EACH_KIND void host_add_rows(float *out, const float *before, int64_t n, const float *const *row, const float *weight,
                             int32_t d)
{
    for (int32_t at = 0; at < d; at += SPAN) {
        const int32_t width = at + SPAN < d ? SPAN : d - at;
        float sum[SPAN] = { 0 };
        for (int32_t i = 0; before && i < width; i++)
            sum[i] = before[at + i];
        for (int64_t j = 0; j < n; j++) {
            const float *from = row[j] + at, w = weight[j];
            for (int32_t i = 0; i < width; i++)
                sum[i] += w * from[i];
        }
        memcpy(out + at, sum, sizeof *out * (size_t)width);
    }
}

float *host_make_rows(struct host_rings *r, int64_t n, int32_t d)
{
    enum { AT_ONCE = 24, DEPTH = 448 };
    const int64_t products = (n + AT_ONCE - 1) / AT_ONCE, size = AT_ONCE * (int64_t)d;
    float *rows = result(r, (size_t)(products * size));
    for (int64_t i = 0; i < products; i++) {
        const float *a = operand(r, (size_t)(AT_ONCE + d) * DEPTH);
        host_gemm(AT_ONCE, d, DEPTH, a, a + AT_ONCE * DEPTH, rows + i * size);
    }
    return rows;
}

void host_run_sums(struct host_rings *r, const float *rows, int64_t tokens, int32_t d)
{
    enum { TERMS = 2 };
    static const float weight[TERMS] = { 0.6f, 0.4f };
    const uint64_t n = (TERMS + 1) * (uint64_t)tokens;
    for (uint64_t i = 0; i < n; i += TERMS + 1) {
        const float *row[TERMS + 1];
        for (uint64_t j = 0; j <= TERMS; j++)
            row[j] = rows + moe_mix(i + j) % n * (size_t)d;
        float *to = result(r, (size_t)d);
        host_add_rows(to, row[TERMS], TERMS, row, weight, d);
        host_normalise(to, d);
    }
}

/* Of what fits into the nearest caches, and takes about half a millisecond. */
void host_probe(struct host_rings *r)
{
    enum { ROWS = 96, EDGE = 256, TIMES = 8 };
    const size_t at = r->at_in;
    r->at_in = 0;
    const float *a = operand(r, ROWS * EDGE + EDGE * EDGE);
    float *c = result(r, ROWS * EDGE);
    for (int i = 0; i < TIMES; i++)
        host_gemm(ROWS, EDGE, EDGE, a, a + ROWS * EDGE, c);
    r->at_in = at;
}

void host_run_plain(struct host_rings *r, double flops, double bytes)
{
    if (flops <= FLOPS_PER_BYTE * bytes) {
        move(r, bytes);
        return;
    }
    const float *a = operand(r, 2 * BLOCK * BLOCK);
    float *c = result(r, BLOCK * BLOCK);
    for (double done = 0; done < flops; done += 2.0 * BLOCK * BLOCK * BLOCK)
        host_gemm(BLOCK, BLOCK, BLOCK, a, a + BLOCK * BLOCK, c);
}

void host_run_kernel(struct host_rings *r, const struct kernel *k)
{
    const int64_t m = k->shape.rows, n = k->shape.n, depth = k->shape.k;
    for (int32_t g = 0; g < k->groups && m > 0; g++) {
        const float *a = operand(r, (size_t)(m * depth + depth * n));
        host_gemm(m, n, depth, a, a + m * depth, result(r, (size_t)(m * n)));
    }
    if (host_is_attention(k))
        attend(r, k);
    else if (k->groups == 0)
        host_run_plain(r, k->flops, k->traffic);
}
