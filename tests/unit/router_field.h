/* SPDX-License-Identifier: Apache-2.0
 * router_field.h - what tests of the field's routers share: opening, refusals, who goes where. */
#ifndef ROUTER_FIELD_H
#define ROUTER_FIELD_H

#include "router_test.h"

static inline void open_one(struct run *r, const char *router, const char *settings, const struct moe_tensor *tensor,
                            int32_t n_tensors, int32_t n_tokens, int32_t n_experts, int32_t k)
{
    run_open_with(r, router, settings, tensor, n_tensors, &(struct policy_shape){2, n_experts, k, 1, 1, 0, 1},
                  n_tokens);
}

static inline void near_to(double a, double b)
{
    if (!(fabs(a - b) <= 2e-6 * fmax(1, fabs(b))))
        fail_msg("%.9g, expected %.9g", a, b);
}

static inline void says(const struct policy_host *host, const char *part)
{
    if (strstr(host->failure, part) == NULL)
        fail_msg("\"%s\" does not say \"%s\"", host->failure, part);
}

/* Routes, is refused with these words, and ends. */
static inline void refuse(struct run *r, const char *part)
{
    assert_int_equal(run_route(r, NULL), MOE_EINVAL);
    says(&r->host, part);
    run_close(r);
}

/* Is refused when it is opened. */
static inline void refuse_open(const char *router, const char *settings, const struct moe_tensor *tensor,
                               int32_t n_tensors, const char *part)
{
    struct policy_host host;
    struct policy policy;
    policy_host_open(&host, &(struct policy_shape){2, 4, 1, 1, 1, 0, 1});
    host.tensor = tensor;
    host.n_tensors = n_tensors;
    assert_int_equal(policy_start(&policy, &host, test_plugin("router", router), settings), MOE_EINVAL);
    says(&host, part);
    policy_stop(&policy);
    policy_host_close(&host);
}

/* Token t goes to these k experts, in this order. */
static inline void goes_to(const struct run *r, int32_t t, int32_t k, const int32_t *expert)
{
    assert_int_equal(r->routes.offset[t + 1] - r->routes.offset[t], k);
    for (int32_t i = 0; i < k; i++)
        assert_int_equal(r->routes.expert[r->routes.offset[t] + i], expert[i]);
}
#define GOES_TO(r, t, ...)                                                                                            \
    goes_to(r, t, (int32_t)(sizeof(int32_t[]){__VA_ARGS__} / sizeof(int32_t)), (const int32_t[]){__VA_ARGS__})

static inline void draw_logits(struct run *r, int64_t n)
{
    const struct moe_env env = {.seed = 5};
    for (int64_t i = 0; i < n; i++)
        r->logits[i] = (float)(4 * moe_unit(moe_rand(&env, 0, 0, 0, i)) - 2);
}

#endif
