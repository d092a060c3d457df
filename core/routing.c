/* SPDX-License-Identifier: Apache-2.0
 * routing.c - statistics of who went where. Each is one pass over the ids. */
#include "config.h"

#include "moelab.h"
#include "routing.h"

#include <stdlib.h>
#include <string.h>

struct routing routing_of(const struct trace *t)
{
    return (struct routing){
        .n_tokens = t->n_tokens,
        .n_layers = t->n_layers,
        .n_experts = t->n_experts,
        .top_k = t->top_k,
        .n_requests = t->n_requests,
        .item_bytes = t->experts.item_bytes,
        .experts = t->experts.data,
        .offsets = t->offsets.data,
    };
}

static int no_memory(struct err *err)
{
    return err_set(err, ERR_MEMORY, "no memory for routing statistics");
}

static void add_load(const struct routing *r, int32_t layer, int64_t from, int64_t to, int64_t *load)
{
    for (int64_t t = from; t < to; t++)
        for (int32_t i = 0; i < r->top_k; i++)
            load[routing_expert(r, t, layer, i)]++;
}

void routing_load(const struct routing *r, int32_t layer, int64_t *load)
{
    memset(load, 0, (size_t)r->n_experts * sizeof *load);
    add_load(r, layer, 0, r->n_tokens, load);
}

/* The layers that `layer` stands for: first..last-1. */
static int32_t first_layer(int32_t layer)
{
    return layer < 0 ? 0 : layer;
}

static int32_t last_layer(const struct routing *r, int32_t layer)
{
    return layer < 0 ? r->n_layers : layer + 1;
}

int routing_max_vio(const struct routing *r, int32_t layer, int64_t segment, double *value, struct err *err)
{
    int64_t n_batches = 0, *load = malloc((size_t)r->n_experts * sizeof *load);
    double sum = 0;
    if (!load)
        return no_memory(err);
    if (segment <= 0)
        segment = r->n_tokens;
    for (int32_t l = first_layer(layer); l < last_layer(r, layer); l++)
        for (int64_t t = 0; segment > 0 && t + segment <= r->n_tokens; t += segment) {
            int64_t most = 0;
            memset(load, 0, (size_t)r->n_experts * sizeof *load);
            add_load(r, l, t, t + segment, load);
            for (int32_t e = 0; e < r->n_experts; e++)
                most = load[e] > most ? load[e] : most;
            sum += (double)most * r->n_experts / ((double)segment * r->top_k) - 1;
            n_batches++;
        }
    *value = n_batches ? sum / (double)n_batches : 0;
    free(load);
    return 0;
}

/* Squared coefficient of variation of the loads that n tokens make. */
static double squared_variation(const struct routing *r, const int64_t *load, int64_t n)
{
    double mean = (double)n * r->top_k / r->n_experts, sum = 0;
    for (int32_t e = 0; e < r->n_experts; e++)
        sum += (double)load[e] * (double)load[e];
    return n ? sum / r->n_experts / (mean * mean) - 1 : 0;
}

int routing_unevenness(const struct routing *r, int32_t layer, double *all, double *within, struct err *err)
{
    int64_t *load = malloc((size_t)r->n_experts * sizeof *load);
    int32_t n_layers = last_layer(r, layer) - first_layer(layer);
    *all = *within = 0;
    if (!load)
        return no_memory(err);
    for (int32_t l = first_layer(layer); r->n_tokens > 0 && l < last_layer(r, layer); l++) {
        routing_load(r, l, load);
        *all += squared_variation(r, load, r->n_tokens) / n_layers;
        for (int32_t q = 0; q < r->n_requests; q++) {
            int64_t n = r->offsets[q + 1] - r->offsets[q];
            memset(load, 0, (size_t)r->n_experts * sizeof *load);
            add_load(r, l, r->offsets[q], r->offsets[q + 1], load);
            *within += squared_variation(r, load, n) * (double)n / (double)r->n_tokens / n_layers;
        }
    }
    free(load);
    return 0;
}

int routing_overlap(const struct routing *r, int32_t layer, double *value, double *chance, struct err *err)
{
    int64_t n_pairs = 0, n_shared = 0;
    int64_t *load = malloc((size_t)r->n_experts * sizeof *load), *seen = malloc((size_t)r->n_experts * sizeof *seen);
    double sum = 0;
    int rc = load && seen ? 0 : no_memory(err);
    for (int32_t l = first_layer(layer); rc == 0 && l < last_layer(r, layer); l++) {
        for (int32_t e = 0; e < r->n_experts; e++)
            seen[e] = -2;
        for (int32_t q = 0; q < r->n_requests; q++) {
            int64_t first = r->offsets[q];
            for (int64_t t = first; t < r->offsets[q + 1]; t++) {
                for (int32_t i = 0; i < r->top_k; i++) {
                    int32_t e = routing_expert(r, t, l, i);
                    n_shared += t > first && seen[e] == t - 1;
                    seen[e] = t;
                }
                n_pairs += t > first;
            }
        }
        routing_load(r, l, load);
        for (int32_t e = 0; e < r->n_experts && r->n_tokens; e++) {
            double f = (double)load[e] / (double)r->n_tokens;
            sum += f * f / r->top_k;
        }
    }
    *value = n_pairs ? (double)n_shared / ((double)n_pairs * r->top_k) : 0;
    *chance = sum / (last_layer(r, layer) - first_layer(layer));
    free(load);
    free(seen);
    return rc;
}

static int64_t shifted(const struct routing *r, int64_t token, int64_t shift)
{
    return token + shift < r->n_tokens ? token + shift : token + shift - r->n_tokens;
}

/* count [E][E]: tokens with e in layer l and f in layer l+1, which is read `shift` tokens further on. */
static void count_transitions(const struct routing *r, int32_t l, int64_t shift, uint32_t *count)
{
    int32_t n = r->n_experts;
    memset(count, 0, (size_t)n * (size_t)n * sizeof *count);
    for (int64_t t = 0; t < r->n_tokens; t++) {
        int64_t u = shifted(r, t, shift);
        for (int32_t i = 0; i < r->top_k; i++) {
            uint32_t *row = count + (size_t)routing_expert(r, t, l, i) * (size_t)n;
            for (int32_t j = 0; j < r->top_k; j++)
                row[routing_expert(r, u, l + 1, j)]++;
        }
    }
}

/* Routes in layer l whose successor is their expert's likeliest. */
static int64_t follow_most(const struct routing *r, int32_t l, int64_t shift, uint32_t *count)
{
    int32_t n = r->n_experts;
    int64_t sum = 0;
    count_transitions(r, l, shift, count);
    for (int32_t e = 0; e < n; e++) {
        const uint32_t *row = count + (size_t)e * (size_t)n;
        uint32_t most = 0;
        for (int32_t f = 0; f < n; f++)
            most = row[f] > most ? row[f] : most;
        sum += most;
    }
    return sum;
}

int routing_affinity(const struct routing *r, int32_t layer, double *value, double *chance, struct err *err)
{
    int64_t follow = 0, follow_other = 0, n_routes = 0;
    uint32_t *count = malloc((size_t)r->n_experts * (size_t)r->n_experts * sizeof *count);
    if (!count)
        return no_memory(err);
    for (int32_t l = first_layer(layer); l < last_layer(r, layer) && l + 1 < r->n_layers; l++) {
        follow += follow_most(r, l, 0, count);
        follow_other += follow_most(r, l, r->n_tokens / 2, count);
        n_routes += r->n_tokens * r->top_k;
    }
    *value = n_routes ? (double)follow / (double)n_routes : 0;
    *chance = n_routes ? (double)follow_other / (double)n_routes : 0;
    free(count);
    return 0;
}

/* Routes of layer l+1 that were among the K foretold. score: [E], top: [K]. */
static int64_t count_foretold(const struct routing *r, int32_t l, int64_t shift, uint32_t *count, int64_t *load,
                              float *score, int32_t *top)
{
    int32_t n = r->n_experts, k = r->top_k;
    int64_t sum = 0;
    count_transitions(r, l, shift, count);
    routing_load(r, l, load);
    for (int64_t t = 0; t < r->n_tokens; t++) {
        int64_t u = shifted(r, t, shift);
        memset(score, 0, (size_t)n * sizeof *score);
        for (int32_t i = 0; i < k; i++) {
            int32_t e = routing_expert(r, t, l, i);
            const uint32_t *row = count + (size_t)e * (size_t)n;
            for (int32_t f = 0; f < n; f++)
                score[f] += (float)row[f] / (float)load[e];
        }
        moe_top_k(score, n, k, top);
        for (int32_t j = 0; j < k; j++)
            for (int32_t i = 0; i < k; i++)
                sum += routing_expert(r, u, l + 1, j) == top[i];
    }
    return sum;
}

int routing_recall(const struct routing *r, int32_t layer, double *value, double *chance, struct err *err)
{
    const size_t n = (size_t)r->n_experts;
    int64_t found = 0, found_other = 0, n_routes = 0;
    uint32_t *count = malloc(n * n * sizeof *count);
    int64_t *load = malloc(n * sizeof *load);
    float *score = malloc(n * sizeof *score);
    int32_t *top = malloc((size_t)r->top_k * sizeof *top);
    int rc = count && load && score && top ? 0 : no_memory(err);
    for (int32_t l = first_layer(layer); rc == 0 && l < last_layer(r, layer) && l + 1 < r->n_layers; l++) {
        found += count_foretold(r, l, 0, count, load, score, top);
        found_other += count_foretold(r, l, r->n_tokens / 2, count, load, score, top);
        n_routes += r->n_tokens * r->top_k;
    }
    *value = n_routes ? (double)found / (double)n_routes : 0;
    *chance = n_routes ? (double)found_other / (double)n_routes : 0;
    free(count);
    free(load);
    free(score);
    free(top);
    return rc;
}

int routing_iid(struct routing *out, const struct routing *like, int32_t n_layers, uint64_t seed, struct err *err)
{
    int32_t n = like->n_experts, k = like->top_k;
    int64_t n_rows = like->n_tokens * n_layers;
    uint16_t *id = malloc((size_t)(n_rows * k + 1) * sizeof *id), *deck = malloc((size_t)n * sizeof *deck);
    *out = *like;
    out->n_layers = n_layers;
    out->item_bytes = 2;
    out->experts = id;
    if (!id || !deck) {
        free(id);
        free(deck);
        out->experts = NULL;
        return no_memory(err);
    }
    for (int32_t e = 0; e < n; e++)
        deck[e] = (uint16_t)e;
    /* The first k places of a shuffle that goes on from the row before. Rows are uniform and independent: each
     * swap draws afresh from whatever order there is. */
    uint64_t counter = 0, start = moe_mix(seed + UINT64_C(0x9E3779B97F4A7C15));
    for (int64_t row = 0; row < n_rows; row++)
        for (int32_t i = 0; i < k; i++) {
            uint64_t bits = moe_mix(start + UINT64_C(0x9E3779B97F4A7C15) * ++counter);
            int32_t j = i + (int32_t)(moe_unit(bits) * (n - i));
            uint16_t e = deck[j];
            deck[j] = deck[i];
            deck[i] = e;
            id[row * k + i] = e;
        }
    free(deck);
    return 0;
}

void routing_free_iid(struct routing *r)
{
    free((void *)(uintptr_t)r->experts);
    r->experts = NULL;
}
