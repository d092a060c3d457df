/* SPDX-License-Identifier: Apache-2.0
 * sweep.h - many runs, a process each: a crash, a loop or a leak is that run's alone, and is told with the policy's
 * name. Results come back in the order of the specifications, whatever the number of jobs. */
#ifndef SWEEP_H
#define SWEEP_H

#include "err.h"
#include <jansson.h>
#include <stdbool.h>

struct team;

/* team: the ranks that mpirun has started, of which this is the first; or NULL. */
struct sweep_options { int jobs; double timeout_s; bool progress; struct team *team; };

/* specs: array of run specifications. results (new array): per run {"status": "ok", "metrics": ..., ...} or
 * {"status": "failed", "error": "..."}; with "spec", what run_resolve() made of it, unless the run ended before or
 * without a word. Bad input in any run stops the sweep with ERR_INPUT and no results. */
int sweep(json_t *specs, const struct sweep_options *, json_t **results, struct err *);

#endif
