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
                           .bandwidth = calloc(n_links, sizeof *v->bandwidth) };
    if (!v->role || !v->bytes || !v->bandwidth || (v->n_roles = link_roles(t, v->role)) < 0)
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
    memset(v, 0, sizeof *v);
}

/* Everything in one go: an exchange may have millions of parts, and reading them takes longer than adding them up.
 * v, side: NULL where that is not asked for. */
static struct exchange_sum add_parts(const struct moe_graph *g, const struct topology *t, const struct task *x,
                                     struct evening *v, uint8_t *side)
{
    struct exchange_sum sum = { 0, 0, 0 };
    int32_t link[TOPOLOGY_MAX_HOPS];
    if (v)
        memset(v->bytes, 0, sizeof *v->bytes * (size_t)v->n_roles);
    if (side)
        memset(side, 0, (size_t)g->n_devices);
    for (int32_t i = x->first; i < x->first + x->n; i++) {
        const struct moe_part *p = &g->part[i];
        if (side) {
            const bool moves = p->src != p->dst && p->bytes > 0;
            side[p->src] |= moves ? SIDE_NAMED | SIDE_SENDS : SIDE_NAMED;
            side[p->dst] |= moves ? SIDE_NAMED | SIDE_GETS : SIDE_NAMED;
        }
        if (p->src == p->dst)
            continue;
        if (t->node[p->src] == t->node[p->dst])
            sum.intra += p->bytes;
        else
            sum.inter += p->bytes;
        if (p->bytes <= 0)
            continue;
        for (int j = 0, n = v ? topology_route(t, p->src, p->dst, p->path, link, NULL) : 0; j < n; j++)
            v->bytes[v->role[link[j]]] += p->bytes;
    }
    for (int32_t i = 0; v && i < v->n_roles; i++)
        sum.even_s = fmax(sum.even_s, v->bytes[i] / v->bandwidth[i]);
    return sum;
}

double evening_seconds(struct evening *v, const struct moe_graph *g, const struct task *x)
{
    return x->sum >= 0 ? g->sum[x->sum].even_s : add_parts(g, v->topology, x, v, NULL).even_s;
}

void exchange_bytes(const struct moe_graph *g, const struct topology *t, const struct task *x, double *intra,
                    double *inter)
{
    const struct exchange_sum sum = x->sum >= 0 ? g->sum[x->sum] : add_parts(g, t, x, NULL, NULL);
    *intra = sum.intra;
    *inter = sum.inter;
}

void exchange_sides(const struct moe_graph *g, const struct topology *t, const struct task *x, uint8_t *side)
{
    if (x->sum >= 0)
        memcpy(side, g->side + (size_t)x->sum * (size_t)g->n_devices, (size_t)g->n_devices);
    else
        add_parts(g, t, x, NULL, side);
}

int exchange_reduce(struct evening *v, struct machine *m, struct moe_graph *g, int32_t first_task, int32_t first_part,
                    struct err *e)
{
    if (!m->ops || !m->ops->reduce)
        return 0;
    for (int32_t t = first_task; t < g->n_tasks; t++) {
        if (g->task[t].kind != TASK_EXCHANGE)
            continue;
        struct exchange_sum *sum;
        if (m->ops->reduce(m, g, t, e) < 0 || !(sum = graph_sum(g, e)))
            return e->code;
        *sum = add_parts(g, v->topology, &g->task[t], v, g->side + (size_t)(g->n_sums - 1) * (size_t)g->n_devices);
        g->task[t].sum = g->n_sums - 1;
    }
    g->n_parts = first_part;
    return 0;
}
