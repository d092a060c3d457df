/* SPDX-License-Identifier: Apache-2.0
 * latency_table.c - answers from measured times; latency_read.c has them read.
 *
 * Between two numbers of rows times are read off a straight line: a launch and work in proportion to the rows are one,
 * and where a kernel turns from memory-bound to compute-bound the line lies above it, but less so than a line on
 * logarithmic axes does: DeepGEMM's 7168 x 4096 takes 48.8 us for 1024 rows on H800; between 64 and 4096 rows the one
 * has 53.9 there, the other 76.4; its 2048 x 7168 takes 32.5 us, and they have 32.8 and 44.4. Beyond the outermost
 * measurements there is no line, so nothing is extrapolated. Attention has a second axis, its context: decoding takes
 * time in proportion to it, and so do prompts of one number of tokens. */
#include "config.h"

#include "latency_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* How uneven groups may be for their mean to stand for them: most rows over mean. */
static const double most_uneven = 1.1;

void latency_table_free(struct latency_table *t)
{
    if (!t)
        return;
    for (int32_t i = 0; i < t->n_files; i++) {
        free(t->file[i]);
        free(t->path[i]);
    }
    free(t->file);
    free(t->path);
    free(t->files);
    free(t->entry);
    free(t->warned);
    free(t);
}

static int by(int64_t a, int64_t b)
{
    return (a > b) - (a < b);
}

int latency_compare_shape(const struct entry *a, const struct entry *b)
{
    const struct latency_key *x = &a->key, *y = &b->key;
    int c = by((int)x->op, (int)y->op);
    c = c ? c : by((int)a->precision, (int)b->precision);
    c = c ? c : by(x->n, y->n);
    c = c ? c : by(x->k, y->k);
    c = c ? c : by(x->heads, y->heads);
    c = c ? c : by(x->kv_heads, y->kv_heads);
    return c ? c : by(x->groups, y->groups);
}

/* ---- asking ---- */

/* The first entry that does not come before this shape with such a context and so many rows. */
static int32_t lower_bound(const struct latency_table *t, const struct entry *shape, double context, double rows)
{
    int32_t low = 0, high = t->n_entries;
    while (low < high) {
        const int32_t mid = low + (high - low) / 2;
        const struct latency_key *key = &t->entry[mid].key;
        const int c = latency_compare_shape(&t->entry[mid], shape);
        if (c < 0 || (c == 0 && (key->context < context || (key->context == context && key->rows < rows))))
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static double between(double x, double x0, double y0, double x1, double y1)
{
    return x0 == x1 ? y0 : y0 + (x - x0) / (x1 - x0) * (y1 - y0);
}

/* On the line of rows among entries [first, last) of one shape and context, which lower_bound found. */
static bool read_off(const struct latency_table *t, const struct entry *shape, int32_t first, int32_t last,
                     double context, double *seconds)
{
    const double rows = shape->key.rows;
    const int32_t i = lower_bound(t, shape, context, rows);
    if (i == last || (i == first && t->entry[i].key.rows != rows))
        return false;
    const struct entry *above = &t->entry[i], *below = above->key.rows == rows ? above : above - 1;
    *seconds = between(rows, below->key.rows, below->seconds, above->key.rows, above->seconds);
    return true;
}

bool latency_table_lookup(const struct latency_table *t, enum precision p, const struct latency_key *key,
                          double *seconds)
{
    const struct entry shape = { .key = *key, .precision = p };
    const int32_t end = lower_bound(t, &shape, INFINITY, 0);
    double below = NAN, above = NAN, y, y_below = 0, y_above = 0;
    for (int32_t i = lower_bound(t, &shape, -INFINITY, 0), next; i < end && isnan(above); i = next) {
        const double context = t->entry[i].key.context;
        next = lower_bound(t, &shape, context, INFINITY);
        if (!read_off(t, &shape, i, next, context, &y))
            continue;
        if (context <= key->context) {
            below = context;
            y_below = y;
        }
        if (context >= key->context) {
            above = context;
            y_above = y;
        }
    }
    if (isnan(below) || isnan(above))
        return false;
    *seconds = between(key->context, below, y_below, above, y_above);
    return true;
}

struct launch { /* of groups with rows */
    int32_t groups;
    double mean, most;
    int64_t n, k;
    bool alike;
};

static struct launch measure(int32_t n_groups, const struct gemm_group *group, const struct gemm_bytes *b)
{
    struct launch l = { .alike = b->in == b->weight };
    double sum = 0;
    for (int32_t g = 0; g < n_groups; g++) {
        if (group[g].rows <= 0)
            continue;
        if (l.groups++ == 0) {
            l.n = group[g].n;
            l.k = group[g].k;
        }
        l.alike = l.alike && group[g].n == l.n && group[g].k == l.k;
        sum += (double)group[g].rows;
        l.most = fmax(l.most, (double)group[g].rows);
    }
    l.mean = l.groups > 0 ? sum / l.groups : 0;
    return l;
}

/* Whether to warn: once for every matrix, in groups and alone, and for every other shape. What follows from a warning
 * is the same for all rows and contexts. */
static bool is_news(struct latency_table *t, enum precision p, const struct latency_key *key)
{
    struct entry e = { .key = *key, .precision = p };
    e.key.groups = 0;
    for (int32_t i = 0; i < t->n_warned; i++)
        if (latency_compare_shape(&t->warned[i], &e) == 0)
            return false;
    struct entry *grown = realloc(t->warned, ((size_t)t->n_warned + 1) * sizeof *grown);
    if (!grown) /* rather no warning than the same again and again */
        return false;
    t->warned = grown;
    t->warned[t->n_warned++] = e;
    return true;
}

/* What is there of a shape: "it has 1 to 8 rows"; false: nothing. */
static bool say_range(const struct latency_table *t, const struct entry *shape, char *why, size_t room)
{
    const int32_t first = lower_bound(t, shape, -INFINITY, 0), end = lower_bound(t, shape, INFINITY, 0);
    double least = INFINITY, most = 0;
    for (int32_t i = first; i < end; i++) {
        least = fmin(least, t->entry[i].key.rows);
        most = fmax(most, t->entry[i].key.rows);
    }
    const bool bytes = shape->key.op == LATENCY_PERMUTE || shape->key.op == LATENCY_COMBINE;
    const int n = snprintf(why, room, "it has %.15g to %.15g %s", least, most, bytes ? "bytes" : "rows");
    if (first < end && shape->key.heads > 0)
        snprintf(why + n, room - (size_t)n, " at contexts of %.15g to %.15g", t->entry[first].key.context,
                 t->entry[end - 1].key.context);
    return first < end;
}

static void warn(struct latency_table *t, enum precision p, const struct launch *l)
{
    struct entry shape = { .key = { .op = l->groups == 1 ? LATENCY_GEMM : LATENCY_GROUPED_GEMM, .groups = l->groups,
                                    .n = l->n, .k = l->k }, .precision = p };
    const enum latency_op op = shape.key.op;
    char why[120];
    if (!is_news(t, p, &shape.key))
        return;
    bool any = say_range(t, &shape, why, sizeof why);
    if (!any && op == LATENCY_GEMM) { /* one group will do */
        shape.key.op = LATENCY_GROUPED_GEMM;
        any = say_range(t, &shape, why, sizeof why);
    }
    if (!l->alike)
        snprintf(why, sizeof why, "groups of several shapes, or weights of another width");
    else if (l->most > most_uneven * l->mean)
        snprintf(why, sizeof why, "the fullest group has %g rows, more than %g times the mean", l->most, most_uneven);
    else if (!any)
        snprintf(why, sizeof why, "it has no such matrix in so many groups");
    fprintf(stderr,
            "moelab: warning: %s: %s of %d group%s, %.6g rows times %lld x %lld in %s, is outside (%s): modelled\n",
            t->files, latency_op_name[op], l->groups, l->groups == 1 ? "" : "s", l->mean, (long long)l->k,
            (long long)l->n, precision_name[p], why);
}

double latency_table_gemm(struct latency_table *t, enum precision p, int32_t n_groups, const struct gemm_group *group,
                          const struct gemm_bytes *b, double modelled)
{
    const struct launch l = measure(n_groups, group, b);
    struct latency_key key = { .op = LATENCY_GEMM, .groups = l.groups, .n = l.n, .k = l.k, .rows = l.mean };
    struct latency_counts *count = &t->count[LATENCY_PRODUCTS];
    double seconds;
    if (l.groups == 0 || !count->any)
        return modelled;
    bool found = l.alike && l.most <= most_uneven * l.mean;
    if (found && (l.groups > 1 || !latency_table_lookup(t, p, &key, &seconds))) {
        key.op = LATENCY_GROUPED_GEMM;
        found = latency_table_lookup(t, p, &key, &seconds);
    }
    if (found) {
        count->measured++;
        return seconds;
    }
    count->modelled++;
    warn(t, p, &l);
    return modelled;
}

static void warn_of(struct latency_table *t, enum precision p, const struct latency_key *key)
{
    const struct entry shape = { .key = *key, .precision = p };
    char why[120], what[120];
    if (!say_range(t, &shape, why, sizeof why))
        snprintf(why, sizeof why, "it has no such shape");
    if (key->heads > 0)
        snprintf(what, sizeof what, "%.6g rows, context %.6g, %d heads of %lld and %lld, %d of keys and values",
                 key->rows, key->context, key->heads, (long long)key->n, (long long)key->k, key->kv_heads);
    else if (key->n > 0)
        snprintf(what, sizeof what, key->k > 0 ? "%.6g rows of %lld, %lld each" : "%.6g rows of %lld", key->rows,
                 (long long)key->n, (long long)key->k);
    else
        snprintf(what, sizeof what, "%.6g bytes", key->rows);
    fprintf(stderr, "moelab: warning: %s: %s of %s in %s, is outside (%s): modelled\n", t->files,
            latency_op_name[key->op], what, precision_name[p], why);
}

double latency_table_kernel(struct latency_table *t, enum precision p, const struct latency_key *key, double modelled)
{
    struct latency_counts *count = &t->count[LATENCY_OTHERS];
    double seconds;
    if (!t->has[key->op])
        return modelled;
    if (latency_table_lookup(t, p, key, &seconds)) {
        count->measured++;
        return seconds;
    }
    count->modelled++;
    if (is_news(t, p, key))
        warn_of(t, p, key);
    return modelled;
}

bool latency_table_file(const struct latency_table *t, int32_t i, const char **name, const char **path)
{
    if (i >= t->n_files)
        return false;
    *name = t->file[i];
    *path = t->path[i];
    return true;
}

const char *latency_table_files(const struct latency_table *t)
{
    return t->files;
}

struct latency_counts latency_table_counts(const struct latency_table *t, enum latency_family family)
{
    return t->count[family];
}
