/* SPDX-License-Identifier: Apache-2.0
 * topology_check.c - a machine description checked key by key.
 *
 * A description is a table of tables (see doc/machines.md). `fields` below lists every key there is; whatever is not
 * in it is an error. */
#include "config.h"

#include "topology_check.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define MAX_DEVICES 65536

/* ---- the format ---- */

/* Keys that are tables of their own are named here, the rest in fields[]. */
static const struct {
    const char *key, *path; /* path: what stands before its keys in a message */
    enum section parent;
    bool required, figures; /* figures: published or measured, so `source` must say whose; peak's is device's */
} sections[N_SECTIONS] = {
    [TOP] = { "", "", TOP, true, false },
    [DEVICE] = { "device", "device.", TOP, true, true },
    [PEAK] = { "peak", "device.peak.", DEVICE, true, false },
    [GEMM] = { "gemm", "device.gemm.", DEVICE, true, false },
    [NVLINK] = { "nvlink", "nvlink.", TOP, false, true },
    [PCIE] = { "pcie", "pcie.", TOP, false, true },
    [HOST] = { "host", "host.", TOP, false, true },
    [SSD] = { "ssd", "ssd.", TOP, false, true },
    [NIC] = { "nic", "nic.", TOP, false, true },
    [EXCHANGE] = { "exchange", "exchange.", TOP, false, true },
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

    { PEAK, "fp32", NUMBER, false, RATE, 0, "FLOP/s" },
    { PEAK, "tf32", NUMBER, false, RATE, 0, "FLOP/s" },
    { PEAK, "bf16", NUMBER, true, RATE, 0, "FLOP/s" },
    { PEAK, "fp8", NUMBER, false, RATE, 0, "FLOP/s" },
    { PEAK, "int8", NUMBER, false, RATE, 0, "FLOP/s" },
    { PEAK, "int4", NUMBER, false, RATE, 0, "FLOP/s" },

    { GEMM, "sms", INTEGER, true, 1, 10000, 0, "tiles at once" },
    { GEMM, "mma_efficiency", NUMBER, true, SHARE, 0, "of peak" },
    { GEMM, "port_bandwidth", NUMBER, true, BANDWIDTH, 0, "B/s per SM" },
    { GEMM, "store_bandwidth", NUMBER, true, BANDWIDTH, 0, "B/s per SM" },
    { GEMM, "mem_efficiency", NUMBER, true, SHARE, 0, "of mem_bandwidth" },
    { GEMM, "launch_s", NUMBER, true, SECONDS, 0, "s" },
    { GEMM, "overlap", NUMBER, true, 1, 100, 0, "exponent" },

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

    { EXCHANGE, "startup", NUMBER, true, SECONDS, 0, "s per exchange" },
    { EXCHANGE, "per_peer", NUMBER, false, SECONDS, 0, "s per device that a device sends to" },
    { EXCHANGE, "per_message", NUMBER, false, SECONDS, 0, "s of the sender per message" },
    { EXCHANGE, "message_overhead", NUMBER, false, 0, 1e6, 0, "bytes per message" },
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

int topology_check(json_t *description, json_t *table[N_SECTIONS], const char *file, struct err *err)
{
    int rc = check_sections(description, table, file, err);
    return rc ? rc : check_links(table, file, err);
}
