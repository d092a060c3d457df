/* SPDX-License-Identifier: Apache-2.0
 * eval_machine.c - moelab eval machine: one exchange, all flows at once, on a machine's network. */
#include "config.h"

#include "eval_job.h"
#include "models.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct work {
    enum net_tier tier;
    int32_t n_devices;
    double *traffic;         /* [N][N], or NULL: a pattern */
    double *share;           /* [N] bytes that every source sends to a destination */
    struct net_flow *flow;
    size_t n_flows;
    struct net_done *done;   /* room for all receivers */
    double *finish;          /* [N] s */
    double *link_bytes;      /* [links] */
    double seconds;
};

int job_tier(struct eval_job *j, const char *name, enum net_tier *tier)
{
    int t = 0;
    while (t < N_NET_TIERS && strcmp(name, net_tier_name[t]) != 0)
        t++;
    if (t == N_NET_TIERS) {
        const char *near = err_nearest(name, net_tier_name, N_NET_TIERS);
        return err_set(j->err, ERR_INPUT, "%s: unknown tier \"%s\"%s%s", j->who, name,
                       near ? "; did you mean " : ", expected bound, flow, exact or simgrid", near ? near : "");
    }
    *tier = (enum net_tier)t;
    return 0;
}

/* All to all: each destination gets the same from everyone, evenly or by the weights of a Zipf law. */
static int read_pattern(struct eval_job *j, struct work *w)
{
    const char *pattern = job_option_text(j, "pattern"), *weights = job_option_text(j, "weights");
    double bytes = job_option_real(j, "bytes_per_rank", -1), sum = 0;
    int64_t n = job_option_whole(j, "n", 0);
    if (strcmp(pattern, "alltoall") != 0)
        return err_set(j->err, ERR_INPUT, "%s: unknown pattern \"%s\", expected alltoall", j->who, pattern);
    if (weights && strcmp(weights, "zipf1") != 0)
        return err_set(j->err, ERR_INPUT, "%s: unknown weights \"%s\", expected zipf1", j->who, weights);
    if (n == 0 || bytes < 0)
        return err_set(j->err, ERR_INPUT, "%s: --pattern alltoall needs --n and --bytes-per-rank", j->who);
    w->n_devices = (int32_t)n;
    if (!(w->share = job_alloc(j, (size_t)n, sizeof *w->share)))
        return j->err->code;
    for (int64_t i = 0; i < n; i++)
        sum += w->share[i] = weights ? 1 / (double)(i + 1) : 1;
    for (int64_t i = 0; i < n; i++)
        w->share[i] = bytes * (w->share[i] / sum);
    return 0;
}

static int read_traffic(struct eval_job *j, struct work *w)
{
    int64_t n = job_option_whole(j, "n", -1), shape[2] = { n, n };
    static const char *const others[] = { "bytes_per_rank", "weights" };
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (json_object_get(j->options, others[i]))
            return err_set(j->err, ERR_INPUT, "%s: %s belongs to a pattern, and there is none", j->who, others[i]);
    if (!job_has(j, "traffic"))
        return err_set(j->err, ERR_INPUT, "%s: no traffic: expected --traffic FILE.npy or --pattern alltoall", j->who);
    if (!(w->traffic = job_reals(j, "traffic", 2, shape, 0, 1e300)))
        return j->err->code;
    if (shape[0] != shape[1] || shape[0] < 1 || shape[0] > 65536)
        return job_fail(j, "traffic", "found [%lld, %lld], expected [N, N] with N from 1 to 65536",
                        (long long)shape[0], (long long)shape[1]);
    w->n_devices = (int32_t)shape[0];
    return 0;
}

static int list_flows(struct eval_job *j, struct work *w)
{
    const int32_t n = w->n_devices;
    if (!(w->flow = job_alloc(j, (size_t)n * (size_t)n, sizeof *w->flow)))
        return j->err->code;
    for (int32_t src = 0; src < n; src++)
        for (int32_t dst = 0; dst < n; dst++) {
            double bytes = w->traffic ? w->traffic[(size_t)src * (size_t)n + (size_t)dst] : w->share[dst];
            if (src != dst && bytes > 0)
                w->flow[w->n_flows++] = (struct net_flow){ src, dst, bytes };
        }
    struct message_count *sends = job_alloc(j, (size_t)j->topology->n_devices, sizeof *sends);
    if (!sends)
        return j->err->code;
    message_costs(j->topology, w->flow, w->n_flows, 0, false, sends);
    return 0;
}

static int read_all(struct eval_job *j, struct work *w)
{
    const char *tier = job_option_text(j, "tier"), *pattern = job_option_text(j, "pattern");
    if (pattern && job_has(j, "traffic"))
        return err_set(j->err, ERR_INPUT, "%s: both a pattern and traffic are given", j->who);
    if (job_tier(j, tier ? tier : "flow", &w->tier) < 0 ||
        (pattern ? read_pattern(j, w) : read_traffic(j, w)) < 0 || job_topology(j, j->name, w->n_devices, 0) < 0 ||
        list_flows(j, w) < 0)
        return j->err->code;
    w->done = job_alloc(j, (size_t)w->n_devices, sizeof *w->done);
    w->finish = job_alloc(j, (size_t)w->n_devices, sizeof *w->finish);
    w->link_bytes = job_alloc(j, (size_t)j->topology->n_links, sizeof *w->link_bytes);
    return j->err->code;
}

static int solve_once(struct eval_job *j, struct work *w)
{
    struct net *net;
    if (net_open(&net, j->topology, w->tier, j->err) < 0)
        return j->err->code;
    double start = job_clock();
    net_start(net, 0, 0, w->flow, w->n_flows, j->err);
    for (size_t n = 1; n > 0 && !j->err->code;) {
        if (net_advance(net, INFINITY, w->done, (size_t)w->n_devices, &n, j->err) < 0)
            break;
        for (size_t i = 0; i < n; i++)
            w->finish[w->done[i].dst] = w->done[i].time;
    }
    double seconds = job_clock() - start;
    w->seconds = w->seconds == 0 || seconds < w->seconds ? seconds : w->seconds;
    const double *link_bytes = j->err->code ? NULL : net_link_bytes(net);
    if (link_bytes)
        memcpy(w->link_bytes, link_bytes, sizeof *w->link_bytes * (size_t)j->topology->n_links);
    net_close(net);
    return j->err->code;
}

/* Walks over the times in which a link has one bandwidth, until `end` or until it could have carried `bytes`: when that
 * is; *room: what it could have carried by then. */
static double follow_link(const struct topology *t, int32_t link, double bytes, double end, double *room)
{
    double bandwidth = t->link[link].bandwidth, at = 0;
    *room = 0;
    for (int32_t i = 0; i <= t->n_changes; i++) {
        if (i < t->n_changes && t->change[i].link != link)
            continue;
        double until = i < t->n_changes ? fmin(t->change[i].at, end) : end;
        if (bandwidth > 0 && bytes - *room <= bandwidth * (until - at)) {
            at += (bytes - *room) / bandwidth;
            *room = bytes;
            return at;
        }
        *room += bandwidth > 0 ? bandwidth * (until - at) : 0;
        at = until;
        if (i < t->n_changes)
            bandwidth = t->change[i].bandwidth;
    }
    return at;
}

static json_t *list_links(const struct eval_job *j, const struct work *w, double makespan)
{
    json_t *list = json_array();
    for (int32_t l = 0; l < j->topology->n_links; l++) {
        double room;
        if (w->link_bytes[l] <= 0)
            continue;
        follow_link(j->topology, l, INFINITY, makespan, &room);
        json_array_append_new(list, json_pack("{s:s, s:f, s:f}", "name", j->topology->link[l].name, "bytes",
                                              w->link_bytes[l], "utilization", w->link_bytes[l] / room));
    }
    return list;
}

/* No exchange is shorter than its busiest link alone. */
static double bound_of(const struct eval_job *j, const struct work *w)
{
    double bound = 0, room;
    for (int32_t l = 0; l < j->topology->n_links; l++)
        if (w->link_bytes[l] > 0)
            bound = fmax(bound, follow_link(j->topology, l, w->link_bytes[l], INFINITY, &room));
    return bound;
}

int eval_machine(struct eval_job *j, json_t *out)
{
    struct work w = { .seconds = 0 };
    double makespan = 0;
    if (read_all(j, &w) < 0)
        return j->err->code;
    for (int32_t i = 0; i < j->n_repeats; i++)
        if (solve_once(j, &w) < 0)
            return j->err->code;
    for (int32_t d = 0; d < w.n_devices; d++)
        makespan = fmax(makespan, w.finish[d]);
    json_object_set_new(out, "makespan_s", json_real(makespan));
    json_object_set_new(out, "bound_s", json_real(bound_of(j, &w)));
    json_object_set_new(out, "finish_s", job_list_reals(w.finish, w.n_devices));
    if (json_is_true(json_object_get(j->options, "links")))
        json_object_set_new(out, "links", list_links(j, &w, makespan));
    json_object_set_new(out, "seconds", json_real(w.seconds));
    json_object_set_new(out, "tier", json_string(net_tier_name[w.tier]));
    json_object_set_new(out, "models", models_json(j->topology, w.tier, false));
    return 0;
}
