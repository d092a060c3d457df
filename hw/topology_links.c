/* SPDX-License-Identifier: Apache-2.0
 * topology_links.c - the links of a machine: their names, bandwidths and latencies.
 *
 * Links of one sort lie behind each other, two per device, NIC or switch (out, in): a route is then a few additions,
 * and 4096 devices need no table of all pairs. */
#include "config.h"

#include "platform.h"
#include "topology_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- room ---- */

static int64_t node_links(const struct group *g)
{
    int64_t n = g->n_devices, nvlink = 2 * n;
    const char *kind = json_string_value(json_object_get(g->table[NVLINK], "kind"));
    if (kind && !strcmp(kind, "mesh"))
        nvlink = n * (n - 1);
    return nvlink + 2 * n /* pcie */ + 2 * n /* uplinks at most */ + 2 * n /* NICs at most */ + 2 /* memory, ssd */;
}

/* ---- adding ---- */

/* One link "NAME", or a pair "NAME.out", "NAME.in"; returns the first's id. A latency from end to end sits on the way
 * out. */
static int32_t add(struct topology *t, const char *name, bool pair, double bandwidth, double latency_out,
                   double latency_in)
{
    const int32_t first = t->n_links;
    for (int way = 0; way < (pair ? 2 : 1); way++) {
        struct link *l = &t->link[t->n_links++];
        snprintf(l->name, sizeof l->name, "%.50s%s", name, !pair ? "" : way ? ".in" : ".out");
        l->bandwidth = bandwidth;
        l->latency = way ? latency_in : latency_out;
    }
    return first;
}

static double effective(const json_t *table)
{
    return topology_number(table, "bandwidth") * topology_number(table, "efficiency");
}

static void add_mesh(struct topology *t, const struct group_links *l, double bandwidth, double latency)
{
    char name[64];
    for (int32_t n = 0; n < l->n_nodes; n++)
        for (int32_t i = 0; i < l->n_devices; i++)
            for (int32_t j = 0; j < l->n_devices; j++) {
                const int32_t first = l->first_device + n * l->n_devices;
                snprintf(name, sizeof name, "gpu%d.nvlink.gpu%d", first + i, first + j);
                if (i != j)
                    add(t, name, false, bandwidth / (l->n_devices - 1), latency, 0);
            }
}

/* A pair per device. */
static int32_t add_device_links(struct topology *t, const struct group_links *l, const char *sort, double bandwidth,
                                double latency_out, double latency_in)
{
    const int32_t first = t->n_links;
    char name[64];
    for (int32_t d = 0; d < l->n_nodes * l->n_devices; d++) {
        snprintf(name, sizeof name, "gpu%d.%s", l->first_device + d, sort);
        add(t, name, true, bandwidth, latency_out, latency_in);
    }
    return first;
}

/* per_node of them on each node: "node3.SORT" where it is one, else "node3.SORT1". */
static int32_t add_node_links(struct topology *t, const struct group_links *l, const char *sort, int32_t per_node,
                              bool pair, double bandwidth, double latency)
{
    const int32_t first = t->n_links;
    char name[64];
    for (int32_t n = 0; n < l->n_nodes; n++)
        for (int32_t i = 0; i < per_node; i++) {
            snprintf(name, sizeof name, per_node > 1 ? "node%d.%s%d" : "node%d.%s", l->first_node + n, sort, i);
            add(t, name, pair, bandwidth, latency, 0);
        }
    return first;
}

static void shape(struct group_links *l, const struct group *g, int32_t first_node, int32_t first_device)
{
    const json_t *nvlink = g->table[NVLINK], *pcie = g->table[PCIE], *nic = g->table[NIC];
    const char *kind = json_string_value(json_object_get(nvlink, "kind"));
    const bool shared = json_is_true(json_object_get(nic, "shared"));
    const int32_t per_switch = topology_whole(pcie, "per_switch"), per_node = topology_whole(nic, "per_node");
    *l = (struct group_links){ .first_node = first_node,
                               .first_device = first_device,
                               .n_nodes = g->n_nodes,
                               .n_devices = g->n_devices,
                               .nvlink = -1,
                               .pcie = -1,
                               .uplink = -1,
                               .nic = -1,
                               .memory = -1,
                               .ssd = -1 };
    l->mesh = kind && !strcmp(kind, "mesh");
    l->peer = !json_is_false(json_object_get(pcie, "peer"));
    l->unified = json_is_true(json_object_get(g->table[HOST], "unified"));
    l->per_switch = per_switch ? per_switch : g->n_devices;
    l->n_nics = shared ? 1 : per_node ? per_node : g->n_devices;
    l->per_nic = g->n_devices / l->n_nics;
    l->nic_over_pcie = shared || l->per_nic > 1;
    l->nic_at_root = l->per_nic > l->per_switch;
}

/* Sort by sort, so that equal groups would number their links as one does. */
static void add_nvlink(struct topology *t, struct group_links *l, const struct group *g)
{
    const double latency = topology_number(g->table[NVLINK], "latency");
    if (!g->table[NVLINK])
        return;
    l->nvlink = t->n_links;
    if (l->mesh)
        add_mesh(t, l, effective(g->table[NVLINK]) / t->pace, latency);
    else
        add_device_links(t, l, "nvlink", effective(g->table[NVLINK]) / t->pace, latency, 0);
}

static void add_pcie(struct topology *t, struct group_links *l, const struct group *g)
{
    const json_t *pcie = g->table[PCIE];
    const double latency = topology_number(pcie, "latency"); /* counts whenever a device's own link is crossed */
    if (!pcie)
        return;
    l->pcie = add_device_links(t, l, "pcie", effective(pcie), latency, latency);
    if (json_object_get(pcie, "uplink"))
        l->uplink = add_node_links(t, l, "pcie", l->n_devices / l->per_switch, true,
                                   topology_number(pcie, "uplink") * topology_number(pcie, "efficiency"), 0);
}

static void add_nics(struct topology *t, struct group_links *l, const struct group *g)
{
    const double latency = topology_number(g->table[NIC], "latency");
    if (!g->table[NIC])
        return;
    l->nic = l->nic_over_pcie ? add_node_links(t, l, "nic", l->n_nics, true, effective(g->table[NIC]), latency)
                              : add_device_links(t, l, "nic", effective(g->table[NIC]), latency, 0);
}

static void add_memory(struct topology *t, struct group_links *l, const struct group *g)
{
    const json_t *whose = l->unified ? g->table[DEVICE] : g->table[HOST];
    const double efficiency = topology_number(whose, "mem_efficiency"); /* 0: not given */
    if (g->table[HOST])
        l->memory = add_node_links(t, l, "memory", 1, false,
                                   topology_number(whose, "mem_bandwidth") * (efficiency > 0 ? efficiency : 1), 0);
}

static void add_ssd(struct topology *t, struct group_links *l, const struct group *g)
{
    if (g->table[SSD])
        l->ssd = add_node_links(t, l, "ssd", 1, false, topology_number(g->table[SSD], "bandwidth"),
                                topology_number(g->table[SSD], "latency"));
}

/* ---- the network ---- */

static void shape_fabric(struct fabric *f, const struct topology *t, const struct parts *p, const struct layout *lay)
{
    static const char *const kinds[] = { "ideal", "rail", "leaf-spine", "fat-tree" };
    static const char *const paths[] = { "hash", "split", "spray" };
    const json_t *network = p->network;
    while (strcmp(kinds[f->kind], json_string_value(json_object_get(network, "kind"))))
        f->kind++;
    while (strcmp(paths[f->paths], json_string_value(json_object_get(network, "paths"))))
        f->paths++;
    const int32_t per_leaf = topology_whole(network, "nodes_per_leaf");
    f->n_rails = f->kind == FABRIC_RAIL ? lay->group[0].n_nics : 1;
    f->nodes_per_leaf = per_leaf ? per_leaf : t->n_nodes;
    f->n_leaves = (t->n_nodes + f->nodes_per_leaf - 1) / f->nodes_per_leaf * f->n_rails;
    f->leaves_per_pod = f->kind == FABRIC_FAT_TREE ? topology_whole(network, "leaves_per_pod") : f->n_leaves;
    f->n_pods = (f->n_leaves + f->leaves_per_pod - 1) / f->leaves_per_pod;
    f->n_spines = topology_whole(network, "spines");
    f->n_cores = topology_whole(network, "cores");
    f->spines = f->n_spines;
    f->cores = f->n_cores;
    f->up = f->core = -1;
}

/* Bandwidth of the NICs of the leaf that has most, each way. */
static double leaf_bandwidth(const struct topology *t, const struct fabric *f)
{
    double sum = 0, most = 0;
    for (int32_t n = 0; n < t->n_nodes; n++) {
        const struct group_links *l = links_of(t, n);
        if (n % f->nodes_per_leaf == 0)
            sum = 0;
        sum += t->link[l->nic].bandwidth * l->n_nics / f->n_rails;
        most = fmax(most, sum);
    }
    return most;
}

/* Pairs from each of n switches to each of m above it, or one pair to all of them where packets are sprayed. */
static int32_t add_stage(struct topology *t, const char *owner, int32_t n, const char *above, int32_t m, bool sprayed,
                         double bandwidth, double latency)
{
    const int32_t first = t->n_links;
    char name[64];
    for (int32_t i = 0; i < n; i++)
        for (int32_t j = 0; j < (sprayed ? 1 : m); j++) {
            if (sprayed)
                snprintf(name, sizeof name, "%s%d.%ss", owner, i, above);
            else
                snprintf(name, sizeof name, "%s%d.%s%d", owner, i, above, j);
            add(t, name, true, sprayed ? bandwidth * m : bandwidth, latency, latency);
        }
    return first;
}

static int64_t fabric_room(const struct fabric *f)
{
    return 2 * (int64_t)f->n_leaves * f->n_spines + 2 * (int64_t)f->n_pods * f->n_spines * f->n_cores;
}

static void add_fabric(struct topology *t, struct fabric *f, const json_t *network)
{
    const bool sprayed = f->paths == PATHS_SPRAY;
    const double latency = topology_number(network, "latency");
    double uplink = topology_number(network, "uplink"), core = topology_number(network, "core_uplink");
    char owner[40];
    if (f->n_spines == 0)
        return;
    if (uplink == 0)
        uplink = leaf_bandwidth(t, f) / topology_number(network, "oversubscription") / f->n_spines;
    f->up = add_stage(t, "leaf", f->n_leaves, "spine", f->n_spines, sprayed, uplink, latency);
    if (f->n_cores > 0) {
        if (core == 0)
            core = f->leaves_per_pod * uplink / topology_number(network, "core_oversubscription") / f->n_cores;
        f->core = t->n_links;
        if (sprayed)
            add_stage(t, "pod", f->n_pods, "core", f->n_spines * f->n_cores, true, core, latency);
        for (int32_t pod = 0; pod < f->n_pods && !sprayed; pod++) {
            snprintf(owner, sizeof owner, "pod%d.spine", pod);
            add_stage(t, owner, f->n_spines, "core", f->n_cores, false, core, latency);
        }
    }
    if (sprayed) {
        f->n_spines = 1;
        f->n_cores = f->n_cores > 0;
    }
}

/* ---- all of them ---- */

static void wire_devices(const struct topology *t, struct layout *lay)
{
    const struct fabric *f = &lay->fabric;
    for (int32_t d = 0; d < t->n_devices; d++) {
        const int32_t node = t->node[d], local = d - t->first_device[node];
        const struct group_links *l = links_of(t, node);
        const int32_t before = node - l->first_node;
        struct wiring *w = &lay->wiring[d];
        w->rail = local / l->per_nic;
        w->nic = l->nic < 0 ? -1 : l->nic + 2 * (before * l->n_nics + w->rail);
        w->leaf = f->kind == FABRIC_IDEAL ? -1 : node / f->nodes_per_leaf * f->n_rails + (f->n_rails > 1 ? w->rail : 0);
        w->uplink =
            l->uplink < 0 ? -1 : l->uplink + 2 * (before * (l->n_devices / l->per_switch) + local / l->per_switch);
    }
}

/* Links are there. */
static int list_direct(struct topology *t, const struct layout *lay, const char *file, struct err *err)
{
    bool direct = lay->fabric.kind == FABRIC_IDEAL && t->n_nodes > 1;
    for (int32_t d = 0; d < t->n_devices; d++)
        direct &= lay->wiring[d].nic >= 0 && !links_of(t, t->node[d])->nic_over_pcie;
    if (!direct)
        return 0;
    if (!(t->direct = malloc((size_t)t->n_devices * sizeof *t->direct)))
        return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    for (int32_t d = 0; d < t->n_devices; d++) {
        const int32_t out = lay->wiring[d].nic, in = out + 1;
        t->direct[d] = (struct direct_links){ out, in, t->link[out].latency, t->link[in].latency };
    }
    return 0;
}

int topology_links(struct topology *t, const struct parts *p, const char *file, struct err *err)
{
    struct layout *lay = t->priv = calloc(1, sizeof *lay);
    if (lay) {
        lay->group = calloc((size_t)p->n_groups, sizeof *lay->group);
        lay->group_of = calloc((size_t)t->n_nodes, sizeof *lay->group_of);
        lay->wiring = calloc((size_t)t->n_devices, sizeof *lay->wiring);
    }
    if (!lay || !lay->group || !lay->group_of || !lay->wiring)
        return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    if (json_object_get(t->description, "platform"))
        return platform_build(t, file, err);
    int64_t room = 0;
    int32_t node = 0, device = 0;
    for (int32_t i = 0; i < p->n_groups; i++) {
        const struct group *g = &p->group[i];
        shape(&lay->group[i], g, node, device);
        room += g->n_nodes * node_links(g);
        for (int32_t n = 0; n < g->n_nodes; n++)
            lay->group_of[node++] = i;
        device += g->n_nodes * g->n_devices;
    }
    if (p->network)
        shape_fabric(&lay->fabric, t, p, lay);
    room += fabric_room(&lay->fabric);
    if (room > INT32_MAX / 4)
        return err_set(err, ERR_INPUT, "%s: %lld links are too many", file, (long long)room);
    if (!(t->link = calloc((size_t)room, sizeof *t->link)))
        return err_set(err, ERR_MEMORY, "%s: out of memory for %lld links", file, (long long)room);

    static void (*const sorts[])(struct topology *, struct group_links *,
                                 const struct group *) = { add_nvlink, add_pcie, add_nics, add_memory, add_ssd };
    for (size_t s = 0; s < sizeof sorts / sizeof *sorts; s++)
        for (int32_t i = 0; i < p->n_groups; i++)
            sorts[s](t, &lay->group[i], &p->group[i]);
    if (p->network && t->n_nodes > 1)
        add_fabric(t, &lay->fabric, p->network);
    wire_devices(t, lay);
    return list_direct(t, lay, file, err);
}

void topology_layout_free(struct layout *lay)
{
    if (!lay)
        return;
    free(lay->group);
    free(lay->group_of);
    free(lay->wiring);
    free(lay->strand_change);
    free(lay);
}
