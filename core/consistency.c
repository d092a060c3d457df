/* SPDX-License-Identifier: Apache-2.0
 *
 * consistency.c - SRP and SCH, and what `moelab eval metric` answers.
 *
 * Source: arXiv 2505.16056; conforms with the authors' repository ljcleo/moe-lrc (tests/unit/test_consistency.c).
 */
#include "config.h"

#include "consistency.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static int no_memory(struct err *err)
{
    return err_set(err, ERR_MEMORY, "no memory for routing metrics");
}

/* ---- SRP ---- */

/* For a threshold a: M = activations in windows with at least a of them, Pd = m for each such window (what one
 * predicts by putting the expert into the set), A = all activations; F1 = 2M / (Pd + A). */
struct srp srp_of_histogram(const double *hist, int32_t m)
{
    struct srp best = { 0, 0, 0 };
    double all = 0, hits = 0, predicted = 0;
    for (int32_t f = 0; f <= m; f++)
        all += hist[f] * f;
    for (int32_t a = m; a >= 1; a--) {
        hits += hist[a] * a;
        predicted += hist[a] * m;
        double f1 = predicted + all > 0 ? 2 * hits / (predicted + all) : 0;
        if (f1 >= best.f1 && f1 > 0)
            best = (struct srp){ f1, a, predicted / all };
    }
    return best;
}

int srp_count(const struct routing *r, int32_t layer, int32_t m, double *hist, double *per_expert, struct err *err)
{
    int32_t *active = malloc((size_t)r->n_experts * sizeof *active); /* in the window that ends at token t */
    if (!active)
        return no_memory(err);
    for (int32_t q = 0; q < r->n_requests; q++) {
        memset(active, 0, (size_t)r->n_experts * sizeof *active);
        for (int64_t t = r->offsets[q]; t < r->offsets[q + 1]; t++) {
            for (int32_t i = 0; i < r->top_k; i++)
                active[routing_expert(r, t, layer, i)]++;
            int64_t left = t - m; /* the token that has just left the window */
            for (int32_t i = 0; left >= r->offsets[q] && i < r->top_k; i++)
                active[routing_expert(r, left, layer, i)]--;
            if (left + 1 < r->offsets[q])
                continue;
            for (int32_t e = 0; e < r->n_experts; e++) {
                hist[active[e]]++;
                if (per_expert)
                    per_expert[(int64_t)e * (m + 1) + active[e]]++;
            }
        }
    }
    free(active);
    return 0;
}

double srp_floor(int32_t top_k, int32_t n_experts, int32_t m)
{
    double p = (double)top_k / n_experts, floor = 0, hits = 0, share = 0;
    for (int32_t f = m; f >= 1; f--) { /* as above, with binomial probabilities for counts */
        double log_p =
            lgamma(m + 1.0) - lgamma(f + 1.0) - lgamma(m - f + 1.0) + f * log(p) + (m > f ? (m - f) * log1p(-p) : 0);
        hits += f * exp(log_p);
        share += exp(log_p);
        floor = fmax(floor, 2 * hits / (m * share + m * p));
    }
    return floor;
}

/* ---- SCH ---- */

/* One pass serves all cache sizes (Mattson's stack): the first c entries of the stack are what a cache with room for
 * c holds. Reference x, found at depth d, goes to the top; the entry it displaces sinks, exchanging places with every
 * entry of lower priority on its way, until the place that x left is filled. Only `depth` entries are kept: what
 * sinks below is of no concern to smaller caches.
 *
 * As in the source: all ids of a token look at the cache as the token before left it; a first touch is a hit for
 * every cache that still has a free place. */
struct stack {
    int32_t depth, n, n_touched;
    int32_t *object;    /* [depth] */
    int32_t *place;     /* [objects] in the stack, or -1 */
    uint8_t *touched;   /* [objects] */
    uint64_t *priority; /* [objects] uses in the window << 40 | time of the last use */
    uint64_t now;
};
#define ONE_USE (UINT64_C(1) << 40)

static void stack_reference(struct stack *s, int32_t x)
{
    int32_t d = s->place[x];
    if (d < 0)
        d = s->n < s->depth ? s->n++ : s->depth;
    if (d > 0) {
        int32_t sinking = s->object[0];
        uint64_t its = s->priority[sinking];
        for (int32_t i = 1; i < d; i++) {
            int32_t y = s->object[i];
            if (s->priority[y] < its) {
                s->object[i] = sinking;
                s->place[sinking] = i;
                sinking = y;
                its = s->priority[y];
            }
        }
        s->place[sinking] = d < s->depth ? d : -1;
        if (d < s->depth)
            s->object[d] = sinking;
    }
    s->object[0] = x;
    s->place[x] = 0;
    /* One use of the window is spent. */
    s->priority[x] = ((s->priority[x] / ONE_USE - 1) * ONE_USE) | ++s->now;
}

/* The objects of a token: (layer - first) * E + expert. */
static int32_t object_of(const struct routing *r, int64_t token, int32_t first, int64_t i)
{
    int32_t l = (int32_t)(i / r->top_k);
    return l * r->n_experts + routing_expert(r, token, first + l, (int32_t)(i % r->top_k));
}

static void sch_request(const struct routing *r, int32_t q, int32_t first, int64_t width, int32_t m, struct stack *s,
                        int64_t *hits)
{
    int64_t begin = r->offsets[q], end = r->offsets[q + 1];
    for (int64_t t = begin; t < end && t < begin + m; t++)
        for (int64_t i = 0; i < width; i++)
            s->priority[object_of(r, t, first, i)] += ONE_USE;
    for (int64_t t = begin; t < end; t++) {
        for (int64_t i = 0; i < width; i++) {
            int32_t x = object_of(r, t, first, i);
            int32_t at = s->touched[x] ? s->place[x] : s->n_touched++;
            s->touched[x] = 1;
            if (at >= 0 && at < s->depth)
                hits[at]++;
        }
        for (int64_t i = 0; i < width; i++)
            stack_reference(s, object_of(r, t, first, i));
        for (int64_t i = 0; t + m < end && i < width; i++)
            s->priority[object_of(r, t + m, first, i)] += ONE_USE;
    }
}

int sch_curve(const struct routing *r, int32_t layer, int32_t m, int32_t depth, double *rate, struct err *err)
{
    int32_t first = layer < 0 ? 0 : layer;
    int64_t n_layers = layer < 0 ? r->n_layers : 1, n_objects = n_layers * r->n_experts, width = n_layers * r->top_k;
    struct stack s = { .depth = depth };
    int64_t *hits = calloc((size_t)depth, sizeof *hits), sum = 0;
    s.object = malloc((size_t)depth * sizeof *s.object);
    s.place = malloc((size_t)n_objects * sizeof *s.place);
    s.touched = malloc((size_t)n_objects);
    s.priority = malloc((size_t)n_objects * sizeof *s.priority);
    int rc = hits && s.object && s.place && s.touched && s.priority ? 0 : no_memory(err);
    for (int32_t q = 0; rc == 0 && q < r->n_requests; q++) { /* every request starts with an empty cache */
        memset(s.place, 0xff, (size_t)n_objects * sizeof *s.place);
        memset(s.touched, 0, (size_t)n_objects);
        memset(s.priority, 0, (size_t)n_objects * sizeof *s.priority);
        s.n = s.n_touched = 0;
        s.now = 0;
        sch_request(r, q, first, width, m, &s, hits);
    }
    for (int32_t c = 0; rc == 0 && c < depth; c++) {
        sum += hits[c];
        rate[c] = r->n_tokens ? (double)sum / ((double)r->n_tokens * (double)width) : 0;
    }
    free(hits);
    free(s.object);
    free(s.place);
    free(s.touched);
    free(s.priority);
    return rc;
}
