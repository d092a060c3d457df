/* SPDX-License-Identifier: Apache-2.0
 * pipeline.c - one step of the model, top to bottom:
 *
 *   workload -> router -> balancers -> placement -> dispatch -> offload -> machine -> metrics
 *
 * Decisions for all layers of a step are made first and laid out as one task graph, so that what overlaps what is
 * the layout's choice; then the machine runs the graph. Nothing below calls up. */
#include "config.h"

#include "registry.h"
#include "run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A hash of what was decided: equal on every rank, with any number of jobs, on any machine. A word at a time: it
 * sees every route of every layer. */
static void hash_add(uint64_t *h, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    uint64_t word, hash = *h;
    for (; bytes >= sizeof word; p += sizeof word, bytes -= sizeof word) {
        memcpy(&word, p, sizeof word);
        hash = (hash ^ word) * UINT64_C(0x9E3779B97F4A7C15);
        hash ^= hash >> 32;
    }
    if (bytes > 0) {
        word = 0;
        memcpy(&word, p, bytes);
        hash = (hash ^ word) * UINT64_C(0x9E3779B97F4A7C15);
        hash ^= hash >> 32;
    }
    *h = hash;
}

/* Bytes that have to be gathered before anyone can decide: the header has them, nothing here sends them. */
int pipeline_charge(struct run *r, const struct policy *p, const struct moe_cost *own, struct moe_cost *sum)
{
    if (own->gathered == 0 && own->flops >= 0 && own->bytes >= 0 && isfinite(own->flops + own->bytes)) {
        sum->flops += own->flops;
        sum->bytes += own->bytes;
        return 0;
    }
    return err_set(r->err, ERR_RUN, "%s %s: deciding costs %g FLOPs, %g bytes and %g gathered bytes; expected none of "
                   "the last, which this version's pipeline does not carry, and no negative ones",
                   kind_name[p->plugin->kind], p->plugin->name, own->flops, own->bytes, own->gathered);
}

/* What a router or a balancer made of the routes: still of this batch, and valid. */
static int check_routes(struct run *r, const struct moe_batch *b, const struct policy *p)
{
    char who[128];
    snprintf(who, sizeof who, "%s %s, step %d, layer %d", kind_name[p->plugin->kind], p->plugin->name, b->step,
             b->layer);
    if (r->routes.n_tokens != b->n_tokens)
        return err_set(r->err, ERR_RUN, "%s: routes of %d tokens, expected %d", who, r->routes.n_tokens, b->n_tokens);
    /* The header has more than this version's pipeline carries; what it does not carry must not pass as plain. */
    const char *more = r->routes.form != MOE_TOKENS ? "slots or merged experts (form)"
                     : r->routes.slot || r->routes.n_slots ? "tokens and slots at once (slot)"
                     : r->routes.skip && r->trained ? "tokens that skip the layer (skip), in training"
                     : r->routes.layer ? "experts of other layers (layer)"
                     : r->routes.again ? "another round in the same layer (again)" : NULL;
    if (more)
        return err_set(r->err, ERR_RUN, "%s: routes with %s, which this version's pipeline does not carry", who, more);
    return routes_check(&r->routes, moe_experts_of(&r->model, b->layer), who, r->err);
}

static bool rewrites(const struct run *r)
{
    bool any = false;
    for (int i = 0; i < r->n_balancers; i++)
        any |= r->balancer[i].plugin->ops.balancer.rewrite != NULL;
    return any;
}

/* Somebody looks at scores: a balancer, the offload policy, or a machine that chooses again. */
static bool scores_wanted(const struct run *r)
{
    bool any = (r->offload.plugin->needs & MOE_NEEDS_SCORES) || r->graph.keep_scores;
    for (int i = 0; i < r->n_balancers; i++)
        any |= r->balancer[i].plugin->ops.balancer.rewrite || r->balancer[i].plugin->ops.balancer.adjust;
    return any;
}

static int route_layer(struct run *r, const struct moe_batch *b, struct moe_cost *sum)
{
    const struct moe_router_ops *router = &r->router.plugin->ops.router;
    const int32_t n_columns = r->model.n_experts + r->max_free;
    struct moe_cost own = { 0, 0, 0 };
    for (int32_t e = 0; e < n_columns; e++) {
        r->bias.add[e] = 0;
        r->bias.scale[e] = 1;
    }
    bool scored = router->score && router->select && (!router->route || scores_wanted(r));
    if (scored && HOOK(&r->router, router, score, b, r->scores, &own) < 0)
        return r->err->code;
    const float *scores = r->gate_scores = scored ? r->scores : b->router_logits;
    const struct moe_bias *bias = NULL; /* nobody asks for anything */
    for (int i = 0; i < r->n_balancers; i++) {
        struct moe_cost each = { 0, 0, 0 };
        bias = r->balancer[i].plugin->ops.balancer.adjust ? &r->bias : bias;
        if (r->balancer[i].plugin->ops.balancer.adjust &&
            (HOOK(&r->balancer[i], balancer, adjust, b, scores, &r->bias, &each) < 0 ||
             pipeline_charge(r, &r->balancer[i], &each, sum) < 0))
            return r->err->code;
    }
    if (routes_begin(&r->routes, b->n_tokens, &r->room_routes, r->err) < 0)
        return r->err->code;
    if (scored)
        HOOK(&r->router, router, select, b, r->scores, bias, &r->routes);
    else
        HOOK(&r->router, router, route, b, bias, &r->routes, &own);
    if (r->err->code || pipeline_charge(r, &r->router, &own, sum) < 0 || check_routes(r, b, &r->router) < 0)
        return r->err->code;
    if (routing_chosen(&r->routing, b, &r->routes, rewrites(r), &r->metrics.routing, r->err) < 0)
        return r->err->code;
    for (int i = 0; i < r->n_balancers; i++) {
        struct moe_cost each = { 0, 0, 0 };
        if (!r->balancer[i].plugin->ops.balancer.rewrite)
            continue;
        if (HOOK(&r->balancer[i], balancer, rewrite, b, scores, &r->placed.view, &r->routes, &each) < 0 ||
            pipeline_charge(r, &r->balancer[i], &each, sum) < 0 ||
            check_routes(r, b, &r->balancer[i]) < 0)
            return r->err->code;
    }
    routing_rewritten(&r->routing, &r->routes, &r->metrics.routing);
    return 0;
}

/* Tokens per expert, before anything is placed; what a token costs. */
static void count_experts(struct run *r, const struct moe_batch *b, const struct moe_cost *own)
{
    const int32_t n_experts = moe_experts_of(&r->model, b->layer);
    const double gate = r->router.plugin->needs & MOE_OWN_GATE ? 0 : 2.0 * r->model.d_model * n_experts;
    int64_t n = 0, n_shared = 0, left_out = 0;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        const int skip = r->routes.skip ? r->routes.skip[t] : 0;
        n_shared += !(skip & MOE_HALF_EXPERTS);
        left_out += !!(skip & MOE_HALF_ATTENTION) + !!(skip & MOE_HALF_EXPERTS);
    }
    memset(r->load, 0, sizeof *r->load * (size_t)r->model.n_experts);
    for (int64_t i = 0; i < r->routes.n; i++)
        if (r->routes.expert[i] < n_experts) { /* the others are null, zero, copy, constant */
            r->load[r->routes.expert[i]]++;
            n++;
        }
    routing_layer(&r->routing, b->layer, n_experts, r->load, &r->metrics.routing);
    r->metrics.routing.computed += n;
    r->metrics.routing.tokens += b->n_tokens;
    r->metrics.routing.flops += own->flops + b->n_tokens * gate +
                                6.0 * r->model.d_model * r->model.d_expert *
                                    ((double)n + (double)n_shared * r->model.n_shared);
    r->metrics.routing.left_out += left_out;
    r->metrics.routing.skips |= r->routes.skip != NULL;
}

static void count_devices(struct run *r)
{
    const int32_t n_devices = r->topology->n_devices;
    int64_t most = 0, sum = 0;
    memset(r->device_load, 0, sizeof *r->device_load * (size_t)n_devices);
    for (int64_t i = 0; i < r->routes.n; i++) {
        int32_t first, n = run_holders(r, i, &first); /* shards are equal: rows are as good as work */
        for (int32_t d = first; d < first + n; d++)
            r->device_load[d]++;
    }
    for (int32_t d = 0; d < n_devices; d++) {
        most = r->device_load[d] > most ? r->device_load[d] : most;
        sum += r->device_load[d];
    }
    r->metrics.imbalance_sum += sum > 0 ? (double)most * n_devices / (double)sum : 1;
}

/* A plan's weights leave once every gate has spoken; experts on a device that gets some wait for them. */
static int lay_out_moves(struct run *r, int32_t first_task)
{
    if (r->n_moves == 0)
        return 0;
    const int32_t n_tasks = r->graph.n_tasks, n_devices = r->topology->n_devices;
    int32_t arrival[n_devices];
    int32_t x = graph_exchange(&r->graph, &(struct moe_exchange){ MOE_PAY_BYTES, r->n_moves, r->moves }, r->err);
    if (x >= 0)
        r->graph.task[x].moves_weights = true;
    for (int32_t d = 0; d < n_devices && !r->err->code; d++) {
        arrival[d] = -1;
        graph_after(&r->graph, x, r->entry[d], r->err);
    }
    for (int32_t m = 0; m < r->n_moves && !r->err->code; m++)
        if (arrival[r->moves[m].dst] < 0)
            arrival[r->moves[m].dst] = graph_arrival(&r->graph, x, r->moves[m].dst, r->err);
    for (int32_t t = first_task; t < n_tasks && !r->err->code; t++)
        if (r->graph.task[t].kind == TASK_EXPERTS && arrival[r->graph.task[t].device] >= 0)
            graph_after(&r->graph, t, arrival[r->graph.task[t].device], r->err);
    return r->err->code;
}

static void keep_needs(struct run *r, const struct moe_batch *b)
{
    const size_t key = (size_t)b->layer + (size_t)r->model.n_layers * (size_t)r->graph.pass;
    struct layer_needs *needs = &r->needs_of[key * (size_t)r->topology->n_devices];
    for (int32_t d = 0; d < r->topology->n_devices; d++)
        needs[d] = (struct layer_needs){ .entry = r->entry[d], .exit = r->exit[d] };
    for (int32_t t = 0; t < b->n_tokens; t++)
        for (int64_t i = r->routes.offset[t]; i < r->routes.offset[t + 1]; i++) {
            int32_t first, n = run_holders(r, i, &first);
            for (int32_t d = first; d < first + n; d++) {
                needs[d].at_home |= d == b->device[t];
                needs[d].foreign += d != b->device[t] ? (double)run_shard(r) : 0;
            }
        }
}

int pipeline_lay_out_experts(struct run *r, const struct moe_batch *b, const int32_t *shared)
{
    const int32_t n_devices = r->topology->n_devices;
    struct moe_traffic traffic = {
        .step = b->step, .layer = b->layer, .micro = 0, .n_micro = 1, .backward = r->graph.pass == PASS_BACKWARD,
        .routes = &r->routes, .device = b->device, .to = r->to, .holders = r->etp > 1 ? r->replica : NULL,
        .n_shards = r->etp, .n_groups = r->edp, .placement = &r->placed.view,
        .dispatch_bytes = r->model.d_model * r->model.act_bytes,
        .combine_bytes = r->model.d_model * r->model.combine_bytes,
        .entry = r->entry, .exit = r->exit, .leaves = r->leaves,
    };
    const int32_t first_task = r->graph.n_tasks;
    int64_t first_edge = r->graph.n_edges;
    for (int32_t d = 0; d < n_devices; d++)
        r->exit[d] = -1;
    memcpy(r->leaves, b->device, sizeof *r->leaves * (size_t)b->n_tokens);
    tally_layer(&r->tally, !r->recording && r->machine.ops->reduce ? &r->machine : NULL);
    r->context.tally = &r->tally;
    HOOK(&r->dispatch, dispatch, lay_out, &traffic, &r->graph);
    r->context.tally = NULL;
    if (r->err->code)
        return r->err->code;
    for (int32_t t = 0; t < b->n_tokens; t++)
        if (r->leaves[t] != b->device[t])
            return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: token %d leaves on device %d instead of %d "
                           "(leaves), which this version's pipeline does not carry", r->dispatch.plugin->name,
                           b->layer, t, r->leaves[t], b->device[t]);
    for (int32_t d = 0; d < n_devices; d++)
        if (r->exit[d] < 0 || r->exit[d] >= r->graph.n_tasks)
            return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: exit[%d] is task %d, expected 0 to %d",
                           r->dispatch.plugin->name, b->layer, d, r->exit[d], r->graph.n_tasks - 1);
    if (layout_check(r, b, first_task, first_edge) < 0 || lay_out_moves(r, first_task) < 0)
        return r->err->code;
    keep_needs(r, b);
    if (r->offloading && offload_expand(r, b, first_task, first_edge) < 0)
        return r->err->code;
    for (int32_t d = 0; d < n_devices; d++) {
        r->entry[d] = r->exit[d];
        if (shared[d] < 0)
            continue;
        int32_t join = graph_join(&r->graph, r->err);
        if (join < 0 || graph_after(&r->graph, join, r->exit[d], r->err) < 0 ||
            graph_after(&r->graph, join, shared[d], r->err) < 0)
            return r->err->code;
        r->entry[d] = join;
    }
    return 0;
}

static int lay_out_layer(struct run *r, const struct moe_batch *b, const struct moe_cost *own)
{
    int32_t shared[r->topology->n_devices];
    r->graph.layer = b->layer;
    if (r->graph.keep_items &&
        (graph_keep_routes(&r->graph, &r->routes, b->device, r->err) < 0 ||
         graph_keep_scores(&r->graph, b->n_free == 0 ? r->gate_scores : NULL, r->model.n_experts, r->err) < 0))
        return r->err->code;
    if (step_lay_out_plain(r, b, own, shared) < 0 || pipeline_lay_out_experts(r, b, shared) < 0)
        return r->err->code;
    return r->trained ? train_keep(r, b->layer) : 0;
}

/* The weights that a new placement moves travel before the step begins: nothing can run on them earlier. */
static int lay_out_migration(struct run *r)
{
    for (int32_t d = 0; d < r->topology->n_devices; d++)
        r->entry[d] = -1;
    if (r->n_migration == 0)
        return 0;
    int32_t x = graph_exchange(&r->graph, &(struct moe_exchange){ MOE_PAY_BYTES, r->n_migration, r->migration },
                               r->err);
    for (int32_t d = 0; d < r->topology->n_devices && x >= 0; d++)
        r->entry[d] = x;
    if (x >= 0)
        r->graph.task[x].moves_weights = true;
    r->n_migration = 0;
    return r->err->code;
}

static int observe_layer(struct run *r, int32_t layer)
{
    const struct moe_routes *now = &r->routes, *before = layer > 0 ? &r->before : NULL;
    for (int32_t t = 0; r->window.load && t < now->n_tokens; t++)
        statistics_add(&r->window, layer, now->expert + now->offset[t], now->offset[t + 1] - now->offset[t],
                       before ? before->expert + before->offset[t] : NULL,
                       before ? before->offset[t + 1] - before->offset[t] : 0);
    for (int i = 0; i < r->n_balancers; i++)
        if (r->balancer[i].plugin->ops.balancer.observe &&
            HOOK(&r->balancer[i], balancer, observe, layer, r->load) < 0)
            return r->err->code;
    return 0;
}

static void keep_as_previous(struct run *r)
{
    struct moe_routes swap = r->before;
    int32_t room = r->room_before;
    r->before = r->routes;
    r->before.skip = NULL; /* the router's own, and its next call writes there */
    r->room_before = r->room_routes;
    r->routes = swap;
    r->room_routes = room;
}

/* Durations of the step before, for dispatch policies that adapt. */
static int observe_step(struct run *r, int32_t step)
{
    if (!r->dispatch.plugin->ops.dispatch.observe)
        return 0;
    const int32_t at = r->metrics.n_steps - 1; /* not `step`: warm-up steps are forgotten */
    const char *phase[] = { metric_info[METRIC_a2a_s].name, metric_info[METRIC_experts_s].name,
                            metric_info[METRIC_step_s].name };
    double seconds[] = { r->metrics.value[METRIC_a2a_s][at], r->metrics.value[METRIC_experts_s][at],
                         r->metrics.value[METRIC_step_s][at] };
    struct moe_timings timings = { .step = step, .n_phases = 3, .phase = phase, .seconds = seconds };
    return HOOK(&r->dispatch, dispatch, observe, &timings);
}

static int run_once(struct run *r, int32_t step, int (*run)(struct machine *, struct moe_graph *, struct err *))
{
    const double began = r->machine.now;
    if (run(&r->machine, &r->graph, r->err) < 0)
        return err_prefix(r->err, "machine %s, step %d", r->machine.ops->name, step);
    if (!r->graph.keep_items && layout_times(r) < 0)
        return r->err->code;
    r->metrics.queue_s = r->machine.queue_s;
    r->metrics.padding = r->machine.graphs ? r->machine.padding : -1;
    return metrics_step(&r->metrics, &r->graph, r->topology, r->workload.n_tokens, r->machine.now - began,
                        r->machine.joules, r->err);
}

/* Where times are real the first does not count: pages, caches and connections are new to it. */
static int run_graph(struct run *r, int32_t step)
{
    const struct machine_ops *ops = r->machine.ops;
    int rc = run_once(r, step, ops->run);
    for (int32_t i = 0; ops->again && i < r->n_repetitions && rc == 0; i++)
        rc = run_once(r, step, ops->again);
    return rc < 0 ? rc : metrics_end_step(&r->metrics, ops->again ? r->n_repetitions : 0, r->err);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int pipeline_step(struct run *r, int32_t step)
{
    const double began = now_s();
    graph_reset(&r->graph);
    workload_step(&r->workload);
    if (lay_out_migration(r) < 0)
        return r->err->code;
    for (int32_t layer = 0; layer < r->model.n_layers; layer++) {
        struct moe_batch b;
        struct moe_cost own = { 0, 0, 0 };
        if (workload_batch(&r->workload, step, layer, r->needs, &b, r->err) < 0)
            return r->err->code;
        b.previous = layer > 0 ? &r->before : NULL;
        b.placement = &r->placed.view;
        b.n_free = r->n_free[layer];
        if (route_layer(r, &b, &own) < 0)
            return r->err->code;
        if (r->workload.gate && gate_stage_layer(r, &b) < 0)
            return r->err->code;
        count_experts(r, &b, &own);
        if (placement_assign(r, &b, &own) < 0)
            return r->err->code;
        count_devices(r);
        hash_add(&r->decisions, r->routes.offset, sizeof *r->routes.offset * ((size_t)b.n_tokens + 1));
        hash_add(&r->decisions, r->routes.expert, sizeof *r->routes.expert * (size_t)r->routes.n);
        if (r->routes.skip)
            hash_add(&r->decisions, r->routes.skip, (size_t)b.n_tokens);
        hash_add(&r->decisions, r->etp > 1 ? r->replica : r->to, sizeof *r->to * (size_t)r->routes.n);
        if (lay_out_layer(r, &b, &own) < 0 || observe_layer(r, layer) < 0)
            return r->err->code;
        keep_as_previous(r);
    }
    if (r->workload.gate && gate_stage_step(r, step) < 0)
        return r->err->code;
    routing_step(&r->routing, r->model.n_layers, &r->metrics.routing);
    if (step_lay_out_head(r) < 0 || (r->trained && train_lay_out(r, step) < 0))
        return r->err->code;
    if (r->recording)
        return placement_observe(r, step);
    r->metrics.decide_s = r->machine.ops->again ? now_s() - began : 0;
    return run_graph(r, step) < 0 || observe_step(r, step) < 0 ? r->err->code : placement_observe(r, step);
}
