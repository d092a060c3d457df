/* SPDX-License-Identifier: Apache-2.0
 * cmd_eval.c - moelab eval KIND NAME: the command line over eval(). */
#include "config.h"

#include "cmd.h"
#include "eval.h"
#include "npy.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char *const examples[N_EVAL_KINDS] = {
    [MOE_ROUTER] = "moelab eval router softmax-top-k --logits logits.npy --top-k 8 --out routes",
    [MOE_BALANCER] = "echo '{\"logits\": [[2, 1], [3, 0]], \"capacity_factor\": 1}' |\n"
                     "      moelab eval balancer capacity --input - --top-k 1 --set drop=position",
    [MOE_PLACEMENT] = "echo '{\"load\": [[90, 132, 40, 61]], \"replicas\": 6, \"nodes\": 1, \"devices\": 2}' |\n"
                      "      moelab eval placement eplb --input -",
    [MOE_DISPATCH] = "echo '{\"bytes\": [[0, 1e6], [2e6, 0]], \"machine\": \"star-50GBps\"}' |\n"
                     "      moelab eval dispatch flat --input - --tier exact",
    [MOE_OFFLOAD] = "moelab eval offload lru --trace scenarios/traces/tiny-moe --capacity 64",
    [EVAL_MACHINE] = "moelab eval machine star-50GBps --pattern alltoall --bytes-per-rank 16777216 --n 64 --tier bound",
    [EVAL_METRIC] = "moelab eval metric srp --trace scenarios/traces/tiny-moe --segment 16",
};

static int kind_of_name(const char *name)
{
    for (int k = 0; k < N_EVAL_KINDS; k++)
        if (!strcmp(name, eval_kind_name[k]))
            return k;
    return -1;
}

/* "top_k" as --top-k */
static void flag_of(const char *name, char flag[40])
{
    snprintf(flag, 40, "--%s", name);
    for (char *c = flag; *c; c++)
        *c = *c == '_' ? '-' : *c;
}

static void help(int kind)
{
    printf("usage: moelab eval %s NAME%s [OPTION...]\n\n"
           "One policy, machine or metric on one input, no scenario. Prints one JSON object (doc/eval.md).\n\n",
           kind < 0 ? "KIND" : eval_kind_name[kind], kind == EVAL_MACHINE ? "_OR_FILE" : "");
    if (kind < 0)
        puts("KIND is router, balancer, placement, dispatch, offload, machine or metric;\n"
             "moelab eval KIND --help lists the options of one kind.\n");
    for (const struct eval_option *o = eval_options(); o->name; o++) {
        char flag[40], left[64];
        flag_of(o->name, flag);
        snprintf(left, sizeof left, "%s %s", flag, o->argument ? o->argument : "");
        if (kind < 0 || (o->kinds & 1u << kind))
            printf("  %-26s %s\n", left, o->help);
    }
    if (kind < 0 || kind == MOE_ROUTER)
        printf("  %-26s %s\n", "--out DIR", "router: write the arrays there as .npy, print the rest");
    printf("\nExample%s:\n", kind < 0 ? "s" : "");
    for (int k = 0; k < N_EVAL_KINDS; k++)
        if (kind < 0 || kind == k)
            printf("  %s\n", examples[k]);
    puts("\nExit code: 0 done, 2 bad usage or input.");
}

/* ---- the command line ---- */

static int bad(struct err *e, const char *flag, const char *text, const char *expected)
{
    return err_set(e, ERR_INPUT, "%s: found \"%s\", expected %s", flag, text, expected);
}

/* KEY=VALUE; a value that reads as JSON is that, anything else a string. */
static int add_parameter(json_t *set, const char *pair, struct err *e)
{
    const char *eq = strchr(pair, '=');
    char key[200];
    if (!eq || eq == pair || (size_t)(eq - pair) >= sizeof key)
        return bad(e, "--set", pair, "KEY=VALUE");
    snprintf(key, sizeof key, "%.*s", (int)(eq - pair), pair);
    if (json_object_get(set, key))
        return err_set(e, ERR_INPUT, "--set %s: given twice", key);
    json_t *v = json_loads(eq + 1, JSON_DECODE_ANY, NULL);
    json_object_set_new(set, key, v ? v : json_string(eq + 1));
    return 0;
}

static int add_option(json_t *options, const struct eval_option *o, const char *flag, const char *text, struct err *e)
{
    char *end = NULL;
    json_t *v = NULL;
    errno = 0;
    if (o->type == EVAL_TABLE) {
        json_t *set = json_object_get(options, o->name);
        if (!set)
            json_object_set_new(options, o->name, set = json_object());
        return add_parameter(set, text, e);
    }
    if (json_object_get(options, o->name))
        return err_set(e, ERR_INPUT, "%s: given twice", flag);
    if (o->type == EVAL_WHOLE) {
        long long x = strtoll(text, &end, 10);
        if (end == text || *end || errno)
            return bad(e, flag, text, "a whole number");
        v = json_integer(x);
    } else if (o->type == EVAL_REAL) {
        double x = strtod(text, &end);
        if (end == text || *end || !(v = json_real(x))) /* not of NaN and infinities */
            return bad(e, flag, text, "a number");
    } else {
        v = o->type == EVAL_FLAG ? json_true() : json_string(text);
    }
    if (!v)
        return bad(e, flag, text, "UTF-8 text");
    json_object_set_new(options, o->name, v);
    return 0;
}

static int unknown_flag(const char *flag, struct err *e)
{
    const char *names[64] = { "--out", "--help" };
    char flags[62][40];
    int n = 2;
    for (const struct eval_option *o = eval_options(); o->name && n < 64; o++, n++) {
        flag_of(o->name, flags[n - 2]);
        names[n] = flags[n - 2];
    }
    const char *near = cmd_nearest_option(flag, names, n);
    return err_set(e, ERR_INPUT, "unknown option %s%s%s%s (see: moelab eval --help)", flag,
                   near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
}

struct line { const char *kind, *name, *out; bool help; };

static int parse(int argc, char **argv, struct line *line, json_t *options, struct err *e)
{
    for (int i = 1; i < argc; i++) {
        char flag[40];
        const char *text = argv[i], *value = NULL;
        if (!cmd_is_option(text)) {
            if (line->kind && line->name)
                return err_set(e, ERR_INPUT, "unexpected argument \"%s\": expected one KIND and one NAME", text);
            *(line->kind ? &line->name : &line->kind) = text;
            continue;
        }
        if (!strcmp(text, "--help")) {
            line->help = true;
            continue;
        }
        size_t n = strcspn(text, "=");
        const struct eval_option *o = eval_options();
        for (; o->name; o++) {
            flag_of(o->name, flag);
            if (strlen(flag) == n && !memcmp(flag, text, n))
                break;
        }
        bool out = n == 5 && !memcmp(text, "--out", 5);
        if (!o->name && !out)
            return unknown_flag(text, e);
        if (out || o->type != EVAL_FLAG) {
            value = text[n] ? text + n + 1 : i + 1 < argc ? argv[++i] : NULL;
            if (!value)
                return err_set(e, ERR_INPUT, "%s needs a value: %s", text, out ? "DIR" : o->argument);
        } else if (text[n]) {
            return err_set(e, ERR_INPUT, "%s takes no value", flag);
        }
        if (out)
            line->out = value;
        else if (add_option(options, o, flag, value, e) < 0)
            return e->code;
    }
    return 0;
}

/* ---- arrays as files ---- */

static int write_array(json_t *result, const char *key, const char *dtype, const char *dir, struct err *e)
{
    const json_t *list = json_object_get(result, key);
    char path[600];
    int64_t n = (int64_t)json_array_size(list);
    size_t bytes = (size_t)(dtype[1] - '0');
    char *data = malloc((size_t)n * bytes + 1);
    if (!data)
        return err_set(e, ERR_MEMORY, "out of memory");
    for (int64_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, (size_t)i);
        int64_t wide = json_integer_value(v);
        int32_t whole = (int32_t)wide;
        float real = (float)json_number_value(v);
        const void *from = dtype[0] == 'f' ? (const void *)&real : bytes == 8 ? (const void *)&wide : &whole;
        memcpy(data + (size_t)i * bytes, from, bytes);
    }
    int code = ERR_INPUT;
    if (snprintf(path, sizeof path, "%s/%s.npy", dir, key) >= (int)sizeof path)
        err_set(e, ERR_INPUT, "--out %s: the path is too long", dir);
    else
        code = npy_write(path, dtype, 1, &n, data, e);
    free(data);
    json_object_del(result, key);
    return code;
}

static int write_arrays(json_t *result, const char *dir, struct err *e)
{
    static const struct { const char *key, *dtype; } arrays[] = {
        { "offsets", "i8" }, { "experts", "i4" }, { "weights", "f4" }, { "load", "i8" },
    };
    if (mkdir(dir, 0777) < 0 && errno != EEXIST)
        return err_set(e, ERR_IO, "--out %s: %s", dir, strerror(errno));
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        if (write_array(result, arrays[i].key, arrays[i].dtype, dir, e) < 0)
            return e->code;
    return 0;
}

static int print(const json_t *result, struct err *e)
{
    if (json_dumpf(result, stdout, JSON_COMPACT | JSON_REAL_PRECISION(17)) < 0 || putchar('\n') == EOF)
        return err_set(e, ERR_IO, "standard output: cannot be written");
    return 0;
}

int cmd_eval(int argc, char **argv)
{
    struct err e = { 0 };
    struct line line = { 0 };
    json_t *options = json_object(), *result = NULL;
    if (parse(argc, argv, &line, options, &e) == 0 && line.help) {
        help(line.kind ? kind_of_name(line.kind) : -1);
    } else if (!e.code) {
        if (!line.kind || !line.name)
            err_set(&e, ERR_INPUT, "eval: expected a kind and a name (see: moelab eval --help)");
        else if (line.out && strcmp(line.kind, eval_kind_name[MOE_ROUTER]) != 0)
            err_set(&e, ERR_INPUT, "--out: only routers write arrays");
        else
            result = eval(line.kind, line.name, options, true, &e);
        if (result && (!line.out || write_arrays(result, line.out, &e) == 0))
            print(result, &e);
    }
    json_decref(options);
    json_decref(result);
    return e.code ? cmd_fail(&e) : 0;
}
