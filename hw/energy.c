/* SPDX-License-Identifier: Apache-2.0
 * energy.c - joules of a step:
 *
 *     sum over devices of  idle x step + (busy - idle) x time in which a kernel ran
 *   + sum over links of    bytes carried x joules per byte
 *   + memory x (bytes that kernels move + bytes that devices' own links read or write there)
 *   + node x nodes x step
 *
 * Nothing counts twice: `busy` is with the device's memory unless `memory` is given, and without links. Time in which
 * a device waits, or only its links work, is idle time. A slow device is busy longer at the same power. */
#include "config.h"

#include "energy.h"

#include <stdlib.h>
#include <string.h>

/* Sorts of links, and the table that says whether a group has them. */
static const struct { const char *key; enum section table; } sorts[] = {
    { "nvlink", NVLINK }, { "pcie", PCIE }, { "nic", NIC }, { "host", HOST }, { "ssd", SSD },
};
enum { N_SORTS = sizeof sorts / sizeof *sorts };

/* ---- the table ---- */

static bool has_sort(const struct group *g, int sort)
{
    /* Unified memory is the device's, and costs what that does. */
    return g->table[sorts[sort].table] &&
           !(sorts[sort].table == HOST && json_is_true(json_object_get(g->table[HOST], "unified")));
}

static int check_group(const struct parts *p, const struct group *g, const char *file, struct err *err)
{
    const json_t *e = g->table[ENERGY];
    const bool between = json_object_get(p->network, "spines");
    for (int s = 0; s < N_SORTS; s++) {
        bool any = false;
        for (int32_t i = 0; i < p->n_groups; i++)
            any = any || has_sort(&p->group[i], s);
        if (has_sort(g, s) && !json_object_get(e, sorts[s].key))
            return err_set(err, ERR_INPUT, "%s: %senergy.%s: missing: energy is that of all links, or not told", file,
                           g->path, sorts[s].key);
        if (!any && json_object_get(e, sorts[s].key))
            return err_set(err, ERR_INPUT, "%s: %senergy.%s: the machine has no such links", file, g->path,
                           sorts[s].key);
    }
    if (between != !!json_object_get(e, "network"))
        return err_set(err, ERR_INPUT, "%s: %senergy.network: %s", file, g->path,
                       between ? "missing: energy is that of all links, or not told"
                               : "the machine has no links between switches");
    if (topology_number(e, "busy") < topology_number(e, "idle"))
        return err_set(err, ERR_INPUT, "%s: %senergy.busy: found \"%s\", expected at least energy.idle, \"%s\"", file,
                       g->path, json_string_value(json_object_get(e, "busy")),
                       json_string_value(json_object_get(e, "idle")));
    return 0;
}

static int check(const struct topology *t, const struct parts *p, const char *file, struct err *err)
{
    if (json_object_get(t->description, "platform"))
        return err_set(err, ERR_INPUT, "%s: energy: the links of a platform are of no sort that has joules per byte",
                       file);
    for (int32_t i = 0; i < p->n_groups; i++)
        if (!p->group[i].table[ENERGY])
            return err_set(err, ERR_INPUT, "%s: %senergy: missing: other groups have it, and energy is that of the "
                           "whole machine", file, p->group[i].path);
    for (int32_t i = 0; i < p->n_groups; i++)
        if (check_group(p, &p->group[i], file, err))
            return err->code;
    return 0;
}

static void fill_links(struct energy_figures *f, int32_t first, int32_t n, double joules)
{
    for (int32_t l = first; first >= 0 && l < first + n; l++)
        f->link[l] = joules;
}

/* A device's own links end in its memory: what leaves is read there, what comes is written. */
static void fill_group(struct energy_figures *f, const struct group_links *l, const json_t *e)
{
    const int32_t n = l->n_nodes * l->n_devices, switches = l->n_devices / l->per_switch;
    const double memory = topology_number(e, "memory"), nic = topology_number(e, "nic");
    if (l->mesh)
        fill_links(f, l->nvlink, n * (l->n_devices - 1), topology_number(e, "nvlink") + 2 * memory);
    else
        fill_links(f, l->nvlink, 2 * n, topology_number(e, "nvlink") + memory);
    fill_links(f, l->pcie, 2 * n, topology_number(e, "pcie") + memory);
    fill_links(f, l->uplink, 2 * l->n_nodes * switches, topology_number(e, "pcie"));
    fill_links(f, l->nic, 2 * l->n_nodes * l->n_nics, nic + (l->nic_over_pcie ? 0 : memory));
    fill_links(f, l->memory, l->n_nodes, l->unified ? memory : topology_number(e, "host"));
    fill_links(f, l->ssd, l->n_nodes, topology_number(e, "ssd"));
}

int energy_build(struct topology *t, const struct parts *p, const char *file, struct err *err)
{
    const struct layout *lay = t->priv;
    const size_t n_devices = (size_t)t->n_devices;
    bool any = json_object_get(t->description, "energy");
    for (int32_t i = 0; i < p->n_groups; i++)
        any = any || p->group[i].table[ENERGY];
    if (!any || check(t, p, file, err))
        return any ? err->code : 0;
    struct energy_figures *f = t->energy = calloc(1, sizeof *f);
    if (!f || !(f->idle = calloc(3 * n_devices + (size_t)t->n_links, sizeof *f->idle)))
        return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    f->busy = f->idle + n_devices;
    f->memory = f->busy + n_devices;
    f->link = f->memory + n_devices;
    fill_links(f, 0, t->n_links, topology_number(p->group[0].table[ENERGY], "network")); /* what no group has */
    for (int32_t i = 0; i < p->n_groups; i++) {
        const struct group_links *l = &lay->group[i];
        const json_t *e = p->group[i].table[ENERGY];
        f->nodes += l->n_nodes * topology_number(e, "node");
        fill_group(f, l, e);
        for (int32_t d = l->first_device; d < l->first_device + l->n_nodes * l->n_devices; d++) {
            f->idle[d] = topology_number(e, "idle");
            f->busy[d] = topology_number(e, "busy");
            f->memory[d] = topology_number(e, "memory");
        }
    }
    return 0;
}

void energy_figures_free(struct energy_figures *f)
{
    if (f)
        free(f->idle);
    free(f);
}

/* ---- the meter ---- */

struct energy_meter {
    const struct topology *topology;
    struct active { int32_t n; double since, seconds; } *device; /* [D] kernels that run; since when any does */
    double *carried;                                             /* [L] bytes, at the last reading */
    double moved;                                                /* J of memory traffic since then */
};

int energy_open(struct energy_meter **out, const struct topology *t, struct err *err)
{
    *out = NULL;
    if (!t->energy)
        return 0;
    struct energy_meter *m = calloc(1, sizeof *m);
    if (m) {
        m->topology = t;
        m->device = calloc((size_t)t->n_devices, sizeof *m->device);
        m->carried = calloc((size_t)t->n_links + 1, sizeof *m->carried);
    }
    if (!m || !m->device || !m->carried) {
        energy_close(m);
        return err_set(err, ERR_MEMORY, "out of memory for energy");
    }
    *out = m;
    return 0;
}

void energy_close(struct energy_meter *m)
{
    if (!m)
        return;
    free(m->device);
    free(m->carried);
    free(m);
}

void energy_start(struct energy_meter *m, double now, int32_t device, const struct kernel_cost *cost)
{
    struct active *a = &m->device[device];
    if (a->n++ == 0)
        a->since = now;
    m->moved += cost->bytes * m->topology->energy->memory[device];
}

void energy_end(struct energy_meter *m, double now, int32_t device)
{
    struct active *a = &m->device[device];
    if (--a->n == 0)
        a->seconds += now - a->since;
}

double energy_read(struct energy_meter *m, double seconds, const double *link_bytes)
{
    const struct energy_figures *f = m->topology->energy;
    double joules = m->moved + f->nodes * seconds;
    for (int32_t d = 0; d < m->topology->n_devices; d++) {
        joules += f->idle[d] * seconds + (f->busy[d] - f->idle[d]) * m->device[d].seconds;
        m->device[d].seconds = 0;
    }
    for (int32_t l = 0; l < m->topology->n_links; l++) {
        joules += (link_bytes[l] - m->carried[l]) * f->link[l];
        m->carried[l] = link_bytes[l];
    }
    m->moved = 0;
    return joules;
}
