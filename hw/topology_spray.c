/* SPDX-License-Identifier: Apache-2.0
 * topology_spray.c - the links that a sprayed one stands for, its strands: what their failing leaves of the sum, and
 * whether two leaves have a path left. */
#include "config.h"

#include "topology_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Where a sprayed link's strands begin among those of all, and their number; 0: it is a link of its own. */
static int32_t strands_of(const struct topology *t, int32_t link, size_t *first)
{
    const struct fabric *f = &((const struct layout *)t->priv)->fabric;
    if (f->paths != PATHS_SPRAY || f->up < 0 || link < f->up)
        return 0;
    const int32_t up = link - f->up, n_up = 2 * f->n_leaves;
    if (up < n_up) {
        *first = (size_t)up * (size_t)f->spines;
        return f->spines;
    }
    *first = (size_t)n_up * (size_t)f->spines + (size_t)(link - f->core) * (size_t)(f->spines * f->cores);
    return f->spines * f->cores;
}

static size_t all_strands(const struct fabric *f)
{
    return 2 * (size_t)f->n_leaves * (size_t)f->spines + 2 * (size_t)f->n_pods * (size_t)(f->spines * f->cores);
}

int32_t topology_strands(const struct topology *t, int32_t link)
{
    size_t first;
    return strands_of(t, link, &first);
}

void topology_strand_name(const struct topology *t, int32_t link, int32_t strand, char *name, size_t size)
{
    const struct fabric *f = &((const struct layout *)t->priv)->fabric;
    const int32_t up = link - f->up;
    const char *way = up % 2 ? "in" : "out";
    if (up < 2 * f->n_leaves)
        snprintf(name, size, "leaf%d.spine%d.%s", up / 2, strand, way);
    else
        snprintf(name, size, "pod%d.spine%d.core%d.%s", (link - f->core) / 2, strand / f->cores, strand % f->cores,
                 way);
}

int topology_strand_change(const struct topology *t, double at, int32_t link, int32_t strand, double factor)
{
    struct layout *lay = t->priv;
    if ((lay->n_strand_changes & (lay->n_strand_changes - 1)) == 0) {
        const size_t room = lay->n_strand_changes ? 2 * (size_t)lay->n_strand_changes : 1;
        struct strand_change *grown = realloc(lay->strand_change, sizeof *grown * room);
        if (!grown)
            return -1;
        lay->strand_change = grown;
    }
    lay->strand_change[lay->n_strand_changes++] = (struct strand_change){ at, link, strand, factor };
    return 0;
}

/* At one time a strand keeps the least of what is said of it. */
static int by_time(const void *a, const void *b)
{
    const struct strand_change *x = a, *y = b;
    if (x->at != y->at)
        return x->at < y->at ? -1 : 1;
    if (x->link != y->link)
        return x->link < y->link ? -1 : 1;
    if (x->strand != y->strand)
        return x->strand < y->strand ? -1 : 1;
    return (x->factor < y->factor) - (x->factor > y->factor);
}

int topology_strand_sums(struct topology *t, int (*change)(struct topology *, double at, int32_t link, double factor))
{
    const struct layout *lay = t->priv;
    const int32_t n = lay->n_strand_changes;
    if (n == 0)
        return 0;
    const size_t n_all = all_strands(&lay->fabric);
    double *left = malloc(sizeof *left * n_all);
    if (!left)
        return -1;
    for (size_t i = 0; i < n_all; i++)
        left[i] = 1;
    qsort(lay->strand_change, (size_t)n, sizeof *lay->strand_change, by_time);
    int rc = 0;
    for (int32_t i = 0, end; i < n && rc == 0; i = end) {
        const struct strand_change *c = &lay->strand_change[i];
        size_t first = 0;
        const int32_t strands = strands_of(t, c->link, &first);
        double sum = 0;
        for (end = i; end < n && lay->strand_change[end].at == c->at && lay->strand_change[end].link == c->link; end++)
            left[first + (size_t)lay->strand_change[end].strand] = lay->strand_change[end].factor;
        for (int32_t k = 0; k < strands; k++)
            sum += left[first + (size_t)k];
        rc = change(t, c->at, c->link, sum / strands);
    }
    free(left);
    return rc;
}

/* ---- paths that are left ---- */

enum way { WAY_AS_SUMMED, WAY_NONE, WAY_NARROWER };

/* Of a link that is sprayed: its strands, how many, and the sum of what is left of them. */
struct bundle { const double *left; int32_t n; double sum; };

static struct bundle bundle_of(const double *left, size_t first, int32_t n)
{
    struct bundle b = { left + first, n, 0 };
    for (int32_t k = 0; k < n; k++)
        b.sum += b.left[k];
    return b;
}

/* Whether a pair has as much as the sums of its links' strands say: a path has what is left of its weakest strand, so
 * where two leaves miss different ones, their paths together have less than either's sum. If nothing is left of one
 * link, what crosses it will say so. */
static enum way way_between(const struct topology *t, const double *left, int32_t src, int32_t dst)
{
    const struct layout *lay = t->priv;
    const struct fabric *f = &lay->fabric;
    struct bundle bundle[TOPOLOGY_MAX_HOPS];
    int32_t link[TOPOLOGY_MAX_HOPS], n_bundles = 0;
    const int n = topology_route_between(t, src, dst, 0, link);
    for (int i = 0; i < n; i++) {
        size_t first;
        const int32_t strands = strands_of(t, link[i], &first);
        if (strands > 0)
            bundle[n_bundles++] = bundle_of(left, first, strands);
        if (strands > 0 && bundle[n_bundles - 1].sum <= 0)
            return WAY_AS_SUMMED;
    }
    const int32_t n_paths = n_bundles > 2 ? f->spines * f->cores : f->spines;
    double paths = 0, least = 1;
    for (int32_t p = 0; p < n_paths; p++) {
        double path = 1; /* over pods it is strand p of their links, and over its spine in the leaves' */
        for (int i = 0; i < n_bundles; i++)
            path = fmin(path, bundle[i].left[bundle[i].n == n_paths ? p : p / f->cores]);
        paths += path / n_paths;
    }
    for (int i = 0; i < n_bundles; i++)
        least = fmin(least, bundle[i].sum / bundle[i].n);
    if (n_bundles == 0 || paths > least * (1 - 1e-9))
        return WAY_AS_SUMMED;
    return paths > 0 ? WAY_NARROWER : WAY_NONE;
}

int topology_check_spray(const struct topology *t, double now, const struct net_flow *flow, size_t n, struct err *err)
{
    const struct layout *lay = t->priv;
    if (lay->n_strand_changes == 0 || lay->strand_change[0].at > now)
        return 0;
    const size_t n_all = all_strands(&lay->fabric);
    double *left = malloc(n_all * sizeof *left);
    if (!left)
        return err_set(err, ERR_MEMORY, "net: out of memory");
    for (size_t i = 0; i < n_all; i++)
        left[i] = 1;
    for (int32_t i = 0; i < lay->n_strand_changes && lay->strand_change[i].at <= now; i++) {
        const struct strand_change *c = &lay->strand_change[i];
        size_t first = 0;
        strands_of(t, c->link, &first);
        left[first + (size_t)c->strand] = c->factor;
    }
    for (size_t i = 0; i < n && err->code == 0; i++) {
        const struct net_flow *f = &flow[i];
        if (f->loop || f->bytes <= 0 || f->src >= t->n_devices || f->dst >= t->n_devices ||
            t->node[f->src] == t->node[f->dst])
            continue;
        const enum way way = way_between(t, left, f->src, f->dst);
        if (way == WAY_NONE)
            err_set(err, ERR_RUN, "no path is left between leaf%d and leaf%d at %.9g s: the exchange from %d to %d can "
                    "not end", topology_leaf(t, f->src), topology_leaf(t, f->dst), now, f->src, f->dst);
        else if (way == WAY_NARROWER)
            err_set(err, ERR_RUN, "leaf%d and leaf%d miss different spines at %.9g s, so that the paths from %d to %d "
                    "have less than either leaf's links: sprayed links do not know that; use paths = \"hash\" or "
                    "\"split\", or faults of the same spines on both sides", topology_leaf(t, f->src),
                    topology_leaf(t, f->dst), now, f->src, f->dst);
    }
    free(left);
    return err->code;
}
