/* SPDX-License-Identifier: Apache-2.0
 * latency_read.c - measured times read from CSV files.
 *
 * A file has lines of comment (#), a line that names its columns, and a line per measurement:
 *
 *   op,precision,groups,rows,n,k,latency_us
 *   grouped_gemm,fp8,4,256,4096,7168,64.5
 *
 * op: gemm (groups: 1, or no such column) or grouped_gemm; rows: of each group; seconds or latency_us. */
#include "config.h"

#include "latency_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const latency_op_name[N_LATENCY_OPS] = { "gemm", "grouped_gemm" };

enum column { OP, PRECISION, GROUPS, ROWS, COL_N, COL_K, SECONDS, LATENCY_US, N_COLUMNS };
static const char *const column_name[N_COLUMNS] = { "op", "precision", "groups", "rows", "n", "k",
                                                    "seconds", "latency_us" };

#define MAX_ENTRIES 1000000
#define MAX_FIELDS  64

struct reader {
    struct latency_table *t;
    const char *file;
    int32_t line, column[N_COLUMNS], n_fields; /* column: index of the field; -1: there is none */
    struct err *err;
};

/* ---- reading ---- */

static int no_memory(struct err *err, const char *file)
{
    return err_set(err, ERR_MEMORY, "%s: out of memory", file);
}

/* Cuts a line at its commas, in place; returns how many fields there are. */
static int32_t cut(char *line, char *field[MAX_FIELDS])
{
    int32_t n = 0;
    for (char *at = line;; at++) {
        at += strspn(at, " \t");
        char *end = at + strcspn(at, ",\r\n"), *trim = end;
        const bool last = *end != ',';
        while (trim > at && (trim[-1] == ' ' || trim[-1] == '\t'))
            trim--;
        *trim = '\0';
        if (n < MAX_FIELDS)
            field[n] = at;
        n++;
        if (last)
            return n;
        at = end;
    }
}

static int read_header(struct reader *r, char *field[MAX_FIELDS], int32_t n)
{
    for (int c = 0; c < N_COLUMNS; c++)
        r->column[c] = -1;
    for (int32_t i = 0; i < n && i < MAX_FIELDS; i++) {
        int c = 0;
        while (c < N_COLUMNS && strcmp(field[i], column_name[c]) != 0)
            c++;
        if (c == N_COLUMNS) {
            const char *near = err_nearest(field[i], column_name, N_COLUMNS);
            return err_set(r->err, ERR_INPUT, "%s:%d: unknown column \"%.40s\"%s%s%s", r->file, r->line, field[i],
                           near ? "; did you mean \"" : ", expected op, precision, groups, rows, n, k, seconds or "
                                                        "latency_us", near ? near : "", near ? "\"?" : "");
        }
        if (r->column[c] >= 0)
            return err_set(r->err, ERR_INPUT, "%s:%d: column \"%s\" is there twice", r->file, r->line, column_name[c]);
        r->column[c] = i;
    }
    for (int c = 0; c < SECONDS; c++)
        if (r->column[c] < 0 && c != GROUPS)
            return err_set(r->err, ERR_INPUT, "%s:%d: column \"%s\" is missing", r->file, r->line, column_name[c]);
    if ((r->column[SECONDS] < 0) == (r->column[LATENCY_US] < 0))
        return err_set(r->err, ERR_INPUT, "%s:%d: columns \"seconds\" and \"latency_us\": found %s, expected one of "
                       "them", r->file, r->line, r->column[SECONDS] < 0 ? "neither" : "both");
    r->n_fields = n;
    return 0;
}

static int bad_field(struct reader *r, enum column c, const char *found, const char *expected)
{
    return err_set(r->err, ERR_INPUT, "%s:%d: %s: found \"%.40s\", expected %s", r->file, r->line, column_name[c],
                   found, expected);
}

static int read_word(struct reader *r, enum column c, const char *text, const char *const *words, int n, int *which)
{
    char expected[120] = "";
    for (*which = 0; *which < n; ++*which)
        if (!strcmp(text, words[*which]))
            return 0;
    for (int i = 0; i < n; i++)
        snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%s%s", i ? ", " : "one of ",
                 words[i]);
    return bad_field(r, c, text, expected);
}

static int read_whole(struct reader *r, enum column c, const char *text, int64_t most, int64_t *value)
{
    char expected[60], *end;
    errno = 0;
    const long long x = strtoll(text, &end, 10);
    snprintf(expected, sizeof expected, "a whole number from 1 to %lld", (long long)most);
    if (end == text || *end || errno || x < 1 || x > most)
        return bad_field(r, c, text, expected);
    *value = x;
    return 0;
}

static int read_seconds(struct reader *r, char *const *field, double *seconds)
{
    const enum column c = r->column[SECONDS] >= 0 ? SECONDS : LATENCY_US;
    const char *text = field[r->column[c]];
    char *end;
    const double x = strtod(text, &end) * (c == SECONDS ? 1 : 1e-6);
    if (end == text || *end || !(x > 0 && x <= 1e6))
        return bad_field(r, c, text, c == SECONDS ? "seconds, more than 0" : "microseconds, more than 0");
    *seconds = x;
    return 0;
}

static int add_entry(struct reader *r, struct entry e)
{
    struct latency_table *t = r->t;
    if (t->n_entries == MAX_ENTRIES)
        return err_set(r->err, ERR_INPUT, "%s:%d: found more than %d measurements", r->file, r->line, MAX_ENTRIES);
    if (t->n_entries == t->room) {
        const int32_t room = 2 * t->room + 64;
        struct entry *grown = realloc(t->entry, (size_t)room * sizeof *grown);
        if (!grown)
            return no_memory(r->err, r->file);
        t->entry = grown;
        t->room = room;
    }
    t->entry[t->n_entries++] = e;
    return 0;
}

static int read_entry(struct reader *r, char *const *field, int32_t n)
{
    struct entry e = { .groups = 1, .file = r->t->n_files - 1, .line = r->line };
    int op, precision;
    int64_t groups = 1;
    if (n != r->n_fields)
        return err_set(r->err, ERR_INPUT, "%s:%d: found %d fields, expected %d, as many as columns", r->file, r->line,
                       n, r->n_fields);
    if (read_word(r, OP, field[r->column[OP]], latency_op_name, N_LATENCY_OPS, &op) ||
        read_word(r, PRECISION, field[r->column[PRECISION]], precision_name, N_PRECISIONS, &precision) ||
        (r->column[GROUPS] >= 0 && read_whole(r, GROUPS, field[r->column[GROUPS]], 1 << 20, &groups)) ||
        read_whole(r, ROWS, field[r->column[ROWS]], INT32_MAX, &e.rows) ||
        read_whole(r, COL_N, field[r->column[COL_N]], INT32_MAX, &e.n) ||
        read_whole(r, COL_K, field[r->column[COL_K]], INT32_MAX, &e.k) || read_seconds(r, field, &e.seconds))
        return r->err->code;
    if (op == LATENCY_GEMM && groups != 1)
        return bad_field(r, GROUPS, field[r->column[GROUPS]], "1: a gemm has no groups");
    if (op == LATENCY_GROUPED_GEMM && r->column[GROUPS] < 0)
        return err_set(r->err, ERR_INPUT, "%s:%d: op: found \"grouped_gemm\", but there is no column \"groups\"",
                       r->file, r->line);
    e.op = (enum latency_op)op;
    e.precision = (enum precision)precision;
    e.groups = (int32_t)groups;
    return add_entry(r, e);
}

static int read_lines(struct reader *r, FILE *in)
{
    char *line = NULL, *field[MAX_FIELDS];
    size_t room = 0;
    bool header = false;
    const int32_t before = r->t->n_entries;
    int rc = 0;
    for (ssize_t n; rc == 0 && (n = getline(&line, &room, in)) >= 0;) {
        r->line++;
        const char first = line[strspn(line, " \t\r\n")];
        if (first == '#' || first == '\0')
            continue;
        if (strlen(line) != (size_t)n) {
            rc = err_set(r->err, ERR_INPUT, "%s:%d: found a NUL, expected text", r->file, r->line);
            break;
        }
        const int32_t n_fields = cut(line, field);
        rc = header ? read_entry(r, field, n_fields) : read_header(r, field, n_fields);
        header = true;
    }
    free(line);
    if (rc == 0 && ferror(in))
        rc = err_set(r->err, ERR_IO, "%s: %s", r->file, strerror(errno));
    if (rc == 0 && r->t->n_entries == before)
        rc = err_set(r->err, ERR_INPUT, "%s: no measurement in it, expected %s", r->file,
                     header ? "lines below the columns' names" : "a line that names the columns");
    return rc;
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
    struct reader r = { .t = t, .file = name, .err = err };
    const size_t n = strlen(name);
    if (add_file(t, name, machine_file))
        return no_memory(err, name);
    /* Messages quote what they find, and a scenario may name any file. */
    if (n < 5 || strcmp(name + n - 4, ".csv") != 0)
        return err_set(err, ERR_INPUT, "%s: tables: found \"%s\", expected the name of a .csv file", machine_file,
                       name);
    FILE *in = fopen(t->path[t->n_files - 1], "r");
    if (!in)
        return err_set(err, ERR_INPUT, "%s: tables: %s: %s", machine_file, name, strerror(errno));
    const int rc = read_lines(&r, in);
    fclose(in);
    return rc;
}

/* ---- order ---- */

static int by(int64_t a, int64_t b)
{
    return (a > b) - (a < b);
}

static int compare(const void *x, const void *y)
{
    const struct entry *a = x, *b = y;
    int c = latency_compare_shape(a, b);
    c = c ? c : by(a->rows, b->rows);
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
        if (last && latency_compare_shape(e, last) == 0 && e->rows == last->rows) {
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
