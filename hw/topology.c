/* SPDX-License-Identifier: Apache-2.0
 * topology.c - a machine built from its description: devices, hosts, and what the other topology files add. */
#include "config.h"

#include "energy.h"
#include "latency_table.h"
#include "platform.h"
#include "topology_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const precision_name[N_PRECISIONS] = { "fp32", "tf32", "bf16", "fp8", "int8", "int4", "fp16" };

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
    d->memory = topology_number(device, "memory");
    d->mem_bandwidth = topology_number(device, "mem_bandwidth");
    d->launch_s = topology_number(device, "launch_s");
    d->flops_efficiency = topology_number(device, "flops_efficiency");
    d->mem_efficiency = topology_number(device, "mem_efficiency");
    d->read_efficiency = topology_number(device, "read_efficiency");
    d->decode_efficiency = topology_number(device, "decode_efficiency");
    d->combine_efficiency = topology_number(device, "combine_efficiency");
    for (int p = 0; p < N_PRECISIONS; p++)
        d->peak[p] = topology_number(peak, precision_name[p]);
    d->gemm.sms = topology_number(gemm, "sms");
    d->gemm.tile_m = topology_number(gemm, "tile_m");
    d->gemm.mma_efficiency = topology_number(gemm, "mma_efficiency");
    d->gemm.port_bandwidth = topology_number(gemm, "port_bandwidth");
    d->gemm.store_bandwidth = topology_number(gemm, "store_bandwidth");
    d->gemm.mem_efficiency = topology_number(gemm, "mem_efficiency");
    d->gemm.launch_s = topology_number(gemm, "launch_s");
    d->gemm.vector_efficiency = topology_number(gemm, "vector_efficiency");
    d->gemm.rest = topology_number(gemm, "rest");
    d->gemm.overlap = topology_number(gemm, "overlap");
}

static int allocate(struct topology *t, const struct parts *p, const char *file, struct err *err)
{
    for (int32_t i = 0; i < p->n_groups; i++) {
        t->n_nodes += p->group[i].n_nodes;
        t->n_devices += p->group[i].n_nodes * p->group[i].n_devices;
    }
    const size_t n_nodes = (size_t)t->n_nodes, n_devices = (size_t)t->n_devices;
    t->device = calloc(n_devices, sizeof *t->device);
    t->node = calloc(n_devices, sizeof *t->node);
    t->first_device = calloc(n_nodes + 1, sizeof *t->first_device);
    t->host_memory = calloc(n_nodes, sizeof(double));
    t->host_mem_bandwidth = calloc(n_nodes, sizeof(double));
    t->host_flops = calloc(n_nodes, sizeof(double));
    t->unified = calloc(n_nodes, sizeof *t->unified);
    if (!t->device || !t->node || !t->first_device || !t->host_memory || !t->host_mem_bandwidth || !t->host_flops ||
        !t->unified)
        return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    return 0;
}

static int fill_group(struct topology *t, const struct group *g, int32_t *node, int32_t *device, const char *file,
                      struct err *err)
{
    struct device_spec spec = { 0 };
    char path[64];
    snprintf(path, sizeof path, "%sdevice.", g->path);
    if (g->table[DEVICE] && copy_name(spec.name, g->table[DEVICE], path, file, err))
        return err->code;
    device_fill(&spec, g->table[DEVICE], g->table[PEAK], g->table[GEMM]);
    const json_t *host = g->table[HOST];
    const bool unified = json_is_true(json_object_get(host, "unified"));
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const int32_t n = (*node)++;
        t->first_device[n] = *device;
        for (int32_t d = 0; d < g->n_devices; d++) {
            t->node[*device] = n;
            t->device[(*device)++] = spec;
        }
        t->unified[n] = unified;
        t->host_memory[n] = unified ? spec.memory : topology_number(host, "memory");
        t->host_mem_bandwidth[n] = unified ? spec.mem_bandwidth : topology_number(host, "mem_bandwidth");
        t->host_flops[n] = topology_number(host, "flops");
    }
    return 0;
}

/* Every device's, so devices have to be alike. */
static int add_tables(struct topology *t, const json_t *files, const char *file, struct err *err)
{
    if (json_object_get(t->description, "groups"))
        return err_set(err, ERR_INPUT, "%s: tables: measured on one kind of device, and the machine has groups of them",
                       file);
    if (!*t->device[0].name)
        return err_set(err, ERR_INPUT, "%s: tables: the machine has no devices that compute", file);
    if (latency_table_read(&t->tables, files, file, err))
        return err->code;
    for (int32_t d = 0; d < t->n_devices; d++)
        t->device[d].tables = t->tables;
    return 0;
}

/* Links have theirs (topology_links.c). What is slow is the processor, as one whose other half is busy: what memory
 * alone limits takes as long as before. */
static void apply_pace(struct topology *t)
{
    for (int32_t i = 0; t->device && i < t->n_devices; i++) {
        struct device_spec *d = &t->device[i];
        d->mem_bandwidth /= t->pace;
        d->mem_efficiency *= t->pace; /* of moves: the product stays */
        d->combine_efficiency *= t->pace;
        d->launch_s *= t->pace;
        d->gemm.port_bandwidth /= t->pace;
        d->gemm.store_bandwidth /= t->pace;
        d->gemm.launch_s *= t->pace;
        for (int p = 0; p < N_PRECISIONS; p++)
            d->peak[p] /= t->pace;
    }
    t->exchange.startup *= t->pace;
    t->exchange.per_peer *= t->pace;
    t->exchange.per_message *= t->pace;
}

static int build(struct topology *t, const char *file, struct err *err)
{
    struct parts parts = { 0 };
    int32_t node = 0, device = 0;
    int rc = topology_check(t->description, &parts, file, err);
    t->pace = rc == 0 ? topology_number(t->description, "pace") : 1;
    t->probe_s = rc == 0 ? topology_number(t->description, "probe_s") : 0;
    if (rc == 0 && (rc = copy_name(t->name, t->description, "", file, err)) == 0)
        rc = allocate(t, &parts, file, err);
    for (int32_t i = 0; i < parts.n_groups && rc == 0; i++)
        rc = fill_group(t, &parts.group[i], &node, &device, file, err);
    if (rc == 0) {
        t->first_device[node] = device;
        rc = topology_links(t, &parts, file, err);
    }
    t->exchange = (struct exchange_costs){ topology_number(parts.exchange, "startup"),
                                           topology_number(parts.exchange, "per_peer"),
                                           topology_number(parts.exchange, "per_message"),
                                           topology_number(parts.exchange, "message_overhead"),
                                           topology_number(parts.exchange, "collective_sms") };
    apply_pace(t);
    if (rc == 0)
        rc = energy_build(t, &parts, file, err);
    const json_t *tables = json_object_get(t->description, "tables");
    if (rc == 0 && tables)
        rc = add_tables(t, tables, file, err);
    if (rc == 0)
        rc = topology_faults(t, &parts, file, err);
    free(parts.group);
    return rc;
}

int topology_build(struct topology **out, const json_t *description, const char *file, struct err *err)
{
    *out = NULL;
    if (!json_is_object(description))
        return err_set(err, ERR_INPUT, "%s: expected a machine description, a table", file);
    struct topology *t = calloc(1, sizeof *t);
    if (!t || !(t->description = json_deep_copy(description))) {
        topology_free(t);
        return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    }
    int rc = build(t, file, err);
    if (rc)
        topology_free(t);
    else
        *out = t;
    return rc;
}

void topology_free(struct topology *t)
{
    if (!t)
        return;
    topology_layout_free(t->priv);
    platform_free(t->platform);
    latency_table_free(t->tables);
    energy_figures_free(t->energy);
    json_decref(t->description);
    free(t->device);
    free(t->node);
    free(t->first_device);
    free(t->host_memory);
    free(t->host_mem_bandwidth);
    free(t->host_flops);
    free(t->unified);
    free(t->link);
    free(t->direct);
    free(t->change);
    free(t->slow);
    free(t);
}

int topology_computes(const struct topology *t, enum precision p, struct err *err)
{
    for (int32_t d = 0; d < t->n_devices; d++) {
        const struct device_spec *spec = &t->device[d];
        char has[100] = "";
        if (!*spec->name)
            return err_set(err, ERR_INPUT, "machine %s: a platform alone says nothing of devices, and nothing computes "
                           "on it: name a machine that has the same, moe.machine \"...\" { like = \"dgx-h100\" }",
                           t->name);
        if (spec->peak[p] > 0 || (d > 0 && !memcmp(spec->peak, spec[-1].peak, sizeof spec->peak)))
            continue;
        for (int q = 0; q < N_PRECISIONS; q++)
            if (spec->peak[q] > 0)
                snprintf(has + strlen(has), sizeof has - strlen(has), "%s%s", *has ? ", " : "", precision_name[q]);
        return err_set(err, ERR_INPUT, "machine %s has no figure for precision %s: device %d, %s, computes in %s",
                       t->name, precision_name[p], d, spec->name, has);
    }
    return 0;
}
