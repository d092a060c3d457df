/* SPDX-License-Identifier: Apache-2.0
 * metrics.c - reads figures off a graph that has run. */
#include "config.h"

#include "exchange.h"
#include "metrics.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_OPS = MOE_OP_OTHER + 1 };

const struct metric_info metric_info[N_METRICS] = {
#define METRIC_ROW(name, unit, help) { #name, unit, help },
    METRICS(METRIC_ROW)
#undef METRIC_ROW
};

void metrics_free(struct metrics *m)
{
    for (int i = 0; i < N_METRICS; i++)
        free(m->value[i]);
    memset(m, 0, sizeof *m);
}

/* ---- the bound ---- */

static size_t phase_of(const struct task *x)
{
    return (size_t)x->layer * N_OPS + (size_t)x->op;
}

static bool computes(const struct task *x)
{
    return x->kind == TASK_COMPUTE || x->kind == TASK_EXPERTS;
}

/* own[t]: what t would have taken if its device had no more of this (layer, op) than the mean of all devices; every
 * task of a device with more is shortened by the same share, so chunks add up to the mean, and none takes longer than
 * it did. */
static int even_devices(const struct moe_graph *g, const struct topology *t, int32_t n_layers, double *own,
                        struct err *e)
{
    const size_t n_devices = (size_t)t->n_devices, n_phases = (size_t)n_layers * N_OPS;
    double *sum = calloc(n_phases * n_devices + 1, sizeof *sum), *mean = calloc(n_phases + 1, sizeof *mean);
    for (int32_t i = 0; sum && mean && i < g->n_tasks; i++) {
        const struct task *x = &g->task[i];
        if (!computes(x))
            continue;
        sum[phase_of(x) * n_devices + (size_t)x->device] += x->end - x->start;
        mean[phase_of(x)] += (x->end - x->start) / t->n_devices;
    }
    for (int32_t i = 0; sum && mean && i < g->n_tasks; i++) {
        const struct task *x = &g->task[i];
        if (!computes(x))
            continue;
        double of_device = sum[phase_of(x) * n_devices + (size_t)x->device];
        own[i] = (x->end - x->start) * (of_device > 0 ? fmin(1, mean[phase_of(x)] / of_device) : 0);
    }
    if (!sum || !mean)
        err_set(e, ERR_MEMORY, "out of memory for the bound");
    free(sum);
    free(mean);
    return e->code;
}

static int by_stream(const void *a, const void *b)
{
    const struct task *x = *(const struct task *const *)a, *y = *(const struct task *const *)b;
    if (x->device != y->device)
        return x->device < y->device ? -1 : 1;
    if (x->stream != y->stream)
        return x->stream < y->stream ? -1 : 1;
    return (x->start > y->start) - (x->start < y->start);
}

/* chain[t]: the task that ran after t on its stream, -1 if none. Tasks that took no time are left out, so starts
 * differ. */
static int chain_streams(const struct moe_graph *g, int32_t *chain, struct err *e)
{
    const struct task **order = malloc(sizeof *order * ((size_t)g->n_tasks + 1));
    int32_t n = 0;
    if (!order)
        return err_set(e, ERR_MEMORY, "out of memory for the bound");
    for (int32_t i = 0; i < g->n_tasks; i++) {
        chain[i] = -1;
        if (computes(&g->task[i]) && g->task[i].end > g->task[i].start)
            order[n++] = &g->task[i];
    }
    qsort(order, (size_t)n, sizeof *order, by_stream);
    for (int32_t i = 0; i + 1 < n; i++)
        if (order[i]->device == order[i + 1]->device && order[i]->stream == order[i + 1]->stream)
            chain[order[i] - g->task] = (int32_t)(order[i + 1] - g->task);
    free(order);
    return 0;
}

struct bound {
    const struct moe_graph *graph;
    struct graph_order order;
    double *own, *end;      /* [tasks] evened duration; end of the longest path to it */
    int32_t *chain, *ready; /* [tasks] */
};

/* Longest path in topological order: end[t] holds the latest end of what came before, then the task's own. Nothing on
 * a path takes longer than it did, so no path is longer than the run. */
static double longest_path(struct bound *b, struct evening *v)
{
    const struct moe_graph *g = b->graph;
    int32_t n_ready = 0;
    double last = 0;
    for (int32_t i = 0; i < g->n_tasks; i++)
        if (b->chain[i] >= 0)
            b->order.n_before[b->chain[i]]++;
    for (int32_t i = 0; i < g->n_tasks; i++)
        if (b->order.n_before[i] == 0)
            b->ready[n_ready++] = i;
    for (int32_t i = 0; i < n_ready; i++) {
        const int32_t t = b->ready[i];
        const struct task *x = &g->task[t];
        if (x->kind == TASK_EXCHANGE)
            b->own[t] = fmin(evening_seconds(v, g, x), x->end - x->start);
        else if (x->kind == TASK_ARRIVAL) /* after its exchange's begin */
            b->own[t] = fmin(b->own[x->exchange], x->end - x->start);
        const double begin = b->end[t];
        b->end[t] += b->own[t];
        last = fmax(last, b->end[t]);
        for (int64_t j = b->order.first[t]; j <= b->order.first[t + 1]; j++) {
            const bool along = j == b->order.first[t + 1];
            const int32_t next = along ? b->chain[t] : b->order.next[j];
            if (next < 0)
                continue;
            b->end[next] = fmax(b->end[next], !along && g->task[next].kind == TASK_ARRIVAL ? begin : b->end[t]);
            if (--b->order.n_before[next] == 0)
                b->ready[n_ready++] = next;
        }
    }
    return last;
}

int metrics_bound(const struct moe_graph *g, const struct topology *t, double *seconds, struct err *e)
{
    const size_t n = (size_t)g->n_tasks + 1;
    int32_t n_layers = 0;
    for (int32_t i = 0; i < g->n_tasks; i++)
        n_layers = g->task[i].layer >= n_layers ? g->task[i].layer + 1 : n_layers;
    struct evening v;
    struct bound b = { .graph = g, .own = calloc(n, sizeof *b.own), .end = calloc(n, sizeof *b.end),
                       .chain = malloc(sizeof *b.chain * n), .ready = malloc(sizeof *b.ready * n) };
    if (evening_open(&v, t, e) < 0)
        goto out;
    if (!b.own || !b.end || !b.chain || !b.ready) {
        err_set(e, ERR_MEMORY, "out of memory for the bound");
        goto out;
    }
    if (graph_order(g, &b.order, e) == 0 && even_devices(g, t, n_layers, b.own, e) == 0 &&
        chain_streams(g, b.chain, e) == 0)
        *seconds = longest_path(&b, &v);
out:
    graph_order_free(&b.order);
    free(b.own);
    free(b.end);
    free(b.chain);
    free(b.ready);
    evening_close(&v);
    return e->code;
}

/* ---- figures of a step ---- */

static int reserve(struct metrics *m, struct err *e)
{
    if (m->n_steps < m->room)
        return 0;
    int32_t room = m->room ? 2 * m->room : 64;
    for (int i = 0; i < N_METRICS; i++) {
        double *grown = realloc(m->value[i], sizeof *grown * (size_t)room);
        if (!grown)
            return err_set(e, ERR_MEMORY, "out of memory for metrics");
        m->value[i] = grown;
    }
    m->room = room;
    return 0;
}

/* Per layer the largest device's seconds, summed; per device the seconds of loads. */
struct sums { double *layer_op; /* [L][N_OPS][D] */ double *load; /* [D] */ int32_t n_layers, n_devices; };

static double slowest(const struct sums *s, enum moe_op op)
{
    double sum = 0;
    for (int32_t l = 0; l < s->n_layers; l++) {
        double most = 0;
        for (int32_t d = 0; d < s->n_devices; d++)
            most = fmax(most, s->layer_op[((size_t)l * N_OPS + op) * (size_t)s->n_devices + (size_t)d]);
        sum += most;
    }
    return sum;
}

static int by_start(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return (x[0] > y[0]) - (x[0] < y[0]);
}

enum traffic { THERE = 1, BACK = 2, NEITHER = 4, OF_TOKENS = THERE | BACK | NEITHER, OF_WEIGHTS = 8, COLLECTIVE = 16 };

static enum traffic traffic_of(const struct task *x)
{
    if (x->moves_weights || x->collective)
        return x->moves_weights ? OF_WEIGHTS : COLLECTIVE;
    return x->payload == MOE_PAY_HIDDEN ? THERE : x->payload == MOE_PAY_OUTPUT ? BACK : NEITHER;
}

/* Time in which any exchange of some kinds was under way: what overlaps counts once. */
static int time_under_way(const struct moe_graph *g, enum traffic kinds, double *seconds, struct err *e)
{
    double (*span)[2] = malloc(sizeof *span * ((size_t)g->n_tasks + 1));
    size_t n = 0;
    if (!span)
        return err_set(e, ERR_MEMORY, "out of memory for metrics");
    for (int32_t i = 0; i < g->n_tasks; i++)
        if (g->task[i].kind == TASK_EXCHANGE && (traffic_of(&g->task[i]) & kinds)) {
            span[n][0] = g->task[i].start;
            span[n++][1] = g->task[i].end;
        }
    qsort(span, n, sizeof *span, by_start);
    double covered = -INFINITY;
    *seconds = 0;
    for (size_t i = 0; i < n; i++) {
        double from = fmax(span[i][0], covered);
        if (span[i][1] > from) {
            *seconds += span[i][1] - from;
            covered = span[i][1];
        }
    }
    free(span);
    return 0;
}

static double per(double sum, int64_t n)
{
    return n > 0 ? sum / (double)n : NAN;
}

static void routing_figures(struct metrics *m, int32_t at)
{
    const struct routing_sums *r = &m->routing;
    double *const *v = m->value;
    v[METRIC_max_vio][at] = per(r->max_vio, r->n_layers);
    v[METRIC_max_vio_global][at] = r->n_layers > 0 ? r->max_vio_global : NAN;
    v[METRIC_load_cv][at] = per(r->cv, r->n_layers);
    v[METRIC_load_gini][at] = per(r->gini, r->n_layers);
    v[METRIC_load_entropy][at] = per(r->entropy, r->n_layers);
    v[METRIC_fluctuation][at] = per(r->fluctuation, r->n_fluctuation);
    v[METRIC_routes][at] = r->chosen > 0 ? (double)r->chosen : NAN;
    v[METRIC_dropped][at] = per((double)r->dropped, r->chosen);
    v[METRIC_added][at] = per((double)r->added, r->chosen);
    v[METRIC_experts_per_token][at] = per((double)r->computed, r->tokens);
    v[METRIC_skipped][at] = r->skips ? per((double)r->left_out, 2 * r->tokens) : NAN;
    v[METRIC_agreement][at] = per((double)r->agreed, r->compared);
    v[METRIC_task_loss][at] = m->learns ? m->task_loss : NAN;
    v[METRIC_aux_loss][at] = m->learns ? m->aux_loss : NAN;
    v[METRIC_flops_per_token][at] = per(r->flops * r->n_layers, r->tokens);
}

int metrics_step(struct metrics *m, const struct moe_graph *g, const struct topology *t, int32_t n_tokens,
                 double seconds, double joules, struct err *e)
{
    if (reserve(m, e) < 0)
        return e->code;
    struct sums s = { .n_devices = t->n_devices };
    for (int32_t i = 0; i < g->n_tasks; i++)
        s.n_layers = g->task[i].layer >= s.n_layers ? g->task[i].layer + 1 : s.n_layers;
    s.layer_op = calloc((size_t)s.n_layers * N_OPS * (size_t)t->n_devices + 1, sizeof *s.layer_op);
    s.load = calloc((size_t)t->n_devices, sizeof *s.load);
    if (!s.layer_op || !s.load) {
        free(s.layer_op);
        free(s.load);
        return err_set(e, ERR_MEMORY, "out of memory for metrics");
    }
    double a2a = 0, there = 0, back = 0, migration = 0, collective = 0;
    if (time_under_way(g, OF_TOKENS, &a2a, e) < 0 || time_under_way(g, THERE, &there, e) < 0 ||
        time_under_way(g, BACK, &back, e) < 0 || time_under_way(g, OF_WEIGHTS, &migration, e) < 0 ||
        time_under_way(g, COLLECTIVE, &collective, e) < 0) {
        free(s.layer_op);
        free(s.load);
        return e->code;
    }
    double intra = 0, inter = 0, bound = 0, load = 0;
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const struct task *x = &g->task[i];
        double took = x->end - x->start;
        if (x->kind == TASK_COMPUTE || x->kind == TASK_EXPERTS)
            s.layer_op[((size_t)x->layer * N_OPS + x->op) * (size_t)t->n_devices + (size_t)x->device] += took;
        else if (x->kind == TASK_LOAD)
            s.load[x->device] += took;
        if (x->kind == TASK_EXCHANGE) {
            double within, between;
            exchange_bytes(g, t, x, &within, &between);
            intra += within;
            inter += between;
        }
    }
    for (int32_t d = 0; d < t->n_devices; d++)
        load = fmax(load, s.load[d]);
    metrics_bound(g, t, &bound, e);
    const double other = slowest(&s, MOE_OP_OTHER), shared = slowest(&s, MOE_OP_SHARED);
    double *const *v = m->value;
    const int32_t at = m->n_steps++;
    v[METRIC_step_s][at] = seconds;
    v[METRIC_bound_s][at] = bound;
    v[METRIC_over_bound][at] = bound > 0 ? seconds / bound : NAN;
    v[METRIC_tokens_per_s][at] = seconds > 0 ? n_tokens / seconds : NAN;
    v[METRIC_a2a_s][at] = a2a;
    v[METRIC_dispatch_s][at] = there;
    v[METRIC_combine_s][at] = back;
    v[METRIC_experts_s][at] = slowest(&s, MOE_OP_EXPERTS);
    v[METRIC_attention_s][at] = slowest(&s, MOE_OP_ATTENTION);
    v[METRIC_gate_s][at] = slowest(&s, MOE_OP_GATE);
    v[METRIC_permute_s][at] = slowest(&s, MOE_OP_PERMUTE);
    v[METRIC_unpermute_s][at] = slowest(&s, MOE_OP_COMBINE);
    v[METRIC_shared_s][at] = shared > 0 ? shared : NAN;
    v[METRIC_decide_s][at] = m->decide_s > 0 ? m->decide_s : NAN;
    v[METRIC_queue_s][at] = m->queue_s > 0 ? m->queue_s : NAN;
    v[METRIC_padding][at] = m->queue_s > 0 && m->padding >= 0 ? m->padding : NAN;
    v[METRIC_load_s][at] = m->accesses > 0 ? load : NAN;
    v[METRIC_migration_s][at] = migration;
    v[METRIC_collective_s][at] = collective > 0 ? collective : NAN;
    v[METRIC_other_s][at] = other > 0 ? other : NAN;
    v[METRIC_imbalance][at] = per(m->imbalance_sum, m->routing.n_layers);
    routing_figures(m, at);
    v[METRIC_intra_node_bytes][at] = intra;
    v[METRIC_inter_node_bytes][at] = inter;
    v[METRIC_accesses][at] = m->accesses > 0 ? (double)m->accesses : NAN;
    v[METRIC_hit_rate][at] = m->accesses > 0 ? (double)m->hits / (double)m->accesses : NAN;
    v[METRIC_loaded_bytes][at] = m->accesses > 0 ? m->loaded_bytes : NAN;
    v[METRIC_energy_j][at] = joules > 0 ? joules : NAN;
    v[METRIC_j_per_token][at] = joules > 0 && n_tokens > 0 ? joules / n_tokens : NAN;
    free(s.layer_op);
    free(s.load);
    return e->code;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* q-th quantile of n sorted values, linear between neighbours. */
static double quantile(const double *sorted, int n, double q)
{
    double at = q * (n - 1);
    int low = (int)at;
    return low + 1 < n ? sorted[low] + (at - low) * (sorted[low + 1] - sorted[low]) : sorted[low];
}

int metrics_end_step(struct metrics *m, int32_t n, struct err *e)
{
    double *sorted = malloc(sizeof *sorted * ((size_t)n + 1));
    if (!sorted)
        return err_set(e, ERR_MEMORY, "out of memory for metrics");
    m->n_steps -= n;
    for (int i = 0; n > 0 && i < N_METRICS; i++) {
        double *value = m->value[i] + m->n_steps - 1;
        memcpy(sorted, value + 1, sizeof *sorted * (size_t)n);
        qsort(sorted, (size_t)n, sizeof *sorted, by_value);
        *value = quantile(sorted, n, 0.5); /* of all or none NaN */
        if (*value > 0)
            m->spread[i] += (quantile(sorted, n, 0.75) - quantile(sorted, n, 0.25)) / *value;
        m->n_spread += i == 0;
    }
    if (m->n_steps > 1) /* one value, of all steps */
        m->value[METRIC_max_vio_global][m->n_steps - 2] = NAN;
    m->imbalance_sum = m->loaded_bytes = 0;
    m->routing = (struct routing_sums){ 0 };
    m->accesses = m->hits = 0;
    free(sorted);
    return 0;
}

/* What a ratio divides by; N_METRICS for figures that are no ratio of two others. */
static int denominator(int metric)
{
    switch (metric) {
    case METRIC_over_bound: return METRIC_bound_s;
    case METRIC_tokens_per_s: return METRIC_step_s;
    case METRIC_dropped:
    case METRIC_added: return METRIC_routes;
    case METRIC_hit_rate: return METRIC_accesses;
    default: return N_METRICS;
    }
}

static double weight_of(const struct metrics *m, int metric, int32_t step)
{
    if (metric == METRIC_j_per_token) /* tokens, which are no figure of their own */
        return m->value[METRIC_energy_j][step] / m->value[metric][step];
    const int by = denominator(metric);
    return by < N_METRICS ? m->value[by][step] : 1;
}

/* Over the steps to which the figure applies. The mean of a ratio is the ratio of the sums: steps weigh what they
 * divide by. */
static double mean_of(const struct metrics *m, int metric)
{
    double top = 0, bottom = 0;
    for (int32_t s = 0; s < m->n_steps; s++)
        if (isfinite(m->value[metric][s])) {
            const double weight = weight_of(m, metric, s);
            top += m->value[metric][s] * weight;
            bottom += weight;
        }
    return top / bottom;
}

json_t *metrics_json(const struct metrics *m)
{
    json_t *all = json_object();
    double *sorted = malloc(sizeof *sorted * (size_t)(m->n_steps + 1));
    for (int i = 0; sorted && i < N_METRICS; i++) {
        int n = 0;
        for (int32_t s = 0; s < m->n_steps; s++)
            if (isfinite(m->value[i][s]))
                sorted[n++] = m->value[i][s];
        if (n == 0)
            continue;
        qsort(sorted, (size_t)n, sizeof *sorted, by_value);
        json_t *figures = json_pack("{s:f, s:f, s:f, s:f, s:f}", "mean", mean_of(m, i), "p50",
                                    quantile(sorted, n, 0.5), "p99", quantile(sorted, n, 0.99), "min", sorted[0],
                                    "max", sorted[n - 1]);
        if (m->n_spread > 0)
            json_object_set_new(figures, "spread", json_real(m->spread[i] / m->n_spread));
        json_object_set_new(all, metric_info[i].name, figures);
    }
    free(sorted);
    return all;
}
