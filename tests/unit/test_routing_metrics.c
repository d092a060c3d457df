/* SPDX-License-Identifier: Apache-2.0
 * test_routing_metrics.c - figures of loads and choices against closed forms. */
#include "core_test.h"

#include "routing_metrics.h"

static void loads_in_closed_form(void **state)
{
    (void)state;
    const int64_t even[4] = { 5, 5, 5, 5 }, one[4] = { 0, 0, 12, 0 }, rising[4] = { 4, 2, 1, 3 }, none[4] = { 0 };
    assert_near(load_cv(even, 4), 0, 0);
    assert_near(load_gini(even, 4), 0, 1e-15);
    assert_near(load_entropy(even, 4), 1, 1e-15);
    assert_near(load_cv(one, 4), sqrt(3), 1e-15); /* sqrt(n - 1) */
    assert_near(load_gini(one, 4), 0.75, 1e-15);  /* 1 - 1 / n */
    assert_near(load_entropy(one, 4), 0, 1e-15);
    assert_near(load_cv(rising, 4), sqrt(1.25) / 2.5, 1e-15);
    assert_near(load_gini(rising, 4), 0.25, 1e-15); /* (n^2 - 1) / (3 n) / (n + 1) */
    assert_near(load_entropy(rising, 4), -(0.4 * log(0.4) + 0.2 * log(0.2) + 0.1 * log(0.1) + 0.3 * log(0.3)) / log(4),
                1e-15);
    assert_near(load_cv(none, 4), 0, 0);
    assert_near(load_gini(none, 4), 0, 0);
    assert_near(load_entropy(none, 4), 1, 0);
    assert_near(load_gini(one + 2, 1), 0, 0);
    assert_near(load_entropy(one + 2, 1), 1, 0);
}

/* Two steps of one layer: {6, 2} and {2, 6} have MaxVio 0.5 each, none together, and half the tokens moved. */
static void batches_and_all_of_them(void **state)
{
    (void)state;
    const int64_t load[2][2] = { { 6, 2 }, { 2, 6 } };
    struct routing_metrics m;
    struct err e = { 0 };
    test_ok(routing_metrics_open(&m, 1, 2, &e), &e);
    for (int step = 0; step < 2; step++) {
        struct routing_sums sums = { 0 };
        routing_layer(&m, 0, 2, load[step], &sums);
        routing_step(&m, 1, &sums);
        assert_near(sums.max_vio, 0.5, 1e-15);
        assert_near(sums.max_vio_global, step == 0 ? 0.5 : 0, 1e-15);
        assert_int_equal(sums.n_fluctuation, step);
        assert_near(sums.fluctuation, step == 0 ? 0 : 0.5, 1e-15);
    }
    routing_metrics_forget(&m);
    struct routing_sums sums = { 0 };
    routing_layer(&m, 0, 2, load[1], &sums);
    routing_step(&m, 1, &sums);
    assert_int_equal(sums.n_fluctuation, 0);
    assert_near(sums.max_vio_global, 0.5, 1e-15);
    routing_metrics_close(&m);
}

/* Token 0 keeps one of two and gets another, token 1 loses all, token 2 gets one more. */
static void what_balancers_change(void **state)
{
    (void)state;
    static const float logits[12] = { 3, 2, 1, 0, 0, 1, 2, 3, 1, 0, 0, 0 };
    const struct moe_batch b = { .n_tokens = 3, .n_experts = 4, .top_k = 2, .router_logits = logits };
    int64_t chosen_offset[4] = { 0, 2, 3, 4 }, left_offset[4] = { 0, 2, 2, 4 };
    int32_t chosen_expert[4] = { 0, 2, 3, 1 }, left_expert[4] = { 2, 3, 1, 0 };
    const struct moe_routes chosen = { .n_tokens = 3, .n = 4, .offset = chosen_offset, .expert = chosen_expert };
    const struct moe_routes left = { .n_tokens = 3, .n = 4, .offset = left_offset, .expert = left_expert };
    struct routing_metrics m;
    struct routing_sums sums = { 0 };
    struct err e = { 0 };
    test_ok(routing_metrics_open(&m, 1, 4, &e), &e);
    test_ok(routing_chosen(&m, &b, &chosen, true, &sums, &e), &e);
    assert_true(sums.chosen == 4 && sums.compared == 4);
    assert_int_equal(sums.agreed, 3); /* the highest are {0, 1}, {3, 2}, {0, 1}: 2 is not token 0's */
    routing_rewritten(&m, &left, &sums);
    assert_int_equal(sums.dropped, 2);
    assert_int_equal(sums.added, 2);
    test_ok(routing_chosen(&m, &b, &chosen, false, &sums, &e), &e);
    routing_rewritten(&m, &left, &sums);
    assert_int_equal(sums.dropped, 2); /* nobody rewrites: not looked at */
    routing_metrics_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(loads_in_closed_form),
        cmocka_unit_test(batches_and_all_of_them),
        cmocka_unit_test(what_balancers_change),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
