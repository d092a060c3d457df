/* SPDX-License-Identifier: Apache-2.0
 * cuda_verify.c - compares every layer of every token here with the reference, fed with what entered the layer. The
 * inputs of layer 0 are made anew, and those of the others were compared as outputs: nothing is taken on trust. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_e4m3.h"
#include "cuda_rank.h"
#include "host_model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Of a token's largest element; weights and rows have 8 bits of mantissa in bf16. */
#define HALF_TOLERANCE 1e-2
/* In fp8 a hidden number between two of 8 bits may go to the other side than the reference's: cuda_verify_fp8.c looks
 * at each expert more closely; here only rows that went astray have to be found. */
#define FP8_TOLERANCE 5e-2

/* bf16 is the upper half of a float, rounded to the nearest, to even in the middle. */
static uint16_t to_half(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    if (isnan(v))
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void cuda_from_floats(const struct cuda *c, size_t n, const float *from, void *to)
{
    uint16_t *half = to;
    if (!c->half)
        memcpy(to, from, n * sizeof *from);
    for (size_t i = 0; c->half && i < n; i++)
        half[i] = to_half(from[i]);
}

void cuda_to_floats(const struct cuda *c, size_t n, const void *from, float *to)
{
    const uint16_t *half = from;
    if (!c->half)
        memcpy(to, from, n * sizeof *to);
    for (size_t i = 0; c->half && i < n; i++) {
        const uint32_t bits = (uint32_t)half[i] << 16;
        memcpy(&to[i], &bits, sizeof bits);
    }
}

static float in_half(float v)
{
    const uint32_t bits = (uint32_t)to_half(v) << 16;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Without this the reference would differ from the GPU by as much as FP8 does from it. */
static const struct host_rounding fp8_rounding = { cuda_e4m3_round, in_half };

struct check {
    struct machine *m;
    const struct cuda *c;
    const struct cuda_rank *r;
    const struct moe_graph *g;
    char *rows;          /* copied from the device, as far as they are states of tokens */
    float *in, *out;     /* [n_own][d] */
    double *expected;    /* likewise */
    const float **place; /* [n_own] in `in` */
};

/* States of own tokens on entering `layer`, as floats; the inputs rounded as they were for the device. */
static int read_states(const struct check *k, int32_t layer, float *to, struct err *e)
{
    const size_t d = (size_t)k->c->model->d_model, bytes = row_bytes(k->c);
    for (int32_t i = 0; i < k->r->n_own && !e->code; i++) {
        float *row = to + (size_t)i * d;
        const int64_t at = *token_row(k->r, k->g, layer, k->r->own[i]);
        if (layer == 0) {
            host_input(k->c->model, k->c->draw, k->r->own[i], row);
            cuda_from_floats(k->c, d, row, k->rows);
        } else {
            CUDA_TRY(e, k->r->rank, cudaMemcpy(k->rows, (char *)k->r->rows.at + (size_t)at * bytes, bytes,
                                               cudaMemcpyDeviceToHost));
        }
        cuda_to_floats(k->c, d, k->rows, row);
    }
    return e->code;
}

static int compare(const struct check *k, int32_t layer, struct err *e)
{
    const struct cuda_rank *r = k->r;
    const size_t d = (size_t)k->c->model->d_model;
    const double allowed = k->c->fp8 ? FP8_TOLERANCE : k->c->half ? HALF_TOLERANCE : HOST_TOLERANCE;
    const int64_t first = k->g->route_first[layer], n = k->g->route_first[layer + 1] - first;
    if (read_states(k, layer + 1, k->out, e) < 0 ||
        host_reference(k->c->model, layer, k->g->route + first, n, r->place, r->n_own, k->place,
                       k->c->fp8 ? &fp8_rounding : NULL, k->expected, e) < 0)
        return e->code;
    for (int32_t i = 0; i < r->n_own; i++) {
        const float *got = k->out + (size_t)i * d;
        const double *expected = k->expected + (size_t)i * d;
        int32_t at;
        const double error = host_error(got, expected, (int32_t)d, &at);
        k->m->max_error = fmax(k->m->max_error, error);
        if (error > allowed)
            return err_set(e, ERR_RUN, "rank %d: layer %d, token %d, element %d: got %.9g, expected %.9g (relative "
                           "error %.2g, allowed %.2g)", r->rank, layer, r->own[i], at, (double)got[at], expected[at],
                           error, allowed);
    }
    memcpy(k->in, k->out, sizeof *k->in * d * (size_t)r->n_own);
    return 0;
}

static int verify_rank(struct machine *m, const struct cuda *c, const struct cuda_rank *r, const struct moe_graph *g,
                       struct err *e)
{
    const size_t d = (size_t)c->model->d_model, n = (size_t)r->n_own * d + 1;
    struct check k = { m, c, r, g, malloc(row_bytes(c)), malloc(n * sizeof(float)), malloc(n * sizeof(float)),
                       malloc(n * sizeof(double)), malloc(sizeof(float *) * ((size_t)r->n_own + 1)) };
    if (!k.rows || !k.in || !k.out || !k.expected || !k.place)
        err_set(e, ERR_MEMORY, "rank %d: out of memory to verify %d tokens", r->rank, r->n_own);
    for (int32_t i = 0; i < r->n_own && !e->code; i++)
        k.place[i] = k.in + (size_t)i * d;
    if (!e->code)
        read_states(&k, 0, k.in, e);
    for (int32_t l = 0; l < g->n_route_layers && !e->code; l++)
        compare(&k, l, e);
    free(k.rows);
    free(k.in);
    free(k.out);
    free(k.expected);
    free(k.place);
    return e->code;
}

int cuda_verify(struct machine *m, struct cuda *c, const struct moe_graph *g, struct err *e)
{
    for (int32_t i = 0; i < c->n_here && !e->code; i++) {
        if (c->fp8)
            cuda_verify_fp8(c, &c->rank[i], g, e);
        if (!e->code)
            verify_rank(m, c, &c->rank[i], g, e);
    }
    return e->code;
}
