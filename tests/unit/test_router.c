/* SPDX-License-Identifier: Apache-2.0
 * test_router.c - routers softmax-top-k and replay against Megatron's outputs and hand-made cases. */
#include "router_test.h"

static void check_megatron(const json_t *c)
{
    const json_t *logits = json_object_get(c, "logits"), *probs = json_object_get(c, "probs");
    int32_t n_tokens = (int32_t)json_array_size(logits);
    int32_t n_experts = (int32_t)json_array_size(json_array_get(logits, 0));
    bool renormalise = json_is_true(json_object_get(c, "renormalise"));
    struct run r;
    run_open(&r, "softmax-top-k", renormalise ? "renormalise=true" : "renormalise=false", n_tokens, n_experts,
             test_int(c, "top_k"));
    for (int32_t i = 0; i < n_tokens * n_experts; i++)
        r.logits[i] = (float)test_at(json_array_get(logits, (size_t)(i / n_experts)), i % n_experts);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n, n_tokens * test_int(c, "top_k"));
    for (int32_t t = 0; t < n_tokens; t++)
        for (int32_t e = 0; e < n_experts; e++)
            assert_true(fabs((double)weight_of(&r.routes, t, e) - test_at(json_array_get(probs, (size_t)t), e)) < 1e-6);
    run_close(&r);
}

static void megatron_softmax(void **state)
{
    (void)state;
    json_t *all = test_golden("router.json"), *c;
    size_t i, n = 0;
    json_array_foreach(json_object_get(all, "cases"), i, c) {
        if (strcmp(test_text(c, "kind"), "softmax") == 0) {
            check_megatron(c);
            n++;
        }
    }
    assert_int_equal(n, 2);
    json_decref(all);
}

static uint64_t draw(int64_t i)
{
    const struct moe_env env = {.seed = 11};
    return moe_rand(&env, 0, 0, 0, i);
}

/* In vectors and by insertion: the same, with few different values or many, and with all of them equal. */
static void top_k_by_either_way(void **state)
{
    (void)state;
    float x[400];
    int32_t fast[16], plain[16];
    for (int64_t trial = 0; trial < 20000; trial++) {
        int32_t n = 64 + (int32_t)(draw(2 * trial) % 300), k = 1 + (int32_t)(draw(2 * trial + 1) % 16);
        uint64_t values = trial % 4 == 0 ? 1 : trial % 4 == 1 ? 7 : 100000;
        for (int32_t i = 0; i < n; i++)
            x[i] = (float)(draw(trial * 1000 + i) % values) - 50;
        moe_top_k(x, n, k, fast);
        moe_top_k_plain(x, n, k, plain);
        assert_memory_equal(fast, plain, (size_t)k * sizeof *fast);
        for (int32_t i = 1; i < k; i++)
            assert_true(x[fast[i - 1]] > x[fast[i]] || (x[fast[i - 1]] == x[fast[i]] && fast[i - 1] < fast[i]));
    }
}

static int largest_first(const void *left, const void *right)
{
    const float a = *(const float *)left, b = *(const float *)right;
    return (a < b) - (a > b);
}

/* Against sorting: short lists and long, few different values, enormous ones, tiny ones, and infinite ones. */
static void kth_largest(void **state)
{
    (void)state;
    static float x[3000], sorted[3000];
    for (int64_t trial = 0; trial < 1000; trial++) {
        const int64_t n = 1 + (int64_t)(draw(2 * trial) % 3000), k = 1 + (int64_t)(draw(2 * trial + 1) % (uint64_t)n);
        for (int64_t i = 0; i < n; i++) {
            const double u = moe_unit(draw(trial * 5000 + i));
            x[i] = trial % 5 == 0   ? (float)u
                   : trial % 5 == 1 ? (float)(int)(u * 4)
                   : trial % 5 == 2 ? (float)((u - 0.5) * 6e38)
                   : trial % 5 == 3 ? (float)(u * 1e-42)
                   : i % 3          ? -INFINITY
                                    : (float)u;
        }
        memcpy(sorted, x, sizeof sorted);
        qsort(sorted, (size_t)n, sizeof *sorted, largest_first);
        const float found = moe_kth_largest(x, n, k);
        assert_memory_equal(&found, &sorted[k - 1], sizeof found);
    }
}

/* Within 1e-6 of what doubles give, whatever the length; equal logits have equal probabilities. */
static void softmax_to_the_last_digits(void **state)
{
    (void)state;
    float x[70], y[70];
    for (int32_t n = 1; n <= 70; n++) {
        double sum = 0;
        for (int32_t i = 0; i < n; i++) {
            x[i] = (float)(8 * moe_unit(draw(n * 100 + i / 2)) - 4);
            sum += exp(x[i]);
        }
        moe_softmax(x, n, y);
        for (int32_t i = 0; i < n; i++)
            assert_true(fabs(y[i] / (exp(x[i]) / sum) - 1) < 1e-6 && (i % 2 == 0 || y[i] == y[i - 1]));
    }
    x[0] = 0;
    x[1] = -200;
    moe_softmax(x, 2, y);
    assert_true(y[0] == 1 && y[1] == 0);
}

static void equal_logits_go_to_the_lower_ids(void **state)
{
    (void)state;
    struct run r;
    run_open(&r, "softmax-top-k", NULL, 1, 6, 3);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int32_t i = 0; i < 3; i++) {
        assert_int_equal(r.routes.expert[i], i);
        assert_true(fabsf(r.routes.weight[i] - 1 / 3.0f) < 1e-6f);
    }
    run_close(&r);
}

/* A bias chooses, the score weighs: probabilities .1 .2 .3 .4, expert 0 pushed up and 3 scaled down. */
static void bias_selects_but_does_not_weigh(void **state)
{
    (void)state;
    float add[4] = {1, 0, 0, 0}, scale[4] = {1, 1, 1, 0.25f};
    struct run r;
    run_open(&r, "softmax-top-k", "renormalise=false", 1, 4, 2);
    for (int32_t e = 0; e < 4; e++)
        r.logits[e] = logf(0.1f * (float)(e + 1));
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    assert_int_equal(r.routes.expert[0], 0);
    assert_int_equal(r.routes.expert[1], 2);
    assert_true(fabsf(r.routes.weight[0] - 0.1f) < 1e-6f);
    assert_true(fabsf(r.routes.weight[1] - 0.3f) < 1e-6f);
    run_close(&r);
}

/* Scores that underflow to 0 and are chosen all the same share alike instead of giving 0 / 0. */
static void forced_choices_without_score(void **state)
{
    (void)state;
    float add[4] = {0, 1, 1, 0}, scale[4] = {0, 0, 0, 0};
    struct run r;
    run_open(&r, "softmax-top-k", NULL, 1, 4, 2);
    r.logits[0] = 1000;
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    assert_true(r.routes.weight[0] == 0.5f && r.routes.weight[1] == 0.5f);
    run_close(&r);
}

static void top_k_of_its_own(void **state)
{
    (void)state;
    struct run r;
    run_open(&r, "softmax-top-k", "top_k=1", 3, 4, 2);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n, 3);
    assert_true(r.routes.weight[2] == 1);
    run_close(&r);
    run_open(&r, "softmax-top-k", "top_k=5", 3, 4, 2);
    assert_int_equal(run_route(&r, NULL), MOE_EINVAL);
    assert_string_equal(r.host.failure, "layer 0: top_k = 5 of 4 experts");
    run_close(&r);
}

static void replay_repeats(void **state)
{
    (void)state;
    struct moe_routes recorded;
    struct moe_cost own = {0, 0, 0};
    struct run r;
    run_open(&r, "replay", NULL, 3, 8, 2);
    policy_routes_init(&recorded, 3);
    policy_routes_push(&recorded, 0, 5, 0.7f);
    policy_routes_push(&recorded, 0, 1, 0.3f);
    policy_routes_push(&recorded, 2, 7, 1); /* token 1 has none */
    r.batch.recorded = &recorded;
    const struct moe_router_ops *ops = &r.policy.plugin->ops.router;
    assert_int_equal(ops->route(r.policy.state, &r.batch, NULL, &r.routes, &own), MOE_OK);
    assert_int_equal(r.routes.n, 3);
    assert_memory_equal(r.routes.offset, recorded.offset, 4 * sizeof *recorded.offset);
    assert_memory_equal(r.routes.expert, recorded.expert, 3 * sizeof *recorded.expert);
    assert_memory_equal(r.routes.weight, recorded.weight, 3 * sizeof *recorded.weight);
    recorded.form = MOE_SLOTS;
    assert_int_equal(ops->route(r.policy.state, &r.batch, NULL, &r.routes, &own), MOE_EUNSUPPORTED);
    policy_routes_free(&recorded);
    run_close(&r);
}

/* exp(1) and exp(2) over their sum, whatever was recorded; an expert alone weighs 1. */
static void replay_with_weights_of_the_gate(void **state)
{
    (void)state;
    struct moe_routes recorded;
    struct moe_cost own = {0, 0, 0};
    struct run r;
    float logits[3 * 8] = {0};
    run_open(&r, "routing-replay", NULL, 3, 8, 2);
    policy_routes_init(&recorded, 3);
    policy_routes_push(&recorded, 0, 5, 0.7f);
    policy_routes_push(&recorded, 0, 1, 0.3f);
    policy_routes_push(&recorded, 2, 7, 0.25f);
    logits[5] = 1;
    logits[1] = 2;
    logits[3] = 9; /* not recorded */
    r.batch.recorded = &recorded;
    r.batch.router_logits = logits;
    const struct moe_router_ops *ops = &r.policy.plugin->ops.router;
    assert_int_equal(ops->route(r.policy.state, &r.batch, NULL, &r.routes, &own), MOE_OK);
    assert_memory_equal(r.routes.offset, recorded.offset, 4 * sizeof *recorded.offset);
    assert_memory_equal(r.routes.expert, recorded.expert, 3 * sizeof *recorded.expert);
    assert_true(fabsf(r.routes.weight[0] - 0.26894143f) < 1e-6f && fabsf(r.routes.weight[1] - 0.7310586f) < 1e-6f);
    assert_true(r.routes.weight[2] == 1 && own.flops == 12);
    logits[2 * 8 + 7] = NAN;
    assert_int_equal(ops->route(r.policy.state, &r.batch, NULL, &r.routes, &own), MOE_EINVAL);
    assert_string_equal(r.host.failure, "layer 0: token 2: expert 7 was recorded and has no finite logit");
    policy_routes_free(&recorded);
    run_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(megatron_softmax),
        cmocka_unit_test(top_k_by_either_way),
        cmocka_unit_test(kth_largest),
        cmocka_unit_test(softmax_to_the_last_digits),
        cmocka_unit_test(equal_logits_go_to_the_lower_ids),
        cmocka_unit_test(bias_selects_but_does_not_weigh),
        cmocka_unit_test(forced_choices_without_score),
        cmocka_unit_test(top_k_of_its_own),
        cmocka_unit_test(replay_repeats),
        cmocka_unit_test(replay_with_weights_of_the_gate),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
