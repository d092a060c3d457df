/* SPDX-License-Identifier: Apache-2.0
 * cuda.h - what the program and the module hw/cuda.so say to each other.
 *
 * The CUDA runtime and cuBLAS are linked into the module alone, so that moelab runs where they are missing. As with
 * host.h, nothing is shared but the layouts compared below. */
#ifndef CUDA_H
#define CUDA_H

#include "cuda_calibrate.h"
#include "graph.h"
#include "machine.h"

enum { CUDA_ABI = 3 };

struct cuda_module {
    uint32_t abi, size;                  /* first for ever: CUDA_ABI, sizeof(struct cuda_module) */
    uint32_t machine_size, graph_size, task_size, kernel_size, model_size;
    /* m->topology, model, precision, verify and team are set. No team: all ranks of the run in this process, as streams
     * of one GPU; else one of them, whose device has its number. */
    int (*open)(struct machine *, struct err *);
    int (*calibrate)(struct cuda_calibration *, struct err *);
};

/* The one symbol that the module exports. */
extern MOE_EXPORT const struct cuda_module moelab_cuda_module;

#endif
