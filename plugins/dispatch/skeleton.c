/* SPDX-License-Identifier: Apache-2.0
 * skeleton.c - a dispatch to start from: every row travels on its own, there and back. It works as it stands.
 *
 * Source:  field practice
 * Differs: nothing
 * Cost:    O(D E n): simple, not fast
 *
 * To make your own: copy this file to NAME.c, rename the plugin below, build it with
 *     cc -std=c11 -shared -fPIC $(pkg-config --cflags moelab) NAME.c -o NAME.so
 * and put it in a directory dispatch/ under $MOELAB_PLUGIN_PATH. Delete the hooks that you do not need: one that is
 * absent costs nothing.
 *
 * A layout says what has to happen and what waits for what; the machine decides how long it takes. The builders copy
 * what they are given. */
#include <moelab.h>

struct conf {
    bool permute; /* set before init from the table below: defaults, the scenario, --set */
};

static const struct moe_param params[] = {
    {"permute", MOE_BOOL, offsetof(struct conf, permute), 1, 0, 1, NULL, "",
     "charge the copy of rows into send order"},
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

/* One exchange with a part per route: to the expert's device, or back to the token's. */
static int32_t exchange(const struct moe_env *env, const struct moe_traffic *in, bool back, const int64_t *item,
                        struct moe_graph *g)
{
    struct moe_exchange x = {.payload = back ? MOE_PAY_OUTPUT : MOE_PAY_HIDDEN};
    struct moe_part *part = env->host->scratch(env, ((size_t)in->routes->n + 1) * sizeof *part);
    if (part == NULL)
        return MOE_ENOMEM; /* scratch has already said so */
    for (int32_t t = 0; t < in->routes->n_tokens; t++) {
        for (int64_t i = in->routes->offset[t]; i < in->routes->offset[t + 1]; i++) {
            int32_t src = back ? in->to[i] : in->device[t], dst = back ? in->device[t] : in->to[i];
            double bytes = back ? in->combine_bytes : in->dispatch_bytes;
            if (in->to[i] == MOE_SHARDED)
                return env->host->fail(env, MOE_EUNSUPPORTED, "layer %d: expert %d is sharded", in->layer,
                                       in->routes->expert[i]);
            if (in->to[i] >= 0) /* a part that stays where it is carries its item and 0 bytes */
                part[x.n_parts++] = (struct moe_part){src, dst, src == dst ? 0 : bytes, 1, item + i, 0};
        }
    }
    x.part = part;
    return env->host->task_exchange(env, g, &x);
}

/* The experts of one device, or a task that does nothing when it has none. Items are in the order of the experts. */
static int32_t experts(const struct moe_env *env, const struct moe_traffic *in, int32_t device, struct moe_graph *g)
{
    int32_t n_experts = moe_experts_of(env->model, in->layer), n = 0;
    int32_t *expert = env->host->scratch(env, (size_t)n_experts * sizeof *expert);
    int64_t *rows = env->host->scratch(env, (size_t)n_experts * sizeof *rows);
    int64_t *items = env->host->scratch(env, ((size_t)in->routes->n + 1) * sizeof *items), n_items = 0;
    if (expert == NULL || rows == NULL || items == NULL)
        return MOE_ENOMEM;
    for (int32_t e = 0; e < n_experts; e++) {
        int64_t before = n_items;
        for (int64_t i = 0; i < in->routes->n; i++)
            if (in->to[i] == device && in->routes->expert[i] == e)
                items[n_items++] = i;
        if (n_items > before) {
            expert[n] = e;
            rows[n++] = n_items - before;
        }
    }
    if (n == 0)
        return env->host->task_compute(env, g, &(struct moe_work){.device = device, .op = MOE_OP_OTHER});
    return env->host->task_experts(env, g,
                                   &(struct moe_expert_work){.device = device, .layer = in->layer, .n = n,
                                                             .expert = expert, .rows = rows, .items = items,
                                                             .fraction = 1});
}

/* Required. Per layer and micro-batch. In: where tokens are (device), where routes are computed (to, -1 for those that
 * cost nothing), and for each device the task after which its tokens are ready (entry). Out: for each device the task
 * after which they are complete (exit). The core has the last word: every route with a device has to be computed there
 * once. Attention, gate and shared experts are the core's and not laid out here. */
static int lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const struct moe_host *host = env->host;
    int64_t *item = host->scratch(env, ((size_t)in->routes->n + 1) * sizeof *item);
    if (item == NULL)
        return MOE_ENOMEM;
    for (int64_t i = 0; i < in->routes->n; i++)
        item[i] = i;
    int32_t there = exchange(env, in, false, item, g), back = there < 0 ? there : exchange(env, in, true, item, g);
    if (back < 0)
        return back;
    for (int32_t d = 0; d < env->topology->n_devices; d++) {
        double bytes = 0, combine_bytes = 0; /* of this device's rows, read and written */
        for (int32_t t = 0; t < in->routes->n_tokens; t++) {
            if (in->device[t] == d) {
                int64_t n_routes = in->routes->offset[t + 1] - in->routes->offset[t];
                bytes += 2 * in->dispatch_bytes * (double)n_routes * s->conf->permute;
                combine_bytes += in->combine_bytes * (double)(n_routes + 1);
            }
        }
        int32_t permute = host->task_compute(env, g, &(struct moe_work){.device = d, .op = MOE_OP_PERMUTE,
                                                                        .bytes = bytes});
        int32_t arrived = host->task_arrival(env, g, there, d), work = experts(env, in, d, g);
        int32_t returned = host->task_arrival(env, g, back, d);
        int32_t combine = host->task_compute(env, g, &(struct moe_work){.device = d, .op = MOE_OP_COMBINE,
                                                                        .bytes = combine_bytes});
        if (permute < 0 || arrived < 0 || work < 0 || returned < 0 || combine < 0)
            return MOE_EFAIL; /* the builder has already said why */
        int rc = host->task_after(env, g, permute, in->entry[d]);
        if (rc == MOE_OK)
            rc = host->task_after(env, g, there, permute); /* the exchange starts when every device is ready */
        if (rc == MOE_OK)
            rc = host->task_after(env, g, work, arrived);
        if (rc == MOE_OK)
            rc = host->task_after(env, g, back, work);
        if (rc == MOE_OK)
            rc = host->task_after(env, g, combine, returned);
        if (rc < 0)
            return rc;
        in->exit[d] = combine;
    }
    return MOE_OK;
}

/* Optional. Once per step: how long the phases of the step before took, for layouts that adapt. Here: ignored. */
static int observe(void *self, const struct moe_timings *timings)
{
    (void)self, (void)timings;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_DISPATCH,
    .needs = 0,
    .name = "skeleton", /* has to be the file's stem */
    .summary = "a policy to start from: every row travels on its own",
    .source = "field practice",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .fini = NULL,
    .ops.dispatch = {.lay_out = lay_out, .observe = observe},
};
