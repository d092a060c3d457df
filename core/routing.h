/* SPDX-License-Identifier: Apache-2.0
 * routing.h - statistics of who went where: a trace, or routes that were never written to a file.
 *
 * `layer` is a layer's id, or -1 for all of them. Shares are fractions, not per cent. */
#ifndef ROUTING_H
#define ROUTING_H

#include "err.h"
#include "trace.h"

struct routing {
    int64_t n_tokens;
    int32_t n_layers, n_experts, top_k, n_requests;
    int item_bytes;         /* of an expert id: 1 or 2 */
    const void *experts;    /* [tokens][layers][k] */
    const int64_t *offsets; /* [requests + 1] */
};

struct routing routing_of(const struct trace *);

static inline int32_t routing_expert(const struct routing *r, int64_t token, int32_t layer, int32_t slot)
{
    int64_t at = (token * r->n_layers + layer) * r->top_k + slot;
    return r->item_bytes == 1 ? ((const uint8_t *)r->experts)[at] : ((const uint16_t *)r->experts)[at];
}

/* Tokens that went to each expert of a layer: [n_experts]. */
void routing_load(const struct routing *, int32_t layer, int64_t *load);

/* Largest load over mean load, minus 1, averaged over layers and over batches of `segment` consecutive tokens (what
 * is left over at the end is not counted); segment 0: one batch of all tokens. */
int routing_max_vio(const struct routing *, int32_t layer, int64_t segment, double *value, struct err *);

/* Share of a token's experts that the token before it in its request had too. *chance: what it would be if tokens
 * were independent but experts as popular as they are: the mean over layers of sum(f^2)/k, f the share of tokens
 * that go to an expert; k/E if popularity is even. */
int routing_overlap(const struct routing *, int32_t layer, double *value, double *chance, struct err *);

/* How uneven popularity is: the squared coefficient of variation of the experts' loads, averaged over layers. *all:
 * of the whole trace's loads; *within: of each request's own, averaged over requests by their tokens. Requests that
 * prefer different experts make *within larger; so does, by about 1/tokens of it, their shortness. */
int routing_unevenness(const struct routing *, int32_t layer, double *all, double *within, struct err *);

/* Of the tokens at an expert, the share that goes on to that expert's likeliest successor in the next layer, over
 * all routes. *chance: the same with each token followed by another one, half the trace away: the same popularity,
 * the same number of samples, no relation. layer: the first of the pair. */
int routing_affinity(const struct routing *, int32_t layer, double *value, double *chance, struct err *);

/* Next-layer recall: share of a token's experts in layer l+1 that are among the K likeliest given its experts in layer
 * l, by the transition counts of these tokens: candidate f scores the sum over the token's experts e of
 * count(e, f) / tokens at e; ties go to the lower id. *chance: layer l+1 of the token half the trace away, as above. */
int routing_recall(const struct routing *, int32_t layer, double *value, double *chance, struct err *);

/* Independent uniform routing of the same requests, experts and top_k, with n_layers layers; free with
 * routing_free_iid. Offsets are shared with the model. */
int routing_iid(struct routing *, const struct routing *like, int32_t n_layers, uint64_t seed, struct err *);
void routing_free_iid(struct routing *);

#endif
