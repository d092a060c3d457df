/* SPDX-License-Identifier: Apache-2.0
 * eval_placement.c - moelab eval placement: places the experts of a load, and says how even and how near that is. */
#include "config.h"

#include "eval_job.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct work {
    double *load, *transitions;           /* [L][E], [L-1][E][E] or NULL */
    struct placement current, placed;
    bool has_current;
    double expert_bytes;
    double seconds;
};

/* Numbers that are parameters of policies which replicate. */
static int pass_number(struct eval_job *j, const char *key, int32_t neutral)
{
    int32_t n;
    if (!job_has(j, key))
        return 0;
    if (job_whole(j, key, 0, 1, 1 << 20, &n) < 0)
        return j->err->code;
    if (job_takes(j, key))
        return job_param(j, key, key, json_integer(n));
    if (neutral > 0 && n != neutral)
        return job_fail(j, key, "found %d, but %s places one replica of each of the %d experts", n, j->who, neutral);
    return 0;
}

/* phy2log [L][P], P / D physical experts on each device. */
static int read_current(struct eval_job *j, struct work *w)
{
    const int32_t n_devices = j->topology->n_devices;
    int64_t shape[2] = { j->model.n_layers, -1 };
    if (!job_has(j, "current"))
        return 0;
    int32_t *phy2log = job_ids(j, "current", 2, shape, 0, j->model.n_experts - 1);
    if (!phy2log)
        return j->err->code;
    if (shape[1] % n_devices != 0 || shape[0] * shape[1] > INT32_MAX)
        return job_fail(j, "current", "%lld physical experts cannot be alike on %d devices", (long long)shape[1],
                        n_devices);
    int32_t n = (int32_t)(shape[0] * shape[1]), slots = (int32_t)shape[1] / n_devices;
    struct placement *p = &w->current;
    p->replica = malloc(sizeof *p->replica * (size_t)(n > 0 ? n : 1));
    if (!p->replica)
        return err_set(j->err, ERR_MEMORY, "out of memory");
    p->room = n;
    for (int32_t i = 0; i < n; i++)
        p->replica[p->view.n++] = (struct moe_replica){ i / (int32_t)shape[1], phy2log[i],
                                                        i % (int32_t)shape[1] / slots, 1 };
    w->has_current = true;
    char who[600];
    snprintf(who, sizeof who, "%s: current", j->file);
    return placement_finish(p, &j->model, who, j->err);
}

static int read_all(struct eval_job *j, struct work *w)
{
    int64_t shape[2] = { -1, -1 };
    if (!(w->load = job_reals(j, "load", 2, shape, 0, 1e300)))
        return j->err->code;
    if (shape[0] < 1 || shape[0] > 1000 || shape[1] < 1 || shape[1] > 65535)
        return job_fail(j, "load", "found %lld layers of %lld experts, expected 1 to 1000 of 1 to 65535",
                        (long long)shape[0], (long long)shape[1]);
    j->model = (struct moe_model){ .n_layers = (int32_t)shape[0], .n_experts = (int32_t)shape[1], .top_k = 1,
                                   .d_model = 1, .d_expert = 1, .weight_bytes = 2, .act_bytes = 2,
                                   .combine_bytes = 2 };
    int64_t pairs[3] = { shape[0] - 1, shape[1], shape[1] };
    if (job_has(j, "transitions") && !(w->transitions = job_reals(j, "transitions", 3, pairs, 0, 1e300)))
        return j->err->code;
    if (!job_has(j, "devices") && !job_has(j, "machine"))
        return job_fail(j, "devices", "is missing");
    if (job_machine(j, 0) < 0 || pass_number(j, "replicas", j->model.n_experts) < 0 ||
        pass_number(j, "groups", 0) < 0 || job_real(j, "expert_bytes", 1, 0, 1e15, &w->expert_bytes) < 0 ||
        read_current(j, w) < 0)
        return j->err->code;
    const uint32_t needs = j->plugin->needs;
    if ((needs & MOE_NEEDS_TRANSITIONS) && !w->transitions)
        return job_fail(j, "transitions", "is missing: %s needs it", j->who);
    if (needs & (MOE_NEEDS_COACTIVATION | MOE_NEEDS_SALIENCY | MOE_NEEDS_SIMILARITY))
        return err_set(j->err, ERR_INPUT, "%s: needs counts of pairs or outputs of experts, which no input of eval has",
                       j->who);
    return job_context(j);
}

static int place_once(struct eval_job *j, struct work *w)
{
    struct policy p;
    struct moe_stats stats = { .step = 0, .n_steps = 1, .load = w->load, .transitions = w->transitions,
                               .current = w->has_current ? &w->current.view : NULL };
    placement_reset(&w->placed);
    if (job_open_policy(j, &p) == 0) {
        double start = job_clock();
        HOOK(&p, placement, place, &stats, &w->placed.view);
        double seconds = job_clock() - start;
        w->seconds = w->seconds == 0 || seconds < w->seconds ? seconds : w->seconds;
    }
    policy_close(&p);
    return j->err->code ? j->err->code : placement_finish(&w->placed, &j->model, j->who, j->err);
}

/* ---- what a placement is worth ---- */

static const struct moe_replica *replicas_of(const struct placement *p, size_t object, int32_t i)
{
    return &p->replica[p->by_expert[p->expert_first[object] + i]];
}

static int32_t n_replicas(const struct placement *p, size_t object)
{
    return p->expert_first[object + 1] - p->expert_first[object];
}

/* Replicas of an expert share its load alike, shards by their fractions. */
static double share_of(const struct placement *p, size_t object, int32_t i)
{
    double whole = 0;
    for (int32_t k = 0; k < n_replicas(p, object); k++)
        whole += (double)replicas_of(p, object, k)->fraction;
    return (double)replicas_of(p, object, i)->fraction / whole;
}

/* mean / max of the devices' loads per layer; null where nothing was routed. */
static int put_balancedness(struct eval_job *j, const struct work *w, json_t *out)
{
    const int32_t n_devices = j->topology->n_devices;
    double *device = job_alloc(j, (size_t)n_devices, sizeof *device);
    json_t *list = json_array();
    json_object_set_new(out, "balancedness", list);
    for (int32_t l = 0; device && l < j->model.n_layers; l++) {
        double sum = 0, most = 0;
        memset(device, 0, sizeof *device * (size_t)n_devices);
        for (int32_t e = 0; e < j->model.n_experts; e++) {
            size_t o = (size_t)l * (size_t)j->model.n_experts + (size_t)e;
            for (int32_t i = 0; i < n_replicas(&w->placed, o); i++)
                device[replicas_of(&w->placed, o, i)->device] += w->load[o] * share_of(&w->placed, o, i);
        }
        for (int32_t d = 0; d < n_devices; d++) {
            sum += device[d];
            most = fmax(most, device[d]);
        }
        json_array_append_new(list, most > 0 ? json_real(sum / n_devices / most) : json_null());
    }
    return j->err->code;
}

/* Where layer l has each expert: [E][D] and [E][N]. */
static void mark_layer(const struct eval_job *j, const struct placement *p, int32_t layer, uint8_t *on_device,
                       uint8_t *on_node)
{
    const size_t n_devices = (size_t)j->topology->n_devices, n_nodes = (size_t)j->topology->n_nodes;
    memset(on_device, 0, (size_t)j->model.n_experts * n_devices);
    memset(on_node, 0, (size_t)j->model.n_experts * n_nodes);
    for (int32_t i = p->layer_first[layer]; i < p->layer_first[layer + 1]; i++) {
        const struct moe_replica *r = &p->replica[i];
        on_device[(size_t)r->expert * n_devices + (size_t)r->device] = 1;
        on_node[(size_t)r->expert * n_nodes + (size_t)j->context.view.node[r->device]] = 1;
    }
}

/* Expected number of tokens that change device, and node, from one layer to the next: a token sits at any replica of
 * its expert with equal chance and goes to a replica of the next one on the same device, else node, else anywhere. */
static int put_crossings(struct eval_job *j, const struct work *w, json_t *out)
{
    const size_t n_experts = (size_t)j->model.n_experts;
    const size_t n_devices = (size_t)j->topology->n_devices, n_nodes = (size_t)j->topology->n_nodes;
    double device = 0, node = 0;
    uint8_t *on_device = job_alloc(j, n_experts, n_devices), *on_node = job_alloc(j, n_experts, n_nodes);
    if (!on_device || !on_node)
        return j->err->code;
    for (int32_t l = 0; w->transitions && l + 1 < j->model.n_layers; l++) {
        mark_layer(j, &w->placed, l + 1, on_device, on_node);
        for (size_t e = 0; e < n_experts; e++) {
            const double *row = w->transitions + ((size_t)l * n_experts + e) * n_experts;
            size_t o = (size_t)l * n_experts + e;
            for (int32_t i = 0; i < n_replicas(&w->placed, o); i++) {
                const size_t d = (size_t)replicas_of(&w->placed, o, i)->device;
                const size_t n = (size_t)j->context.view.node[d];
                double away = 0, far = 0;
                for (size_t f = 0; f < n_experts; f++) {
                    away += on_device[f * n_devices + d] ? 0 : row[f];
                    far += on_node[f * n_nodes + n] ? 0 : row[f];
                }
                device += away * share_of(&w->placed, o, i);
                node += far * share_of(&w->placed, o, i);
            }
        }
    }
    json_object_set_new(out, "cross_device", w->transitions ? json_real(device) : json_null());
    json_object_set_new(out, "cross_node", w->transitions ? json_real(node) : json_null());
    return 0;
}

/* Weights that a device holds now and did not before. */
static int put_migration(struct eval_job *j, const struct work *w, json_t *out)
{
    const size_t n_devices = (size_t)j->topology->n_devices;
    const size_t n_objects = (size_t)j->model.n_layers * (size_t)j->model.n_experts;
    double moved = 0;
    float *held = job_alloc(j, n_devices, sizeof *held); /* of one expert, by device: before, then what has come */
    for (size_t o = 0; held && w->has_current && o < n_objects; o++) {
        memset(held, 0, sizeof *held * n_devices);
        for (int32_t i = 0; i < n_replicas(&w->current, o); i++)
            held[replicas_of(&w->current, o, i)->device] = 1;
        for (int32_t i = 0; i < n_replicas(&w->placed, o); i++) {
            const struct moe_replica *r = replicas_of(&w->placed, o, i);
            if (r->fraction > held[r->device]) {
                moved += (double)(r->fraction - held[r->device]);
                held[r->device] = r->fraction;
            }
        }
    }
    json_object_set_new(out, "migrated_bytes", w->has_current ? json_real(moved * w->expert_bytes) : json_null());
    return j->err->code;
}

static json_t *physical(const struct eval_job *j, const struct placement *p, bool devices)
{
    json_t *layers = json_array();
    for (int32_t l = 0; l < j->model.n_layers; l++) {
        json_t *list = json_array();
        for (int32_t i = p->layer_first[l]; i < p->layer_first[l + 1]; i++)
            json_array_append_new(list, json_integer(devices ? p->replica[i].device : p->replica[i].expert));
        json_array_append_new(layers, list);
    }
    return layers;
}

static json_t *replica_counts(const struct eval_job *j, const struct placement *p)
{
    json_t *layers = json_array();
    for (int32_t l = 0; l < j->model.n_layers; l++) {
        json_t *list = json_array();
        for (size_t e = 0, n = (size_t)j->model.n_experts; e < n; e++)
            json_array_append_new(list, json_integer(n_replicas(p, (size_t)l * n + e)));
        json_array_append_new(layers, list);
    }
    return layers;
}

static void put_placement(const struct eval_job *j, const struct placement *p, json_t *out)
{
    bool sharded = false;
    for (int32_t i = 0; i < p->view.n; i++)
        sharded |= p->replica[i].fraction < 1;
    if (!sharded) {
        json_object_set_new(out, "phy2log", physical(j, p, false));
        json_object_set_new(out, "phy2dev", physical(j, p, true));
        json_object_set_new(out, "logcnt", replica_counts(j, p));
        return;
    }
    json_t *shards = json_array();
    for (int32_t i = 0; i < p->view.n; i++)
        json_array_append_new(shards, json_pack("{s:i, s:i, s:i, s:f}", "layer", p->replica[i].layer, "expert",
                                                p->replica[i].expert, "device", p->replica[i].device, "fraction",
                                                (double)p->replica[i].fraction));
    json_object_set_new(out, "shards", shards);
}

int eval_placement(struct eval_job *j, json_t *out)
{
    struct work w = { .seconds = 0 };
    if (read_all(j, &w) < 0)
        goto out;
    for (int32_t i = 0; i < j->n_repeats; i++)
        if (place_once(j, &w) < 0)
            goto out;
    put_placement(j, &w.placed, out);
    if (put_balancedness(j, &w, out) == 0 && put_crossings(j, &w, out) == 0)
        put_migration(j, &w, out);
    json_object_set_new(out, "seconds", json_real(w.seconds));
out:
    placement_free(&w.current);
    placement_free(&w.placed);
    return j->err->code;
}
