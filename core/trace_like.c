/* SPDX-License-Identifier: Apache-2.0
 *
 * trace_like.c - parameters of synthetic routing that measure as a recorded trace does.
 *
 * Each parameter has a statistic that rises with it: skew the unevenness of popularity within a request, drift how
 * much of that is gone in the mean over requests, stickiness the overlap of consecutive tokens, affinity the
 * concentration of successors; the last two as the part of the way from chance to certainty, so that other numbers of
 * experts can be asked for. They are found by bisection on measured synthetic routing, in this order and three times,
 * since a later one disturbs an earlier one a little.
 */
#include "config.h"

#include "routing.h"

#include <stdlib.h>

/* What is measured: enough for statistics steady to about a per cent, small enough for a second or two in all. */
enum { MOST_LAYERS = 8, MOST_TOKENS = 8192, STEPS = 9, ROUNDS = 3 };

struct statistics {
    double unevenness, drift, overlap, affinity;
};

static double above_chance(double value, double chance)
{
    return chance < 1 ? (value - chance) / (1 - chance) : 0;
}

static int measure(const struct routing *r, struct statistics *s, json_t **raw, struct err *err)
{
    double overlap, chance, affinity = 0, affinity_chance = 0, max_vio, all, within;
    int rc = routing_overlap(r, -1, &overlap, &chance, err);
    if (rc == 0 && r->n_layers > 1)
        rc = routing_affinity(r, -1, &affinity, &affinity_chance, err);
    if (rc == 0)
        rc = routing_unevenness(r, -1, &all, &within, err);
    if (rc == 0)
        rc = routing_max_vio(r, -1, 0, &max_vio, err);
    if (rc < 0)
        return rc;
    s->unevenness = within;
    s->drift = within > 0 ? 1 - all / within : 0;
    s->overlap = above_chance(overlap, chance);
    s->affinity = above_chance(affinity, affinity_chance);
    if (raw)
        *raw = json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "max_vio", max_vio, "unevenness", all,
                         "unevenness_within", within, "overlap", overlap, "overlap_chance", chance, "affinity",
                         affinity, "affinity_chance", affinity_chance, "overlap_above_chance", s->overlap,
                         "affinity_above_chance", s->affinity);
    return 0;
}

struct fit {
    struct trace_synth sample; /* the caller's shape, cut down to what has to be measured */
    struct routing routing;    /* of the sample */
    uint16_t *experts;
    int64_t *offsets;
};

static int open_fit(struct fit *f, const struct trace_synth *p, struct err *err)
{
    f->sample = *p;
    f->sample.n_layers = p->n_layers < MOST_LAYERS ? p->n_layers : MOST_LAYERS;
    if (f->sample.tokens_per_request > MOST_TOKENS)
        f->sample.tokens_per_request = MOST_TOKENS;
    if (f->sample.tokens_per_request < 2 || f->sample.n_requests < 1)
        return err_set(err, ERR_INPUT, "synth: %d requests of %d tokens are too few to be like a trace", p->n_requests,
                       p->tokens_per_request);
    int32_t most = MOST_TOKENS / f->sample.tokens_per_request;
    if (f->sample.n_requests > most)
        f->sample.n_requests = most;
    int64_t n_tokens = (int64_t)f->sample.n_requests * f->sample.tokens_per_request;
    f->experts = malloc((size_t)(n_tokens * f->sample.n_layers * p->top_k) * sizeof *f->experts);
    f->offsets = malloc(((size_t)f->sample.n_requests + 1) * sizeof *f->offsets);
    if (!f->experts || !f->offsets)
        return err_set(err, ERR_MEMORY, "synth: no memory for %d requests", f->sample.n_requests);
    for (int32_t r = 0; r <= f->sample.n_requests; r++)
        f->offsets[r] = (int64_t)r * f->sample.tokens_per_request;
    f->routing = (struct routing){ .n_tokens = n_tokens,
                                   .n_layers = f->sample.n_layers,
                                   .n_experts = p->n_experts,
                                   .top_k = p->top_k,
                                   .n_requests = f->sample.n_requests,
                                   .item_bytes = 2,
                                   .experts = f->experts,
                                   .offsets = f->offsets };
    return 0;
}

static int try_fit(struct fit *f, struct statistics *s, json_t **raw, struct err *err)
{
    int rc = trace_synth_routes(&f->sample, f->experts, err);
    return rc < 0 ? rc : measure(&f->routing, s, raw, err);
}

/* Bisects one parameter, between 0 and max, until its statistic meets the target. */
static int bisect(struct fit *f, double *parameter, double max, const double *statistic, struct statistics *s,
                  double target, struct err *err)
{
    double low = 0, high = max;
    for (int i = 0; i < STEPS; i++) {
        *parameter = (low + high) / 2;
        int rc = try_fit(f, s, NULL, err);
        if (rc < 0)
            return rc;
        if (*statistic < target)
            low = *parameter;
        else
            high = *parameter;
    }
    *parameter = low > 0 ? (low + high) / 2 : 0; /* never reached from below: not there at all */
    return 0;
}

int trace_synth_like(struct trace_synth *p, const struct trace *t, json_t **report, struct err *err)
{
    struct routing recorded = routing_of(t);
    struct statistics target, s;
    struct fit f = { .experts = NULL };
    json_t *wanted = NULL, *reached = NULL;
    int rc = t->n_tokens < 2 ? err_set(err, ERR_INPUT, "%s: too few tokens to measure", t->dir) : 0;
    if (rc == 0)
        rc = measure(&recorded, &target, &wanted, err);
    if (rc == 0)
        rc = open_fit(&f, p, err);
    bool find_drift = p->drift < 0 && f.sample.n_requests > 1 && t->n_requests > 1;
    f.sample.skew = f.sample.stickiness = f.sample.affinity = 0;
    f.sample.drift = p->drift < 0 ? 0 : p->drift;
    for (int round = 0; round < ROUNDS && rc == 0; round++) {
        rc = bisect(&f, &f.sample.skew, 4, &s.unevenness, &s, target.unevenness, err);
        if (rc == 0 && find_drift)
            rc = bisect(&f, &f.sample.drift, 1, &s.drift, &s, target.drift, err);
        if (rc == 0)
            rc = bisect(&f, &f.sample.stickiness, 0.999, &s.overlap, &s, target.overlap, err);
        if (rc == 0 && f.sample.n_layers > 1 && t->n_layers > 1)
            rc = bisect(&f, &f.sample.affinity, 0.999, &s.affinity, &s, target.affinity, err);
    }
    if (rc == 0)
        rc = try_fit(&f, &s, &reached, err);
    if (rc == 0) {
        p->skew = f.sample.skew;
        p->stickiness = f.sample.stickiness;
        p->affinity = f.sample.affinity;
        p->drift = f.sample.drift;
        if (report)
            *report = json_pack("{s:O, s:O}", "target", wanted, "reached", reached);
    }
    json_decref(wanted);
    json_decref(reached);
    free(f.experts);
    free(f.offsets);
    return rc;
}
