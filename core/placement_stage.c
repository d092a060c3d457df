/* SPDX-License-Identifier: Apache-2.0
 * placement_stage.c - places experts, chooses the replica of every route, applies plans, and moves weights when a
 * placement changes. */
#include "config.h"

#include "memory.h"
#include "run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t object_of(const struct run *r, int32_t layer, int32_t expert)
{
    return (size_t)layer * (size_t)r->model.n_experts + (size_t)expert;
}

static int choose(struct run *r, struct placement *out, const struct moe_stats *stats, const char *who)
{
    placement_reset(out);
    if (HOOK(&r->placement, placement, place, stats, &out->view) < 0 ||
        placement_finish(out, &r->model, who, r->err) < 0)
        return r->err->code;
    for (int32_t i = 0; i < out->view.n; i++)
        if (out->replica[i].fraction < 1)
            return err_set(r->err, ERR_RUN, "%s: places %g of layer %d's expert %d on device %d; expected whole "
                           "experts: layout.experts.etp is what splits them", who, (double)out->replica[i].fraction,
                           out->replica[i].layer, out->replica[i].expert, out->replica[i].device);
    return 0;
}

static int place(struct run *r, struct placement *out, const struct moe_stats *stats)
{
    char who[96];
    snprintf(who, sizeof who, "placement %s", r->placement.plugin->name);
    if (!run_grouped(r))
        return choose(r, out, stats, who) < 0 ? r->err->code : device_memory_check(r, &out->view);
    struct placement chosen = { 0 }; /* stats may point into the one before */
    if (choose(r, &chosen, stats, who) < 0) {
        placement_free(&chosen);
        return r->err->code;
    }
    placement_free(&r->chosen);
    r->chosen = chosen;
    return groups_expand(r, out, who) < 0 ? r->err->code : device_memory_check(r, &out->view);
}

int placement_start(struct run *r)
{
    struct statistics profile;
    char who[400];
    snprintf(who, sizeof who, "%s: placement %s", r->where, r->placement.plugin->name);
    const uint32_t needs = r->placement.plugin->needs;
    if (statistics_open(&profile, &r->model, needs, who, r->err) == 0) {
        workload_profile(&r->workload, &profile);
        struct moe_stats stats = { .step = 0, .n_steps = 1 };
        statistics_view(&profile, &stats);
        place(r, &r->placed, &stats);
    }
    statistics_free(&profile);
    statistics_free(&r->window);
    r->window_steps = 0;
    if (!r->err->code && r->placement.plugin->ops.placement.due)
        statistics_open(&r->window, &r->model, needs, who, r->err);
    return r->err->code;
}

/* The layer's replicas, as chosen, by (expert, node), lowest device first: near[near_first[expert * N + node]...]. */
static int list_near(struct run *r, int32_t layer)
{
    const struct placement *p = run_chosen(r);
    const struct moe_topology *view = &run_placing(r)->view;
    const size_t n_nodes = (size_t)view->n_nodes, n_experts = (size_t)r->model.n_experts;
    const int32_t begin = p->layer_first[layer], end = p->layer_first[layer + 1], *node = view->node;
    if (!r->near_first)
        r->near_first = malloc(sizeof *r->near_first * (n_experts * n_nodes + 2));
    int32_t *near = realloc(r->near, sizeof *near * ((size_t)(end - begin) + 1));
    if (near)
        r->near = near;
    if (!r->near_first || !near)
        return err_set(r->err, ERR_MEMORY, "out of memory for %d replicas", end - begin);
    int32_t *first = r->near_first + 1; /* filling moves every start to its end */
    memset(r->near_first, 0, sizeof *first * (n_experts * n_nodes + 2));
    for (int32_t i = begin; i < end; i++)
        first[(size_t)p->replica[i].expert * n_nodes + (size_t)node[p->replica[i].device] + 1]++;
    for (size_t i = 1; i <= n_experts * n_nodes; i++)
        first[i] += first[i - 1];
    const int32_t *of_expert = p->expert_first + object_of(r, layer, 0);
    for (size_t x = 0; x < n_experts; x++)
        for (int32_t i = of_expert[x]; i < of_expert[x + 1]; i++)
            near[first[x * n_nodes + (size_t)node[p->replica[p->by_expert[i]].device]]++] = p->by_expert[i];
    return 0;
}

/* The replica on the token's device, else one on its node, else any: in turn where there are several. turn: of the
 * token's group. */
static int32_t nearest_replica(struct run *r, size_t object, int32_t expert, int32_t device, uint32_t *turns)
{
    const struct placement *p = run_chosen(r);
    const struct moe_topology *view = &run_placing(r)->view;
    const int32_t *all = p->by_expert + p->expert_first[object];
    const int32_t n = p->expert_first[object + 1] - p->expert_first[object];
    if (n == 1)
        return all[0];
    const size_t at = (size_t)expert * (size_t)view->n_nodes + (size_t)view->node[device];
    const int32_t *near = r->near + r->near_first[at], n_near = r->near_first[at + 1] - r->near_first[at];
    for (int32_t i = 0; i < n_near; i++)
        if (p->replica[near[i]].device == device)
            return near[i];
    const uint32_t turn = turns[object]++;
    return n_near > 0 ? near[turn % (uint32_t)n_near] : all[turn % (uint32_t)n];
}

/* Whether the plan can be carried out: rows that exist, on devices that hold the expert or are sent it. */
static int check_plan(struct run *r, int32_t layer, const struct moe_plan *plan, const char *who)
{
    const int32_t n_experts = r->model.n_experts, n_devices = r->topology->n_devices;
    const struct placement *p = &r->placed;
    if (plan->n_splits < 0 || plan->n_splits > plan->max_splits || plan->n_moves < 0 ||
        plan->n_moves > plan->max_moves)
        return err_set(r->err, ERR_RUN, "%s: plans %d splits and %d moves, there is room for %d and %d", who,
                       plan->n_splits, plan->n_moves, plan->max_splits, plan->max_moves);
    uint8_t *holds = calloc((size_t)n_experts * (size_t)n_devices, 1);
    if (!holds)
        return err_set(r->err, ERR_MEMORY, "out of memory for a plan");
    for (int32_t i = p->layer_first[layer]; i < p->layer_first[layer + 1]; i++)
        holds[(size_t)p->replica[i].expert * (size_t)n_devices + (size_t)p->replica[i].device] = 1;
    for (int32_t m = 0; m < plan->n_moves && !r->err->code; m++) {
        const struct moe_weight_move *x = &plan->move[m];
        if (x->expert < 0 || x->expert >= n_experts || x->src < 0 || x->src >= n_devices || x->dst < 0 ||
            x->dst >= n_devices || !(holds[(size_t)x->expert * (size_t)n_devices + (size_t)x->src] & 1))
            err_set(r->err, ERR_RUN, "%s: move %d sends expert %d from device %d, which does not hold it, to %d", who,
                    m, x->expert, x->src, x->dst);
        else
            holds[(size_t)x->expert * (size_t)n_devices + (size_t)x->dst] |= 2;
    }
    for (int32_t s = 0; s < plan->n_splits && !r->err->code; s++) {
        const struct moe_split *x = &plan->split[s];
        if (x->expert < 0 || x->expert >= n_experts || x->device < 0 || x->device >= n_devices || x->from < 0 ||
            x->to > r->load[x->expert] || x->from > x->to)
            err_set(r->err, ERR_RUN, "%s: split %d sends rows %lld to %lld of expert %d to device %d", who, s,
                    (long long)x->from, (long long)x->to, x->expert, x->device);
        else if (!holds[(size_t)x->expert * (size_t)n_devices + (size_t)x->device])
            err_set(r->err, ERR_RUN, "%s: split %d sends expert %d to device %d, which neither holds it nor is sent it",
                    who, s, x->expert, x->device);
    }
    free(holds);
    return r->err->code;
}

/* Sends rows where the plan wants them; where splits overlap the last one counts. */
static int apply_plan(struct run *r, const struct moe_plan *plan)
{
    const int32_t n_experts = r->model.n_experts;
    int64_t *row = calloc((size_t)n_experts, sizeof *row); /* rows of each expert seen so far */
    int32_t *first = calloc((size_t)n_experts + 2, sizeof *first); /* into by_expert; counting sort */
    int32_t *by_expert = malloc(sizeof *by_expert * ((size_t)plan->n_splits + 1));
    if (!row || !first || !by_expert) {
        err_set(r->err, ERR_MEMORY, "out of memory for a plan");
        goto out;
    }
    for (int32_t s = 0; s < plan->n_splits; s++)
        first[plan->split[s].expert + 2]++;
    for (int32_t x = 2; x < n_experts + 2; x++)
        first[x] += first[x - 1];
    for (int32_t s = 0; s < plan->n_splits; s++)
        by_expert[first[plan->split[s].expert + 1]++] = s;
    for (int64_t i = 0; i < r->routes.n; i++) {
        int32_t expert = r->routes.expert[i];
        if (r->to[i] < 0)
            continue;
        int64_t at = row[expert]++;
        for (int32_t j = first[expert]; j < first[expert + 1]; j++) {
            const struct moe_split *x = &plan->split[by_expert[j]];
            if (at >= x->from && at < x->to)
                r->to[i] = x->device;
        }
    }
out:
    free(row);
    free(first);
    free(by_expert);
    return r->err->code;
}

/* With offload the weights lie in host memory, and what arrives would have to become resident. */
static int refuse_moves(struct run *r)
{
    return err_set(r->err, ERR_RUN, "offload %s: weights move between devices (a new placement, or a plan), which this "
                   "version's pipeline does not combine with offload", r->offload.plugin->name);
}

static int keep_moves(struct run *r, const struct moe_plan *plan)
{
    if (plan->n_moves == 0)
        return 0;
    if (r->offloading)
        return refuse_moves(r);
    double bytes = run_expert_bytes(r);
    struct moe_part *part = realloc(r->moves, sizeof *part * (size_t)(r->n_moves + plan->n_moves));
    if (!part)
        return err_set(r->err, ERR_MEMORY, "out of memory for a plan");
    r->moves = part;
    for (int32_t m = 0; m < plan->n_moves; m++)
        part[r->n_moves++] = (struct moe_part){ plan->move[m].src, plan->move[m].dst, bytes, 0, NULL, 0 };
    return 0;
}

static int run_plans(struct run *r, const struct moe_batch *b, struct moe_cost *sum)
{
    r->n_moves = 0;
    for (int i = 0; i < r->n_balancers && !r->err->code; i++) {
        struct policy *p = &r->balancer[i];
        if (!p->plugin->ops.balancer.plan)
            continue;
        char who[128];
        struct moe_cost own = { 0, 0, 0 };
        snprintf(who, sizeof who, "balancer %s, layer %d", p->plugin->name, b->layer);
        int64_t room = (int64_t)r->model.n_experts * r->topology->n_devices;
        struct moe_plan plan = { .max_splits = (int32_t)room, .max_moves = (int32_t)room,
                                 .split = malloc(sizeof *plan.split * (size_t)room),
                                 .move = malloc(sizeof *plan.move * (size_t)room) };
        if (room > INT32_MAX || !plan.split || !plan.move)
            err_set(r->err, ERR_MEMORY, "out of memory for a plan");
        else if (HOOK(p, balancer, plan, b->layer, r->load, &r->placed.view, &plan, &own) == 0 &&
                 pipeline_charge(r, p, &own, sum) == 0 &&
                 check_plan(r, b->layer, &plan, who) == 0 && apply_plan(r, &plan) == 0 && keep_moves(r, &plan) == 0)
            device_memory_moves(r, who);
        free(plan.split);
        free(plan.move);
    }
    return r->err->code;
}

int placement_assign(struct run *r, const struct moe_batch *b, struct moe_cost *sum)
{
    int64_t n = r->routes.n;
    if (n > r->room_to) {
        int32_t *to = realloc(r->to, sizeof *to * (size_t)n);
        if (to)
            r->to = memory_large(to, sizeof *to * (size_t)n);
        int32_t *replica = realloc(r->replica, sizeof *replica * (size_t)n);
        if (replica)
            r->replica = memory_large(replica, sizeof *replica * (size_t)n);
        if (!to || !replica)
            return err_set(r->err, ERR_MEMORY, "out of memory for %lld routes", (long long)n);
        r->room_to = n;
    }
    bool chosen = r->placement.plugin->ops.placement.select != NULL;
    const struct placement *from = run_chosen(r);
    struct moe_batch seen;
    groups_batch(r, b, &seen);
    if (chosen && HOOK(&r->placement, placement, select, &seen, &r->routes, &from->view, r->replica) < 0)
        return r->err->code;
    if (!chosen && list_near(r, b->layer) < 0)
        return r->err->code;
    const int32_t n_experts = moe_experts_of(&r->model, b->layer);
    for (int32_t t = 0; t < b->n_tokens; t++) {
        uint32_t *turns = r->turn + (size_t)(b->device[t] / (r->ep * r->etp)) * r->context.n_objects;
        for (int64_t i = r->routes.offset[t]; i < r->routes.offset[t + 1]; i++) {
            int32_t expert = r->routes.expert[i];
            if (expert >= n_experts) { /* null, zero, copy, constant */
                r->to[i] = r->replica[i] = -1;
                continue;
            }
            if (!chosen)
                r->replica[i] = nearest_replica(r, object_of(r, b->layer, expert), expert, seen.device[t], turns);
            int32_t id = r->replica[i];
            if (id < 0 || id >= from->view.n || from->replica[id].layer != b->layer ||
                from->replica[id].expert != expert)
                return err_set(r->err, ERR_RUN, "placement %s, layer %d, token %d: select chose replica %d, which "
                               "does not hold expert %d", r->placement.plugin->name, b->layer, t, id, expert);
            r->replica[i] = groups_replica(r, id, b->device[t]);
            r->to[i] = r->etp > 1 ? MOE_SHARDED : r->placed.replica[r->replica[i]].device;
        }
    }
    return run_plans(r, b, sum);
}

/* Whether replica i is the first of its expert on its device: a second one there costs no transfer. */
static bool comes_first(const struct placement *p, size_t object, int32_t i)
{
    for (int32_t j = p->expert_first[object]; j < p->expert_first[object + 1]; j++)
        if (p->by_expert[j] < i && p->replica[p->by_expert[j]].device == p->replica[i].device)
            return false;
    return true;
}

/* How good a source of weights a holder is: the device itself, one of its node, of its group, any. */
static int nearness(const struct run *r, int32_t src, int32_t dst)
{
    const int32_t *node = r->context.view.node, group = r->ep * r->etp;
    return src == dst ? 3 : node[src] == node[dst] ? 2 : src / group == dst / group;
}

/* Which weights a device holds afterwards and did not before; each comes from the nearest old holder, of the same shard
 * if they have shards. */
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
            if (d % r->etp == x->device % r->etp &&
                (src < 0 || nearness(r, d, x->device) > nearness(r, src, x->device)))
                src = d;
        }
        if (src != x->device && comes_first(&r->placed, o, i))
            part[r->n_migration++] = (struct moe_part){ src, x->device, bytes * (double)x->fraction, 0, NULL, 0 };
    }
    return 0;
}

int placement_observe(struct run *r, int32_t step)
{
    r->window_steps++;
    if (!r->placement.plugin->ops.placement.due)
        return 0;
    struct moe_stats stats = { .step = step, .n_steps = r->window_steps, .current = &run_chosen(r)->view };
    statistics_view(&r->window, &stats);
    bool rebalance = false;
    if (HOOK(&r->placement, placement, due, &stats, &rebalance) < 0 || !rebalance)
        return r->err->code;
    if (r->offloading)
        return refuse_moves(r);
    struct placement old = r->placed;
    memset(&r->placed, 0, sizeof r->placed);
    stats.current = run_grouped(r) ? &r->chosen.view : &old.view;
    if (place(r, &r->placed, &stats) == 0)
        plan_migration(r, &old);
    placement_free(&old);
    statistics_reset(&r->window);
    r->window_steps = 0;
    return r->err->code;
}
