/* SPDX-License-Identifier: Apache-2.0
 * cuda_verify_fp8.c - what experts compute in FP8, in two halves. A hidden number that lies between two of 8 bits goes
 * to either side, as the last bits of a sum have it, and then the output is another: so hidden layers, which are kept
 * when a run is verified, are compared with what their inputs come to, each number for itself, and outputs with what
 * the hidden layers of the GPU come to. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_e4m3.h"
#include "cuda_rank.h"
#include "host_model.h"

#include <math.h>
#include <stdlib.h>

/* Of a row's largest element; rows are in bf16. */
#define TOLERANCE 1e-2
/* Beside half of a step of 8 bits: of a hidden number, what bf16 makes of gate and up; of the largest of its row, what
 * sums of FP8 products lose, which on some GPUs have little more than 13 bits. */
#define HIDDEN_TOLERANCE (1.0 / 32)
#define SUM_TOLERANCE (1.0 / 256)

/* One expert's rows, fetched from the device or made anew. */
struct check {
    const struct cuda *c;
    const struct cuda_rank *r;
    int32_t layer, expert, d, width;
    float *w, *in, *hidden, *out;
    double *expected;
    char *raw;
};

static int fetch(const struct check *k, const void *from, size_t bytes, struct err *e)
{
    return CUDA_TRY(e, k->r->rank, cudaMemcpy(k->raw, from, bytes, cudaMemcpyDeviceToHost));
}

static int fetch_row(const struct check *k, int64_t row, float *to, struct err *e)
{
    fetch(k, (char *)k->r->rows.at + (size_t)row * row_bytes(k->c), row_bytes(k->c), e);
    cuda_to_floats(k->c, (size_t)k->d, k->raw, to);
    return e->code;
}

/* to[j] = sum of from[i] w[i][j], n by m. */
static void multiply(int32_t n, int32_t m, const float *from, const float *w, double *to)
{
    for (int32_t j = 0; j < m; j++)
        to[j] = 0;
    for (int32_t i = 0; i < n; i++)
        for (int32_t j = 0; j < m; j++)
            to[j] += (double)from[i] * (double)w[(size_t)i * (size_t)m + (size_t)j];
}

static int check_hidden(const struct check *k, int32_t row, float scale, struct err *e)
{
    const size_t n = (size_t)k->d * (size_t)k->width;
    double *gate = k->expected, *up = gate + k->width, largest = 0;
    cuda_e4m3_round((size_t)k->d, k->in);
    multiply(k->d, k->width, k->in, k->w, gate);
    multiply(k->d, k->width, k->in, k->w + n, up);
    for (int32_t j = 0; j < k->width; j++) {
        gate[j] *= up[j] / (1 + exp(-gate[j]));
        largest = fmax(largest, fabs(gate[j]));
    }
    for (int32_t j = 0; j < k->width; j++) {
        const double expected = gate[j], got = (double)k->hidden[j];
        const double allowed = fmax(fabs(expected) / 16, (double)scale / 1024) + HIDDEN_TOLERANCE * fabs(expected) +
                               SUM_TOLERANCE * largest;
        if (!(fabs(got - expected) <= allowed))
            return err_set(e, ERR_RUN, "rank %d: layer %d, expert %d, row %d, hidden element %d: got %.9g, expected "
                           "%.9g, or as near as fp8 comes to it", k->r->rank, k->layer, k->expert, row, j, got,
                           expected);
    }
    return 0;
}

static int check_output(const struct check *k, int32_t row, struct err *e)
{
    int32_t at;
    multiply(k->width, k->d, k->hidden, k->w + 2 * (size_t)k->d * (size_t)k->width, k->expected);
    const double error = host_error(k->out, k->expected, k->d, &at);
    if (error > TOLERANCE)
        return err_set(e, ERR_RUN, "rank %d: layer %d, expert %d, row %d, element %d: got %.9g, expected %.9g of its "
                       "hidden layer (relative error %.2g, allowed %.2g)", k->r->rank, k->layer, k->expert, row, at,
                       (double)k->out[at], k->expected[at], error, TOLERANCE);
    return 0;
}

static int check_rows(struct check *k, const struct cuda_stream *s, const struct cuda_act *a,
                      const struct cuda_experts *t, const struct cuda_expert *x, struct err *e)
{
    const size_t width = (size_t)k->width, matrix = (size_t)k->d * width;
    k->w = host_weights(k->c->model, k->layer, k->expert);
    if (!k->w)
        return err_set(e, ERR_MEMORY, "out of memory for the weights of layer %d, expert %d", k->layer, k->expert);
    for (size_t i = 0; i < 3; i++)
        cuda_e4m3_round(matrix, k->w + i * matrix);
    for (int32_t j = 0; j < x->n && !e->code; j++) {
        const int64_t at = x->first + j, kept = t->kept + at;
        float scale = 0;
        fetch_row(k, k->c->plan.index[a->index + at], k->in, e);
        fetch_row(k, a->row + at, k->out, e);
        CUDA_TRY(e, k->r->rank, cudaMemcpy(&scale, (float *)s->hidden_scale.at + kept, sizeof scale,
                                           cudaMemcpyDeviceToHost));
        fetch(k, (char *)s->hidden.at + (size_t)kept * width, width, e);
        for (size_t i = 0; i < width; i++)
            k->hidden[i] = scale * cuda_e4m3_value((uint8_t)k->raw[i]);
        if (!e->code && check_hidden(k, j, scale, e) == 0)
            check_output(k, j, e);
    }
    free(k->w);
    return e->code;
}

int cuda_verify_fp8(const struct cuda *c, const struct cuda_rank *r, const struct moe_graph *g, struct err *e)
{
    const size_t d = (size_t)c->model->d_model, width = (size_t)c->model->d_expert, most = 2 * (d + width);
    struct check k = { .c = c, .r = r, .d = c->model->d_model, .width = c->model->d_expert,
                       .in = malloc(d * sizeof(float)), .hidden = malloc(width * sizeof(float)),
                       .out = malloc(d * sizeof(float)), .expected = malloc(most * sizeof(double)),
                       .raw = malloc(most * sizeof(float)) };
    if (!k.in || !k.hidden || !k.out || !k.expected || !k.raw)
        err_set(e, ERR_MEMORY, "rank %d: out of memory to verify experts", r->rank);
    for (int64_t i = 0; i < c->plan.n_op; i++) {
        const struct cuda_op *op = &c->plan.op[i];
        for (int32_t j = op->first_act; &c->rank[op->rank] == r && j < op->first_act + op->n_acts; j++) {
            const struct cuda_act *a = &c->plan.act[j];
            const struct cuda_experts *t = a->what == CUDA_EXPERTS ? &c->plan.experts[a->entry] : NULL;
            for (int32_t x = t ? t->first : 0; t && x < t->first + t->n && !e->code; x++) {
                k.layer = g->task[op->task].layer;
                k.expert = g->expert[c->plan.expert[x].entry];
                check_rows(&k, &c->stream[op->stream], a, t, &c->plan.expert[x], e);
            }
        }
    }
    free(k.in);
    free(k.hidden);
    free(k.out);
    free(k.expected);
    free(k.raw);
    return e->code;
}
