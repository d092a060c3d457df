/* SPDX-License-Identifier: Apache-2.0
 * test_simgrid.c - tier simgrid against tier exact, whose model it shares, and what is said when its process fails. */
#include "machine_test.h"

#include <sys/stat.h>
#include <unistd.h>

static bool have_server(void)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/moelab-simgrid", test_env("MOELAB_LIBEXEC", "hw"));
    return access(path, X_OK) == 0;
}

static void assert_tiers_agree(const struct topology *t, const struct net_flow *flow, size_t n_flows)
{
    double exact[64] = { 0 }, simgrid[64] = { 0 };
    assert_near(test_makespan(t, NET_SIMGRID, flow, n_flows, simgrid),
                test_makespan(t, NET_EXACT, flow, n_flows, exact), 1e-6);
    for (int i = 0; i < 64; i++)
        assert_near(simgrid[i], exact[i], 1e-6);
}

static void one_exchange(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int nodes;
        double (*weight)(int, int);
    } cases[] = {
        { "star-50GBps", 8, test_uniform }, { "star-50GBps", 8, test_uneven },   { "star-50GBps", 16, test_uneven },
        { "star-50GBps", 16, test_zipf1 },  { "dgx-h100", 2, test_uneven },      { "dgx-h100", 2, test_zipf1 },
        { "h800-ib", 1, test_uneven },      { "rtx4090-pcie4", 1, test_uneven },
    };
    if (!have_server())
        skip();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        json_t *d = test_description(cases[i].name, cases[i].nodes);
        if (strcmp(cases[i].name, "rtx4090-pcie4") == 0) /* staged copies cross the memory's link twice */
            json_object_set_new(d, "devices", json_integer(4));
        struct topology *t = test_build(d);
        size_t n_flows;
        struct net_flow *flow = test_exchange(t->n_devices, cases[i].weight, &n_flows);
        assert_tiers_agree(t, flow, n_flows);
        free(flow);
        topology_free(t);
    }
}

static void zipf_of_64(void **state)
{
    (void)state;
    if (!have_server())
        skip();
    struct topology *t = test_machine("star-50GBps", 64);
    size_t n_flows;
    struct net_flow *flow = test_exchange(64, test_zipf1, &n_flows);
    assert_near(test_makespan(t, NET_SIMGRID, flow, n_flows, NULL), 4.45661e-3, 2e-6);
    free(flow);
    topology_free(t);
}

/* The next arrival from each tier, at most at `until`: the same one at the same time. Returns the later of its two
 * times, from where both can go on, or NAN. */
static double same_next(struct net *net[2], double until)
{
    struct net_done done[2][64];
    size_t n[2];
    struct err e = { 0 };
    for (int i = 0; i < 2; i++)
        if (net_advance(net[i], until, done[i], 1, &n[i], &e) != 0)
            fail_msg("%s", e.text);
    assert_int_equal(n[0], n[1]);
    if (n[0] == 0)
        return NAN;
    assert_int_equal(done[0][0].exchange, done[1][0].exchange);
    assert_int_equal(done[0][0].dst, done[1][0].dst);
    assert_true(fabs(done[0][0].time - done[1][0].time) < 1e-10);
    return fmax(done[0][0].time, done[1][0].time);
}

/* Exchanges and copies start while others are under way, with pauses between, as a run's task graphs do it. */
static void a_long_run(void **state)
{
    (void)state;
    if (!have_server())
        skip();
    struct topology *t = test_machine("dgx-h100", 2);
    struct net *net[2] = { test_net(t, NET_EXACT), test_net(t, NET_SIMGRID) };
    size_t n_flows;
    struct net_flow *flow = test_exchange(16, test_uneven, &n_flows);
    const struct net_flow copy = { topology_host(t, 1), 9, 3e7 };
    double now = 0;
    int n_arrived = 0;
    for (int step = 0; step < 20; step++) {
        for (int i = 0; i < 2; i++) {
            test_start(net[i], now, 3 * step, flow, n_flows);
            test_start(net[i], now, 3 * step + 1, &copy, 1);
        }
        for (int i = 0; i < 5; i++, n_arrived++)
            now = same_next(net, INFINITY);
        for (int i = 0; i < 2; i++)
            test_start(net[i], now, 3 * step + 2, flow, n_flows / 2);
        for (double time; !isnan(time = same_next(net, now + 4e-3)); n_arrived++)
            now = time;
        now += 5e-3;
    }
    assert_int_equal(n_arrived, 20 * (16 + 1 + 16));
    for (int32_t l = 0; l < t->n_links; l++)
        assert_near(net_link_bytes(net[0])[l], net_link_bytes(net[1])[l], 1e-12);
    net_close(net[0]);
    net_close(net[1]);
    free(flow);
    topology_free(t);
}

/* ---- failures: stand-ins for the server ---- */

/* What opening a net and one exchange say when the server is this script; NULL: there is no server. */
static void check_failure(const char *script, int code, const char *text)
{
    char folder[] = "/tmp/moelab-test-XXXXXX", path[64], *old = strdup(test_env("MOELAB_LIBEXEC", ""));
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/moelab-simgrid", folder);
    if (script) {
        FILE *file = fopen(path, "w");
        assert_non_null(file);
        fprintf(file, "#!/bin/sh\n%s\n", script);
        fclose(file);
        assert_int_equal(chmod(path, 0755), 0);
    }
    setenv("MOELAB_LIBEXEC", folder, 1);

    struct topology *t = test_machine("star-50GBps", 4);
    struct net *net = NULL;
    struct net_done done[4];
    struct err e = { 0 };
    size_t n;
    const struct net_flow flow[] = { { 0, 1, 1e6 }, { 2, 1, 1e6 } };
    int rc = net_open(&net, t, NET_SIMGRID, &e);
    if (rc == 0 && (rc = net_start(net, 0, 1, flow, 2, &e)) == 0)
        rc = net_advance(net, INFINITY, done, 4, &n, &e);
    if (rc != code || !strstr(e.text, text))
        fail_msg("%s: found %d \"%s\", expected %d \"%s\"", script ? script : "no server", rc, e.text, code, text);
    net_close(net);
    topology_free(t);
    unlink(path);
    rmdir(folder);
    setenv("MOELAB_LIBEXEC", old, 1);
    free(old);
}

static void failures(void **state)
{
    (void)state;
    static const char ready[] = "echo moelab-simgrid 2; while read l; do case \"$l\" in \"3 2 \"*) break;; esac; done; "
                                "echo ready; ";
    char script[512];
    check_failure(NULL, ERR_INPUT, "no moelab-simgrid (looked for /tmp/moelab-test-");
    check_failure(NULL, ERR_INPUT, "--without-simgrid");
    check_failure("exit 3", ERR_IO, "the SimGrid process died (exit 3)");
    check_failure("kill -9 $$", ERR_IO, "the SimGrid process died (signal 9");
    check_failure("echo moelab-simgrid 1; cat >/dev/null", ERR_IO,
                  "found \"moelab-simgrid 1\", expected \"moelab-simgrid 2\"");
    check_failure("echo moelab-simgrid 2; read l; echo error no such link; cat >/dev/null", ERR_RUN,
                  "the SimGrid process reports: no such link");
    snprintf(script, sizeof script, "%sread l; kill -6 $$", ready);
    check_failure(script, ERR_IO, "the SimGrid process died (signal 6");
    snprintf(script, sizeof script, "%sread l; read l; read l; read l; echo done 1; echo 77 1.0", ready);
    check_failure(script, ERR_IO, "found \"77 1.0\", expected a flow under way");
    snprintf(script, sizeof script, "%secho done 0; cat >/dev/null", ready);
    check_failure(script, ERR_RUN, "1 receivers wait for flows that never end");
}

static void too_many_devices(void **state)
{
    (void)state;
    struct topology *t = test_machine("star-50GBps", 129);
    struct net *net = NULL;
    struct err e = { 0 };
    assert_int_equal(net_open(&net, t, NET_SIMGRID, &e), ERR_INPUT);
    assert_string_equal(e.text,
                        "tier simgrid: star-50GBps has 129 devices, expected at most 128: use tier exact, which "
                        "agrees with it");
    assert_null(net);
    topology_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_exchange), cmocka_unit_test(zipf_of_64),       cmocka_unit_test(a_long_run),
        cmocka_unit_test(failures),     cmocka_unit_test(too_many_devices),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
