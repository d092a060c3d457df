/* SPDX-License-Identifier: Apache-2.0
 * cmd_machine.c - moelab machine: what machines there are, what one is made of, and its picture. */
#include "config.h"

#include "cmd.h"
#include "machine_facts.h"
#include "record.h"
#include "registry.h"
#include "script.h"
#include "units.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_MACHINES = 256 };

/* ---- reading ---- */

/* machine.KEY.KEY=VALUE, as moelab run takes it: a value that reads as JSON is that, anything else a string. */
static int set_key(json_t *d, const char *pair, struct err *e)
{
    const char *eq = strchr(pair, '='), *key = pair + strlen("machine.");
    if (!eq || strncmp(pair, "machine.", strlen("machine.")) != 0 || eq == key)
        return err_set(e, ERR_INPUT, "--set %s: expected machine.KEY=VALUE", pair);
    char part[64];
    json_t *at = d;
    for (size_t n; key[n = strcspn(key, ".=")] == '.'; key += n + 1) {
        snprintf(part, sizeof part, "%.*s", (int)n, key);
        json_t *inner = json_object_get(at, part);
        if (!inner)
            json_object_set_new(at, part, inner = json_object());
        if (!json_is_object(inner))
            return err_set(e, ERR_INPUT, "--set %s: \"%s\" has no keys to set", pair, part);
        at = inner;
    }
    snprintf(part, sizeof part, "%.*s", (int)(eq - key), key);
    json_t *v = json_loads(eq + 1, JSON_DECODE_ANY, NULL);
    return json_object_set_new(at, part, v ? v : json_string(eq + 1))
               ? err_set(e, ERR_INPUT, "--set %s: cannot be set", pair)
               : 0;
}

static int load(const char *name, const char *const *set, int n_set, struct topology **t, struct err *e)
{
    json_t *d = NULL;
    char file[600];
    if (script_machine(name, &d, file, sizeof file, e) < 0)
        return e->code;
    for (int i = 0; i < n_set && !e->code; i++)
        set_key(d, set[i], e);
    if (!e->code)
        topology_build(t, d, file, e);
    json_decref(d);
    return e->code;
}

/* ---- list ---- */

static int list(bool as_json, struct err *e)
{
    char name[MAX_MACHINES][64];
    json_t *all = json_array();
    const int n = registry_data_names("hw/machines", name, MAX_MACHINES);
    for (int i = 0; i < n && !e->code; i++) {
        struct topology *t;
        if (load(name[i], NULL, 0, &t, e) < 0)
            break;
        json_array_append_new(all, json_pack("{s:s, s:O, s:i, s:i}", "name", name[i], "summary",
                                             json_object_get(t->description, "summary"), "nodes", t->n_nodes, "devices",
                                             t->n_devices));
        topology_free(t);
    }
    if (!e->code && as_json) {
        json_dumpf(all, stdout, JSON_INDENT(1));
        putchar('\n');
    }
    if (!e->code && !as_json)
        printf("%-14s  %5s  %7s  %s\n", "machine", "nodes", "devices", "");
    for (size_t i = 0; i < json_array_size(all) && !e->code && !as_json; i++) {
        const json_t *m = json_array_get(all, i);
        printf("%-14s  %5lld  %7lld  %s\n", json_string_value(json_object_get(m, "name")),
               (long long)json_integer_value(json_object_get(m, "nodes")),
               (long long)json_integer_value(json_object_get(m, "devices")),
               json_string_value(json_object_get(m, "summary")));
    }
    json_decref(all);
    return e->code;
}

/* ---- show ---- */

static const char *text_of(const json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : "";
}

static int int_of(const json_t *o, const char *key)
{
    return (int)json_integer_value(json_object_get(o, key));
}

static const char *figure(enum unit unit, const json_t *o, const char *key, char room[40])
{
    return units_write(unit, json_number_value(json_object_get(o, key)), 4, room, 40);
}

static void print_range(const char *what, const json_t *o)
{
    char range[40];
    if (int_of(o, "first") == int_of(o, "last"))
        snprintf(range, sizeof range, "%s %d", what, int_of(o, "first"));
    else
        snprintf(range, sizeof range, "%s %d-%d", what, int_of(o, "first"), int_of(o, "last"));
    printf("  %-16s", range);
}

static void print_parts(const json_t *facts)
{
    char a[40], b[40];
    const char *key;
    json_t *v, *o;
    size_t i;
    puts("\ndevices");
    json_array_foreach(json_object_get(facts, "devices"), i, o)
    {
        const char *comma = "";
        print_range("gpu", o);
        if (!*text_of(o, "name")) { /* of a platform */
            puts(": nothing is said of them (see `like` in doc/machines.md)");
            continue;
        }
        printf("%s: %s at %s; ", text_of(o, "name"), figure(UNIT_BYTES, o, "memory", a),
               figure(UNIT_BANDWIDTH, o, "mem_bandwidth", b));
        json_object_foreach(json_object_get(o, "peak"), key, v)
        {
            printf("%s%s %.4g", comma, key, json_real_value(v) / 1e12);
            comma = ", ";
        }
        puts(" TFLOP/s");
    }
    json_array_foreach(json_object_get(facts, "hosts"), i, o)
    {
        print_range("node", o);
        printf("host memory of %s at %s%s; %.4g TFLOP/s\n", figure(UNIT_BYTES, o, "memory", a),
               figure(UNIT_BANDWIDTH, o, "mem_bandwidth", b),
               json_is_true(json_object_get(o, "unified")) ? ", which is the device's" : "",
               json_number_value(json_object_get(o, "flops")) / 1e12);
    }
}

static void print_links(const json_t *facts)
{
    char a[40], b[40], links[600];
    json_t *o, *v;
    size_t i, j;
    printf("\n%-28s  %6s  %11s  %8s\n", "links", "number", "bandwidth", "latency");
    json_array_foreach(json_object_get(facts, "links"), i, o) printf(
        "  %-26s  %6d  %11s  %8s%s\n", text_of(o, "name"), int_of(o, "n"), figure(UNIT_BANDWIDTH, o, "bandwidth", a),
        figure(UNIT_SECONDS, o, "latency", b), json_is_true(json_object_get(o, "both_ways")) ? "  each way" : "");
    printf("\n%-28s  %6s  %11s  %8s\n", "ways", "paths", "narrowest", "latency");
    json_array_foreach(json_object_get(facts, "pairs"), i, o)
    {
        links[0] = '\0';
        json_array_foreach(json_object_get(o, "links"), j, v)
            snprintf(links + strlen(links), sizeof links - strlen(links), " %s", json_string_value(v));
        printf("  %-26s  %6d  %11s  %8s  %zu links:%s\n", text_of(o, "what"), int_of(o, "paths"),
               figure(UNIT_BANDWIDTH, o, "bandwidth", a), figure(UNIT_SECONDS, o, "latency", b),
               json_array_size(json_object_get(o, "links")), links);
    }
    if ((o = json_object_get(facts, "bisection")))
        printf("\nbisection: %s from the first %d devices to the others, each to each alike; %s binds\n",
               figure(UNIT_BANDWIDTH, o, "bandwidth", a), int_of(o, "lower_half"), text_of(o, "binds"));
}

static void print_changes(const json_t *facts)
{
    json_t *o;
    size_t i;
    json_array_foreach(json_object_get(facts, "slow"), i, o)
        printf("slow: device %d takes %g times as long from %s on\n", int_of(o, "device"),
               json_number_value(json_object_get(o, "factor")), text_of(o, "at"));
    json_array_foreach(json_object_get(facts, "faults"), i, o)
    {
        if (json_object_get(o, "device"))
            printf("fault: device %d fails at %s\n", int_of(o, "device"), text_of(o, "at"));
        else
            printf("fault: %s has %g of its bandwidth from %s on\n", text_of(o, "link"),
                   json_number_value(json_object_get(o, "factor")), text_of(o, "at"));
    }
}

static void print_energy(const json_t *facts)
{
    static const char *const key[] = { "idle", "busy", "node", "memory", "nvlink", "pcie", "host", "ssd", "nic",
                                       "network" };
    const json_t *o = json_object_get(facts, "energy");
    for (size_t i = 0; o && i < sizeof key / sizeof *key; i++)
        if (*text_of(o, key[i]))
            printf("%s%s %s", i ? ", " : "\nenergy: ", key[i], text_of(o, key[i]));
    if (o)
        puts("");
}

static void print_facts(const json_t *facts)
{
    json_t *o;
    size_t i;
    printf("%s: %s\n%d nodes, %d devices\n", text_of(facts, "name"), text_of(facts, "summary"), int_of(facts, "nodes"),
           int_of(facts, "n_devices"));
    print_parts(facts);
    print_links(facts);
    print_changes(facts);
    print_energy(facts);
    puts("\nsources");
    json_array_foreach(json_object_get(facts, "sources"), i, o)
    {
        printf("  %-18s%s\n", text_of(o, "table"), text_of(o, "source"));
        if (*text_of(o, "assumed"))
            printf("  %-18sassumed: %s\n", "", text_of(o, "assumed"));
    }
}

/* DIR/NAME.png by gnuplot, from DIR/NAME.gp, which stays. */
static int plot(const struct topology *t, const char *png, struct err *e)
{
    struct record place = { .open = false };
    const char *slash = strrchr(png, '/'), *base = slash ? slash + 1 : png;
    const size_t n = strlen(base);
    char stem[200], gp[700], why[700] = "gnuplot is not installed";
    if (n < 5 || n - 4 >= sizeof stem || strcmp(base + n - 4, ".png") != 0 || *base == '-')
        return err_set(e, ERR_INPUT, "--plot %s: expected FILE.png", png);
    snprintf(stem, sizeof stem, "%.*s", (int)n - 4, base);
    if ((size_t)snprintf(place.part, sizeof place.part, "%.*s", slash ? (int)(slash > png ? slash - png : 1) : 1,
                         slash ? png : ".") >= sizeof place.part ||
        snprintf(gp, sizeof gp, "%s/%s.gp", place.part, stem) < 0)
        return err_set(e, ERR_INPUT, "--plot %s: the path is too long", png);
    FILE *f = fopen(gp, "w");
    if (!f)
        return err_set(e, ERR_IO, "%s: cannot be written: %s", gp, strerror(errno));
    topology_draw(t, stem, f);
    const bool bad = ferror(f) != 0;
    if (fclose(f) != 0 || bad)
        return err_set(e, ERR_IO, "%s: cannot be written", gp);
    if (record_draw(&place, stem, 60, why, sizeof why) != DRAWN)
        return err_set(e, ERR_IO, "%s: not drawn: %s; what to draw is in %s", png, why, gp);
    return 0;
}

static int show(const char *name, const char *const *set, int n_set, bool as_json, const char *png, struct err *e)
{
    struct topology *t;
    if (load(name, set, n_set, &t, e) < 0)
        return e->code;
    json_t *facts = machine_facts(t);
    if (png && plot(t, png, e) < 0)
        goto out;
    if (as_json) {
        json_dumpf(facts, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(12));
        putchar('\n');
    } else {
        print_facts(facts);
    }
out:
    json_decref(facts);
    topology_free(t);
    return e->code;
}

/* ---- the command ---- */

static void help(void)
{
    puts("usage: moelab machine list [--json]\n"
         "       moelab machine show NAME [--set KEY=VALUE] [--json] [--plot FILE.png]\n"
         "       moelab machine validate [TABLE.csv...]\n\n"
         "Machines are files under hw/machines/, or any file given by its path, also a SimGrid platform (.xml).\n\n"
         "  list               every machine\n"
         "  show               devices, links, the ways between endpoints, bisection, and where figures come from\n"
         "  validate           published measurements against the models (it has a --help of its own)\n\n"
         "  --set KEY=VALUE    another figure: machine.nodes=4, machine.nic.bandwidth=\"25 GB/s\"\n"
         "  --json             one JSON value\n"
         "  --plot FILE.png    draws the machine with gnuplot; FILE.gp stays beside it\n\n"
         "Example:\n  moelab machine show h800-ib --set machine.nodes=4 --plot h800.png");
}

int cmd_machine(int argc, char **argv)
{
    static const char *const known[] = { "--help", "--json", "--plot", "--set", NULL };
    struct err e = { 0 };
    bool as_json = false;
    const char *word[2], *set[argc], *png = NULL;
    int n_words = 0, n_set = 0;
    if (argc > 1 && !strcmp(argv[1], "validate"))
        return machine_validate(argc - 1, argv + 1);
    for (int i = 1; i < argc; i++) {
        const bool plots = !strcmp(argv[i], "--plot");
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            help();
            return 0;
        }
        if (!strcmp(argv[i], "--json"))
            as_json = true;
        else if ((plots || !strcmp(argv[i], "--set")) && i + 1 == argc)
            return cmd_usage("machine", "%s needs a value", argv[i]);
        else if (plots)
            png = argv[++i];
        else if (!strcmp(argv[i], "--set"))
            set[n_set++] = argv[++i];
        else if (cmd_is_option(argv[i]))
            return cmd_unknown_option("machine", argv[i], known);
        else if (n_words == 2)
            return cmd_usage("machine", "unexpected argument \"%s\"", argv[i]);
        else
            word[n_words++] = argv[i];
    }
    if (n_words == 1 && !strcmp(word[0], "list") && !png && n_set == 0)
        return list(as_json, &e) < 0 ? cmd_fail(&e) : 0;
    if (n_words == 2 && !strcmp(word[0], "show"))
        return show(word[1], set, n_set, as_json, png, &e) < 0 ? cmd_fail(&e) : 0;
    return cmd_usage("machine", "expected \"list\", \"show NAME\" or \"validate\", found \"%s%s%s\"",
                     n_words > 0 ? word[0] : "", n_words > 1 ? " " : "", n_words > 1 ? word[1] : "");
}
