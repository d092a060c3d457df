/* SPDX-License-Identifier: Apache-2.0
 * workload.h - which tokens enter the model at each step, and everything recorded about them. */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include "err.h"
#include "gate.h"
#include "moelab.h"
#include "statistics.h"
#include "trace.h"

/* Tokens come from streams. decode: batch_per_device streams per device, one token each per step (continuous
 * batching: a stream that ends its request takes the next one). prefill: one stream per device, tokens_per_device
 * tokens per step. Requests are split: a share is profiled (what placements may know), the rest is played.
 * gate: tokens_per_device tokens per step from a drifting mixture, and logits of a gate that is trained (gate.h); a
 * trace is optional, no request is played. */
struct workload {
    struct trace trace;
    struct gate *gate;              /* NULL: routing is recorded */
    int32_t top_k;                  /* of the gate's model */
    enum moe_phase phase;
    int32_t n_devices, n_steps;
    int32_t n_streams, per_stream;  /* tokens of a step: n_streams * per_stream */
    int32_t layer_repeat;           /* layers of the model that play one recorded layer */
    double profile;                 /* share of requests profiled; 0: profile what is played */
    bool recompute;                 /* train: activations are not kept, but computed once more */
    bool shard_optimizer;           /* train: copies of a weight share its optimiser's state (ZeRO-1) */
    double gradient_bytes, optimizer_bytes; /* train: of one weight; master copy and moments */
    int32_t context;                /* tokens of context that attention sees, at least */
    int32_t *played, n_played;      /* requests, in playing order */
    int32_t *profiled, n_profiled;
    struct stream { int32_t at; int64_t token; } *stream; /* index into played; next token of the trace */

    int32_t n_tokens;               /* of the current step */
    int64_t *row;                   /* [T] token of the trace */
    int32_t *device, *token_id, *previous_token_id, *position, *request, *label; /* [T] */
    float *importance;              /* [T] */
    float *logits, *previous_logits, *hidden; /* [T][E], [T][E], [T][H]; allocated when a policy needs them */
    struct moe_routes recorded;
    int32_t room_recorded;
};

/* `spec` is the scenario's workload table; `who` starts messages. Checks the trace against the model. */
int workload_open(struct workload *, const json_t *spec, const struct moe_model *, int32_t n_devices, uint64_t seed,
                  const char *who, struct err *);
void workload_close(struct workload *);
/* The MOE_NEEDS_* that this workload cannot give, out of `needs`, as text ("router logits"), or NULL. */
const char *workload_lacks(const struct workload *, uint32_t needs);

/* Picks the tokens of the next step. Steps are numbered by the caller. */
void workload_step(struct workload *);
/* Starts again from the first step (same tokens in the same order). */
void workload_rewind(struct workload *, uint64_t seed);
/* Fills a batch for one layer of the current step: arrays stay valid until the next call. */
int workload_batch(struct workload *, int32_t step, int32_t layer, uint32_t needs, struct moe_batch *, struct err *);

/* What every kind of workload reads of its table; messages name workload.KEY. */
int workload_read_int(const json_t *spec, const char *key, int64_t def, int64_t min, int64_t max, int64_t *out,
                      const char *who, struct err *);
/* The same of a workload with a gate: workload_gate.c. */
int workload_gate_open(struct workload *, const json_t *spec, const struct moe_model *, uint64_t seed, const char *who,
                       struct err *);
void workload_gate_step(struct workload *);
void workload_gate_batch(struct workload *, int32_t layer, struct moe_batch *);
const char *workload_gate_lacks(uint32_t needs);

/* Adds the profiled requests, as recorded; of a gate that knows nothing yet, one token to each expert. Returns
 * the number of tokens counted. */
int64_t workload_profile(const struct workload *, struct statistics *);

#endif
