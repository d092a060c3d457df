/* SPDX-License-Identifier: Apache-2.0
 * topology_route.c - the links between any two endpoints of a machine. Routes are computed, never stored. */
#include "config.h"

#include "platform.h"
#include "topology_internal.h"

#include <assert.h>

/* ---- pieces ---- */

static const struct wiring *wiring_of(const struct topology *t, int32_t device)
{
    return &((const struct layout *)t->priv)->wiring[device];
}

/* From a device up to its node's PCIe root, or down from there. */
static int pcie_out(const struct topology *t, const struct group_links *l, int32_t d, int32_t *link)
{
    int n = 0;
    link[n++] = l->pcie + 2 * (d - l->first_device);
    if (l->uplink >= 0)
        link[n++] = wiring_of(t, d)->uplink;
    return n;
}

static int pcie_in(const struct topology *t, const struct group_links *l, int32_t d, int32_t *link)
{
    int n = 0;
    if (l->uplink >= 0)
        link[n++] = wiring_of(t, d)->uplink + 1;
    link[n++] = l->pcie + 2 * (d - l->first_device) + 1;
    return n;
}

static int nic_out(const struct topology *t, int32_t d, int32_t *link)
{
    const struct group_links *l = links_of(t, t->node[d]);
    int n = 0;
    if (l->nic_over_pcie && l->nic_at_root)
        n = pcie_out(t, l, d, link);
    else if (l->nic_over_pcie)
        link[n++] = l->pcie + 2 * (d - l->first_device);
    link[n++] = wiring_of(t, d)->nic;
    return n;
}

static int nic_in(const struct topology *t, int32_t d, int32_t *link)
{
    const struct group_links *l = links_of(t, t->node[d]);
    int n = 0;
    link[n++] = wiring_of(t, d)->nic + 1;
    if (l->nic_over_pcie && l->nic_at_root)
        return n + pcie_in(t, l, d, link + n);
    if (l->nic_over_pcie)
        link[n++] = l->pcie + 2 * (d - l->first_device) + 1;
    return n;
}

static int nvlink(const struct group_links *l, int32_t src, int32_t dst, int32_t *link)
{
    src -= l->first_device;
    dst -= l->first_device;
    if (l->mesh) {
        const int32_t i = src % l->n_devices, j = dst % l->n_devices, n = l->n_devices;
        link[0] = l->nvlink + src / n * n * (n - 1) + i * (n - 1) + (j < i ? j : j - 1);
        return 1;
    }
    link[0] = l->nvlink + 2 * src;
    link[1] = l->nvlink + 2 * dst + 1;
    return 2;
}

/* ---- between nodes ---- */

/* Up to spine p % spines, from there over core switch p / spines if need be, and down. */
static int climb(const struct fabric *f, int32_t from, int32_t to, int32_t p, int32_t *link)
{
    const int32_t from_pod = from / f->leaves_per_pod, to_pod = to / f->leaves_per_pod;
    const int32_t spine = p % f->n_spines;
    int n = 0;
    link[n++] = f->up + 2 * (from * f->n_spines + spine);
    if (from_pod != to_pod) {
        const int32_t core = p / f->n_spines;
        link[n++] = f->core + 2 * ((from_pod * f->n_spines + spine) * f->n_cores + core);
        link[n++] = f->core + 2 * ((to_pod * f->n_spines + spine) * f->n_cores + core) + 1;
    }
    link[n++] = f->up + 2 * (to * f->n_spines + spine) + 1;
    return n;
}

int topology_route_between(const struct topology *t, int32_t src, int32_t dst, int32_t p, int32_t *link)
{
    const struct layout *lay = t->priv;
    const struct fabric *f = &lay->fabric;
    int n = 0;
    if (f->kind == FABRIC_IDEAL) {
        n = nic_out(t, src, link);
        return n + nic_in(t, dst, link + n);
    }
    const int32_t from = topology_leaf(t, src), to = topology_leaf(t, dst);
    if (from != to && f->n_spines == 0) { /* PXN: over the neighbour whose NIC is on the other's rail */
        const struct group_links *l = links_of(t, t->node[src]);
        const int32_t relay = t->first_device[t->node[src]] + wiring_of(t, dst)->rail * l->per_nic;
        n = nvlink(l, src, relay, link);
        n += nic_out(t, relay, link + n);
    } else {
        n = nic_out(t, src, link);
        if (from != to)
            n += climb(f, from, to, p, link + n);
    }
    return n + nic_in(t, dst, link + n);
}

int32_t topology_paths(const struct topology *t, int32_t src, int32_t dst)
{
    const struct layout *lay = t->priv;
    const struct fabric *f = &lay->fabric;
    int32_t link[TOPOLOGY_MAX_HOPS];
    if (src >= t->n_devices || dst >= t->n_devices)
        return topology_route(t, src, dst, 0, link, NULL) >= 0;
    if (t->node[src] == t->node[dst] || f->n_spines == 0)
        return 1;
    const int32_t from = topology_leaf(t, src), to = topology_leaf(t, dst);
    if (from == to)
        return 1;
    return from / f->leaves_per_pod == to / f->leaves_per_pod ? f->n_spines : f->n_spines * f->n_cores;
}

/* ---- inside a node ---- */

static int route_inside(const struct topology *t, int32_t src, int32_t dst, int32_t *link)
{
    const int32_t node = t->node[src];
    const struct group_links *l = links_of(t, node);
    int n = 0;
    if (l->nvlink >= 0)
        return nvlink(l, src, dst, link);
    if (l->peer && wiring_of(t, src)->uplink == wiring_of(t, dst)->uplink) { /* the uplink is not crossed */
        link[n++] = l->pcie + 2 * (src - l->first_device);
        link[n++] = l->pcie + 2 * (dst - l->first_device) + 1;
        return n;
    }
    n = pcie_out(t, l, src, link);
    if (!l->peer) { /* staged: memory is written, then read, so its link is crossed twice */
        link[n++] = l->memory + node - l->first_node;
        link[n++] = l->memory + node - l->first_node;
    }
    return n + pcie_in(t, l, dst, link + n);
}

static int route_host(const struct topology *t, int32_t device, bool to_device, int32_t *link)
{
    const int32_t node = t->node[device];
    const struct group_links *l = links_of(t, node);
    const int32_t memory = l->memory + node - l->first_node;
    int n = 0;
    if (l->unified) { /* a copy within one memory: read and written */
        link[n++] = memory;
        link[n++] = memory;
    } else if (to_device) {
        link[n++] = memory;
        n += pcie_in(t, l, device, link + n);
    } else {
        n = pcie_out(t, l, device, link);
        link[n++] = memory;
    }
    return n;
}

int topology_loop(const struct topology *t, int32_t device, int32_t link[TOPOLOGY_MAX_HOPS])
{
    const struct group_links *l = links_of(t, t->node[device]);
    if (t->platform || l->nvlink < 0 || l->mesh)
        return 0;
    link[0] = l->nvlink + 2 * (device - l->first_device);
    link[1] = link[0] + 1;
    return 2;
}

/* ---- all of them ---- */

enum endpoint { AT_DEVICE, AT_HOST, AT_SSD };

/* What an endpoint is; its id becomes that of the device or node. */
static enum endpoint endpoint_kind(const struct topology *t, int32_t *id)
{
    if (*id < t->n_devices)
        return AT_DEVICE;
    *id -= t->n_devices;
    if (*id < t->n_nodes)
        return AT_HOST;
    *id -= t->n_nodes;
    return AT_SSD;
}

/* The p-th of n paths, or the one that the pair's hash chooses: the same in every run. */
static int32_t choose(int32_t src, int32_t dst, int32_t path, int32_t n)
{
    if (path > 0)
        return (path - 1) % n;
    return n == 1 ? 0 : (int32_t)(moe_mix(moe_mix((uint64_t)src) + (uint64_t)dst) % (uint64_t)n);
}

int topology_route_any(const struct topology *t, int32_t src, int32_t dst, int32_t path,
                       int32_t link[TOPOLOGY_MAX_HOPS], double *latency)
{
    assert(src >= 0 && src < t->n_devices + 2 * t->n_nodes);
    assert(dst >= 0 && dst < t->n_devices + 2 * t->n_nodes);
    if (t->platform)
        return platform_route(t, src, dst, link, latency);
    if (latency)
        *latency = 0;
    if (src == dst)
        return 0;

    const struct layout *lay = t->priv;
    const struct fabric *f = &lay->fabric;
    const enum endpoint from = endpoint_kind(t, &src), to = endpoint_kind(t, &dst);
    int n = 0;
    if (from == AT_DEVICE && to == AT_DEVICE && t->node[src] == t->node[dst]) {
        n = route_inside(t, src, dst, link);
    } else if (from == AT_DEVICE && to == AT_DEVICE) {
        const int32_t p = f->n_spines > 0 ? choose(src, dst, path, topology_paths(t, src, dst)) : 0;
        n = topology_route_between(t, src, dst, p, link);
    } else if (from == AT_SSD && to == AT_HOST && src == dst && links_of(t, src)->ssd >= 0) {
        const struct group_links *l = links_of(t, src);
        link[n++] = l->ssd + src - l->first_node;
        link[n++] = l->memory + src - l->first_node;
    } else if ((from == AT_DEVICE) != (to == AT_DEVICE) && from != AT_SSD && to != AT_SSD) {
        const int32_t device = from == AT_DEVICE ? src : dst, node = from == AT_DEVICE ? dst : src;
        if (t->node[device] != node || links_of(t, node)->memory < 0)
            return -1;
        n = route_host(t, device, to == AT_DEVICE, link);
    } else {
        return -1;
    }
    assert(n <= TOPOLOGY_MAX_HOPS);
    for (int i = 0; latency && i < n; i++)
        *latency += t->link[link[i]].latency;
    return n;
}
