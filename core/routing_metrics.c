/* SPDX-License-Identifier: Apache-2.0
 * routing_metrics.c - loads of experts to figures; the router's choice against what balancers left of it. */
#include "config.h"

#include "routing_metrics.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int routing_metrics_open(struct routing_metrics *m, int32_t n_layers, int32_t n_experts, struct err *e)
{
    const size_t n = (size_t)n_layers * (size_t)n_experts;
    *m = (struct routing_metrics){ .n_layers = n_layers, .n_experts = n_experts,
                                   .total = calloc(n + 1, sizeof *m->total),
                                   .share = calloc(n + 1, sizeof *m->share) };
    if (!m->total || !m->share)
        return err_set(e, ERR_MEMORY, "out of memory for metrics of %d layers x %d experts", n_layers, n_experts);
    routing_metrics_forget(m);
    return 0;
}

void routing_metrics_close(struct routing_metrics *m)
{
    free(m->total);
    free(m->share);
    free(m->offset);
    free(m->expert);
    free(m->highest);
    memset(m, 0, sizeof *m);
}

void routing_metrics_forget(struct routing_metrics *m)
{
    const size_t n = (size_t)m->n_layers * (size_t)m->n_experts;
    memset(m->total, 0, sizeof *m->total * n);
    for (size_t i = 0; i < n; i++)
        m->share[i] = -1;
}

/* ---- what the router chose, and what became of it ---- */

static bool grow(void *list, int64_t *room, int64_t need, size_t size)
{
    if (*room >= need)
        return true;
    void *grown = realloc(*(void **)list, (size_t)need * size);
    if (grown) {
        *(void **)list = grown;
        *room = need;
    }
    return grown != NULL;
}

static bool among(const int32_t *expert, int64_t n, int32_t wanted)
{
    for (int64_t i = 0; i < n; i++)
        if (expert[i] == wanted)
            return true;
    return false;
}

static void count_agreement(const struct routing_metrics *m, const struct moe_batch *b, const struct moe_routes *r,
                            struct routing_sums *sums)
{
    for (int32_t t = 0; t < r->n_tokens; t++) {
        moe_top_k(b->router_logits + (int64_t)t * b->n_experts, b->n_experts, b->top_k, m->highest);
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++)
            sums->agreed += among(m->highest, b->top_k, r->expert[i]);
    }
    sums->compared += r->n;
}

int routing_chosen(struct routing_metrics *m, const struct moe_batch *b, const struct moe_routes *r, bool keep,
                   struct routing_sums *sums, struct err *e)
{
    sums->chosen += r->n;
    m->kept = keep;
    const bool compare = b->router_logits && b->top_k <= b->n_experts;
    if (!grow(&m->highest, &m->room_highest, (int64_t)b->top_k + 1, sizeof *m->highest) ||
        (keep && (!grow(&m->offset, &m->room_offset, (int64_t)r->n_tokens + 1, sizeof *m->offset) ||
                  !grow(&m->expert, &m->room_expert, r->n + 1, sizeof *m->expert))))
        return err_set(e, ERR_MEMORY, "out of memory for the choices of %d tokens", r->n_tokens);
    if (compare)
        count_agreement(m, b, r, sums);
    if (keep) {
        memcpy(m->offset, r->offset, sizeof *r->offset * ((size_t)r->n_tokens + 1));
        memcpy(m->expert, r->expert, sizeof *r->expert * (size_t)r->n);
    }
    return 0;
}

void routing_rewritten(struct routing_metrics *m, const struct moe_routes *r, struct routing_sums *sums)
{
    int64_t same = 0;
    if (!m->kept)
        return;
    for (int32_t t = 0; t < r->n_tokens; t++)
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++)
            same += among(m->expert + m->offset[t], m->offset[t + 1] - m->offset[t], r->expert[i]);
    sums->dropped += m->offset[r->n_tokens] - same;
    sums->added += r->n - same;
}

/* ---- loads ---- */

static int64_t sum_of(const int64_t *load, int32_t n)
{
    int64_t sum = 0;
    for (int32_t e = 0; e < n; e++)
        sum += load[e];
    return sum;
}

static double max_vio(const double *load, int32_t n)
{
    double most = 0, sum = 0;
    for (int32_t e = 0; e < n; e++) {
        most = fmax(most, load[e]);
        sum += load[e];
    }
    return sum > 0 ? most * n / sum - 1 : 0;
}

double load_cv(const int64_t *load, int32_t n)
{
    const double mean = (double)sum_of(load, n) / n;
    double squares = 0;
    for (int32_t e = 0; e < n; e++)
        squares += ((double)load[e] - mean) * ((double)load[e] - mean);
    return mean > 0 ? sqrt(squares / n) / mean : 0;
}

static int by_load(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Mean difference between two experts, over twice the mean: sum over ranks i of (2 i - n - 1) load / (n sum). */
double load_gini(const int64_t *load, int32_t n)
{
    const int64_t sum = sum_of(load, n);
    int64_t sorted[n > 0 ? n : 1];
    double weighed = 0;
    memcpy(sorted, load, sizeof *sorted * (size_t)n);
    qsort(sorted, (size_t)n, sizeof *sorted, by_load);
    for (int32_t e = 0; e < n; e++)
        weighed += (2.0 * (e + 1) - n - 1) * (double)sorted[e];
    return sum > 0 ? weighed / ((double)n * (double)sum) : 0;
}

double load_entropy(const int64_t *load, int32_t n)
{
    const double sum = (double)sum_of(load, n);
    double entropy = 0;
    for (int32_t e = 0; e < n; e++)
        if (load[e] > 0)
            entropy -= (double)load[e] / sum * log((double)load[e] / sum);
    return sum > 0 && n > 1 ? entropy / log(n) : 1;
}

void routing_layer(struct routing_metrics *m, int32_t layer, int32_t n_experts, const int64_t *load,
                   struct routing_sums *sums)
{
    double *total = m->total + (size_t)layer * (size_t)m->n_experts;
    double *share = m->share + (size_t)layer * (size_t)m->n_experts;
    const double sum = (double)sum_of(load, n_experts);
    double most = 0, moved = 0;
    const bool before = share[0] >= 0;
    for (int32_t e = 0; e < n_experts; e++) {
        const double now = sum > 0 ? (double)load[e] / sum : 1.0 / n_experts;
        moved += before ? fabs(now - share[e]) / 2 : 0;
        share[e] = now;
        total[e] += (double)load[e];
        most = fmax(most, now);
    }
    sums->max_vio += most * n_experts - 1;
    sums->cv += load_cv(load, n_experts);
    sums->gini += load_gini(load, n_experts);
    sums->entropy += load_entropy(load, n_experts);
    sums->fluctuation += moved;
    sums->n_fluctuation += before;
    sums->n_layers++;
}

void routing_step(struct routing_metrics *m, int32_t n_layers, struct routing_sums *sums)
{
    double sum = 0;
    for (int32_t l = 0; l < n_layers; l++)
        sum += max_vio(m->total + (size_t)l * (size_t)m->n_experts, m->n_experts);
    sums->max_vio_global = sum / n_layers;
}
