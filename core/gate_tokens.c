/* SPDX-License-Identifier: Apache-2.0
 * gate_tokens.c - the drifting mixture that tokens of a trained gate come from, and what the teacher makes of them. */
#include "config.h"

#include "gate.h"

#include <stdlib.h>
#include <string.h>

enum { MEANS = 10, CENTRES, MAPS, SHARES, PICKS, NOISE };

/* Numbers of variance v, from one stream after another. */
static void fill(float *x, int64_t n, double variance, uint64_t start)
{
    const float scale = (float)sqrt(variance);
    for (int64_t i = 0; i < n; i++)
        x[i] = scale * gate_normal(gate_bits(start, i));
}

/* ---- a trace's tokens ---- */

static int32_t cluster_of(const struct trace *t, int32_t request)
{
    return t->domains.data ? (int32_t)npy_int(&t->domains, request) : request;
}

/* Tokens that have hidden states, by cluster. Clusters without any are left out: ids are in the order of domains. */
static int sort_pool(struct gate *g, struct err *e)
{
    const struct trace *t = g->trace;
    const int64_t n = t->hidden.shape[0];
    int32_t n_ids = 0, *id = malloc(sizeof *id * ((size_t)n + 1));
    g->pool = malloc(sizeof *g->pool * ((size_t)n + 1));
    for (int64_t row = 0; id && row < n; row++) {
        id[row] = cluster_of(t, trace_request(t, row));
        n_ids = id[row] >= n_ids ? id[row] + 1 : n_ids;
    }
    g->pool_first = calloc((size_t)n_ids + 2, sizeof *g->pool_first);
    if (!id || !g->pool || !g->pool_first) {
        free(id);
        return err_set(e, ERR_MEMORY, "out of memory for %lld tokens", (long long)n);
    }
    g->n_clusters = 0;
    int64_t at = 0;
    for (int32_t c = 0; c < n_ids; c++) {
        const int64_t from = at;
        for (int64_t row = 0; row < n; row++)
            if (id[row] == c)
                g->pool[at++] = row;
        if (at > from)
            g->pool_first[++g->n_clusters] = at;
    }
    free(id);
    return 0;
}

/* Scales n numbers in groups of `length` to a mean square of 1 per group. */
static void to_unit(float *x, int64_t n_groups, int64_t length, int64_t stride)
{
    double sum = 0;
    for (int64_t i = 0; i < n_groups; i++)
        for (int64_t j = 0; j < length; j++)
            sum += (double)x[i * stride + j] * (double)x[i * stride + j];
    const float scale = sum > 0 ? (float)sqrt((double)n_groups / sum) : 0;
    for (int64_t i = 0; i < n_groups; i++)
        for (int64_t j = 0; j < length; j++)
            x[i * stride + j] *= scale;
}

/* Recorded hidden states and what fixed experts make of them by recorded routes. */
static int fill_pool(struct gate *g, struct err *e)
{
    const struct trace *t = g->trace;
    const int64_t n = g->pool_first[g->n_clusters], d = g->n_hidden, o = g->conf->outputs, n_layers = g->n_layers;
    g->pool_x = malloc(sizeof *g->pool_x * (size_t)(n * n_layers * d));
    g->pool_y = calloc((size_t)(n * n_layers * o), sizeof *g->pool_y);
    if (!g->pool_x || !g->pool_y)
        return err_set(e, ERR_MEMORY, "out of memory for hidden states of %lld tokens", (long long)n);
    for (int64_t i = 0; i < n; i++)
        npy_floats(&t->hidden, g->pool[i] * t->n_layers * d, n_layers * d, g->pool_x + i * n_layers * d);
    for (int64_t l = 0; l < n_layers; l++)
        to_unit(g->pool_x + l * d, n, d, n_layers * d);
    return 0;
}

static void teach_pool(struct gate *g)
{
    const struct trace *t = g->trace;
    const int64_t n = g->pool_first[g->n_clusters], d = g->n_hidden, o = g->conf->outputs;
    int32_t expert[t->top_k];
    float weight[t->top_k], part[64];
    memset(g->pool_y, 0, sizeof *g->pool_y * (size_t)(n * g->n_layers * o));
    for (int32_t l = 0; l < g->n_layers; l++) {
        for (int64_t i = 0; i < n; i++) {
            float *y = g->pool_y + (i * g->n_layers + l) * o;
            trace_experts(t, g->pool[i], l, expert);
            trace_weights(t, g->pool[i], l, weight);
            for (int32_t k = 0; k < t->top_k; k++) {
                gate_apply(g->map + ((int64_t)l * t->n_experts + expert[k]) * d * o,
                           g->pool_x + (i * g->n_layers + l) * d, d, o, part);
                for (int64_t j = 0; j < o; j++)
                    y[j] += weight[k] * part[j];
            }
        }
        to_unit(g->pool_y + l * o, n, o, g->n_layers * o);
    }
}

/* ---- opening ---- */

int gate_tokens_open(struct gate *g, const char *who, struct err *e)
{
    const struct trace *t = g->trace;
    const size_t n_layers = (size_t)g->n_layers, d = (size_t)g->n_hidden, o = (size_t)g->conf->outputs;
    if (t && g->n_layers > t->n_layers)
        return err_set(e, ERR_INPUT, "%s: the model has %d layers, the trace %s hidden states of %d", who, g->n_layers,
                       t->dir, t->n_layers);
    if (t && sort_pool(g, e) < 0)
        return e->code;
    if (t && g->n_clusters == 0)
        return err_set(e, ERR_INPUT, "%s: workload.trace: %s has hidden states of no token", who, t->dir);
    const size_t n_clusters = (size_t)g->n_clusters, n_maps = t ? (size_t)t->n_experts : n_clusters;
    const size_t n_tokens = (size_t)g->n_tokens;
    g->share = calloc(n_clusters, sizeof *g->share);
    g->until = calloc(n_clusters, sizeof *g->until);
    g->mean = t ? NULL : malloc(sizeof *g->mean * n_layers * d);
    g->centre = t ? NULL : malloc(sizeof *g->centre * n_layers * n_clusters * d);
    g->map = malloc(sizeof *g->map * n_layers * n_maps * d * o);
    g->cluster = calloc(n_tokens, sizeof *g->cluster);
    g->x = calloc(n_layers * n_tokens * d, sizeof *g->x);
    g->y = calloc(n_layers * n_tokens * o, sizeof *g->y);
    if (!g->share || !g->until || (!t && (!g->mean || !g->centre)) || !g->map || !g->cluster || !g->x || !g->y)
        return err_set(e, ERR_MEMORY, "out of memory for %d tokens of %d clusters", g->n_tokens, g->n_clusters);
    return t ? fill_pool(g, e) : 0;
}

void gate_tokens_close(struct gate *g)
{
    free(g->share);
    free(g->until);
    free(g->mean);
    free(g->centre);
    free(g->map);
    free(g->pool);
    free(g->pool_first);
    free(g->pool_x);
    free(g->pool_y);
    free(g->cluster);
    free(g->x);
    free(g->y);
}

void gate_tokens_reset(struct gate *g)
{
    const int64_t d = g->n_hidden, o = g->conf->outputs, n_layers = g->n_layers;
    const int64_t n_maps = n_layers * (g->trace ? g->trace->n_experts : g->n_clusters);
    fill(g->share, g->n_clusters, 1, gate_stream(g->seed, SHARES, -1, 0));
    fill(g->map, n_maps * d * o, 1.0 / (double)o, gate_stream(g->seed, MAPS, 0, 0)); /* |h|^2 = 1 gives |y|^2 = 1 */
    if (g->trace) {
        teach_pool(g);
        return;
    }
    fill(g->mean, n_layers * d, g->conf->common / (double)d, gate_stream(g->seed, MEANS, 0, 0));
    fill(g->centre, n_layers * g->n_clusters * d, (1 - g->conf->common - g->conf->noise) / (double)d,
         gate_stream(g->seed, CENTRES, 0, 0));
}

/* ---- one step ---- */

static void move_shares(struct gate *g)
{
    const double drift = g->conf->drift, keep = sqrt(1 - drift * drift);
    const uint64_t start = gate_stream(g->seed, SHARES, g->step, 0);
    double sum = 0;
    for (int32_t c = 0; c < g->n_clusters; c++) {
        if (g->step > 0 && drift > 0)
            g->share[c] = (float)(keep * (double)g->share[c] + drift * (double)gate_normal(gate_bits(start, c)));
        sum += exp(g->conf->skew * (double)g->share[c]);
        g->until[c] = sum;
    }
}

static int32_t pick(const struct gate *g, double at)
{
    int32_t low = 0, high = g->n_clusters - 1;
    at *= g->until[high];
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (g->until[middle] > at)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static void add_noise(float *x, int64_t d, float scale, uint64_t start)
{
    for (int64_t i = 0; i < d; i++)
        x[i] += scale * gate_normal(gate_bits(start, i));
}

void gate_draw(struct gate *g)
{
    const int64_t d = g->n_hidden, o = g->conf->outputs, n_tokens = g->n_tokens, n_layers = g->n_layers;
    const float noise = (float)sqrt(g->conf->noise / (double)d), rest = (float)sqrt(1 - g->conf->noise);
    g->step++;
    g->loss = 0;
    move_shares(g);
    const uint64_t picks = gate_stream(g->seed, PICKS, g->step, 0);
    for (int64_t t = 0; t < n_tokens; t++) {
        const int32_t c = g->cluster[t] = pick(g, moe_unit(gate_bits(picks, 2 * t)));
        int64_t row = 0;
        if (g->trace) {
            const int64_t n = g->pool_first[c + 1] - g->pool_first[c];
            row = g->pool_first[c] + (int64_t)(moe_unit(gate_bits(picks, 2 * t + 1)) * (double)n);
        }
        const uint64_t own = gate_stream(g->seed, NOISE, g->step, t);
        for (int64_t l = 0; l < n_layers; l++) {
            float *x = g->x + (l * n_tokens + t) * d, *y = g->y + (l * n_tokens + t) * o;
            if (g->trace) {
                const float *h = g->pool_x + (row * n_layers + l) * d;
                for (int64_t i = 0; i < d; i++)
                    x[i] = rest * h[i];
                memcpy(y, g->pool_y + (row * n_layers + l) * o, sizeof *y * (size_t)o);
            } else {
                const float *mean = g->mean + l * d, *centre = g->centre + (l * g->n_clusters + c) * d;
                for (int64_t i = 0; i < d; i++)
                    x[i] = mean[i] + centre[i];
            }
            if (noise > 0)
                add_noise(x, d, noise, moe_mix(own + (uint64_t)l));
            if (!g->trace)
                gate_apply(g->map + (l * g->n_clusters + c) * d * o, x, d, o, y);
        }
    }
}
