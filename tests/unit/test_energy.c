/* SPDX-License-Identifier: Apache-2.0
 * test_energy.c - joules of a step by hand, in every tier, and what half a table is told. */
#include "core_test.h"
#include "energy.h"

#define SOURCE "source", "this test"

/* Every sort of link that the description has, with a figure of its own, in pJ/B. */
static const struct { const char *key; double figure; } figures[] = {
    { "nvlink", 10 }, { "pcie", 40 }, { "nic", 200 }, { "host", 150 }, { "ssd", 1000 }, { "network", 300 },
};

static json_t *with_energy(json_t *description, const char *idle, const char *busy)
{
    json_t *e = json_pack("{s:s, s:s, s:s}", "idle", idle, "busy", busy, SOURCE);
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        const json_t *table = json_object_get(description, figures[i].key);
        if (json_is_object(table) && !json_is_true(json_object_get(table, "unified")))
            json_object_set_new(e, figures[i].key, json_sprintf("%g pJ/B", figures[i].figure));
    }
    json_object_set_new(description, "energy", e);
    return description;
}

static void set(json_t *description, const char *key, const char *value)
{
    json_object_set_new(json_object_get(description, "energy"), key, json_string(value));
}

static double joules(const struct topology *t, enum net_tier tier, struct moe_graph *g, int times, double *seconds)
{
    struct err e = { 0 };
    struct machine m;
    double first = 0, began = 0;
    test_ok(machine_open_sim(&m, t, &test_model, PREC_BF16, tier, &e), &e);
    for (int i = 0; i < times; i++) {
        began = m.now;
        test_ok(machine_run(&m, g, &e), &e);
        first = i == 0 ? m.joules : first;
        assert_near(m.joules, first, 1e-9); /* of this run, not of all so far */
    }
    *seconds = m.now - began;
    machine_close(&m);
    return first;
}

/* Device 0 computes for 10 us, sends 50 kB (1 us at 50 GB/s, and 0.5 us of latency), and device 1 computes for 20. */
static void lay_out(struct moe_graph *g)
{
    graph_reset(g);
    g->n_devices = 2;
    const int32_t a = test_compute(g, 0, 0, 10 * US);
    const int32_t x = test_parts(g, 1, &(struct moe_part){ .src = 0, .dst = 1, .bytes = 50e3 });
    const int32_t there = test_arrival(g, x, 1), b = test_compute(g, 1, 0, 20 * US);
    test_after(g, x, a);
    test_after(g, b, there);
}

static void by_hand_alone(void **state)
{
    (void)state;
    struct moe_graph g = { 0 };
    double seconds;
    const double idle = 2 * 100 * 31.5e-6, busy = (700 - 100) * 30e-6, links = 2 * 50e3 * 200e-12;
    const double kernels = test_h100_bytes(10 * US) + test_h100_bytes(20 * US);
    lay_out(&g);
    for (int tier = NET_BOUND; tier <= NET_EXACT; tier++) {
        struct topology *t = test_build(with_energy(test_description("star-50GBps", 2), "100 W", "0.7 kW"));
        assert_near(joules(t, (enum net_tier)tier, &g, 3, &seconds), idle + busy + links, 1e-9);
        assert_near(seconds, 31.5e-6, 1e-9);
        topology_free(t);

        /* Busy without memory: kernels' traffic, and 50 kB read here and written there. */
        json_t *d = with_energy(test_description("star-50GBps", 2), "100 W", "700 W");
        set(d, "memory", "3.9 pJ/bit");
        set(d, "node", "500 W");
        t = test_build(d);
        assert_near(joules(t, (enum net_tier)tier, &g, 2, &seconds),
                    idle + busy + links + (kernels + 2 * 50e3) * 8 * 3.9e-12 + 2 * 500 * 31.5e-6, 1e-9);
        topology_free(t);
    }
    graph_free(&g);
}

/* Two kernels at a time keep a device as busy as one, from the first one's start to the last one's end; with a gap
 * between them it is idle there. */
static void busy_once(void **state)
{
    (void)state;
    struct topology *t = test_build(with_energy(test_description("star-50GBps", 2), "0 W", "100 W"));
    struct moe_graph g = { .n_devices = 2 };
    double seconds;
    test_compute(&g, 1, 0, 10 * US);
    test_compute(&g, 1, 1, 25 * US);
    test_compute(&g, 0, 0, 4 * US);
    const double both = joules(t, NET_FLOW, &g, 1, &seconds);
    assert_true(seconds >= 25 * US && seconds < 35 * US);
    assert_near(both, 100 * (seconds + 4 * US), 1e-9);

    /* On device 0 from 0 on, beside it on another stream from 4 us on, and once more 1 us after both: 25 kB's way. */
    graph_reset(&g);
    const int32_t early = test_compute(&g, 1, 0, 4 * US), beside = test_compute(&g, 0, 1, 20 * US);
    const int32_t first = test_compute(&g, 0, 0, 10 * US), again = test_compute(&g, 0, 2, 7 * US);
    const int32_t x = test_parts(&g, 1, &(struct moe_part){ .src = 0, .dst = 1, .bytes = 25e3 });
    test_after(&g, beside, early);
    test_after(&g, x, beside);
    test_after(&g, x, first);
    test_after(&g, again, test_arrival(&g, x, 1));
    const double three = joules(t, NET_EXACT, &g, 1, &seconds);
    assert_near(three, 100 * (seconds - 1 * US + 4 * US) + 2 * 25e3 * 200e-12, 1e-9);
    graph_free(&g);
    topology_free(t);
}

/* What 16 devices of two nodes send each other, and a load from host memory, over the links that routes name. */
static void links_in_every_tier(void **state)
{
    (void)state;
    json_t *d = with_energy(test_description("dgx-h100", 2), "0 W", "1 W");
    json_object_del(d, "exchange");
    struct topology *t = test_build(d);
    struct moe_graph g = { .n_devices = 16 };
    struct moe_part part[16 * 16];
    struct err e = { 0 };
    int n = 0;
    double expected = 2e6 * (150 + 40) * 1e-12, seconds;
    for (int32_t s = 0; s < 16; s++)
        for (int32_t r = 0; r < 16; r++)
            if (s != r) {
                const double bytes = 1e5 * (1 + (7 * s + 3 * r) % 13);
                part[n++] = (struct moe_part){ .src = s, .dst = r, .bytes = bytes };
                expected += 2 * bytes * (s / 8 == r / 8 ? 10 : 200) * 1e-12; /* out and in */
            }
    test_parts(&g, n, part);
    test_ok(graph_load(&g, 3, topology_host(t, 0), 0, 2e6, &e), &e);
    for (int tier = NET_BOUND; tier < N_NET_TIERS; tier++)
        if (tier != NET_SIMGRID || net_simgrid_available())
            assert_near(joules(t, (enum net_tier)tier, &g, 2, &seconds), expected, 1e-9);
    graph_free(&g);
    topology_free(t);
}

/* ---- which link costs what: by their names, on every machine that ships ---- */

static double figure_of(const char *key)
{
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++)
        if (!strcmp(figures[i].key, key))
            return figures[i].figure * 1e-12;
    fail_msg("%s", key);
    return 0;
}

static double of_name(const char *name, bool unified, double memory)
{
    if (strstr(name, ".nvlink.gpu"))
        return figure_of("nvlink") + 2 * memory;
    if (strstr(name, ".nvlink"))
        return figure_of("nvlink") + memory;
    if (strstr(name, ".pcie"))
        return figure_of("pcie") + (*name == 'g' ? memory : 0);
    if (strstr(name, ".nic"))
        return figure_of("nic") + (*name == 'g' ? memory : 0);
    if (strstr(name, ".memory"))
        return unified ? memory : figure_of("host");
    return figure_of(strstr(name, ".ssd") ? "ssd" : "network");
}

static void every_link(void **state)
{
    (void)state;
    static const struct { const char *name; int nodes; const char *network; } machines[] = {
        { "dgx-a100", 2, NULL }, { "dgx-a100", 2, "mesh" }, { "dgx-a100", 2, "shared" },
        { "dgx-h100", 4, "spray" }, { "h800-ib", 8, "hash" }, { "h20", 2, NULL },
        { "gb200-nvl72", 1, NULL }, { "rtx4090-pcie4", 1, NULL }, { "rtx3090-pcie3", 1, NULL },
        { "a6000-xeon", 1, NULL }, { "jetson-tx2", 1, NULL }, { "star-50GBps", 3, NULL },
    };
    for (size_t i = 0; i < sizeof machines / sizeof *machines; i++) {
        json_t *d = test_description(machines[i].name, machines[i].nodes);
        const bool mesh = machines[i].network && !strcmp(machines[i].network, "mesh");
        if (mesh)
            json_object_set_new(json_object_get(d, "nvlink"), "kind", json_string("mesh"));
        else if (machines[i].network && !strcmp(machines[i].network, "shared")) /* behind PCIe, not in memory */
            json_object_set_new(json_object_get(d, "nic"), "shared", json_true());
        else if (machines[i].network)
            json_object_set_new(d, "network",
                                json_pack("{s:s, s:i, s:i, s:i, s:s, s:i, s:i, s:i, s:s}", "kind", "fat-tree",
                                          "nodes_per_leaf", 1, "spines", 2, "oversubscription", 1, "paths",
                                          machines[i].network, "leaves_per_pod", 2, "cores", 2,
                                          "core_oversubscription", 1, SOURCE));
        const bool unified = json_is_true(json_object_get(json_object_get(d, "host"), "unified"));
        with_energy(d, "10 W", "20 W");
        set(d, "memory", "5 pJ/B");
        struct topology *t = test_build(d);
        assert_true(t->n_links > 0);
        for (int32_t l = 0; l < t->n_links; l++) {
            const double found = t->energy->link[l], expected = of_name(t->link[l].name, unified, 5e-12);
            if (fabs(found - expected) > 1e-9 * expected)
                fail_msg("%s: %s: found %g, expected %g", machines[i].name, t->link[l].name, found, expected);
        }
        topology_free(t);
    }
}

/* Devices of two sorts; the second group's nodes have a figure of their own. */
static void groups(void **state)
{
    (void)state;
    json_t *d = with_energy(test_description("star-50GBps", 0), "100 W", "700 W");
    json_object_del(d, "nodes");
    json_object_del(d, "devices");
    json_object_set_new(d, "groups", json_pack("[{s:i, s:i}, {s:i, s:i, s:{s:s, s:s, s:s, s:s, s:s}}]", "nodes", 1,
                                               "devices", 1, "nodes", 1, "devices", 1, "energy", "idle", "50 W",
                                               "busy", "300 W", "nic", "1 nJ/B", "node", "1 kW", SOURCE));
    struct topology *t = test_build(d);
    struct moe_graph g = { 0 };
    double seconds;
    lay_out(&g);
    assert_near(joules(t, NET_EXACT, &g, 1, &seconds),
                (100 + 50 + 1000) * 31.5e-6 + 600 * 10e-6 + 250 * 20e-6 + 50e3 * (200e-12 + 1e-9), 1e-9);
    graph_free(&g);
    topology_free(t);
}

/* ---- in a run ---- */

static void in_a_run(void **state)
{
    struct scratch *s = *state;
    const uint8_t expert[] = { 0, 1, 2, 3, 1, 2, 3, 0, 0, 2, 1, 3, 2, 0, 3, 1 };
    const char *trace = test_trace(s, "energy", 2, 2, 2, 4, 2, expert);
    for (int known = 0; known < 2; known++) {
        json_t *d = test_description("dgx-h100", 1);
        struct err e = { 0 };
        json_t *spec = test_spec(known ? with_energy(d, "100 W", "700 W") : d, trace, 2, 4, 2, 1, 2);
        struct run *r = test_open_run(spec, &e);
        test_ok(run_go(r), &e);
        json_t *result = run_result(r), *m = json_object_get(result, "metrics");
        assert_int_equal(json_object_get(m, "energy_j") != NULL, known);
        assert_int_equal(json_object_get(m, "j_per_token") != NULL, known);
        assert_int_equal(json_object_get(json_object_get(result, "models"), "energy") != NULL, known);
        for (int step = 0; known && step < 2; step++) {
            const double watts = test_metric(r, METRIC_energy_j, step) / test_metric(r, METRIC_step_s, step);
            assert_true(watts > 8 * 100 && watts < 8 * 700);
            assert_near(test_metric(r, METRIC_j_per_token, step) * r->workload.n_tokens,
                        test_metric(r, METRIC_energy_j, step), 1e-12);
        }
        json_decref(result);
        test_close_run(r);
        json_decref(spec);
    }
}

/* ---- refusals ---- */

static void refused(json_t *d, const char *expected)
{
    struct topology *t = NULL;
    struct err e = { 0 };
    const int rc = topology_build(&t, d, "bad.lua", &e);
    if (rc != ERR_INPUT || strcmp(e.text, expected) != 0 || t)
        fail_msg("found %d \"%s\", expected \"%s\"", rc, e.text, expected);
    json_decref(d);
}

static void refusals(void **state)
{
    (void)state;
    static const struct { const char *key, *value, *error; } cases[] = {
        { "idle", NULL, "bad.lua: energy.idle: missing" },
        { "busy", NULL, "bad.lua: energy.busy: missing" },
        { "source", NULL, "bad.lua: energy.source: missing: every figure says where it comes from" },
        { "nvlink", NULL, "bad.lua: energy.nvlink: missing: energy is that of all links, or not told" },
        { "pcie", NULL, "bad.lua: energy.pcie: missing: energy is that of all links, or not told" },
        { "nic", NULL, "bad.lua: energy.nic: missing: energy is that of all links, or not told" },
        { "host", NULL, "bad.lua: energy.host: missing: energy is that of all links, or not told" },
        { "ssd", NULL, "bad.lua: energy.ssd: missing: energy is that of all links, or not told" },
        { "network", "1 pJ/B", "bad.lua: energy.network: the machine has no links between switches" },
        { "busy", "99 W", "bad.lua: energy.busy: found \"99 W\", expected at least energy.idle, \"100 W\"" },
        { "busy", "0 W", "bad.lua: energy.busy: found \"0 W\", expected 1 mW to 100 kW (of a device)" },
        { "busy", "700", "bad.lua: energy.busy: found \"700\": without a unit; expected a power in mW, W, kW or MW" },
        { "busy", "700 J/B", "bad.lua: energy.busy: found \"700 J/B\": an energy per byte; expected a power in mW, W, "
                             "kW or MW" },
        { "nic", "3 pJ", "bad.lua: energy.nic: found \"3 pJ\": expected an energy per byte in pJ/B, pJ/bit, nJ/B or "
                         "J/B" },
        { "nic", "-3 pJ/B", "bad.lua: energy.nic: found \"-3 pJ/B\", expected 0 J/B to 1000 nJ/B (per link)" },
        { "nic", "1 J/B", "bad.lua: energy.nic: found \"1 J/B\", expected 0 J/B to 1000 nJ/B (per link)" },
        { "fans", "1 W", "bad.lua: energy.fans: unknown key" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *d = with_energy(test_description("dgx-h100", 2), "100 W", "700 W");
        if (cases[i].value)
            set(d, cases[i].key, cases[i].value);
        else
            json_object_del(json_object_get(d, "energy"), cases[i].key);
        refused(d, cases[i].error);
    }
    json_t *d = with_energy(test_description("dgx-h100", 2), "100 W", "700 W");
    json_object_set_new(json_object_get(d, "energy"), "idle", json_integer(100));
    refused(d, "bad.lua: energy.idle: found 100 without a unit; write \"100 W\"");
    d = with_energy(test_description("star-50GBps", 2), "100 W", "700 W");
    set(d, "nvlink", "1 pJ/B");
    refused(d, "bad.lua: energy.nvlink: the machine has no such links");
    d = with_energy(test_description("star-50GBps", 0), "100 W", "700 W");
    json_object_del(d, "nodes");
    json_object_del(d, "devices");
    json_object_set_new(d, "groups", json_pack("[{s:i, s:i}, {s:i, s:i, s:b}]", "nodes", 1, "devices", 1, "nodes", 1,
                                               "devices", 1, "energy", 0));
    refused(d, "bad.lua: groups[2].energy: missing: other groups have it, and energy is that of the whole machine");
    d = with_energy(test_description("star-50GBps", 0), "100 W", "700 W");
    for (const char *const *key = (const char *const[]){ "nodes", "devices", "nic", NULL }; *key; key++)
        json_object_del(d, *key);
    json_object_del(json_object_get(d, "energy"), "nic");
    json_object_set_new(d, "platform",
                        json_pack("{s:[s,s], s:[{s:s, s:s, s:s}], s:[[s,s,s], [s,s,s]], s:s}", "hosts", "a", "b",
                                  "links", "name", "ab", "bandwidth", "50 GB/s", "latency", "1 us", "routes", "a",
                                  "b", "ab", "b", "a", "ab", SOURCE));
    refused(d, "bad.lua: energy: the links of a platform are of no sort that has joules per byte");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(by_hand_alone), cmocka_unit_test(busy_once),
        cmocka_unit_test(links_in_every_tier), cmocka_unit_test(every_link),
        cmocka_unit_test(groups), cmocka_unit_test_setup_teardown(in_a_run, scratch_make, scratch_remove),
        cmocka_unit_test(refusals),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
