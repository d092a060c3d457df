/* SPDX-License-Identifier: Apache-2.0
 * test_topology_network.c - switches above the NICs, meshes, PCIe trees, NICs that are shared, nodes that differ: every
 * route and every way of spreading flows by hand. */
#include "machine_test.h"

/* A shipped machine with tables of its own, in JSON: {"nodes": 4, "network": {...}}. */
static struct topology *machine_with(const char *name, const char *changes)
{
    json_error_t why;
    json_t *d = test_description(name, 0), *c = json_loads(changes, 0, &why), *v;
    const char *key;
    if (!c)
        fail_msg("%s: %s", changes, why.text);
    json_object_foreach(c, key, v)
    {
        json_t *there = json_object_get(d, key);
        if (json_is_object(there) && json_is_object(v))
            json_object_update(there, v);
        else if (json_is_null(v))
            json_object_del(d, key);
        else
            json_object_set(d, key, v);
    }
    json_decref(c);
    return test_build(d);
}

#define NETWORK(text) "\"network\": {\"source\": \"a test\", " text "}"

static struct topology *star(int nodes, const char *network)
{
    char changes[1000];
    snprintf(changes, sizeof changes, "{\"nodes\": %d, %s}", nodes, network);
    return machine_with("star-50GBps", changes);
}

/* Two nodes on each of four leaves, four spines, 12.5 GB/s to each: a leaf's NICs have twice what goes up. */
#define LEAF_SPINE(paths)                                                      \
    NETWORK("\"kind\": \"leaf-spine\", \"nodes_per_leaf\": 2, \"spines\": 4, " \
            "\"oversubscription\": 2, \"latency\": \"300 ns\", \"paths\": \"" paths "\"")

static void leaf_spine(void **state)
{
    (void)state;
    struct topology *t = star(8, LEAF_SPINE("hash"));
    double latency;
    assert_int_equal(t->n_links, 2 * 8 + 2 * 4 * 4);
    assert_string_equal(test_route(t, 0, 1, 0, &latency), "gpu0.nic.out gpu1.nic.in");
    assert_near(latency, 500e-9, 1e-12);
    assert_string_equal(test_route(t, 0, 2, 1, &latency), "gpu0.nic.out leaf0.spine0.out leaf1.spine0.in gpu2.nic.in");
    assert_near(latency, 1100e-9, 1e-12);
    assert_string_equal(test_route(t, 7, 1, 4, NULL), "gpu7.nic.out leaf3.spine3.out leaf0.spine3.in gpu1.nic.in");
    assert_int_equal(topology_paths(t, 0, 1), 1);
    assert_int_equal(topology_paths(t, 0, 2), 4);
    assert_int_equal(topology_paths(t, 0, topology_host(t, 0)), 0);
    assert_near(test_bandwidth(t, "leaf2.spine3.in"), 2 * 50e9 / 2 / 4, 1e-12);
    topology_free(t);
}

/* Path 0 is one of the four, the same every time; over many pairs each has its share. */
static void hashed(void **state)
{
    (void)state;
    struct topology *t = star(64, LEAF_SPINE("hash"));
    int taken[4] = { 0 }, pairs = 0;
    for (int s = 0; s < 64; s++)
        for (int d = 0; d < 64; d++) {
            if (topology_paths(t, s, d) < 4)
                continue;
            char chosen[512];
            snprintf(chosen, sizeof chosen, "%s", test_route(t, s, d, 0, NULL));
            for (int p = 1; p <= 4; p++)
                if (strcmp(chosen, test_route(t, s, d, p, NULL)) == 0) {
                    taken[p - 1]++;
                    pairs++;
                }
        }
    assert_int_equal(pairs, 64 * 62);
    for (int p = 0; p < 4; p++) /* binomial: 992 +- 27 */
        assert_true(abs(taken[p] - 992) < 110);
    topology_free(t);
}

/* 8 MB from each of leaf 0's nodes to leaf 1's: one path takes 8 MB / 12.5 GB/s; all four, 16 MB / 50 GB/s. */
static void spread(void **state)
{
    (void)state;
    static const char *const networks[] = { LEAF_SPINE("hash"), LEAF_SPINE("split"), LEAF_SPINE("spray") };
    const double latency = 1100e-9;
    for (int i = 0; i < 3; i++) {
        struct topology *t = star(8, networks[i]);
        const struct net_flow one = { .src = 0, .dst = 2, .bytes = 8e6 };
        const struct net_flow two[] = { one, { .src = 1, .dst = 3, .bytes = 8e6 } };
        struct net_flow same[] = { one, { .src = 1, .dst = 3, .bytes = 8e6 } };
        same[0].path = same[1].path = 3;
        for (enum net_tier tier = NET_BOUND; tier <= NET_EXACT; tier++) {
            assert_near(test_makespan(t, tier, &one, 1, NULL), 8e6 / (i ? 50e9 : 12.5e9) + latency, 1e-9);
            if (i > 0)
                assert_near(test_makespan(t, tier, two, 2, NULL), 16e6 / 50e9 + latency, 1e-9);
            /* Who names a path keeps it; sprayed, there is but one. */
            assert_near(test_makespan(t, tier, same, 2, NULL), (i == 2 ? 16e6 / 50e9 : 16e6 / 12.5e9) + latency, 1e-9);
        }
        if (i == 2) {
            assert_int_equal(topology_paths(t, 0, 2), 1);
            assert_string_equal(test_route(t, 0, 2, 0, NULL),
                                "gpu0.nic.out leaf0.spines.out leaf1.spines.in gpu2.nic.in");
            assert_near(test_bandwidth(t, "leaf0.spines.out"), 50e9, 1e-12);
        }
        topology_free(t);
    }
}

/* What is cut adds up, and every path carries the same from each source to each leaf, with at most three cuts. */
static void split_evenly(void **state)
{
    (void)state;
    struct topology *t = star(8, LEAF_SPINE("split"));
    struct err e = { 0 };
    size_t n, n_cut = 0;
    struct net_flow *flow = test_exchange(8, test_uneven, &n), *cut = NULL;
    assert_int_equal(topology_split(t, 0, flow, n, &cut, &n_cut, &e), 0);
    assert_non_null(cut);
    assert_true(n_cut <= n + 8 * 3 * 3);
    double sent[8][8] = { { 0 } }, on[8][4][4] = { { { 0 } } };
    for (size_t i = 0; i < n_cut; i++) {
        const struct net_flow *f = &cut[i];
        assert_true(f->bytes > 0);
        sent[f->src][f->dst] += f->bytes;
        assert_true(f->src / 2 == f->dst / 2 ? f->path == 0 : f->path >= 1 && f->path <= 4);
        if (f->path)
            on[f->src][f->dst / 2][f->path - 1] += f->bytes;
    }
    for (size_t i = 0; i < n; i++)
        assert_near(sent[flow[i].src][flow[i].dst], flow[i].bytes, 1e-12);
    for (int s = 0; s < 8; s++)
        for (int leaf = 0; leaf < 4; leaf++)
            for (int p = 1; p < 4; p++)
                assert_near(on[s][leaf][p], on[s][leaf][0], 1e-9);
    free(flow);
    free(cut);
    /* Nothing to cut in other networks. */
    topology_free(t);
    t = star(8, LEAF_SPINE("hash"));
    flow = test_exchange(8, test_uneven, &n);
    assert_int_equal(topology_split(t, 0, flow, n, &cut, &n_cut, &e), 0);
    assert_null(cut);
    free(flow);
    topology_free(t);
}

/* Two nodes to a leaf, two leaves to a pod, two spines in each, three core switches above each spine. */
#define FAT_TREE(paths)                                                              \
    NETWORK("\"kind\": \"fat-tree\", \"nodes_per_leaf\": 2, \"leaves_per_pod\": 2, " \
            "\"spines\": 2, "                                                        \
            "\"cores\": 3, \"oversubscription\": 1, \"core_oversubscription\": 4, \"paths\": \"" paths "\"")

static void fat_tree(void **state)
{
    (void)state;
    struct topology *t = star(16, FAT_TREE("hash"));
    assert_int_equal(t->n_links, 2 * 16 + 2 * 8 * 2 + 2 * 4 * 2 * 3);
    assert_int_equal(topology_paths(t, 0, 1), 1);
    assert_int_equal(topology_paths(t, 0, 2), 2);
    assert_int_equal(topology_paths(t, 0, 4), 6);
    assert_string_equal(test_route(t, 0, 2, 2, NULL), "gpu0.nic.out leaf0.spine1.out leaf1.spine1.in gpu2.nic.in");
    assert_string_equal(test_route(t, 1, 15, 4, NULL),
                        "gpu1.nic.out leaf0.spine1.out pod0.spine1.core1.out pod3.spine1.core1.in leaf7.spine1.in "
                        "gpu15.nic.in");
    assert_near(test_bandwidth(t, "leaf0.spine0.out"), 2 * 50e9 / 2, 1e-12);
    assert_near(test_bandwidth(t, "pod0.spine0.core0.out"), 2 * 50e9 / 4 / 3, 1e-12);
    topology_free(t);

    t = star(16, FAT_TREE("spray"));
    assert_string_equal(test_route(t, 1, 15, 0, NULL),
                        "gpu1.nic.out leaf0.spines.out pod0.cores.out pod3.cores.in leaf7.spines.in gpu15.nic.in");
    assert_near(test_bandwidth(t, "leaf0.spines.out"), 100e9, 1e-12);
    assert_near(test_bandwidth(t, "pod0.cores.out"), 200e9 / 4, 1e-12);
    topology_free(t);

    t = star(4096, FAT_TREE("hash")); /* links grow with devices, not with pairs */
    assert_int_equal(t->n_links, 2 * 4096 + 2 * 2048 * 2 + 2 * 1024 * 6);
    topology_free(t);
}

static void rails(void **state)
{
    (void)state;
    struct topology *t = machine_with("dgx-h100", "{\"nodes\": 4, " NETWORK("\"kind\": \"rail\"") "}");
    double latency;
    assert_string_equal(test_route(t, 3, 11, 0, NULL), "gpu3.nic.out gpu11.nic.in");
    /* PXN: to the neighbour on the other's rail first. */
    assert_string_equal(test_route(t, 0, 13, 0, &latency), "gpu0.nvlink.out gpu5.nvlink.in gpu5.nic.out gpu13.nic.in");
    assert_near(latency, 3e-6, 1e-12);
    assert_int_equal(topology_paths(t, 0, 13), 1);
    topology_free(t);

    t = machine_with("dgx-h100", "{\"nodes\": 4, " NETWORK("\"kind\": \"rail\", \"nodes_per_leaf\": 2, \"spines\": 2, "
                                                           "\"uplink\": \"100 GB/s\"") "}");
    assert_int_equal(topology_paths(t, 0, 13), 2);
    assert_string_equal(test_route(t, 3, 11, 0, NULL), "gpu3.nic.out gpu11.nic.in");
    assert_string_equal(test_route(t, 0, 13, 2, NULL), "gpu0.nic.out leaf0.spine1.out leaf5.spine1.in gpu13.nic.in");
    assert_string_equal(test_route(t, 0, 16, 1, NULL), "gpu0.nic.out leaf0.spine0.out leaf8.spine0.in gpu16.nic.in");
    topology_free(t);

    /* Rails that end after two nodes, and nothing above them; or a node without NVLink. */
    struct err e = { 0 };
    json_t *d = test_description("dgx-h100", 4);
    json_object_set_new(d, "network", json_pack("{s:s, s:i, s:s}", "kind", "rail", "nodes_per_leaf", 2, "source", "-"));
    assert_int_equal(topology_build(&t, d, "m.lua", &e), ERR_INPUT);
    assert_string_equal(e.text, "m.lua: network.spines: missing: 4 nodes on rails of 2 each cannot reach each other");
    json_object_del(json_object_get(d, "network"), "nodes_per_leaf");
    json_object_del(d, "nvlink");
    e = (struct err){ 0 };
    assert_int_equal(topology_build(&t, d, "m.lua", &e), ERR_INPUT);
    assert_string_equal(e.text, "m.lua: network.spines, nvlink: both missing: there is no way from rail to rail");
    json_decref(d);
}

static void inside_a_node(void **state)
{
    (void)state;
    int32_t link[TOPOLOGY_MAX_HOPS];
    struct topology *t = machine_with("dgx-h100", "{\"nodes\": 2, \"nvlink\": {\"kind\": \"mesh\"}}");
    assert_string_equal(test_route(t, 0, 7, 0, NULL), "gpu0.nvlink.gpu7");
    assert_string_equal(test_route(t, 15, 8, 0, NULL), "gpu15.nvlink.gpu8");
    assert_near(test_bandwidth(t, "gpu15.nvlink.gpu8"), 360e9 / 7, 1e-12);
    assert_int_equal(topology_loop(t, 3, link), 0);
    topology_free(t);

    t = machine_with("rtx4090-pcie4", "{\"devices\": 4, \"pcie\": {\"peer\": true, \"per_switch\": 2, "
                                      "\"uplink\": \"20 GB/s\"}}");
    assert_string_equal(test_route(t, 0, 1, 0, NULL), "gpu0.pcie.out gpu1.pcie.in");
    assert_string_equal(test_route(t, 1, 2, 0, NULL), "gpu1.pcie.out node0.pcie0.out node0.pcie1.in gpu2.pcie.in");
    assert_string_equal(test_route(t, topology_host(t, 0), 3, 0, NULL), "node0.memory node0.pcie1.in gpu3.pcie.in");
    /* Two copies to one switch's devices share its uplink, those to two switches do not. */
    const struct net_flow near[] = { { .src = topology_host(t, 0), .dst = 0, .bytes = 16e6 },
                                     { .src = topology_host(t, 0), .dst = 1, .bytes = 16e6 } };
    const struct net_flow far[] = { near[0], { .src = topology_host(t, 0), .dst = 2, .bytes = 16e6 } };
    assert_near(test_makespan(t, NET_EXACT, near, 2, NULL), 32e6 / (20e9 * 0.8) + 5e-6, 1e-9);
    assert_near(test_makespan(t, NET_EXACT, far, 2, NULL), 16e6 / (20e9 * 0.8) + 5e-6, 1e-9);
    topology_free(t);

    t = machine_with("dgx-h100", "{\"nodes\": 2, \"nic\": {\"per_node\": 2}}");
    assert_string_equal(test_route(t, 3, 12, 0, NULL), "gpu3.pcie.out node0.nic0.out node1.nic1.in gpu12.pcie.in");
    topology_free(t);
    t = machine_with("dgx-h100", "{\"nodes\": 2, \"nic\": {\"per_node\": 2}, \"pcie\": {\"per_switch\": 2, "
                                 "\"uplink\": \"63 GB/s\"}, \"network\": {\"kind\": \"fat-tree\", \"source\": \"-\", "
                                 "\"nodes_per_leaf\": 1, \"leaves_per_pod\": 1, \"spines\": 1, \"cores\": 1, "
                                 "\"uplink\": \"50 GB/s\", \"core_uplink\": \"50 GB/s\"}}");
    assert_string_equal(test_route(t, 3, 12, 0, NULL),
                        "gpu3.pcie.out node0.pcie1.out node0.nic0.out leaf0.spine0.out pod0.spine0.core0.out "
                        "pod1.spine0.core0.in leaf1.spine0.in node1.nic1.in node1.pcie2.in gpu12.pcie.in");
    topology_free(t);
}

/* A node with one memory for host and device: what is copied is read and written there. */
static void unified_memory(void **state)
{
    (void)state;
    json_t *d = test_description("rtx4090-pcie4", 0), *host = json_object_get(d, "host");
    json_object_del(d, "pcie");
    json_object_del(host, "memory");
    json_object_del(host, "mem_bandwidth");
    json_object_set_new(host, "unified", json_true());
    struct topology *t = test_build(d);
    assert_true(t->unified[0] && t->host_memory[0] == 24e9);
    assert_string_equal(test_route(t, topology_host(t, 0), 0, 0, NULL), "node0.memory node0.memory");
    assert_string_equal(test_route(t, topology_ssd(t, 0), topology_host(t, 0), 0, NULL), "node0.ssd node0.memory");
    const struct net_flow copy = { .src = topology_host(t, 0), .dst = 0, .bytes = 1e9 };
    assert_near(test_makespan(t, NET_EXACT, &copy, 1, NULL), 2e9 / (1.008e12 * 0.86), 1e-9);
    topology_free(t);
}

/* Two nodes of four H100s, then one of two of another sort that reach the network through one NIC. */
static void groups(void **state)
{
    (void)state;
    struct topology *t = machine_with(
        "dgx-h100",
        "{\"nodes\": null, \"devices\": null, \"groups\": [{\"nodes\": 2, \"devices\": 4}, {\"nodes\": 1, "
        "\"devices\": 2,"
        "\"nvlink\": false, \"nic\": {\"bandwidth\": \"25 GB/s\", \"latency\": \"2 us\", \"shared\": true, "
        "\"source\": \"a test\"}, \"device\": {\"name\": \"small\", \"memory\": \"24 GB\", \"mem_bandwidth\": "
        "\"1 TB/s\", \"launch_s\": 0, \"flops_efficiency\": 1, \"mem_efficiency\": 1, \"peak\": {\"fp16\": "
        "\"100 TFLOP/s\"}, \"gemm\": {\"sms\": 10, \"mma_efficiency\": 1, \"port_bandwidth\": \"50 GB/s\", "
        "\"store_bandwidth\": \"10 GB/s\", \"mem_efficiency\": 1, \"launch_s\": 0, \"overlap\": 2}, "
        "\"source\": \"a test\"}}]}");
    assert_int_equal(t->n_devices, 10);
    assert_int_equal(t->n_nodes, 3);
    assert_int_equal(t->node[3], 0);
    assert_int_equal(t->node[7], 1);
    assert_int_equal(t->node[9], 2);
    assert_int_equal(t->first_device[2], 8);
    assert_int_equal(t->first_device[3], 10);
    assert_true(t->device[7].memory == 80e9 && t->device[8].memory == 24e9);
    assert_true(t->device[9].peak[PREC_FP16] == 100e12 && t->device[9].peak[PREC_BF16] == 0);
    assert_string_equal(test_route(t, 4, 7, 0, NULL), "gpu4.nvlink.out gpu7.nvlink.in");
    assert_string_equal(test_route(t, 8, 9, 0, NULL), "gpu8.pcie.out gpu9.pcie.in");
    assert_string_equal(test_route(t, 1, 9, 0, NULL), "gpu1.nic.out node2.nic.in gpu9.pcie.in");
    assert_string_equal(test_route(t, 9, 4, 0, NULL), "gpu9.pcie.out node2.nic.out gpu4.nic.in");
    assert_string_equal(test_route(t, topology_host(t, 2), 9, 0, NULL), "node2.memory gpu9.pcie.in");
    assert_string_equal(test_route(t, topology_host(t, 1), 9, 0, NULL), "none");
    assert_near(test_bandwidth(t, "node2.nic.in"), 25e9, 1e-12);

    struct err e = { 0 };
    assert_int_equal(topology_computes(t, PREC_BF16, &e), ERR_INPUT);
    assert_string_equal(e.text, "machine dgx-h100 has no figure for precision bf16: device 8, small, computes in fp16");
    topology_free(t);

    json_t *d = test_description("dgx-h100", 0);
    json_object_del(d, "nodes");
    json_object_del(d, "devices");
    json_object_set_new(
        d, "groups",
        json_pack("[{s:i,s:i},{s:i,s:i,s:b}]", "nodes", 1, "devices", 8, "nodes", 1, "devices", 8, "nic", 0));
    e = (struct err){ 0 };
    assert_int_equal(topology_build(&t, d, "m.lua", &e), ERR_INPUT);
    assert_string_equal(e.text, "m.lua: groups[2].nic: missing: 2 nodes cannot reach each other without one");
    json_decref(d);
}

/* One group says what the top says: same links, same routes. */
static void group_of_all(void **state)
{
    (void)state;
    struct topology *a = test_machine("dgx-h100", 2);
    struct topology *b = machine_with("dgx-h100", "{\"nodes\": null, \"devices\": null, "
                                                  "\"groups\": [{\"nodes\": 2, \"devices\": 8}]}");
    assert_int_equal(a->n_links, b->n_links);
    for (int32_t l = 0; l < a->n_links; l++) {
        assert_string_equal(a->link[l].name, b->link[l].name);
        assert_true(a->link[l].bandwidth == b->link[l].bandwidth && a->link[l].latency == b->link[l].latency);
    }
    topology_free(a);
    topology_free(b);
}

/* The way back crosses the same wires the other way: what a link's name says with out and in exchanged. */
static void there_and_back(void **state)
{
    (void)state;
    const char *const networks[] = { LEAF_SPINE("hash"), LEAF_SPINE("spray"), FAT_TREE("hash"), FAT_TREE("spray") };
    for (size_t i = 0; i < sizeof networks / sizeof *networks; i++) {
        struct topology *t = star(16, networks[i]);
        for (int32_t s = 0; s < 16; s++)
            for (int32_t d = 0; d < 16; d++)
                for (int32_t p = 1; s != d && p <= topology_paths(t, s, d); p++) {
                    int32_t go[TOPOLOGY_MAX_HOPS], back[TOPOLOGY_MAX_HOPS];
                    const int n = topology_route(t, s, d, p, go, NULL);
                    assert_int_equal(topology_route(t, d, s, p, back, NULL), n);
                    for (int h = 0; h < n; h++) {
                        const char *name = t->link[go[h]].name, *other = t->link[back[n - 1 - h]].name;
                        const size_t stem = (size_t)(strrchr(name, '.') - name);
                        assert_int_equal(strncmp(name, other, stem + 1), 0);
                        assert_string_equal(name + stem, h < n / 2 ? ".out" : ".in");
                        assert_string_equal(other + stem, h < n / 2 ? ".in" : ".out");
                    }
                }
        topology_free(t);
    }
}

/* The tiers agree on every network as they do on the star, several exchanges at once included. */
static void tiers_agree(void **state)
{
    (void)state;
    const char *const networks[] = { LEAF_SPINE("hash"), LEAF_SPINE("split"), LEAF_SPINE("spray"),
                                     FAT_TREE("hash"),   FAT_TREE("split"),   FAT_TREE("spray") };
    for (size_t i = 0; i < sizeof networks / sizeof *networks; i++) {
        struct topology *t = star(16, networks[i]);
        size_t n, n_even;
        struct net_flow *flow = test_exchange(16, test_uneven, &n), *even = test_exchange(16, test_uniform, &n_even);
        const double exact = test_makespan(t, NET_EXACT, flow, n, NULL),
                     bound = test_makespan(t, NET_BOUND, flow, n, NULL);
        assert_true(bound <= exact * (1 + 1e-9));
        assert_true(bound > 0.5 * exact);
        assert_near(test_makespan(t, NET_FLOW, flow, n, NULL), exact, 2e-3);
        if (net_simgrid_available())
            assert_near(test_makespan(t, NET_SIMGRID, flow, n, NULL), exact, 1e-6);
        for (size_t k = 0; k < n_even; k++) /* paths of the policies' choice, of sizes that differ */
            even[k].path = (int32_t)(k % 7), even[k].bytes *= 1 + (double)(k % 5);
        if (net_simgrid_available())
            assert_near(test_makespan(t, NET_SIMGRID, even, n_even, NULL),
                        test_makespan(t, NET_EXACT, even, n_even, NULL), 1e-6);

        struct net_done done[64];
        double last[2] = { 0 };
        for (int k = 0; k < 2; k++) {
            struct net *net = test_net(t, k ? NET_EXACT : NET_FLOW);
            test_start(net, 0, 1, flow, n);
            test_start(net, 0.3 * exact, 2, even, n_even);
            const size_t got = test_drain(net, done, 64);
            assert_int_equal(got, 32);
            last[k] = done[got - 1].time;
            net_close(net);
        }
        assert_near(last[0], last[1], 2e-3);
        assert_true(last[1] > exact);
        free(flow);
        free(even);
        topology_free(t);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(leaf_spine),    cmocka_unit_test(hashed),         cmocka_unit_test(spread),
        cmocka_unit_test(split_evenly),  cmocka_unit_test(fat_tree),       cmocka_unit_test(rails),
        cmocka_unit_test(inside_a_node), cmocka_unit_test(unified_memory), cmocka_unit_test(groups),
        cmocka_unit_test(tiers_agree),   cmocka_unit_test(group_of_all),   cmocka_unit_test(there_and_back),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
