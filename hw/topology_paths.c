/* SPDX-License-Identifier: Apache-2.0
 * topology_paths.c - flows that start together, over the several paths of a fabric: cut so that every path carries the
 * same, and led around links that have failed. */
#include "config.h"

#include "topology_internal.h"

#include <stdlib.h>
#include <string.h>

struct cut { /* one call of topology_split */
    const struct topology *t;
    bool *dead; /* [n_links] at the time, or NULL: none */
    struct net_flow *out;
    size_t n, room;
};

struct crossing {
    int32_t src, leaf;
    size_t flow;
}; /* a flow to another leaf, on no path of its own choice */

static int append(struct cut *c, struct net_flow f)
{
    if (c->n == c->room) {
        struct net_flow *grown = realloc(c->out, sizeof *grown * (c->room ? 2 * c->room : 64));
        if (!grown)
            return -1;
        c->out = grown;
        c->room = c->room ? 2 * c->room : 64;
    }
    c->out[c->n++] = f;
    return 0;
}

static int find_dead(struct cut *c, double now)
{
    bool any = false;
    for (int32_t i = 0; i < c->t->n_changes && c->t->change[i].at <= now; i++)
        any |= c->t->change[i].bandwidth <= 0;
    if (!any)
        return 0;
    if (!(c->dead = calloc((size_t)c->t->n_links + 1, sizeof *c->dead)))
        return -1;
    for (int32_t i = 0; i < c->t->n_changes && c->t->change[i].at <= now; i++)
        c->dead[c->t->change[i].link] = c->t->change[i].bandwidth <= 0;
    return 0;
}

/* Whether path p (from 0) between two devices has no failed link between switches. */
static bool alive(const struct cut *c, int32_t src, int32_t dst, int32_t p)
{
    const struct layout *lay = c->t->priv;
    int32_t link[TOPOLOGY_MAX_HOPS];
    if (!c->dead)
        return true;
    const int n = topology_route_between(c->t, src, dst, p, link);
    for (int i = 0; i < n; i++)
        if (link[i] >= lay->fabric.up && c->dead[link[i]])
            return false;
    return true;
}

/* The k-th (from 0) of the paths that are left. */
static int32_t nth_alive(const struct cut *c, int32_t src, int32_t dst, int32_t k)
{
    int32_t p = 0;
    for (;; p++)
        if (alive(c, src, dst, p) && k-- == 0)
            return p;
}

static int32_t count_alive(const struct cut *c, int32_t src, int32_t dst)
{
    const int32_t n = topology_paths(c->t, src, dst);
    int32_t left = 0;
    for (int32_t p = 0; p < n; p++)
        left += alive(c, src, dst, p);
    return left;
}

/* What a source sends to one leaf, in the flows' order: path after path is filled with its share, so at most one flow
 * per path is cut. */
static int split_group(struct cut *c, const struct net_flow *flow, const struct crossing *x, size_t n)
{
    const struct net_flow *first = &flow[x[0].flow];
    const int32_t n_paths = count_alive(c, first->src, first->dst);
    double sum = 0, room;
    for (size_t i = 0; i < n; i++)
        sum += flow[x[i].flow].bytes;
    if (n_paths < 1)
        for (size_t i = 0; i < n; i++) { /* nothing is left: they stall where they would have gone */
            if (append(c, flow[x[i].flow]))
                return -1;
        }
    if (n_paths < 1)
        return 0;
    const double share = sum / n_paths, sliver = 1e-9 * share;
    int32_t k = 0;
    room = share;
    for (size_t i = 0; i < n; i++) {
        struct net_flow f = flow[x[i].flow];
        double left = f.bytes;
        while (left > room + sliver && k + 1 < n_paths) {
            f.bytes = room;
            f.path = 1 + nth_alive(c, f.src, f.dst, k++);
            if (f.bytes > sliver && append(c, f))
                return -1;
            left -= room > sliver ? room : 0;
            room = share;
        }
        f.bytes = left;
        f.path = 1 + nth_alive(c, f.src, f.dst, k);
        if (append(c, f))
            return -1;
        room -= left;
    }
    return 0;
}

/* A single path by hash, of those that are left. */
static int rehash(struct cut *c, struct net_flow f)
{
    const int32_t left = count_alive(c, f.src, f.dst);
    if (left > 0 && left < topology_paths(c->t, f.src, f.dst)) {
        const uint64_t hash = moe_mix(moe_mix((uint64_t)f.src) + (uint64_t)f.dst);
        f.path = 1 + nth_alive(c, f.src, f.dst, (int32_t)(hash % (uint64_t)left));
    }
    return append(c, f);
}

static int by_source_and_leaf(const void *a, const void *b)
{
    const struct crossing *x = a, *y = b;
    if (x->src != y->src)
        return x->src < y->src ? -1 : 1;
    if (x->leaf != y->leaf)
        return x->leaf < y->leaf ? -1 : 1;
    return (x->flow > y->flow) - (x->flow < y->flow);
}

static bool crosses(const struct topology *t, const struct net_flow *f)
{
    return f->path == 0 && !f->loop && f->bytes > 0 && f->src < t->n_devices && f->dst < t->n_devices &&
           t->node[f->src] != t->node[f->dst] && topology_paths(t, f->src, f->dst) > 1;
}

static int cut_flows(struct cut *c, bool split, const struct net_flow *flow, size_t n, struct crossing *x)
{
    size_t n_crossing = 0;
    for (size_t i = 0; i < n; i++) {
        if (!crosses(c->t, &flow[i])) {
            if (append(c, flow[i]))
                return -1;
        } else if (!split) {
            if (rehash(c, flow[i]))
                return -1;
        } else {
            x[n_crossing++] = (struct crossing){ flow[i].src, topology_leaf(c->t, flow[i].dst), i };
        }
    }
    if (n_crossing > 0)
        qsort(x, n_crossing, sizeof *x, by_source_and_leaf);
    for (size_t i = 0, end; i < n_crossing; i = end) {
        for (end = i + 1; end < n_crossing && x[end].src == x[i].src && x[end].leaf == x[i].leaf;)
            end++;
        if (split_group(c, flow, x + i, end - i))
            return -1;
    }
    return 0;
}

/* Several paths, of which a flow takes one. */
static bool has_paths(const struct fabric *f)
{
    return f->n_spines >= 1 && f->up >= 0 && f->paths != PATHS_SPRAY;
}

bool topology_splits(const struct topology *t)
{
    const struct fabric *f = &((const struct layout *)t->priv)->fabric;
    if (((const struct layout *)t->priv)->n_strand_changes > 0)
        return true; /* or become an error */
    return has_paths(f) && (f->paths == PATHS_SPLIT || t->n_changes > 0);
}

int topology_split(const struct topology *t, double now, const struct net_flow *flow, size_t n, struct net_flow **out,
                   size_t *n_out, struct err *err)
{
    const struct fabric *f = &((const struct layout *)t->priv)->fabric;
    const bool split = f->paths == PATHS_SPLIT;
    struct cut c = { .t = t };
    *out = NULL;
    if (!has_paths(f) || n == 0)
        return topology_check_spray(t, now, flow, n, err);
    int rc = find_dead(&c, now);
    if (rc == 0 && (split || c.dead)) {
        struct crossing *x = split ? malloc(n * sizeof *x) : NULL;
        rc = split && !x ? -1 : cut_flows(&c, split, flow, n, x);
        free(x);
    }
    free(c.dead);
    if (rc) {
        free(c.out);
        return err_set(err, ERR_MEMORY, "net: out of memory");
    }
    *out = c.out;
    *n_out = c.n;
    return 0;
}
