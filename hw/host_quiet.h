/* SPDX-License-Identifier: Apache-2.0
 * host_quiet.h - whether others were at work on this computer while something was measured, and which of several
 * attempts they disturbed least. Nothing here looks at what was measured. */
#ifndef HOST_QUIET_H
#define HOST_QUIET_H

#include "err.h"
#include "graph.h"

/* Attempts at one repetition; beyond QUIET_ENOUGH another is made, QUIET_ATTEMPTS in all. */
enum { QUIET_ATTEMPTS = 3 };
#define QUIET_ENOUGH 0.12

/* 0: nobody. The slower of the probes before and after, over the quiet one, less 1; and the share of processors' time
 * that a hypervisor took meanwhile. quiet_s 0: there are no probes. */
double quiet_disturbance(double before_s, double after_s, double quiet_s, double stolen);

/* Processors' time that a hypervisor has taken so far, s; negative: nobody says. And of what /proc/stat says. */
double quiet_stolen(void);
double quiet_stolen_of(const char *stat, double ticks_per_s);
/* Share of all processors' time in so many seconds. */
double quiet_share(double stolen_before, double stolen_after, double seconds, int n_processors);

/* The least disturbed attempt so far. */
struct quiet_best { double disturbance; double *time; int32_t room; };
/* Keeps the times of this attempt if it is the first (attempt 0) or less disturbed than those before it. */
int quiet_offer(struct quiet_best *, int attempt, double disturbance, const struct moe_graph *, struct err *);
/* Gives the graph the times that were kept. */
void quiet_take(const struct quiet_best *, struct moe_graph *);

#endif
