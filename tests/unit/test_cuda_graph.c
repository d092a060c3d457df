/* SPDX-License-Identifier: Apache-2.0
 * test_cuda_graph.c - steps of machine cuda as graphs, on the stand-ins: captured once, launched for other routes, and
 * every output compared with the reference each time. */
#include "cuda_test.h"

/* Takes the specification; leaves the run open. */
static struct run *run_graphs(json_t *spec, uint64_t seed, struct err *e)
{
    standin_open((enum standin_order)(seed % 3), seed, -1);
    struct run *r = cuda_open_run_as(spec, NULL, true, e);
    if (!e->code)
        run_go(r);
    return r;
}

static void close_run(struct run *r, json_t *spec)
{
    test_close_run(r);
    json_decref(spec);
    assert_int_equal(standin_left(), 0);
}

/* Whatever the layout, the outputs are right; every repetition but the first is a launch. */
static void outputs(void **state)
{
    static const char *const dispatch[] = { "flat", "node-dedup" };
    static const struct shape shapes[] = { { 2, 1, 1, 4, 2, 3, 3 }, { 3, 1, 2, 6, 2, 4, 3 }, { 2, 2, 3, 8, 3, 4, 3 },
                                           { 2, 4, 2, 16, 4, 3, 3 } };
    uint64_t seed = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int d = 0; d < 2; d++)
            for (int order = 0; order < 3; order++) {
                struct err e = { 0 };
                json_t *spec = cuda_spec(*state, shapes[s]);
                test_policy(spec, "dispatch", dispatch[d]);
                struct run *r = run_graphs(spec, seed++, &e);
                test_ok(e.code, &e);
                assert_true(r->machine.max_error > 1e-9 && r->machine.max_error < 1e-5);
                assert_int_equal(r->machine.graphs_launched, 2 * shapes[s].steps);
                assert_in_range(r->machine.graphs_captured, 1, shapes[s].steps);
                close_run(r, spec);
            }
}

/* Two devices with two of four experts each; four tokens on each device, each to the expert of its step. */
static const uint8_t expert_of[4][8] = { { 0, 0, 1, 2, 0, 2, 2, 3 }, { 1, 1, 0, 3, 1, 3, 3, 2 },
                                         { 0, 0, 0, 0, 0, 2, 2, 2 }, { 0, 0, 1, 2, 0, 2, 2, 3 } };

static int route_by_step(void *self, const struct moe_batch *b, const struct moe_bias *bias, struct moe_routes *out,
                         struct moe_cost *own)
{
    const struct moe_env *env = ((struct test_env *)self)->env;
    (void)bias, (void)own;
    const int rc = env->host->routes_reserve(env, out, b->n_tokens);
    for (int32_t t = 0; rc == 0 && t < b->n_tokens; t++) {
        out->expert[t] = expert_of[b->step][t];
        out->weight[t] = 1;
        out->offset[t + 1] = t + 1;
    }
    out->n = b->n_tokens;
    return rc;
}

static const struct moe_plugin by_step = TEST_POLICY(MOE_ROUTER, "by-step", .state_size = sizeof(struct test_env),
                                                     .init = test_keep_env, .ops.router = { .route = route_by_step });

/* The second step has other routes with the same counts per place and pair: the same graph. The third has one expert
 * with more rows than any before: another. The fourth is as the first, but sizes stay: the graph of the third. */
static void other_routes(void **state)
{
    struct err e = { 0 };
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 1, 4, 1, 4, 4 });
    standin_open(STANDIN_ANY, 2, -1);
    struct run *r = cuda_open_run_as(spec, NULL, true, &e);
    test_swap_policy(r, &r->router, &by_step);
    test_ok(run_go(r), &e);
    assert_int_equal(r->machine.graphs_launched, 8);
    assert_int_equal(r->machine.graphs_captured, 2);
    assert_true(r->machine.max_error > 1e-9 && r->machine.max_error < 1e-5);
    /* Each device has places for 3 rows, padded to 4, and for 1: 2 of 10 mean nothing. From the third step on the first
     * device's has 5, padded to 8: 6 of 14. */
    static const double padding[4] = { 0.2, 0.2, 6 / 14.0, 6 / 14.0 };
    for (int s = 0; s < 4; s++) {
        assert_near(test_metric(r, METRIC_padding, s), padding[s], 1e-12);
        assert_true(test_metric(r, METRIC_queue_s, s) > 0);
    }
    close_run(r, spec);
}

/* Numbers of rows grow by less than an eighth. */
static void sizes(void **state)
{
    (void)state;
    static const double expected[][2] = { { 0, 0 }, { 1, 1 }, { 2, 2 }, { 3, 4 }, { 5, 8 }, { 8, 8 }, { 9, 9 },
                                          { 15, 15 }, { 17, 18 }, { 33, 36 }, { 100, 104 }, { 128, 128 },
                                          { 129, 144 } };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        assert_near(cuda_pad_round(expected[i][0]), expected[i][1], 0);
    for (double n = 9; n < 5000; n++)
        assert_true(cuda_pad_round(n) >= n && cuda_pad_round(n) < 1.125 * n);
}

enum { MANY = 20, TOKENS = 64 };

/* How many tokens go to expert 0 in each step, all of them sizes that are not padded, and more than ever before; the
 * others go to the other device. */
static const int32_t busiest[MANY] = { 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48 };

static int route_growing(void *self, const struct moe_batch *b, const struct moe_bias *bias, struct moe_routes *out,
                         struct moe_cost *own)
{
    const struct moe_env *env = ((struct test_env *)self)->env;
    (void)bias, (void)own;
    const int rc = env->host->routes_reserve(env, out, b->n_tokens);
    for (int32_t t = 0; rc == 0 && t < b->n_tokens; t++) {
        out->expert[t] = t < busiest[b->step] ? 0 : 2;
        out->weight[t] = 1;
        out->offset[t + 1] = t + 1;
    }
    out->n = b->n_tokens;
    return rc;
}

static const struct moe_plugin growing = TEST_POLICY(MOE_ROUTER, "growing", .state_size = sizeof(struct test_env),
                                                     .init = test_keep_env, .ops.router = { .route = route_growing });

/* Twenty steps of growing sizes are as many graphs: sixteen are kept, those launched last, and all are given back. */
static void not_too_many(void **state)
{
    struct err e = { 0 };
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 1, 4, 1, TOKENS / 2, MANY });
    standin_open(STANDIN_ANY, 1, -1);
    struct run *r = cuda_open_run_as(spec, NULL, true, &e);
    test_swap_policy(r, &r->router, &growing);
    test_ok(run_go(r), &e);
    const struct cuda_graphs *k = &((struct cuda *)r->machine.priv)->graphs;
    assert_int_equal(r->machine.graphs_captured, MANY);
    assert_int_equal(r->machine.graphs_launched, 2 * MANY);
    assert_int_equal(k->n, CUDA_GRAPHS);
    for (int32_t i = 0; i < k->n; i++) /* counted in launches */
        assert_in_range(k->kept[i].used, 2 * (MANY - CUDA_GRAPHS) + 1, 2 * MANY);
    assert_true(r->machine.max_error > 1e-9 && r->machine.max_error < 1e-5);
    close_run(r, spec);
}

/* What a step queues once it is captured: the launch, and nothing else. */
static void one_launch(void **state)
{
    struct err e = { 0 };
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 2, 4, 2, 3, 1 });
    struct run *r = run_graphs(spec, 0, &e);
    test_ok(e.code, &e);
    const char *calls = standin_calls(), *last = strstr(calls, "launch");
    assert_non_null(last);
    while (strstr(last + 1, "launch"))
        last = strstr(last + 1, "launch");
    assert_null(strchr(strchr(last, '\n') + 1, '\n'));
    close_run(r, spec);
}

static void lost_waits(void **state)
{
    struct err e = { 0 };
    int found = 0;
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 1, 4, 2, 4, 1 });
    test_set(spec, NULL, "repetitions", json_integer(1));
    struct run *r = run_graphs(json_incref(spec), 0, &e);
    test_ok(e.code, &e);
    const int64_t n = standin_waits();
    close_run(r, json_incref(spec));
    json_decref(spec);
    for (int64_t i = 0; i < n; i++) {
        e = (struct err){ 0 };
        standin_open(STANDIN_FIRST, 0, i);
        r = cuda_open_run_as(json_incref(spec), NULL, true, &e);
        found += run_go(r) < 0;
        test_close_run(r);
        json_decref(spec);
    }
    assert_true(found > n / 4);
    json_decref(spec);
}

static void refused(void **state)
{
    struct err e = { 0 };
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 2, 8, 2, 4, 2 });
    test_policy(spec, "offload", "lru");
    test_set(spec, NULL, "cache", json_real(0.5));
    struct run *r = run_graphs(spec, 0, &e);
    assert_int_equal(e.code, ERR_INPUT);
    if (!strstr(e.text, "cuda_graphs: experts are loaded"))
        fail_msg("%s", e.text);
    close_run(r, spec);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes),
        cmocka_unit_test_setup_teardown(outputs, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(other_routes, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(not_too_many, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(one_launch, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(lost_waits, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(refused, scratch_make, scratch_remove),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
