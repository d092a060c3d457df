/* SPDX-License-Identifier: Apache-2.0
 * none.c - leaves the router's decisions as they are.
 *
 * Source:  field practice
 * Differs: nothing
 * Cost:    nothing */
#include <moelab.h>

/* A balancer has at least one hook; this one is told the loads and does nothing with them. */
static int observe(void *self, int32_t layer, const int64_t *load)
{
    (void)self, (void)layer, (void)load;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .name = "none",
    .summary = "leaves the router's decisions as they are",
    .source = "field practice",
    .ops.balancer = {.observe = observe},
};
