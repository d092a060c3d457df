/* SPDX-License-Identifier: Apache-2.0
 * host_model.c - see host_model.h. */
#include "config.h"

#include "host_model.h"
#include "host_kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* In the mean square, against rows of zeros. */
#define EPSILON 1e-6

enum hash { HASH_WEIGHTS = 1, HASH_INPUT };

static uint64_t key_of(enum hash what, int32_t a, int32_t b)
{
    return moe_mix(moe_mix((uint64_t)what << 32 | (uint32_t)a) ^ (uint32_t)b);
}

/* Element i of the stream `key`: uniform over (-scale, scale). */
static float uniform(uint64_t key, uint64_t i, double scale)
{
    return (float)(scale * (2 * moe_unit(moe_mix(key + UINT64_C(0x9E3779B97F4A7C15) * (i + 1))) - 1));
}

int32_t host_width(const struct moe_model *m, int32_t layer, int32_t expert)
{
    if (!m->expert_width)
        return m->d_expert;
    double share = m->expert_width[(size_t)layer * (size_t)m->n_experts + (size_t)expert];
    int32_t width = (int32_t)lround(share * m->d_expert);
    return width > 1 ? width : 1;
}

float *host_weights(const struct moe_model *m, int32_t layer, int32_t expert)
{
    size_t d = (size_t)m->d_model, width = (size_t)host_width(m, layer, expert);
    uint64_t key = key_of(HASH_WEIGHTS, layer, expert);
    float *w = host_take(sizeof *w * 3 * d * width);
    /* Uniform over (-a, a) has variance a^2 / 3. */
    for (size_t i = 0; w && i < 3 * d * width; i++)
        w[i] = uniform(key, i, sqrt(3.0 / (double)(i < 2 * d * width ? d : width)));
    return w;
}

void host_input(const struct moe_model *m, int32_t step, int32_t token, float *row)
{
    uint64_t key = key_of(HASH_INPUT, step, token);
    for (int32_t i = 0; i < m->d_model; i++)
        row[i] = uniform(key, (uint64_t)i, sqrt(3.0));
}

/* Squares are added in LANES parts, so that none waits for the one before, few enough at a time for floats. */
void host_normalise(float *row, int32_t n)
{
    enum { LANES = 8, SPAN = 128 };
    const int32_t whole = n / LANES * LANES;
    double squares = 0;
    for (int32_t at = 0; at < whole; at += SPAN) {
        const int32_t end = at + SPAN < whole ? at + SPAN : whole;
        float lane[LANES] = { 0 };
        for (int32_t i = at; i < end; i += LANES)
            for (int32_t l = 0; l < LANES; l++)
                lane[l] += row[i + l] * row[i + l];
        for (int32_t l = 0; l < LANES; l++)
            squares += (double)lane[l];
    }
    for (int32_t i = whole; i < n; i++)
        squares += (double)row[i] * (double)row[i];
    const float scale = (float)(1 / sqrt(squares / n + EPSILON));
    for (int32_t i = 0; i < n; i++)
        row[i] *= scale;
}

/* hidden[k], in double precision or as far as it is rounded. */
static void round_hidden(const struct host_rounding *r, int32_t width, double *hidden, float *room)
{
    for (int32_t k = 0; k < width; k++)
        room[k] = (float)hidden[k];
    r->operand((size_t)width, room);
    for (int32_t k = 0; k < width; k++)
        hidden[k] = (double)room[k];
}

/* sum[j] += weight * expert(x)[j]. hidden: [width]; room: [d + width]. */
static void add_expert(const float *w, int32_t d, int32_t width, const float *x, double weight,
                       const struct host_rounding *rounding, double *hidden, float *room, double *sum)
{
    const float *w1 = w, *w3 = w1 + (size_t)d * (size_t)width, *w2 = w3 + (size_t)d * (size_t)width;
    if (rounding) {
        memcpy(room, x, sizeof *room * (size_t)d);
        rounding->operand((size_t)d, room);
        x = room;
    }
    for (int32_t k = 0; k < width; k++) {
        double gate = 0, up = 0;
        for (int32_t i = 0; i < d; i++) {
            size_t at = (size_t)i * (size_t)width + (size_t)k;
            gate += (double)x[i] * (double)w1[at];
            up += (double)x[i] * (double)w3[at];
        }
        if (rounding) {
            gate = (double)rounding->sum((float)gate);
            up = (double)rounding->sum((float)up);
        }
        hidden[k] = gate / (1 + exp(-gate)) * up;
    }
    if (rounding)
        round_hidden(rounding, width, hidden, room + d);
    for (int32_t j = 0; j < d; j++) {
        double y = 0;
        for (int32_t k = 0; k < width; k++)
            y += hidden[k] * (double)w2[(size_t)k * (size_t)d + (size_t)j];
        sum[j] += weight * y;
    }
}

int host_reference(const struct moe_model *m, int32_t layer, const struct graph_route *routes, int64_t n_routes,
                   const int32_t *place, int32_t n, const float *const *in, const struct host_rounding *rounding,
                   double *out, struct err *e)
{
    const size_t d = (size_t)m->d_model;
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t j = 0; j < d; j++)
            out[i * d + j] = (double)in[i][j];
    /* Expert by expert, so that one expert's weights are all that is held. */
    for (int32_t expert = 0; expert < m->n_experts; expert++) {
        int32_t width = host_width(m, layer, expert);
        const size_t matrix = d * (size_t)width;
        float *w = NULL, *room = NULL;
        double *hidden = NULL;
        for (int64_t r = 0; r < n_routes; r++) {
            if (routes[r].expert != expert || place[routes[r].token] < 0)
                continue;
            if (!w) {
                w = host_weights(m, layer, expert);
                hidden = malloc(sizeof *hidden * (size_t)width);
                room = malloc(sizeof *room * (d + (size_t)width));
                for (size_t i = 0; w && rounding && i < 3; i++)
                    rounding->operand(matrix, w + i * matrix);
            }
            if (!w || !hidden || !room) {
                err_set(e, ERR_MEMORY, "out of memory for the weights of layer %d, expert %d", layer, expert);
                break;
            }
            size_t i = (size_t)place[routes[r].token];
            add_expert(w, m->d_model, width, in[i], (double)routes[r].weight, rounding, hidden, room,
                       out + i * d);
        }
        free(w);
        free(hidden);
        free(room);
        if (e->code)
            return e->code;
    }
    for (size_t i = 0; i < (size_t)n; i++) {
        double squares = 0;
        for (size_t j = 0; j < d; j++)
            squares += out[i * d + j] * out[i * d + j];
        for (size_t j = 0; j < d; j++)
            out[i * d + j] /= sqrt(squares / (double)d + EPSILON);
    }
    return 0;
}

double host_error(const float *got, const double *expected, int32_t n, int32_t *at)
{
    double most = 0, largest = 0;
    *at = 0;
    for (int32_t i = 0; i < n; i++) {
        double difference = fabs((double)got[i] - expected[i]);
        if (!isfinite(difference)) {
            *at = i;
            return INFINITY;
        }
        largest = fmax(largest, fabs(expected[i]));
        if (difference > most) {
            most = difference;
            *at = i;
        }
    }
    return most > 0 ? most / largest : 0;
}
