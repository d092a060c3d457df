/* SPDX-License-Identifier: Apache-2.0
 * test_exchange.c - exchanges whose parts are not kept against the same whose are. */
#include "core_test.h"

#include "exchange.h"

static struct topology *two_nodes(void)
{
    return test_machine("dgx-h100", 2);
}

/* Two exchanges that share links, one of them with SMs, a part at home, one without bytes, and work after them. */
static int32_t put(struct moe_graph *g, struct tally *tally, const struct moe_exchange *x)
{
    struct err e = { 0 };
    int32_t id = tally ? tally_exchange(tally, g, x, &e) : graph_exchange(g, x, &e);
    assert_true(id >= 0);
    return id;
}

static void fill(struct moe_graph *g, struct tally *tally)
{
    static const struct moe_part first[] = { { 0, 1, 3e6, 0, NULL, 0 }, { 0, 9, 5e6, 0, NULL, 0 },
                                             { 2, 2, 7e6, 0, NULL, 0 }, { 3, 1, 2e6, 0, NULL, 0 },
                                             { 8, 15, 1e6, 0, NULL, 0 }, { 4, 5, 0, 0, NULL, 0 } };
    static const struct moe_part second[] = { { 0, 9, 4e6, 0, NULL, 0 }, { 8, 0, 6e6, 0, NULL, 0 } };
    int32_t wait = test_compute(g, 3, 0, 20 * US);
    int32_t x = put(g, tally, &(struct moe_exchange){ MOE_PAY_HIDDEN, 6, first, .sms = 20 });
    int32_t y = put(g, tally, &(struct moe_exchange){ MOE_PAY_BYTES, 2, second });
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
    struct tally tally;
    struct evening *v = &tally.evening;
    struct err e = { 0 };
    test_ok(tally_open(&tally, t, &e), &e);
    test_ok(machine_open_sim(&m, t, &test_model, PREC_BF16, NET_BOUND, &e), &e);
    tally_layer(&tally, &m);
    fill(&kept, NULL);
    fill(&given, &tally);
    double took = test_run_graph(t, NET_BOUND, &kept);
    assert_int_equal(given.n_parts, 0);
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
        assert_true(evening_seconds(v, &kept, x) == evening_seconds(v, &given, y));
        exchange_sides(&kept, x, a);
        exchange_sides(&given, y, b);
        assert_memory_equal(a, b, sizeof a);
    }
    double bound[2];
    test_ok(metrics_bound(&kept, t, &bound[0], &e), &e);
    test_ok(metrics_bound(&given, t, &bound[1], &e), &e);
    assert_true(bound[0] == bound[1] && bound[0] > 0);
    machine_close(&m);
    tally_close(&tally);
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
    fill(&g, NULL);
    exchange_bytes(&g, t, &g.task[1], &intra, &inter);
    assert_true(intra == 6e6 && inter == 5e6);
    /* Evenly over the 16 NICs, or the 16 ways into NVLink: bytes over all links of a role. */
    struct evening v;
    struct err e = { 0 };
    double nics = 0, ports = 0;
    for (int32_t l = 0; l < t->n_links; l++) {
        nics += strstr(t->link[l].name, ".nic.out") ? t->link[l].bandwidth : 0;
        ports += strstr(t->link[l].name, ".nvlink.out") ? t->link[l].bandwidth : 0;
    }
    test_ok(evening_open(&v, t, &e), &e);
    assert_true(5e6 / nics > 6e6 / ports);
    assert_near(evening_seconds(&v, &g, &g.task[1]), 5e6 / nics, 1e-12);
    evening_close(&v);
    exchange_sides(&g, &g.task[1], side);
    static const uint8_t expected[16] = {
        [0] = SIDE_NAMED | SIDE_SENDS, [1] = SIDE_NAMED | SIDE_GETS, [2] = SIDE_NAMED,
        [3] = SIDE_NAMED | SIDE_SENDS, [4] = SIDE_NAMED, [5] = SIDE_NAMED,
        [8] = SIDE_NAMED | SIDE_SENDS, [9] = SIDE_NAMED | SIDE_GETS, [15] = SIDE_NAMED | SIDE_GETS,
    };
    assert_memory_equal(side, expected, sizeof side);
    graph_free(&g);
    topology_free(t);
}

/* What devices and nodes send and get of each payload, where parts stay in the graph; loops are nobody's, and bytes
 * that are no rows do not count. */
static void counts(void **state)
{
    (void)state;
    static const struct moe_part back[] = { { 9, 0, 4e6, 0, NULL, 0 }, { 1, 0, 1e6, 0, NULL, 0 } };
    static const double out[2][16] = { { [0] = 8e6, [3] = 2e6, [8] = 1e6 }, { [1] = 1e6, [9] = 4e6 } };
    static const double in[2][16] = { { [1] = 5e6, [9] = 5e6, [15] = 1e6 }, { [0] = 5e6 } };
    static const double node[2][2] = { { 0, 5e6 } /* into */, { 0, 4e6 } /* out of */ };
    struct topology *t = two_nodes();
    struct moe_graph g = { .n_devices = 16 };
    struct tally tally;
    struct err e = { 0 };
    test_ok(tally_open(&tally, t, &e), &e);
    for (int again = 0; again < 2; again++) { /* anew */
        tally_layer(&tally, NULL);
        fill(&g, &tally);
        put(&g, &tally, &(struct moe_exchange){ MOE_PAY_OUTPUT, 2, back });
    }
    assert_int_equal(g.n_parts, 20);
    for (int payload = 0; payload < 2; payload++) {
        assert_memory_equal(tally.moved[payload][MOVED_OUT], out[payload], sizeof out[payload]);
        assert_memory_equal(tally.moved[payload][MOVED_IN], in[payload], sizeof in[payload]);
        assert_memory_equal(tally.moved[payload][MOVED_NODE], node[payload], sizeof node[payload]);
    }
    put(&g, &tally, &(struct moe_exchange){ MOE_PAY_OUTPUT, 2, back }); /* more of the same layer */
    assert_true(tally.moved[MOE_PAY_OUTPUT][MOVED_OUT][9] == 8e6 && tally.moved[MOE_PAY_HIDDEN][MOVED_OUT][0] == 8e6);
    tally_close(&tally);
    graph_free(&g);
    topology_free(t);
}

static void refused(void **state)
{
    (void)state;
    struct topology *t = two_nodes();
    struct tally tally;
    struct machine m;
    struct err e = { 0 };
    test_ok(tally_open(&tally, t, &e), &e);
    test_ok(machine_open_sim(&m, t, &test_model, PREC_BF16, NET_BOUND, &e), &e);
    static const struct { struct moe_part part; const char *says; } bad[] = {
        { { 0, 16, 1, 0, NULL, 0 }, "task on device 16, expected 0 to 15" },
        { { -1, 1, 1, 0, NULL, 0 }, "task on device -1, expected 0 to 15" },
        { { 0, 1, -1, 0, NULL, 0 }, "exchange from 0 to 1 with -1 bytes, 0 items" },
        { { 0, 1, NAN, 0, NULL, 0 }, "exchange from 0 to 1 with nan bytes" },
        { { 0, 1, INFINITY, 0, NULL, 0 }, "exchange from 0 to 1 with inf bytes" },
        { { 0, 1, 1, 0, NULL, -1 }, "exchange from 0 to 1 on path -1" },
    };
    for (size_t i = 0; i < 2 * sizeof bad / sizeof *bad; i++) {
        struct moe_graph g = { .n_devices = 16 };
        const struct moe_exchange x = { MOE_PAY_HIDDEN, 1, &bad[i / 2].part };
        tally_layer(&tally, &m);
        e.code = 0;
        assert_true((i % 2 ? tally_exchange(&tally, &g, &x, &e) : graph_exchange(&g, &x, &e)) < 0);
        assert_non_null(strstr(e.text, bad[i / 2].says));
        assert_int_equal(g.n_tasks, 0);
        graph_free(&g);
    }
    machine_close(&m);
    tally_close(&tally);
    topology_free(t);
}

/* A machine that did not keep its share of an exchange can not run it. */
static void on_another_machine(void **state)
{
    (void)state;
    struct topology *t = two_nodes();
    struct moe_graph g = { .n_devices = 16 };
    struct machine keeps, other;
    struct tally tally;
    struct err e = { 0 };
    test_ok(tally_open(&tally, t, &e), &e);
    test_ok(machine_open_sim(&other, t, &test_model, PREC_BF16, NET_FLOW, &e), &e);
    test_ok(machine_open_sim(&keeps, t, &test_model, PREC_BF16, NET_BOUND, &e), &e);
    tally_layer(&tally, &keeps);
    fill(&g, &tally);
    assert_int_equal(machine_run(&other, &g, &e), ERR_RUN);
    assert_non_null(strstr(e.text, "have been given back"));
    machine_close(&keeps);
    machine_close(&other);
    tally_close(&tally);
    graph_free(&g);
    topology_free(t);
}

/* Of a link's receivers only the words that are not 0 are kept. Device 0 sends 1 MB to each of 192 others, device 1 40
 * MB to six whose bits are in the third word: they have theirs after 240 MB over one NIC, the others after 192 MB. */
static void receivers_far_apart(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 25);
    struct moe_graph g = { .n_devices = 200 };
    struct moe_part part[198];
    struct err e = { 0 };
    int32_t arrival[200], link[TOPOLOGY_MAX_HOPS], x, n = 0;
    t->exchange = (struct exchange_costs){ 0 };
    for (int32_t d = 8; d < 200; d++)
        part[n++] = (struct moe_part){ .src = 0, .dst = d, .bytes = 1e6 };
    for (int32_t d = 138; d < 144; d++)
        part[n++] = (struct moe_part){ .src = 1, .dst = d, .bytes = 40e6 };
    test_ok(x = graph_exchange(&g, &(struct moe_exchange){ MOE_PAY_HIDDEN, n, part }, &e), &e);
    for (int32_t d = 8; d < 200; d++)
        arrival[d] = test_arrival(&g, x, d);
    test_run_graph(t, NET_BOUND, &g);
    double latency;
    test_ok(topology_route(t, 0, 8, 0, link, &latency), &e);
    for (int32_t d = 8; d < 200; d++) {
        const double bytes = d >= 138 && d < 144 ? 240e6 : 192e6;
        const double expected = latency + bytes / t->link[link[0]].bandwidth;
        assert_true(fabs(g.task[arrival[d]].end - expected) < 1e-9 * expected);
    }
    graph_free(&g);
    topology_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(sums), cmocka_unit_test(without_parts),
                                        cmocka_unit_test(counts), cmocka_unit_test(refused),
                                        cmocka_unit_test(on_another_machine),
                                        cmocka_unit_test(receivers_far_apart) };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
