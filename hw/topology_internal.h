/* SPDX-License-Identifier: Apache-2.0
 * topology_internal.h - between the files that make a machine of a description: format (keys and values), check (what
 * no single key shows), links (names, bandwidths), route, paths, faults. */
#ifndef TOPOLOGY_INTERNAL_H
#define TOPOLOGY_INTERNAL_H

#include "machine.h"

#define TOPOLOGY_MAX_DEVICES 65536

/* ---- the description ---- */

enum section {
    TOP, DEVICE, PEAK, GEMM, NVLINK, PCIE, HOST, SSD, NIC, NETWORK, EXCHANGE, ENERGY, GROUP, SLOW, FAULT, N_SECTIONS
};

/* Nodes that are alike; a machine without `groups` is one of them. */
struct group {
    int32_t n_nodes, n_devices;    /* devices: per node */
    const json_t *table[N_SECTIONS]; /* NULL: it has none */
    char path[32];                 /* "groups[2]." or "" */
};

struct parts {
    struct group *group; /* [n_groups], freed by whoever called topology_check */
    int32_t n_groups;
    const json_t *network, *exchange, *slow, *faults; /* or NULL */
};

/* One table and those in it, key by key: types, ranges, sources. Defaults are filled in. path: what stands before its
 * keys in a message. */
int topology_format(json_t *table, enum section, const char *path, const char *file, struct err *);
int topology_check(json_t *description, struct parts *, const char *file, struct err *);

/* What a checked key says, in SI; 0 if it is not there. */
double topology_number(const json_t *table, const char *key);
static inline int32_t topology_whole(const json_t *table, const char *key)
{
    return (int32_t)topology_number(table, key);
}

/* ---- links ---- */

/* Where the links of each sort begin, of one group; -1: there are none. Links with a direction come in pairs: out,
 * in. */
struct group_links {
    int32_t first_node, first_device, n_nodes, n_devices; /* devices: per node */
    int32_t nvlink;       /* per device; in a mesh one per ordered pair of a node's devices */
    int32_t pcie;         /* per device */
    int32_t uplink;       /* per PCIe switch */
    int32_t nic;          /* per NIC */
    int32_t memory, ssd;  /* per node; memory is one link, reads and writes share it; of an SSD reads only */
    int32_t per_switch;   /* devices below one PCIe switch */
    int32_t n_nics, per_nic; /* NICs per node, devices per NIC */
    bool mesh;
    bool peer;            /* devices reach each other over PCIe without a stop in host memory */
    bool nic_over_pcie;   /* else GPUDirect beside the device */
    bool nic_at_root;     /* above the PCIe switches' uplinks */
    bool unified;         /* host and device share one memory */
};

enum fabric_kind { FABRIC_IDEAL, FABRIC_RAIL, FABRIC_LEAF_SPINE, FABRIC_FAT_TREE };
enum fabric_paths { PATHS_HASH, PATHS_SPLIT, PATHS_SPRAY };

/* Switches above the NICs. A leaf has a pair of links (out: up, in: down) to each spine of its pod; in a fat tree a
 * pod's spine s has a pair to each core switch of plane s. Sprayed links are one, of their sum. */
struct fabric {
    enum fabric_kind kind;
    enum fabric_paths paths;
    int32_t nodes_per_leaf, n_rails;  /* rails: leaves beside each other that serve the same nodes */
    int32_t n_leaves, leaves_per_pod, n_pods;
    int32_t n_spines, n_cores;        /* as routes see them: 1 where links are sprayed; 0: there are none */
    int32_t spines, cores;            /* as they are */
    int32_t up, core;                 /* first links */
};

/* From `at` on, one of the links that a sprayed one stands for has so much of its bandwidth. */
struct strand_change { double at; int32_t link, strand; double factor; };

struct layout {
    struct group_links *group;
    int32_t *group_of; /* [N] */
    /* [D] of each device, so that a route is look-ups: its NIC's way out, that NIC's place in the node, its leaf, the
     * way out of its PCIe switch, -1: none. */
    struct wiring { int32_t nic, rail, leaf, uplink; } *wiring;
    struct fabric fabric;
    struct strand_change *strand_change; /* [n_strand_changes] in order of (at, link, strand) */
    int32_t n_strand_changes;
};

/* Fills the layout and t->link; t->node and t->first_device are there. */
int topology_links(struct topology *, const struct parts *, const char *file, struct err *);
/* Fills t->slow and t->change; links are there. */
int topology_faults(struct topology *, const struct parts *, const char *file, struct err *);
void topology_layout_free(struct layout *);

static inline const struct group_links *links_of(const struct topology *t, int32_t node)
{
    const struct layout *lay = t->priv;
    return &lay->group[lay->group_of[node]];
}

/* The leaf that a device's NIC hangs on. */
static inline int32_t topology_leaf(const struct topology *t, int32_t device)
{
    return ((const struct layout *)t->priv)->wiring[device].leaf;
}

/* As topology_route between devices of different nodes, over fabric path p in 0..topology_paths() - 1. */
int topology_route_between(const struct topology *, int32_t src, int32_t dst, int32_t p, int32_t *link);

/* ---- topology_spray.c ---- */

/* Links that a sprayed one stands for; 0: it is one itself. Their names are those that they would have if they were. */
int32_t topology_strands(const struct topology *, int32_t link);
void topology_strand_name(const struct topology *, int32_t link, int32_t strand, char *name, size_t size);
/* Notes a change; -1: out of memory. When all are noted topology_strand_sums() has `change` called with what is left of
 * each sprayed link, in order of time. */
int topology_strand_change(const struct topology *, double at, int32_t link, int32_t strand, double factor);
int topology_strand_sums(struct topology *, int (*change)(struct topology *, double at, int32_t link, double factor));
/* An error (ERR_RUN) where a flow has no path from leaf to leaf whose strands are all there, and no link of its as a
 * whole has failed. */
int topology_check_spray(const struct topology *, double now, const struct net_flow *, size_t n, struct err *);

#endif
