/* SPDX-License-Identifier: Apache-2.0
 * expert_groups.c - layouts in which not every device is a place of its own for experts.
 *
 *   device = (group x ep + slot) x etp + shard      ep x etp x edp devices
 *
 * Each of the edp groups holds all experts and computes its own devices' tokens. The etp devices of a slot hold the
 * same experts, 1 / etp of their width each. A placement decides for one group, whose slots are its devices; every
 * group gets the same, shard after shard, so that a replica's shards follow each other in `placed`. */
#include "config.h"

#include "run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Slots as if all their devices were like the least in that place of any group: the slowest shard is waited for, and
 * the smallest has to hold its share. */
static void fill_figures(const struct run *r, const double *of_device, double *of_slot)
{
    for (int32_t s = 0; s < r->ep; s++) {
        double least = INFINITY;
        for (int32_t g = 0; g < r->edp; g++)
            for (int32_t i = 0; i < r->etp; i++)
                least = fmin(least, of_device[(g * r->ep + s) * r->etp + i]);
        of_slot[s] = r->etp * least;
    }
}

int groups_open(struct run *r)
{
    if (!run_grouped(r))
        return 0;
    const struct moe_topology *all = &r->context.view;
    const size_t n = (size_t)r->ep;
    int32_t *node = malloc(sizeof *node * n), n_nodes = 0;
    double *figures = malloc(sizeof *figures * n * 5);
    r->slots = r->context;
    r->slots.stride = r->etp;
    r->slots.view = (struct moe_topology){ .n_devices = r->ep, .node = node, .memory = figures, .flops = figures + n,
                                           .mem_bandwidth = figures + 2 * n, .host_bandwidth = figures + 3 * n,
                                           .expert_room = figures + 4 * n };
    free(r->token_slot);
    r->token_slot = malloc(sizeof *r->token_slot * (size_t)r->workload.n_tokens);
    if (!node || !figures || !r->token_slot)
        return err_set(r->err, ERR_MEMORY, "out of memory for %d slots", r->ep);
    for (int32_t s = 0; s < r->ep; s++) { /* numbered as they come */
        const int32_t d = s * r->etp;
        node[s] = -1;
        for (int32_t before = 0; before < s && node[s] < 0; before++)
            if (all->node[before * r->etp] == all->node[d])
                node[s] = node[before];
        if (node[s] < 0)
            node[s] = n_nodes++;
    }
    r->slots.view.n_nodes = n_nodes;
    fill_figures(r, all->memory, figures);
    fill_figures(r, all->flops, figures + n);
    fill_figures(r, all->mem_bandwidth, figures + 2 * n);
    fill_figures(r, all->host_bandwidth, figures + 3 * n);
    fill_figures(r, all->expert_room, figures + 4 * n);
    return 0;
}

void groups_close(struct run *r)
{
    policy_context_free(&r->slots);
}

/* What does not go with groups or shards, by name. */
int groups_check(struct run *r)
{
    for (int i = 0; run_grouped(r) && i < r->n_balancers; i++)
        if (r->balancer[i].plugin->ops.balancer.plan)
            return err_set(r->err, ERR_INPUT, "%s: balancer %s: plans which device computes which rows of all tokens, "
                           "and layout.experts (ep %d, etp %d) keeps tokens in %d groups and experts in %d shards: "
                           "expected ep = the number of devices and etp 1", r->where, r->balancer[i].plugin->name,
                           r->ep, r->etp, r->edp, r->etp);
    if (r->etp > 1 && r->offloading)
        return err_set(r->err, ERR_INPUT, "%s: offload %s: brings and drops whole experts, and layout.experts.etp "
                       "splits each over %d devices: expected etp 1, or offload none", r->where,
                       r->offload.plugin->name, r->etp);
    return 0;
}

int groups_expand(struct run *r, struct placement *out, const char *who)
{
    const struct moe_placement *chosen = &r->chosen.view;
    const int64_t n = (int64_t)chosen->n * r->edp * r->etp;
    struct moe_replica *all = n <= INT32_MAX ? malloc(sizeof *all * (size_t)n) : NULL;
    placement_free(out);
    if (!all)
        return err_set(r->err, ERR_MEMORY, "out of memory for %lld replicas", (long long)n);
    out->replica = all;
    out->room = (int32_t)n;
    for (int32_t l = 0; l < r->model.n_layers; l++)
        for (int32_t g = 0; g < r->edp; g++)
            for (int32_t i = chosen->layer_first[l]; i < chosen->layer_first[l + 1]; i++)
                for (int32_t s = 0; s < r->etp; s++) {
                    const struct moe_replica *x = &chosen->replica[i];
                    all[out->view.n++] = (struct moe_replica){ x->layer, x->expert,
                                                               (g * r->ep + x->device) * r->etp + s, run_shard(r) };
                }
    return placement_finish(out, &r->model, who, r->err);
}

void groups_batch(struct run *r, const struct moe_batch *b, struct moe_batch *out)
{
    *out = *b;
    if (!run_grouped(r))
        return;
    for (int32_t t = 0; t < b->n_tokens; t++)
        r->token_slot[t] = b->device[t] / r->etp % r->ep;
    out->device = r->token_slot;
    out->placement = &r->chosen.view;
}

int32_t groups_replica(const struct run *r, int32_t chosen, int32_t device)
{
    if (!run_grouped(r))
        return chosen;
    const int32_t *first = r->chosen.layer_first + r->chosen.replica[chosen].layer, group = device / (r->ep * r->etp);
    return (first[0] * r->edp + group * (first[1] - first[0]) + chosen - first[0]) * r->etp;
}
