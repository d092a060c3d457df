/* SPDX-License-Identifier: Apache-2.0
 * exchange.c - sums over the parts of an exchange. */
#include "config.h"

#include "exchange.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* role: [n_links]; returns how many roles. */
static int32_t link_roles(const struct topology *t, int32_t *role)
{
    int32_t n_roles = 0;
    char(*known)[64] = malloc(sizeof *known * (size_t)(t->n_links > 0 ? t->n_links : 1));
    for (int32_t i = 0; known && i < t->n_links; i++) {
        char plain[64];
        size_t n = 0;
        for (const char *c = t->link[i].name; *c && n + 1 < sizeof plain; c++)
            if (!isdigit((unsigned char)*c))
                plain[n++] = *c;
        plain[n] = '\0';
        int32_t j = 0;
        while (j < n_roles && strcmp(known[j], plain))
            j++;
        if (j == n_roles)
            memcpy(known[n_roles++], plain, sizeof plain);
        role[i] = j;
    }
    free(known);
    return known || t->n_links == 0 ? n_roles : -1;
}

int evening_open(struct evening *v, const struct topology *t, struct err *e)
{
    const size_t n_links = (size_t)t->n_links + 1;
    *v = (struct evening){ .topology = t, .role = malloc(sizeof *v->role * n_links),
                           .bytes = calloc(n_links, sizeof *v->bytes),
                           .bandwidth = calloc(n_links, sizeof *v->bandwidth),
                           .link_bytes = calloc(n_links, sizeof *v->link_bytes) };
    if (!v->role || !v->bytes || !v->bandwidth || !v->link_bytes || (v->n_roles = link_roles(t, v->role)) < 0)
        return err_set(e, ERR_MEMORY, "out of memory for the bound");
    for (int32_t i = 0; i < t->n_links; i++)
        v->bandwidth[v->role[i]] += t->link[i].bandwidth;
    return 0;
}

void evening_close(struct evening *v)
{
    free(v->role);
    free(v->bandwidth);
    free(v->bytes);
    free(v->link_bytes);
    memset(v, 0, sizeof *v);
}

/* The busiest role's time, from bytes of each role. */
static double even_seconds(const struct evening *v)
{
    double seconds = 0;
    for (int32_t i = 0; i < v->n_roles; i++)
        seconds = fmax(seconds, v->bytes[i] / v->bandwidth[i]);
    return seconds;
}

/* From an exchange's parts. */
static double even_parts(struct evening *v, const struct moe_graph *g, const struct task *x)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    memset(v->bytes, 0, sizeof *v->bytes * (size_t)v->n_roles);
    for (int32_t i = x->first; i < x->first + x->n; i++) {
        const struct moe_part *p = &g->part[i];
        if (p->src == p->dst || p->bytes <= 0)
            continue;
        for (int j = 0, n = topology_route(v->topology, p->src, p->dst, p->path, link, NULL); j < n; j++)
            v->bytes[v->role[link[j]]] += p->bytes;
    }
    return even_seconds(v);
}

/* From bytes on each link. */
static double even_links(struct evening *v)
{
    memset(v->bytes, 0, sizeof *v->bytes * (size_t)v->n_roles);
    for (int32_t i = 0; i < v->topology->n_links; i++)
        v->bytes[v->role[i]] += v->link_bytes[i];
    return even_seconds(v);
}

double evening_seconds(struct evening *v, const struct moe_graph *g, const struct task *x)
{
    return x->sum >= 0 ? g->sum[x->sum].even_s : even_parts(v, g, x);
}

void exchange_bytes(const struct moe_graph *g, const struct topology *t, const struct task *x, double *intra,
                    double *inter)
{
    *intra = x->sum >= 0 ? g->sum[x->sum].intra : 0;
    *inter = x->sum >= 0 ? g->sum[x->sum].inter : 0;
    for (int32_t i = x->first; x->sum < 0 && i < x->first + x->n; i++) {
        const struct moe_part *p = &g->part[i];
        if (p->src != p->dst)
            *(t->node[p->src] == t->node[p->dst] ? intra : inter) += p->bytes;
    }
}

static uint8_t side_of(double sent, double got, bool named)
{
    return (uint8_t)((sent > 0 ? SIDE_SENDS : 0) | (got > 0 ? SIDE_GETS : 0) | (named ? SIDE_NAMED : 0));
}

void exchange_sides(const struct moe_graph *g, const struct task *x, uint8_t *side)
{
    memset(side, 0, (size_t)g->n_devices);
    if (x->sum >= 0) {
        const struct exchange_sum *sum = &g->sum[x->sum];
        for (int64_t i = sum->first_side; i < sum->first_side + sum->n_sides; i++)
            side[g->side[i].device] = g->side[i].is;
        return;
    }
    for (int32_t i = x->first; i < x->first + x->n; i++) {
        const struct moe_part *p = &g->part[i];
        const double bytes = p->src != p->dst ? p->bytes : 0;
        side[p->src] |= side_of(bytes, 0, true);
        side[p->dst] |= side_of(0, bytes, true);
    }
}

static inline void count_device(struct tally *all, int32_t d)
{
    if (!all->is_named[d]) {
        all->is_named[d] = true;
        all->named[all->n_named++] = d;
    }
}

static int count_parts(struct tally *all, struct moe_graph *g, const struct moe_exchange *x, struct err *e)
{
    const struct topology *t = all->evening.topology;
    const int32_t *node = t->node;
    double *into = x->payload == MOE_PAY_HIDDEN ? all->moved[MOE_PAY_HIDDEN][MOVED_NODE] : NULL;
    double *from = x->payload == MOE_PAY_OUTPUT ? all->moved[MOE_PAY_OUTPUT][MOVED_NODE] : NULL;
    for (int32_t i = 0; i < x->n_parts; i++) {
        const struct moe_part *p = &x->part[i];
        if (!graph_part_fits(g, p))
            return graph_check_part(g, p, e);
        g->names_paths |= p->path > 1;
        const int32_t src = p->src, dst = p->dst;
        const double bytes = p->bytes;
        count_device(all, src);
        count_device(all, dst);
        message_add(t, all->message, src, dst, bytes, x->message_bytes);
        if (src == dst)
            continue;
        all->out[src] += bytes;
        all->in[dst] += bytes;
        if (node[src] == node[dst]) {
            all->intra += bytes;
            continue;
        }
        all->inter += bytes;
        if (into)
            into[node[dst]] += bytes;
        if (from)
            from[node[src]] += bytes;
    }
    return 0;
}

/* Of devices and nodes, d and n of them. */
static int allocate(struct tally *all, size_t d, size_t n)
{
    double *figures = all->out = calloc(2 * d + 2 * (2 * d + n), sizeof *figures);
    all->message = calloc(d, sizeof *all->message);
    all->named = malloc(d * sizeof *all->named);
    all->is_named = calloc(d, sizeof *all->is_named);
    if (!figures || !all->message || !all->named || !all->is_named)
        return -1;
    all->in = figures + d;
    figures += 2 * d;
    for (int payload = 0; payload < 2; payload++, figures += 2 * d + n) {
        all->moved[payload][MOVED_IN] = figures;
        all->moved[payload][MOVED_OUT] = figures + d;
        all->moved[payload][MOVED_NODE] = figures + 2 * d;
    }
    return 0;
}

int tally_open(struct tally *all, const struct topology *t, struct err *e)
{
    memset(all, 0, sizeof *all);
    if (allocate(all, (size_t)t->n_devices, (size_t)t->n_nodes) < 0)
        return err_set(e, ERR_MEMORY, "out of memory for %d devices", t->n_devices);
    return evening_open(&all->evening, t, e);
}

void tally_close(struct tally *all)
{
    evening_close(&all->evening);
    free(all->out);
    free(all->message);
    free(all->named);
    free(all->is_named);
    memset(all, 0, sizeof *all);
}

void tally_layer(struct tally *all, struct machine *m)
{
    const struct topology *t = all->evening.topology;
    all->machine = m;
    for (int payload = 0; payload < 2; payload++) /* one array: allocate */
        memset(all->moved[payload][MOVED_IN], 0, sizeof(double) * (2 * (size_t)t->n_devices + (size_t)t->n_nodes));
}

/* Adds what devices sent and got to the layer's, and forgets it. */
static void count_end(struct tally *all, enum moe_payload payload)
{
    for (int32_t i = 0; i < all->n_named; i++) {
        const int32_t d = all->named[i];
        if (payload != MOE_PAY_BYTES) {
            all->moved[payload][MOVED_IN][d] += all->in[d];
            all->moved[payload][MOVED_OUT][d] += all->out[d];
        }
        all->in[d] = all->out[d] = 0;
        all->message[d] = (struct message_count){ 0 };
        all->is_named[d] = false;
    }
    all->n_named = 0;
    all->intra = all->inter = 0;
}

/* Into the graph without its parts, of which the machine keeps its share. */
static int32_t put_alone(struct tally *all, struct moe_graph *g, const struct moe_exchange *x, struct err *e)
{
    struct evening *v = &all->evening;
    const int32_t task = graph_exchange_alone(g, x, all->intra + all->inter, e);
    if (task < 0 || all->machine->ops->reduce(all->machine, g, task, x, all->message, v->link_bytes, e) < 0)
        return e->code;
    struct exchange_sum *sum = graph_sum(g, all->n_named, e);
    if (!sum)
        return e->code;
    sum->intra = all->intra;
    sum->inter = all->inter;
    sum->even_s = even_links(v);
    g->task[task].sum = g->n_sums - 1;
    for (int32_t i = 0; i < all->n_named; i++) {
        const int32_t d = all->named[i];
        g->side[sum->first_side + i] = (struct exchange_side){ d, side_of(all->out[d], all->in[d], true) };
    }
    return task;
}

int32_t tally_exchange(struct tally *all, struct moe_graph *g, const struct moe_exchange *x, struct err *e)
{
    if (graph_check_exchange(x, e) < 0)
        return e->code;
    const int rc = count_parts(all, g, x, e);
    const int32_t task = rc < 0 ? rc : all->machine ? put_alone(all, g, x, e) : graph_exchange(g, x, e);
    count_end(all, x->payload);
    return task;
}
