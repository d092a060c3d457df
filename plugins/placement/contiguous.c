/* SPDX-License-Identifier: Apache-2.0
 * contiguous.c - expert e of E on device e * D / E: neighbours stay together.
 *
 * Source:  field practice: the default layout of expert parallelism
 * Differs: nothing
 * Cost:    O(L E) */
#include <moelab.h>

struct state {
    const struct moe_env *env;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    ((struct state *)self)->env = env;
    return MOE_OK;
}

static int place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct moe_env *env = ((const struct state *)self)->env;
    (void)stats;
    for (int32_t layer = 0; layer < env->model->n_layers; layer++) {
        int32_t n_experts = moe_experts_of(env->model, layer);
        for (int32_t e = 0; e < n_experts; e++) {
            int32_t device = (int32_t)((int64_t)e * env->topology->n_devices / n_experts);
            int rc = env->host->place(env, out, layer, e, device, 1);
            if (rc < 0)
                return rc;
        }
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_PLACEMENT,
    .name = "contiguous",
    .summary = "expert e of E on device e * D / E",
    .source = "field practice",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.placement = {.place = place},
};
