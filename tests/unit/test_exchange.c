/* SPDX-License-Identifier: Apache-2.0
 * test_exchange.c - exchanges that have given their parts back against the same that have not. */
#include "core_test.h"

#include "exchange.h"

static struct topology *two_nodes(void)
{
    return test_machine("dgx-h100", 2);
}

/* Two exchanges that share links, one of them with SMs, a part at home, one without bytes, and work after them. */
static void fill(struct moe_graph *g)
{
    static const struct moe_part first[] = { { 0, 1, 3e6, 0, NULL, 0 }, { 0, 9, 5e6, 0, NULL, 0 },
                                             { 2, 2, 7e6, 0, NULL, 0 }, { 3, 1, 2e6, 0, NULL, 0 },
                                             { 8, 15, 1e6, 0, NULL, 0 }, { 4, 5, 0, 0, NULL, 0 } };
    static const struct moe_part second[] = { { 0, 9, 4e6, 0, NULL, 0 }, { 8, 0, 6e6, 0, NULL, 0 } };
    struct err e = { 0 };
    int32_t wait = test_compute(g, 3, 0, 20 * US);
    int32_t x = graph_exchange(g, &(struct moe_exchange){ MOE_PAY_HIDDEN, 6, first, .sms = 20 }, &e);
    int32_t y = test_parts(g, 2, second);
    test_after(g, y, wait);
    for (int32_t d = 0; d < 16; d++) {
        int32_t busy = test_compute(g, d, 1, 30 * US), after = test_compute(g, d, 0, 10 * US);
        test_after(g, after, test_arrival(g, x, d));
        test_after(g, after, test_arrival(g, y, d));
        test_after(g, test_compute(g, d, 2, 5 * US), busy);
    }
}

static void without_parts(void **state)
{
    (void)state;
    struct topology *t = two_nodes();
    struct moe_graph kept = { .n_devices = 16 }, given = { .n_devices = 16 };
    struct machine m;
    struct evening v;
    struct err e = { 0 };
    test_ok(evening_open(&v, t, &e), &e);
    fill(&kept);
    fill(&given);
    double took = test_run_graph(t, NET_BOUND, &kept);
    test_ok(machine_open_sim(&m, t, &test_model, PREC_BF16, NET_BOUND, &e), &e);
    test_ok(exchange_reduce(&v, &m, &given, 0, 0, &e), &e);
    assert_int_equal(given.n_parts, 0);
    memset(given.part, 0xff, sizeof *given.part * 8); /* nobody looks there any more */
    test_ok(machine_run(&m, &given, &e), &e);
    assert_true(m.now == took && took > 0);
    for (int32_t i = 0; i < kept.n_tasks; i++) {
        const struct task *x = &kept.task[i], *y = &given.task[i];
        assert_true(x->start == y->start && x->end == y->end);
        if (x->kind != TASK_EXCHANGE)
            continue;
        uint8_t a[16], b[16];
        double intra[2], inter[2];
        exchange_bytes(&kept, t, x, &intra[0], &inter[0]);
        exchange_bytes(&given, t, y, &intra[1], &inter[1]);
        assert_true(intra[0] == intra[1] && inter[0] == inter[1]);
        assert_true(evening_seconds(&v, &kept, x) == evening_seconds(&v, &given, y));
        exchange_sides(&kept, t, x, a);
        exchange_sides(&given, t, y, b);
        assert_memory_equal(a, b, sizeof a);
    }
    double bound[2];
    test_ok(metrics_bound(&kept, t, &bound[0], &e), &e);
    test_ok(metrics_bound(&given, t, &bound[1], &e), &e);
    assert_true(bound[0] == bound[1] && bound[0] > 0);
    machine_close(&m);
    evening_close(&v);
    graph_free(&kept);
    graph_free(&given);
    topology_free(t);
}

/* Of the first exchange: 3e6 + 2e6 + 1e6 within nodes, 5e6 between; what stays at home is neither. */
static void sums(void **state)
{
    (void)state;
    struct topology *t = two_nodes();
    struct moe_graph g = { .n_devices = 16 };
    double intra, inter;
    uint8_t side[16];
    fill(&g);
    exchange_bytes(&g, t, &g.task[1], &intra, &inter);
    assert_true(intra == 6e6 && inter == 5e6);
    exchange_sides(&g, t, &g.task[1], side);
    static const uint8_t expected[16] = {
        [0] = SIDE_NAMED | SIDE_SENDS, [1] = SIDE_NAMED | SIDE_GETS, [2] = SIDE_NAMED,
        [3] = SIDE_NAMED | SIDE_SENDS, [4] = SIDE_NAMED, [5] = SIDE_NAMED,
        [8] = SIDE_NAMED | SIDE_SENDS, [9] = SIDE_NAMED | SIDE_GETS, [15] = SIDE_NAMED | SIDE_GETS,
    };
    assert_memory_equal(side, expected, sizeof side);
    graph_free(&g);
    topology_free(t);
}

/* A machine that did not keep its share of an exchange can not run it; one that needs the parts leaves them. */
static void on_another_machine(void **state)
{
    (void)state;
    struct topology *t = two_nodes();
    struct moe_graph g = { .n_devices = 16 };
    struct machine keeps, other;
    struct evening v;
    struct err e = { 0 };
    test_ok(evening_open(&v, t, &e), &e);
    fill(&g);
    test_ok(machine_open_sim(&other, t, &test_model, PREC_BF16, NET_FLOW, &e), &e);
    test_ok(exchange_reduce(&v, &other, &g, 0, 0, &e), &e);
    assert_int_equal(g.n_parts, 8);
    test_ok(machine_open_sim(&keeps, t, &test_model, PREC_BF16, NET_BOUND, &e), &e);
    test_ok(exchange_reduce(&v, &keeps, &g, 0, 0, &e), &e);
    assert_int_equal(machine_run(&other, &g, &e), ERR_RUN);
    assert_non_null(strstr(e.text, "have been given back"));
    machine_close(&keeps);
    machine_close(&other);
    evening_close(&v);
    graph_free(&g);
    topology_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(sums), cmocka_unit_test(without_parts),
                                        cmocka_unit_test(on_another_machine) };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
