/* SPDX-License-Identifier: Apache-2.0
 * router_test.h - one router, one batch: what tests of routers share. */
#ifndef ROUTER_TEST_H
#define ROUTER_TEST_H

#include "policy_test.h"

/* A router started with settings, and a batch of one layer to route; n_hidden, hidden, token_id and so on are the
 * test's to set. scores has E' columns. */
struct run {
    struct policy_host host;
    struct policy policy;
    struct moe_batch batch;
    float *logits, *scores;
    struct moe_routes routes;
    struct moe_cost own; /* of the last routing */
};

/* tensor: [n_tensors], which settings name by their place: "table=#0". */
static inline void run_open_with(struct run *r, const char *router, const char *settings,
                                 const struct moe_tensor *tensor, int32_t n_tensors, const struct policy_shape *shape,
                                 int32_t n_tokens)
{
    memset(r, 0, sizeof *r);
    policy_host_open(&r->host, shape);
    r->host.tensor = tensor;
    r->host.n_tensors = n_tensors;
    if (policy_start(&r->policy, &r->host, test_plugin("router", router), settings) != MOE_OK)
        fail_msg("%s: %s", router, r->host.failure);
    const struct moe_router_ops *ops = &r->policy.plugin->ops.router;
    int32_t n_experts = shape->n_experts, n_free = ops->n_free != NULL ? ops->n_free(r->policy.state, 0) : 0;
    r->logits = calloc((size_t)n_tokens * (size_t)n_experts + 1, sizeof *r->logits);
    r->scores = calloc((size_t)n_tokens * (size_t)(n_experts + n_free) + 1, sizeof *r->scores);
    r->batch = (struct moe_batch){.n_tokens = n_tokens, .n_experts = n_experts, .top_k = shape->top_k,
                                  .n_free = n_free, .router_logits = r->logits};
    policy_routes_init(&r->routes, n_tokens);
}

static inline void run_open(struct run *r, const char *router, const char *settings, int32_t n_tokens,
                            int32_t n_experts, int32_t top_k)
{
    run_open_with(r, router, settings, NULL, 0, &(struct policy_shape){1, n_experts, top_k, 1, 1, 0, 1}, n_tokens);
}

/* route, or score and select, with the bias (or none); their result. */
static inline int run_route(struct run *r, const struct moe_bias *bias)
{
    const struct moe_router_ops *ops = &r->policy.plugin->ops.router;
    int rc;
    r->own = (struct moe_cost){0, 0, 0};
    if (ops->select == NULL) {
        rc = ops->route(r->policy.state, &r->batch, bias, &r->routes, &r->own);
    } else if ((rc = ops->score(r->policy.state, &r->batch, r->scores, &r->own)) == MOE_OK) {
        policy_host_end_hook(&r->host);
        rc = ops->select(r->policy.state, &r->batch, r->scores, bias, &r->routes);
    }
    policy_host_end_hook(&r->host);
    return rc;
}

static inline void run_close(struct run *r)
{
    policy_routes_free(&r->routes);
    policy_stop(&r->policy);
    policy_host_close(&r->host);
    free(r->logits);
    free(r->scores);
}

/* The weight that a token gives to an expert; 0 if it is not routed there. */
static inline float weight_of(const struct moe_routes *r, int32_t token, int32_t expert)
{
    float weight = 0;
    for (int64_t i = r->offset[token]; i < r->offset[token + 1]; i++)
        weight += r->expert[i] == expert ? r->weight[i] : 0;
    return weight;
}

#endif
