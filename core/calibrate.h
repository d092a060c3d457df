/* SPDX-License-Identifier: Apache-2.0
 * calibrate.h - a machine file from what was measured of this computer.
 *
 *   hw/host_calibrate.c   measures, on all ranks at once
 *   calibrate.c           fits the models' parameters to the samples
 *   calibrate_write.c     writes hw/machines/NAME.lua, with how well they fit */
#ifndef CALIBRATE_H
#define CALIBRATE_H

#include "err.h"
#include "host_calibrate.h"
#include "machine.h"

#include <jansson.h>
#include <stdio.h>

/* How far a model is from what it was fitted to, |modelled / measured - 1|, and how far tries of one size lie apart,
 * between quartiles over the median. */
struct fit_quality { int n; double median, largest, spread; };

struct calibration {
    struct host_sample *sample;
    int n, room;
    int n_ranks;
    char versions[400];              /* of what was measured with */
    /* fitted */
    struct device_spec device;       /* of one rank: peak and efficiencies, memory, gemm, launch */
    double exchange_s, link_bandwidth;
    double read_s, read_bandwidth;
    struct fit_quality quality[N_HOST_WHATS];
};

/* Samples and versions as the ranks wrote them. */
int calibration_read(struct calibration *, const json_t *, struct err *);
json_t *calibration_sample(const struct host_sample *);
int calibration_fit(struct calibration *, struct err *);
void calibration_write(const struct calibration *, const char *name, FILE *);
void calibration_free(struct calibration *);

#endif
