/* SPDX-License-Identifier: Apache-2.0
 * machine_test.h - machines and exchanges for the tests of hw/. */
#ifndef MACHINE_TEST_H
#define MACHINE_TEST_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "machine.h"
#include "script.h"

#define MIB 1048576.0

static inline const char *test_env(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

/* A shipped machine file as JSON; `nodes` 0: as the file says. */
static inline json_t *test_description(const char *name, int nodes)
{
    char path[4096], file[4096];
    struct err e = { 0 };
    json_t *d = NULL;
    snprintf(path, sizeof path, "%s/hw/machines/%s.lua", test_env("top_srcdir", "."), name);
    if (script_machine(path, &d, file, sizeof file, &e) != 0)
        fail_msg("%s", e.text);
    if (nodes > 0)
        json_object_set_new(d, "nodes", json_integer(nodes));
    return d;
}

/* A size as a machine file has it, to the last bit. */
static inline json_t *test_bytes(double bytes)
{
    return json_sprintf("%.17g B", bytes);
}

/* Takes the description. */
static inline struct topology *test_build(json_t *description)
{
    struct topology *t = NULL;
    struct err e = { 0 };
    if (topology_build(&t, description, "test.lua", &e) != 0)
        fail_msg("%s", e.text);
    json_decref(description);
    return t;
}

static inline struct topology *test_machine(const char *name, int nodes)
{
    return test_build(test_description(name, nodes));
}

/* "gpu0.nvlink.out gpu1.nvlink.in", or "none" when there is no way. */
static inline const char *test_route(const struct topology *t, int32_t src, int32_t dst, int32_t path, double *latency)
{
    static char text[512];
    int32_t link[TOPOLOGY_MAX_HOPS];
    int n = topology_route(t, src, dst, path, link, latency);
    snprintf(text, sizeof text, "%s", n < 0 ? "none" : "");
    for (int i = 0; i < n; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", i ? " " : "", t->link[link[i]].name);
    return text;
}

static inline double test_bandwidth(const struct topology *t, const char *name)
{
    for (int32_t l = 0; l < t->n_links; l++)
        if (strcmp(t->link[l].name, name) == 0)
            return t->link[l].bandwidth;
    fail_msg("%s has no link %s", t->name, name);
    return 0;
}

/* Without what an exchange costs beside bytes and latency, for times worked out by hand. */
static inline struct topology *test_links_alone(const char *name, int nodes)
{
    json_t *d = test_description(name, nodes);
    json_object_del(d, "exchange");
    return test_build(d);
}

static inline struct net *test_net(const struct topology *t, enum net_tier tier)
{
    struct net *net = NULL;
    struct err e = { 0 };
    if (net_open(&net, t, tier, &e) != 0)
        fail_msg("%s", e.text);
    return net;
}

static inline void test_start(struct net *net, double now, int64_t id, const struct net_flow *flow, size_t n)
{
    struct err e = { 0 };
    if (net_start(net, now, id, flow, n, &e) != 0)
        fail_msg("%s", e.text);
}

/* All arrivals until nothing is under way; their number. */
static inline size_t test_drain(struct net *net, struct net_done *done, size_t room)
{
    struct err e = { 0 };
    for (size_t n = 0, got = 0;; n += got) {
        if (net_advance(net, INFINITY, done + n, room - n, &got, &e) != 0)
            fail_msg("%s", e.text);
        if (got == 0)
            return n;
    }
}

/* When one exchange on an idle machine is complete; finish (or NULL): [endpoints] by receiver. */
static inline double test_makespan(const struct topology *t, enum net_tier tier, const struct net_flow *flow, size_t n,
                                   double *finish)
{
    size_t room = (size_t)(t->n_devices + 2 * t->n_nodes) + 1;
    struct net_done *done = malloc(room * sizeof *done);
    struct net *net = test_net(t, tier);
    test_start(net, 0, 7, flow, n);
    size_t n_done = test_drain(net, done, room);
    double last = 0;
    for (size_t i = 0; i < n_done; i++) {
        assert_int_equal(done[i].exchange, 7);
        assert_true(done[i].time >= last);
        last = done[i].time;
        if (finish)
            finish[done[i].dst] = done[i].time;
    }
    net_close(net);
    free(done);
    return last;
}

/* Every device sends 16 MiB in all, in the proportions weight(s, d); its own share is dropped. Free the result. */
static inline struct net_flow *test_exchange(int n, double (*weight)(int s, int d), size_t *n_flows)
{
    struct net_flow *flow = malloc((size_t)n * (size_t)n * sizeof *flow);
    *n_flows = 0;
    for (int s = 0; s < n; s++) {
        double sum = 0;
        for (int d = 0; d < n; d++)
            sum += weight(s, d);
        for (int d = 0; d < n; d++)
            if (d != s)
                flow[(*n_flows)++] = (struct net_flow){ s, d, 16 * MIB * weight(s, d) / sum };
    }
    return flow;
}

static inline double test_uniform(int s, int d)
{
    (void)s, (void)d;
    return 1;
}

static inline double test_zipf1(int s, int d)
{
    (void)s;
    return 1.0 / (d + 1);
}

static inline double test_uneven(int s, int d)
{
    return 0.01 + moe_unit(moe_mix((uint64_t)(s * 4096 + d)));
}

#define assert_near(a, b, relative) assert_float_close(a, b, relative, __FILE__, __LINE__)
static inline void assert_float_close(double a, double b, double relative, const char *file, int line)
{
    if (!(fabs(a - b) <= relative * fmax(fabs(a), fabs(b))))
        fail_msg("%s:%d: found %.12g, expected %.12g within %g", file, line, a, b, relative);
}

#endif
