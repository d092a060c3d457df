/* SPDX-License-Identifier: Apache-2.0
 * host.h - what the program and the module hw/host.so say to each other.
 *
 * MPI and OpenBLAS are linked into the module alone, so that moelab runs where they are missing. The module needs no
 * symbol of the program: it carries its own graph.c and err.c, and shares nothing but the layouts compared below. */
#ifndef HOST_H
#define HOST_H

#include "graph.h"
#include "host_calibrate.h"
#include "machine.h"

enum { HOST_ABI = 3 };

struct host_module {
    uint32_t abi, size;                  /* first for ever: HOST_ABI, sizeof(struct host_module) */
    uint32_t machine_size, graph_size, task_size, model_size;
    /* Becomes a rank. m->rank and m->priv are set; m->verify says whether outputs are checked. */
    int (*open)(struct machine *, struct err *);
    /* Becomes a rank and measures; nothing else can be done afterwards. */
    int (*calibrate)(struct host_calibration *, int *rank, int *n_ranks, struct err *);
};

/* The one symbol that the module exports. */
extern MOE_EXPORT const struct host_module moelab_host_module;

#endif
