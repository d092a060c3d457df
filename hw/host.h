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
#include "team.h"

enum { HOST_ABI = 4 };

struct host_module {
    uint32_t abi, size;                  /* first for ever: HOST_ABI, sizeof(struct host_module) */
    uint32_t machine_size, graph_size, task_size, model_size;
    /* Becomes a rank, until the team is left. Nothing else works before. */
    int (*join)(struct team **, struct err *);
    /* m->team is set. m->rank and m->priv become so; m->verify says whether outputs are checked. */
    int (*open)(struct machine *, struct err *);
    int (*calibrate)(struct host_calibration *, struct err *);
};

/* The one symbol that the module exports. */
extern MOE_EXPORT const struct host_module moelab_host_module;

#endif
