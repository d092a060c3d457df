/* SPDX-License-Identifier: Apache-2.0
 * bench_net TIER TRAFFIC N - one exchange among N devices, 16 MiB from each, or the work W2, on the machine of the
 * common work: prints wall seconds, the most memory held at a time in MB, and the simulated seconds.
 *
 *   TIER     bound, flow, exact; simgrid and ptask: moelab-simgrid in $MOELAB_LIBEXEC by itself, a flow per pair or all
 *            flows as one parallel task
 *   TRAFFIC  uniform (W1), uneven (uniform weights), lognormal; w2: 58 x (compute 200 us, W1, compute 100 us, W1) */
#include "config.h"

#include "graph.h"
#include "machine.h"
#include "script.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const double per_rank = 16777216;

static double clock_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void die(const char *text)
{
    fprintf(stderr, "bench_net: %s\n", text);
    exit(2);
}

static double weight(const char *traffic, uint64_t pair)
{
    double sum = 0;
    if (!strcmp(traffic, "uniform"))
        return 1;
    if (!strcmp(traffic, "uneven"))
        return 0.01 + moe_unit(moe_mix(pair));
    for (uint64_t j = 0; j < 12; j++) /* near enough to a normal */
        sum += moe_unit(moe_mix(pair * 12 + j + 1));
    return exp(sum - 6);
}

/* Every device sends 16 MiB in all; what would stay is dropped. */
static struct net_flow *exchange(const char *traffic, int32_t n, size_t *n_flows)
{
    struct net_flow *flow = malloc((size_t)n * (size_t)n * sizeof *flow);
    if (!flow)
        die("out of memory");
    *n_flows = 0;
    for (int32_t s = 0; s < n; s++) {
        double sum = 0;
        for (int32_t d = 0; d < n; d++)
            sum += weight(traffic, (uint64_t)s * 4096 + (uint64_t)d);
        for (int32_t d = 0; d < n; d++)
            if (d != s)
                flow[(*n_flows)++] = (struct net_flow){
                    .src = s, .dst = d, .bytes = per_rank * weight(traffic, (uint64_t)s * 4096 + (uint64_t)d) / sum
                };
    }
    return flow;
}

static struct topology *machine(int32_t n)
{
    const char *top = getenv("top_srcdir");
    char path[4096], file[4096];
    struct err e = { 0 };
    json_t *d = NULL;
    struct topology *t = NULL;
    snprintf(path, sizeof path, "%s/hw/machines/star-50GBps.lua", top ? top : ".");
    if (script_machine(path, &d, file, sizeof file, &e) == 0) {
        json_object_set_new(d, "nodes", json_integer(n));
        topology_build(&t, d, file, &e);
    }
    json_decref(d);
    if (e.code)
        die(e.text);
    return t;
}

static void one_exchange(enum net_tier tier, const char *traffic, int32_t n)
{
    struct topology *t = machine(n);
    struct err e = { 0 };
    struct net *net;
    struct net_done *done = malloc((size_t)n * sizeof *done);
    size_t n_flows, got = 1;
    struct net_flow *flow = exchange(traffic, n, &n_flows);
    double last = 0, start = clock_now();
    if (!done || net_open(&net, t, tier, &e) || net_start(net, 0, 0, flow, n_flows, &e))
        die(e.text);
    while (got > 0) {
        if (net_advance(net, INFINITY, done, (size_t)n, &got, &e))
            die(e.text);
        last = got > 0 ? done[0].time : last;
    }
    struct rusage used;
    double seconds = clock_now() - start;
    getrusage(RUSAGE_SELF, &used);
    printf("%.4g %.1f %.9g\n", seconds, (double)used.ru_maxrss * 1024 / 1e6, last);
    net_close(net);
    free(done);
    free(flow);
    topology_free(t);
}

/* The server by itself, fed from a file: its time and memory are SimGrid's. */
static void by_simgrid(const char *traffic, int32_t n, bool parallel_task)
{
    char path[4096], line[256];
    size_t n_flows, i;
    struct net_flow *flow = exchange(traffic, n, &n_flows);
    FILE *in = tmpfile(), *out = tmpfile();
    if (!in || !out)
        die("no temporary file");
    fprintf(in, "platform %d %d %zu\n", n, 2 * n, n_flows);
    for (int32_t l = 0; l < 2 * n; l++)
        fprintf(in, "5e10 5e10\n");
    for (i = 0; i < n_flows; i++)
        fprintf(in, "%d %d 2 %d %d\n", flow[i].src, flow[i].dst, 2 * flow[i].src, 2 * flow[i].dst + 1);
    fprintf(in, "start 0 %zu\n", n_flows);
    for (i = 0; i < n_flows; i++)
        fprintf(in, "%zu %d %d %a\n", i, flow[i].src, flow[i].dst, flow[i].bytes);
    for (i = 0; i < n_flows; i++) /* more than there are ends: the last ones find nothing */
        fprintf(in, "advance inf\n");
    rewind(in);
    free(flow);
    snprintf(path, sizeof path, "%s/moelab-simgrid", getenv("MOELAB_LIBEXEC") ? getenv("MOELAB_LIBEXEC") : "hw");
    double start = clock_now(), last = 0;
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fileno(in), STDIN_FILENO);
        dup2(fileno(out), STDOUT_FILENO);
        execl(path, path, parallel_task ? "--parallel-task" : (char *)NULL, (char *)NULL);
        _exit(127);
    }
    int status = 1;
    struct rusage used = { 0 };
    if (pid < 0 || wait4(pid, &status, 0, &used) < 0 || status != 0)
        die("moelab-simgrid failed");
    double seconds = clock_now() - start;
    rewind(out);
    while (fgets(line, sizeof line, out)) {
        char *at;
        (void)strtol(line, &at, 10);
        double time = at != line && *at == ' ' ? strtod(at, NULL) : 0;
        last = time > last ? time : last;
    }
    printf("%.4g %.1f %.9g\n", seconds, (double)used.ru_maxrss * 1024 / 1e6, last);
    fclose(in);
    fclose(out);
}

/* ---- W2 ---- */

/* Everyone computes for so long, once `after` is done (-1: at once); returns what ends when all have. */
static int32_t compute(struct moe_graph *g, const struct device_spec *d, double seconds, int32_t after, struct err *e)
{
    int32_t join = graph_join(g, e);
    for (int32_t i = 0; i < g->n_devices; i++) {
        struct moe_work w = { .device = i, .bytes = (seconds - d->launch_s) * d->mem_bandwidth * d->mem_efficiency };
        int32_t task = graph_compute(g, &w, e);
        if (after >= 0)
            graph_after(g, task, after, e);
        graph_after(g, join, task, e);
    }
    return join;
}

static void w2(enum net_tier tier, int32_t n)
{
    struct topology *t = machine(n);
    struct moe_graph g = { .n_devices = n };
    struct moe_model model = { .n_layers = 1, .n_experts = 1, .d_model = 1, .d_expert = 1 };
    struct machine m;
    struct err e = { 0 };
    size_t n_flows;
    struct net_flow *flow = exchange("uniform", n, &n_flows);
    struct moe_part *part = calloc(n_flows, sizeof *part);
    if (!part)
        die("out of memory");
    for (size_t i = 0; i < n_flows; i++)
        part[i] = (struct moe_part){ .src = flow[i].src, .dst = flow[i].dst, .bytes = flow[i].bytes };
    free(flow);
    const struct moe_exchange w1 = { .n_parts = (int32_t)n_flows, .part = part };
    int32_t last = -1;
    for (int i = 0; i < 2 && !e.code; i++) {
        int32_t before = compute(&g, &t->device[0], i == 0 ? 200e-6 : 100e-6, last, &e);
        last = graph_exchange(&g, &w1, &e);
        graph_after(&g, last, before, &e);
    }
    free(part);
    double start = clock_now();
    if (e.code || machine_open_sim(&m, t, &model, PREC_BF16, tier, &e))
        die(e.text);
    for (int step = 0; step < 58; step++) /* the next one begins when everything of this one has ended */
        if (machine_run(&m, &g, &e))
            die(e.text);
    struct rusage used;
    double seconds = clock_now() - start;
    getrusage(RUSAGE_SELF, &used);
    printf("%.4g %.1f %.9g\n", seconds, (double)used.ru_maxrss * 1024 / 1e6, m.now);
    machine_close(&m);
    graph_free(&g);
    topology_free(t);
}

int main(int argc, char **argv)
{
    int32_t n = argc == 4 ? (int32_t)strtol(argv[3], NULL, 10) : 0, tier = 0;
    if (n < 2 || n > 4096) {
        fprintf(stderr, "usage: bench_net bound|flow|exact|simgrid|ptask uniform|uneven|lognormal|w2 N\n");
        return 2;
    }
    while (tier < N_NET_TIERS && strcmp(argv[1], net_tier_name[tier]))
        tier++;
    if (tier >= NET_SIMGRID)
        by_simgrid(argv[2], n, !strcmp(argv[1], "ptask"));
    else if (!strcmp(argv[2], "w2"))
        w2((enum net_tier)tier, n);
    else
        one_exchange((enum net_tier)tier, argv[2], n);
    return 0;
}
