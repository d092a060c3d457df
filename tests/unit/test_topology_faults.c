/* SPDX-License-Identifier: Apache-2.0
 * test_topology_faults.c - stragglers, links and devices that degrade or fail: what the topology says of them, and what
 * becomes of a run. */
#include "core_test.h"

#include "topology_internal.h"

/* star-50GBps with 8 nodes on four leaves below two spines, and `slow` and `faults` in JSON. */
static struct topology *faulty(const char *paths, const char *slow, const char *faults)
{
    json_t *d = test_description("star-50GBps", 8);
    if (paths)
        json_object_set_new(d, "network",
                            json_pack("{s:s, s:i, s:i, s:s, s:s, s:s}", "kind", "leaf-spine", "nodes_per_leaf", 2,
                                      "spines", 4, "uplink", "25 GB/s", "paths", paths, "source", "a test"));
    if (slow)
        json_object_set_new(d, "slow", json_loads(slow, 0, NULL));
    if (faults)
        json_object_set_new(d, "faults", json_loads(faults, 0, NULL));
    return test_build(d);
}

static void changes(void **state)
{
    (void)state;
    struct topology *t = faulty("hash", NULL,
                                "[{\"link\": \"gpu3.nic\", \"at\": \"2 ms\", \"factor\": 0.5},"
                                " {\"link\": \"gpu1.nic.out\", \"at\": \"1 ms\"},"
                                " {\"link\": \"gpu1.nic.out\", \"at\": \"3 ms\", \"factor\": 1},"
                                " {\"link\": \"spine2\", \"at\": \"2 ms\", \"factor\": 0},"
                                " {\"device\": 7, \"at\": \"4 ms\"}]");
    assert_int_equal(t->n_changes, 2 + 1 + 1 + 8 + 2);
    assert_string_equal(t->link[t->change[0].link].name, "gpu1.nic.out");
    assert_true(t->change[0].at == 1e-3 && t->change[0].bandwidth == 0);
    assert_string_equal(t->link[t->change[1].link].name, "gpu3.nic.out");
    assert_true(t->change[1].at == 2e-3 && t->change[1].bandwidth == 25e9);
    assert_string_equal(t->link[t->change[2].link].name, "gpu3.nic.in");
    for (int i = 3; i < 11; i++) { /* every leaf's links to the third spine */
        assert_non_null(strstr(t->link[t->change[i].link].name, ".spine2."));
        assert_true(t->change[i].at == 2e-3 && t->change[i].bandwidth == 0);
    }
    assert_true(t->change[11].at == 3e-3 && t->change[11].bandwidth == 50e9);
    for (int i = 1; i < t->n_changes; i++)
        assert_true(t->change[i].at > t->change[i - 1].at || t->change[i].link > t->change[i - 1].link);

    double at = 0;
    assert_true(topology_device_failed(t, 7, &at) && at == 4e-3);
    assert_false(topology_device_failed(t, 6, &at));
    topology_free(t);
}

/* Work that takes 1 s: at twice the time from 1 s on, three times from 4 s on, until the device fails at 10 s. */
static void slower(void **state)
{
    (void)state;
    struct topology *t = faulty(NULL,
                                "[{\"device\": 2, \"factor\": 3, \"at\": \"4 s\"},"
                                " {\"device\": 2, \"factor\": 2, \"at\": \"1 s\"}]",
                                "[{\"device\": 2, \"at\": \"10 s\"}]");
    assert_near(topology_compute_end(t, 2, 0, 1), 1, 1e-12);
    assert_near(topology_compute_end(t, 2, 0.5, 1), 2, 1e-12); /* half of it, then 0.5 s twice as long */
    assert_near(topology_compute_end(t, 2, 0, 3), 5.5, 1e-12); /* 1 s, 3 s for 1.5 s, 1.5 s for 0.5 s */
    assert_near(topology_compute_end(t, 2, 5, 1.5), 9.5, 1e-12);
    assert_true(isinf(topology_compute_end(t, 2, 8, 1)));
    assert_true(isinf(topology_compute_end(t, 2, 11, 0)));
    assert_near(topology_compute_end(t, 3, 8, 1), 9, 1e-12);
    /* And how much is done meanwhile: what one says the other undoes. */
    assert_near(topology_work(t, 2, 0.5, 2), 1, 1e-12);
    assert_near(topology_work(t, 2, 0, 5.5), 3, 1e-12);
    assert_near(topology_work(t, 2, 0, 20), 1 + 1.5 + 2, 1e-12);
    assert_true(topology_work(t, 2, 11, 12) == 0);
    assert_near(topology_work(t, 3, 8, 9), 1, 1e-12);
    topology_free(t);
}

/* On the simulated machine, in the order of its stream. */
static void straggler(void **state)
{
    (void)state;
    struct topology *t = faulty(NULL, "[{\"device\": 1, \"factor\": 2, \"at\": \"15 us\"}]", NULL);
    struct moe_graph g = { .n_devices = 8 };
    int32_t a = test_compute(&g, 1, 0, 10 * US), b = test_compute(&g, 1, 0, 10 * US);
    int32_t other = test_compute(&g, 0, 0, 20 * US);
    assert_near(test_run_graph(t, NET_EXACT, &g), 25 * US, 1e-9);
    assert_near(g.task[a].end, 10 * US, 1e-9);
    assert_near(g.task[b].end, 25 * US, 1e-9); /* half of it by 15, the rest in 10 */
    assert_near(g.task[other].end, 20 * US, 1e-9);
    graph_free(&g);
    topology_free(t);
}

/* A device that fails takes what waits for it along, and the run says which, when, and how much. */
static void failed_device(void **state)
{
    (void)state;
    struct topology *t = faulty(NULL, NULL, "[{\"device\": 1, \"at\": \"15 us\"}]");
    struct moe_graph g = { .n_devices = 8 };
    struct machine m;
    struct err e = { 0 };
    int32_t a = test_compute(&g, 1, 0, 10 * US), b = test_compute(&g, 1, 0, 10 * US);
    int32_t after = test_compute(&g, 0, 0, 5 * US), alone = test_compute(&g, 2, 0, 30 * US);
    test_after(&g, after, b);
    test_ok(machine_open_sim(&m, t, &test_model, PREC_BF16, NET_EXACT, &e), &e);
    assert_int_equal(machine_run(&m, &g, &e), ERR_RUN);
    assert_string_equal(e.text, "machine star-50GBps: device 1 failed at 1.5e-05 s: 2 tasks wait for what never ends");
    assert_int_equal(err_exit_code(e.code), 1);
    assert_near(g.task[a].end, 10 * US, 1e-9);
    assert_near(g.task[alone].end, 30 * US, 1e-9);
    machine_close(&m);
    graph_free(&g);
    topology_free(t);
}

/* 1 MB over a NIC of 50 GB/s takes 20 us: half the link from 10 us on, 30; none from 10 to 50 us, 60; and none for good
 * is reported, with what it was on the way to. */
static void links_in_time(void **state)
{
    (void)state;
    static const char *const faults[] = {
        "[{\"link\": \"gpu1.nic.in\", \"at\": \"10 us\", \"factor\": 0.5}]",
        "[{\"link\": \"gpu0.nic\", \"at\": \"10 us\"}, {\"link\": \"gpu0.nic\", \"at\": \"50 us\", \"factor\": 1}]",
    };
    for (int i = 0; i < 2; i++) {
        struct topology *t = faulty(NULL, NULL, faults[i]);
        const struct net_flow one = { .src = 0, .dst = 1, .bytes = 1e6 };
        for (enum net_tier tier = NET_BOUND; tier <= NET_EXACT; tier++)
            assert_near(test_makespan(t, tier, &one, 1, NULL), (i ? 60e-6 : 30e-6) + 500e-9, 1e-9);
        topology_free(t);
    }

    struct topology *t = faulty("hash", NULL, "[{\"link\": \"leaf0\", \"at\": \"10 us\"}]");
    struct moe_graph g = { .n_devices = 8 };
    struct machine m;
    struct err e = { 0 };
    const struct moe_part near = { 2, 3, 1e6, 0, NULL, 0 }, far = { 1, 7, 1e6, 0, NULL, 0 };
    const int32_t there = test_parts(&g, 1, &near);
    test_after(&g, test_compute(&g, 7, 0, 10 * US), test_parts(&g, 1, &far));
    test_ok(machine_open_sim(&m, t, &test_model, PREC_BF16, NET_EXACT, &e), &e);
    assert_int_equal(machine_run(&m, &g, &e), ERR_RUN);
    const char *end = "failed at 1e-05 s, for good: the exchange from 1 to 7 can not end";
    if (strncmp(e.text, "link leaf0.spine", 16) != 0 || !strstr(e.text, end))
        fail_msg("found \"%s\", expected \"link leaf0.spine... %s\"", e.text, end);
    assert_near(g.task[there].end, 20.5 * US, 1e-9);
    machine_close(&m);
    graph_free(&g);
    topology_free(t);
}

static bool on_path(const struct topology *t, const struct net_flow *f, const char *spine)
{
    return strstr(test_route(t, f->src, f->dst, f->path, NULL), spine) != NULL;
}

/* Flows that start after a spine has failed take the paths that are left; where none is, they stay and stall. */
static void rehashed(void **state)
{
    (void)state;
    struct topology *t = faulty("hash", NULL,
                                "[{\"link\": \"leaf0.spine1\", \"at\": \"1 ms\"},"
                                " {\"link\": \"leaf3\", \"at\": \"5 ms\"}]");
    struct net_flow flow[8], *out = NULL;
    struct err e = { 0 };
    size_t n = 0;
    int before = 0;
    for (int i = 0; i < 8; i++) {
        flow[i] = (struct net_flow){ .src = i % 2, .dst = 2 + i % 6, .bytes = 1e6 };
        before += on_path(t, &flow[i], ".spine1.");
    }
    assert_true(before > 0); /* else this shows nothing */
    assert_int_equal(topology_split(t, 0.5e-3, flow, 8, &out, &n, &e), 0);
    assert_null(out);
    assert_int_equal(topology_split(t, 1e-3, flow, 8, &out, &n, &e), 0);
    assert_int_equal(n, 8);
    for (int i = 0; i < 8; i++) {
        assert_false(on_path(t, &out[i], ".spine1."));
        assert_int_equal(out[i].dst, flow[i].dst);
        assert_true(out[i].bytes == flow[i].bytes);
    }
    free(out);
    const struct net_flow cut_off = { .src = 0, .dst = 7, .bytes = 1e6 };
    assert_int_equal(topology_split(t, 5e-3, &cut_off, 1, &out, &n, &e), 0);
    assert_int_equal(n, 1);
    assert_int_equal(out[0].path, 0);
    free(out);
    topology_free(t);

    /* Split over the three that are left: a third each. */
    t = faulty("split", NULL, "[{\"link\": \"leaf0.spine1.out\", \"at\": \"0 s\"}]");
    assert_int_equal(topology_split(t, 0, &cut_off, 1, &out, &n, &e), 0);
    assert_int_equal(n, 3);
    for (int i = 0; i < 3; i++) {
        assert_near(out[i].bytes, 1e6 / 3, 1e-12);
        assert_int_equal(out[i].path, i == 0 ? 1 : 2 + i);
    }
    free(out);
    topology_free(t);
}

static void each_tier(const struct topology *t, const struct net_flow *flow, size_t n, double seconds)
{
    for (enum net_tier tier = NET_BOUND; tier <= NET_SIMGRID; tier++)
        if (tier != NET_SIMGRID || net_simgrid_available())
            assert_near(test_makespan(t, tier, flow, n, NULL), seconds, 1e-6);
}

/* Four spines of 25 GB/s for a leaf's two NICs of 50. */
static void one_spine_of_four(void **state)
{
    (void)state;
    const struct net_flow two[] = { { .src = 0, .dst = 2, .bytes = 1e6 }, { .src = 1, .dst = 3, .bytes = 1e6 } };
    const double latency = 0.5 * US;
    /* Half a MB each in 10 us, the rest over three spines: 37.5 GB/s each. */
    struct topology *t = faulty("spray", NULL, "[{\"link\": \"spine2\", \"at\": \"10 us\"}]");
    assert_int_equal(t->n_changes, 8);
    assert_near(t->change[0].bandwidth, 75e9, 1e-12);
    each_tier(t, two, 2, 10 * US + 0.5e6 / 37.5e9 + latency);
    topology_free(t);
    /* One leaf's link to it, at half: 25 - 12.5 GB/s of 100 are gone, at that leaf; until it is back, at 20 us. */
    t = faulty("spray", NULL, /* of what is said for one time the least counts */
               "[{\"link\": \"leaf1.spine3\", \"at\": \"0 s\", \"factor\": 0.5},"
               " {\"link\": \"leaf1.spine3\", \"at\": \"0 s\", \"factor\": 0.75},"
               " {\"link\": \"leaf1.spine3\", \"at\": \"20 us\", \"factor\": 1}]");
    assert_int_equal(t->n_changes, 4);
    each_tier(t, two, 2, 20 * US + (2e6 - 20 * US * 87.5e9) / 100e9 + latency);
    topology_free(t);

    /* Three of them gone: one carries it all, however paths are taken. */
    static const char *const paths[] = { "hash", "split", "spray" };
    const struct net_flow far = { .src = 0, .dst = 7, .bytes = 1e6 };
    for (int i = 0; i < 3; i++) {
        t = faulty(paths[i], NULL,
                   "[{\"link\": \"spine0\", \"at\": \"0 s\"}, {\"link\": \"spine1\", \"at\": \"0 s\"},"
                   " {\"link\": \"leaf0.spine3.out\", \"at\": \"0 s\"}]");
        each_tier(t, &far, 1, 40 * US + latency);
        topology_free(t);
    }
}

/* No way is left: the run says so, whether all spines have failed or those that each of two leaves still has. */
static void sprayed_and_cut(void **state)
{
    (void)state;
    static const char *const faults[] = {
        "[{\"link\": \"leaf0.spine0\", \"at\": \"0 s\"}, {\"link\": \"leaf0.spine1\", \"at\": \"0 s\"},"
        " {\"link\": \"leaf3.spine2.in\", \"at\": \"0 s\"}, {\"link\": \"leaf3.spine3\", \"at\": \"0 s\"}]",
        "[{\"link\": \"spine0\", \"at\": \"0 s\"}, {\"link\": \"spine1\", \"at\": \"0 s\"},"
        " {\"link\": \"spine2\", \"at\": \"0 s\"}, {\"link\": \"leaf0.spine3\", \"at\": \"5 us\"}]",
        /* Two ways are left, and links that say three. */
        "[{\"link\": \"leaf0.spine0.out\", \"at\": \"0 s\"}, {\"link\": \"leaf3.spine1.in\", \"at\": \"0 s\"}]",
    };
    static const char *const says[] = {
        "no path is left between leaf0 and leaf3 at 0 s: the exchange from 0 to 7 can not end",
        "link leaf0.spines.out failed at 5e-06 s, for good: the exchange from 0 to 7 can not end",
        "leaf0 and leaf3 miss different spines at 0 s, so that the paths from 0 to 7 have less than either leaf's "
        "links: sprayed links do not know that; use paths = \"hash\" or \"split\", or faults of the same spines on "
        "both sides",
    };
    for (int i = 0; i < 3; i++)
        for (enum net_tier tier = NET_BOUND; tier <= NET_EXACT; tier++) {
            struct topology *t = faulty("spray", NULL, faults[i]);
            struct moe_graph g = { .n_devices = 8 };
            struct machine m;
            struct err e = { 0 };
            const struct moe_part far = { 0, 7, 1e6, 0, NULL, 0 };
            test_parts(&g, 1, &far);
            test_ok(machine_open_sim(&m, t, &test_model, PREC_BF16, tier, &e), &e);
            const struct moe_exchange x = { MOE_PAY_BYTES, 1, &far };
            struct message_count sends[8] = { { .peers = 1, .messages = 1 } };
            double link_bytes[t->n_links];
            int rc = m.ops->reduce ? m.ops->reduce(&m, &g, 0, &x, sends, link_bytes, &e) : 0;
            assert_int_equal(rc ? rc : machine_run(&m, &g, &e), ERR_RUN);
            if (i != 1 || tier != NET_BOUND)
                assert_string_equal(e.text, says[i]);
            machine_close(&m);
            graph_free(&g);
            /* The other leaves still reach each other, with half of what they had. */
            const struct net_flow near[] = { { .src = 0, .dst = 2, .bytes = 1e6 },
                                             { .src = 1, .dst = 3, .bytes = 1e6 } };
            if (i == 0)
                assert_near(test_makespan(t, tier, near, 2, NULL), 40.5 * US, 1e-6);
            topology_free(t);
        }
}

/* What a fault is called, and what it takes of a fat tree's sprayed links: two spines to a pod, three cores each. */
static void strands(void **state)
{
    (void)state;
    static const struct { const char *link, *first; int n; double left; } cases[] = {
        { "core1", "pod0.cores.out", 8, 4.0 / 6 },         { "pod1.spine0.core2.in", "pod1.cores.in", 1, 5.0 / 6 },
        { "pod2", "pod2.cores.out", 2, 0 },                { "pod2.spine1", "pod2.cores.out", 2, 0.5 },
        { "leaf3.spine1.out", "leaf3.spines.out", 1, 0.5 }, { "leaf3.spines", "leaf3.spines.out", 2, 0 },
        { "spine1", "leaf0.spines.out", 16 + 8, 0.5 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *d = test_description("star-50GBps", 16);
        json_object_set_new(d, "network",
                            json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:s}", "kind", "fat-tree",
                                      "nodes_per_leaf", 2, "leaves_per_pod", 2, "spines", 2, "cores", 3,
                                      "oversubscription", 1, "core_oversubscription", 4, "paths", "spray", "source",
                                      "a test"));
        json_object_set_new(d, "faults", json_pack("[{s:s, s:s}]", "link", cases[i].link, "at", "1 s"));
        struct topology *t = test_build(d);
        assert_int_equal(t->n_changes, cases[i].n);
        for (int c = 0; c < t->n_changes; c++)
            assert_near(t->change[c].bandwidth, t->link[t->change[c].link].bandwidth * cases[i].left, 1e-12);
        assert_string_equal(t->link[t->change[0].link].name, cases[i].first);
        topology_free(t);
    }
}

/* Between pods: the ways over spine 0 of one pod to its cores are gone, and spine 1's to the far leaf. */
static void cores_and_spines(void **state)
{
    (void)state;
    json_t *d = test_description("star-50GBps", 16);
    json_object_set_new(d, "network",
                        json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:s}", "kind", "fat-tree", "nodes_per_leaf",
                                  2, "leaves_per_pod", 2, "spines", 2, "cores", 3, "oversubscription", 1,
                                  "core_oversubscription", 4, "paths", "spray", "source", "a test"));
    json_object_set_new(d, "faults", json_pack("[{s:s, s:s}, {s:s, s:s}]", "link", "pod0.spine0", "at", "0 s", "link",
                                               "leaf7.spine1.in", "at", "0 s"));
    struct topology *t = test_build(d);
    struct err e = { 0 };
    const struct net_flow far = { .src = 0, .dst = 15, .bytes = 1e6 }, near = { .src = 0, .dst = 7, .bytes = 1e6 };
    assert_int_equal(topology_check_spray(t, 0, &near, 1, &e), 0);
    assert_true(topology_check_spray(t, 0, &far, 1, &e) < 0);
    assert_non_null(strstr(e.text, "no path is left between leaf0 and leaf7"));
    topology_free(t);
}

/* The last arrival of two exchanges, one that is under way when a spine fails, and one that starts without it. */
static double last_of_two(const struct topology *t, enum net_tier tier, const struct net_flow *flow, size_t n,
                          double second)
{
    struct net_done done[64];
    struct net *net = test_net(t, tier);
    test_start(net, 0, 1, flow, n);
    test_start(net, second, 2, flow, n);
    const size_t got = test_drain(net, done, 64);
    net_close(net);
    return done[got - 1].time;
}

static void tiers_agree(void **state)
{
    (void)state;
    static const char *const paths[] = { "hash", "split", "spray" };
    const double second = 60 * US;
    for (int i = 0; i < 12; i++) {
        char faults[400];
        snprintf(faults, sizeof faults,
                 "[{\"link\": \"spine%d\", \"at\": \"%d us\"},"
                 " {\"link\": \"leaf%d.spine%d\", \"at\": \"%d us\", \"factor\": 0.25},"
                 " {\"link\": \"spine%d\", \"at\": \"%d us\", \"factor\": 1}]",
                 i % 4, 20 + i, i % 3, (i + 1) % 4, 35 + 3 * i, i % 4, 150 + 40 * i);
        struct topology *t = faulty(paths[i % 3], NULL, faults), *whole = faulty(paths[i % 3], NULL, NULL);
        size_t n;
        struct net_flow *flow = test_exchange(8, test_uneven, &n);
        double sum = 0;
        for (size_t k = 0; k < n; k++)
            sum += flow[k].bytes;
        for (size_t k = 0; k < n; k++)
            flow[k].bytes *= 8 * 4e6 / sum;
        const double exact = last_of_two(t, NET_EXACT, flow, n, second);
        assert_true(exact > last_of_two(whole, NET_EXACT, flow, n, second) * 1.001);
        assert_near(last_of_two(t, NET_FLOW, flow, n, second), exact, 2e-3);
        assert_true(last_of_two(t, NET_BOUND, flow, n, second) <= exact * (1 + 1e-9));
        if (net_simgrid_available())
            assert_near(last_of_two(t, NET_SIMGRID, flow, n, second), exact, 1e-6);
        free(flow);
        topology_free(t);
        topology_free(whole);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(changes),       cmocka_unit_test(slower),   cmocka_unit_test(straggler),
        cmocka_unit_test(failed_device), cmocka_unit_test(rehashed), cmocka_unit_test(links_in_time),
        cmocka_unit_test(cores_and_spines),
        cmocka_unit_test(strands),       cmocka_unit_test(one_spine_of_four), cmocka_unit_test(sprayed_and_cut),
        cmocka_unit_test(tiers_agree),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
