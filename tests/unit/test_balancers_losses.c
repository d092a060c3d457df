/* SPDX-License-Identifier: Apache-2.0
 * test_balancers_losses.c - losses of aux-loss-balancer: Megatron-LM's output, closed forms, finite differences. */
#include "policy_test.h"

enum { ROOM = 64 * 8 };

struct batch {
    int32_t n_tokens, n_experts, top_k, n_free;
    float logits[ROOM];
    int32_t label[64];
    bool no_labels, no_logits;
    char failure[512];
};

/* The loss with routes to the top_k largest logits; -1e9 after a failure. */
static double loss_of(struct batch *b, const char *settings, const struct moe_routes *routes, float *d_logits)
{
    struct policy_host host;
    struct policy policy;
    double loss = 0;
    policy_host_open(&host, &(struct policy_shape){ 1, b->n_experts, b->top_k, 1, 1, 0, 1 });
    if (policy_start(&policy, &host, test_plugin("balancer", "aux-loss-balancer"), settings) != MOE_OK)
        fail_msg("%s", host.failure);
    const struct moe_batch batch = { .n_tokens = b->n_tokens,
                                     .n_experts = b->n_experts,
                                     .top_k = b->top_k,
                                     .n_free = b->n_free,
                                     .router_logits = b->no_logits ? NULL : b->logits,
                                     .label = b->no_labels ? NULL : b->label };
    float d[ROOM] = { 0 };
    const int rc = policy.plugin->ops.balancer.loss(policy.state, &batch, NULL, routes, &loss, d, NULL);
    memcpy(b->failure, host.failure, sizeof b->failure);
    if (d_logits != NULL)
        memcpy(d_logits, d, sizeof d);
    policy_stop(&policy);
    policy_host_close(&host);
    return rc < 0 ? -1e9 : loss;
}

static void routes_of(const struct batch *b, struct moe_routes *routes)
{
    policy_routes_init(routes, b->n_tokens);
    for (int32_t t = 0; t < b->n_tokens; t++) {
        int32_t chosen[8];
        moe_top_k(b->logits + t * b->n_experts, b->n_experts, b->top_k, chosen);
        for (int32_t i = 0; i < b->top_k; i++)
            policy_routes_push(routes, t, chosen[i], 1);
    }
}

static double loss_now(struct batch *b, const char *settings)
{
    struct moe_routes routes;
    routes_of(b, &routes);
    const double loss = loss_of(b, settings, &routes, NULL);
    policy_routes_free(&routes);
    return loss;
}

static void near(double is, double expected, double tolerance)
{
    if (!(fabs(is - expected) <= tolerance))
        fail_msg("%.12g, expected %.12g", is, expected);
}

static void megatron_loss(void **state)
{
    (void)state;
    json_t *all = test_shared("oracles/megatron_router.json");
    json_t *c = json_object_get(json_object_get(all, "cases"), "aux_loss"), *probs = json_object_get(c, "probs");
    struct batch b = { .n_tokens = test_int(c, "total"), .n_experts = test_int(c, "E"), .top_k = test_int(c, "topk") };
    char settings[40];
    struct moe_routes routes;
    for (int32_t i = 0; i < b.n_tokens * b.n_experts; i++)
        b.logits[i] = (float)log(test_at(json_array_get(probs, (size_t)(i / b.n_experts)), i % b.n_experts));
    policy_routes_init(&routes, b.n_tokens);
    int32_t given[8] = { 0 }, t = 0; /* any routes with these counts */
    for (int32_t i = 0, e = 0; i < b.n_tokens * b.top_k; i++) {
        while (given[e] == (int32_t)test_at(json_object_get(c, "tokens"), e))
            e++;
        given[e]++;
        t = i / b.top_k;
        policy_routes_push(&routes, t, e, 1);
    }
    snprintf(settings, sizeof settings, "weight=%g", json_number_value(json_object_get(c, "coeff")));
    const double expected = json_number_value(json_object_get(c, "loss"));
    near(loss_of(&b, settings, &routes, NULL), expected, 1e-6 * expected);
    policy_routes_free(&routes);
    json_decref(all);
}

static void closed_forms(void **state)
{
    (void)state;
    struct batch b = { .n_tokens = 4, .n_experts = 4, .top_k = 1 };
    near(loss_now(&b, "kind=switch weight=0.5"), 0.5, 1e-12); /* even gates: 1 */
    near(loss_now(&b, "kind=z weight=1"), log(4) * log(4), 1e-12);
    near(loss_now(&b, "kind=importance weight=1"), 0, 1e-12);
    near(loss_now(&b, "kind=entropy weight=1 floor=2"), 2, 1e-12); /* ln 4 + (2 - ln 4) */
    near(loss_now(&b, "kind=entropy weight=1 floor=1"), log(4), 1e-12);
    for (int32_t t = 0; t < 4; t++)
        b.logits[4 * t] = 60; /* all to expert 0 */
    near(loss_now(&b, "kind=switch weight=1"), 4, 1e-9);
    near(loss_now(&b, "kind=z weight=1"), 3600, 1e-9);
    near(loss_now(&b, "kind=importance weight=1"), 3, 1e-9);
    near(loss_now(&b, "kind=entropy weight=1 floor=2"), 2, 1e-9);
    for (int32_t t = 2; t < 4; t++) { /* one expert for each label: even on the whole, not within a label */
        b.logits[4 * t] = 0;
        b.logits[4 * t + 1] = 60;
        b.label[t] = 7;
    }
    near(loss_now(&b, "kind=entropy weight=1 floor=0.5"), 0, 1e-9);
    near(loss_now(&b, "kind=label weight=1 floor=0.5"), 0.5, 1e-9);
    near(loss_now(&b, "kind=entropy weight=1 floor=1"), 1 - log(2), 1e-9);
}

static void prior(void **state)
{
    (void)state;
    struct batch b = { .n_tokens = 4, .n_experts = 2, .top_k = 1 };
    for (int32_t t = 0; t < 4; t++) /* gates 0.2, 0.4, 0.6, 0.8 are the prior's quantiles: Beta(1, 1) */
        b.logits[2 * t] = logf(0.2f * (float)(t + 1) / (1 - 0.2f * (float)(t + 1)));
    near(loss_now(&b, "kind=dirichlet weight=1"), 0, 1e-12);
    memset(b.logits, 0, sizeof b.logits); /* all 0.5 */
    near(loss_now(&b, "kind=dirichlet weight=1"), 2 * (0.09 + 0.01 + 0.01 + 0.09) / 4, 1e-9);
    b.n_tokens = 1;
    b.logits[0] = logf(0.25f); /* 0.2 and 0.8; Beta(2, 2) is 3 x^2 - 2 x^3 */
    near(loss_now(&b, "kind=dirichlet weight=1 concentration=2"), 2 * 0.396 * 0.396, 1e-7);
    b.n_experts = 3; /* 1/3 each; Beta(1, 2) is 1 - (1 - x)^2 */
    b.logits[0] = 0;
    near(loss_now(&b, "kind=dirichlet weight=1"), 3 * (5.0 / 9 - 0.5) * (5.0 / 9 - 0.5), 1e-12);
}

static void gradients(void **state)
{
    (void)state;
    static const char *const settings[] = { "kind=switch weight=1",
                                            "kind=z weight=1",
                                            "kind=importance weight=1",
                                            "kind=entropy weight=1",
                                            "kind=entropy weight=1 floor=0.1",
                                            "kind=label weight=1",
                                            "kind=dirichlet weight=1",
                                            "kind=dirichlet weight=1 concentration=0.3",
                                            "kind=dirichlet weight=2 concentration=4" };
    const struct moe_env env = { .seed = 8 };
    const float h = 1.0f / 1024; /* exact in what it is added to */
    for (size_t s = 0; s < sizeof settings / sizeof *settings; s++) {
        struct batch b = { .n_tokens = 14, .n_experts = 5, .top_k = 2 };
        float d[ROOM];
        struct moe_routes routes;
        double largest = 0;
        for (int32_t i = 0; i < b.n_tokens * b.n_experts; i++) {
            b.logits[i] = roundf((float)(4 * moe_unit(moe_rand(&env, 0, 0, 0, i)) - 2) * 4096) / 4096;
            b.label[i / b.n_experts] = i / b.n_experts % 3;
        }
        routes_of(&b, &routes);
        loss_of(&b, settings[s], &routes, d);
        for (int32_t i = 0; i < b.n_tokens * b.n_experts; i++) {
            const float x = b.logits[i];
            b.logits[i] = x + h;
            const double up = loss_of(&b, settings[s], &routes, NULL);
            b.logits[i] = x - h;
            const double down = loss_of(&b, settings[s], &routes, NULL);
            b.logits[i] = x;
            if (!(fabs((up - down) / (2 * (double)h) - (double)d[i]) < 2e-6))
                fail_msg("%s: logit %d: gradient %g, difference %g", settings[s], i, (double)d[i],
                         (up - down) / (2 * (double)h));
            largest = fmax(largest, fabs((double)d[i]));
        }
        assert_true(largest > 1e-3);
        policy_routes_free(&routes);
    }
}

static void expect_failure(struct batch *b, const char *settings, const char *text)
{
    assert_true(loss_now(b, settings) == -1e9);
    if (strstr(b->failure, text) == NULL)
        fail_msg("\"%s\", expected \"%s\"", b->failure, text);
}

static void errors(void **state)
{
    (void)state;
    struct batch none = { .n_tokens = 0, .n_experts = 4, .top_k = 1 },
                 b = { .n_tokens = 3, .n_experts = 4, .top_k = 1 };
    near(loss_now(&none, "kind=entropy"), 0, 0);
    b.no_labels = true;
    near(loss_now(&b, "kind=switch weight=1"), 1, 1e-12);
    expect_failure(&b, "kind=label", "kind = label: the workload has no labels");
    b.n_free = 2;
    expect_failure(&b, "kind=z", "2 experts that cost nothing, expected 0");
    b.n_free = 0;
    b.logits[6] = INFINITY;
    expect_failure(&b, "kind=z", "token 1, expert 2: logit inf");
    b.no_logits = true;
    expect_failure(&b, "kind=z", "the workload has no router logits");
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(megatron_loss), cmocka_unit_test(closed_forms),
                                        cmocka_unit_test(prior), cmocka_unit_test(gradients),
                                        cmocka_unit_test(errors) };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
