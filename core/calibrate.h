/* SPDX-License-Identifier: Apache-2.0
 * calibrate.h - a machine file from what was measured of this computer.
 *
 *   hw/host_calibrate.c   measures, on all ranks at once; hw/cuda_calibrate.c a GPU
 *   calibrate.c           fits the models' parameters to the samples
 *   calibrate_write.c     writes hw/machines/NAME.lua, with how well they fit; calibrate_gpu.c that of a GPU */
#ifndef CALIBRATE_H
#define CALIBRATE_H

#include "err.h"
#include "cuda_calibrate.h"
#include "machine.h"

#include <jansson.h>
#include <stdio.h>

/* How far a model is from what it was fitted to, |modelled / measured - 1|, and how far tries of one size lie apart,
 * between quartiles over the median. */
struct fit_quality { int n; double median, largest, spread; };

struct calibration {
    struct host_sample *sample;
    int n, room;
    int n_ranks, n_nodes;            /* nodes: of virtual ranks, as many on each; 0 is 1 */
    char versions[400];              /* of what was measured with */
    /* fitted */
    struct device_spec device;       /* of one rank: peak and efficiencies, memory, gemm, launch */
    double exchange_s, link_bandwidth;
    double read_s, read_bandwidth;
    double probe_s;                  /* host_probe(), on all ranks */
    double write_s, write_bandwidth, copy_s, copy_bandwidth; /* of a GPU: to the host, and within its memory */
    struct fit_quality quality[N_WHATS];
    enum precision only;             /* while fitting: samples of this one alone; N_PRECISIONS: of all */
    struct cuda_calibration gpu;     /* its memory and SMs, if it is one */
};

/* Samples and versions as the ranks wrote them. */
int calibration_read(struct calibration *, const json_t *, struct err *);
json_t *calibration_sample(const struct host_sample *);
int calibration_fit(struct calibration *, struct err *);
int calibration_fit_gpu(struct calibration *, struct err *);
void calibration_write(const struct calibration *, const char *name, FILE *);
/* like: the machine file whose links, hosts and numbers of devices are taken over, by its name; or NULL: one node of
 * n_ranks devices, which are virtual ranks if there are several. */
void calibration_write_gpu(const struct calibration *, const char *name, const json_t *like, const char *like_name,
                           FILE *);
/* What kernels of rows reach of the bandwidth of copies, a line each, and what starting a kernel takes. */
void calibration_say_gpu(const struct calibration *, const char *indent, FILE *);
void calibration_free(struct calibration *);

#endif
