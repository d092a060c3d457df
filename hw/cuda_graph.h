/* SPDX-License-Identifier: Apache-2.0
 * cuda_graph.h - steps as CUDA graphs: what a plan queues is captured once, and launched again for every step that
 * would queue the same calls. What differs between such steps (which rows, which weights) lies in the device's memory
 * and is uploaded before. */
#ifndef CUDA_GRAPH_H
#define CUDA_GRAPH_H

#include "err.h"
#include "graph.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cuda;

enum { CUDA_GRAPHS = 16 }; /* kept; then the one that was not launched for longest goes */

struct cuda_bytes { unsigned char *at; size_t n, room; };

struct cuda_graphs {
    bool capturing;
    struct cuda_kept { struct cuda_bytes calls; cudaGraphExec_t graph; int64_t used; } kept[CUDA_GRAPHS];
    int32_t n, now;         /* now: of the current plan, -1: it has none yet */
    int64_t captured, launched;
    struct cuda_bytes calls; /* of the current plan: everything that is part of its graph */
    /* While it is captured streams wait for these, since events with times cannot be waited for. */
    cudaEvent_t *done;      /* [n_done] one for each operation, then one for each stream, then the start */
    int64_t n_done;
};

/* The current plan as a graph that is launched on its first stream: captured, if none of those kept is the same. */
int cuda_graph_run(struct cuda *, const struct moe_graph *, struct err *);
/* The plan is another. */
void cuda_graph_forget(struct cuda *);
void cuda_graph_free(struct cuda *);

#endif
