/* SPDX-License-Identifier: Apache-2.0
 * test_platform.c - machines with explicit links and routes: written down, and imported from SimGrid's XML. */
#include "machine_test.h"
#include "platform.h"

#include <sys/stat.h>
#include <unistd.h>

/* Three hosts; a and b have a cable that both ways share, c hangs on b by a link each way. Nobody computes. */
static const char three[] =
    "{ 'name': 'three', 'summary': 'a test', 'platform': {"
    "  'hosts': ['a', 'b', 'c'], 'source': 'a test',"
    "  'links': [ { 'name': 'cable', 'bandwidth': '2 GB/s', 'latency': '3 us' },"
    "             { 'name': 'up', 'bandwidth': '1 GB/s', 'latency': '500 ns' },"
    "             { 'name': 'down', 'bandwidth': '4 GB/s', 'latency': '0 s' } ],"
    "  'routes': [ ['a', 'b', 'cable'], ['b', 'a', 'cable'], ['a', 'c', 'cable', 'down'],"
    "              ['c', 'a', 'up', 'cable'], ['b', 'c', 'down'], ['c', 'b', 'up'] ] } }";

/* JSON with ' for ", and the first `old` replaced. */
static json_t *parse(const char *text, const char *old, const char *new)
{
    char plain[4096];
    json_error_t why;
    const char *at = *old ? strstr(text, old) : text;
    assert_non_null(at);
    snprintf(plain, sizeof plain, "%.*s%s%s", (int)(at - text), text, new, at + strlen(old));
    for (char *c = plain; *c; c++)
        if (*c == '\'')
            *c = '"';
    json_t *o = json_loads(plain, 0, &why);
    if (!o)
        fail_msg("%s: %s", plain, why.text);
    return o;
}

static void by_hand(void **state)
{
    (void)state;
    struct topology *t = test_build(parse(three, "", ""));
    double latency, finish[16] = { 0 };
    assert_int_equal(t->n_devices, 3);
    assert_int_equal(t->n_nodes, 3);
    assert_string_equal(test_route(t, 0, 2, 0, &latency), "cable down");
    assert_near(latency, 3e-6, 1e-12);
    assert_string_equal(test_route(t, 2, 0, 0, &latency), "up cable");
    assert_near(latency, 3.5e-6, 1e-12);
    assert_string_equal(test_route(t, 1, 1, 0, NULL), "");
    assert_string_equal(test_route(t, 0, topology_host(t, 0), 0, NULL), "none");
    assert_int_equal(topology_paths(t, 0, 2), 1);
    int32_t link[TOPOLOGY_MAX_HOPS];
    assert_int_equal(topology_loop(t, 0, link), 0);

    /* Both ways share the cable: 2 GB/s for 1 MB there and 3 MB back. First 1 GB/s each, until 1 ms; then the rest of
     * the way back has the cable alone: 2 MB more take 1 ms. */
    const struct net_flow both[] = { { 0, 1, 1e6 }, { 1, 0, 3e6 } };
    assert_near(test_makespan(t, NET_EXACT, both, 2, finish), 2e-3 + 3e-6, 1e-9);
    assert_near(finish[1], 1e-3 + 3e-6, 1e-9);
    /* c's way up binds, and leaves the cable 1 GB/s for b. */
    const struct net_flow up[] = { { 2, 0, 1e6 }, { 1, 0, 1e6 } };
    assert_near(test_makespan(t, NET_EXACT, up, 2, NULL), 1e-3 + 3.5e-6, 1e-9);
    topology_free(t);
}

static void shapes(void **state)
{
    (void)state;
    struct topology *t = test_build(parse(three, "'platform'", "'devices': 3, 'platform'"));
    assert_int_equal(t->n_nodes, 1);
    assert_int_equal(t->node[2], 0);
    assert_int_equal(json_integer_value(json_object_get(t->description, "nodes")), 1); /* for the manifest */
    topology_free(t);
    t = test_build(parse(three, "'platform'", "'nodes': 1, 'platform'"));
    assert_int_equal(json_integer_value(json_object_get(t->description, "devices")), 3);
    topology_free(t);
    t = test_build(parse("{ 'name': 'one', 'summary': 'a test', 'platform': { 'hosts': ['a'], 'links': {},"
                         "  'routes': {}, 'source': 'a test' } }", "", ""));
    assert_int_equal(t->n_devices, 1);
    topology_free(t);
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        const char *old, *new, *text;
    } cases[] = {
        { "['c', 'b', 'up']", "['c', 'b', 'down']", NULL },
        { ", ['c', 'b', 'up']", "", "platform.routes: no route from host \"c\" to host \"b\"" },
        { "'cable', 'down'", "'cable', 'down', 'cable'",
          "routes[3], \"a\" to \"c\": a cycle: link \"cable\" is crossed twice" },
        { "['a', 'b', 'cable']", "['a', 'b']", "routes[1]: found a short one, expected a list: two hosts" },
        { "['a', 'b', 'cable']", "['a', 'b', 'cabel']",
          "routes[1]: found \"cabel\", expected the name of a link; did you mean \"cable\"?" },
        { "['a', 'b', 'cable']", "['a', 'd', 'cable']", "routes[1]: found \"d\", expected the name of a host" },
        { "['a', 'b', 'cable']", "['a', 'b', 7]", "routes[1]: found 7, expected the name of a link" },
        { "['a', 'b', 'cable']", "['a', 'a', 'cable']", "routes[1]: from host \"a\" to itself" },
        { "['a', 'b', 'cable']", "['b', 'a', 'cable']", "routes[2]: \"b\" to \"a\" is there already, as routes[1]" },
        { "['a', 'b', 'c']", "['a', 'b', 'a']", "platform.hosts[3]: \"a\" is there twice" },
        { "['a', 'b', 'c']", "'a'", "platform.hosts: found \"a\", expected a list" },
        { "['a', 'b', 'c']", "[]", "platform.hosts: found 0, expected 1 to 256" },
        { "'name': 'up'", "'name': 'cable'", "platform.links[2]: \"cable\" is there twice" },
        { "'name': 'up'", "'name': ''", "platform.links[2]: found \"\", expected a name" },
        { "'name': 'up'", "'name': 'up', 'shared': true", "platform.links[2].shared: unknown key" },
        { "'bandwidth': '2 GB/s'", "'bandwith': '2 GB/s'",
          "platform.links[1].bandwith: unknown key, did you mean \"bandwidth\"?" },
        { "'2 GB/s'", "'0 B/s'", "link \"cable\": bandwidth: found \"0 B/s\": expected more than 0 B/s" },
        { "'2 GB/s'", "'-2 GB/s'", "bandwidth: found \"-2 GB/s\": expected more than 0 B/s" },
        { "'2 GB/s'", "'16 Gb/s'", "bandwidth: found \"16 Gb/s\": bits; write \"2 GB/s\"" },
        { "'2 GB/s'", "2e9", "bandwidth: found 2000000000: without a unit; write \"2 GB/s\"" },
        { "'bandwidth': '2 GB/s', ", "", "bandwidth: found nothing: expected a bandwidth in B/s" },
        { "'3 us'", "'-3 us'", "latency: found \"-3 us\": expected 0 s to 1e6 s" },
        { "'source': 'a test',", "", "platform.source: missing" },
        { "'hosts'", "'host': 1, 'hosts'", "platform.host: unknown key, did you mean \"hosts\"?" },
        { "'platform'", "'devices': 2, 'platform'", "nodes x devices: found 1 x 2, expected the 3 hosts" },
        { "'platform'", "'nodes': 2, 'devices': 2, 'platform'", "nodes x devices: found 2 x 2, expected the 3 hosts" },
        { "'platform'", "'nodes': 'x', 'platform'", "nodes: found the string \"x\", expected a whole number" },
        { "'platform'", "'nic': {}, 'platform'", "nic: platform has all links there are, expected no others" },
        { "'platform'", "'faults': [{'device': 1, 'at': '1 s'}], 'platform'",
          "does not say which links are a device's" },
        { "'platform'", "'faults': [{'link': 'cabel', 'at': '1 s'}], 'platform'", "has no link \"cabel\"" },
        { "'platform'", "'device': {'name': 'x'}, 'platform'", "device.memory: missing" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct topology *t = NULL;
        struct err e = { 0 };
        json_t *d = parse(three, cases[i].old, cases[i].new);
        const int rc = topology_build(&t, d, "test.lua", &e);
        if (!cases[i].text)
            assert_int_equal(rc, 0);
        else if (rc != ERR_INPUT || strncmp(e.text, "test.lua: ", 10) != 0 || !strstr(e.text, cases[i].text))
            fail_msg("%s: found %d \"%s\", expected \"%s\"", cases[i].new, rc, e.text, cases[i].text);
        topology_free(t);
        json_decref(d);
    }
}

static void long_routes(void **state)
{
    (void)state;
    for (int n = TOPOLOGY_MAX_HOPS; n <= TOPOLOGY_MAX_HOPS + 1; n++) {
        json_t *d = parse(three, "", ""), *platform = json_object_get(d, "platform");
        json_t *links = json_object_get(platform, "links"), *routes = json_object_get(platform, "routes");
        json_t *way = json_array_get(routes, 0);
        for (int i = 1; i < n; i++) {
            char name[16];
            snprintf(name, sizeof name, "hop%d", i);
            json_array_append_new(links, json_pack("{s:s,s:s,s:s}", "name", name, "bandwidth", "1 GB/s", "latency",
                                                   "1 us"));
            json_array_append_new(way, json_string(name));
        }
        struct topology *t = NULL;
        struct err e = { 0 };
        double latency;
        int32_t link[TOPOLOGY_MAX_HOPS];
        if (n > TOPOLOGY_MAX_HOPS) {
            assert_int_equal(topology_build(&t, d, "test.lua", &e), ERR_INPUT);
            assert_non_null(strstr(e.text, "found 33 links, expected at most 32"));
        } else {
            assert_int_equal(topology_build(&t, d, "test.lua", &e), 0);
            assert_int_equal(topology_route(t, 0, 1, 0, link, &latency), n);
            assert_near(latency, 3e-6 + (n - 1) * 1e-6, 1e-12);
        }
        topology_free(t);
        json_decref(d);
    }
}

static void nobody_computes(void **state)
{
    (void)state;
    struct topology *t = test_build(parse(three, "", ""));
    struct err e = { 0 };
    assert_int_equal(topology_computes(t, PREC_BF16, &e), ERR_INPUT);
    assert_non_null(strstr(e.text, "machine three: a platform alone says nothing of devices"));
    assert_non_null(strstr(e.text, "like = \"dgx-h100\""));
    topology_free(t);
}

static bool have_server(void)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/moelab-simgrid", test_env("MOELAB_LIBEXEC", "hw"));
    return access(path, X_OK) == 0;
}

/* A link of a platform may fail like any other: half of 2 MB has passed at 0.5 ms, then the cable is half as fast. */
static void a_link_degrades(void **state)
{
    (void)state;
    struct topology *t = test_build(parse(
        three, "'platform'", "'faults': [{'link': 'cable', 'at': '500 us', 'factor': 0.5}], 'platform'"));
    assert_int_equal(t->n_changes, 1);
    assert_near(t->change[0].bandwidth, 1e9, 1e-12);
    assert_string_equal(t->link[t->change[0].link].name, "cable");
    const struct net_flow flow = { 0, 1, 2e6 };
    for (int tier = NET_BOUND; tier <= (have_server() ? NET_SIMGRID : NET_EXACT); tier++)
        assert_near(test_makespan(t, (enum net_tier)tier, &flow, 1, NULL), 0.5e-3 + 1e-3 + 3e-6, 1e-6);
    topology_free(t);
}

/* ---- imported ---- */

static struct topology *import(const char *name)
{
    char path[4096];
    struct err e = { 0 };
    json_t *d = NULL;
    snprintf(path, sizeof path, "%s/tests/cli/fixtures/%s.xml", test_env("top_srcdir", "."), name);
    if (platform_import(path, &d, &e) != 0)
        fail_msg("%s", e.text);
    return test_build(d);
}

/* The switch of star-50GBps in XML is that machine: every receiver at the same time. */
static void a_star(void **state)
{
    (void)state;
    if (!have_server())
        skip();
    struct topology *xml = import("star"), *own = test_machine("star-50GBps", 8);
    assert_string_equal(xml->name, "star");
    assert_int_equal(xml->n_devices, 8);
    assert_int_equal(xml->n_links, 16);
    assert_string_equal(test_route(xml, 3, 7, 0, NULL), "star_link_3_UP star_link_7_DOWN");
    double (*const weights[])(int, int) = { test_uniform, test_zipf1, test_uneven };
    for (int tier = NET_BOUND; tier <= NET_SIMGRID; tier++)
        for (int w = 0; w < 3; w++) {
            double finish[2][64] = { { 0 } };
            size_t n;
            struct net_flow *flow = test_exchange(8, weights[w], &n);
            test_makespan(xml, (enum net_tier)tier, flow, n, finish[0]);
            test_makespan(own, (enum net_tier)tier, flow, n, finish[1]);
            for (int d = 0; d < 8; d++)
                assert_near(finish[0][d], finish[1][d], tier == NET_SIMGRID ? 1e-9 : 1e-12);
            free(flow);
        }
    topology_free(xml);
    topology_free(own);
}

static void by_hand_imported(void **state)
{
    (void)state;
    if (!have_server())
        skip();
    struct topology *t = import("two-level");
    struct net_flow flow[256];
    double latency;
    size_t n = 0;
    assert_string_equal(test_route(t, 0, 3, 0, &latency), "left_link_0_UP cable right_link_1_DOWN");
    assert_near(latency, 4e-6, 1e-12);
    for (int32_t s = 0; s < 4; s++)
        for (int32_t d = 0; d < 4; d++)
            flow[n++] = (struct net_flow){ s, d, 3e6 };
    /* 8 of the flows, 24 MB in all, share 60 GB/s; a right host's 9 MB would need 0.36 ms of its 25 GB/s. */
    assert_near(test_makespan(t, NET_EXACT, flow, n, NULL), 24e6 / 60e9 + 4e-6, 1e-9);
    topology_free(t);

    t = import("ring");
    assert_string_equal(test_route(t, 0, 2, 0, &latency), "l0_UP l1_UP");
    assert_string_equal(test_route(t, 1, 5, 0, &latency), "l0_DOWN l5_DOWN");
    assert_near(latency, 2e-6, 1e-12);
    /* To the next but one: every link carries two flows that are under way all the time. */
    n = 0;
    for (int32_t s = 0; s < 6; s++)
        flow[n++] = (struct net_flow){ s, (s + 2) % 6, 1e6 };
    assert_near(test_makespan(t, NET_EXACT, flow, n, NULL), 2e6 / 10e9 + 2e-6, 1e-9);
    topology_free(t);

    /* 12 of 16 go to another leaf: 4 x 12 x 0.75 MB over a leaf's two uplinks of 50 GB/s, four links of 250 ns. */
    t = import("fat-tree");
    n = 0;
    for (int32_t s = 0; s < 16; s++)
        for (int32_t d = 0; d < 16; d++)
            flow[n++] = (struct net_flow){ s, d, 0.75e6 };
    assert_near(test_makespan(t, NET_EXACT, flow, n, NULL), 18e6 / 50e9 + 1e-6, 1e-9);
    topology_free(t);
}

static void tiers_agree(void **state)
{
    (void)state;
    static const char *const names[] = { "star", "two-level", "ring", "fat-tree" };
    if (!have_server())
        skip();
    for (size_t i = 0; i < 4; i++) {
        struct topology *t = import(names[i]);
        double finish[3][64] = { { 0 } };
        size_t n;
        struct net_flow *flow = test_exchange(t->n_devices, test_uneven, &n);
        const double exact = test_makespan(t, NET_EXACT, flow, n, finish[0]);
        assert_near(test_makespan(t, NET_SIMGRID, flow, n, finish[1]), exact, 1e-6);
        assert_near(test_makespan(t, NET_FLOW, flow, n, finish[2]), exact, 2e-3);
        assert_true(test_makespan(t, NET_BOUND, flow, n, finish[2]) <= exact * (1 + 1e-9));
        for (int32_t d = 0; d < t->n_devices; d++)
            assert_near(finish[1][d], finish[0][d], 1e-6);
        free(flow);
        topology_free(t);
    }
}

/* ---- failures: stand-ins for the process that reads XML ---- */

static void check_failure(const char *script, int code, const char *text)
{
    char folder[] = "/tmp/moelab-test-XXXXXX", path[64], xml[64], *old = strdup(test_env("MOELAB_LIBEXEC", ""));
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/moelab-simgrid", folder);
    snprintf(xml, sizeof xml, "%s/x.xml", folder);
    FILE *file = fopen(xml, "w");
    assert_non_null(file);
    fclose(file);
    if (script) {
        assert_non_null(file = fopen(path, "w"));
        fprintf(file, "#!/bin/sh\n%s\n", script);
        fclose(file);
        assert_int_equal(chmod(path, 0755), 0);
    }
    setenv("MOELAB_LIBEXEC", folder, 1);
    struct err e = { 0 };
    json_t *d = NULL;
    const int rc = platform_import(xml, &d, &e);
    if (rc != code || (code && !strstr(e.text, text)) || (code && d))
        fail_msg("%s: found %d \"%s\", expected %d \"%s\"", script ? script : "no server", rc, e.text, code, text);
    json_decref(d);
    unlink(path);
    unlink(xml);
    rmdir(folder);
    setenv("MOELAB_LIBEXEC", old, 1);
    free(old);
}

#define HELLO "echo moelab-simgrid platform 1; "
#define TWO   HELLO "echo host a; echo host b; echo pair 0 1; "

static void failures(void **state)
{
    (void)state;
    check_failure(NULL, ERR_INPUT, "SimGrid reads platforms, and there is no moelab-simgrid (looked for /tmp/moelab-");
    check_failure(NULL, ERR_INPUT, "install libsimgrid-dev and build without --without-simgrid");
    check_failure("echo moelab-simgrid platform 2", ERR_IO, "\"moelab-simgrid platform 2\": is it of another version?");
    check_failure("exit 3", ERR_INPUT, "x.xml: SimGrid: exit code 3");
    check_failure("kill -9 $$", ERR_INPUT, "x.xml: SimGrid: Killed");
    check_failure(HELLO "echo first >&2; echo last >&2; echo Backtrace x >&2; echo y >&2; kill -6 $$", ERR_INPUT,
                  "x.xml: SimGrid: last");
    check_failure(HELLO "echo error no such thing; exit 1", ERR_INPUT, "x.xml: no such thing");
    check_failure(HELLO "echo error Parse error at y.xml:7: what; exit 1", ERR_INPUT, "y.xml:7: what");
    check_failure(TWO "kill -11 $$", ERR_INPUT, "no route from host \"a\" to host \"b\" (SimGrid: Segmentation fault)");
    check_failure(TWO "echo route 0", ERR_INPUT, "no route from host \"a\" to host \"b\"");
    check_failure(TWO "echo route 1 0", ERR_IO, "answers \"route 1 0\"");
    check_failure(TWO "echo route 33 0", ERR_INPUT, "found a route of 33 links, expected at most 32");
    check_failure(TWO "echo link 0x1p+30 0x0p+0 l m; echo route 1 0; echo pair 1 7", ERR_IO, "answers \"pair 1 7\"");
    check_failure(TWO "echo link 0x1p+30 0x0p+0 l m; echo route 1 0; echo pair 1 0; echo route 1 0; echo end", 0, "");
    check_failure(TWO "echo link 12 l; echo end", ERR_IO, "answers \"link 12 l\"");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(by_hand),          cmocka_unit_test(shapes),          cmocka_unit_test(refusals),
        cmocka_unit_test(long_routes),      cmocka_unit_test(nobody_computes), cmocka_unit_test(a_link_degrades),
        cmocka_unit_test(a_star),           cmocka_unit_test(by_hand_imported), cmocka_unit_test(tiers_agree),
        cmocka_unit_test(failures),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
