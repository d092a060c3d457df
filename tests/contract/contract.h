/* SPDX-License-Identifier: Apache-2.0
 * contract.h - what every policy of a kind has to do, whatever its rule: shared parts of the contract suite. */
#ifndef CONTRACT_H
#define CONTRACT_H

#include "../unit/policy_test.h"

/* One row of the suite; the test's state is the plugin. */
struct contract_check {
    const char *name;
    void (*run)(void **state);
};
/* By kind, each ending with a NULL name. */
extern const struct contract_check contract_router[], contract_balancer[], contract_placement[], contract_dispatch[],
    contract_offload[];

/* Sizes that a policy has to live with; n_tokens may be 0. */
struct contract_size {
    int32_t n_tokens, n_layers, n_experts, top_k, n_devices, n_nodes;
};
extern const struct contract_size contract_sizes[];
extern const int contract_n_sizes;

/* Starts the plugin with its defaults under a fresh host, with tensors of the declared shapes if it needs any (letters
 * that no model fixes are 16, but P x Q = E; H is 64). */
void contract_start(struct policy *, struct policy_host *, const struct moe_plugin *, const struct contract_size *,
                    int64_t cache_objects);
void contract_stop(struct policy *);

/* A batch with every field that a workload can have. What a token carries depends on its request and position only,
 * not on who else is in the batch. */
struct contract_batch {
    struct moe_batch batch;
    struct moe_routes recorded, previous;
    int32_t *token_id, *position, *request, *device, *label;
    float *logits, *hidden, *importance, *previous_logits, *scores; /* scores: softmax of the logits */
};
/* Tokens are dealt out over n_requests requests and all devices; only_request >= 0 leaves the others out. */
void contract_batch_make(struct contract_batch *, const struct contract_size *, int32_t step, int32_t layer,
                         int32_t n_requests, int32_t only_request);
void contract_batch_free(struct contract_batch *);

/* Experts unique per token and in range, offsets rising from 0 to n, weights finite. */
void contract_check_routes(const struct moe_routes *, int32_t n_tokens, int32_t n_experts);

/* Everything a policy decided, to compare two runs byte by byte. */
struct contract_notes {
    unsigned char *bytes;
    size_t n, room;
};
void contract_note(struct contract_notes *, const void *, size_t bytes);
void contract_note_routes(struct contract_notes *, const struct moe_routes *);
void contract_same(struct contract_notes *, struct contract_notes *); /* fails if they differ; frees both */

#endif
