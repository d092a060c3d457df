/* SPDX-License-Identifier: Apache-2.0
 * test_sharing.c - kernels that share a device, by hand. Times in seconds, as large as they please. */
#include "core_test.h"
#include "sharing.h"

enum { STREAMS = 4 };

static struct sharing *open_on(const struct topology *t)
{
    struct sharing *k = sharing_open(t, STREAMS);
    assert_non_null(k);
    return k;
}

static double start(struct sharing *k, double now, int32_t stream, double seconds, double arithmetic, double memory)
{
    int n;
    const struct kernel_cost cost = { seconds, arithmetic, memory, 0 };
    const struct kernel_end *end = sharing_start(k, now, 0, stream, &cost, &n);
    for (int i = 0; i < n; i++)
        if (end[i].slot == stream)
            return end[i].time;
    fail_msg("the kernel on stream %d has no end", stream);
    return 0;
}

/* The end of another stream that a change tells; NAN if it stays. */
static double end_of(const struct kernel_end *end, int n, int32_t stream)
{
    for (int i = 0; i < n; i++)
        if (end[i].slot == stream)
            return end[i].time;
    return NAN;
}

static void alone_and_beside(void **state)
{
    struct sharing *k = open_on(*state);
    const struct kernel_end *end;
    int n;
    assert_near(start(k, 0, 0, 10, 10, 2), 10, 0);
    assert_near(start(k, 0, 1, 4, 0, 2), 4, 0); /* arithmetic of one, memory of the other: 1 and 0.7 at most */
    assert_true(sharing_finish(k, 4, 1, &end, &n));
    assert_int_equal(n, 0); /* nobody's pace has changed */
    assert_false(sharing_finish(k, 9, 0, &end, &n));
    assert_true(sharing_finish(k, 10, 0, &end, &n));
    sharing_close(k);
}

/* 10 s of pure memory; at 4 the same again: 6 s are left of the one, at half pace until 16; the other has then done 6
 * of 10, and ends at 20. */
static void halves(void **state)
{
    struct sharing *k = open_on(*state);
    const struct kernel_end *end;
    int n;
    start(k, 0, 0, 10, 0, 10);
    end = sharing_start(k, 4, 0, 1, &(struct kernel_cost){ 10, 0, 10, 0 }, &n);
    assert_int_equal(n, 2);
    assert_near(end_of(end, n, 0), 16, 1e-12);
    assert_near(end_of(end, n, 1), 24, 1e-12);
    assert_false(sharing_finish(k, 10, 0, &end, &n)); /* stale */
    assert_true(sharing_finish(k, 16, 0, &end, &n));
    assert_near(end_of(end, n, 1), 20, 1e-12);
    assert_false(sharing_finish(k, 24, 1, &end, &n));
    assert_true(sharing_finish(k, 20, 1, &end, &n));
    sharing_close(k);
}

/* 33 of 132 SMs are taken from 2 s on and given back after 4 s: arithmetic runs at 3/4 meanwhile, memory as before. */
static void exchanges_take_sms(void **state)
{
    struct sharing *k = open_on(*state);
    const struct kernel_end *end;
    int n;
    start(k, 0, 0, 10, 10, 0);
    end = sharing_take(k, 2, 0, 33, &n);
    assert_near(end_of(end, n, 0), 2 + 8 / 0.75, 1e-12);
    end = sharing_take(k, 6, 0, -33, &n);
    assert_near(end_of(end, n, 0), 11, 1e-12); /* 2 + 3 of 10 are done at 6 */
    sharing_reset(k);
    start(k, 0, 0, 10, 2, 10);
    end = sharing_take(k, 2, 0, 33, &n);
    assert_int_equal(n, 0);
    sharing_close(k);
}

static int open_star(void **state)
{
    *state = test_machine("star-50GBps", 2);
    return 0;
}

static int close_topology(void **state)
{
    topology_free(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(alone_and_beside),
        cmocka_unit_test(halves),
        cmocka_unit_test(exchanges_take_sms),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, open_star, close_topology);
}
