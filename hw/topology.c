/* SPDX-License-Identifier: Apache-2.0
 * topology.c - the links of a machine, and those between any two of its endpoints.
 *
 * Routes are computed, never stored: links of one sort lie behind each other, two per device or node (out, in), so a
 * route is a few additions and 4096 devices need no N^2 table. */
#include "config.h"

#include "topology_check.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const precision_name[N_PRECISIONS] = { "fp32", "tf32", "bf16", "fp8", "int8", "int4" };

/* Where the links of each sort begin; -1: there are none. Links with a direction come in pairs: out, in. */
struct layout {
    int32_t nvlink, pcie, nic; /* per device (nic: per node when shared) */
    int32_t uplink, memory;    /* per node; memory is one link, reads and writes share it */
    int32_t ssd;               /* per node, reads only */
    int32_t *node;             /* [D] of each device */
    bool nic_shared;
    bool peer; /* devices reach each other over PCIe without a stop in host memory */
};

/* ---- building ---- */

/* Adds n owners' links ("WHAT<i>.sort.out" and ".in", or one link without a direction); returns the first's id. */
static int32_t add_links(struct topology *t, int32_t n, const char *owner, const char *sort, bool pair,
                         double bandwidth, double latency_out, double latency_in)
{
    int32_t first = t->n_links;
    for (int32_t i = 0; i < n; i++) {
        for (int way = 0; way < (pair ? 2 : 1); way++) {
            struct link *l = &t->link[t->n_links++];
            snprintf(l->name, sizeof l->name, "%s%d.%s%s", owner, i, sort, !pair ? "" : way ? ".in" : ".out");
            l->bandwidth = bandwidth;
            l->latency = way ? latency_in : latency_out;
        }
    }
    return first;
}

static void build_links(struct topology *t, struct layout *lay, json_t *const table[N_SECTIONS])
{
    const json_t *nvlink = table[NVLINK], *pcie = table[PCIE], *nic = table[NIC];
    lay->nvlink = lay->pcie = lay->nic = lay->uplink = lay->memory = lay->ssd = -1;
    lay->peer = true;

    /* A latency from end to end sits on the way out; PCIe's counts each time a device's own link is crossed. */
    if (nvlink)
        lay->nvlink =
            add_links(t, t->n_devices, "gpu", "nvlink", true,
                      number(nvlink, "bandwidth") * number(nvlink, "efficiency"), number(nvlink, "latency"), 0);
    if (pcie) {
        double latency = number(pcie, "latency");
        lay->pcie = add_links(t, t->n_devices, "gpu", "pcie", true,
                              number(pcie, "bandwidth") * number(pcie, "efficiency"), latency, latency);
        lay->peer = json_is_true(json_object_get(pcie, "peer"));
        if (json_object_get(pcie, "uplink"))
            lay->uplink = add_links(t, t->n_nodes, "node", "pcie", true,
                                    number(pcie, "uplink") * number(pcie, "efficiency"), 0, 0);
    }
    if (nic) {
        lay->nic_shared = json_is_true(json_object_get(nic, "shared"));
        lay->nic = add_links(t, lay->nic_shared ? t->n_nodes : t->n_devices, lay->nic_shared ? "node" : "gpu", "nic",
                             true, number(nic, "bandwidth") * number(nic, "efficiency"), number(nic, "latency"), 0);
    }
    if (table[HOST])
        lay->memory = add_links(t, t->n_nodes, "node", "memory", false, number(table[HOST], "mem_bandwidth"), 0, 0);
    if (table[SSD])
        lay->ssd = add_links(t, t->n_nodes, "node", "ssd", false, number(table[SSD], "bandwidth"),
                             number(table[SSD], "latency"), 0);
}

static int copy_name(char out[64], const json_t *table, const char *path, const char *file, struct err *err)
{
    const char *name = json_string_value(json_object_get(table, "name"));
    if (snprintf(out, 64, "%s", name) >= 64)
        return err_set(err, ERR_INPUT, "%s: %sname: found %zu characters, expected at most 63", file, path,
                       strlen(name));
    return 0;
}

static void device_fill(struct device_spec *d, const json_t *device, const json_t *peak, const json_t *gemm)
{
    d->memory = number(device, "memory");
    d->mem_bandwidth = number(device, "mem_bandwidth");
    d->launch_s = number(device, "launch_s");
    d->flops_efficiency = number(device, "flops_efficiency");
    d->mem_efficiency = number(device, "mem_efficiency");
    for (int p = 0; p < N_PRECISIONS; p++)
        d->peak[p] = number(peak, precision_name[p]);
    d->gemm.sms = number(gemm, "sms");
    d->gemm.mma_efficiency = number(gemm, "mma_efficiency");
    d->gemm.port_bandwidth = number(gemm, "port_bandwidth");
    d->gemm.store_bandwidth = number(gemm, "store_bandwidth");
    d->gemm.mem_efficiency = number(gemm, "mem_efficiency");
    d->gemm.launch_s = number(gemm, "launch_s");
    d->gemm.overlap = number(gemm, "overlap");
}

int topology_build(struct topology **out, const json_t *description, const char *file, struct err *err)
{
    *out = NULL;
    struct topology *t = calloc(1, sizeof *t);
    struct device_spec spec = { 0 };
    json_t *table[N_SECTIONS] = { NULL };
    int rc = ERR_MEMORY;
    if (!t)
        goto out;
    if (!json_is_object(description)) {
        rc = err_set(err, ERR_INPUT, "%s: expected a machine description, a table", file);
        goto out;
    }
    if (!(t->description = json_deep_copy(description)))
        goto out;
    if ((rc = topology_check(t->description, table, file, err)))
        goto out;
    if ((rc = copy_name(t->name, table[TOP], "", file, err)) ||
        (rc = copy_name(spec.name, table[DEVICE], "device.", file, err)))
        goto out;

    t->n_nodes = (int32_t)number(table[TOP], "nodes");
    t->devices_per_node = (int32_t)number(table[TOP], "devices");
    t->n_devices = t->n_nodes * t->devices_per_node;

    size_t n_nodes = (size_t)t->n_nodes, n_devices = (size_t)t->n_devices;
    rc = ERR_MEMORY;
    t->device = calloc(n_devices, sizeof *t->device);
    t->host_memory = calloc(n_nodes, sizeof(double));
    t->host_mem_bandwidth = calloc(n_nodes, sizeof(double));
    t->host_flops = calloc(n_nodes, sizeof(double));
    t->link = calloc(6 * n_devices + 4 * n_nodes, sizeof *t->link); /* every sort of link at once */
    struct layout *lay = t->priv = calloc(1, sizeof *lay);
    if (!t->device || !t->host_memory || !t->host_mem_bandwidth || !t->host_flops || !t->link || !lay ||
        !(lay->node = calloc(n_devices, sizeof *lay->node)))
        goto out;
    for (int32_t d = 0; d < t->n_devices; d++)
        lay->node[d] = d / t->devices_per_node;

    device_fill(&spec, table[DEVICE], table[PEAK], table[GEMM]);
    for (size_t d = 0; d < n_devices; d++)
        t->device[d] = spec;
    for (size_t n = 0; n < n_nodes && table[HOST]; n++) {
        t->host_memory[n] = number(table[HOST], "memory");
        t->host_mem_bandwidth[n] = number(table[HOST], "mem_bandwidth");
        t->host_flops[n] = number(table[HOST], "flops");
    }
    build_links(t, lay, table);
    t->exchange = (struct exchange_costs){ number(table[EXCHANGE], "startup"), number(table[EXCHANGE], "per_peer"),
                                           number(table[EXCHANGE], "per_message"),
                                           number(table[EXCHANGE], "message_overhead") };
    *out = t;
    t = NULL;
    rc = 0;
out:
    if (rc == ERR_MEMORY)
        err_set(err, ERR_MEMORY, "%s: out of memory", file);
    topology_free(t);
    return rc;
}

void topology_free(struct topology *t)
{
    if (!t)
        return;
    if (t->priv)
        free(((struct layout *)t->priv)->node);
    json_decref(t->description);
    free(t->device);
    free(t->host_memory);
    free(t->host_mem_bandwidth);
    free(t->host_flops);
    free(t->link);
    free(t->priv);
    free(t);
}

/* ---- routes ---- */

enum endpoint { AT_DEVICE, AT_HOST, AT_SSD };

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

static int route_devices(const struct topology *t, int32_t src, int32_t dst, int32_t *link)
{
    const struct layout *lay = t->priv;
    int32_t from = lay->node[src], to = lay->node[dst];
    int n = 0;
    if (from != to && !lay->nic_shared) { /* GPUDirect: the NIC beside the device */
        link[n++] = lay->nic + 2 * src;
        link[n++] = lay->nic + 2 * dst + 1;
    } else if (from != to) {
        link[n++] = lay->pcie + 2 * src;
        link[n++] = lay->nic + 2 * from;
        link[n++] = lay->nic + 2 * to + 1;
        link[n++] = lay->pcie + 2 * dst + 1;
    } else if (lay->nvlink >= 0) {
        link[n++] = lay->nvlink + 2 * src;
        link[n++] = lay->nvlink + 2 * dst + 1;
    } else if (lay->peer) { /* below one PCIe switch or root: the uplink is not crossed */
        link[n++] = lay->pcie + 2 * src;
        link[n++] = lay->pcie + 2 * dst + 1;
    } else { /* staged: memory is written, then read, so its link is crossed twice */
        link[n++] = lay->pcie + 2 * src;
        if (lay->uplink >= 0)
            link[n++] = lay->uplink + 2 * from;
        link[n++] = lay->memory + from;
        link[n++] = lay->memory + from;
        if (lay->uplink >= 0)
            link[n++] = lay->uplink + 2 * from + 1;
        link[n++] = lay->pcie + 2 * dst + 1;
    }
    return n;
}

int topology_loop(const struct topology *t, int32_t device, int32_t link[TOPOLOGY_MAX_HOPS])
{
    const struct layout *lay = t->priv;
    if (lay->nvlink < 0)
        return 0;
    link[0] = lay->nvlink + 2 * device;
    link[1] = lay->nvlink + 2 * device + 1;
    return 2;
}

int topology_route(const struct topology *t, int32_t src, int32_t dst, int32_t path, int32_t link[TOPOLOGY_MAX_HOPS],
                   double *latency)
{
    (void)path; /* there is one between any two endpoints */
    const struct layout *lay = t->priv;
    assert(src >= 0 && src < t->n_devices + 2 * t->n_nodes);
    assert(dst >= 0 && dst < t->n_devices + 2 * t->n_nodes);
    if (latency)
        *latency = 0;
    if (src == dst)
        return 0;

    int n = 0;
    if (src < t->n_devices && dst < t->n_devices) {
        n = route_devices(t, src, dst, link);
    } else {
        enum endpoint from = endpoint_kind(t, &src), to = endpoint_kind(t, &dst);
        int32_t node = from == AT_DEVICE ? dst : src;
        if (from == AT_DEVICE && to == AT_HOST && lay->memory >= 0 && lay->node[src] == node) {
            link[n++] = lay->pcie + 2 * src;
            if (lay->uplink >= 0)
                link[n++] = lay->uplink + 2 * node;
            link[n++] = lay->memory + node;
        } else if (from == AT_HOST && to == AT_DEVICE && lay->memory >= 0 && lay->node[dst] == node) {
            link[n++] = lay->memory + node;
            if (lay->uplink >= 0)
                link[n++] = lay->uplink + 2 * node + 1;
            link[n++] = lay->pcie + 2 * dst + 1;
        } else if (from == AT_SSD && to == AT_HOST && lay->ssd >= 0 && src == dst) {
            link[n++] = lay->ssd + node;
            link[n++] = lay->memory + node;
        } else {
            return -1;
        }
    }
    if (latency)
        for (int i = 0; i < n; i++)
            *latency += t->link[link[i]].latency;
    return n;
}
