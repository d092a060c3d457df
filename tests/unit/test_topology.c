/* SPDX-License-Identifier: Apache-2.0
 * test_topology.c - the shipped machine files, routes, and what a wrong description is told. */
#include "machine_test.h"

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
        { "star-50GBps", 8, 8, 989.4e12, 80e9 }, { "h20", 8, 1, 148e12, 96e9 },
        { "h200", 8, 1, 989.4e12, 141e9 },       { "gb200-nvl72", 72, 1, 2.5e15, 186e9 },
        { "rtx3090-pcie3", 1, 1, 71e12, 24e9 },  { "a6000-xeon", 1, 1, 154.8e12, 48e9 },
        { "jetson-tx2", 1, 1, 0, 8e9 },
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

/* What a device cannot compute in is refused by name, with what it can. */
static void precisions(void **state)
{
    (void)state;
    struct topology *t = test_machine("jetson-tx2", 0);
    struct err e = { 0 };
    assert_int_equal(topology_computes(t, PREC_FP16, &e), 0);
    assert_int_equal(topology_computes(t, PREC_BF16, &e), ERR_INPUT);
    assert_string_equal(e.text, "machine jetson-tx2 has no figure for precision bf16: device 0, Tegra X2 (GP10B), "
                                "computes in fp32, fp16");
    topology_free(t);
}

/* A computer that takes twice as long for what its processors do; moves, which memory limits, and files stay. */
static void pace(void **state)
{
    struct err e = { 0 };
    struct topology *t = test_machine("dgx-h100", 1), *slow = NULL;
    json_t *d = test_description("dgx-h100", 1);
    (void)state;
    json_object_set_new(d, "pace", json_real(2));
    json_object_set_new(d, "probe_s", json_real(0.001));
    assert_int_equal(topology_build(&slow, d, "file", &e), 0);
    assert_true(t->pace == 1 && t->probe_s == 0 && slow->pace == 2 && slow->probe_s == 0.001);
    const struct gemm_group g = { 300, 4096, 4096 };
    const struct gemm_bytes b = { 2, 2, 2 };
    assert_near(compute_gemm(&slow->device[0], PREC_BF16, 1, &g, &b),
                2 * compute_gemm(&t->device[0], PREC_BF16, 1, &g, &b), 1e-12);
    assert_near(compute_plain(&slow->device[0], PREC_BF16, 1e13, 0),
                2 * compute_plain(&t->device[0], PREC_BF16, 1e13, 0), 1e-12);
    const double launch = t->device[0].launch_s;
    assert_near(compute_plain(&slow->device[0], PREC_BF16, 0, 1e9) - 2 * launch,
                compute_plain(&t->device[0], PREC_BF16, 0, 1e9) - launch, 1e-9);
    assert_near(slow->exchange.startup, 2 * t->exchange.startup, 1e-12);
    for (int32_t l = 0; l < t->n_links; l++) {
        const double twice = strstr(t->link[l].name, "nvlink") ? 2 : 1;
        assert_near(t->link[l].bandwidth, twice * slow->link[l].bandwidth, 1e-12);
    }
    json_object_set_new(d, "pace", json_real(0));
    topology_free(slow);
    assert_int_equal(topology_build(&slow, d, "file", &e), ERR_INPUT);
    assert_non_null(strstr(e.text, "pace"));
    json_decref(d);
    topology_free(t);
}

static void link_figures(void **state)
{
    (void)state;
    struct topology *t = test_machine("h800-ib", 2);
    assert_near(test_bandwidth(t, "gpu15.nvlink.in"), 160e9, 1e-12);
    assert_near(test_bandwidth(t, "gpu3.nic.out"), 50e9, 1e-12);
    assert_near(test_bandwidth(t, "gpu0.pcie.in"), 53.55e9, 1e-12);
    assert_near(t->host_mem_bandwidth[1], 563.2e9, 1e-12);
    assert_near(test_bandwidth(t, "node1.memory"), 0.8 * 563.2e9, 1e-12);
    assert_int_equal(json_integer_value(json_object_get(t->description, "nodes")), 2);
    /* What was not given is in the description, for the manifest. */
    const json_t *nic = json_object_get(t->description, "nic");
    assert_true(json_real_value(json_object_get(nic, "efficiency")) == 1);
    assert_true(json_is_false(json_object_get(nic, "shared")));
    topology_free(t);
}

/* Two GPUs of a DGX A100 share their switch's way to the host, others do not wait for them; NICs are beside it. */
static void pcie_tree(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-a100", 2);
    struct net_flow load[] = { { .src = topology_host(t, 0), .dst = 4, .bytes = 1e9 },
                               { .src = topology_host(t, 0), .dst = 5, .bytes = 1e9 },
                               { .src = topology_host(t, 0), .dst = 6, .bytes = 1e9 },
                               { .src = 4, .dst = 12, .bytes = 1e9 } };
    assert_string_equal(test_route(t, topology_host(t, 0), 5, 0, NULL),
                        "node0.memory node0.pcie2.in gpu5.pcie.in");
    assert_string_equal(test_route(t, 4, 12, 0, NULL), "gpu4.nic.out gpu12.nic.in");
    assert_near(test_makespan(t, NET_EXACT, load, 2, NULL), 2 / 25.2 + 2e-6, 1e-9);
    load[1] = load[2];
    assert_near(test_makespan(t, NET_EXACT, load, 2, NULL), 1 / 25.2 + 2e-6, 1e-9);
    load[1] = load[3];
    assert_near(test_makespan(t, NET_EXACT, load, 2, NULL), 1 / 25.0 + 2e-6, 1e-9);
    topology_free(t);
}

static void routes_nvlink(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 4);
    double latency;
    assert_int_equal(t->n_devices, 32);
    assert_string_equal(test_route(t, 5, 5, 0, &latency), "");
    assert_string_equal(test_route(t, 0, 7, 0, &latency), "gpu0.nvlink.out gpu7.nvlink.in");
    assert_near(latency, 1e-6, 1e-12);
    assert_string_equal(test_route(t, 7, 8, 0, &latency), "gpu7.nic.out gpu8.nic.in");
    assert_near(latency, 2e-6, 1e-12);
    assert_string_equal(test_route(t, topology_host(t, 1), 9, 0, &latency), "node1.memory gpu9.pcie.in");
    assert_near(latency, 2e-6, 1e-12);
    assert_string_equal(test_route(t, 9, topology_host(t, 1), 0, NULL), "gpu9.pcie.out node1.memory");
    assert_string_equal(test_route(t, topology_ssd(t, 3), topology_host(t, 3), 0, NULL), "node3.ssd node3.memory");
    assert_string_equal(test_route(t, topology_host(t, 0), 9, 0, NULL), "none");
    assert_string_equal(test_route(t, topology_host(t, 0), topology_host(t, 1), 0, NULL), "none");
    assert_string_equal(test_route(t, topology_ssd(t, 0), 0, 0, NULL), "none");
    assert_string_equal(test_route(t, 0, topology_ssd(t, 0), 0, NULL), "none");
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
    assert_string_equal(test_route(t, 0, 3, 0, &latency), "gpu0.pcie.out node0.memory node0.memory gpu3.pcie.in");
    assert_near(latency, 10e-6, 1e-12);
    topology_free(t);

    json_object_set_new(pcie, "peer", json_true());
    t = test_build(json_incref(d));
    assert_string_equal(test_route(t, 0, 3, 0, NULL), "gpu0.pcie.out gpu3.pcie.in");
    topology_free(t);

    json_object_set_new(pcie, "uplink", json_string("32 GB/s"));
    json_object_set_new(d, "nodes", json_integer(2));
    json_object_set_new(
        d, "nic",
        json_pack("{s:s,s:s,s:b,s:s}", "bandwidth", "12.5 GB/s", "latency", "3 us", "shared", 1, "source", "a test"));
    t = test_build(d);
    assert_string_equal(test_route(t, topology_host(t, 1), 6, 0, NULL), "node1.memory node1.pcie.in gpu6.pcie.in");
    assert_string_equal(test_route(t, 1, 6, 0, &latency), "gpu1.pcie.out node0.nic.out node1.nic.in gpu6.pcie.in");
    assert_near(latency, 13e-6, 1e-12);
    topology_free(t);
}

static void many_devices(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 4096);
    assert_int_equal(t->n_links, 2 * 4096);
    assert_string_equal(test_route(t, 4095, 17, 0, NULL), "gpu4095.nic.out gpu17.nic.in");
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
        { "device.peak", "{}", "m.lua: device.peak: empty, expected a rate for one precision or more" },
        { "device.gemm", "", "m.lua: device.gemm: missing" },
        { "device", "", "m.lua: device: missing" },
        { "device", "3", "m.lua: device: found 3, expected a table" },
        { "name", "7", "m.lua: name: found 7, expected a string" },
        { "summary", "", "m.lua: summary: missing" },
        { "nodes", "0", "m.lua: nodes: found 0, expected a whole number from 1 to 65536 (nodes)" },
        { "nodes", "1.5", "m.lua: nodes: found 1.5, expected a whole number" },
        { "nodes", "60000", "m.lua: nodes: found 60000 nodes of 8 devices, expected at most 65536 devices in all" },
        { "device.memory", "-80e9",
          "m.lua: device.memory: found -80000000000 without a unit; expected a size in B, kB, MB, GB or TB" },
        { "device.memory", "\"-80 GB\"", "m.lua: device.memory: found \"-80 GB\", expected 1 MB to 100000 TB" },
        { "device.memory", "\"80 GiB\"", "m.lua: device.memory: found \"80 GiB\": binary; write \"85.9 GB\"" },
        { "device.memory", "\"80 GB/s\"", "m.lua: device.memory: found \"80 GB/s\": a bandwidth; expected a size" },
        { "nvlink.bandwidth", "450",
          "m.lua: nvlink.bandwidth: found 450 without a unit: \"450 MB/s\", \"450 GB/s\" or \"450 TB/s\"?" },
        { "nic.bandwidth", "50e9", "m.lua: nic.bandwidth: found 50000000000 without a unit; write \"50 GB/s\"" },
        { "nic.bandwidth", "\"400 Gb/s\"", "m.lua: nic.bandwidth: found \"400 Gb/s\": bits; write \"50 GB/s\"" },
        { "nic.bandwidth", "\"400 Gbps\"", "m.lua: nic.bandwidth: found \"400 Gbps\": bits; write \"50 GB/s\"" },
        { "nic.bandwidth", "\"50 GB\"", "m.lua: nic.bandwidth: found \"50 GB\": a size; expected a bandwidth in B/s" },
        { "nic.bandwidth", "\"0 GB/s\"",
          "m.lua: nic.bandwidth: found \"0 GB/s\", expected 1 MB/s to 10000 TB/s (each way)" },
        { "nic.bandwidth", "\"-5 GB/s\"", "m.lua: nic.bandwidth: found \"-5 GB/s\", expected 1 MB/s to 10000 TB/s" },
        { "device.gemm.port_bandwidth", "106e9",
          "m.lua: device.gemm.port_bandwidth: found 106000000000 without a unit; write \"106 GB/s\"" },
        { "device.peak.fp8", "2e15", "m.lua: device.peak.fp8: found 2e+15 without a unit; write \"2 PFLOP/s\"" },
        { "nic.latency", "-1", "m.lua: nic.latency: found -1 without a unit; expected a time in ns, us, ms or s" },
        { "exchange.startup", "32",
          "m.lua: exchange.startup: found 32 without a unit: \"32 ns\", \"32 us\" or \"32 ms\"?" },
        { "nic.bandwidth", "\"50 kb/s\"", "m.lua: nic.bandwidth: found \"50 kb/s\": bits, and too little" },
        { "name", "\"a\\u001b[31mb\"",
          "m.lua: name: found the string \"a?[31mb\", expected a string without control characters" },
        { "nic.latency", "5e-7", "m.lua: nic.latency: found 5e-07 without a unit; write \"500 ns\"" },
        { "nic.latency", "\"-1 us\"", "m.lua: nic.latency: found \"-1 us\", expected 0 s to 1 s (from NIC to NIC)" },
        { "device.launch_s", "\"2 us\"", "m.lua: device.launch_s: found the string \"2 us\", expected a number" },
        { "nvlink.kind", "\"ring\"", "m.lua: nvlink.kind: found the string \"ring\", expected one of switch|mesh" },
        { "nic.per_node", "3", "m.lua: nic.per_node: found 3, expected a divisor of the node's 8 devices" },
        { "pcie.per_switch", "2", "m.lua: pcie.uplink: missing: with per_switch, a switch's devices share one" },
        { "host.memory", "", "m.lua: host.memory: missing" },
        { "host.unified", "true", "m.lua: host.memory: the memory is unified, and the device's memory counts" },
        { "network", "{\"kind\": \"torus\"}", "m.lua: network.kind: found the string \"torus\", expected one of" },
        { "network", "{\"kind\": \"leaf-spine\", \"source\": \"x\"}", "m.lua: network.nodes_per_leaf: missing" },
        { "network", "{\"kind\": \"rail\", \"source\": \"x\", \"cores\": 2}",
          "m.lua: network.cores: a network of kind rail has none" },
        { "network", "{\"kind\": \"leaf-spine\", \"source\": \"x\", \"nodes_per_leaf\": 2, \"spines\": 4}",
          "m.lua: network.uplink, network.oversubscription: found neither, expected one of them" },
        { "groups", "[{\"nodes\": 1, \"devices\": 8}]",
          "m.lua: nodes: each of the machine's groups says how many it has" },
        { "groups", "{\"nodes\": 1}", "m.lua: groups: found a table, expected a list of tables" },
        { "slow", "[{\"device\": 8, \"factor\": 2, \"at\": \"0 s\"}]",
          "m.lua: slow[1].device: found 8, expected 0 to 7" },
        { "slow", "[{\"device\": 1, \"factor\": 0.5, \"at\": \"0 s\"}]",
          "m.lua: slow[1].factor: found 0.5, expected a number from 1 to 1e+06 (times as long)" },
        { "slow", "[{\"device\": 1, \"factor\": 2, \"at\": \"-1 ms\"}]",
          "m.lua: slow[1].at: found \"-1 ms\", expected 0 s to" },
        { "faults", "[{\"link\": \"gpu3.nvlnk\", \"at\": \"0 s\"}]",
          "m.lua: faults[1].link: dgx-h100 has no link \"gpu3.nvlnk\"; did you mean \"gpu3.nvlink.in\"?" },
        { "faults", "[{\"link\": \"gpu3.nvlink\", \"at\": \"0 s\", \"factor\": 1.5}]",
          "m.lua: faults[1].factor: found 1.5, expected a number from 0 to 1" },
        { "faults", "[{\"at\": \"0 s\"}]", "m.lua: faults[1]: names neither, expected a link or a device" },
        { "faults", "[{\"device\": 9, \"at\": \"0 s\"}]", "m.lua: faults[1].device: found 9, expected 0 to 7" },
        { "faults", "[{\"device\": 1}]", "m.lua: faults[1].at: missing" },
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
        cmocka_unit_test(shipped_files), cmocka_unit_test(precisions),
        cmocka_unit_test(pace),          cmocka_unit_test(link_figures),
        cmocka_unit_test(pcie_tree),
        cmocka_unit_test(routes_nvlink), cmocka_unit_test(routes_pcie),   cmocka_unit_test(many_devices),
        cmocka_unit_test(refused),       cmocka_unit_test(missing_links),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
