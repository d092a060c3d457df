/* SPDX-License-Identifier: Apache-2.0
 * host_calibrate.h - what is measured of this computer, and handed to whoever fits a machine file to it. */
#ifndef HOST_CALIBRATE_H
#define HOST_CALIBRATE_H

#include "err.h"
#include "machine.h"

enum host_what { HOST_GEMM, HOST_MOVE, HOST_ATTENTION, HOST_EXCHANGE, HOST_READ, N_HOST_WHATS };

struct host_sample {
    enum host_what what;
    struct gemm_group shape;   /* GEMM */
    struct latency_key key;    /* ATTENTION */
    double bytes;              /* MOVE: read and written together; EXCHANGE: from each rank to each other one; READ */
    double seconds, low, high; /* median and quartiles of n tries, each that of the slowest rank */
    int32_t n;
};

typedef void host_sample_fn(void *taker, const struct host_sample *);

struct host_calibration {
    const char *dir;           /* where storage is read */
    host_sample_fn *take;      /* called on rank 0, once all is measured */
    void (*step)(void *taker); /* after each of RANK_CALIBRATION_SIZES; or NULL */
    void *taker;
    char versions[400];        /* out: of what was measured with */
};

/* On every rank, between MPI_Init and MPI_Finalize. */
int host_calibrate(struct host_calibration *, struct err *);

#endif
