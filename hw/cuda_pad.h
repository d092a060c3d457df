/* SPDX-License-Identifier: Apache-2.0
 * cuda_pad.h - sizes that are padded, so that steps with other routes are the same calls.
 *
 * A captured step can be launched again only if every size in it is the same. So each size that routing decides is
 * rounded up, by at most an eighth, and then to the largest that the same place of any step so far had. Places have
 * keys that name them by what they are and not by how many came before, so that a step without one does not move the
 * others. */
#ifndef CUDA_PAD_H
#define CUDA_PAD_H

#include "err.h"
#include "graph.h"

#include <stdbool.h>

/* Open addressing; keys are not 0. */
struct cuda_table { uint64_t *key; double *value; size_t n, room; };

struct cuda_pad {
    bool on;
    struct cuda_table most;
    int32_t *number;        /* [tasks] among those of its layer, kind, device and purpose */
    int64_t rows, padding;  /* of experts, in this plan; those of them that mean nothing */
};

enum cuda_padded { PAD_EXPERT, PAD_EXPERTS, PAD_ROWS, PAD_STAY, PAD_COMBINE, PAD_FLOPS, PAD_BYTES };

/* Before a plan: numbers its tasks. */
int cuda_pad_begin(struct cuda_pad *, const struct moe_graph *, struct err *);
/* n, or what it is padded to: of a task, a rank (-1: all), and the place-th of its kind there. */
double cuda_pad(struct cuda_pad *, const struct moe_graph *, int32_t task, enum cuda_padded, int32_t rank,
                int32_t place, double n, struct err *);
void cuda_pad_free(struct cuda_pad *);
/* Up to 8 powers of two; above them, the next number with four leading bits. */
double cuda_pad_round(double n);

#endif
