/* SPDX-License-Identifier: Apache-2.0
 * placement_stage.c - places experts, chooses the replica of every route, applies plans, and moves weights when a
 * placement changes. */
#include "config.h"

#include "run.h"

#include <stdlib.h>
#include <string.h>

static size_t object_of(const struct run *r, int32_t layer, int32_t expert)
{
    return (size_t)layer * (size_t)r->model.n_experts + (size_t)expert;
}

static int place(struct run *r, struct placement *out, const struct moe_stats *stats)
{
    char who[96];
    snprintf(who, sizeof who, "placement %s", r->placement.plugin->name);
    placement_reset(out);
    if (HOOK(&r->placement, placement, place, stats, &out->view) < 0 ||
        placement_finish(out, &r->model, who, r->err) < 0)
        return r->err->code;
    for (int32_t i = 0; i < out->view.n; i++)
        if (out->replica[i].fraction < 1)
            return err_set(r->err, ERR_RUN, "%s: places %g of layer %d's expert %d on device %d; dispatch %s carries "
                           "whole experts only", who, (double)out->replica[i].fraction, out->replica[i].layer,
                           out->replica[i].expert, out->replica[i].device, r->dispatch.plugin->name);
    return 0;
}

int placement_start(struct run *r)
{
    size_t n_experts = (size_t)r->model.n_experts, n_layers = (size_t)r->model.n_layers;
    double *load = calloc(n_layers * n_experts, sizeof *load);
    double *transitions = n_layers > 1 ? calloc((n_layers - 1) * n_experts * n_experts, sizeof *transitions) : NULL;
    if (!load || (n_layers > 1 && !transitions)) {
        err_set(r->err, ERR_MEMORY, "out of memory for %zu layers of %zu experts", n_layers, n_experts);
    } else {
        workload_profile(&r->workload, load, transitions);
        struct moe_stats stats = { .step = 0, .n_steps = 1, .load = load, .transitions = transitions };
        place(r, &r->placed, &stats);
    }
    free(load);
    free(transitions);
    return r->err->code;
}

/* The replica on the token's device, else one on its node, else any: in turn where there are several. */
static int32_t nearest_replica(struct run *r, size_t object, int32_t device)
{
    const struct placement *p = &r->placed;
    const int32_t *node = r->context.view.node, *id = p->by_expert + p->expert_first[object];
    int32_t n = p->expert_first[object + 1] - p->expert_first[object], n_near = 0;
    if (n == 1)
        return id[0];
    for (int32_t i = 0; i < n; i++) {
        if (p->replica[id[i]].device == device)
            return id[i];
        n_near += node[p->replica[id[i]].device] == node[device];
    }
    int32_t turn = (int32_t)(r->turn[object]++ % (uint32_t)(n_near > 0 ? n_near : n));
    for (int32_t i = 0;; i++)
        if ((n_near == 0 || node[p->replica[id[i]].device] == node[device]) && turn-- == 0)
            return id[i];
}

static int apply_plan(struct run *r, const struct moe_batch *b, const struct moe_plan *plan, const char *name)
{
    int64_t *row = calloc((size_t)r->model.n_experts, sizeof *row); /* rows of each expert seen so far */
    if (!row)
        return err_set(r->err, ERR_MEMORY, "out of memory for a plan");
    for (int32_t s = 0; s < plan->n_splits; s++) {
        const struct moe_split *x = &plan->split[s];
        if (x->expert < 0 || x->expert >= r->model.n_experts || x->device < 0 ||
            x->device >= r->topology->n_devices || x->from < 0 || x->to > r->load[x->expert] || x->from > x->to) {
            free(row);
            return err_set(r->err, ERR_RUN, "balancer %s, layer %d: split %d sends rows %lld to %lld of expert %d to "
                           "device %d", name, b->layer, s, (long long)x->from, (long long)x->to, x->expert,
                           x->device);
        }
    }
    for (int64_t i = 0; i < r->routes.n; i++) {
        int32_t expert = r->routes.expert[i];
        if (expert >= r->model.n_experts)
            continue;
        int64_t at = row[expert]++;
        for (int32_t s = 0; s < plan->n_splits; s++)
            if (plan->split[s].expert == expert && at >= plan->split[s].from && at < plan->split[s].to)
                r->to[i] = plan->split[s].device;
    }
    free(row);
    return 0;
}

static int keep_moves(struct run *r, const struct moe_plan *plan)
{
    double bytes = run_expert_bytes(r);
    struct moe_part *part = realloc(r->moves, sizeof *part * (size_t)(r->n_moves + plan->n_moves));
    if (!part)
        return err_set(r->err, ERR_MEMORY, "out of memory for a plan");
    r->moves = part;
    for (int32_t m = 0; m < plan->n_moves; m++)
        part[r->n_moves++] = (struct moe_part){ plan->move[m].src, plan->move[m].dst, bytes, 0, NULL };
    return 0;
}

static int run_plans(struct run *r, const struct moe_batch *b)
{
    r->n_moves = 0;
    for (int i = 0; i < r->n_balancers && !r->err->code; i++) {
        struct policy *p = &r->balancer[i];
        if (!p->plugin->ops.balancer.plan)
            continue;
        int32_t room = r->model.n_experts * r->topology->n_devices;
        struct moe_plan plan = { .max_splits = room, .max_moves = room,
                                 .split = malloc(sizeof *plan.split * (size_t)room),
                                 .move = malloc(sizeof *plan.move * (size_t)room) };
        if (!plan.split || !plan.move)
            err_set(r->err, ERR_MEMORY, "out of memory for a plan");
        else if (HOOK(p, balancer, plan, b->layer, r->load, &r->placed.view, &plan) == 0 &&
                 apply_plan(r, b, &plan, p->plugin->name) == 0 && plan.n_moves > 0)
            keep_moves(r, &plan);
        free(plan.split);
        free(plan.move);
    }
    return r->err->code;
}

int placement_assign(struct run *r, const struct moe_batch *b)
{
    int64_t n = r->routes.n;
    if (n > r->room_to) {
        int32_t *to = realloc(r->to, sizeof *to * (size_t)n);
        if (to)
            r->to = to;
        int32_t *replica = realloc(r->replica, sizeof *replica * (size_t)n);
        if (replica)
            r->replica = replica;
        if (!to || !replica)
            return err_set(r->err, ERR_MEMORY, "out of memory for %lld routes", (long long)n);
        r->room_to = n;
    }
    bool chosen = r->placement.plugin->ops.placement.select != NULL;
    if (chosen && HOOK(&r->placement, placement, select, b, &r->routes, &r->placed.view, r->replica) < 0)
        return r->err->code;
    for (int32_t t = 0; t < b->n_tokens; t++)
        for (int64_t i = r->routes.offset[t]; i < r->routes.offset[t + 1]; i++) {
            int32_t expert = r->routes.expert[i];
            if (expert >= r->model.n_experts) { /* null, zero, copy, constant */
                r->to[i] = -1;
                continue;
            }
            if (!chosen)
                r->replica[i] = nearest_replica(r, object_of(r, b->layer, expert), b->device[t]);
            int32_t id = r->replica[i];
            if (id < 0 || id >= r->placed.view.n || r->placed.replica[id].layer != b->layer ||
                r->placed.replica[id].expert != expert)
                return err_set(r->err, ERR_RUN, "placement %s, layer %d, token %d: select chose replica %d, which "
                               "does not hold expert %d", r->placement.plugin->name, b->layer, t, id, expert);
            r->to[i] = r->placed.replica[id].device;
        }
    return run_plans(r, b);
}

/* Which weights a device holds afterwards and did not before; each comes from the nearest old holder. */
static int plan_migration(struct run *r, const struct placement *old)
{
    double bytes = run_expert_bytes(r);
    r->n_migration = 0;
    struct moe_part *part = realloc(r->migration, sizeof *part * (size_t)r->placed.view.n);
    if (!part)
        return err_set(r->err, ERR_MEMORY, "out of memory for a migration");
    r->migration = part;
    for (int32_t i = 0; i < r->placed.view.n; i++) {
        const struct moe_replica *x = &r->placed.replica[i];
        size_t o = object_of(r, x->layer, x->expert);
        int32_t src = -1;
        for (int32_t j = old->expert_first[o]; j < old->expert_first[o + 1]; j++) {
            int32_t d = old->replica[old->by_expert[j]].device;
            if (src < 0 || d == x->device ||
                (src != x->device && r->context.view.node[d] == r->context.view.node[x->device] &&
                 r->context.view.node[src] != r->context.view.node[x->device]))
                src = d;
        }
        if (src != x->device)
            part[r->n_migration++] = (struct moe_part){ src, x->device, bytes, 0, NULL };
    }
    return 0;
}

int placement_observe(struct run *r, int32_t step)
{
    r->window_steps++;
    if (!r->placement.plugin->ops.placement.due)
        return 0;
    struct moe_stats stats = { .step = step, .n_steps = r->window_steps, .load = r->window_load,
                               .current = &r->placed.view };
    bool rebalance = false;
    if (HOOK(&r->placement, placement, due, &stats, &rebalance) < 0 || !rebalance)
        return r->err->code;
    struct placement old = r->placed;
    memset(&r->placed, 0, sizeof r->placed);
    stats.current = &old.view;
    if (place(r, &r->placed, &stats) == 0)
        plan_migration(r, &old);
    placement_free(&old);
    memset(r->window_load, 0, sizeof *r->window_load * (size_t)r->model.n_layers * (size_t)r->model.n_experts);
    r->window_steps = 0;
    return r->err->code;
}
