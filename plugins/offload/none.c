/* SPDX-License-Identifier: Apache-2.0
 * none.c - no offload: every expert of a device stays in its memory.
 *
 * Source:  field practice
 * Differs: nothing
 * Cost:    nothing
 *
 * The core asks for an eviction only when a cache is full. With this policy that means the experts do not fit, which
 * is reported as a failure of the run, never papered over. */
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

static int insert(void *self, int32_t device, uint32_t object, const struct moe_access *access)
{
    (void)self, (void)device, (void)object, (void)access;
    return MOE_OK;
}

static int evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                 uint32_t *victim)
{
    const struct moe_env *env = ((const struct state *)self)->env;
    (void)pinned, (void)victim;
    return env->host->fail(env, MOE_EFAIL,
                           "device %d: layer %d expert %d does not fit beside the %lld experts there is room for, "
                           "and offload \"none\" evicts nothing: choose an offload policy or a larger cache",
                           device, cause->layer, cause->expert, (long long)env->cache_objects);
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_OFFLOAD,
    .name = "none",
    .summary = "all experts resident: evicts nothing, fails when they do not fit",
    .source = "field practice",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.offload = {.insert = insert, .evict = evict},
};
