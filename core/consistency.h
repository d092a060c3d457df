/* SPDX-License-Identifier: Apache-2.0
 * consistency.h - how consistent routing is from token to token and layer to layer; see doc/traces.md.
 *
 * SRP and SCH: "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models",
 * arXiv 2505.16056. */
#ifndef CONSISTENCY_H
#define CONSISTENCY_H

#include "routing.h"

/* Segment routing performance: the best F1 at foretelling the experts of m consecutive tokens by one fixed set. */
struct srp {
    double f1;
    int32_t threshold;  /* activations in the segment from which an expert belongs to the set */
    double size_ratio;  /* experts in the set over experts active */
};
/* hist[f]: pairs (window of m tokens, expert) with f activations, f = 0..m. */
struct srp srp_of_histogram(const double *hist, int32_t m);
/* Adds the windows of one layer, those within a request, to hist [m+1]; per_expert: [E][m+1] or NULL. */
int srp_count(const struct routing *, int32_t layer, int32_t m, double *hist, double *per_expert, struct err *);
/* What independent uniform routing gives: f is binomial(m, k/E). */
double srp_floor(int32_t top_k, int32_t n_experts, int32_t m);

/* Segment cache hit rate: a cache that knows the next m tokens keeps the experts that they use most. rate[c-1]: its
 * hit rate with room for c experts, c = 1..depth; with layer -1 the experts of all layers share one cache. */
int sch_curve(const struct routing *, int32_t layer, int32_t m, int32_t depth, double *rate, struct err *);

/* metric: srp, sch, overlap, max-vio, affinity or recall. options: an object with layer, segment and capacity, all
 * optional, or NULL. Returns {"metric", "value", "floor", ...}, or NULL with the error set. */
json_t *consistency_eval(const char *metric, const struct trace *, json_t *options, struct err *);
/* The metrics' names and one line on each, for listings; ends with a NULL name. */
/* 0 if there is a metric of this name, else an error with the nearest one. */
int consistency_check(const char *metric, struct err *);
struct consistency_metric { const char *name, *summary; };
const struct consistency_metric *consistency_metrics(void);

#endif
