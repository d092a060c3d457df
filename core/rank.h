/* SPDX-License-Identifier: Apache-2.0
 * rank.h - runs on machine host: one MPI rank per device, each a `moelab rank` that opens the same run. */
#ifndef RANK_H
#define RANK_H

#include "err.h"
#include <jansson.h>
#include <stdbool.h>

enum { RANK_CALIBRATION_SIZES = 3 * 111 }; /* that ranks measure, in three passes: hw/host_calibrate.c */

/* Whether a run's specification asks for machine host. */
bool rank_wanted(const json_t *spec);
/* One for each device of the run's machine, or < 0. */
int rank_number(const json_t *spec, struct err *);
/* Says on stderr, once for all runs, what makes the figures of some worth less. */
void rank_warn(const json_t *specs);
/* Whether the run can go on this machine; *needed: bytes that its ranks together will hold. */
int rank_check(const json_t *spec, double *needed, struct err *);
/* Whether those bytes are there still. */
int rank_check_again(const json_t *spec, double needed, struct err *);
/* Starts the ranks with mpirun, waits for them, and returns what rank 0 made of the run (run_result); NULL: see err. */
json_t *rank_launch(json_t *spec, struct err *);
/* Starts so many ranks to measure this computer; samples and versions (calibrate.h). Says on stderr how far it is. */
json_t *rank_calibrate(int n_ranks, struct err *);

#endif
