/* SPDX-License-Identifier: Apache-2.0
 * host_model.h - what machine host computes, apart from how: made-up weights and inputs, one MoE layer as a plain
 * reference, and the comparison with it.
 *
 *   layer(x)[t] = normalise(x[t] + sum over routes i of t: weight[i] * expert[i](x[t]))
 *   expert(x)   = (silu(x W1) * (x W3)) W2,   W1, W3: [d_model][width], W2: [width][d_model]
 *
 * Experts that cost nothing (ids from n_experts on) count as zero. */
#ifndef HOST_MODEL_H
#define HOST_MODEL_H

#include "err.h"
#include "graph.h"
#include "moelab.h"

/* Outputs that differ by more than this, relative to the token's largest element, fail a verified run. */
#define HOST_TOLERANCE 1e-5

/* Columns of an expert's first two matrices. */
int32_t host_width(const struct moe_model *, int32_t layer, int32_t expert);
/* W1, W3, W2 behind each other: 3 * d_model * width floats, uniform, of variance 1 / rows, so that outputs have the
 * size of inputs. A function of (layer, expert) and position alone. NULL when there is no memory; free() it. */
float *host_weights(const struct moe_model *, int32_t layer, int32_t expert);
/* What enters layer 0, a function of (step, token): uniform, of variance 1. */
void host_input(const struct moe_model *, int32_t step, int32_t token, float *row);
/* Divides by the root of the mean square. */
void host_normalise(float *row, int32_t n);

/* Where a machine rounds on the way through an expert, so that its reference does too. */
struct host_rounding {
    void (*operand)(size_t n, float *); /* one of the three matrices, or a row that enters a product, as a whole */
    float (*sum)(float);                /* what the first two products give */
};

/* The layer of n tokens, in double precision, one product after another; rounding NULL: nowhere. in: [n] rows of
 * d_model; routes: those of the layer; place: [T] index of a token in `in`, or -1; out: [n][d_model]. */
int host_reference(const struct moe_model *, int32_t layer, const struct graph_route *routes, int64_t n_routes,
                   const int32_t *place, int32_t n, const float *const *in, const struct host_rounding *rounding,
                   double *out, struct err *);
/* Largest difference, divided by the largest expected element; infinite where something is not a number. *at: the
 * element with that difference. */
double host_error(const float *got, const double *expected, int32_t n, int32_t *at);

#endif
