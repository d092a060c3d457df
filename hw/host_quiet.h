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

/* What one rank saw of one attempt: probes before and after, the share that was stolen meanwhile; and its end. */
struct quiet_seen { double before_s, after_s, stolen, ended; };

/* How a repetition is tried. Every rank calls quiet_repeat() at the same time, and so each of these. */
struct quiet_trial {
    void *self;
    int (*once)(void *self, struct quiet_seen *, struct err *); /* leaves its times in the graph; fails on all ranks */
    void (*worst)(void *self, double *value, int n);            /* makes each of n the largest of all ranks */
    void (*rest)(void *self);                                   /* before another attempt */
    const double *quiet_s; /* the probe undisturbed, of which an attempt may find a shorter */
    int32_t spare;         /* attempts beside the first that may still be made */
};

/* The least disturbed attempt so far. */
struct quiet_best {
    double disturbance, probe_s, ended; /* of the worst rank; mean of its two probes */
    double stolen;                      /* the largest share in any attempt */
    int32_t attempts;
    double *time;
    int32_t room;
};
/* Makes room for the times of a graph. May fail on one rank alone. */
int quiet_room(struct quiet_best *, const struct moe_graph *, struct err *);
/* Tries until an attempt is quiet enough, QUIET_ATTEMPTS were made or none is to spare, and gives the graph the times
 * of the least disturbed; of equals the first. */
int quiet_repeat(struct quiet_best *, struct quiet_trial *, struct moe_graph *, struct err *);

#endif
