/* SPDX-License-Identifier: Apache-2.0
 * skeleton.c - a placement to start from: deals the experts out from the most to the least loaded. It works as it
 * stands.
 *
 * Source:  field practice
 * Differs: nothing
 * Cost:    O(L E^2): simple, not fast
 *
 * To make your own: copy this file to NAME.c, rename the plugin below, build it with
 *     cc -std=c11 -shared -fPIC $(pkg-config --cflags moelab) NAME.c -o NAME.so
 * and put it in a directory placement/ under $MOELAB_PLUGIN_PATH. Delete the hooks that you do not need: one that is
 * absent costs nothing. */
#include <moelab.h>

struct conf {
    int64_t interval; /* set before init from the table below: defaults, the scenario, --set */
};

static const struct moe_param params[] = {
    {"interval", MOE_INT, offsetof(struct conf, interval), 0, 0, 1 << 30, NULL, "steps",
     "place anew every so many steps; 0: once"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

/* Optional, as is fini. Once per run. `self` is zeroed and state_size long; conf and env stay valid for the run. */
static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    s->env = env;
    s->conf = conf;
    return MOE_OK;
}

/* How many experts of the layer have more load than e; equal ones count by index. */
static int32_t rank_of(const double *load, int32_t n_experts, int32_t e)
{
    int32_t rank = 0;
    for (int32_t i = 0; i < n_experts; i++)
        rank += load[i] > load[e] || (load[i] == load[e] && i < e);
    return rank;
}

/* Required. Before the first step and whenever due() says so. stats->load is [L][E] tokens routed in the last
 * stats->n_steps steps: all zero before the first. Every expert of every layer needs a replica on a real device, or
 * shards whose fractions add up to 1. The order of place() calls is the physical order. The core has the last word:
 * it checks coverage, and counts and times the weights that have to move. */
static int place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    for (int32_t layer = 0; layer < env->model->n_layers; layer++) {
        const double *load = stats->load + (size_t)layer * (size_t)env->model->n_experts;
        int32_t n_experts = moe_experts_of(env->model, layer);
        for (int32_t e = 0; e < n_experts; e++) {
            int32_t device = rank_of(load, n_experts, e) % env->topology->n_devices;
            int rc = env->host->place(env, out, layer, e, device, 1);
            if (rc < 0)
                return rc; /* place has already said why */
        }
    }
    return MOE_OK;
}

/* Optional. Per layer and micro-batch: which replica serves each route; replica[i] indexes placement->replica and has
 * to hold the route's expert (the core checks). Without it: the replica on the token's device, else on its node, else
 * in turn. Here: always the first. */
static int select(void *self, const struct moe_batch *batch, const struct moe_routes *routes,
                  const struct moe_placement *placement, int32_t *replica)
{
    const struct moe_model *model = ((const struct state *)self)->env->model;
    const int32_t *first = placement->expert_first + (size_t)batch->layer * (size_t)model->n_experts;
    for (int64_t i = 0; i < routes->n; i++)
        replica[i] = routes->expert[i] < batch->n_experts ? placement->by_expert[first[routes->expert[i]]] : -1;
    return MOE_OK;
}

/* Optional. Once per step: place anew? Without it: never, after the first. */
static int due(void *self, const struct moe_stats *stats, bool *rebalance)
{
    const struct conf *conf = ((const struct state *)self)->conf;
    *rebalance = conf->interval > 0 && stats->step > 0 && stats->step % conf->interval == 0;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_PLACEMENT,
    .needs = 0,
    .name = "skeleton", /* has to be the file's stem */
    .summary = "a policy to start from: deals experts out by load",
    .source = "field practice",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .fini = NULL,
    .ops.placement = {.place = place, .select = select, .due = due},
};
