/* SPDX-License-Identifier: Apache-2.0
 * topology_check.c - what no single key of a machine description shows: groups and what they inherit, links without
 * which some endpoints could not reach each other, a network that fits its nodes. */
#include "config.h"

#include "platform.h"
#include "topology_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const key_of[N_SECTIONS] = {
    [DEVICE] = "device", [NVLINK] = "nvlink", [PCIE] = "pcie", [HOST] = "host", [SSD] = "ssd", [NIC] = "nic",
    [ENERGY] = "energy"
};

/* ---- groups ---- */

static int fill_group(struct group *g, const json_t *own, const json_t *top, const char *file, struct err *err)
{
    g->n_nodes = topology_whole(own, "nodes");
    g->n_devices = topology_whole(own, "devices");
    for (int s = 0; s < N_SECTIONS; s++) {
        if (!key_of[s])
            continue;
        const json_t *v = json_object_get(own, key_of[s]);
        g->table[s] = v ? v : json_object_get(top, key_of[s]);
        if (!json_is_object(g->table[s])) /* false: none */
            g->table[s] = NULL;
    }
    if (!g->table[DEVICE] && json_object_get(top, "platform")) /* it is only asked how long transfers take */
        return 0;
    if (!g->table[DEVICE])
        return err_set(err, ERR_INPUT, "%s: %sdevice: missing", file, g->path);
    g->table[PEAK] = json_object_get(g->table[DEVICE], "peak");
    g->table[GEMM] = json_object_get(g->table[DEVICE], "gemm");
    if (json_object_size(g->table[PEAK]) == 0)
        return err_set(err, ERR_INPUT, "%s: %sdevice.peak: empty, expected a rate for one precision or more", file,
                       g->path);
    return 0;
}

static int list_groups(const json_t *top, struct parts *p, const char *file, struct err *err)
{
    static const char *const shape[] = { "nodes", "devices" };
    const json_t *groups = json_object_get(top, "groups");
    const size_t n = json_array_size(groups);
    for (int i = 0; i < 2; i++) {
        if (n == 0 && !json_object_get(top, shape[i]))
            return err_set(err, ERR_INPUT, "%s: %s: missing", file, shape[i]);
        if (n > 0 && json_object_get(top, shape[i]))
            return err_set(err, ERR_INPUT,
                           "%s: %s: each of the machine's groups says how many it has; expected none "
                           "here",
                           file, shape[i]);
    }
    p->n_groups = n > 0 ? (int32_t)n : 1;
    if (!(p->group = calloc((size_t)p->n_groups, sizeof *p->group)))
        return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    for (size_t i = 0; i < (size_t)p->n_groups; i++) {
        struct group *g = &p->group[i];
        if (n > 0)
            snprintf(g->path, sizeof g->path, "groups[%zu].", i + 1);
        if (fill_group(g, n > 0 ? json_array_get(groups, i) : top, top, file, err))
            return err->code;
    }
    return 0;
}

/* ---- inside a node ---- */

static int check_host(const struct group *g, const char *file, struct err *err)
{
    static const char *const figures[] = { "memory", "mem_bandwidth", "mem_efficiency" };
    const json_t *host = g->table[HOST];
    const bool unified = json_is_true(json_object_get(host, "unified"));
    for (int i = 0; i < 3; i++) {
        const bool there = json_object_get(host, figures[i]);
        if (there && unified)
            return err_set(err, ERR_INPUT, "%s: %shost.%s: the memory is unified, and the device's %s counts", file,
                           g->path, figures[i], figures[i]);
        if (!there && !unified && i < 2)
            return err_set(err, ERR_INPUT, "%s: %shost.%s: missing", file, g->path, figures[i]);
    }
    if (unified && g->n_devices > 1)
        return err_set(err, ERR_INPUT,
                       "%s: %shost.unified: %d devices cannot share one memory with the host, expected "
                       "one per node",
                       file, g->path, g->n_devices);
    if (!unified && !g->table[PCIE])
        return err_set(err, ERR_INPUT, "%s: %spcie: missing: the host cannot reach its devices without it", file,
                       g->path);
    return 0;
}

static int check_pcie(const struct group *g, const char *file, struct err *err)
{
    const json_t *pcie = g->table[PCIE];
    const int32_t per_switch = topology_whole(pcie, "per_switch");
    if (per_switch && !json_object_get(pcie, "uplink"))
        return err_set(err, ERR_INPUT, "%s: %spcie.uplink: missing: with per_switch, a switch's devices share one",
                       file, g->path);
    if (per_switch && g->n_devices % per_switch)
        return err_set(err, ERR_INPUT, "%s: %spcie.per_switch: found %d, expected a divisor of the node's %d devices",
                       file, g->path, per_switch, g->n_devices);
    if (json_is_false(json_object_get(pcie, "peer")) && !g->table[HOST])
        return err_set(err, ERR_INPUT, "%s: %shost: missing: with pcie.peer = false devices meet in host memory", file,
                       g->path);
    return 0;
}

static int check_nic(const struct group *g, const char *file, struct err *err)
{
    const json_t *nic = g->table[NIC];
    const bool shared = json_is_true(json_object_get(nic, "shared"));
    const int32_t per_node = topology_whole(nic, "per_node");
    if (per_node && shared && per_node != 1)
        return err_set(err, ERR_INPUT, "%s: %snic.shared: one NIC for a node, but nic.per_node is %d", file, g->path,
                       per_node);
    if (per_node && g->n_devices % per_node)
        return err_set(err, ERR_INPUT, "%s: %snic.per_node: found %d, expected a divisor of the node's %d devices",
                       file, g->path, per_node, g->n_devices);
    if ((shared || (per_node && per_node < g->n_devices)) && !g->table[PCIE])
        return err_set(err, ERR_INPUT, "%s: %spcie: missing: devices reach a shared nic over it", file, g->path);
    return 0;
}

static int check_node(const struct group *g, double nodes, const char *file, struct err *err)
{
    if (nodes > 1 && !g->table[NIC])
        return err_set(err, ERR_INPUT, "%s: %snic: missing: %g nodes cannot reach each other without one", file,
                       g->path, nodes);
    if (g->n_devices > 1 && !g->table[NVLINK] && !g->table[PCIE])
        return err_set(err, ERR_INPUT, "%s: %snvlink, pcie: both missing: a node's %d devices cannot reach each other",
                       file, g->path, g->n_devices);
    if (g->table[SSD] && !g->table[HOST])
        return err_set(err, ERR_INPUT, "%s: %shost: missing: an ssd is read into host memory", file, g->path);
    if ((g->table[HOST] && check_host(g, file, err)) || (g->table[PCIE] && check_pcie(g, file, err)) ||
        (g->table[NIC] && check_nic(g, file, err)))
        return err->code;
    return 0;
}

/* ---- between nodes ---- */

static int32_t nics_per_node(const struct group *g)
{
    const int32_t per_node = topology_whole(g->table[NIC], "per_node");
    return json_is_true(json_object_get(g->table[NIC], "shared")) ? 1 : per_node ? per_node : g->n_devices;
}

/* Keys of `network` and the kinds that want them: a letter per kind (r, l, f), upper case where it has to be there. */
static const struct {
    const char *key, *kinds;
} network_keys[] = {
    { "nodes_per_leaf", "rLF" }, { "spines", "rLF" }, { "uplink", "rlf" },    { "oversubscription", "rlf" },
    { "leaves_per_pod", "F" },   { "cores", "F" },    { "core_uplink", "f" }, { "core_oversubscription", "f" },
};

/* Of two keys that say the same, exactly one. */
static int check_either(const json_t *network, const char *a, const char *b, const char *file, struct err *err)
{
    const bool has_a = json_object_get(network, a), has_b = json_object_get(network, b);
    if (has_a != has_b)
        return 0;
    return err_set(err, ERR_INPUT, "%s: network.%s, network.%s: found %s, expected one of them", file, a, b,
                   has_a ? "both" : "neither");
}

static int check_network(const struct parts *p, double nodes, const char *file, struct err *err)
{
    const json_t *network = p->network;
    const char *kind = json_string_value(json_object_get(network, "kind"));
    const char letter = *kind;
    const bool spines = json_object_get(network, "spines");
    for (size_t i = 0; i < sizeof network_keys / sizeof *network_keys; i++) {
        const char *key = network_keys[i].key, *kinds = network_keys[i].kinds;
        const bool there = json_object_get(network, key);
        if (there && !strchr(kinds, letter) && !strchr(kinds, letter - 'a' + 'A'))
            return err_set(err, ERR_INPUT, "%s: network.%s: a network of kind %s has none", file, key, kind);
        if (!there && strchr(kinds, letter - 'a' + 'A'))
            return err_set(err, ERR_INPUT, "%s: network.%s: missing", file, key);
    }
    if (letter == 'i')
        return 0;
    if (nodes > 1 && !p->group[0].table[NIC])
        return err_set(err, ERR_INPUT, "%s: nic: missing: a network connects NICs", file);
    if (letter != 'r' || spines) {
        if (check_either(network, "uplink", "oversubscription", file, err) ||
            (letter == 'f' && check_either(network, "core_uplink", "core_oversubscription", file, err)))
            return err->code;
        return 0;
    }
    /* Rails without spines: the way to another rail is over a neighbour's NIC. */
    if (json_object_get(network, "uplink") || json_object_get(network, "oversubscription"))
        return err_set(err, ERR_INPUT, "%s: network.spines: missing: uplinks lead to spines", file);
    const double per_leaf = topology_number(network, "nodes_per_leaf");
    if (per_leaf > 0 && per_leaf < nodes)
        return err_set(err, ERR_INPUT,
                       "%s: network.spines: missing: %g nodes on rails of %g each cannot reach each other", file, nodes,
                       per_leaf);
    for (int32_t i = 0; i < p->n_groups; i++)
        if (nodes > 1 && nics_per_node(&p->group[i]) > 1 && !p->group[i].table[NVLINK])
            return err_set(err, ERR_INPUT,
                           "%s: network.spines, %snvlink: both missing: there is no way from rail to "
                           "rail",
                           file, p->group[i].path);
    return 0;
}

/* Rails are as many as a node's NICs. */
static int check_rails(const struct parts *p, const char *file, struct err *err)
{
    if (!p->network || *json_string_value(json_object_get(p->network, "kind")) != 'r')
        return 0;
    for (int32_t i = 1; i < p->n_groups; i++)
        if (nics_per_node(&p->group[i]) != nics_per_node(&p->group[0]))
            return err_set(err, ERR_INPUT,
                           "%s: groups[%d]: %d NICs per node, but those of groups[1] have %d: rails are "
                           "as many as a node's NICs",
                           file, i + 1, nics_per_node(&p->group[i]), nics_per_node(&p->group[0]));
    return 0;
}

static const json_t *list_of(const json_t *top, const char *key)
{
    const json_t *v = json_object_get(top, key);
    return json_is_array(v) ? v : NULL;
}

int topology_check(json_t *description, struct parts *p, const char *file, struct err *err)
{
    const bool platform = json_object_get(description, "platform");
    int rc = platform ? platform_check(description, file, err) : 0;
    if (rc == 0)
        rc = topology_format(description, TOP, "", file, err);
    if (rc || (rc = list_groups(description, p, file, err)))
        return rc;
    p->network = json_object_get(description, "network");
    p->exchange = json_object_get(description, "exchange");
    p->slow = list_of(description, "slow");
    p->faults = list_of(description, "faults");

    double nodes = 0, devices = 0;
    for (int32_t i = 0; i < p->n_groups; i++) {
        nodes += p->group[i].n_nodes;
        devices += (double)p->group[i].n_nodes * p->group[i].n_devices;
    }
    if (devices > TOPOLOGY_MAX_DEVICES)
        return err_set(err, ERR_INPUT, "%s: %s: found %g nodes of %g devices, expected at most %d devices in all", file,
                       p->n_groups > 1 ? "groups" : "nodes", nodes, devices / nodes, TOPOLOGY_MAX_DEVICES);
    for (int32_t i = 0; i < p->n_groups && rc == 0 && !platform; i++)
        rc = check_node(&p->group[i], nodes, file, err);
    if (rc == 0 && p->network)
        rc = check_network(p, nodes, file, err);
    return rc ? rc : check_rails(p, file, err);
}
