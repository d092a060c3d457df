/* SPDX-License-Identifier: Apache-2.0
 * rank.h - runs on machine host: one MPI rank per device, each a `moelab rank` that opens the same run. */
#ifndef RANK_H
#define RANK_H

#include "err.h"
#include <jansson.h>
#include <stdbool.h>

/* Whether a run's specification asks for machine host. */
bool rank_wanted(const json_t *spec);
/* Starts the ranks with mpirun, waits for them, and returns what rank 0 made of the run (run_result); NULL: see err. */
json_t *rank_launch(json_t *spec, struct err *);

#endif
