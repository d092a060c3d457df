/* SPDX-License-Identifier: Apache-2.0
 * test_tiers.c - the network tiers against each other over random traffic: several exchanges and copies that start
 * while others are under way; links that change; exchanges that are repeated. */
#include "machine_test.h"

#include <sys/stat.h>
#include <unistd.h>

static bool have_server(void)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/moelab-simgrid", test_env("MOELAB_LIBEXEC", "hw"));
    return access(path, X_OK) == 0;
}

/* ---- random traffic ---- */

#define MAX_STARTS 5

struct start {
    double at;
    struct net_flow *flow;
    size_t n;
};

struct traffic {
    struct start start[MAX_STARTS];
    int n_starts;
};

static uint64_t state;

static double draw(void)
{
    return moe_unit(moe_mix(++state));
}

/* Sizes as traffic has them: alike, log-normal, popular receivers, or few pairs; some are nothing. */
static double size_of(int kind, int d)
{
    switch (kind) {
    case 0:
        return 1e5 * (0.01 + draw());
    case 1: {
        double sum = 0;
        for (int i = 0; i < 12; i++)
            sum += draw();
        return 5e4 * exp(1.5 * (sum - 6));
    }
    case 2:
        return 4e5 * (0.5 + draw()) / (d + 1);
    default:
        return draw() < 0.2 ? 1e6 * draw() : 0;
    }
}

static void exchange_of(const struct topology *t, struct start *x)
{
    int n = t->n_devices, kind = (int)(4 * draw());
    x->flow = malloc((size_t)(n * n) * sizeof *x->flow);
    for (int s = 0; s < n; s++) {
        for (int d = 0; d < n; d++) {
            struct net_flow f = { .src = s, .dst = d, .bytes = size_of(kind, d) };
            /* A kernel's own part passes its port. */
            if (s == d && (f.loop = draw() < 0.3 && t->n_devices > t->n_nodes))
                f.delay = 1e-6 * draw();
            x->flow[x->n++] = f;
        }
    }
}

static void copies_of(const struct topology *t, struct start *x)
{
    x->flow = malloc((size_t)t->n_devices * sizeof *x->flow);
    for (int d = 0; d < t->n_devices; d++)
        if (draw() < 0.5)
            x->flow[x->n++] = (struct net_flow){ topology_host(t, t->node[d]), d, 2e6 * draw() };
}

/* One exchange, or up to five exchanges and sets of copies, each somewhere in the time the first takes. */
static struct traffic traffic_of(const struct topology *t, bool several)
{
    struct traffic w = { .n_starts = several ? 2 + (int)(4 * draw()) : 1 };
    double scale = 0;
    for (int i = 0; i < w.n_starts; i++) {
        struct start *x = &w.start[i];
        if (i > 0 && t->n_devices > t->n_nodes && draw() < 0.4)
            copies_of(t, x);
        else
            exchange_of(t, x);
        if (i == 0)
            scale = test_makespan(t, NET_BOUND, x->flow, x->n, NULL);
        else
            x->at = w.start[i - 1].at + (draw() < 0.2 ? 0 : 0.6 * scale * draw());
    }
    return w;
}

static void traffic_free(struct traffic *w)
{
    for (int i = 0; i < w->n_starts; i++)
        free(w->start[i].flow);
}

/* Arrivals by (start, receiver), and the last; bytes by link go to *link_bytes, to be freed, unless it is NULL. */
static double run(const struct topology *t, enum net_tier tier, const struct traffic *w, double *arrival,
                  double **link_bytes)
{
    int room = t->n_devices + 2 * t->n_nodes;
    struct net *net = test_net(t, tier);
    struct net_done done[64];
    struct err e = { 0 };
    double last = 0;
    for (int i = 0; i <= w->n_starts; i++) {
        double until = i < w->n_starts ? w->start[i].at : INFINITY;
        for (size_t n = 1; n > 0;) {
            if (net_advance(net, until, done, 64, &n, &e) != 0)
                fail_msg("%s", e.text);
            for (size_t k = 0; k < n; k++) {
                assert_true(done[k].time >= last && done[k].time <= until);
                last = done[k].time;
                arrival[done[k].exchange * room + done[k].dst] = last;
            }
        }
        if (i < w->n_starts)
            test_start(net, until, i, w->start[i].flow, w->start[i].n);
    }
    if (link_bytes) {
        *link_bytes = malloc((size_t)t->n_links * sizeof(double));
        memcpy(*link_bytes, net_link_bytes(net), (size_t)t->n_links * sizeof(double));
    }
    net_close(net);
    return last;
}

/* ---- agreement ---- */

struct tally { int n; double makespan, receiver, mean, simgrid; }; /* worst relative differences */

static void check_case(const struct topology *t, bool several, bool simgrid, struct tally *tally)
{
    struct traffic w = traffic_of(t, several);
    size_t n = (size_t)((t->n_devices + 2 * t->n_nodes) * MAX_STARTS);
    double *at[N_NET_TIERS], *bytes[N_NET_TIERS], last[N_NET_TIERS];
    enum net_tier end = simgrid ? N_NET_TIERS : NET_SIMGRID;
    double sum = 0, n_arrivals = 0;
    for (enum net_tier tier = NET_BOUND; tier < end; tier++) {
        at[tier] = calloc(n, sizeof(double));
        last[tier] = run(t, tier, &w, at[tier], &bytes[tier]);
        for (int32_t l = 0; l < t->n_links; l++)
            assert_near(bytes[tier][l], bytes[NET_BOUND][l], 1e-9);
    }
    if (last[NET_BOUND] > last[NET_EXACT] * (1 + 1e-12))
        fail_msg("%s: bound %.12g s, exact %.12g s", t->name, last[NET_BOUND], last[NET_EXACT]);
    assert_near(last[NET_FLOW], last[NET_EXACT], 2e-3);
    tally->makespan = fmax(tally->makespan, fabs(last[NET_FLOW] / last[NET_EXACT] - 1));
    for (size_t i = 0; i < n; i++) {
        assert_true((at[NET_FLOW][i] > 0) == (at[NET_EXACT][i] > 0));
        assert_true((at[NET_BOUND][i] > 0) == (at[NET_EXACT][i] > 0));
        if (at[NET_EXACT][i] <= 0)
            continue;
        double off = fabs(at[NET_FLOW][i] - at[NET_EXACT][i]) / last[NET_EXACT];
        if (!several && off > 2e-3)
            fail_msg("%s: flow %.9g s, exact %.9g s of %.9g s", t->name, at[NET_FLOW][i], at[NET_EXACT][i],
                     last[NET_EXACT]);
        if (!several)
            tally->receiver = fmax(tally->receiver, off);
        sum += off;
        n_arrivals++;
        if (!simgrid)
            continue;
        assert_near(at[NET_SIMGRID][i], at[NET_EXACT][i], 1e-6);
        tally->simgrid = fmax(tally->simgrid, fabs(at[NET_SIMGRID][i] / at[NET_EXACT][i] - 1));
    }
    /* An arrival just before another exchange starts may be one long after, with no more than a byte's difference. */
    assert_true(sum <= 2e-3 * n_arrivals);
    tally->mean = fmax(tally->mean, sum / n_arrivals);
    tally->n++;
    for (enum net_tier tier = NET_BOUND; tier < end; tier++) {
        free(at[tier]);
        free(bytes[tier]);
    }
    traffic_free(&w);
}

static struct topology *pcie_machine(void)
{
    json_t *d = test_description("rtx4090-pcie4", 1);
    json_object_set_new(d, "devices", json_integer(4));
    return test_build(d);
}

/* Odd cases are several exchanges and copies. The largest are without SimGrid, which takes N^4.5. */
static void agreement(void **test)
{
    (void)test;
    static const struct {
        const char *name;
        int nodes, n;
        bool simgrid;
    } cases[] = {
        { "star-50GBps", 4, 40, true },  { "star-50GBps", 12, 16, true }, { "star-50GBps", 16, 4, true },
        { "star-50GBps", 48, 4, false }, { "h800-ib", 1, 60, true },      { "h800-ib", 2, 10, true },
        { "h800-ib", 4, 8, false },      { "rtx4090-pcie4", 1, 80, true },
    };
    struct tally tally = { 0 };
    bool server = have_server();
    state = 20;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct topology *t = strcmp(cases[i].name, "rtx4090-pcie4") == 0 ? pcie_machine()
                                                                        : test_machine(cases[i].name, cases[i].nodes);
        for (int k = 0; k < cases[i].n; k++)
            check_case(t, k % 2, server && cases[i].simgrid, &tally);
        topology_free(t);
    }
    assert_true(tally.n >= 200);
    print_message("# %d cases: flow's makespan within %.1e of exact, the receivers of one exchange within %.1e of the "
                  "makespan, those of several within %.1e on average; exact within %.1e of SimGrid\n", tally.n,
                  tally.makespan, tally.receiver, tally.mean, tally.simgrid);
}

/* The common work: W1 within 0.1 % of its bound and latency, W3 within 0.01 % of 4.4566 ms, in every tier. */
static void common_work(void **test)
{
    (void)test;
    struct topology *t = test_machine("star-50GBps", 64);
    size_t n;
    struct net_flow *w1 = test_exchange(64, test_uniform, &n), *w3 = test_exchange(64, test_zipf1, &n);
    enum net_tier end = have_server() ? N_NET_TIERS : NET_SIMGRID;
    for (enum net_tier tier = NET_BOUND; tier < end; tier++) {
        assert_near(test_makespan(t, tier, w1, n, NULL), 63.0 / 64 * 16 * MIB / 50e9 + 500e-9, 1e-3);
        assert_near(test_makespan(t, tier, w3, n, NULL), 4.4566e-3, 1e-4);
    }
    free(w1);
    free(w3);
    topology_free(t);
}

/* ---- links that change ---- */

static int32_t link_named(const struct topology *t, const char *name)
{
    for (int32_t l = 0; l < t->n_links; l++)
        if (strcmp(t->link[l].name, name) == 0)
            return l;
    fail_msg("no link %s", name);
    return -1;
}

#define TIERS(tier, end) \
    for (enum net_tier tier = NET_BOUND, end = have_server() ? N_NET_TIERS : NET_SIMGRID; tier < end; tier++)

static void a_link_changes(void **test)
{
    (void)test;
    const double nic = 50e9, latency = 500e-9;
    struct topology *t = test_machine("star-50GBps", 4);
    struct link_change change[2] = { { 1e-3, link_named(t, "gpu1.nic.in"), nic / 2 } };
    const struct net_flow alone = { 0, 1, 100e6 }, pair[] = { { 0, 1, 100e6 }, { 2, 1, 100e6 }, { 3, 2, 10e6 } };
    double at[32];
    struct traffic w = { { { 0, (struct net_flow *)&alone, 1 } }, 1 };
    t->change = change;

    /* 2 ms alone; half of it is done when the link has half of its bandwidth left. */
    t->n_changes = 1;
    TIERS(tier, end)
    assert_near(run(t, tier, &w, at, NULL), 1e-3 + 2 * 1e-3 + latency, 1e-9);

    /* Failed from 1 ms to 5 ms. */
    change[0].bandwidth = 0;
    change[1] = (struct link_change){ 5e-3, change[0].link, nic };
    t->n_changes = 2;
    TIERS(tier, end)
    assert_near(run(t, tier, &w, at, NULL), 6e-3 + latency, 1e-9);

    /* Two flows share it, 4 ms: a quarter is done at 1 ms, the other three after 5 ms. Who does not cross it does not
     * wait, and starting later, after the link is back, is like nothing had happened. */
    w.start[0].flow = (struct net_flow *)pair;
    w.start[0].n = 3;
    TIERS(tier, end)
    {
        assert_near(run(t, tier, &w, at, NULL), 8e-3 + latency, 1e-9);
        assert_near(at[2], 10e6 / nic + latency, 1e-9);
    }
    w.start[0].at = 7e-3;
    TIERS(tier, end)
    assert_near(run(t, tier, &w, at, NULL), 11e-3 + latency, 1e-9);
    w.start[0].at = 3e-3; /* while it is down */
    TIERS(tier, end)
    assert_near(run(t, tier, &w, at, NULL), 9e-3 + latency, 1e-9);
    t->change = NULL;
    t->n_changes = 0;
    topology_free(t);
}

/* Links that change under random traffic: tiers still agree. */
static void changes_under_traffic(void **test)
{
    (void)test;
    struct topology *t = test_machine("h800-ib", 2);
    struct link_change change[6];
    struct tally tally = { 0 };
    state = 7;
    for (int k = 0; k < 6; k++) {
        for (int i = 0; i < 6; i++) /* down or slowed, and back */
            change[i] = (struct link_change){ 1e-5 * (i + 1) + 1e-6 * draw(), (int32_t)(draw() * t->n_links), 0 };
        for (int i = 0; i < 3; i++) {
            change[i].bandwidth = i == k % 3 ? 0 : (0.2 + draw()) * t->link[change[i].link].bandwidth;
            change[i + 3].link = change[i].link;
            change[i + 3].bandwidth = t->link[change[i].link].bandwidth;
        }
        t->change = change;
        t->n_changes = 6;
        check_case(t, k % 2, have_server(), &tally);
    }
    t->change = NULL;
    t->n_changes = 0;
    topology_free(t);
}

static void a_link_fails_for_good(void **test)
{
    (void)test;
    struct topology *t = test_machine("star-50GBps", 16);
    struct link_change change = { 2e-3, link_named(t, "gpu8.nic.out"), 0 };
    const struct net_flow flow[] = { { 8, 3, 500e6 }, { 1, 2, 200e6 } };
    t->change = &change;
    t->n_changes = 1;
    TIERS(tier, end)
    {
        struct net *net = test_net(t, tier);
        struct net_done done[4];
        struct err e = { 0 };
        size_t n;
        test_start(net, 0, 1, flow, 2);
        assert_int_equal(net_advance(net, INFINITY, done, 4, &n, &e), 0); /* what does not cross it arrives */
        assert_int_equal(n, 1);
        assert_int_equal(done[0].dst, 2);
        assert_near(done[0].time, 4e-3 + 500e-9, 1e-9);
        assert_int_equal(net_advance(net, INFINITY, done, 4, &n, &e), ERR_RUN);
        assert_string_equal(e.text, tier == NET_BOUND ? "link gpu8.nic.out failed at 0.002 s, for good: the exchange "
                                                        "to 3 can not end"
                                                      : "link gpu8.nic.out failed at 0.002 s, for good: the exchange "
                                                        "from 8 to 3 can not end");
        net_close(net);
    }
    t->change = NULL;
    t->n_changes = 0;
    topology_free(t);
}

/* ---- exchanges solved before ---- */

struct replay { double time[400]; double bytes[400]; size_t n; };

static void replay_run(const struct topology *t, enum net_tier tier, const struct net_flow *flow, size_t n_flows,
                       bool fresh, bool disturbed, struct replay *out)
{
    struct net *net = test_net(t, tier);
    const struct net_flow other = { 1, 2, 5e6 };
    struct net_done done[64];
    struct err e = { 0 };
    double now = 0.1, base[400] = { 0 };
    size_t n;
    memset(out, 0, sizeof *out);
    for (int i = 0; i < 4; i++) {
        if (fresh) { /* nothing is remembered by a net that is new: it begins where the other one is */
            for (int32_t l = 0; l < t->n_links; l++)
                base[l] += net_link_bytes(net)[l];
            net_close(net);
            net = test_net(t, tier);
        }
        double start = now;
        test_start(net, start, i, flow, n_flows);
        if (disturbed) {
            assert_int_equal(net_advance(net, start + 5e-5, done, 64, &n, &e), 0);
            for (size_t k = 0; k < n; k++)
                out->time[out->n++] = done[k].time;
            if (n == 0) {
                test_start(net, start + 5e-5, 100, &other, 1);
            }
        }
        while (net_advance(net, INFINITY, done, 64, &n, &e) == 0 && n > 0)
            for (size_t k = 0; k < n; k++)
                out->time[out->n++] = now = done[k].time;
        now += 1.25e-4;
    }
    for (int32_t l = 0; l < t->n_links; l++)
        out->bytes[l] = base[l] + net_link_bytes(net)[l];
    net_close(net);
}

static void repeated_exchanges(void **test)
{
    (void)test;
    struct topology *t = test_machine("dgx-h100", 2);
    assert_true(t->n_links <= 400);
    size_t n_flows;
    struct net_flow *flow = test_exchange(16, test_uneven, &n_flows);
    flow[7].delay = 1e-6;
    flow[9].at_least = 3e-4;
    for (enum net_tier tier = NET_BOUND; tier <= NET_EXACT; tier++) {
        for (int disturbed = 0; disturbed < 2; disturbed++) {
            struct replay known, anew;
            replay_run(t, tier, flow, n_flows, false, disturbed, &known);
            replay_run(t, tier, flow, n_flows, true, disturbed, &anew);
            assert_int_equal(known.n, 4 * (16 + disturbed));
            assert_memory_equal(&known, &anew, sizeof known);
        }
    }
    free(flow);
    topology_free(t);
}

/* Asking for bytes half-way, and a link that changes before the end: neither may be answered from memory. */
static void not_repeated(void **test)
{
    (void)test;
    struct topology *t = test_machine("star-50GBps", 16);
    size_t n_flows, n;
    struct net_flow *flow = test_exchange(16, test_uneven, &n_flows);
    struct net *net = test_net(t, NET_EXACT);
    struct net_done done[64];
    struct err e = { 0 };
    struct link_change change = { 1.0001, 0, 25e9 };
    double bytes[2], first, second;
    for (int i = 0; i < 2; i++) {
        double before = net_link_bytes(net)[0];
        test_start(net, 0.5 * i, i, flow, n_flows);
        assert_int_equal(net_advance(net, 0.5 * i + 2e-4, done, 64, &n, &e), 0);
        bytes[i] = net_link_bytes(net)[0] - before;
        assert_int_equal(test_drain(net, done, 64) + n, 16);
    }
    assert_true(bytes[0] > 0 && bytes[0] < 14 * MIB); /* not all of it yet */
    assert_near(bytes[0], bytes[1], 1e-12);
    net_close(net);

    t->change = &change;
    t->n_changes = 1;
    net = test_net(t, NET_EXACT);
    test_start(net, 0, 1, flow, n_flows);
    n = test_drain(net, done, 64);
    first = done[n - 1].time;
    test_start(net, 1, 2, flow, n_flows);
    n = test_drain(net, done, 64);
    second = done[n - 1].time;
    assert_true(second - 1 > 1.05 * first);
    net_close(net);
    struct traffic w = { { { 1, flow, n_flows } }, 1 }; /* by a net that remembers nothing */
    double at[64];
    assert_true(run(t, NET_EXACT, &w, at, NULL) == second);
    t->change = NULL;
    t->n_changes = 0;
    free(flow);
    topology_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(agreement),         cmocka_unit_test(common_work),
        cmocka_unit_test(a_link_changes),    cmocka_unit_test(changes_under_traffic),
        cmocka_unit_test(a_link_fails_for_good), cmocka_unit_test(repeated_exchanges),
        cmocka_unit_test(not_repeated),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
