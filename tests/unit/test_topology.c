/* SPDX-License-Identifier: Apache-2.0
 * test_topology.c - the shipped machine files, routes, and what a wrong description is told. */
#include "machine_test.h"

/* "gpu0.nvlink.out gpu1.nvlink.in", or "none" when there is no way. */
static const char *route_text(const struct topology *t, int32_t src, int32_t dst, double *latency)
{
    static char text[512];
    int32_t link[TOPOLOGY_MAX_HOPS];
    int n = topology_route(t, src, dst, 0, link, latency);
    snprintf(text, sizeof text, "%s", n < 0 ? "none" : "");
    for (int i = 0; i < n; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", i ? " " : "", t->link[link[i]].name);
    return text;
}

static double bandwidth_of(const struct topology *t, const char *name)
{
    for (int32_t l = 0; l < t->n_links; l++)
        if (strcmp(t->link[l].name, name) == 0)
            return t->link[l].bandwidth;
    fail_msg("%s has no link %s", t->name, name);
    return 0;
}

static void shipped_files(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int devices, nodes;
        double bf16, memory;
    } expected[] = {
        { "dgx-h100", 8, 1, 989.4e12, 80e9 },    { "h800-ib", 8, 1, 989.4e12, 80e9 },
        { "dgx-a100", 8, 1, 312e12, 80e9 },      { "rtx4090-pcie4", 1, 1, 165.2e12, 24e9 },
        { "star-50GBps", 8, 8, 989.4e12, 80e9 },
    };
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++) {
        struct topology *t = test_machine(expected[i].name, 0);
        assert_string_equal(t->name, expected[i].name);
        assert_int_equal(t->n_devices, expected[i].devices);
        assert_int_equal(t->n_nodes, expected[i].nodes);
        assert_true(t->device[t->n_devices - 1].peak[PREC_BF16] == expected[i].bf16);
        assert_true(t->device[0].memory == expected[i].memory);
        for (int32_t l = 0; l < t->n_links; l++)
            assert_true(t->link[l].bandwidth > 0 && t->link[l].latency >= 0);
        topology_free(t);
    }
}

static void link_figures(void **state)
{
    (void)state;
    struct topology *t = test_machine("h800-ib", 2);
    assert_near(bandwidth_of(t, "gpu15.nvlink.in"), 160e9, 1e-12);
    assert_near(bandwidth_of(t, "gpu3.nic.out"), 50e9, 1e-12);
    assert_near(bandwidth_of(t, "gpu0.pcie.in"), 53.55e9, 1e-12);
    assert_near(t->host_mem_bandwidth[1], 614.4e9, 1e-12);
    assert_int_equal(json_integer_value(json_object_get(t->description, "nodes")), 2);
    /* What was not given is in the description, for the manifest. */
    const json_t *nic = json_object_get(t->description, "nic");
    assert_true(json_real_value(json_object_get(nic, "efficiency")) == 1);
    assert_true(json_is_false(json_object_get(nic, "shared")));
    topology_free(t);
}

static void routes_nvlink(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 4);
    double latency;
    assert_int_equal(t->n_devices, 32);
    assert_string_equal(route_text(t, 5, 5, &latency), "");
    assert_string_equal(route_text(t, 0, 7, &latency), "gpu0.nvlink.out gpu7.nvlink.in");
    assert_near(latency, 1e-6, 1e-12);
    assert_string_equal(route_text(t, 7, 8, &latency), "gpu7.nic.out gpu8.nic.in");
    assert_near(latency, 2e-6, 1e-12);
    assert_string_equal(route_text(t, topology_host(t, 1), 9, &latency), "node1.memory gpu9.pcie.in");
    assert_near(latency, 2e-6, 1e-12);
    assert_string_equal(route_text(t, 9, topology_host(t, 1), NULL), "gpu9.pcie.out node1.memory");
    assert_string_equal(route_text(t, topology_ssd(t, 3), topology_host(t, 3), NULL), "node3.ssd node3.memory");
    assert_string_equal(route_text(t, topology_host(t, 0), 9, NULL), "none");
    assert_string_equal(route_text(t, topology_host(t, 0), topology_host(t, 1), NULL), "none");
    assert_string_equal(route_text(t, topology_ssd(t, 0), 0, NULL), "none");
    assert_string_equal(route_text(t, 0, topology_ssd(t, 0), NULL), "none");
    topology_free(t);
}

static void routes_pcie(void **state)
{
    (void)state;
    double latency;
    json_t *d = test_description("rtx4090-pcie4", 0);
    json_object_set_new(d, "devices", json_integer(4));
    json_t *pcie = json_object_get(d, "pcie");
    struct topology *t = test_build(json_incref(d));
    assert_string_equal(route_text(t, 0, 3, &latency), "gpu0.pcie.out node0.memory node0.memory gpu3.pcie.in");
    assert_near(latency, 10e-6, 1e-12);
    topology_free(t);

    json_object_set_new(pcie, "peer", json_true());
    t = test_build(json_incref(d));
    assert_string_equal(route_text(t, 0, 3, NULL), "gpu0.pcie.out gpu3.pcie.in");
    topology_free(t);

    json_object_set_new(pcie, "uplink", json_real(32e9));
    json_object_set_new(d, "nodes", json_integer(2));
    json_object_set_new(
        d, "nic",
        json_pack("{s:f,s:f,s:b,s:s}", "bandwidth", 12.5e9, "latency", 3e-6, "shared", 1, "source", "a test"));
    t = test_build(d);
    assert_string_equal(route_text(t, topology_host(t, 1), 6, NULL), "node1.memory node1.pcie.in gpu6.pcie.in");
    assert_string_equal(route_text(t, 1, 6, &latency), "gpu1.pcie.out node0.nic.out node1.nic.in gpu6.pcie.in");
    assert_near(latency, 13e-6, 1e-12);
    topology_free(t);
}

static void many_devices(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 4096);
    assert_int_equal(t->n_links, 2 * 4096);
    assert_string_equal(route_text(t, 4095, 17, NULL), "gpu4095.nic.out gpu17.nic.in");
    topology_free(t);
}

/* ---- what is refused ---- */

/* Sets (or, for "", removes) the value at "a.b" of dgx-h100 and returns the error's text. */
static const char *refusal(const char *path, const char *value)
{
    static struct err e;
    struct topology *t = NULL;
    json_t *d = test_description("dgx-h100", 0), *at = d;
    char table[64];
    const char *key = path;
    for (const char *dot; (dot = strchr(key, '.')); key = dot + 1) {
        snprintf(table, sizeof table, "%.*s", (int)(dot - key), key);
        at = json_object_get(at, table);
    }
    if (*value)
        json_object_set_new(at, key, json_loads(value, JSON_DECODE_ANY, NULL));
    else
        json_object_del(at, key);
    e = (struct err){ 0 };
    int rc = topology_build(&t, d, "m.lua", &e);
    json_decref(d);
    if (rc == 0)
        fail_msg("%s = %s was accepted", path, value);
    assert_int_equal(rc, ERR_INPUT);
    assert_null(t);
    return e.text;
}

static void refused(void **state)
{
    (void)state;
    static const struct {
        const char *path, *value, *text;
    } cases[] = {
        { "device.mem_bandwith", "1e12", "m.lua: device.mem_bandwith: unknown key, did you mean \"mem_bandwidth\"?" },
        { "nvlnk", "{}", "m.lua: nvlnk: unknown key, did you mean \"nvlink\"?" },
        { "device.peak.bf61", "1e15", "m.lua: device.peak.bf61: unknown key, did you mean \"bf16\"?" },
        { "device.peak.bf16", "", "m.lua: device.peak.bf16: missing" },
        { "device", "", "m.lua: device: missing" },
        { "device", "3", "m.lua: device: found 3, expected a table" },
        { "name", "7", "m.lua: name: found 7, expected a string" },
        { "summary", "", "m.lua: summary: missing" },
        { "nodes", "0", "m.lua: nodes: found 0, expected a whole number from 1 to 65536 (nodes)" },
        { "nodes", "1.5", "m.lua: nodes: found 1.5, expected a whole number" },
        { "nodes", "60000", "m.lua: nodes: found 60000 nodes of 8 devices, expected at most 65536 devices in all" },
        { "device.memory", "-80e9", "m.lua: device.memory: found -80000000000, expected a number from 1e+06" },
        { "device.memory", "\"80 GB\"", "m.lua: device.memory: found the string \"80 GB\", expected a number" },
        { "nvlink.bandwidth", "450", "m.lua: nvlink.bandwidth: found 450, expected a number from 1e+06 to 1e+16 (B/s" },
        { "nic.latency", "-1", "m.lua: nic.latency: found -1, expected" },
        { "pcie.peer", "1", "m.lua: pcie.peer: found 1, expected true or false" },
        { "nvlink.efficiency", "1.2", "m.lua: nvlink.efficiency: found 1.2, expected a number from 0.01 to 1" },
        { "nvlink.source", "", "m.lua: nvlink.source: missing: every figure says where it comes from" },
        { "device.source", "\"\"", "m.lua: device.source: found the string \"\", expected a string" },
        { "host.assumed", "[]", "m.lua: host.assumed: found a list, expected a string" },
        { "pcie", "", "m.lua: pcie: missing: the host cannot reach its devices without it" },
        { "host", "", "m.lua: host: missing: an ssd is read into host memory" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *text = refusal(cases[i].path, cases[i].value);
        if (strncmp(text, cases[i].text, strlen(cases[i].text)) != 0)
            fail_msg("%s = %s: found \"%s\", expected \"%s\"", cases[i].path, cases[i].value, text, cases[i].text);
    }
}

static const char *refused_without(const char *machine, int nodes, int devices, const char *const *gone)
{
    static struct err e;
    struct topology *t = NULL;
    json_t *d = test_description(machine, nodes);
    json_object_set_new(d, "devices", json_integer(devices));
    for (; *gone; gone++)
        json_object_del(d, *gone);
    e = (struct err){ 0 };
    assert_int_equal(topology_build(&t, d, "m.lua", &e), ERR_INPUT);
    json_decref(d);
    return e.text;
}

static void missing_links(void **state)
{
    (void)state;
    const char *const nic[] = { "nic", NULL }, *const inside[] = { "nvlink", "pcie", "host", "ssd", NULL };
    const char *const host[] = { "host", "ssd", NULL };
    assert_string_equal(refused_without("dgx-h100", 2, 8, nic),
                        "m.lua: nic: missing: 2 nodes cannot reach each other without one");
    assert_string_equal(refused_without("dgx-h100", 1, 8, inside),
                        "m.lua: nvlink, pcie: both missing: a node's 8 devices cannot reach each other");
    assert_string_equal(refused_without("rtx4090-pcie4", 1, 2, host),
                        "m.lua: host: missing: with pcie.peer = false devices meet in host memory");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shipped_files), cmocka_unit_test(link_figures), cmocka_unit_test(routes_nvlink),
        cmocka_unit_test(routes_pcie),   cmocka_unit_test(many_devices), cmocka_unit_test(refused),
        cmocka_unit_test(missing_links),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
