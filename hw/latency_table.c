/* SPDX-License-Identifier: Apache-2.0
 * latency_table.c - answers from measured times; latency_read.c has them read.
 *
 * Between two numbers of rows times are read off a straight line: a launch and work in proportion to the rows are one,
 * and where a kernel turns from memory-bound to compute-bound the line lies above it, but less so than a line on
 * logarithmic axes does: DeepGEMM's 7168 x 4096 takes 48.8 us for 1024 rows on H800; between 64 and 4096 rows the one
 * has 53.9 there, the other 76.4; its 2048 x 7168 takes 32.5 us, and they have 32.8 and 44.4. Beyond the outermost
 * measurements there is no line, so nothing is extrapolated. */
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
    int c = by((int)a->op, (int)b->op);
    c = c ? c : by((int)a->precision, (int)b->precision);
    c = c ? c : by(a->n, b->n);
    c = c ? c : by(a->k, b->k);
    return c ? c : by(a->groups, b->groups);
}

/* ---- asking ---- */

/* The first entry that does not come before this shape with so many rows. */
static int32_t lower_bound(const struct latency_table *t, const struct entry *shape, double rows)
{
    int32_t low = 0, high = t->n_entries;
    while (low < high) {
        const int32_t mid = low + (high - low) / 2;
        const int c = latency_compare_shape(&t->entry[mid], shape);
        if (c < 0 || (c == 0 && (double)t->entry[mid].rows < rows))
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

bool latency_table_lookup(const struct latency_table *t, enum latency_op op, enum precision p, int32_t groups,
                          double rows, int64_t n, int64_t k, double *seconds)
{
    const struct entry shape = { .op = op, .precision = p, .groups = groups, .n = n, .k = k };
    const int32_t i = lower_bound(t, &shape, rows);
    if (i == t->n_entries || latency_compare_shape(&t->entry[i], &shape) != 0)
        return false;
    const struct entry *above = &t->entry[i];
    if ((double)above->rows == rows) {
        *seconds = above->seconds;
        return true;
    }
    if (i == 0 || latency_compare_shape(above - 1, &shape) != 0)
        return false;
    const struct entry *below = above - 1;
    const double way = (rows - (double)below->rows) / (double)(above->rows - below->rows);
    *seconds = below->seconds + way * (above->seconds - below->seconds);
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

/* Why the model was asked, once for every matrix, in groups and alone: what follows from a warning is the same for all
 * its rows. */
static void warn(struct latency_table *t, enum precision p, const struct launch *l)
{
    for (int32_t i = 0; i < t->n_warned; i++)
        if (t->warned[i].precision == p && t->warned[i].grouped == (l->groups > 1) && t->warned[i].n == l->n &&
            t->warned[i].k == l->k)
            return;
    struct matrix *grown = realloc(t->warned, ((size_t)t->n_warned + 1) * sizeof *grown);
    if (!grown) /* rather no warning than the same again and again */
        return;
    t->warned = grown;
    t->warned[t->n_warned++] = (struct matrix){ p, l->groups > 1, l->n, l->k };

    struct entry shape = { .op = l->groups == 1 ? LATENCY_GEMM : LATENCY_GROUPED_GEMM, .precision = p,
                           .groups = l->groups, .n = l->n, .k = l->k };
    const enum latency_op op = shape.op;
    int32_t first = lower_bound(t, &shape, 0), last = lower_bound(t, &shape, INFINITY);
    char why[120];
    if (first == last && op == LATENCY_GEMM) { /* one group will do */
        shape.op = LATENCY_GROUPED_GEMM;
        first = lower_bound(t, &shape, 0);
        last = lower_bound(t, &shape, INFINITY);
    }
    if (!l->alike)
        snprintf(why, sizeof why, "groups of several shapes, or weights of another width");
    else if (l->most > most_uneven * l->mean)
        snprintf(why, sizeof why, "the fullest group has %g rows, more than %g times the mean", l->most, most_uneven);
    else if (first < last)
        snprintf(why, sizeof why, "it has %lld to %lld rows", (long long)t->entry[first].rows,
                 (long long)t->entry[last - 1].rows);
    else
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
    double seconds;
    if (l.groups == 0)
        return modelled;
    if (l.alike && l.most <= most_uneven * l.mean &&
        ((l.groups == 1 && latency_table_lookup(t, LATENCY_GEMM, p, 1, l.mean, l.n, l.k, &seconds)) ||
         latency_table_lookup(t, LATENCY_GROUPED_GEMM, p, l.groups, l.mean, l.n, l.k, &seconds))) {
        t->measured++;
        return seconds;
    }
    t->modelled++;
    warn(t, p, &l);
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

void latency_table_counts(const struct latency_table *t, int64_t *measured, int64_t *modelled)
{
    *measured = t->measured;
    *modelled = t->modelled;
}
