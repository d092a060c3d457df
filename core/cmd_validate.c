/* SPDX-License-Identifier: Apache-2.0
 * cmd_validate.c - moelab machine validate: published measurements against the models, as a table or JSON. */
#include "config.h"

#include "cmd.h"
#include "machine_validate.h"
#include "registry.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_table(const json_t *rows, size_t first, size_t end)
{
    const json_t *head = json_array_get(rows, first);
    double size[end - first], most = 0;
    printf("%s on %s\n  source: %s\n  fitted: %s\n\n  %-42s %10s %10s %-5s %8s  %-6s  %s\n",
           json_string_value(json_object_get(head, "table")), json_string_value(json_object_get(head, "machine")),
           json_string_value(json_object_get(head, "source")), json_string_value(json_object_get(head, "fitted")),
           "row", "measured", "modelled", "", "error", "binds", "GB/s");
    for (size_t i = first; i < end; i++) {
        const json_t *o = json_array_get(rows, i);
        const char *binds = json_string_value(json_object_get(o, "binds"));
        double error = json_number_value(json_object_get(o, "error"));
        size[i - first] = fabs(error);
        most = fmax(most, fabs(error));
        printf("  %-42s %10.4g %10.4g %-5s %+7.1f%%  %-6s", json_string_value(json_object_get(o, "row")),
               json_number_value(json_object_get(o, "measured")), json_number_value(json_object_get(o, "modelled")),
               json_string_value(json_object_get(o, "unit")), 100 * error, binds ? binds : "");
        if (json_object_get(o, "measured_GBps"))
            printf("  %4.0f, %.0f", json_number_value(json_object_get(o, "measured_GBps")),
                   json_number_value(json_object_get(o, "modelled_GBps")));
        putchar('\n');
    }
    qsort(size, end - first, sizeof *size, by_size);
    printf("\n  errors of time, modelled over measured: median %.1f %%, largest %.1f %% of %zu rows\n\n",
           100 * size[(end - first) / 2], 100 * most, end - first);
}

static void help(void)
{
    printf("usage: moelab machine validate [TABLE.csv...] [--machine NAME_OR_FILE] [--json]\n\n"
           "Published measurements against the models, with signed errors of time; which rows gave which parameter.\n"
           "Without a table: those in hw/published/, which also show the format.\n\n"
           "  --machine M   the machine to model instead of the one that the table names\n"
           "  --json        a list of rows\n\nExample:\n  moelab machine validate\n");
}

int machine_validate(int argc, char **argv)
{
    static const char *const known[] = { "--machine", "--json", "--help", NULL };
    static const char *const published[] = { "hw/published/deepgemm-h800.csv", "hw/published/deepep-h800.csv" };
    const char *machine = NULL, *file[64];
    char path[2][1024];
    bool as_json = false;
    int n = 0;
    struct err e = { 0 };
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--json"))
            as_json = true;
        else if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))
            return help(), 0;
        else if (!strcmp(argv[i], "--machine") && i + 1 < argc)
            machine = argv[++i];
        else if (cmd_is_option(argv[i]))
            return cmd_unknown_option("machine validate", argv[i], known);
        else if (n == 64)
            return cmd_usage("machine validate", "more than 64 tables");
        else
            file[n++] = argv[i];
    }
    for (int i = 0; n == i && i < 2 && (i == 0 || file[0] == path[0]); i++) { /* none given: all that are published */
        if (registry_data(published[i], path[i], sizeof path[i]) < 0)
            return cmd_usage("machine validate", "%s is not installed", published[i]);
        file[n++] = path[i];
    }
    json_t *rows = json_array();
    size_t end[64] = { 0 };
    for (int i = 0; i < n && !e.code; i++)
        machine_validate_table(file[i], machine, NULL, &e);
    for (int i = 0; i < n && !e.code; i++) {
        machine_validate_table(file[i], machine, rows, &e);
        end[i] = json_array_size(rows);
    }
    if (!e.code && as_json) {
        json_dumpf(rows, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(17));
        putchar('\n');
    }
    for (int i = 0; i < n && !e.code && !as_json; i++)
        print_table(rows, i ? end[i - 1] : 0, end[i]);
    json_decref(rows);
    return e.code ? cmd_fail(&e) : 0;
}
