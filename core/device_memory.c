/* SPDX-License-Identifier: Apache-2.0
 * device_memory.c - what a device's memory has to hold: attention, gates and shared experts of every layer, the keys
 * and values that attention reads, the experts that placement puts there (or, with offload, as many as its cache holds
 * of them), what a plan sends there for a layer, and a tenth kept for activations. */
#include "config.h"

#include "run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* All layers, dense ones too. */
static int32_t all_layers(const struct run *r)
{
    int32_t n = r->model.n_layers;
    for (int32_t l = 0; l < r->model.n_layers; l++)
        n += step_dense_before(r, l);
    return n;
}

/* Elements in weights of attention, gates, dense layers and shared experts; a device's share of what tp split. */
static double plain_weights(const struct run *r)
{
    const struct moe_model *m = &r->model;
    const int32_t layers = all_layers(r);
    return layers * layer_attention_weights(m, &r->attention, r->tp) +
           m->n_layers * ((double)m->d_model * m->n_experts + m->n_shared * 3.0 * m->d_model * m->d_expert) +
           (layers - m->n_layers) * 3.0 * m->d_model * r->dense.width / r->tp;
}

/* Embedding and head, in elements that are never below 16 bits. */
static double vocabulary(const struct run *r)
{
    return 2.0 * r->vocab * r->model.d_model / r->tp;
}

/* As attention reads them: per request when decoding, of one prompt when prefilling; 2 bytes each. */
static double cache_bytes(const struct run *r)
{
    const double requests = r->workload.phase == MOE_DECODE ? (double)r->workload.n_tokens / r->topology->n_devices : 1;
    return all_layers(r) * requests * r->tp * r->workload.context * layer_cache(&r->attention, r->tp) * 2;
}

double device_memory_fixed(const struct run *r)
{
    return plain_weights(r) * r->model.weight_bytes + vocabulary(r) * layer_element_bytes(r->precision) +
           cache_bytes(r);
}

int64_t device_memory_objects(const struct run *r)
{
    double room = r->context.view.expert_room[0];
    for (int32_t d = 1; d < r->topology->n_devices; d++)
        room = room < r->context.view.expert_room[d] ? room : r->context.view.expert_room[d];
    int64_t n = (int64_t)(room / run_expert_bytes(r));
    return n < (int64_t)r->context.n_objects ? n : (int64_t)r->context.n_objects;
}

/* Offloaded experts lie in the memory of the node that loads them. */
static int check_hosts(struct run *r, const struct moe_placement *p)
{
    const struct topology *t = r->topology;
    double *bytes = calloc((size_t)t->n_nodes, sizeof *bytes);
    if (!bytes)
        return err_set(r->err, ERR_MEMORY, "out of memory for %d nodes", t->n_nodes);
    /* One copy serves all of a node's devices. */
    const size_t n_objects = r->context.n_objects;
    uint8_t *seen = calloc((size_t)t->n_nodes * n_objects, 1);
    for (int32_t i = 0; seen && i < p->n; i++) {
        const struct moe_replica *x = &p->replica[i];
        const size_t node = (size_t)t->node[x->device];
        const size_t object = (size_t)x->layer * (size_t)r->model.n_experts + (size_t)x->expert;
        bytes[node] += seen[node * n_objects + object] ? 0 : run_expert_bytes(r);
        seen[node * n_objects + object] = 1;
    }
    if (!seen)
        err_set(r->err, ERR_MEMORY, "out of memory for %d nodes", t->n_nodes);
    free(seen);
    for (int32_t n = 0; n < t->n_nodes && !r->err->code; n++) {
        for (int32_t d = t->first_device[n]; t->unified[n] && d < t->first_device[n + 1]; d++)
            bytes[n] += device_memory_fixed(r) + r->placed_bytes[d]; /* beside what the device holds, cache and all */
        if (bytes[n] > t->host_memory[n])
            err_set(r->err, ERR_INPUT, "%s: machine %s, node %d: its devices' experts take %.4g GB and host memory has "
                    "%.4g GB%s: choose more nodes or a larger host", r->where, t->name, n, bytes[n] / 1e9,
                    t->host_memory[n] / 1e9, t->unified[n] ? ", its device's included" : "");
    }
    free(bytes);
    return r->err->code;
}

static int does_not_fit(struct run *r, int32_t device, const char *what, double experts)
{
    const double memory = r->context.view.memory[device];
    return err_set(r->err, ERR_INPUT, "%s: machine %s, device %d: %s take %.4g GB and what every device holds %.4g GB; "
                   "of its %.4g GB nine tenths are for these: choose more or larger devices, fewer requests, less "
                   "context, %s", r->where, r->topology->name, device, what, experts / 1e9,
                   device_memory_fixed(r) / 1e9, memory / 1e9,
                   r->offloading ? "or a smaller cache" : "fewer replicas, or an offload policy");
}

int device_memory_check(struct run *r, const struct moe_placement *p)
{
    const int32_t n_devices = r->topology->n_devices;
    if (r->graph.keep_items) /* a real machine: what its processes hold is its own to check */
        return 0;
    double *bytes = r->placed_bytes;
    memset(bytes, 0, sizeof *bytes * (size_t)n_devices);
    for (int32_t i = 0; i < p->n; i++)
        bytes[p->replica[i].device] += (double)p->replica[i].fraction * run_expert_bytes(r);
    if (r->offloading && r->context.cache_objects < 1)
        return does_not_fit(r, 0, "a cache of one expert would", run_expert_bytes(r));
    for (int32_t d = 0; d < n_devices; d++) {
        if (r->offloading) /* a cache holds nothing that its device does not compute */
            bytes[d] = fmin(bytes[d], (double)r->context.cache_objects * run_expert_bytes(r));
        if (bytes[d] > r->context.view.expert_room[d])
            return does_not_fit(r, d, r->offloading ? "the cached experts" : "its experts", bytes[d]);
    }
    return r->offloading ? check_hosts(r, p) : 0;
}

int device_memory_moves(struct run *r, const char *who)
{
    const int32_t n_devices = r->topology->n_devices;
    double sent[n_devices];
    memset(sent, 0, sizeof sent);
    for (int32_t m = 0; m < r->n_moves; m++)
        sent[r->moves[m].dst] += r->moves[m].bytes;
    for (int32_t d = 0; d < n_devices && !r->graph.keep_items; d++)
        if (sent[d] > 0 && r->placed_bytes[d] + sent[d] > r->context.view.expert_room[d])
            return err_set(r->err, ERR_RUN, "%s: sends device %d experts of %.4g GB beside the %.4g GB that it holds; "
                           "it has room for %.4g GB", who, d, sent[d] / 1e9, r->placed_bytes[d] / 1e9,
                           r->context.view.expert_room[d] / 1e9);
    return 0;
}
