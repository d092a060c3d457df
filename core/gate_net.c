/* SPDX-License-Identifier: Apache-2.0
 * gate_net.c - logits of hidden states by three gates, and the way back.
 *
 *   linear   logits = x W
 *   cosine   u = x P; logit_e = cos(u, v_e) / tau; P, v and tau are learnt (X-MoE, arXiv 2204.09179)
 *   gru      p = x P_l; r, z = sigmoid(p A + a + s B + b); n = tanh(p A + a + r (s B + b)); s' = (1 - z) n + z s;
 *            logits = s' W_l, where s is the same token's s' in the layer before, zero in the first, and A, B, a, b
 *            are shared by layers (RMoE's gate with PyTorch's cell, as router cross-layer-router has it). Derivatives
 *            go back through all layers
 *
 * Matrices are kept as they stand here, inputs first: W [H][E]. */
#include "config.h"

#include "gate.h"
#include "products.h"

#include <stdlib.h>
#include <string.h>

enum { LINEAR_W = 0, COSINE_P = 0, COSINE_V, COSINE_LOG_TAU, GRU_P = 0, GRU_W };   /* of a layer */
enum { SHARED_A = 0, SHARED_B, SHARED_INPUT_BIAS, SHARED_BIAS };                   /* of all */
static const double COSINE_TAU = 0.3; /* where it starts, as the paper's softmax gates do */

/* What a token leaves for the way back. cosine: u / |u| [R], |u|. gru: p, r, z, n, s B + b of n, s', each [R]. */
enum { KEPT_P, KEPT_R, KEPT_Z, KEPT_N, KEPT_H, KEPT_S, N_KEPT };

static int tensor_open(struct gate_tensor *t, int64_t n, double variance, double rate)
{
    *t = (struct gate_tensor){ calloc((size_t)n, sizeof(float)), calloc((size_t)n, sizeof(float)), n, rate,
                               sqrt(variance) };
    return t->value && t->slope ? 0 : -1;
}

static int open_layer(struct gate *g, int32_t l)
{
    const int64_t d = g->n_hidden, n = g->n_experts, w = g->width, o = g->conf->outputs;
    const double rate = g->conf->learning_rate, spread = g->conf->spread;
    int rc = tensor_open(gate_of(g, l, EXPERT_TENSOR), n * d * o, 0.01 / (double)o, g->conf->expert_rate);
    switch ((enum gate_kind)g->conf->gate) {
    case GATE_LINEAR:
        return rc | tensor_open(gate_of(g, l, LINEAR_W), d * n, spread * spread, rate);
    case GATE_COSINE:
        return rc | tensor_open(gate_of(g, l, COSINE_P), d * w, 1.0 / (double)w, rate) |
               tensor_open(gate_of(g, l, COSINE_V), w * n, 1.0 / (double)w, rate) |
               tensor_open(gate_of(g, l, COSINE_LOG_TAU), 1, 0, rate);
    case GATE_GRU: break;
    }
    return rc | tensor_open(gate_of(g, l, GRU_P), d * w, 1, rate) |
           tensor_open(gate_of(g, l, GRU_W), w * n, 4.0 / (double)w, rate);
}

/* Numbers of scratch that one layer's way there or back needs. */
static size_t work_size(const struct gate *g)
{
    const size_t d = (size_t)g->n_hidden, n = (size_t)g->n_experts, w = (size_t)g->width, t = (size_t)g->n_tokens;
    switch ((enum gate_kind)g->conf->gate) {
    case GATE_LINEAR: return 1;
    case GATE_COSINE: return 2 * t * w + 3 * w * n + n + t * n;
    case GATE_GRU: break;
    }
    return 9 * t * w + 4 * w * (w + n + d);
}

int gate_net_open(struct gate *g, struct err *e)
{
    const size_t n_layers = (size_t)g->n_layers, n_tokens = (size_t)g->n_tokens, n = (size_t)g->n_experts;
    const int64_t w = g->width;
    const enum gate_kind kind = (enum gate_kind)g->conf->gate;
    g->tensor = calloc(n_layers * GATE_TENSORS + N_SHARED_TENSORS, sizeof *g->tensor);
    int rc = g->tensor ? 0 : -1;
    for (int32_t l = 0; rc == 0 && l < g->n_layers; l++)
        rc = open_layer(g, l);
    if (rc == 0 && kind == GATE_GRU)
        rc = tensor_open(gate_shared(g, SHARED_A), w * 3 * w, 1.0 / (double)w, g->conf->learning_rate) |
             tensor_open(gate_shared(g, SHARED_B), w * 3 * w, 1.0 / (double)w, g->conf->learning_rate) |
             tensor_open(gate_shared(g, SHARED_INPUT_BIAS), 3 * w, 0, g->conf->learning_rate) |
             tensor_open(gate_shared(g, SHARED_BIAS), 3 * w, 0, g->conf->learning_rate);
    g->kept_width = kind == GATE_COSINE ? g->width + 1 : kind == GATE_GRU ? N_KEPT * g->width : 0;
    g->kept = calloc(n_layers * n_tokens * (size_t)g->kept_width + 1, sizeof *g->kept);
    g->logits = calloc(n_layers * n_tokens * n, sizeof *g->logits);
    g->d_logits = calloc(n_layers * n_tokens * n, sizeof *g->d_logits);
    g->work = calloc(work_size(g), sizeof *g->work);
    if (rc < 0 || !g->kept || !g->logits || !g->d_logits || !g->work)
        return err_set(e, ERR_MEMORY, "out of memory for a gate of %d experts, %d tokens", g->n_experts, g->n_tokens);
    return 0;
}

void gate_net_close(struct gate *g)
{
    for (int64_t i = 0; g->tensor && i < (int64_t)g->n_layers * GATE_TENSORS + N_SHARED_TENSORS; i++) {
        free(g->tensor[i].value);
        free(g->tensor[i].slope);
    }
    free(g->tensor);
    free(g->kept);
    free(g->logits);
    free(g->d_logits);
    free(g->work);
}

/* What a layer's tokens kept: array `which` of the gru, [T][R]. */
static float *kept_of(const struct gate *g, int32_t layer, int which)
{
    const int64_t n = (int64_t)g->n_tokens * g->width;
    return g->kept + ((int64_t)layer * N_KEPT + which) * n;
}

static float *zeros(float *x, int64_t n)
{
    return memset(x, 0, sizeof *x * (size_t)n);
}

/* ---- cosine ---- */

/* v_e / |v_e| as [R][E], and |v_e|. */
static void unit_columns(const struct gate *g, const float *v, float *unit, float *length)
{
    const int64_t n = g->n_experts, w = g->width;
    zeros(length, n);
    for (int64_t r = 0; r < w; r++)
        for (int64_t e = 0; e < n; e++)
            length[e] += v[r * n + e] * v[r * n + e];
    for (int64_t e = 0; e < n; e++)
        length[e] = sqrtf(length[e]);
    for (int64_t r = 0; r < w; r++)
        for (int64_t e = 0; e < n; e++)
            unit[r * n + e] = length[e] > 0 ? v[r * n + e] / length[e] : 0;
}

static float cosine_scale(const struct gate *g, int32_t layer)
{
    return (float)(exp(-(double)gate_of(g, layer, COSINE_LOG_TAU)->value[0]) / COSINE_TAU);
}

static void cosine_logits(struct gate *g, int32_t layer, const float *x, float *logits)
{
    const int64_t n_tokens = g->n_tokens, n = g->n_experts, w = g->width;
    float *u = g->kept + (int64_t)layer * n_tokens * g->kept_width, *lengths = u + n_tokens * w;
    float *unit = g->work, *length = unit + w * n;
    const float scale = cosine_scale(g, layer);
    product_add(x, gate_of(g, layer, COSINE_P)->value, zeros(u, n_tokens * w), n_tokens, g->n_hidden, w);
    for (int64_t t = 0; t < n_tokens; t++) {
        float sum = 0;
        for (int64_t r = 0; r < w; r++)
            sum += u[t * w + r] * u[t * w + r];
        lengths[t] = sqrtf(sum);
        for (int64_t r = 0; r < w && sum > 0; r++)
            u[t * w + r] /= lengths[t];
    }
    unit_columns(g, gate_of(g, layer, COSINE_V)->value, unit, length);
    product_add(u, unit, logits, n_tokens, w, n);
    for (int64_t i = 0; i < n_tokens * n; i++)
        logits[i] *= scale;
}

static void cosine_back(struct gate *g, int32_t layer, const float *x)
{
    const int64_t n_tokens = g->n_tokens, n = g->n_experts, w = g->width;
    const float *u = g->kept + (int64_t)layer * n_tokens * g->kept_width, *lengths = u + n_tokens * w;
    const float *logits = g->logits + layer * n_tokens * n, *d_logits = g->d_logits + layer * n_tokens * n;
    float *d_cosine = g->work, *d_u = d_cosine + n_tokens * n, *unit = d_u + n_tokens * w, *d_unit = unit + w * n;
    float *room = d_unit + w * n, *length = room + w * n;
    const float scale = cosine_scale(g, layer);
    double d_log_tau = 0;
    for (int64_t i = 0; i < n_tokens * n; i++) {
        d_log_tau -= (double)d_logits[i] * (double)logits[i];
        d_cosine[i] = d_logits[i] * scale;
    }
    gate_of(g, layer, COSINE_LOG_TAU)->slope[0] += (float)d_log_tau;
    unit_columns(g, gate_of(g, layer, COSINE_V)->value, unit, length);
    product_add_first(u, d_cosine, zeros(d_unit, w * n), n_tokens, w, n);
    product_add_second(d_cosine, unit, zeros(d_u, n_tokens * w), n_tokens, w, n, room);
    for (int64_t t = 0; t < n_tokens; t++) {
        float along = 0;
        for (int64_t r = 0; r < w; r++)
            along += d_u[t * w + r] * u[t * w + r];
        for (int64_t r = 0; r < w; r++)
            d_u[t * w + r] = lengths[t] > 0 ? (d_u[t * w + r] - along * u[t * w + r]) / lengths[t] : 0;
    }
    product_add_first(x, d_u, gate_of(g, layer, COSINE_P)->slope, n_tokens, g->n_hidden, w);
    float *d_v = gate_of(g, layer, COSINE_V)->slope;
    for (int64_t e = 0; e < n; e++) {
        float along = 0;
        for (int64_t r = 0; r < w; r++)
            along += d_unit[r * n + e] * unit[r * n + e];
        for (int64_t r = 0; r < w && length[e] > 0; r++)
            d_v[r * n + e] += (d_unit[r * n + e] - along * unit[r * n + e]) / length[e];
    }
}

/* ---- gru ---- */

static void with_bias(float *rows, const float *bias, int64_t n_rows, int64_t n)
{
    for (int64_t t = 0; t < n_rows; t++)
        memcpy(rows + t * n, bias, sizeof *rows * (size_t)n);
}

static void gru_logits(struct gate *g, int32_t layer, const float *x, float *logits)
{
    const int64_t n_tokens = g->n_tokens, w = g->width;
    float *p = kept_of(g, layer, KEPT_P), *r = kept_of(g, layer, KEPT_R), *z = kept_of(g, layer, KEPT_Z);
    float *n = kept_of(g, layer, KEPT_N), *h = kept_of(g, layer, KEPT_H), *s = kept_of(g, layer, KEPT_S);
    const float *before = layer > 0 ? kept_of(g, layer - 1, KEPT_S) : NULL;
    float *in = g->work, *of = in + 3 * n_tokens * w; /* p A + a, s B + b */
    product_add(x, gate_of(g, layer, GRU_P)->value, zeros(p, n_tokens * w), n_tokens, g->n_hidden, w);
    with_bias(in, gate_shared(g, SHARED_INPUT_BIAS)->value, n_tokens, 3 * w);
    with_bias(of, gate_shared(g, SHARED_BIAS)->value, n_tokens, 3 * w);
    product_add(p, gate_shared(g, SHARED_A)->value, in, n_tokens, w, 3 * w);
    if (before)
        product_add(before, gate_shared(g, SHARED_B)->value, of, n_tokens, w, 3 * w);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t i = 0; i < w; i++) {
            const int64_t j = t * w + i, k = t * 3 * w + i;
            r[j] = 1 / (1 + expf(-(in[k] + of[k])));
            z[j] = 1 / (1 + expf(-(in[k + w] + of[k + w])));
            h[j] = of[k + 2 * w];
            n[j] = tanhf(in[k + 2 * w] + r[j] * h[j]);
            s[j] = (1 - z[j]) * n[j] + (before ? z[j] * before[j] : 0);
        }
    product_add(s, gate_of(g, layer, GRU_W)->value, logits, n_tokens, w, g->n_experts);
}

/* d_s: [T][R] derivatives by s', from the layer after; then those by s. */
static void gru_back(struct gate *g, int32_t layer, const float *x, float *d_s)
{
    const int64_t n_tokens = g->n_tokens, w = g->width, n_experts = g->n_experts;
    const float *p = kept_of(g, layer, KEPT_P), *r = kept_of(g, layer, KEPT_R), *z = kept_of(g, layer, KEPT_Z);
    const float *n = kept_of(g, layer, KEPT_N), *h = kept_of(g, layer, KEPT_H), *s = kept_of(g, layer, KEPT_S);
    const float *before = layer > 0 ? kept_of(g, layer - 1, KEPT_S) : NULL;
    const float *d_logits = g->d_logits + (int64_t)layer * n_tokens * n_experts;
    float *d_in = d_s + n_tokens * w, *d_of = d_in + 3 * n_tokens * w, *d_p = d_of + 3 * n_tokens * w;
    float *room = d_p + n_tokens * w;
    product_add_first(s, d_logits, gate_of(g, layer, GRU_W)->slope, n_tokens, w, n_experts);
    product_add_second(d_logits, gate_of(g, layer, GRU_W)->value, d_s, n_tokens, w, n_experts, room);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t i = 0; i < w; i++) {
            const int64_t j = t * w + i, k = t * 3 * w + i;
            const float was = before ? before[j] : 0, d_tanh = d_s[j] * (1 - z[j]) * (1 - n[j] * n[j]);
            d_in[k] = d_of[k] = d_tanh * h[j] * r[j] * (1 - r[j]);
            d_in[k + w] = d_of[k + w] = d_s[j] * (was - n[j]) * z[j] * (1 - z[j]);
            d_in[k + 2 * w] = d_tanh;
            d_of[k + 2 * w] = d_tanh * r[j];
            d_s[j] *= z[j];
        }
    float *d_a = gate_shared(g, SHARED_INPUT_BIAS)->slope, *d_b = gate_shared(g, SHARED_BIAS)->slope;
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t i = 0; i < 3 * w; i++) {
            d_a[i] += d_in[t * 3 * w + i];
            d_b[i] += d_of[t * 3 * w + i];
        }
    product_add_first(p, d_in, gate_shared(g, SHARED_A)->slope, n_tokens, w, 3 * w);
    product_add_second(d_in, gate_shared(g, SHARED_A)->value, zeros(d_p, n_tokens * w), n_tokens, w, 3 * w, room);
    product_add_first(x, d_p, gate_of(g, layer, GRU_P)->slope, n_tokens, g->n_hidden, w);
    if (before) {
        product_add_first(before, d_of, gate_shared(g, SHARED_B)->slope, n_tokens, w, 3 * w);
        product_add_second(d_of, gate_shared(g, SHARED_B)->value, d_s, n_tokens, w, 3 * w, room);
    }
}

/* ---- all ---- */

const float *gate_logits(struct gate *g, int32_t layer)
{
    const int64_t n = (int64_t)g->n_tokens * g->n_experts;
    const float *x = g->x + (int64_t)layer * g->n_tokens * g->n_hidden;
    float *logits = zeros(g->logits + layer * n, n);
    zeros(g->d_logits + layer * n, n);
    switch ((enum gate_kind)g->conf->gate) {
    case GATE_LINEAR:
        product_add(x, gate_of(g, layer, LINEAR_W)->value, logits, g->n_tokens, g->n_hidden, g->n_experts);
        break;
    case GATE_COSINE: cosine_logits(g, layer, x, logits); break;
    case GATE_GRU: gru_logits(g, layer, x, logits); break;
    }
    return logits;
}

void gate_back(struct gate *g)
{
    const int64_t n_tokens = g->n_tokens;
    float *d_s = g->work; /* of the gru, carried from layer to layer */
    if (g->conf->gate == GATE_GRU)
        zeros(d_s, n_tokens * g->width);
    for (int32_t l = g->n_layers - 1; l >= 0; l--) {
        const float *x = g->x + (int64_t)l * n_tokens * g->n_hidden;
        switch ((enum gate_kind)g->conf->gate) {
        case GATE_LINEAR:
            product_add_first(x, g->d_logits + (int64_t)l * n_tokens * g->n_experts, gate_of(g, l, LINEAR_W)->slope,
                              n_tokens, g->n_hidden, g->n_experts);
            break;
        case GATE_COSINE: cosine_back(g, l, x); break;
        case GATE_GRU: gru_back(g, l, x, d_s); break;
        }
    }
}
