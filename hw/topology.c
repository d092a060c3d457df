/* SPDX-License-Identifier: Apache-2.0
 * topology.c - a machine description checked key by key, and the links between any two endpoints.
 *
 * A description is a table of tables (see doc/machines.md). `fields` below lists every key there is; whatever is not
 * in it is an error. Routes are computed, never stored: links of one sort lie behind each other, two per device or
 * node (out, in), so a route is a few additions and 4096 devices need no N^2 table. */
#include "config.h"

#include "machine.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const precision_name[N_PRECISIONS] = { "fp32", "tf32", "bf16", "fp8", "int8", "int4" };

#define MAX_DEVICES 65536

/* Where the links of each sort begin; -1: there are none. Links with a direction come in pairs: out, in. */
struct layout {
    int32_t nvlink, pcie, nic; /* per device (nic: per node when shared) */
    int32_t uplink, memory;    /* per node; memory is one link, reads and writes share it */
    int32_t ssd;               /* per node, reads only */
    int32_t *node;             /* [D] of each device */
    bool nic_shared;
    bool peer; /* devices reach each other over PCIe without a stop in host memory */
};

/* ---- the format ---- */

enum section { TOP, DEVICE, PEAK, NVLINK, PCIE, HOST, SSD, NIC, N_SECTIONS };

/* Keys that are tables of their own are named here, the rest in fields[]. */
static const struct {
    const char *key, *path; /* path: what stands before its keys in a message */
    enum section parent;
    bool required, figures; /* figures: published or measured, so `source` must say whose; peak's is device's */
} sections[N_SECTIONS] = {
    [TOP] = { "", "", TOP, true, false },
    [DEVICE] = { "device", "device.", TOP, true, true },
    [PEAK] = { "peak", "device.peak.", DEVICE, true, false },
    [NVLINK] = { "nvlink", "nvlink.", TOP, false, true },
    [PCIE] = { "pcie", "pcie.", TOP, false, true },
    [HOST] = { "host", "host.", TOP, false, true },
    [SSD] = { "ssd", "ssd.", TOP, false, true },
    [NIC] = { "nic", "nic.", TOP, false, true },
};

enum type { NUMBER, INTEGER, BOOLEAN, STRING };

/* Bounds are not physics: they catch figures in GB/s, TFLOP/s or microseconds. */
struct field {
    enum section section;
    const char *key;
    enum type type;
    bool required;
    double min, max, def;
    const char *unit;
};

#define BANDWIDTH 1e6, 1e16
#define MEMORY    1e6, 1e18
#define SECONDS   0, 1
#define RATE      1e9, 1e19
#define SHARE     0.01, 1

static const struct field fields[] = {
    { TOP, "name", STRING, true, 0, 0, 0, "" },
    { TOP, "summary", STRING, true, 0, 0, 0, "" },
    { TOP, "nodes", INTEGER, true, 1, MAX_DEVICES, 0, "nodes" },
    { TOP, "devices", INTEGER, true, 1, MAX_DEVICES, 0, "devices per node" },

    { DEVICE, "name", STRING, true, 0, 0, 0, "" },
    { DEVICE, "memory", NUMBER, true, MEMORY, 0, "bytes" },
    { DEVICE, "mem_bandwidth", NUMBER, true, BANDWIDTH, 0, "B/s" },
    { DEVICE, "launch_s", NUMBER, true, SECONDS, 0, "s" },
    { DEVICE, "flops_efficiency", NUMBER, true, SHARE, 0, "of peak" },
    { DEVICE, "mem_efficiency", NUMBER, true, SHARE, 0, "of mem_bandwidth" },
    { DEVICE, "half_rows", NUMBER, true, 0, 1e6, 0, "rows" },

    { PEAK, "fp32", NUMBER, false, RATE, 0, "FLOP/s" },
    { PEAK, "tf32", NUMBER, false, RATE, 0, "FLOP/s" },
    { PEAK, "bf16", NUMBER, true, RATE, 0, "FLOP/s" },
    { PEAK, "fp8", NUMBER, false, RATE, 0, "FLOP/s" },
    { PEAK, "int8", NUMBER, false, RATE, 0, "FLOP/s" },
    { PEAK, "int4", NUMBER, false, RATE, 0, "FLOP/s" },

    { NVLINK, "bandwidth", NUMBER, true, BANDWIDTH, 0, "B/s per device each way" },
    { NVLINK, "efficiency", NUMBER, false, SHARE, 1, "of bandwidth" },
    { NVLINK, "latency", NUMBER, true, SECONDS, 0, "s from device to device" },

    { PCIE, "bandwidth", NUMBER, true, BANDWIDTH, 0, "B/s per device each way" },
    { PCIE, "efficiency", NUMBER, false, SHARE, 1, "of bandwidth" },
    { PCIE, "latency", NUMBER, true, SECONDS, 0, "s from device to host" },
    { PCIE, "uplink", NUMBER, false, BANDWIDTH, 0, "B/s each way, shared by the node's devices" },
    { PCIE, "peer", BOOLEAN, false, 0, 0, 1, "" },

    { HOST, "memory", NUMBER, true, MEMORY, 0, "bytes" },
    { HOST, "mem_bandwidth", NUMBER, true, BANDWIDTH, 0, "B/s" },
    { HOST, "flops", NUMBER, true, RATE, 0, "FLOP/s" },

    { SSD, "bandwidth", NUMBER, true, BANDWIDTH, 0, "B/s, reading" },
    { SSD, "latency", NUMBER, true, SECONDS, 0, "s" },

    { NIC, "bandwidth", NUMBER, true, BANDWIDTH, 0, "B/s each way" },
    { NIC, "efficiency", NUMBER, false, SHARE, 1, "of bandwidth" },
    { NIC, "latency", NUMBER, true, SECONDS, 0, "s from NIC to NIC" },
    { NIC, "shared", BOOLEAN, false, 0, 0, 0, "" },
};

#define N_FIELDS (sizeof fields / sizeof fields[0])

/* ---- checking ---- */

static const char *type_found(const json_t *v, char text[64])
{
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "a table";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        snprintf(text, 64, "the string \"%.40s\"", json_string_value(v));
        return text;
    case JSON_INTEGER:
    case JSON_REAL:
        snprintf(text, 64, "%.15g", json_number_value(v));
        return text;
    case JSON_TRUE:
        return "true";
    case JSON_FALSE:
        return "false";
    default:
        return "nothing";
    }
}

static int check_keys(json_t *table, enum section s, const char *file, struct err *err)
{
    const char *known[N_FIELDS + N_SECTIONS + 2];
    int n = 0;
    for (size_t i = 0; i < N_FIELDS; i++)
        if (fields[i].section == s)
            known[n++] = fields[i].key;
    for (int i = TOP + 1; i < N_SECTIONS; i++)
        if (sections[i].parent == s)
            known[n++] = sections[i].key;
    if (sections[s].figures) {
        known[n++] = "source";
        known[n++] = "assumed";
    }

    const char *key;
    json_t *value;
    json_object_foreach(table, key, value) {
        int i = 0;
        while (i < n && strcmp(known[i], key) != 0)
            i++;
        if (i < n)
            continue;
        const char *near = err_nearest(key, known, n);
        return err_set(err, ERR_INPUT, "%s: %s%s: unknown key%s%s%s", file, sections[s].path, key,
                       near ? ", did you mean \"" : "", near ? near : "", near ? "\"?" : "");
    }
    return 0;
}

static int check_field(json_t *table, const struct field *f, const char *file, struct err *err)
{
    const char *path = sections[f->section].path;
    json_t *v = json_object_get(table, f->key);
    char found[64], expected[128];

    if (!v && f->required)
        return err_set(err, ERR_INPUT, "%s: %s%s: missing", file, path, f->key);
    if (!v && f->type == NUMBER && f->def == 0) /* the machine has none */
        return 0;
    if (!v) { /* so that the manifest shows it */
        v = f->type == BOOLEAN ? json_boolean(f->def != 0) : json_real(f->def);
        return json_object_set_new(table, f->key, v) ? err_set(err, ERR_MEMORY, "%s: out of memory", file) : 0;
    }

    bool ok = false;
    double x = json_number_value(v);
    switch (f->type) {
    case NUMBER:
    case INTEGER:
        ok = json_is_number(v) && isfinite(x) && x >= f->min && x <= f->max;
        if (f->type == INTEGER)
            ok = ok && x == floor(x);
        snprintf(expected, sizeof expected, "%s from %g to %g (%s)", f->type == INTEGER ? "a whole number" : "a number",
                 f->min, f->max, f->unit);
        break;
    case BOOLEAN:
        ok = json_is_boolean(v);
        snprintf(expected, sizeof expected, "true or false");
        break;
    case STRING:
        ok = json_is_string(v) && json_string_length(v) > 0;
        snprintf(expected, sizeof expected, "a string");
        break;
    }
    if (!ok)
        return err_set(err, ERR_INPUT, "%s: %s%s: found %s, expected %s", file, path, f->key, type_found(v, found),
                       expected);
    return 0;
}

static int check_source(const json_t *table, enum section s, const char *file, struct err *err)
{
    static const char *const keys[] = { "source", "assumed" };
    char found[64];
    for (int i = 0; i < 2; i++) {
        const json_t *v = json_object_get(table, keys[i]);
        if (!v && i == 0)
            return err_set(err, ERR_INPUT, "%s: %ssource: missing: every figure says where it comes from", file,
                           sections[s].path);
        if (v && (!json_is_string(v) || json_string_length(v) == 0))
            return err_set(err, ERR_INPUT, "%s: %s%s: found %s, expected a string", file, sections[s].path, keys[i],
                           type_found(v, found));
    }
    return 0;
}

static int check_sections(json_t *top, json_t *table[N_SECTIONS], const char *file, struct err *err)
{
    char found[64];
    int rc = 0;
    for (int s = TOP; s < N_SECTIONS && rc == 0; s++) {
        json_t *parent = table[sections[s].parent];
        table[s] = s == TOP ? top : parent ? json_object_get(parent, sections[s].key) : NULL;
        const char *path = sections[sections[s].parent].path;
        if (!table[s] && sections[s].required)
            return err_set(err, ERR_INPUT, "%s: %s%s: missing", file, path, sections[s].key);
        if (!table[s])
            continue;
        if (!json_is_object(table[s]))
            return err_set(err, ERR_INPUT, "%s: %s%s: found %s, expected a table", file, path, sections[s].key,
                           type_found(table[s], found));
        rc = check_keys(table[s], (enum section)s, file, err);
        for (size_t i = 0; i < N_FIELDS && rc == 0; i++)
            if (fields[i].section == (enum section)s)
                rc = check_field(table[s], &fields[i], file, err);
        if (rc == 0 && sections[s].figures)
            rc = check_source(table[s], (enum section)s, file, err);
    }
    return rc;
}

static double number(const json_t *table, const char *key)
{
    return json_number_value(json_object_get(table, key));
}

/* What no single key shows: links without which some endpoints could not reach each other. */
static int check_links(json_t *const table[N_SECTIONS], const char *file, struct err *err)
{
    double nodes = number(table[TOP], "nodes"), devices = number(table[TOP], "devices");
    if (nodes * devices > MAX_DEVICES)
        return err_set(err, ERR_INPUT, "%s: nodes: found %g nodes of %g devices, expected at most %d devices in all",
                       file, nodes, devices, MAX_DEVICES);
    if (nodes > 1 && !table[NIC])
        return err_set(err, ERR_INPUT, "%s: nic: missing: %g nodes cannot reach each other without one", file, nodes);
    if (devices > 1 && !table[NVLINK] && !table[PCIE])
        return err_set(err, ERR_INPUT, "%s: nvlink, pcie: both missing: a node's %g devices cannot reach each other",
                       file, devices);
    if (table[HOST] && !table[PCIE])
        return err_set(err, ERR_INPUT, "%s: pcie: missing: the host cannot reach its devices without it", file);
    if (table[SSD] && !table[HOST])
        return err_set(err, ERR_INPUT, "%s: host: missing: an ssd is read into host memory", file);
    if (table[PCIE] && json_is_false(json_object_get(table[PCIE], "peer")) && !table[HOST])
        return err_set(err, ERR_INPUT, "%s: host: missing: with pcie.peer = false devices meet in host memory", file);
    if (table[NIC] && json_is_true(json_object_get(table[NIC], "shared")) && !table[PCIE])
        return err_set(err, ERR_INPUT, "%s: pcie: missing: devices reach a shared nic over it", file);
    return 0;
}

/* ---- building ---- */

/* Adds n owners' links ("WHAT<i>.sort.out" and ".in", or one link without a direction); returns the first's id. */
static int32_t add_links(struct topology *t, int32_t n, const char *owner, const char *sort, bool pair,
                         double bandwidth, double latency_out, double latency_in)
{
    int32_t first = t->n_links;
    for (int32_t i = 0; i < n; i++) {
        for (int way = 0; way < (pair ? 2 : 1); way++) {
            struct link *l = &t->link[t->n_links++];
            snprintf(l->name, sizeof l->name, "%s%d.%s%s", owner, i, sort, !pair ? "" : way ? ".in" : ".out");
            l->bandwidth = bandwidth;
            l->latency = way ? latency_in : latency_out;
        }
    }
    return first;
}

static void build_links(struct topology *t, struct layout *lay, json_t *const table[N_SECTIONS])
{
    const json_t *nvlink = table[NVLINK], *pcie = table[PCIE], *nic = table[NIC];
    lay->nvlink = lay->pcie = lay->nic = lay->uplink = lay->memory = lay->ssd = -1;
    lay->peer = true;

    /* A latency from end to end sits on the way out; PCIe's counts each time a device's own link is crossed. */
    if (nvlink)
        lay->nvlink =
            add_links(t, t->n_devices, "gpu", "nvlink", true,
                      number(nvlink, "bandwidth") * number(nvlink, "efficiency"), number(nvlink, "latency"), 0);
    if (pcie) {
        double latency = number(pcie, "latency");
        lay->pcie = add_links(t, t->n_devices, "gpu", "pcie", true,
                              number(pcie, "bandwidth") * number(pcie, "efficiency"), latency, latency);
        lay->peer = json_is_true(json_object_get(pcie, "peer"));
        if (json_object_get(pcie, "uplink"))
            lay->uplink = add_links(t, t->n_nodes, "node", "pcie", true,
                                    number(pcie, "uplink") * number(pcie, "efficiency"), 0, 0);
    }
    if (nic) {
        lay->nic_shared = json_is_true(json_object_get(nic, "shared"));
        lay->nic = add_links(t, lay->nic_shared ? t->n_nodes : t->n_devices, lay->nic_shared ? "node" : "gpu", "nic",
                             true, number(nic, "bandwidth") * number(nic, "efficiency"), number(nic, "latency"), 0);
    }
    if (table[HOST])
        lay->memory = add_links(t, t->n_nodes, "node", "memory", false, number(table[HOST], "mem_bandwidth"), 0, 0);
    if (table[SSD])
        lay->ssd = add_links(t, t->n_nodes, "node", "ssd", false, number(table[SSD], "bandwidth"),
                             number(table[SSD], "latency"), 0);
}

static int copy_name(char out[64], const json_t *table, const char *path, const char *file, struct err *err)
{
    const char *name = json_string_value(json_object_get(table, "name"));
    if (snprintf(out, 64, "%s", name) >= 64)
        return err_set(err, ERR_INPUT, "%s: %sname: found %zu characters, expected at most 63", file, path,
                       strlen(name));
    return 0;
}

static void device_fill(struct device_spec *d, const json_t *device, const json_t *peak)
{
    d->memory = number(device, "memory");
    d->mem_bandwidth = number(device, "mem_bandwidth");
    d->launch_s = number(device, "launch_s");
    d->flops_efficiency = number(device, "flops_efficiency");
    d->mem_efficiency = number(device, "mem_efficiency");
    d->half_rows = number(device, "half_rows");
    for (int p = 0; p < N_PRECISIONS; p++)
        d->peak[p] = number(peak, precision_name[p]);
}

int topology_build(struct topology **out, const json_t *description, const char *file, struct err *err)
{
    *out = NULL;
    struct topology *t = calloc(1, sizeof *t);
    struct device_spec spec = { 0 };
    json_t *table[N_SECTIONS] = { NULL };
    int rc = ERR_MEMORY;
    if (!t)
        goto out;
    if (!json_is_object(description)) {
        rc = err_set(err, ERR_INPUT, "%s: expected a machine description, a table", file);
        goto out;
    }
    if (!(t->description = json_deep_copy(description)))
        goto out;
    if ((rc = check_sections(t->description, table, file, err)) || (rc = check_links(table, file, err)))
        goto out;
    if ((rc = copy_name(t->name, table[TOP], "", file, err)) ||
        (rc = copy_name(spec.name, table[DEVICE], "device.", file, err)))
        goto out;

    t->n_nodes = (int32_t)number(table[TOP], "nodes");
    t->devices_per_node = (int32_t)number(table[TOP], "devices");
    t->n_devices = t->n_nodes * t->devices_per_node;

    size_t n_nodes = (size_t)t->n_nodes, n_devices = (size_t)t->n_devices;
    rc = ERR_MEMORY;
    t->device = calloc(n_devices, sizeof *t->device);
    t->host_memory = calloc(n_nodes, sizeof(double));
    t->host_mem_bandwidth = calloc(n_nodes, sizeof(double));
    t->host_flops = calloc(n_nodes, sizeof(double));
    t->link = calloc(6 * n_devices + 4 * n_nodes, sizeof *t->link); /* every sort of link at once */
    struct layout *lay = t->priv = calloc(1, sizeof *lay);
    if (!t->device || !t->host_memory || !t->host_mem_bandwidth || !t->host_flops || !t->link || !lay ||
        !(lay->node = calloc(n_devices, sizeof *lay->node)))
        goto out;
    for (int32_t d = 0; d < t->n_devices; d++)
        lay->node[d] = d / t->devices_per_node;

    device_fill(&spec, table[DEVICE], table[PEAK]);
    for (size_t d = 0; d < n_devices; d++)
        t->device[d] = spec;
    for (size_t n = 0; n < n_nodes && table[HOST]; n++) {
        t->host_memory[n] = number(table[HOST], "memory");
        t->host_mem_bandwidth[n] = number(table[HOST], "mem_bandwidth");
        t->host_flops[n] = number(table[HOST], "flops");
    }
    build_links(t, lay, table);
    *out = t;
    t = NULL;
    rc = 0;
out:
    if (rc == ERR_MEMORY)
        err_set(err, ERR_MEMORY, "%s: out of memory", file);
    topology_free(t);
    return rc;
}

void topology_free(struct topology *t)
{
    if (!t)
        return;
    if (t->priv)
        free(((struct layout *)t->priv)->node);
    json_decref(t->description);
    free(t->device);
    free(t->host_memory);
    free(t->host_mem_bandwidth);
    free(t->host_flops);
    free(t->link);
    free(t->priv);
    free(t);
}

/* ---- routes ---- */

enum endpoint { AT_DEVICE, AT_HOST, AT_SSD };

static enum endpoint endpoint_kind(const struct topology *t, int32_t *id)
{
    if (*id < t->n_devices)
        return AT_DEVICE;
    *id -= t->n_devices;
    if (*id < t->n_nodes)
        return AT_HOST;
    *id -= t->n_nodes;
    return AT_SSD;
}

static int route_devices(const struct topology *t, int32_t src, int32_t dst, int32_t *link)
{
    const struct layout *lay = t->priv;
    int32_t from = lay->node[src], to = lay->node[dst];
    int n = 0;
    if (from != to && !lay->nic_shared) { /* GPUDirect: the NIC beside the device */
        link[n++] = lay->nic + 2 * src;
        link[n++] = lay->nic + 2 * dst + 1;
    } else if (from != to) {
        link[n++] = lay->pcie + 2 * src;
        link[n++] = lay->nic + 2 * from;
        link[n++] = lay->nic + 2 * to + 1;
        link[n++] = lay->pcie + 2 * dst + 1;
    } else if (lay->nvlink >= 0) {
        link[n++] = lay->nvlink + 2 * src;
        link[n++] = lay->nvlink + 2 * dst + 1;
    } else if (lay->peer) { /* below one PCIe switch or root: the uplink is not crossed */
        link[n++] = lay->pcie + 2 * src;
        link[n++] = lay->pcie + 2 * dst + 1;
    } else { /* staged: memory is written, then read, so its link is crossed twice */
        link[n++] = lay->pcie + 2 * src;
        if (lay->uplink >= 0)
            link[n++] = lay->uplink + 2 * from;
        link[n++] = lay->memory + from;
        link[n++] = lay->memory + from;
        if (lay->uplink >= 0)
            link[n++] = lay->uplink + 2 * from + 1;
        link[n++] = lay->pcie + 2 * dst + 1;
    }
    return n;
}

int topology_route(const struct topology *t, int32_t src, int32_t dst, int32_t link[TOPOLOGY_MAX_HOPS], double *latency)
{
    const struct layout *lay = t->priv;
    assert(src >= 0 && src < t->n_devices + 2 * t->n_nodes);
    assert(dst >= 0 && dst < t->n_devices + 2 * t->n_nodes);
    if (latency)
        *latency = 0;
    if (src == dst)
        return 0;

    int n = 0;
    if (src < t->n_devices && dst < t->n_devices) {
        n = route_devices(t, src, dst, link);
    } else {
        enum endpoint from = endpoint_kind(t, &src), to = endpoint_kind(t, &dst);
        int32_t node = from == AT_DEVICE ? dst : src;
        if (from == AT_DEVICE && to == AT_HOST && lay->memory >= 0 && lay->node[src] == node) {
            link[n++] = lay->pcie + 2 * src;
            if (lay->uplink >= 0)
                link[n++] = lay->uplink + 2 * node;
            link[n++] = lay->memory + node;
        } else if (from == AT_HOST && to == AT_DEVICE && lay->memory >= 0 && lay->node[dst] == node) {
            link[n++] = lay->memory + node;
            if (lay->uplink >= 0)
                link[n++] = lay->uplink + 2 * node + 1;
            link[n++] = lay->pcie + 2 * dst + 1;
        } else if (from == AT_SSD && to == AT_HOST && lay->ssd >= 0 && src == dst) {
            link[n++] = lay->ssd + node;
            link[n++] = lay->memory + node;
        } else {
            return -1;
        }
    }
    if (latency)
        for (int i = 0; i < n; i++)
            *latency += t->link[link[i]].latency;
    return n;
}
