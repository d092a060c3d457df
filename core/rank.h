/* SPDX-License-Identifier: Apache-2.0
 * rank.h - runs on real hardware: a process per device, each of which opens the same run. moelab starts them itself, as
 * `moelab rank`; or mpirun has started them all as `moelab run`, and rank 0 leads. */
#ifndef RANK_H
#define RANK_H

#include "err.h"
#include <jansson.h>
#include <stdbool.h>
#include <sys/types.h>

struct team;

enum { RANK_CALIBRATION_SIZES = 3 * 179 }; /* that ranks measure, in three passes: hw/host_calibrate.c */

/* Whether a specification asks for ranks in processes of their own: machine host, or cuda without virtual ones. */
bool rank_wanted(const json_t *spec);
/* One for each device of the run's machine, or < 0. */
int rank_number(const json_t *spec, struct err *);
/* Says on stderr, once for all runs, what makes the figures of some worth less. */
void rank_warn(const json_t *specs);
/* Whether the run can go on this machine; *needed: bytes that its ranks together will hold, 0: not known. team: what
 * mpirun has started, or NULL. */
int rank_check(const json_t *spec, const struct team *, double *needed, struct err *);
/* Whether those bytes are there still. */
int rank_check_again(const json_t *spec, double needed, struct err *);
/* Starts the ranks, waits for them, and returns what rank 0 made of the run (run_result); NULL: see err. */
json_t *rank_launch(json_t *spec, struct err *);
/* What a process that was ended has left of its launch. */
void rank_clean(pid_t launcher);
/* The run, in a process that is a rank; of rank 0 the result. If the team is lost afterwards, the
 * process has to end. */
int rank_go(struct team *, json_t *spec, json_t **result, struct err *);
/* Ranks that mpirun has started: rank 0 leads the others through a run, or lets them go; they follow until then. */
int rank_lead(struct team *, json_t *spec, json_t **result, struct err *);
void rank_dismiss(struct team *);
int rank_follow(struct team *, struct err *);
/* Whether this computer has the memory, and the directory for files the room, that so many ranks measure with. */
int rank_check_calibration(int n_ranks, const char *dir, struct err *);
/* Starts so many ranks to measure this computer; samples and versions (calibrate.h). Says on stderr how far it is. */
json_t *rank_calibrate(int n_ranks, struct err *);

#endif
