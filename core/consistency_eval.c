/* SPDX-License-Identifier: Apache-2.0
 *
 * consistency_eval.c - metrics on a trace by name, each with the floor that unrelated routing would reach.
 *
 * Floors are closed forms where there is one (srp, overlap), the trace itself with its relations cut (affinity,
 * recall), or the same metric on independent uniform routing of the same shape, drawn with fixed seeds (sch, max-vio).
 */
#include "config.h"

#include "consistency.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct options {
    int32_t layer;    /* -1: all */
    int32_t segment;  /* 0: not given */
    int64_t capacity; /* 0: not given */
};

/* Enough independent layers for a floor that does not depend on the draw in its third digit. */
enum { DRAWN_LAYERS = 32 };

static int read_options(const json_t *given, const struct routing *r, const char *metric, struct options *o,
                        struct err *err)
{
    static const char *const names[] = { "layer", "segment", "capacity" };
    const char *key;
    json_t *value;
    *o = (struct options){ -1, 0, 0 };
    int32_t n_layers = strcmp(metric, "affinity") && strcmp(metric, "recall") ? r->n_layers : r->n_layers - 1;
    json_object_foreach((json_t *)(uintptr_t)given, key, value)
    {
        bool layer = !strcmp(key, names[0]), segment = !strcmp(key, names[1]), capacity = !strcmp(key, names[2]);
        if (!layer && !segment && !capacity) {
            const char *near = err_nearest(key, names, 3);
            return err_set(err, ERR_INPUT, "metric %s: unknown option \"%s\"%s%s", metric, key,
                           near ? "; did you mean " : ", expected layer, segment or capacity", near ? near : "");
        }
        if (!json_is_integer(value))
            return err_set(err, ERR_INPUT, "metric %s: option \"%s\" is not an integer", metric, key);
        int64_t v = json_integer_value(value), min = layer ? 0 : 1;
        int64_t max = layer ? n_layers - 1 : segment ? 1 << 20 : INT32_MAX;
        if (v < min || v > max)
            return err_set(err, ERR_INPUT, "metric %s: option \"%s\" is %" PRId64 ", expected %" PRId64 "..%" PRId64,
                           metric, key, v, min, max);
        if (layer)
            o->layer = (int32_t)v;
        else if (segment)
            o->segment = (int32_t)v;
        else
            o->capacity = v;
    }
    return 0;
}

static int32_t layers_used(const struct routing *r, const struct options *o)
{
    return o->layer < 0 ? r->n_layers : 1;
}

static int eval_srp(const struct routing *r, const struct options *o, json_t *out, struct err *err)
{
    int32_t m = o->segment ? o->segment : 16, rc = 0;
    bool single = o->layer >= 0;
    double *hist = calloc((size_t)m + 1, sizeof *hist);
    double *part = calloc(((size_t)m + 1) * (size_t)(single ? r->n_experts : 1), sizeof *part);
    json_t *parts = json_array();
    int64_t n_windows = 0;
    for (int32_t q = 0; q < r->n_requests; q++)
        if (r->offsets[q + 1] - r->offsets[q] >= m)
            n_windows += r->offsets[q + 1] - r->offsets[q] - m + 1;
    if (!hist || !part || !parts)
        rc = err_set(err, ERR_MEMORY, "no memory for %d-token segments", m);
    else if (n_windows == 0)
        rc = err_set(err, ERR_INPUT, "metric srp: no request has %d tokens; take a shorter segment", m);
    for (int32_t l = single ? o->layer : 0; rc == 0 && l < (single ? o->layer + 1 : r->n_layers); l++) {
        if (single) {
            rc = srp_count(r, l, m, hist, part, err);
            continue;
        }
        memset(part, 0, ((size_t)m + 1) * sizeof *part);
        rc = srp_count(r, l, m, part, NULL, err);
        for (int32_t f = 0; f <= m; f++)
            hist[f] += part[f];
        json_array_append_new(parts, json_real(srp_of_histogram(part, m).f1));
    }
    for (int32_t e = 0; rc == 0 && single && e < r->n_experts; e++)
        json_array_append_new(parts, json_real(srp_of_histogram(part + (int64_t)e * (m + 1), m).f1));
    if (rc == 0) {
        struct srp srp = srp_of_histogram(hist, m);
        json_object_set_new(out, "value", json_real(srp.f1));
        json_object_set_new(out, "floor", json_real(srp_floor(r->top_k, r->n_experts, m)));
        json_object_set_new(out, "threshold", json_integer(srp.threshold));
        json_object_set_new(out, "size_ratio", json_real(srp.size_ratio));
        json_object_set_new(out, "segment", json_integer(m));
        json_object_set_new(out, "windows", json_integer(n_windows));
        json_object_set(out, single ? "per_expert" : "per_layer", parts);
    }
    json_decref(parts);
    free(hist);
    free(part);
    return rc;
}

static int eval_sch(const struct routing *r, const struct options *o, json_t *out, struct err *err)
{
    int32_t m = o->segment ? o->segment : 16, n_layers = layers_used(r, o), n_draws = 0, rc;
    int64_t n_objects = (int64_t)n_layers * r->n_experts;
    int64_t capacity = o->capacity ? o->capacity : 2 * (int64_t)n_layers * r->top_k; /* the source's advice */
    int32_t depth = (int32_t)(capacity < n_objects ? capacity : n_objects);
    double *rate = malloc((size_t)depth * sizeof *rate), value, floor = 0;
    json_t *curve = json_array();
    rc = rate && curve ? sch_curve(r, o->layer, m, depth, rate, err) : err_set(err, ERR_MEMORY, "no memory for sch");
    for (int32_t c = 0; rc == 0 && c < depth; c++)
        json_array_append_new(curve, json_real(rate[c]));
    value = rc == 0 ? rate[depth - 1] : 0;
    do {
        struct routing iid;
        if (rc < 0 || (rc = routing_iid(&iid, r, n_layers, (uint64_t)n_draws, err)) < 0)
            break;
        rc = sch_curve(&iid, n_layers > 1 ? -1 : 0, m, depth, rate, err);
        floor += rate[depth - 1];
        routing_free_iid(&iid);
    } while (++n_draws * n_layers < DRAWN_LAYERS);
    if (rc == 0) {
        json_object_set_new(out, "value", json_real(value));
        json_object_set_new(out, "floor", json_real(floor / n_draws));
        json_object_set_new(out, "segment", json_integer(m));
        json_object_set_new(out, "capacity", json_integer(capacity));
        json_object_set(out, "curve", curve);
    }
    json_decref(curve);
    free(rate);
    return rc;
}

static int eval_max_vio(const struct routing *r, const struct options *o, json_t *out, struct err *err)
{
    int32_t n_layers = layers_used(r, o), n_draws = 0;
    double value, floor = 0, one = 0;
    if (o->segment > r->n_tokens)
        return err_set(err, ERR_INPUT, "metric max-vio: the trace has %" PRId64 " tokens, fewer than a segment of %d",
                       r->n_tokens, o->segment);
    int rc = routing_max_vio(r, o->layer, o->segment, &value, err);
    do {
        struct routing iid;
        if (rc < 0 || (rc = routing_iid(&iid, r, n_layers, (uint64_t)n_draws, err)) < 0)
            break;
        rc = routing_max_vio(&iid, -1, o->segment, &one, err);
        floor += one;
        routing_free_iid(&iid);
    } while (++n_draws * n_layers < DRAWN_LAYERS);
    if (rc < 0)
        return rc;
    json_object_set_new(out, "value", json_real(value));
    json_object_set_new(out, "floor", json_real(floor / n_draws));
    if (o->segment)
        json_object_set_new(out, "segment", json_integer(o->segment));
    return 0;
}

/* Metrics that have a value and a floor per layer, and their mean. */
static int eval_layers(const struct routing *r, const struct options *o, json_t *out, struct err *err,
                       int (*metric)(const struct routing *, int32_t, double *, double *, struct err *),
                       int32_t n_layers)
{
    double value, floor, one, unused;
    int rc = metric(r, o->layer, &value, &floor, err);
    if (rc < 0)
        return rc;
    json_object_set_new(out, "value", json_real(value));
    json_object_set_new(out, "floor", json_real(floor));
    json_object_set_new(out, "uniform", json_real((double)r->top_k / r->n_experts));
    if (o->layer >= 0)
        return 0;
    json_t *layers = json_array();
    for (int32_t l = 0; l < n_layers && rc == 0; l++) {
        rc = metric(r, l, &one, &unused, err);
        json_array_append_new(layers, json_real(one));
    }
    json_object_set_new(out, "per_layer", layers);
    return rc;
}

static int eval_overlap(const struct routing *r, const struct options *o, json_t *out, struct err *err)
{
    return eval_layers(r, o, out, err, routing_overlap, r->n_layers);
}

static int eval_affinity(const struct routing *r, const struct options *o, json_t *out, struct err *err)
{
    if (r->n_layers < 2)
        return err_set(err, ERR_INPUT, "metric affinity: the trace has one layer, expected two or more");
    return eval_layers(r, o, out, err, routing_affinity, r->n_layers - 1);
}

static int eval_recall(const struct routing *r, const struct options *o, json_t *out, struct err *err)
{
    if (r->n_layers < 2)
        return err_set(err, ERR_INPUT, "metric recall: the trace has one layer, expected two or more");
    return eval_layers(r, o, out, err, routing_recall, r->n_layers - 1);
}

static const struct consistency_metric metrics[] = {
    { "srp", "segment routing performance: best F1 of one fixed expert set over m consecutive tokens" },
    { "sch", "segment cache hit rate: hits of a cache that knows the next m tokens" },
    { "overlap", "share of experts that consecutive tokens have in common" },
    { "max-vio", "largest expert load over the mean, minus 1" },
    { "affinity", "share of routes that go on to their expert's likeliest successor in the next layer" },
    { "recall", "share of experts that are among the K likeliest given those of the layer before" },
    { NULL, NULL },
};
static int (*const evals[])(const struct routing *, const struct options *, json_t *, struct err *) = {
    eval_srp, eval_sch, eval_overlap, eval_max_vio, eval_affinity, eval_recall,
};

const struct consistency_metric *consistency_metrics(void)
{
    return metrics;
}

int consistency_check(const char *metric, struct err *err)
{
    const char *names[sizeof metrics / sizeof *metrics];
    int n = 0;
    for (; metrics[n].name; n++)
        names[n] = metrics[n].name;
    for (int i = 0; i < n; i++)
        if (!strcmp(metric, names[i]))
            return 0;
    const char *near = err_nearest(metric, names, n);
    return err_set(err, ERR_INPUT, "unknown metric \"%s\"%s%s%s", metric,
                   near ? "; did you mean \"" : ", expected srp, sch, overlap, max-vio, affinity or recall",
                   near ? near : "", near ? "\"?" : "");
}

json_t *consistency_eval(const char *metric, const struct trace *t, json_t *options, struct err *err)
{
    struct routing r = routing_of(t);
    struct options o;
    for (size_t i = 0; metrics[i].name; i++) {
        if (strcmp(metric, metrics[i].name))
            continue;
        if (read_options(options, &r, metric, &o, err) < 0)
            return NULL;
        if (r.n_tokens == 0) {
            err_set(err, ERR_INPUT, "%s: no tokens to measure %s on", t->dir, metric);
            return NULL;
        }
        json_t *out = json_pack("{s:s}", "metric", metric);
        if (!out) {
            err_set(err, ERR_MEMORY, "no memory for metric %s", metric);
            return NULL;
        }
        if (evals[i](&r, &o, out, err) < 0) {
            json_decref(out);
            return NULL;
        }
        if (o.layer >= 0)
            json_object_set_new(out, "layer", json_integer(o.layer));
        return out;
    }
    consistency_check(metric, err);
    return NULL;
}
