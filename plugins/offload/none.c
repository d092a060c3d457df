/* SPDX-License-Identifier: Apache-2.0
 * none.c - no offload: every expert of a device stays in its memory.
 *
 * Source:  field practice
 * Differs: nothing
 * Cost:    nothing
 *
 * There is nothing to decide, so there are no hooks: a policy that neither inserts nor evicts tells the core that all
 * is resident, and the core refuses the run when it does not fit. */
#include <moelab.h>

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_OFFLOAD,
    .name = "none",
    .summary = "all experts resident: refused when they do not fit",
    .source = "field practice",
};
