/* SPDX-License-Identifier: Apache-2.0
 * host_calibrate.h - what is measured of this computer, and handed to whoever fits a machine file to it. */
#ifndef HOST_CALIBRATE_H
#define HOST_CALIBRATE_H

#include "err.h"
#include "machine.h"

/* The first N_HOST_WHATS are those of machine host, the others of a GPU alone (cuda_calibrate.h). */
/* What a rank reads from, and into, bytes; and what it may hold: operands, results, 4 MB for and from every other rank
 * twice, what it has read, buffers of the libraries. */
#define HOST_CALIBRATION_FILE ((size_t)1 << 28)
#define HOST_CALIBRATION_ROOM ((size_t)1 << 27)
#define HOST_CALIBRATION_HOLDS(n_ranks) \
    (4.0 * (HOST_RINGS + 3) * HOST_RING + (double)HOST_CALIBRATION_ROOM + 8.4e6 * (n_ranks) + 1e8)

enum host_what {
    HOST_GEMM, HOST_MOVE, HOST_SUM, HOST_ATTENTION, HOST_EXCHANGE, HOST_READ, HOST_PACE, N_HOST_WHATS,
    GPU_SQUARES = N_HOST_WHATS, GPU_COPY, GPU_WRITE, GPU_KERNEL, GPU_LAUNCH, GPU_EVENTS, GPU_QUEUE, N_WHATS
};

struct host_sample {
    enum host_what what;
    enum precision precision;  /* of machine host always PREC_FP32 */
    int32_t groups;            /* GEMM: of this shape, each with its own weights; 0 is 1 */
    struct gemm_group shape;   /* GEMM */
    struct latency_key key;    /* ATTENTION, KERNEL */
    double bytes;              /* MOVE, SUM, COPY, KERNEL: read and written together; EXCHANGE: from each rank to each
                                  other one; READ, WRITE: from and to the host */
    double flops;              /* SQUARES */
    double seconds, low, high; /* median and quartiles of n tries, each that of the slowest rank */
    int32_t n;
};

/* With median and quartiles of n tries, which are sorted. */
struct host_sample host_sample_of(struct host_sample, double *took, int n);
/* Of one size, the pass that is neither the fastest nor the slowest; quartiles from the outermost. Passes over all
 * sizes lie one behind another. */
struct host_sample host_sample_middle(const struct host_sample *first, int n_sizes, int n_passes);

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
