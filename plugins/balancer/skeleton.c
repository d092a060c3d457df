/* SPDX-License-Identifier: Apache-2.0
 * skeleton.c - a balancer to start from: makes experts that had too much a little less attractive. It works as it
 * stands.
 *
 * Source:  field practice
 * Differs: nothing
 * Cost:    O(E) per layer and step
 *
 * To make your own: copy this file to NAME.c, rename the plugin below, build it with
 *     cc -std=c11 -shared -fPIC $(pkg-config --cflags moelab) NAME.c -o NAME.so
 * and put it in a directory balancer/ under $MOELAB_PLUGIN_PATH. Every hook is optional, at least one has to be there;
 * delete those that you do not need: one that is absent costs nothing. */
#include <moelab.h>

struct conf {
    double rate; /* set before init from the table below: defaults, the scenario, --set */
};

static const struct moe_param params[] = {
    {"rate", MOE_REAL, offsetof(struct conf, rate), 0.001, 0, 1, NULL, "score",
     "how much an expert above or below the mean load is moved per step"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    float *shift; /* [L][E] */
};

/* Optional, as is fini. Once per run. `self` is zeroed and state_size long; conf and env stay valid for the run. */
static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    s->env = env;
    s->conf = conf;
    s->shift = env->host->alloc(env, (size_t)env->model->n_layers * (size_t)env->model->n_experts, sizeof *s->shift);
    return s->shift != NULL ? MOE_OK : MOE_ENOMEM; /* alloc has already said so */
}

/* Optional. Per layer and micro-batch, before selection, and only with a router that has scores: [T][E]. The router
 * selects on scale * score + add; its weights keep the score. Several balancers add up in the scenario's order. */
static int adjust(void *self, const struct moe_batch *batch, const float *scores, struct moe_bias *bias,
                  struct moe_cost *own)
{
    const struct state *s = self;
    const float *shift = s->shift + (size_t)batch->layer * (size_t)s->env->model->n_experts;
    (void)scores, (void)own;
    for (int32_t e = 0; e < batch->n_experts; e++)
        bias->add[e] += shift[e];
    return MOE_OK;
}

/* Optional. Per layer and micro-batch, after selection: may drop routes (shrink a token's list and move the rest up),
 * send them elsewhere or add some. Routes stay token-major; the core checks them again. Here: nothing to do. */
static int rewrite(void *self, const struct moe_batch *batch, const float *scores,
                   const struct moe_placement *placement, struct moe_routes *routes, struct moe_cost *own)
{
    (void)self, (void)batch, (void)scores, (void)placement, (void)routes, (void)own;
    return MOE_OK;
}

/* Optional. Per layer, after placement: rows from..to of an expert's tokens are computed on another device, and which
 * weights travel there first. Rows that no split names stay. Here: all stay. */
static int plan(void *self, int32_t layer, const int64_t *load, const struct moe_placement *placement,
                struct moe_plan *out, struct moe_cost *own)
{
    (void)self, (void)layer, (void)load, (void)placement, (void)own;
    out->n_splits = out->n_moves = 0;
    return MOE_OK;
}

/* Optional. Once per layer and step, after routing. load: [E] tokens of the step. */
static int observe(void *self, int32_t layer, const int64_t *load)
{
    const struct state *s = self;
    int32_t n_experts = moe_experts_of(s->env->model, layer);
    float *shift = s->shift + (size_t)layer * (size_t)s->env->model->n_experts;
    int64_t total = 0;
    for (int32_t e = 0; e < n_experts; e++)
        total += load[e];
    for (int32_t e = 0; e < n_experts; e++) {
        int64_t above = load[e] * n_experts - total;
        shift[e] -= (float)s->conf->rate * (float)((above > 0) - (above < 0));
    }
    return MOE_OK;
}

/* The hook that this policy does without (signature in moelab.h):
 *   loss     optional: a loss and its gradient, for the trainable gate */

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_CROSS_BATCH, /* later steps of one request depend on the loads of all */
    .name = "skeleton",       /* has to be the file's stem */
    .summary = "a policy to start from: nudges scores towards even loads",
    .source = "field practice",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .fini = NULL,
    .ops.balancer = {.adjust = adjust, .rewrite = rewrite, .plan = plan, .observe = observe},
};
