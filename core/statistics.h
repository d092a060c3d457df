/* SPDX-License-Identifier: Apache-2.0
 * statistics.h - what was routed: the counts that placements decide on, of recorded requests or of steps so far. */
#ifndef STATISTICS_H
#define STATISTICS_H

#include "err.h"
#include "moelab.h"

struct statistics {
    int32_t n_layers, n_experts;
    double *load;         /* [L][E] */
    double *transitions;  /* [L-1][E][E] or NULL: nobody needs them */
    double *coactivation; /* [L][E][E] or NULL */
};

/* needs: of the placement (MOE_NEEDS_TRANSITIONS, MOE_NEEDS_COACTIVATION); `who` starts messages. */
int statistics_open(struct statistics *, const struct moe_model *, uint32_t needs, const char *who, struct err *);
void statistics_free(struct statistics *);
void statistics_reset(struct statistics *);
/* One token's experts in a layer and (NULL in the first) in the layer before; ids from E on are skipped. */
void statistics_add(struct statistics *, int32_t layer, const int32_t *now, int64_t n_now, const int32_t *before,
                    int64_t n_before);
/* Fills the counts of *out. */
void statistics_view(const struct statistics *, struct moe_stats *out);

#endif
