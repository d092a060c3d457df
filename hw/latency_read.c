/* SPDX-License-Identifier: Apache-2.0
 * latency_read.c - measured times read from CSV files.
 *
 * A file has lines of comment (#), a line that names its columns, and a line per measurement:
 *
 *   op,precision,groups,rows,n,k,latency_us
 *   grouped_gemm,fp8,4,256,4096,7168,64.5
 *
 * Which columns a line fills in, its op says: ops[] below. seconds or latency_us. */
#include "config.h"

#include "csv.h"
#include "latency_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum column {
    OP, PRECISION, SECONDS, LATENCY_US, /* the others are an op's */
    GROUPS, ROWS, COL_N, COL_K, HEADS, KV_HEADS, QUERY, VALUE, CONTEXT, BYTES, N_COLUMNS
};
static const char *const column_name[N_COLUMNS] = { "op",   "precision", "seconds",  "latency_us", "groups",
                                                    "rows", "n",         "k",        "heads",      "kv_heads",
                                                    "query", "value",    "context",  "bytes" };

const char *const latency_op_name[N_LATENCY_OPS] = {
    [LATENCY_NONE] = "",
    [LATENCY_GEMM] = "gemm",
    [LATENCY_GROUPED_GEMM] = "grouped_gemm",
    [LATENCY_PREFILL] = "attention_prefill",
    [LATENCY_DECODE] = "attention_decode",
    [LATENCY_NORM] = "norm",
    [LATENCY_ROTATION] = "rotation",
    [LATENCY_ACTIVATION] = "activation",
    [LATENCY_TOP_K] = "top_k",
    [LATENCY_PERMUTE] = "permute",
    [LATENCY_COMBINE] = "combine",
};

#define COLUMN(c) (1u << (c))
#define ATTENTION \
    (COLUMN(ROWS) | COLUMN(HEADS) | COLUMN(KV_HEADS) | COLUMN(QUERY) | COLUMN(VALUE) | COLUMN(CONTEXT))

static const unsigned wants[N_LATENCY_OPS] = {
    [LATENCY_GEMM] = COLUMN(ROWS) | COLUMN(COL_N) | COLUMN(COL_K),
    [LATENCY_GROUPED_GEMM] = COLUMN(GROUPS) | COLUMN(ROWS) | COLUMN(COL_N) | COLUMN(COL_K),
    [LATENCY_PREFILL] = ATTENTION,
    [LATENCY_DECODE] = ATTENTION,
    [LATENCY_NORM] = COLUMN(ROWS) | COLUMN(COL_N),
    [LATENCY_ROTATION] = COLUMN(ROWS) | COLUMN(COL_N),
    [LATENCY_ACTIVATION] = COLUMN(ROWS) | COLUMN(COL_N),
    [LATENCY_TOP_K] = COLUMN(ROWS) | COLUMN(COL_N) | COLUMN(COL_K),
    [LATENCY_PERMUTE] = COLUMN(BYTES),
    [LATENCY_COMBINE] = COLUMN(BYTES),
};

struct reader {
    struct latency_table *t;
    struct csv csv;
    struct err *err;
};

/* ---- reading ---- */

static int no_memory(struct err *err, const char *file)
{
    return err_set(err, ERR_MEMORY, "%s: out of memory", file);
}

static int check_header(struct reader *r)
{
    const struct csv *c = &r->csv;
    bool there[N_COLUMNS] = { false };
    for (int i = 0; i < c->n_columns; i++) {
        int k = 0;
        while (k < N_COLUMNS && strcmp(c->column[i], column_name[k]) != 0)
            k++;
        if (k == N_COLUMNS) {
            const char *near = err_nearest(c->column[i], column_name, N_COLUMNS);
            return err_set(r->err, ERR_INPUT, "%s:%d: unknown column \"%.40s\"%s%s%s", c->file, c->header,
                           c->column[i], near ? "; did you mean \"" : ", expected those of doc/machines.md",
                           near ? near : "", near ? "\"?" : "");
        }
        if (there[k])
            return err_set(r->err, ERR_INPUT, "%s:%d: column \"%s\" is there twice", c->file, c->header,
                           column_name[k]);
        there[k] = true;
    }
    for (int k = OP; k <= PRECISION; k++)
        if (!there[k])
            return err_set(r->err, ERR_INPUT, "%s:%d: column \"%s\" is missing", c->file, c->header, column_name[k]);
    if (there[SECONDS] == there[LATENCY_US])
        return err_set(r->err, ERR_INPUT, "%s:%d: columns \"seconds\" and \"latency_us\": found %s, expected one of "
                       "them", c->file, c->header, there[SECONDS] ? "both" : "neither");
    return 0;
}

static int bad_cell(struct reader *r, int row, enum column c, const char *expected)
{
    return err_set(r->err, ERR_INPUT, "%s:%d: %s: found \"%.40s\", expected %s", r->csv.file, r->csv.row[row].line,
                   column_name[c], csv_cell(&r->csv, row, column_name[c]), expected);
}

static int read_word(struct reader *r, int row, enum column c, const char *const *words, int n, int *which)
{
    const char *text = csv_cell(&r->csv, row, column_name[c]);
    char expected[240] = "";
    for (*which = 0; *which < n; ++*which)
        if (*text && !strcmp(text, words[*which]))
            return 0;
    for (int i = 0; i < n; i++)
        if (*words[i])
            snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%s%s",
                     *expected ? ", " : "one of ", words[i]);
    return bad_cell(r, row, c, expected);
}

/* As long as 1e9 us is no kernel, but another unit. */
static int read_seconds(struct reader *r, int row, double *seconds)
{
    const enum column c = csv_cell(&r->csv, row, column_name[SECONDS]) ? SECONDS : LATENCY_US;
    const char *text = csv_cell(&r->csv, row, column_name[c]);
    char *end;
    const double x = strtod(text, &end) * (c == SECONDS ? 1 : 1e-6);
    if (end == text || *end || !(x > 0 && x < 1e3))
        return bad_cell(r, row, c, c == SECONDS ? "seconds, more than 0 and less than 1000"
                                                : "microseconds, more than 0 and less than 1e9");
    *seconds = x;
    return 0;
}

static int add_entry(struct reader *r, const struct entry *e)
{
    struct latency_table *t = r->t;
    if (t->n_entries == t->room) {
        const int32_t room = 2 * t->room + 64;
        struct entry *grown = realloc(t->entry, (size_t)room * sizeof *grown);
        if (!grown)
            return no_memory(r->err, r->csv.file);
        t->entry = grown;
        t->room = room;
    }
    t->entry[t->n_entries++] = *e;
    t->has[e->key.op] = true;
    t->count[latency_family(e->key.op)].any = true;
    return 0;
}

/* What a line's op wants is there, and nothing else. */
static int check_cells(struct reader *r, int row, enum latency_op op)
{
    for (int c = GROUPS; c < N_COLUMNS; c++) {
        const char *text = csv_cell(&r->csv, row, column_name[c]);
        char expected[60];
        if ((wants[op] & COLUMN(c)) && !text)
            return err_set(r->err, ERR_INPUT, "%s:%d: op: found \"%s\", but there is no column \"%s\"", r->csv.file,
                           r->csv.row[row].line, latency_op_name[op], column_name[c]);
        if ((wants[op] & COLUMN(c)) || !text || !*text || (op == LATENCY_GEMM && c == GROUPS && !strcmp(text, "1")))
            continue;
        snprintf(expected, sizeof expected, "%s: a %s has no %s", op == LATENCY_GEMM && c == GROUPS ? "1" : "nothing",
                 latency_op_name[op], column_name[c]);
        return bad_cell(r, row, (enum column)c, expected);
    }
    return 0;
}

static int read_entry(struct reader *r, int row)
{
    struct entry e = { .file = r->t->n_files - 1, .line = r->csv.row[row].line };
    int64_t value[N_COLUMNS] = { [GROUPS] = 1 };
    int op, precision;
    if (read_word(r, row, OP, latency_op_name, N_LATENCY_OPS, &op) || check_cells(r, row, (enum latency_op)op) ||
        read_word(r, row, PRECISION, precision_name, N_PRECISIONS, &precision))
        return r->err->code;
    for (int c = GROUPS; c < N_COLUMNS; c++) {
        const int64_t most = c == GROUPS || c == HEADS || c == KV_HEADS ? 1 << 20 : c == BYTES ? INT64_C(1) << 50
                                                                                              : INT32_MAX;
        if ((wants[op] & COLUMN(c)) &&
            csv_whole(&r->csv, row, column_name[c], c == CONTEXT ? 0 : 1, most, &value[c], r->err))
            return r->err->code;
    }
    if (read_seconds(r, row, &e.seconds))
        return r->err->code;
    const bool product = latency_family((enum latency_op)op) == LATENCY_PRODUCTS, attends = wants[op] == ATTENTION;
    e.precision = (enum precision)precision;
    e.key = (struct latency_key){ .op = (enum latency_op)op, .groups = product ? (int32_t)value[GROUPS] : 0,
                                  .heads = (int32_t)value[HEADS], .kv_heads = (int32_t)value[KV_HEADS],
                                  .n = value[attends ? QUERY : COL_N], .k = value[attends ? VALUE : COL_K],
                                  .rows = (double)value[wants[op] == COLUMN(BYTES) ? BYTES : ROWS],
                                  .context = (double)value[CONTEXT] };
    return add_entry(r, &e);
}

/* `name`, or the file of that name beside the machine's if there is no such file. NULL: out of memory. */
static char *find_table(const char *name, const char *machine_file)
{
    const char *slash = strrchr(machine_file, '/');
    if (access(name, F_OK) == 0 || name[0] == '/' || !slash)
        return strdup(name);
    const size_t n = (size_t)(slash - machine_file) + 1;
    char *path = malloc(n + strlen(name) + 1);
    if (path) {
        memcpy(path, machine_file, n);
        memcpy(path + n, name, strlen(name) + 1);
    }
    return path;
}

/* Notes a file; its index is the last. */
static int add_file(struct latency_table *t, const char *name, const char *machine_file)
{
    const size_t n = (size_t)t->n_files + 1;
    char **file = realloc(t->file, n * sizeof *file), **path;
    if (file)
        t->file = file;
    if (!file || !(path = realloc(t->path, n * sizeof *path)))
        return -1;
    t->path = path;
    t->file[t->n_files] = strdup(name);
    t->path[t->n_files] = find_table(name, machine_file);
    t->n_files++;
    return t->file[n - 1] && t->path[n - 1] ? 0 : -1;
}

static int read_file(struct latency_table *t, const char *name, const char *machine_file, struct err *err)
{
    struct reader r = { .t = t, .err = err };
    const size_t n = strlen(name);
    if (add_file(t, name, machine_file))
        return no_memory(err, name);
    /* Messages quote what they find, and a scenario may name any file. */
    if (n < 5 || strcmp(name + n - 4, ".csv") != 0)
        return err_set(err, ERR_INPUT, "%s: tables: found \"%s\", expected the name of a .csv file", machine_file,
                       name);
    const char *path = t->path[t->n_files - 1];
    if (access(path, R_OK) < 0)
        return err_set(err, ERR_INPUT, "%s: tables: %s: %s", machine_file, name, strerror(errno));
    if (csv_read_as(&r.csv, path, name, err) < 0)
        return err->code;
    int rc = check_header(&r);
    for (int i = 0; i < r.csv.n_rows && rc == 0; i++)
        rc = read_entry(&r, i);
    csv_free(&r.csv);
    return rc;
}

/* ---- order ---- */

static int by(double a, double b)
{
    return (a > b) - (a < b);
}

static int compare(const void *x, const void *y)
{
    const struct entry *a = x, *b = y;
    int c = latency_compare_shape(a, b);
    c = c ? c : by(a->key.context, b->key.context);
    c = c ? c : by(a->key.rows, b->key.rows);
    c = c ? c : by(a->file, b->file);
    return c ? c : by(a->line, b->line);
}

/* Sorts, and keeps one of several that say the same. */
static int settle(struct latency_table *t, struct err *err)
{
    int32_t n = 0;
    qsort(t->entry, (size_t)t->n_entries, sizeof *t->entry, compare);
    for (int32_t i = 0; i < t->n_entries; i++) {
        const struct entry *e = &t->entry[i], *last = n > 0 ? &t->entry[n - 1] : NULL;
        if (last && latency_compare_shape(e, last) == 0 && e->key.context == last->key.context &&
            e->key.rows == last->key.rows) {
            if (e->seconds != last->seconds)
                return err_set(err, ERR_INPUT, "%s:%d: found %g s, but %s:%d has %g s for the same", t->file[e->file],
                               e->line, e->seconds, t->file[last->file], last->line, last->seconds);
            continue;
        }
        t->entry[n++] = *e;
    }
    t->n_entries = n;
    return 0;
}

static int join_names(struct latency_table *t, struct err *err)
{
    size_t room = 1, at = 0;
    for (int32_t i = 0; i < t->n_files; i++)
        room += strlen(t->file[i]) + 2;
    if (!(t->files = malloc(room)))
        return no_memory(err, t->file[0]);
    for (int32_t i = 0; i < t->n_files; i++)
        at += (size_t)snprintf(t->files + at, room - at, "%s%s", i ? ", " : "", t->file[i]);
    return 0;
}

int latency_table_read(struct latency_table **out, const json_t *files, const char *machine_file, struct err *err)
{
    struct latency_table *t = calloc(1, sizeof *t);
    int rc = t ? 0 : no_memory(err, machine_file);
    *out = NULL;
    if (rc == 0 && json_array_size(files) == 0)
        rc = err_set(err, ERR_INPUT, "%s: tables: expected a list of the names of .csv files", machine_file);
    for (size_t i = 0; rc == 0 && i < json_array_size(files); i++) {
        const char *name = json_string_value(json_array_get(files, i));
        rc = name ? read_file(t, name, machine_file, err)
                  : err_set(err, ERR_INPUT, "%s: tables[%zu]: expected the name of a .csv file", machine_file, i + 1);
    }
    if (rc == 0 && (rc = settle(t, err)) == 0)
        rc = join_names(t, err);
    if (rc)
        latency_table_free(t);
    else
        *out = t;
    return rc;
}
