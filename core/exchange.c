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
    if (x->sum >= 0) {
        memcpy(side, g->side + (size_t)x->sum * (size_t)g->n_devices, (size_t)g->n_devices);
        return;
    }
    memset(side, 0, (size_t)g->n_devices);
    for (int32_t i = x->first; i < x->first + x->n; i++) {
        const struct moe_part *p = &g->part[i];
        const double bytes = p->src != p->dst ? p->bytes : 0;
        side[p->src] |= side_of(bytes, 0, true);
        side[p->dst] |= side_of(0, bytes, true);
    }
}

static int count_parts(struct moe_graph *g, const struct topology *t, const struct moe_exchange *x,
                       struct exchange_count *c, struct err *e)
{
    const int32_t *node = t->node;
    for (int32_t i = 0; i < x->n_parts; i++) {
        const struct moe_part *p = &x->part[i];
        if (!graph_part_fits(g, p))
            return graph_check_part(g, p, e);
        g->names_paths |= p->path > 1;
        const int32_t src = p->src, dst = p->dst, from = node[src], to = node[dst];
        const double bytes = p->bytes;
        c->side[src] = c->side[dst] = SIDE_NAMED;
        message_add(t, c->message, src, dst, bytes, x->message_bytes);
        if (src == dst)
            continue;
        c->out[src] += bytes;
        c->in[dst] += bytes;
        if (from == to) {
            c->intra += bytes;
            continue;
        }
        c->inter += bytes;
        c->node_out[from] += bytes;
        c->node_in[to] += bytes;
    }
    for (int32_t d = 0; d < t->n_devices; d++)
        c->side[d] = side_of(c->out[d], c->in[d], c->side[d]);
    return 0;
}

/* One more, of zeros. */
static struct exchange_count *count_next(struct tally *all, const struct topology *t, struct err *e)
{
    const size_t d = (size_t)t->n_devices, n = (size_t)t->n_nodes;
    if (all->n == all->room) {
        const int32_t room = all->room ? 2 * all->room : 4;
        struct exchange_count *of = realloc(all->of, sizeof *of * (size_t)room);
        if (!of) {
            err_set(e, ERR_MEMORY, "out of memory for an exchange");
            return NULL;
        }
        memset(of + all->room, 0, sizeof *of * (size_t)(room - all->room));
        all->of = of;
        all->room = room;
    }
    struct exchange_count *c = &all->of[all->n];
    double *figures = c->out ? c->out : malloc(sizeof *figures * 2 * (d + n));
    struct message_count *message = c->message ? c->message : malloc(sizeof *message * d);
    uint8_t *side = c->side ? c->side : malloc(d);
    *c = (struct exchange_count){ figures, figures + d, figures + 2 * d, figures + 2 * d + n, side, message, 0, 0 };
    if (!figures || !message || !side) {
        err_set(e, ERR_MEMORY, "out of memory for %zu devices", d);
        return NULL;
    }
    memset(figures, 0, sizeof *figures * 2 * (d + n));
    memset(message, 0, sizeof *message * d);
    memset(side, 0, d);
    all->n++;
    return c;
}

int tally_open(struct tally *all, const struct topology *t, struct err *e)
{
    memset(all, 0, sizeof *all);
    return evening_open(&all->evening, t, e);
}

void tally_close(struct tally *all)
{
    evening_close(&all->evening);
    for (int32_t i = 0; i < all->room; i++) {
        free(all->of[i].out);
        free(all->of[i].side);
        free(all->of[i].message);
    }
    free(all->of);
    memset(all, 0, sizeof *all);
}

void tally_layer(struct tally *all, struct machine *m)
{
    all->machine = m;
    all->n = 0;
}

int32_t tally_exchange(struct tally *all, struct moe_graph *g, const struct moe_exchange *x, struct err *e)
{
    struct evening *v = &all->evening;
    if (graph_check_exchange(x, e) < 0)
        return e->code;
    struct exchange_count *c = count_next(all, v->topology, e);
    if (!c || count_parts(g, v->topology, x, c, e) < 0)
        return e->code;
    if (!all->machine)
        return graph_exchange(g, x, e);
    const int32_t task = graph_exchange_alone(g, x, c->intra + c->inter, e);
    struct exchange_sum *sum;
    if (task < 0 || all->machine->ops->reduce(all->machine, g, task, x, c->message, v->link_bytes, e) < 0 ||
        !(sum = graph_sum(g, e)))
        return e->code;
    *sum = (struct exchange_sum){ c->intra, c->inter, even_links(v) };
    g->task[task].sum = g->n_sums - 1;
    memcpy(g->side + (size_t)(g->n_sums - 1) * (size_t)g->n_devices, c->side, (size_t)g->n_devices);
    return task;
}
