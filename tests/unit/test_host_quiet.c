/* SPDX-License-Identifier: Apache-2.0
 * test_host_quiet.c - which attempt at a repetition counts. */
#include "core_test.h"

#include "host_quiet.h"

static void how_disturbed(void **state)
{
    (void)state;
    assert_near(quiet_disturbance(1e-3, 1.3e-3, 1e-3, 0), 0.3, 1e-12);
    assert_near(quiet_disturbance(1.2e-3, 1e-3, 1e-3, 0.05), 0.25, 1e-12);
    assert_near(quiet_disturbance(0, 0, 0, 0.05), 0.05, 1e-12); /* no probes */
    assert_near(quiet_disturbance(0.9e-3, 0.9e-3, 1e-3, 0), 0, 0);
    assert_true(quiet_disturbance(1.11e-3, 1e-3, 1e-3, 0) <= QUIET_ENOUGH);
    assert_true(quiet_disturbance(1.11e-3, 1e-3, 1e-3, 0.02) > QUIET_ENOUGH);
}

static void what_was_stolen(void **state)
{
    (void)state;
    assert_near(quiet_stolen_of("cpu  1 2 3 4 5 6 7 800 9 10\ncpu0 1\n", 100), 8, 0);
    assert_true(quiet_stolen_of("cpu  1 2 3 4\n", 100) < 0); /* kernels before 2.6.11 */
    assert_true(quiet_stolen_of("", 100) < 0);
    assert_near(quiet_share(8, 8.5, 1, 2), 0.25, 1e-12);
    assert_near(quiet_share(-1, -1, 1, 2), 0, 0);
    assert_near(quiet_share(8, 8, 1, 2), 0, 0);
}

static void attempts(void **state)
{
    (void)state;
    static const double disturbance[3] = { 0.3, 0.15, 0.2 };
    struct moe_graph g = { .n_devices = 1 };
    struct quiet_best best = { 0 };
    struct err e = { 0 };
    test_compute(&g, 0, 0, 5 * US);
    test_compute(&g, 0, 0, 5 * US);
    for (int i = 0; i < 3; i++) {
        g.task[0].start = 10 * i;
        g.task[0].end = g.task[1].start = 10 * i + 1;
        g.task[1].end = 10 * i + 2;
        test_ok(quiet_offer(&best, i, disturbance[i], &g, &e), &e);
    }
    assert_near(best.disturbance, 0.15, 0);
    quiet_take(&best, &g);
    assert_near(g.task[0].start, 10, 0);
    assert_near(g.task[0].end, 11, 0);
    assert_near(g.task[1].start, 11, 0);
    assert_near(g.task[1].end, 12, 0);
    /* The first attempt of the next repetition counts until a better one comes, whatever was before. */
    g.task[1].end = 42;
    test_ok(quiet_offer(&best, 0, 0.9, &g, &e), &e);
    g.task[1].end = 0;
    quiet_take(&best, &g);
    assert_near(g.task[1].end, 42, 0);
    assert_near(best.disturbance, 0.9, 0);
    free(best.time);
    graph_free(&g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(how_disturbed),
        cmocka_unit_test(what_was_stolen),
        cmocka_unit_test(attempts),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
