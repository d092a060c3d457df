/* SPDX-License-Identifier: Apache-2.0
 * train_stage.c - what training adds to a step: gradients, their reduction, the optimiser.
 *
 * After the forward pass and the head, from the last layer to the first: if activations are not kept, the layer forward
 * once more; gradients to the experts that outputs came from, through them and back (dispatch lays it out, with
 * traffic.backward); the gate, attention, dense layers before it. Meanwhile the gradients of a layer that is done are
 * reduced, one layer after another. When all are, every device updates its weights.
 *
 *   reduction   copies of a weight on m devices of each of n nodes: reduce-scatter inside nodes (every device sends
 *               each neighbour its share, 1 / m), rings across nodes for each share ((n - 1) / n of it), the same back.
 *               Groups that lie unevenly on nodes go around one ring. Adding up hides behind sending; a ring's latency
 *               is one hop's
 *   experts     replicas of one expert, of all groups: a ring among their devices; of shards, one for each place
 *   optimiser   gradients, state and master weights read, state, master and working weights written
 *
 * With sharded state (ZeRO-1) gradients are scattered in the backward pass, each device updates its share, and the new
 * weights are gathered last. */
#include "config.h"

#include "run.h"

#include <stdlib.h>
#include <string.h>

int train_open(struct run *r)
{
    if (r->workload.phase != MOE_TRAIN)
        return 0;
    if (r->offloading)
        return err_set(r->err, ERR_INPUT, "%s: workload.kind: train, and offload %s brings experts and drops them: "
                       "their gradients would have nowhere to go; expected offload none", r->where,
                       r->offload.plugin->name);
    if (r->graph.keep_items)
        return err_set(r->err, ERR_INPUT, "%s: workload.kind: train: machine host runs forward passes alone", r->where);
    r->trained = calloc((size_t)r->model.n_layers, sizeof *r->trained);
    return r->trained ? 0 : err_set(r->err, ERR_MEMORY, "out of memory for %d layers' routes", r->model.n_layers);
}

void train_close(struct run *r)
{
    for (int32_t l = 0; r->trained && l < r->model.n_layers; l++) {
        routes_free(&r->trained[l].routes);
        free(r->trained[l].to);
        free(r->trained[l].replica);
    }
    free(r->trained);
    r->trained = NULL;
}

int train_keep(struct run *r, int32_t layer)
{
    struct trained_layer *t = &r->trained[layer];
    const struct moe_routes *now = &r->routes;
    if (r->n_moves > 0)
        return err_set(r->err, ERR_RUN, "layer %d: a balancer sends weights for one layer, whose gradients would have "
                       "to be sent back: training does not model that", layer);
    if (routes_begin(&t->routes, now->n_tokens, &t->room_routes, r->err) < 0 ||
        routes_reserve(&t->routes, now->n, r->err) < 0)
        return r->err->code;
    if (t->room_to < now->n) {
        free(t->to);
        free(t->replica);
        t->to = malloc(sizeof *t->to * (size_t)now->n);
        t->replica = malloc(sizeof *t->replica * (size_t)now->n);
        t->room_to = t->to && t->replica ? now->n : 0;
        if (t->room_to == 0)
            return err_set(r->err, ERR_MEMORY, "out of memory for a layer's routes");
    }
    t->routes.n = now->n;
    t->routes.n_free = now->n_free;
    memcpy(t->routes.offset, now->offset, sizeof *now->offset * ((size_t)now->n_tokens + 1));
    memcpy(t->routes.expert, now->expert, sizeof *now->expert * (size_t)now->n);
    memcpy(t->routes.weight, now->weight, sizeof *now->weight * (size_t)now->n);
    memcpy(t->to, r->to, sizeof *r->to * (size_t)now->n);
    memcpy(t->replica, r->replica, sizeof *r->replica * (size_t)now->n);
    return 0;
}

/* The routes of a kept layer take the place of the current ones; calling it again changes them back. */
static void change_routes(struct run *r, int32_t layer)
{
    struct trained_layer *t = &r->trained[layer], now = { r->routes, r->room_routes, r->to, r->replica, r->room_to };
    r->routes = t->routes;
    r->room_routes = t->room_routes;
    r->to = t->to;
    r->replica = t->replica;
    r->room_to = t->room_to;
    *t = now;
}

/* ---- reduction ---- */

/* Copies of weights that all devices d = rank + i x stride hold, for every rank below stride; bytes of one copy. */
struct copies { int32_t stride; double bytes; };

struct list { struct moe_part *part; int32_t n, room; };

static int add_part(struct run *r, struct list *l, int32_t src, int32_t dst, double bytes)
{
    if (src == dst || bytes <= 0)
        return 0;
    if (l->n == l->room) {
        const int32_t room = l->room ? 2 * l->room : 256;
        struct moe_part *grown = realloc(l->part, sizeof *grown * (size_t)room);
        if (!grown)
            return err_set(r->err, ERR_MEMORY, "out of memory for gradients' exchanges");
        l->part = grown;
        l->room = room;
    }
    l->part[l->n++] = (struct moe_part){ .src = src, .dst = dst, .bytes = bytes };
    return 0;
}

/* One exchange after the one before and, the first time, after `after`'s tasks ([D]; NULL: none). Empties the list. */
static int reduce_exchange(struct run *r, struct list *l, const int32_t *after)
{
    if (l->n == 0)
        return 0;
    int32_t x = graph_exchange(&r->graph, &(struct moe_exchange){ MOE_PAY_BYTES, l->n, l->part }, r->err);
    l->n = 0;
    if (x < 0)
        return r->err->code;
    r->graph.task[x].collective = true;
    if (r->reduced >= 0)
        graph_after(&r->graph, x, r->reduced, r->err);
    for (int32_t d = 0; after && d < r->topology->n_devices && !r->err->code; d++)
        if (after[d] >= 0)
            graph_after(&r->graph, x, after[d], r->err);
    r->reduced = x;
    return r->err->code;
}

/* Devices of each node; 0: nodes differ. */
static int32_t node_size(const struct topology *t)
{
    for (int32_t n = 0; n < t->n_nodes; n++)
        if (t->first_device[n + 1] - t->first_device[n] != t->first_device[1])
            return 0;
    return t->first_device[1];
}

/* Devices of each node among the copies of one rank; 0: not as many in every node. */
static int32_t per_node(const struct run *r, int32_t stride)
{
    const int32_t per = node_size(r->topology);
    return stride < r->topology->n_devices && per > 0 && per % stride == 0 ? per / stride : 0;
}

static int inside_nodes(struct run *r, struct list *l, const struct copies *c, const int32_t *after)
{
    const int32_t per = node_size(r->topology), m = per_node(r, c->stride);
    for (int32_t src = 0; src < r->topology->n_devices; src++)
        for (int32_t dst = m > 1 ? src - src % per : 0; m > 1 && dst < src - src % per + per; dst++)
            if (src % c->stride == dst % c->stride && add_part(r, l, src, dst, c->bytes / m) < 0)
                return r->err->code;
    return reduce_exchange(r, l, after);
}

/* One way around: (n - 1) / n of a share. */
static int rings(struct run *r, struct list *l, const struct copies *c, const int32_t *after)
{
    const int32_t n = r->topology->n_devices, m = per_node(r, c->stride);
    const int32_t step = m > 0 ? node_size(r->topology) : c->stride, members = n / step;
    for (int32_t src = 0; src < n; src++)
        if (add_part(r, l, src, (src + step) % n, c->bytes / (m > 0 ? m : 1) * (members - 1) / members) < 0)
            return r->err->code;
    return reduce_exchange(r, l, after);
}

static int scatter(struct run *r, struct list *l, const struct copies *c, const int32_t *after)
{
    const bool first = per_node(r, c->stride) > 1;
    return inside_nodes(r, l, c, after) < 0 || rings(r, l, c, first ? NULL : after) < 0 ? r->err->code : 0;
}

static int gather(struct run *r, struct list *l, const struct copies *c, const int32_t *after)
{
    return rings(r, l, c, after) < 0 || inside_nodes(r, l, c, after) < 0 ? r->err->code : 0;
}

static int reduce_copies(struct run *r, struct list *l, const struct copies *c)
{
    if (scatter(r, l, c, r->entry) < 0)
        return r->err->code;
    return r->workload.shard_optimizer ? 0 : gather(r, l, c, NULL);
}

/* Of experts with several replicas, in one group or one in each (shards with those of the same place): around a ring,
 * once for a sum of which everybody keeps a share or for shares that everybody gets, twice for a sum that all keep. */
static int around_replicas(struct run *r, struct list *l, int32_t layer, double bytes_per_weight, int times)
{
    const struct moe_placement *p = &r->placed.view;
    const double bytes = run_expert_bytes(r) / r->model.weight_bytes * bytes_per_weight;
    for (int32_t e = 0; e < r->model.n_experts; e++) {
        const int32_t *at = &p->expert_first[(size_t)layer * (size_t)r->model.n_experts + (size_t)e];
        const int32_t n = at[1] - at[0], copies = n / r->etp;
        for (int32_t i = 0, j; i < n; i++) {
            const struct moe_replica *src = &p->replica[p->by_expert[at[0] + i]], *dst;
            for (j = (i + 1) % n; (dst = &p->replica[p->by_expert[at[0] + j]])->device % r->etp !=
                                  src->device % r->etp; j = (j + 1) % n)
                ;
            const double of_shard = bytes * (double)src->fraction;
            if (add_part(r, l, src->device, dst->device, times * of_shard * (copies - 1) / copies) < 0)
                return r->err->code;
        }
    }
    return 0;
}

static int reduce_replicas(struct run *r, struct list *l, int32_t layer)
{
    if (around_replicas(r, l, layer, r->workload.gradient_bytes, r->workload.shard_optimizer ? 1 : 2) < 0)
        return r->err->code;
    return reduce_exchange(r, l, r->entry);
}

static int reduce_layer(struct run *r, struct list *l, int32_t layer)
{
    const double g = r->workload.gradient_bytes;
    const int32_t dense = step_dense_before(r, layer);
    double split = memory_split_weights(r, dense, 1), whole = memory_whole_weights(r);
    if (layer == 0)
        split += memory_vocabulary(r) / 2; /* the embedding; the head's went first */
    if (r->tp == 1) {
        split += whole;
        whole = 0;
    }
    return reduce_copies(r, l, &(struct copies){ r->tp, split * g }) < 0 ||
           reduce_copies(r, l, &(struct copies){ 1, whole * g }) < 0 || reduce_replicas(r, l, layer) < 0
               ? r->err->code : 0;
}

/* ---- the way back ---- */

static int backward_layer(struct run *r, struct list *l, int32_t step, int32_t layer)
{
    int32_t shared[r->topology->n_devices];
    struct moe_batch b;
    if (workload_batch(&r->workload, step, layer, 0, &b, r->err) < 0)
        return r->err->code;
    r->graph.layer = layer;
    if (r->workload.recompute) {
        r->graph.pass = PASS_AGAIN;
        if (step_lay_out_again(r, &b, shared) < 0 || pipeline_lay_out_experts(r, &b, shared) < 0)
            return r->err->code;
    }
    r->graph.pass = PASS_BACKWARD;
    if (step_lay_out_shared(r, shared) < 0 || pipeline_lay_out_experts(r, &b, shared) < 0 ||
        step_lay_out_gate_backward(r, layer) < 0 || step_lay_out_attention(r) < 0)
        return r->err->code;
    for (int32_t i = 0; i < step_dense_before(r, layer); i++) {
        if (r->workload.recompute) {
            r->graph.pass = PASS_AGAIN;
            if (step_lay_out_attention(r) < 0 || step_lay_out_dense_ffn(r) < 0)
                return r->err->code;
            r->graph.pass = PASS_BACKWARD;
        }
        if (step_lay_out_dense_ffn(r) < 0 || step_lay_out_attention(r) < 0)
            return r->err->code;
    }
    return reduce_layer(r, l, layer);
}

/* Every weight's gradient, state and master copy read, all but the gradient written, and the working weight. */
static int update(struct run *r)
{
    const struct workload *w = &r->workload;
    for (int32_t d = 0; d < r->topology->n_devices; d++) {
        const double per = w->gradient_bytes + 2 * w->optimizer_bytes + r->model.weight_bytes;
        const double elements = memory_updated(r, d);
        struct kernels k = { .n = 1, .kernel = { { .precision = r->precision, .traffic = elements * per } } };
        if (step_after_entry(r, d, MOE_OP_OTHER, &k) < 0 ||
            (r->reduced >= 0 && graph_after(&r->graph, r->entry[d], r->reduced, r->err) < 0))
            return r->err->code;
    }
    return 0;
}

/* With sharded state, everybody gets what others have updated. */
static int gather_weights(struct run *r, struct list *l)
{
    const double split = memory_split_weights(r, step_dense_all(r), r->model.n_layers) + memory_vocabulary(r);
    const double whole = memory_whole_weights(r) * r->model.n_layers;
    const double w = r->model.weight_bytes;
    if (r->tp == 1 && gather(r, l, &(struct copies){ 1, (split + whole) * w }, r->entry) < 0)
        return r->err->code;
    if (r->tp > 1 && (gather(r, l, &(struct copies){ r->tp, split * w }, r->entry) < 0 ||
                      gather(r, l, &(struct copies){ 1, whole * w }, r->entry) < 0))
        return r->err->code;
    for (int32_t layer = 0; layer < r->model.n_layers; layer++)
        if (around_replicas(r, l, layer, w, 1) < 0)
            return r->err->code;
    return reduce_exchange(r, l, r->entry);
}

static int lay_out(struct run *r, struct list *l, int32_t step)
{
    r->graph.pass = PASS_BACKWARD;
    if (step_lay_out_head(r) < 0 ||
        reduce_copies(r, l, &(struct copies){ r->tp, memory_vocabulary(r) / 2 * r->workload.gradient_bytes }) < 0)
        return r->err->code;
    for (int32_t layer = r->model.n_layers - 1; layer >= 0; layer--) {
        change_routes(r, layer);
        int rc = backward_layer(r, l, step, layer);
        change_routes(r, layer);
        if (rc < 0)
            return rc;
    }
    if (update(r) < 0)
        return r->err->code;
    return r->workload.shard_optimizer ? gather_weights(r, l) : 0;
}

int train_lay_out(struct run *r, int32_t step)
{
    struct list l = { NULL, 0, 0 };
    r->reduced = -1;
    lay_out(r, &l, step);
    free(l.part);
    return r->err->code;
}
