/* SPDX-License-Identifier: Apache-2.0
 * machine_facts.c - devices, links, routes and bisection of a machine, found by asking its topology. */
#include "config.h"

#include "machine_facts.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_KINDS = 64, MAX_BISECTED = 8192 };

/* ---- devices and hosts, in runs of equal ones ---- */

static bool same_device(const struct device_spec *a, const struct device_spec *b)
{
    for (int p = 0; p < N_PRECISIONS; p++)
        if (a->peak[p] != b->peak[p])
            return false;
    return !strcmp(a->name, b->name) && a->memory == b->memory && a->mem_bandwidth == b->mem_bandwidth;
}

static json_t *list_devices(const struct topology *t)
{
    json_t *list = json_array();
    for (int32_t d = 0, end; d < t->n_devices; d = end) {
        const struct device_spec *spec = &t->device[d];
        json_t *peak = json_object();
        for (end = d + 1; end < t->n_devices && same_device(spec, &t->device[end]);)
            end++;
        for (int p = 0; p < N_PRECISIONS; p++)
            if (spec->peak[p] > 0)
                json_object_set_new(peak, precision_name[p], json_real(spec->peak[p]));
        json_array_append_new(list, json_pack("{s:i, s:i, s:s, s:f, s:f, s:o}", "first", d, "last", end - 1, "name",
                                              spec->name, "memory", spec->memory, "mem_bandwidth", spec->mem_bandwidth,
                                              "peak", peak));
    }
    return list;
}

static json_t *list_hosts(const struct topology *t)
{
    json_t *list = json_array();
    for (int32_t n = 0, end; n < t->n_nodes; n = end) {
        for (end = n + 1; end < t->n_nodes && t->host_memory[end] == t->host_memory[n] &&
                          t->host_mem_bandwidth[end] == t->host_mem_bandwidth[n] &&
                          t->host_flops[end] == t->host_flops[n] && t->unified[end] == t->unified[n];)
            end++;
        if (t->host_memory[n] > 0)
            json_array_append_new(list,
                                  json_pack("{s:i, s:i, s:f, s:f, s:f, s:b}", "first", n, "last", end - 1, "memory",
                                            t->host_memory[n], "mem_bandwidth", t->host_mem_bandwidth[n], "flops",
                                            t->host_flops[n], "unified", t->unified[n]));
    }
    return list;
}

/* ---- links ---- */

void machine_link_sort(const char *name, char out[64])
{
    size_t n = 0;
    for (const char *c = name; *c && n + 1 < 64; c++)
        if (!isdigit((unsigned char)*c))
            out[n++] = *c;
        else if (n == 0 || out[n - 1] != '*')
            out[n++] = '*';
    out[n] = '\0';
}

/* Both directions of a link count as one sort. */
static json_t *list_links(const struct topology *t)
{
    json_t *list = json_array();
    for (int32_t l = 0; l < t->n_links; l++) {
        char sort[64];
        machine_link_sort(t->link[l].name, sort);
        char *way = strrchr(sort, '.');
        const bool pair = way && (!strcmp(way, ".out") || !strcmp(way, ".in"));
        if (pair)
            *way = '\0';
        json_t *known = NULL;
        for (size_t i = 0; i < json_array_size(list) && !known; i++) {
            json_t *x = json_array_get(list, i);
            if (!strcmp(json_string_value(json_object_get(x, "name")), sort) &&
                json_real_value(json_object_get(x, "bandwidth")) == t->link[l].bandwidth)
                known = x;
        }
        if (!known) {
            known = json_pack("{s:s, s:b, s:i, s:f, s:f}", "name", sort, "both_ways", pair, "n", 0, "bandwidth",
                              t->link[l].bandwidth, "latency", t->link[l].latency);
            json_array_append_new(list, known);
        }
        if (!pair || !strcmp(t->link[l].name + strlen(t->link[l].name) - 4, ".out"))
            json_object_set_new(known, "n", json_integer(json_integer_value(json_object_get(known, "n")) + 1));
    }
    return list;
}

/* ---- kinds of pairs ---- */

struct kinds {
    json_t *list;
    char seen[MAX_KINDS][512];
    int n;
};

static void endpoint_name(const struct topology *t, int32_t id, char out[32])
{
    if (id < t->n_devices)
        snprintf(out, 32, "gpu%d", id);
    else if (id < t->n_devices + t->n_nodes)
        snprintf(out, 32, "node%d.memory", id - t->n_devices);
    else
        snprintf(out, 32, "node%d.ssd", id - t->n_devices - t->n_nodes);
}

/* Adds a pair unless one of the same links, but for their numbers, is there. */
static void add_pair(struct kinds *k, const struct topology *t, int32_t src, int32_t dst, const char *what)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    double latency, least = INFINITY;
    char text[512] = "", sort[64], from[32], to[32];
    const int n = topology_route(t, src, dst, 0, link, &latency);
    if (n <= 0 || k->n == MAX_KINDS)
        return;
    for (int i = 0; i < n; i++) {
        machine_link_sort(t->link[link[i]].name, sort);
        least = fmin(least, t->link[link[i]].bandwidth);
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s ", sort);
    }
    snprintf(text + strlen(text), sizeof text - strlen(text), "%.9g", least);
    for (int i = 0; i < k->n; i++)
        if (!strcmp(k->seen[i], text))
            return;
    memcpy(k->seen[k->n++], text, sizeof text);
    json_t *names = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(names, json_string(t->link[link[i]].name));
    endpoint_name(t, src, from);
    endpoint_name(t, dst, to);
    json_array_append_new(k->list, json_pack("{s:s, s:s, s:s, s:o, s:f, s:f, s:i}", "what", what, "from", from, "to",
                                             to, "links", names, "bandwidth", least, "latency", latency, "paths",
                                             topology_paths(t, src, dst)));
}

static json_t *list_pairs(const struct topology *t)
{
    struct kinds *k = calloc(1, sizeof *k);
    if (!k)
        return json_array();
    k->list = json_array();
    for (int32_t n = 0; n < t->n_nodes; n++) {
        const int32_t src = t->first_device[n];
        /* Nodes like the one before have nothing new to show. */
        if (n > 0 && t->first_device[n + 1] - src == src - t->first_device[n - 1] &&
            same_device(&t->device[src], &t->device[src - 1]) && t->host_memory[n] == t->host_memory[n - 1])
            continue;
        for (int32_t d = 0; d < t->n_devices; d++)
            if (t->node[d] == n)
                add_pair(k, t, src, d, "two devices of a node");
        for (int32_t d = 0; d < t->n_devices; d++)
            if (t->node[d] != n)
                add_pair(k, t, src, d, "devices of two nodes");
        add_pair(k, t, topology_host(t, n), src, "host to device");
        add_pair(k, t, src, topology_host(t, n), "device to host");
        add_pair(k, t, topology_ssd(t, n), topology_host(t, n), "ssd to host");
    }
    json_t *list = k->list;
    free(k);
    return list;
}

/* ---- bisection ---- */

/* The rate at which the lower half of the devices sends to the upper half, each to each alike: bytes over the time of
 * the busiest link. Flows over several paths count as the network spreads them. */
static json_t *bisection(const struct topology *t)
{
    const int32_t half = t->n_devices / 2;
    double *bytes =
        t->n_devices > 1 && t->n_devices <= MAX_BISECTED ? calloc((size_t)t->n_links + 1, sizeof *bytes) : NULL;
    double longest = 0;
    int32_t link[TOPOLOGY_MAX_HOPS], busiest = 0;
    struct net_flow *cut;
    struct err e = { 0 };
    size_t n_cut;
    if (!bytes)
        return NULL;
    for (int32_t s = 0; s < half; s++)
        for (int32_t d = half; d < t->n_devices; d++) {
            const struct net_flow one = { .src = s, .dst = d, .bytes = 1 };
            if (topology_split(t, 0, &one, 1, &cut, &n_cut, &e))
                continue;
            const struct net_flow *flow = cut ? cut : &one;
            for (size_t i = 0; i < (cut ? n_cut : 1); i++) {
                const int n = topology_route(t, s, d, flow[i].path, link, NULL);
                for (int h = 0; h < n; h++)
                    bytes[link[h]] += flow[i].bytes;
            }
            free(cut);
        }
    for (int32_t l = 0; l < t->n_links; l++)
        if (bytes[l] / t->link[l].bandwidth > longest) {
            longest = bytes[l] / t->link[l].bandwidth;
            busiest = l;
        }
    free(bytes);
    return json_pack("{s:i, s:f, s:s}", "lower_half", half, "bandwidth",
                     (double)half * (double)(t->n_devices - half) / longest, "binds", t->link[busiest].name);
}

/* ---- sources ---- */

static void add_source(json_t *list, const char *table, const json_t *v)
{
    const json_t *source = json_object_get(v, "source"), *assumed = json_object_get(v, "assumed");
    if (!source)
        return;
    json_t *o = json_pack("{s:s, s:O}", "table", table, "source", source);
    if (assumed)
        json_object_set(o, "assumed", (json_t *)(uintptr_t)assumed);
    json_array_append_new(list, o);
}

static json_t *list_sources(const struct topology *t)
{
    /* In this order, whatever order the file's tables came in. */
    static const char *const key[] = { "device", "nvlink", "pcie", "host", "ssd", "nic", "exchange", "network",
                                       "energy", "platform" };
    enum { N_KEYS = sizeof key / sizeof *key };
    json_t *list = json_array();
    const json_t *groups = json_object_get(t->description, "groups");
    for (int k = 0; k < N_KEYS; k++)
        add_source(list, key[k], json_object_get(t->description, key[k]));
    for (size_t g = 0; g < json_array_size(groups); g++)
        for (int k = 0; k < N_KEYS; k++) {
            char table[80];
            snprintf(table, sizeof table, "groups[%zu].%s", g + 1, key[k]);
            add_source(list, table, json_object_get(json_array_get(groups, g), key[k]));
        }
    return list;
}

json_t *machine_facts(const struct topology *t)
{
    json_t *cut = bisection(t);
    json_t *o = json_pack("{s:s, s:O, s:i, s:i, s:o, s:o, s:o, s:o, s:o}", "name", t->name, "summary",
                          json_object_get(t->description, "summary"), "nodes", t->n_nodes, "n_devices", t->n_devices,
                          "devices", list_devices(t), "hosts", list_hosts(t), "links", list_links(t), "pairs",
                          list_pairs(t), "sources", list_sources(t));
    if (cut)
        json_object_set_new(o, "bisection", cut);
    static const char *const lists[] = { "network", "energy", "slow", "faults" };
    for (int i = 0; i < 4; i++)
        if (json_object_get(t->description, lists[i]))
            json_object_set(o, lists[i], json_object_get(t->description, lists[i]));
    return o;
}
