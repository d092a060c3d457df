/* SPDX-License-Identifier: Apache-2.0
 * host_need.h - how much memory ranks of machine host will hold, worked out from the graphs that they will run.
 *
 * host_prepare.c makes room for what host_count() counts, so that an estimate and what is allocated cannot part. */
#ifndef HOST_NEED_H
#define HOST_NEED_H

#include "err.h"
#include "graph.h"
#include "host_kernels.h"
#include "moelab.h"

/* Bytes that mean nothing travel in pieces, so that no buffer grows with them. */
enum { HOST_PIECE = 1 << 22 };

/* What one rank needs room for in one step. rows, sent and gathered are rows of d_model floats. */
struct host_step {
    size_t n_own;    /* tokens that live on it */
    size_t rows;     /* states of its tokens, received rows, outputs of its experts */
    size_t sent;     /* rows that wait to be sent at one time, most of any */
    size_t gathered; /* of the expert with most rows */
    size_t hidden;   /* floats: rows x width of the largest such product */
    double piece;    /* bytes it may receive in exchanges of bytes, at most a piece from each rank; 0: there are none */
    struct host_room rings;
};

/* count: [n_ranks], one rank per device. */
int host_count(const struct moe_model *, const struct moe_graph *, int32_t n_ranks, struct host_step *count,
               struct err *);

/* Adds up steps. A rank keeps the weights of every expert that ever ran on it, and its largest rows and buffers. */
struct host_need {
    const struct moe_model *model;
    int32_t n_ranks;
    bool verify, counted;   /* counted: a step has been */
    unsigned char *held;    /* [n_ranks * L * E] bits: experts with weights on a rank, if none are loaded */
    bool offloads;          /* there were loads: a rank holds slots, and one expert while it writes their file */
    int64_t *kept, *passing;/* [n_ranks] slots of a rank: of what stays, and of what only passes in one layer */
    struct host_step *most, *step; /* [n_ranks] */
    int64_t n_experts;      /* bits set in held */
    double weights, widest; /* bytes of all ranks' experts, of the largest expert */
    double tables;          /* bytes of one rank's tables, most of any step */
};

/* Bytes of all ranks together. */
struct host_bytes { double weights, rows, buffers, processes, sum; };

/* Before the first step only the rows of n_tokens and their tables are known, spread evenly. */
int host_need_open(struct host_need *, const struct moe_model *, int32_t n_ranks, int32_t n_tokens, bool verify,
                   struct err *);
int host_need_step(struct host_need *, const struct moe_graph *, struct err *);
/* own: bytes that the decisions of a run take in one process: workload, policies, graph. */
void host_need_bytes(const struct host_need *, double own, struct host_bytes *);
void host_need_close(struct host_need *);

#endif
