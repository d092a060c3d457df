/* SPDX-License-Identifier: Apache-2.0
 * test_host_quiet.c - which attempt at a repetition counts. */
#include "core_test.h"

#include "host_quiet.h"

#include <math.h>

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

/* A repetition whose attempt i takes from 10 i to 10 i + 2, with made-up probes and steal, on two ranks. */
struct made_up {
    struct moe_graph g;
    double probe[QUIET_ATTEMPTS], stolen[QUIET_ATTEMPTS], other[QUIET_ATTEMPTS]; /* other rank's disturbance */
    int tried, rests;
};

static int try_once(void *self, struct quiet_seen *seen, struct err *e)
{
    struct made_up *m = self;
    const int i = m->tried++;
    assert_true(i < QUIET_ATTEMPTS);
    m->g.task[0].start = 10 * i;
    m->g.task[0].end = m->g.task[1].start = 10 * i + 1;
    m->g.task[1].end = 10 * i + 2;
    *seen = (struct quiet_seen){ 1e-3, m->probe[i], m->stolen[i], 10 * i + 2 };
    return e->code;
}

static void of_both(void *self, double *value, int n)
{
    const struct made_up *m = self;
    assert_int_equal(n, 2);
    value[0] = fmax(value[0], m->other[m->tried - 1]);
}

static void rest(void *self)
{
    ((struct made_up *)self)->rests++;
}

static struct quiet_best repeat(struct made_up *m, int spare, int counts, int tried)
{
    const double quiet = 1e-3;
    struct quiet_trial t = { m, try_once, of_both, rest, &quiet, spare };
    struct quiet_best best = { .disturbance = 0.01 }; /* of the repetition before: must not matter */
    struct err e = { 0 };
    test_compute(&m->g, 0, 0, 5 * US);
    test_compute(&m->g, 0, 0, 5 * US);
    test_ok(quiet_room(&best, &m->g, &e), &e);
    test_ok(quiet_repeat(&best, &t, &m->g, &e), &e);
    assert_int_equal(m->tried, tried);
    assert_int_equal(best.attempts, tried);
    assert_int_equal(m->rests, tried - 1);
    assert_int_equal(t.spare, spare - (tried - 1));
    assert_near(m->g.task[0].start, 10 * counts, 0);
    assert_near(m->g.task[0].end, 10 * counts + 1, 0);
    assert_near(m->g.task[1].start, 10 * counts + 1, 0);
    assert_near(m->g.task[1].end, 10 * counts + 2, 0);
    assert_near(best.ended, 10 * counts + 2, 0);
    free(best.time);
    graph_free(&m->g);
    return best;
}

static void the_least_disturbed_counts(void **state)
{
    (void)state;
    struct quiet_best b = repeat(&(struct made_up){ .g.n_devices = 1, .probe = { 1.3e-3, 1.15e-3, 1.2e-3 } }, 10, 1, 3);
    assert_near(b.disturbance, 0.15, 1e-12);
    assert_near(b.probe_s, 1.075e-3, 1e-12);
    /* Steal alone, with probes that see nothing; the largest share is told. */
    b = repeat(&(struct made_up){ .g.n_devices = 1, .probe = { 1e-3, 1e-3, 1e-3 }, .stolen = { 0.3, 0.4, 0.2 } }, 10, 2,
               3);
    assert_near(b.disturbance, 0.2, 1e-12);
    assert_near(b.stolen, 0.4, 0);
    /* Equals: the first. */
    repeat(&(struct made_up){ .g.n_devices = 1, .probe = { 1.5e-3, 1.5e-3, 1.5e-3 } }, 10, 0, 3);
}

static void a_quiet_attempt_is_the_last(void **state)
{
    (void)state;
    repeat(&(struct made_up){ .g.n_devices = 1, .probe = { 1.1e-3 } }, 10, 0, 1);
    repeat(&(struct made_up){ .g.n_devices = 1, .probe = { 1.3e-3, 1.05e-3 } }, 10, 1, 2);
    repeat(&(struct made_up){ .g.n_devices = 1, .probe = { 1.3e-3 } }, 0, 0, 1);         /* none to spare */
    repeat(&(struct made_up){ .g.n_devices = 1, .probe = { 1.3e-3, 1.2e-3 } }, 1, 1, 2); /* one */
}

/* This rank alone would have stopped after the first, and have taken the last of three. */
static void the_worst_rank_decides(void **state)
{
    (void)state;
    struct quiet_best b = repeat(&(struct made_up){ .g.n_devices = 1, .probe = { 1.02e-3, 1.2e-3, 1.01e-3 },
                                                    .other = { 0.5, 0.15, 0.4 } }, 10, 1, 3);
    assert_near(b.disturbance, 0.2, 1e-12);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(how_disturbed),
        cmocka_unit_test(what_was_stolen),
        cmocka_unit_test(the_least_disturbed_counts),
        cmocka_unit_test(a_quiet_attempt_is_the_last),
        cmocka_unit_test(the_worst_rank_decides),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
