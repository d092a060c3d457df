/* SPDX-License-Identifier: Apache-2.0
 * device_memory.c - what a device's memory has to hold: attention, gates and shared experts of every layer, the keys
 * and values that attention reads, the experts that placement puts there (or, with offload, as many as its cache holds
 * of them), what a plan sends there for a layer, and a tenth kept for activations. */
#include "config.h"

#include "run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int32_t step_dense_all(const struct run *r)
{
    return r->dense.n_first + r->model.n_layers * (r->dense.interleave - 1);
}

/* Attention of MoE layers, attention and FFNs of dense ones: what tp devices split. */
double memory_split_weights(const struct run *r, int32_t n_dense, int32_t n_moe)
{
    return (n_dense + n_moe) * layer_attention_weights(&r->model, &r->attention, r->tp) +
           n_dense * 3.0 * r->model.d_model * r->dense.width / r->tp;
}

double memory_whole_weights(const struct run *r)
{
    const struct moe_model *m = &r->model;
    return (double)m->d_model * m->n_experts + m->n_shared * 3.0 * m->d_model * m->d_expert;
}

double memory_vocabulary(const struct run *r)
{
    return 2.0 * r->vocab * r->model.d_model / r->tp;
}

/* On every device alike. */
static double plain_weights(const struct run *r)
{
    return memory_split_weights(r, step_dense_all(r), r->model.n_layers) + r->model.n_layers * memory_whole_weights(r);
}

/* Devices that hold a copy of what `plain_weights` counts share its optimiser's state. */
static double plain_updated(const struct run *r)
{
    const double split = memory_split_weights(r, step_dense_all(r), r->model.n_layers) + memory_vocabulary(r);
    const double whole = r->model.n_layers * memory_whole_weights(r), n = r->topology->n_devices;
    return r->workload.shard_optimizer ? split * r->tp / n + whole / n : split + whole;
}

double memory_updated(const struct run *r, int32_t device)
{
    return plain_updated(r) + r->placed_updated[device];
}

/* As attention reads them: per request when decoding, of one prompt when prefilling. */
static double cache_bytes(const struct run *r)
{
    const double requests = r->workload.phase == MOE_DECODE ? (double)r->workload.n_tokens / r->topology->n_devices : 1;
    if (r->workload.phase == MOE_TRAIN)
        return 0;
    return (step_dense_all(r) + r->model.n_layers) * requests * r->tp * r->workload.context *
           layer_cache(&r->attention, r->tp) * layer_element_bytes(r->precision);
}

/* What a layer leaves for its backward pass, or needs while it runs; expert: rows of the mean device. */
static double layer_kept(const struct run *r, bool dense)
{
    const struct moe_model *m = &r->model;
    const double tokens = (double)r->workload.n_tokens / r->topology->n_devices, e = layer_element_bytes(r->precision);
    const double attention = r->tp * tokens * layer_attention_kept(m, &r->attention, r->tp) * e;
    if (dense)
        return attention + r->tp * tokens * (2.0 * m->d_model + 3.0 * r->dense.width / r->tp) * e;
    return attention + tokens * (2.0 * m->d_model * e + 4.0 * m->n_experts + m->n_shared * 3.0 * m->d_expert * e +
                                 m->top_k * (r->etp * m->d_model * m->act_bytes + 3.0 * m->d_expert * e));
}

/* One layer's at a time; in training all layers', or of each its input alone and one layer's in full. Scores of the
 * vocabulary in 4 bytes. */
static double activations(const struct run *r)
{
    const double tokens = (double)r->workload.n_tokens / r->topology->n_devices;
    const int32_t n_dense = step_dense_all(r), n_moe = r->model.n_layers;
    const double moe = layer_kept(r, false), dense = n_dense > 0 ? layer_kept(r, true) : 0, one = fmax(moe, dense);
    if (r->workload.phase != MOE_TRAIN)
        return one;
    const double scores = tokens * r->vocab * 4, input = tokens * r->model.d_model * layer_element_bytes(r->precision);
    return scores + (r->workload.recompute ? one + (n_dense + n_moe) * input : n_moe * moe + n_dense * dense);
}

/* Rows to send and rows that come in, out and back, if every device gets as many as it sends; where experts are split,
 * a device has those that came to all of its slot. */
static double dispatch_buffers(const struct run *r)
{
    const struct moe_model *m = &r->model;
    return (1.0 + r->etp) * r->workload.n_tokens / r->topology->n_devices * m->top_k * m->d_model *
           (m->act_bytes + m->combine_bytes);
}

/* Of the optimiser and of gradients, per element of what a device updates or computes gradients of. */
static double state_bytes(const struct run *r)
{
    return r->workload.phase == MOE_TRAIN ? r->workload.optimizer_bytes : 0;
}

static double gradient_bytes(const struct run *r)
{
    return r->workload.phase == MOE_TRAIN ? r->workload.gradient_bytes : 0;
}

static double weight_bytes(const struct run *r)
{
    return plain_weights(r) * r->model.weight_bytes + memory_vocabulary(r) * layer_element_bytes(r->precision);
}

double device_memory_fixed(const struct run *r)
{
    const double train = r->workload.phase == MOE_TRAIN ? activations(r) : 0;
    return weight_bytes(r) + cache_bytes(r) + train + plain_updated(r) * state_bytes(r) +
           (plain_weights(r) + memory_vocabulary(r)) * gradient_bytes(r);
}

json_t *device_memory_json(const struct run *r)
{
    double experts = 0, updated = 0, capacity = INFINITY;
    for (int32_t d = 0; d < r->topology->n_devices; d++) {
        experts = fmax(experts, r->placed_bytes[d]);
        updated = fmax(updated, r->placed_updated[d]);
        capacity = fmin(capacity, r->context.view.memory[d]);
    }
    const double elements = experts / r->model.weight_bytes;
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "weights", weight_bytes(r), "experts", experts,
                     "kv_cache", cache_bytes(r), "activations", activations(r), "gradients",
                     (plain_weights(r) + memory_vocabulary(r) + elements) * gradient_bytes(r), "optimizer",
                     (plain_updated(r) + updated) * state_bytes(r), "dispatch_buffers", dispatch_buffers(r),
                     "capacity", capacity);
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

/* What would fit, each with all else as it is: text for the end of a message. */
static void what_fits(const struct run *r, int32_t device, double over, char *text, size_t room)
{
    const struct workload *w = &r->workload;
    const double cache = cache_bytes(r), most = ROOM_SHARE * r->context.view.memory[device];
    const double free_bytes = most - device_memory_fixed(r), all = r->context.n_objects * run_expert_bytes(r);
    int n = snprintf(text, room, "; %.4g GB too much", over / 1e9);
    if (over < cache) {
        const double keeps = 1 - over / cache;
        n += snprintf(text + n, room - (size_t)n, "; context %.0f fits", floor(w->context * keeps));
        if (w->phase == MOE_DECODE && floor(w->n_tokens * keeps / w->n_devices) >= 1)
            n += snprintf(text + n, room - (size_t)n, ", or batch_per_device %.0f",
                          floor(w->n_tokens * keeps / w->n_devices));
    }
    const double copies = r->workload.shard_optimizer ? r->edp : 1;
    const double trained = 1 + (state_bytes(r) / copies + gradient_bytes(r)) / r->model.weight_bytes;
    if (!r->offloading && free_bytes > 0)
        snprintf(text + n, room - (size_t)n, "; one copy of every expert%s fits on %.0f such devices",
                 r->edp > 1 ? " and group" : "", r->edp * ceil(all * trained / free_bytes));
}

static int does_not_fit(struct run *r, int32_t device, const char *what, double experts)
{
    const double memory = r->context.view.memory[device], fixed = device_memory_fixed(r);
    char fits[200];
    what_fits(r, device, experts + fixed - ROOM_SHARE * memory, fits, sizeof fits);
    return err_set(r->err, ERR_INPUT, "%s: machine %s, device %d: %s take %.4g GB and what every device holds %.4g GB; "
                   "of its %.4g GB nine tenths are for these: choose more or larger devices, fewer requests, less "
                   "context, %s%s", r->where, r->topology->name, device, what, experts / 1e9, fixed / 1e9, memory / 1e9,
                   r->offloading ? "or a smaller cache" : "fewer replicas, or an offload policy", fits);
}

/* The tenth that is left: rows on their way, and activations where training does not count them with what stays. */
static int check_rest(struct run *r, int32_t device)
{
    const double rest = (1 - ROOM_SHARE) * r->context.view.memory[device], buffers = dispatch_buffers(r);
    const double active = r->workload.phase == MOE_TRAIN ? 0 : activations(r);
    if (active + buffers <= rest)
        return 0;
    return err_set(r->err, ERR_INPUT, "%s: machine %s, device %d: activations take %.4g GB and rows sent and received "
                   "%.4g GB; a tenth of its %.4g GB is for these: %.0f tokens per device fit", r->where,
                   r->topology->name, device, active / 1e9, buffers / 1e9, r->context.view.memory[device] / 1e9,
                   floor((double)r->workload.n_tokens / r->topology->n_devices * rest / (active + buffers)));
}

/* Weights of experts on each device, and how many of them its optimiser updates: all, or its share among the copies. */
static void place_bytes(struct run *r, const struct moe_placement *p)
{
    const size_t n = (size_t)r->topology->n_devices;
    memset(r->placed_bytes, 0, sizeof *r->placed_bytes * n);
    memset(r->placed_updated, 0, sizeof *r->placed_updated * n);
    for (int32_t i = 0; i < p->n; i++) {
        const struct moe_replica *x = &p->replica[i];
        const int32_t *at = &p->expert_first[x->layer * r->model.n_experts + x->expert];
        const double bytes = (double)x->fraction * run_expert_bytes(r), copies = (double)(at[1] - at[0]) / r->etp;
        r->placed_bytes[x->device] += bytes;
        r->placed_updated[x->device] += bytes / r->model.weight_bytes / (r->workload.shard_optimizer ? copies : 1);
    }
}

int device_memory_check(struct run *r, const struct moe_placement *p)
{
    const int32_t n_devices = r->topology->n_devices;
    if (r->graph.keep_items) /* a real machine: what its processes hold is its own to check */
        return 0;
    double *bytes = r->placed_bytes;
    place_bytes(r, p);
    if (r->offloading && r->context.cache_objects < 1)
        return does_not_fit(r, 0, "a cache of one expert would", run_expert_bytes(r));
    for (int32_t d = 0; d < n_devices; d++) {
        if (r->offloading) /* a cache holds nothing that its device does not compute */
            bytes[d] = fmin(bytes[d], (double)r->context.cache_objects * run_expert_bytes(r));
        const double all = bytes[d] + bytes[d] / r->model.weight_bytes * gradient_bytes(r) +
                           r->placed_updated[d] * state_bytes(r);
        if (all > r->context.view.expert_room[d])
            return does_not_fit(r, d, r->offloading ? "the cached experts"
                                      : r->trained ? "its experts, their gradients and optimiser state" : "its experts",
                                all);
        if (check_rest(r, d) < 0)
            return r->err->code;
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
