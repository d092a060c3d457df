/* SPDX-License-Identifier: Apache-2.0
 * cmd_options.c - a verb's table of options as parser, limits and help. */
#include "config.h"

#include "cmd.h"
#include "cmd_options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_help(const struct verb *v, const struct option *o)
{
    printf("usage: moelab trace %s [options]%s%s\n%s\n", v->name, *v->positional ? " " : "", v->positional, v->summary);
    for (; o->type != OPTION_END; o++) {
        char left[64];
        snprintf(left, sizeof left, "--%s %s", o->name, o->argument ? o->argument : "");
        printf("  %-22s %s\n", left, o->help);
    }
    printf("  %-22s %s\n\nexample: %s\n", "--help", "this text", v->example);
}

static int bad_value(const struct option *o, const char *text, const char *expected, struct err *err)
{
    return err_set(err, ERR_INPUT, "--%s: found \"%s\", expected %s", o->name, text, expected);
}

static int set_option(struct option *o, const char *text, struct err *err)
{
    char *end = NULL, range[64];
    errno = 0;
    o->given = true;
    switch (o->type) {
    case OPTION_INT: {
        long long x = strtoll(text, &end, 10);
        snprintf(range, sizeof range, "an integer in %.0f..%.0f", o->min, o->max);
        if (end == text || *end || errno || (double)x < o->min || (double)x > o->max)
            return bad_value(o, text, range, err);
        *(int32_t *)o->out = (int32_t)x;
        return 0;
    }
    case OPTION_SEED: {
        unsigned long long x = strtoull(text, &end, 10);
        if (end == text || *end || errno || x > INT64_MAX || strchr(text, '-'))
            return bad_value(o, text, "an integer in 0..2^63-1", err);
        *(uint64_t *)o->out = x;
        return 0;
    }
    case OPTION_REAL:
        *(double *)o->out = strtod(text, &end);
        return end == text || *end ? bad_value(o, text, "a number", err) : 0;
    default:
        *(const char **)o->out = text;
        return 0;
    }
}

static int unknown_option(const char *text, const struct option *options, struct err *err)
{
    enum { MAX_OPTIONS = 24 };
    char flags[MAX_OPTIONS][40];
    const char *names[MAX_OPTIONS + 1] = { "--help" };
    int n = 1;
    for (; options->type != OPTION_END && n <= MAX_OPTIONS; options++, n++) {
        snprintf(flags[n - 1], sizeof flags[0], "--%s", options->name);
        names[n] = flags[n - 1];
    }
    const char *near = cmd_nearest_option(text, names, n);
    return err_set(err, ERR_INPUT, "unknown option %s%s%s%s; see --help", text, near ? "; did you mean " : "",
                   near ? near : "", near ? "?" : "");
}

int options_parse(int argc, char **argv, const struct verb *v, struct option *options, const char **dir,
                  struct err *err)
{
    for (int i = 1; i < argc; i++) {
        char *text = argv[i], *value = NULL;
        struct option *o = options;
        int rc;
        if (!cmd_is_option(text)) {
            if (!dir || *dir)
                return err_set(err, ERR_INPUT, "unexpected argument \"%s\"; see --help", text);
            *dir = text;
            continue;
        }
        if (!strcmp(text, "--help")) {
            print_help(v, options);
            return 1;
        }
        if (text[1] != '-')
            return unknown_option(text, options, err);
        size_t n = strcspn(text + 2, "=");
        for (; o->type != OPTION_END; o++)
            if (strlen(o->name) == n && !memcmp(o->name, text + 2, n))
                break;
        if (o->type == OPTION_END)
            return unknown_option(text, options, err);
        if (o->type == OPTION_FLAG) {
            if (text[2 + n])
                return err_set(err, ERR_INPUT, "--%s takes no value", o->name);
            *(bool *)o->out = o->given = true;
            continue;
        }
        value = text[2 + n] ? text + 3 + n : i + 1 < argc ? argv[++i] : NULL;
        if (!value)
            return err_set(err, ERR_INPUT, "--%s needs a value: %s", o->name, o->argument);
        if ((rc = set_option(o, value, err)) < 0)
            return rc;
    }
    if (dir && !*dir)
        return err_set(err, ERR_INPUT, "no %s given; usage: moelab trace %s [options] %s", v->positional, v->name,
                       v->positional);
    return 0;
}

bool options_given(const struct option *options, const char *name)
{
    for (; options->type != OPTION_END; options++)
        if (!strcmp(options->name, name))
            return options->given;
    return false;
}
