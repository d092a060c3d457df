/* SPDX-License-Identifier: Apache-2.0
 * routing_metrics.h - how evenly a step's tokens are spread over experts, and what balancers made of the choices. */
#ifndef ROUTING_METRICS_H
#define ROUTING_METRICS_H

#include "err.h"
#include "metrics.h"

/* What outlives a layer. */
struct routing_metrics {
    int32_t n_layers, n_experts;
    double *total;          /* [L][E] tokens of all steps */
    double *share;          /* [L][E] of the step before; negative: there was none */
    int64_t *offset;        /* the router's choice, where a balancer may change it */
    int32_t *expert;
    int32_t *highest;       /* [K] */
    int64_t room_offset, room_expert, room_highest;
    bool kept;
};

int routing_metrics_open(struct routing_metrics *, int32_t n_layers, int32_t n_experts, struct err *);
void routing_metrics_close(struct routing_metrics *);
/* What the router chose; keep: balancers may rewrite it. */
int routing_chosen(struct routing_metrics *, const struct moe_batch *, const struct moe_routes *, bool keep,
                   struct routing_sums *, struct err *);
/* ... and what was left. */
void routing_rewritten(struct routing_metrics *, const struct moe_routes *, struct routing_sums *);
/* load: [n_experts] tokens. */
void routing_layer(struct routing_metrics *, int32_t layer, int32_t n_experts, const int64_t *load,
                   struct routing_sums *);
/* After the last layer. */
void routing_step(struct routing_metrics *, int32_t n_layers, struct routing_sums *);
/* Warm-up is over: nothing has been counted. */
void routing_metrics_forget(struct routing_metrics *);

/* Of n loads: standard deviation / mean; Gini coefficient; entropy of shares / ln n. 0, 0, 1 where there are none. */
double load_cv(const int64_t *load, int32_t n);
double load_gini(const int64_t *load, int32_t n);
double load_entropy(const int64_t *load, int32_t n);

#endif
