/* SPDX-License-Identifier: Apache-2.0
 * replay.c - experts and weights exactly as the captured model chose them.
 *
 * Source:  field practice (also known as routing replay)
 * Differs: nothing
 * Cost:    O(T K) copies; no device time of its own: the captured model's gate is laid out by the core */
#include <moelab.h>

#include <string.h>

struct state {
    const struct moe_env *env;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    ((struct state *)self)->env = env;
    return MOE_OK;
}

/* The bias is not looked at: what was recorded stays. */
static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct moe_env *env = ((const struct state *)self)->env;
    const struct moe_routes *in = batch->recorded;
    (void)bias, (void)own;
    if (in->form != MOE_TOKENS || in->combine != NULL || in->layer != NULL || in->skip != NULL)
        return env->host->fail(env, MOE_EUNSUPPORTED,
                               "layer %d: only plain recorded routes can be replayed, not slots, merged experts, "
                               "combine weights or skipped blocks", batch->layer);
    int rc = env->host->routes_reserve(env, out, in->n);
    if (rc < 0)
        return rc;
    memcpy(out->offset, in->offset, ((size_t)batch->n_tokens + 1) * sizeof *out->offset);
    if (in->n > 0) {
        memcpy(out->expert, in->expert, (size_t)in->n * sizeof *out->expert);
        memcpy(out->weight, in->weight, (size_t)in->n * sizeof *out->weight);
    }
    out->n = in->n;
    out->n_free = in->n_free;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_RECORDED,
    .name = "replay",
    .summary = "experts and weights as recorded in the trace",
    .source = "field practice",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.route = route},
};
