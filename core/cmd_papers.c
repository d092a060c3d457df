/* SPDX-License-Identifier: Apache-2.0
 * cmd_papers.c - moelab papers: which mechanisms work, the setting that gives each, the scenario that shows it.
 * moelab reproduce: runs those scenarios and judges published against ours.
 *
 * The list is scenarios/papers/papers.json. Verdicts are computed here from (published, ours, tolerance) and nowhere
 * else. */
#include "config.h"

#include "cmd.h"
#include "record.h"
#include "registry.h"
#include "script.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static json_t *load_papers(struct err *e)
{
    char path[900];
    json_error_t why;
    if (registry_data("scenarios/papers/papers.json", path, sizeof path) < 0) {
        err_set(e, ERR_IO, "scenarios/papers/papers.json: not found");
        return NULL;
    }
    json_t *list = json_load_file(path, 0, &why);
    if (!json_is_array(list)) {
        err_set(e, ERR_IO, "%s:%d: %s", path, why.line, list ? "expected a list" : why.text);
        json_decref(list);
        return NULL;
    }
    return list;
}

static const char *text_of(const json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : "";
}

int cmd_papers(int argc, char **argv)
{
    bool as_json = false;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            puts("usage: moelab papers [--json]\n\n"
                 "Papers whose mechanisms work: kind, policy, class (E exact, A analytic, S shape, X not claimed),\n"
                 "the parameters that give the paper's rule, and the scenario that shows it.\n\n"
                 "Example:\n  moelab papers --json");
            return 0;
        }
        if (cmd_is_option(argv[i]) && strcmp(argv[i], "--json"))
            return cmd_unknown_option("papers", argv[i], (const char *const[]){ "--help", "--json", NULL });
        if (strcmp(argv[i], "--json"))
            return cmd_usage("papers", "unexpected argument \"%s\"", argv[i]);
        as_json = true;
    }
    struct err e = { 0 };
    json_t *list = load_papers(&e);
    if (!list)
        return cmd_fail(&e);
    if (as_json) {
        json_dumpf(list, stdout, JSON_INDENT(1));
        putchar('\n');
    }
    for (size_t i = 0; !as_json && i < json_array_size(list); i++) {
        const json_t *o = json_array_get(list, i);
        char *params = json_dumps(json_object_get(o, "params"), JSON_COMPACT);
        printf("%-10s %-20s %s  %s\n%31s   %s%s%s\n", text_of(o, "kind"), text_of(o, "plugin"), text_of(o, "class"),
               text_of(o, "paper"), "", text_of(o, "scenario"), params && strcmp(params, "{}") ? "  " : "",
               params && strcmp(params, "{}") ? params : "");
        free(params);
    }
    json_decref(list);
    return 0;
}

/* error: (ours - published) / |published|, or the difference where 0 was published. Equal integers in class E are
 * equal; everything else holds within the tolerance. Class X is never claimed. */
static void judge(json_t *row)
{
    double published = json_number_value(json_object_get(row, "published"));
    double ours = json_number_value(json_object_get(row, "ours"));
    double tolerance = json_number_value(json_object_get(row, "tolerance"));
    bool known = json_is_number(json_object_get(row, "published")) && json_is_number(json_object_get(row, "ours"));
    double error = published != 0 ? (ours - published) / fabs(published) : ours - published;
    const char *class = text_of(row, "class");
    json_object_set_new(row, "error", known ? json_real(error) : json_null());
    const char *verdict = !strcmp(class, "X") ? "not claimed" : known && fabs(error) <= tolerance ? "holds" : "fails";
    json_object_set_new(row, "verdict", json_string(verdict));
}

enum { METRIC_WIDTH = 37 }; /* leaves room for the rest in 120 columns */

/* All of a metric's text, on as many lines as it takes, without the end of the last one. */
static void print_metric(const char *text)
{
    while (strlen(text) > METRIC_WIDTH) {
        int n = METRIC_WIDTH;
        while (n > 0 && text[n] != ' ')
            n--;
        n = n > 0 ? n : METRIC_WIDTH; /* one long word */
        printf("  %.*s\n", n, text);
        text += n + (text[n] == ' ');
    }
    printf("  %-*s", METRIC_WIDTH, text);
}

/* "-" for what is no number. */
static const char *number_text(const json_t *o, const char *key, const char *format, double scale, char text[32])
{
    const json_t *v = json_object_get(o, key);
    char plain[24];
    snprintf(plain, sizeof plain, format, scale * json_number_value(v));
    snprintf(text, 32, "%s%s", json_is_number(v) ? plain : "-", json_is_number(v) && scale == 100 ? " %" : "");
    return text;
}

/* Each paper's name stands above its rows. */
static void print_rows(const json_t *rows)
{
    const char *paper = NULL;
    printf("  %-*s %-14s %11s %11s %11s  %-5s %9s  %s\n", METRIC_WIDTH, "metric", "expected is", "expected", "ours",
           "error", "class", "tolerance", "verdict");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        char text[4][32];
        if (!paper || strcmp(paper, text_of(r, "paper")))
            printf("%s\n", paper = text_of(r, "paper"));
        print_metric(text_of(r, "metric"));
        printf(" %-14s %11s %11s %11s  %-5s %9s  %s\n", text_of(r, "basis"),
               number_text(r, "published", "%.6g", 1, text[0]), number_text(r, "ours", "%.6g", 1, text[1]),
               number_text(r, "error", "%+.2g", 100, text[2]), text_of(r, "class"),
               number_text(r, "tolerance", "%.3g", 100, text[3]), text_of(r, "verdict"));
    }
}

/* Published figures, and what is checked against something else: never added up. */
static void print_summary(const json_t *rows)
{
    static const char *const basis[] = { "published", "closed form", "definition", "reference code", "expectation" };
    const char *lead = "hold: ";
    size_t used = 0;
    for (size_t b = 0; b < sizeof basis / sizeof *basis; b++) {
        int n = 0, n_hold = 0, n_claimed = 0;
        for (size_t i = 0; i < json_array_size(rows); i++) {
            const json_t *r = json_array_get(rows, i);
            if (strcmp(text_of(r, "basis"), basis[b]))
                continue;
            n++;
            n_claimed += strcmp(text_of(r, "verdict"), "not claimed") != 0;
            n_hold += !strcmp(text_of(r, "verdict"), "holds");
        }
        if (n == 0 && b > 0)
            continue;
        char text[120], more[40] = "";
        if (n > n_claimed)
            snprintf(more, sizeof more, " (%d more not claimed)", n - n_claimed);
        snprintf(text, sizeof text, "%d of %d %s%s%s", n_hold, n_claimed, basis[b], b == 0 ? " figures" : "", more);
        if (used + strlen(lead) + strlen(text) > 118) { /* and a comma, or what follows the figures */
            puts(",");
            lead = "      ";
            used = 0;
        }
        used += strlen(lead) + strlen(text);
        printf("%s%s", lead, text);
        lead = b == 0 ? "; checks: " : ", ";
    }
    putchar('\n');
}

/* The keys of a row in JSON are fixed: what the figure is goes into the metric's text. */
static void name_basis(json_t *rows)
{
    size_t i;
    json_t *row;
    json_array_foreach(rows, i, row) {
        json_object_set_new(row, "metric", json_sprintf("%s [%s]", text_of(row, "metric"), text_of(row, "basis")));
        json_object_del(row, "basis");
    }
}

/* Scenarios under scenarios/papers, by name; `only` NULL: all. */
static int collect(const char *only, json_t *rows, struct err *e)
{
    char dir[900], near[64];
    struct dirent **file = NULL;
    if (registry_data("scenarios/papers", dir, sizeof dir) < 0)
        return err_set(e, ERR_IO, "scenarios/papers: not found");
    int n = scandir(dir, &file, NULL, alphasort), n_run = 0;
    for (int i = 0; i < n; i++) {
        size_t len = strlen(file[i]->d_name);
        bool is_lua = len > 4 && !strcmp(file[i]->d_name + len - 4, ".lua");
        char path[1200], out[64];
        if (is_lua && (!only || (strlen(only) == len - 4 && !strncmp(only, file[i]->d_name, len - 4))) && !e->code) {
            json_t *claims = NULL;
            snprintf(path, sizeof path, "%s/%s", dir, file[i]->d_name);
            snprintf(out, sizeof out, "/tmp/moelab-reproduce-%d", (int)getpid());
            struct script_options o = { .out = out, .jobs = 2, .timeout_s = 600, .quiet = true };
            n_run++;
            if (script_run(path, &o, &claims, e) == 0 || e->code == ERR_RUN) {
                memset(e, 0, sizeof *e);
                json_array_extend(rows, claims);
            }
            json_decref(claims);
            record_discard(out);
        }
        free(file[i]);
    }
    free(file);
    if (!e->code && n_run == 0) {
        registry_nearest_data("scenarios/papers", only ? only : "", near, sizeof near);
        return err_set(e, ERR_INPUT, "no scenario \"%s\" under scenarios/papers%s%s%s", only ? only : "",
                       *near ? "; did you mean \"" : "", near, *near ? "\"?" : "");
    }
    return e->code;
}

int cmd_reproduce(int argc, char **argv)
{
    bool as_json = false, all = false;
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            puts("usage: moelab reproduce [NAME | --all] [--json]\n\n"
                 "Runs scenarios/papers/NAME.lua (or all of them) and prints what is expected against ours: signed\n"
                 "error, class, tolerance, verdict. What is expected is a published figure (\"published\"), or else a\n"
                 "closed form, a definition, what reference code gives, or an expectation of ours: the last line\n"
                 "counts them apart, and --json names it in brackets after the metric. Exit code 1 if a row of class\n"
                 "E or A fails.\n\n"
                 "Example:\n  moelab reproduce eplb");
            return 0;
        }
        if (!strcmp(argv[i], "--json"))
            as_json = true;
        else if (!strcmp(argv[i], "--all"))
            all = true;
        else if (cmd_is_option(argv[i]))
            return cmd_unknown_option("reproduce", argv[i], (const char *const[]){ "--all", "--help", "--json", NULL });
        else if (only)
            return cmd_usage("reproduce", "expected one name, found \"%s\" and \"%s\"", only, argv[i]);
        else
            only = argv[i];
    }
    if (all && only)
        return cmd_usage("reproduce", "expected a name or --all, found both");
    struct err e = { 0 };
    json_t *rows = json_array();
    int code = 0;
    if (collect(only, rows, &e) < 0) {
        code = cmd_fail(&e);
    } else {
        for (size_t i = 0; i < json_array_size(rows); i++) {
            json_t *row = json_array_get(rows, i);
            judge(row);
            const char *class = text_of(row, "class");
            if ((!strcmp(class, "E") || !strcmp(class, "A")) && !strcmp(text_of(row, "verdict"), "fails"))
                code = 1;
        }
        if (as_json) {
            name_basis(rows);
            json_dumpf(rows, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(17));
            putchar('\n');
        } else {
            print_rows(rows);
            print_summary(rows);
        }
    }
    json_decref(rows);
    return code;
}
