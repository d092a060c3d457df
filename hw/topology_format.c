/* SPDX-License-Identifier: Apache-2.0
 * topology_format.c - a machine description key by key.
 *
 * A description is a table of tables (see doc/machines.md). `fields` below lists every key there is; whatever is not
 * in it is an error. */
#include "config.h"

#include "topology_internal.h"
#include "units.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- the format ---- */

#define IN(section) (1u << (section))

/* Keys that are tables or lists of their own are named here, the rest in fields[]. */
static const struct {
    const char *key;
    unsigned parents; /* sections whose key it is */
    bool required;    /* wherever a parent is */
    bool figures;     /* published or measured, so `source` must say whose; peak's and gemm's are device's */
    bool list;
} sections[N_SECTIONS] = {
    [TOP] = { "", 0, true, false, false },
    [DEVICE] = { "device", IN(TOP) | IN(GROUP), false, true, false },
    [PEAK] = { "peak", IN(DEVICE), true, false, false },
    [GEMM] = { "gemm", IN(DEVICE), true, false, false },
    [NVLINK] = { "nvlink", IN(TOP) | IN(GROUP), false, true, false },
    [PCIE] = { "pcie", IN(TOP) | IN(GROUP), false, true, false },
    [HOST] = { "host", IN(TOP) | IN(GROUP), false, true, false },
    [SSD] = { "ssd", IN(TOP) | IN(GROUP), false, true, false },
    [NIC] = { "nic", IN(TOP) | IN(GROUP), false, true, false },
    [NETWORK] = { "network", IN(TOP), false, true, false },
    [EXCHANGE] = { "exchange", IN(TOP), false, true, false },
    [ENERGY] = { "energy", IN(TOP) | IN(GROUP), false, true, false },
    [GROUP] = { "groups", IN(TOP), false, false, true },
    [SLOW] = { "slow", IN(TOP), false, false, true },
    [FAULT] = { "faults", IN(TOP), false, false, true },
};

/* Quantities are strings with a unit, shares and counts are numbers, and so are times whose key ends in _s. */
enum type { NUMBER, INTEGER, BOOLEAN, STRING, SIZE, BANDWIDTH, TIME, RATE, POWER, JOULES /* per byte */ };

/* Bounds are not physics: they catch slips of prefixes. */
struct field {
    enum section section;
    const char *key;
    enum type type;
    bool required;
    double min, max, def;
    const char *what; /* what of, in messages; a string's choices, the first is the default */
};

#define SECONDS 0, 1
#define TIMES   0, 1e6
#define SHARE   0.01, 1
#define RATIO   0.01, 1000

static const struct field fields[] = {
    { TOP, "name", STRING, true, 0, 0, 0, "" },
    { TOP, "summary", STRING, true, 0, 0, 0, "" },
    { TOP, "nodes", INTEGER, false, 1, TOPOLOGY_MAX_DEVICES, 0, "nodes" },
    { TOP, "devices", INTEGER, false, 1, TOPOLOGY_MAX_DEVICES, 0, "devices per node" },
    { TOP, "pace", NUMBER, false, 0.1, 10, 1, "times as long" },
    { TOP, "probe_s", NUMBER, false, 1e-9, 1, 0, "of machine host's probe" },

    { GROUP, "nodes", INTEGER, true, 1, TOPOLOGY_MAX_DEVICES, 0, "nodes" },
    { GROUP, "devices", INTEGER, true, 1, TOPOLOGY_MAX_DEVICES, 0, "devices per node" },

    { DEVICE, "name", STRING, true, 0, 0, 0, "" },
    { DEVICE, "memory", SIZE, true, 1e6, 1e17, 0, "" },
    { DEVICE, "mem_bandwidth", BANDWIDTH, true, 1e6, 1e16, 0, "" },
    { DEVICE, "launch_s", NUMBER, true, SECONDS, 0, "s" },
    { DEVICE, "flops_efficiency", NUMBER, true, SHARE, 0, "of peak" },
    { DEVICE, "mem_efficiency", NUMBER, true, SHARE, 0, "of mem_bandwidth" },
    { DEVICE, "read_efficiency", NUMBER, false, SHARE, 0, "of mem_bandwidth" },
    { DEVICE, "decode_efficiency", NUMBER, false, SHARE, 0, "of peak" },
    { DEVICE, "combine_efficiency", NUMBER, false, SHARE, 0, "of mem_bandwidth" },

    { PEAK, "fp32", RATE, false, 1e9, 1e19, 0, "" },
    { PEAK, "tf32", RATE, false, 1e9, 1e19, 0, "" },
    { PEAK, "bf16", RATE, false, 1e9, 1e19, 0, "" },
    { PEAK, "fp16", RATE, false, 1e9, 1e19, 0, "" },
    { PEAK, "fp8", RATE, false, 1e9, 1e19, 0, "" },
    { PEAK, "int8", RATE, false, 1e9, 1e19, 0, "" },
    { PEAK, "int4", RATE, false, 1e9, 1e19, 0, "" },

    { GEMM, "sms", INTEGER, true, 1, 10000, 0, "tiles at once" },
    { GEMM, "tile_m", INTEGER, false, 1, 1024, 0, "rows" },
    { GEMM, "rest", NUMBER, false, 0.01, 100, 0, "of a tile's time" },
    { GEMM, "mma_efficiency", NUMBER, true, SHARE, 0, "of peak" },
    { GEMM, "port_bandwidth", BANDWIDTH, true, 1e6, 1e16, 0, "per SM" },
    { GEMM, "store_bandwidth", BANDWIDTH, true, 1e6, 1e16, 0, "per SM" },
    { GEMM, "mem_efficiency", NUMBER, true, SHARE, 0, "of mem_bandwidth" },
    { GEMM, "vector_efficiency", NUMBER, false, SHARE, 0, "of mem_bandwidth" },
    { GEMM, "launch_s", NUMBER, true, SECONDS, 0, "s" },
    { GEMM, "overlap", NUMBER, true, 1, 100, 0, "exponent" },

    { NVLINK, "kind", STRING, false, 0, 0, 0, "switch|mesh" },
    { NVLINK, "bandwidth", BANDWIDTH, true, 1e6, 1e16, 0, "per device each way" },
    { NVLINK, "efficiency", NUMBER, false, SHARE, 1, "of bandwidth" },
    { NVLINK, "latency", TIME, true, SECONDS, 0, "from device to device" },

    { PCIE, "name", STRING, false, 0, 0, 0, "" },
    { PCIE, "bandwidth", BANDWIDTH, true, 1e6, 1e16, 0, "per device each way" },
    { PCIE, "efficiency", NUMBER, false, SHARE, 1, "of bandwidth" },
    { PCIE, "latency", TIME, true, SECONDS, 0, "from device to host" },
    { PCIE, "uplink", BANDWIDTH, false, 1e6, 1e16, 0, "each way, of one PCIe switch" },
    { PCIE, "per_switch", INTEGER, false, 1, TOPOLOGY_MAX_DEVICES, 0, "devices per PCIe switch" },
    { PCIE, "peer", BOOLEAN, false, 0, 0, 1, "" },

    { HOST, "unified", BOOLEAN, false, 0, 0, 0, "" },
    { HOST, "memory", SIZE, false, 1e6, 1e17, 0, "" },
    { HOST, "mem_bandwidth", BANDWIDTH, false, 1e6, 1e16, 0, "" },
    { HOST, "mem_efficiency", NUMBER, false, SHARE, 0, "of mem_bandwidth" },
    { HOST, "flops", RATE, true, 1e9, 1e19, 0, "" },

    { SSD, "bandwidth", BANDWIDTH, true, 1e6, 1e16, 0, "reading" },
    { SSD, "latency", TIME, true, SECONDS, 0, "" },

    { NIC, "bandwidth", BANDWIDTH, true, 1e6, 1e16, 0, "each way" },
    { NIC, "efficiency", NUMBER, false, SHARE, 1, "of bandwidth" },
    { NIC, "latency", TIME, true, SECONDS, 0, "from NIC to NIC" },
    { NIC, "shared", BOOLEAN, false, 0, 0, 0, "" },
    { NIC, "per_node", INTEGER, false, 1, TOPOLOGY_MAX_DEVICES, 0, "NICs per node" },

    { NETWORK, "kind", STRING, true, 0, 0, 0, "ideal|rail|leaf-spine|fat-tree" },
    { NETWORK, "nodes_per_leaf", INTEGER, false, 1, TOPOLOGY_MAX_DEVICES, 0, "nodes" },
    { NETWORK, "spines", INTEGER, false, 1, 4096, 0, "spine switches; in a fat tree, of a pod" },
    { NETWORK, "uplink", BANDWIDTH, false, 1e6, 1e16, 0, "each way, from a leaf to one spine" },
    { NETWORK, "oversubscription", NUMBER, false, RATIO, 0, "a leaf's NICs over its uplinks" },
    { NETWORK, "leaves_per_pod", INTEGER, false, 1, TOPOLOGY_MAX_DEVICES, 0, "leaves" },
    { NETWORK, "cores", INTEGER, false, 1, 4096, 0, "core switches above each spine of a pod" },
    { NETWORK, "core_uplink", BANDWIDTH, false, 1e6, 1e16, 0, "each way, from a spine to one core switch" },
    { NETWORK, "core_oversubscription", NUMBER, false, RATIO, 0, "a spine's links down over its links up" },
    { NETWORK, "paths", STRING, false, 0, 0, 0, "hash|split|spray" },
    { NETWORK, "latency", TIME, false, SECONDS, 0, "of a link between switches" },

    { EXCHANGE, "startup", TIME, true, SECONDS, 0, "per exchange" },
    { EXCHANGE, "per_peer", TIME, false, SECONDS, 0, "per device that a device sends to" },
    { EXCHANGE, "per_message", TIME, false, SECONDS, 0, "of the sender per message" },
    { EXCHANGE, "message_overhead", SIZE, false, 0, 1e6, 0, "per message" },
    { EXCHANGE, "collective_sms", INTEGER, false, 0, 10000, 0, "SMs of a device" },

    { ENERGY, "idle", POWER, true, 0, 1e5, 0, "of a device" },
    { ENERGY, "busy", POWER, true, 1e-3, 1e5, 0, "of a device" },
    { ENERGY, "node", POWER, false, 0, 1e6, 0, "of a node beside its devices" },
    { ENERGY, "memory", JOULES, false, 0, 1e-6, 0, "of device memory" },
    { ENERGY, "nvlink", JOULES, false, 0, 1e-6, 0, "per link" },
    { ENERGY, "pcie", JOULES, false, 0, 1e-6, 0, "per link" },
    { ENERGY, "host", JOULES, false, 0, 1e-6, 0, "of host memory" },
    { ENERGY, "ssd", JOULES, false, 0, 1e-6, 0, "" },
    { ENERGY, "nic", JOULES, false, 0, 1e-6, 0, "per link" },
    { ENERGY, "network", JOULES, false, 0, 1e-6, 0, "per link between switches" },

    { SLOW, "device", INTEGER, true, 0, TOPOLOGY_MAX_DEVICES, 0, "a device" },
    { SLOW, "factor", NUMBER, true, 1, 1e6, 0, "times as long" },
    { SLOW, "at", TIME, true, TIMES, 0, "from the start of the run" },

    { FAULT, "link", STRING, false, 0, 0, 0, "" },
    { FAULT, "device", INTEGER, false, 0, TOPOLOGY_MAX_DEVICES, 0, "a device" },
    { FAULT, "factor", NUMBER, false, 0, 1, 0, "of its bandwidth; 0, or none: it has failed" },
    { FAULT, "at", TIME, true, TIMES, 0, "from the start of the run" },
};

#define N_FIELDS (sizeof fields / sizeof fields[0])

/* ---- checking ---- */

static bool is_quantity(enum type type)
{
    return type >= SIZE;
}

static enum unit unit_of(enum type type)
{
    static const enum unit unit[] = { [SIZE] = UNIT_BYTES,     [BANDWIDTH] = UNIT_BANDWIDTH,
                                      [TIME] = UNIT_SECONDS,   [RATE] = UNIT_RATE,
                                      [POWER] = UNIT_POWER,    [JOULES] = UNIT_JOULES_PER_BYTE };
    return unit[type];
}

double topology_number(const json_t *table, const char *key)
{
    const json_t *v = json_object_get(table, key);
    double x = 0;
    char why[200];
    /* The names of units differ from kind to kind. */
    for (int u = 0; json_is_string(v) && u < N_UNITS; u++)
        if (units_parse((enum unit)u, json_string_value(v), &x, why, sizeof why))
            return x;
    return json_number_value(v);
}

static const char *type_found(const json_t *v, char text[80])
{
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "a table";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        snprintf(text, 80, "the string \"%.40s\"", json_string_value(v));
        return text;
    case JSON_INTEGER:
    case JSON_REAL:
        snprintf(text, 80, "%.15g", json_number_value(v));
        return text;
    case JSON_TRUE:
        return "true";
    case JSON_FALSE:
        return "false";
    default:
        return "nothing";
    }
}

static int check_keys(json_t *table, enum section s, const char *path, const char *file, struct err *err)
{
    const char *known[N_FIELDS + N_SECTIONS + 4];
    int n = 0;
    for (size_t i = 0; i < N_FIELDS; i++)
        if (fields[i].section == s)
            known[n++] = fields[i].key;
    for (int i = TOP + 1; i < N_SECTIONS; i++)
        if (sections[i].parents & IN(s))
            known[n++] = sections[i].key;
    if (s == TOP) { /* platform.c and latency_table.c know what is in them */
        known[n++] = "platform";
        known[n++] = "tables";
    }
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
        return err_set(err, ERR_INPUT, "%s: %s%s: unknown key%s%s%s", file, path, key,
                       near ? ", did you mean \"" : "", near ? near : "", near ? "\"?" : "");
    }
    return 0;
}

/* What `why` says to write instead would be refused in turn. */
static void drop_hint(const struct field *f, char *why, size_t room)
{
    static const char hint[] = "; write \"";
    char *at = strstr(why, hint), text[80], ignored[200];
    double x;
    if (!at)
        return;
    snprintf(text, sizeof text, "%s", at + sizeof hint - 1);
    text[strcspn(text, "\"")] = '\0';
    if (units_parse(unit_of(f->type), text, &x, ignored, sizeof ignored) && !(x >= f->min && x <= f->max))
        snprintf(at, room - (size_t)(at - why), ", and too %s", x < f->min ? "little" : "much");
}

/* A quantity is what a key says with its unit, in bounds. */
static int check_quantity(const json_t *v, const struct field *f, const char *path, const char *file, struct err *err)
{
    const enum unit unit = unit_of(f->type);
    char why[200], found[80], least[40], most[40];
    double x = 0;
    if (json_is_number(v)) {
        units_refuse_number(unit, json_number_value(v), f->min, f->max, why, sizeof why);
        return err_set(err, ERR_INPUT, "%s: %s%s: found %s %s", file, path, f->key, type_found(v, found), why);
    }
    if (!json_is_string(v))
        return err_set(err, ERR_INPUT, "%s: %s%s: found %s, expected %s", file, path, f->key, type_found(v, found),
                       units_expected(unit));
    if (!units_parse(unit, json_string_value(v), &x, why, sizeof why)) {
        drop_hint(f, why, sizeof why);
        return err_set(err, ERR_INPUT, "%s: %s%s: found \"%.40s\": %s", file, path, f->key, json_string_value(v), why);
    }
    if (!(x >= f->min && x <= f->max))
        return err_set(err, ERR_INPUT, "%s: %s%s: found \"%.40s\", expected %s to %s%s%s%s", file, path, f->key,
                       json_string_value(v), units_write(unit, f->min, 6, least, sizeof least),
                       units_write(unit, f->max, 6, most, sizeof most), *f->what ? " (" : "", f->what,
                       *f->what ? ")" : "");
    return 0;
}

/* Whether a string can be printed as it is. */
static bool is_plain(const json_t *v)
{
    const char *text = json_string_value(v);
    for (size_t i = 0; i < json_string_length(v); i++)
        if (iscntrl((unsigned char)text[i]))
            return false;
    return true;
}

/* Whether a string is one of those between bars; choices may be empty: any. */
static bool is_choice(const char *text, const char *choices)
{
    const size_t n = strlen(text);
    for (const char *at = choices; *at; at += strcspn(at, "|"), at += *at == '|')
        if (strcspn(at, "|") == n && !memcmp(at, text, n))
            return true;
    return !*choices && n > 0;
}

static int set_default(json_t *table, const struct field *f, const char *file, struct err *err)
{
    json_t *v = f->type == BOOLEAN ? json_boolean(f->def != 0)
                : f->type == STRING ? json_stringn(f->what, strcspn(f->what, "|"))
                                    : json_real(f->def);
    return json_object_set_new(table, f->key, v) ? err_set(err, ERR_MEMORY, "%s: out of memory", file) : 0;
}

static int check_field(json_t *table, const struct field *f, const char *path, const char *file, struct err *err)
{
    json_t *v = json_object_get(table, f->key);
    char found[80], expected[160];

    if (!v && f->required)
        return err_set(err, ERR_INPUT, "%s: %s%s: missing", file, path, f->key);
    /* So that the manifest shows it. */
    if (!v && (f->type == BOOLEAN || f->def != 0 || (f->type == STRING && *f->what)))
        return set_default(table, f, file, err);
    if (!v) /* the machine has none */
        return 0;
    if (is_quantity(f->type))
        return check_quantity(v, f, path, file, err);

    bool ok = false;
    double x = json_number_value(v);
    switch (f->type) {
    case BOOLEAN:
        ok = json_is_boolean(v);
        snprintf(expected, sizeof expected, "true or false");
        break;
    case STRING:
        ok = json_is_string(v) && is_choice(json_string_value(v), f->what) && is_plain(v);
        snprintf(expected, sizeof expected, "%s%s", *f->what ? "one of " : "a string without control characters",
                 f->what);
        break;
    default:
        ok = json_is_number(v) && isfinite(x) && x >= f->min && x <= f->max;
        if (f->type == INTEGER)
            ok = ok && x == floor(x);
        snprintf(expected, sizeof expected, "%s from %g to %g (%s)", f->type == INTEGER ? "a whole number" : "a number",
                 f->min, f->max, f->what);
    }
    if (!ok)
        return err_set(err, ERR_INPUT, "%s: %s%s: found %s, expected %s", file, path, f->key, type_found(v, found),
                       expected);
    return 0;
}

static int check_source(const json_t *table, const char *path, const char *file, struct err *err)
{
    static const char *const keys[] = { "source", "assumed" };
    char found[80];
    for (int i = 0; i < 2; i++) {
        const json_t *v = json_object_get(table, keys[i]);
        if (!v && i == 0)
            return err_set(err, ERR_INPUT, "%s: %ssource: missing: every figure says where it comes from", file, path);
        if (v && (!json_is_string(v) || json_string_length(v) == 0 || !is_plain(v)))
            return err_set(err, ERR_INPUT, "%s: %s%s: found %s, expected a string without control characters", file,
                           path, keys[i], type_found(v, found));
    }
    return 0;
}

/* Tables, or lists of them, below one. */
static int check_child(json_t *v, enum section s, const char *path, const char *file, struct err *err)
{
    char inner[200], found[80];
    if (!sections[s].list) {
        if (!json_is_object(v))
            return err_set(err, ERR_INPUT, "%s: %s%s: found %s, expected a table", file, path, sections[s].key,
                           type_found(v, found));
        snprintf(inner, sizeof inner, "%s%s.", path, sections[s].key);
        return topology_format(v, s, inner, file, err);
    }
    if (json_is_object(v) && json_object_size(v) == 0) /* Lua's empty table is no list */
        return 0;
    if (!json_is_array(v))
        return err_set(err, ERR_INPUT, "%s: %s%s: found %s, expected a list of tables", file, path, sections[s].key,
                       type_found(v, found));
    for (size_t i = 0; i < json_array_size(v); i++) { /* counted as Lua counts */
        json_t *one = json_array_get(v, i);
        if (!json_is_object(one))
            return err_set(err, ERR_INPUT, "%s: %s%s[%zu]: found %s, expected a table", file, path, sections[s].key,
                           i + 1, type_found(one, found));
        snprintf(inner, sizeof inner, "%s%s[%zu].", path, sections[s].key, i + 1);
        int rc = topology_format(one, s, inner, file, err);
        if (rc)
            return rc;
    }
    return 0;
}

int topology_format(json_t *table, enum section s, const char *path, const char *file, struct err *err)
{
    int rc = check_keys(table, s, path, file, err);
    for (size_t i = 0; i < N_FIELDS && rc == 0; i++)
        if (fields[i].section == s)
            rc = check_field(table, &fields[i], path, file, err);
    if (rc == 0 && sections[s].figures)
        rc = check_source(table, path, file, err);
    for (int c = TOP + 1; c < N_SECTIONS && rc == 0; c++) {
        if (!(sections[c].parents & IN(s)))
            continue;
        json_t *v = json_object_get(table, sections[c].key);
        if (!v && sections[c].required)
            return err_set(err, ERR_INPUT, "%s: %s%s: missing", file, path, sections[c].key);
        /* A group says with false that it has none of what the others have. */
        if (v && !(s == GROUP && c != DEVICE && json_is_false(v)))
            rc = check_child(v, (enum section)c, path, file, err);
    }
    return rc;
}
