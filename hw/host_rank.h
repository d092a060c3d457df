/* SPDX-License-Identifier: Apache-2.0
 * host_rank.h - the state of one MPI rank of machine host, within the module.
 *
 * Hidden states and outputs are rows of d_model floats. Rows live in one pool until the step ends, and two tables say
 * where on this rank a row is, or -1: `token_row` of a token entering a layer, `route_row` of an expert's output. An
 * exchange fills them on the receiving rank, so a row that was never sent cannot be computed on. Where outputs of a
 * token are added up before they travel, the first route of them stands for the sum, and the others for nothing. */
#ifndef HOST_RANK_H
#define HOST_RANK_H

#include "err.h"
#include "graph.h"
#include "host_kernels.h"
#include "host_quiet.h"
#include "host_store.h"

#include <mpi.h>
#include <time.h>

/* What route_row holds besides rows: nothing here; in a sum; ROUTE_SUM - row: the row is a sum, its weights in it. */
enum { ROUTE_NOT_HERE = -1, ROUTE_IN_SUM = -2, ROUTE_SUM = -3 };

struct pool { float *data; size_t room; };

struct host {
    const struct moe_model *model;
    int rank, n_ranks;
    MPI_Datatype row;            /* d_model floats */
    int32_t draw;                /* of inputs, so far */
    float **weights;             /* [L * E] of experts that ran here and are not offloaded, kept */
    struct host_store *store;    /* of those that are; NULL: none */
    struct host_rings rings;     /* operands of what has no real ones */
    double probe_s;              /* the shortest so far, or as calibrated: nobody disturbed that; 0: none yet */
    double *probe;               /* [n_probes] of repetitions that count, sorted */
    int32_t n_probes, room_probes;
    int32_t spare;               /* attempts of this step that may still be set aside */
    struct quiet_best best;      /* of the attempts at this repetition */
    struct pool rows, send, gathered, gate, up;
    size_t n_rows;
    int64_t *token_row;          /* [(L + 1) * T] */
    int64_t *route_row;          /* [routes of all layers], or one of ROUTE_ */
    int64_t *route_of;           /* [L * (T + 1)] first route of a token, counted over all layers */
    int32_t *place, *own, n_own; /* [T] index among this rank's tokens or -1; [n_own] tokens */
    int *count;                  /* [4 * n_ranks] send counts and displacements, receive counts and displacements */
    char *piece;                 /* what exchange_bytes sends and receives, once it ran */

    /* of the step's graph */
    struct graph_order order;    /* successors */
    int32_t *sequence;           /* [tasks] the order in which every rank goes through them */
    double *time;                /* [tasks][2] */
    int32_t *brings;             /* [tasks] a load's number; of what waits, the number of the last load that it needs */
    size_t *send_at;             /* [tasks] row of `send` from where an exchange's are */
    bool *packed;                /* [tasks] they are there */
    bool *sums;                  /* [tasks] an exchange carries sums; a combine task makes some of what travels then */
    int32_t *experts_left;       /* [tasks] of a join: own experts tasks before it that have not run */
    const float **expert_weights;/* [experts of all tasks] */
};

/* On the clock of every time here, s. */
static inline double host_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline float *row_at(const struct host *h, int64_t row)
{
    return h->rows.data + (size_t)row * (size_t)h->model->d_model;
}

static inline int64_t *token_row(const struct host *h, const struct moe_graph *g, int32_t layer, int32_t token)
{
    return &h->token_row[(size_t)layer * (size_t)g->n_tokens + (size_t)token];
}

static inline int64_t route_of(const struct host *h, const struct moe_graph *g, int32_t layer, int32_t token)
{
    return h->route_of[(size_t)layer * ((size_t)g->n_tokens + 1) + (size_t)token];
}

/* A few products on all ranks at once: how long the slowest took. shortest: so far, 0 before the first. Others are at
 * work on this computer if it is that many times as much. */
#define HOST_DISTURBED (1 + QUIET_ENOUGH)
double host_look_around(struct host_rings *, double *shortest);
/* Checks that the graph can be run here and makes room for all that this rank will touch. */
int host_prepare(struct host *, const struct moe_graph *, struct err *);
/* Before each time it runs: rows are poisoned and the inputs placed. */
void host_begin(struct host *, const struct moe_graph *);
bool host_combine(struct host *, const struct moe_graph *, int32_t layer, int32_t token);
int host_run_task(struct host *, const struct moe_graph *, int32_t id, struct err *);

#endif
