/* SPDX-License-Identifier: Apache-2.0
 * test_flow.c - tiers bound, flow and exact against closed forms, and what has to hold for any traffic. */
#include "machine_test.h"

#define TIERS(t) for (enum net_tier t = NET_BOUND; t <= NET_EXACT; t++)

static const double nic = 50e9, latency = 500e-9;

/* ---- the common work of network simulators ---- */

static void uniform_exchange(void **state)
{
    (void)state;
    static const int sizes[] = { 8, 64, 256, 1024 };
    static const double published_us[] = { 293.6, 330.3, 334.2, 335.2 }; /* without the latency */
    for (size_t i = 0; i < 4; i++) {
        int n = sizes[i];
        struct topology *t = test_machine("star-50GBps", n);
        size_t n_flows;
        struct net_flow *flow = test_exchange(n, test_uniform, &n_flows);
        double bound = (n - 1) * 16 * MIB / n / nic;
        assert_near(bound * 1e6, published_us[i], 2e-4);
        TIERS(tier)
        if (n <= 256 || tier == NET_BOUND)
            assert_near(test_makespan(t, tier, flow, n_flows, NULL), bound + latency, 1e-9);
        free(flow);
        topology_free(t);
    }
}

static void zipf_exchange(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 64);
    size_t n_flows;
    struct net_flow *flow = test_exchange(64, test_zipf1, &n_flows);
    double finish[64 * 3] = { 0 };
    TIERS(tier)
    assert_near(test_makespan(t, tier, flow, n_flows, finish), 4.45661e-3, tier == NET_FLOW ? 1.3e-3 : 2e-6);
    assert_true(finish[0] > finish[1]); /* the hottest receiver is last */
    free(flow);
    topology_free(t);
}

/* ---- sharing ---- */

static void two_flows_one_link(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 3);
    /* Both into device 2: half each until the short one ends; device 1's whole link after that. */
    const struct net_flow flow[] = { { 0, 2, 1e6 }, { 1, 2, 3e6 } };
    struct net_done done[4];
    struct net *net = test_net(t, NET_EXACT);
    test_start(net, 0, 1, &flow[0], 1);
    test_start(net, 0, 2, &flow[1], 1);
    assert_int_equal(test_drain(net, done, 4), 2);
    assert_int_equal(done[0].exchange, 1);
    assert_near(done[0].time, 2e6 / nic + latency, 1e-12);
    assert_near(done[1].time, 4e6 / nic + latency, 1e-12);
    net_close(net);
    topology_free(t);
}

/* The textbook's case of two links of unequal crowding (Bertsekas and Gallager, section 6.5.2): three flows leave
 * device 0, one of them for device 3, which device 4 sends to as well. Device 0's link is full at a third each, and
 * the flow 4 -> 3 takes the two thirds that are left of the way into device 3. */
static void max_min_shares(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 5);
    const struct net_flow flow[] = { { 0, 1, 1e9 }, { 0, 2, 1e9 }, { 0, 3, 1e9 }, { 4, 3, 1e9 } };
    struct net *net = test_net(t, NET_EXACT);
    struct net_done done[4];
    for (int i = 0; i < 4; i++)
        test_start(net, 0, i, &flow[i], 1);
    assert_int_equal(test_drain(net, done, 4), 4);
    assert_int_equal(done[0].exchange, 3);
    assert_near(done[0].time, 1e9 / (2 * nic / 3) + latency, 1e-12);
    for (int i = 1; i < 4; i++)
        assert_near(done[i].time, 3e9 / nic + latency, 1e-12);
    net_close(net);
    topology_free(t);
}

static void staggered_starts(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 3);
    const struct net_flow a = { 0, 2, 2e6 }, b = { 1, 2, 2e6 };
    double alone = 2e6 / nic;
    TIERS(tier)
    {
        struct net *net = test_net(t, tier);
        struct net_done done[2];
        struct err e = { 0 };
        size_t n = 9;
        test_start(net, 1.0, 5, &a, 1);
        assert_int_equal(net_advance(net, 1.0 + alone / 2, done, 2, &n, &e), 0);
        assert_int_equal(n, 0);
        test_start(net, 1.0 + alone / 2, 6, &b, 1);
        assert_int_equal(test_drain(net, done, 2), 2);
        /* Half of the first is left and takes twice as long; the second then has half and the whole link. */
        assert_near(done[0].time - 1, 1.5 * alone + latency, 1e-9);
        assert_near(done[1].time - 1, 2.0 * alone + latency, 1e-9);
        assert_int_equal(done[0].exchange, 5);
        net_close(net);
    }
    topology_free(t);
}

/* Tier bound: exchanges on one link have equal shares of its bandwidth, however large they are; links do not wait for
 * each other. */
static void fluids_share(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 4);
    const struct net_flow small[] = { { 0, 3, 1e6 } }, large[] = { { 1, 3, 9e6 }, { 2, 3, 9e6 }, { 1, 2, 1e6 } };
    struct net *net = test_net(t, NET_BOUND);
    struct net_done done[4];
    test_start(net, 0, 1, small, 1);
    test_start(net, 0, 2, large, 3);
    assert_int_equal(test_drain(net, done, 4), 3);
    assert_int_equal(done[0].exchange, 1);
    assert_near(done[0].time, 2e6 / nic + latency, 1e-12);
    /* Of its 18e6 bytes for device 3, 1e6 have passed by then. Device 2 waits for sender 1's 10e6, which nobody else
     * sends beside. */
    assert_int_equal(done[1].dst, 2);
    assert_near(done[1].time, 10e6 / nic + latency, 1e-12);
    assert_near(done[2].time, 19e6 / nic + latency, 1e-12);
    net_close(net);
    topology_free(t);
}

static void host_copies_compete(void **state)
{
    (void)state;
    /* A copy from host memory and a peer exchange meet on PCIe's way into device 1. */
    json_t *d = test_description("rtx4090-pcie4", 0);
    json_object_set_new(d, "devices", json_integer(2));
    struct topology *t = test_build(d);
    double pcie = 31.5e9 * 0.8;
    const struct net_flow copy = { topology_host(t, 0), 1, 1e8 }, exchange[] = { { 0, 1, 2e8 }, { 1, 0, 1e8 } };
    struct net *net = test_net(t, NET_EXACT);
    struct net_done done[3];
    test_start(net, 0, 1, &copy, 1);
    test_start(net, 0, 2, exchange, 2);
    assert_int_equal(test_drain(net, done, 3), 3);
    /* Memory (83.2) carries the staged flows twice: 12.6 * (1 + 2) + 2 x for 1 -> 0, so that x = 22.7. */
    assert_int_equal(done[0].dst, 0);
    assert_near(done[0].time, 1e8 / ((83.2e9 - 1.5 * pcie) / 2) + 10e-6, 1e-9);
    assert_int_equal(done[1].exchange, 1);
    assert_near(done[1].time, 2e8 / pcie + 5e-6, 1e-9);
    assert_near(done[2].time, 3e8 / pcie + 10e-6, 1e-9);
    const double *bytes = net_link_bytes(net);
    for (int32_t l = 0; l < t->n_links; l++)
        if (strcmp(t->link[l].name, "node0.memory") == 0)
            assert_near(bytes[l], 1e8 + 2 * 3e8, 1e-12);
    net_close(net);
    topology_free(t);
}

/* ---- what holds for any traffic ---- */

static void conservation(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 2);
    size_t n_flows;
    struct net_flow *flow = test_exchange(16, test_uneven, &n_flows);
    struct net_done done[64];
    int32_t link[TOPOLOGY_MAX_HOPS];
    double *expected = calloc((size_t)t->n_links, sizeof *expected);
    for (size_t i = 0; i < n_flows; i++)
        for (int h = topology_route(t, flow[i].src, flow[i].dst, 0, link, NULL); h-- > 0;)
            expected[link[h]] += flow[i].bytes;
    TIERS(tier)
    {
        struct net *net = test_net(t, tier);
        test_start(net, 0, 1, flow, n_flows);
        assert_int_equal(test_drain(net, done, 64), 16);
        for (int32_t l = 0; l < t->n_links; l++)
            assert_near(net_link_bytes(net)[l], expected[l], 1e-12);
        net_close(net);
    }
    free(expected);
    free(flow);
    topology_free(t);
}

static void random_traffic(const struct topology *t, uint64_t seed)
{
    int n = t->n_devices;
    struct net_flow *flow = malloc((size_t)(n * n) * sizeof *flow);
    size_t n_flows = 0;
    for (int s = 0; s < n; s++) {
        for (int d = 0; d < n; d++) {
            double u = moe_unit(moe_mix(seed + (uint64_t)(s * n + d)));
            if (u > 0.3) /* some pairs are silent, some sizes differ a thousandfold */
                flow[n_flows++] = (struct net_flow){ s, d, 1e6 * pow(10, 3 * u - 2) };
        }
    }
    double bound = test_makespan(t, NET_BOUND, flow, n_flows, NULL);
    double exact = test_makespan(t, NET_EXACT, flow, n_flows, NULL);
    double batched = test_makespan(t, NET_FLOW, flow, n_flows, NULL);
    if (!(exact >= bound * (1 - 1e-12)) || !(exact < 1.1 * bound))
        fail_msg("seed %d, %s: exact %g s, bound %g s", (int)seed, t->name, exact, bound);
    assert_near(batched, exact, 1.3e-3);
    free(flow);
}

static void tiers_agree(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int nodes;
    } machines[] = {
        { "star-50GBps", 16 }, { "star-50GBps", 64 }, { "dgx-h100", 3 }, { "h800-ib", 1 }, { "dgx-a100", 2 },
    };
    for (size_t m = 0; m < sizeof machines / sizeof machines[0]; m++) {
        struct topology *t = test_machine(machines[m].name, machines[m].nodes);
        for (uint64_t seed = 0; seed < (t->n_devices > 32 ? 2 : 10); seed++)
            random_traffic(t, 1000 * seed);
        topology_free(t);
    }
}

static void same_again(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 2);
    size_t n_flows;
    struct net_flow *flow = test_exchange(16, test_uneven, &n_flows);
    double first[20] = { 0 }, second[20] = { 0 };
    TIERS(tier)
    {
        test_makespan(t, tier, flow, n_flows, first);
        test_makespan(t, tier, flow, n_flows, second);
        assert_memory_equal(first, second, sizeof first);
    }
    free(flow);
    topology_free(t);
}

/* ---- the contract of the calls ---- */

static void what_arrives_at_once(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 4);
    const struct net_flow flow[] = { { 3, 3, 1e9 }, { 0, 1, 0 }, { 0, 2, 1e6 } };
    TIERS(tier)
    {
        struct net *net = test_net(t, tier);
        struct net_done done[4];
        struct err e = { 0 };
        size_t n;
        test_start(net, 2, 9, flow, 3);
        assert_int_equal(net_advance(net, 2, done, 4, &n, &e), 0);
        assert_int_equal(n, 2);
        assert_int_equal(done[0].dst, 1);
        assert_int_equal(done[1].dst, 3);
        assert_true(done[0].time == 2 && done[1].time == 2);
        assert_int_equal(net_advance(net, INFINITY, done, 4, &n, &e), 0);
        assert_int_equal(n, 1);
        assert_near(done[0].time - 2, 1e6 / nic + latency, 1e-9);
        assert_int_equal(net_advance(net, INFINITY, done, 4, &n, &e), 0);
        assert_int_equal(n, 0);
        net_close(net);
    }
    topology_free(t);
}

static void order_and_room(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 8);
    size_t n_flows, n;
    struct net_flow *flow = test_exchange(8, test_uniform, &n_flows);
    struct net *net = test_net(t, NET_EXACT);
    struct net_done done[3];
    struct err e = { 0 };
    test_start(net, 0, 2, flow, n_flows);
    test_start(net, 0, 1, flow, n_flows);
    for (int seen = 0; seen < 16; seen += (int)n) { /* all at one time, but there is room for three only */
        assert_int_equal(net_advance(net, INFINITY, done, 3, &n, &e), 0);
        assert_int_equal(n, seen == 15 ? 1 : 3);
        for (int i = 0; i < (int)n; i++) {
            assert_int_equal(done[i].exchange, 1 + (seen + i) / 8);
            assert_int_equal(done[i].dst, (seen + i) % 8);
        }
    }
    net_close(net);
    free(flow);
    topology_free(t);
}

static void ends_while_nobody_looks(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 4);
    const struct net_flow a = { 0, 1, 1e6 }, b = { 2, 1, 1e6 };
    TIERS(tier)
    {
        struct net *net = test_net(t, tier);
        struct net_done done[2];
        test_start(net, 0, 1, &a, 1);
        test_start(net, 1, 2, &b, 1);
        assert_int_equal(test_drain(net, done, 2), 2);
        assert_near(done[0].time, 1e6 / nic + latency, 1e-12);
        assert_near(done[1].time, 1 + 1e6 / nic + latency, 1e-12);
        net_close(net);
    }
    topology_free(t);
}

static void many_exchanges(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 1);
    TIERS(tier)
    {
        struct net *net = test_net(t, tier);
        struct net_done done[400];
        /* 400 copies of 1 MB into 8 devices: memory (614.4) is wide enough, so each PCIe link has 50 in turn. */
        for (int i = 0; i < 400; i++) {
            struct net_flow copy = { topology_host(t, 0), i % 8, 1e6 };
            test_start(net, 0, i, &copy, 1);
        }
        assert_int_equal(test_drain(net, done, 400), 400);
        assert_near(done[399].time, 50e6 / (63e9 * 0.85) + 2e-6, 1e-9);
        net_close(net);
    }
    topology_free(t);
}

static void refused(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 2);
    struct net *net = test_net(t, NET_EXACT);
    struct net_done done;
    size_t n;
    const struct {
        struct net_flow flow;
        double now;
        const char *text;
    } cases[] = {
        { { 0, 99, 1 }, 5, "found 0 -> 99, expected endpoints below 20" },
        { { -1, 0, 1 }, 5, "found -1 -> 0, expected endpoints below 20" },
        { { 0, 1, -1 }, 5, "found -1 bytes, expected 0 to 1e+15" },
        { { 0, 1, (double)NAN }, 5, "found nan bytes" },
        { { 0, 1, INFINITY }, 5, "found inf bytes" },
        { { topology_host(t, 0), 9, 1 }, 5, "dgx-h100 has no way from endpoint 16 to 9" },
        { { 0, 1, 1 }, 4, "starts at 4 s, but the clock shows 5 s" },
    };
    struct err e = { 0 };
    assert_int_equal(net_advance(net, 5, &done, 1, &n, &e), 0);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        e = (struct err){ 0 };
        assert_int_equal(net_start(net, cases[i].now, 3, &cases[i].flow, 1, &e), ERR_RUN);
        if (!strstr(e.text, cases[i].text))
            fail_msg("found \"%s\", expected \"%s\"", e.text, cases[i].text);
    }
    /* Nothing of it stays behind. */
    const struct net_flow good = { 0, 1, 1e6 };
    test_start(net, 5, 3, &good, 1);
    assert_int_equal(test_drain(net, &done, 1), 1);
    net_close(net);
    topology_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(uniform_exchange),
        cmocka_unit_test(zipf_exchange),
        cmocka_unit_test(two_flows_one_link),
        cmocka_unit_test(max_min_shares),
        cmocka_unit_test(staggered_starts),
        cmocka_unit_test(fluids_share),
        cmocka_unit_test(host_copies_compete),
        cmocka_unit_test(conservation),
        cmocka_unit_test(tiers_agree),
        cmocka_unit_test(same_again),
        cmocka_unit_test(what_arrives_at_once),
        cmocka_unit_test(order_and_room),
        cmocka_unit_test(ends_while_nobody_looks),
        cmocka_unit_test(many_exchanges),
        cmocka_unit_test(refused),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
