/* SPDX-License-Identifier: Apache-2.0
 * cuda_calibrate.h - what is measured of a GPU, and handed to whoever fits a machine file to it. */
#ifndef CUDA_CALIBRATE_H
#define CUDA_CALIBRATE_H

#include "host_calibrate.h"

struct cuda_calibration {
    int32_t n_ranks;           /* virtual ranks, which measure at the same time; exchanges are those between them */
    host_sample_fn *take;      /* called once all is measured */
    void (*step)(void *taker, int done, int of); /* after each size; or NULL */
    void *taker;
    /* Out: */
    char name[64];             /* the GPU's */
    char versions[400];        /* of what was measured with */
    char note[200];            /* what was measured otherwise than it should have been, or empty */
    int32_t sms;
    double memory, mem_bandwidth; /* bytes; B/s as the driver has it from clock and width, 0: it does not say */
};

/* In the module: of GPU 0. */
int cuda_calibrate(struct cuda_calibration *, struct err *);
/* In the program: loads the module. */
int machine_calibrate_cuda(struct cuda_calibration *, struct err *);

#endif
