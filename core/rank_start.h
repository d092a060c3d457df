/* SPDX-License-Identifier: Apache-2.0
 * rank_start.h - the processes of one run, started and waited for. */
#ifndef RANK_START_H
#define RANK_START_H

#include "err.h"
#include "team.h"

#include <stdbool.h>
#include <sys/types.h>

struct launch {
    const char *machine;  /* for messages */
    int n_ranks;
    bool local;           /* started here one by one; else by mpirun */
    pid_t pid[TEAM_PIPES_MAX];
    int n_pids;           /* that have not been waited for */
    int status;           /* of mpirun; of ranks, 0 or that of the first that failed */
    /* How a rank ended that said nothing itself; "": none did, or it is not known. */
    char ended[200];
    int ended_rank;
    bool by_signal;
    char dir[200], spec[220], result[220], log[220], progress[240];
};

int rank_start(struct launch *, struct err *);
/* Waits until all have ended. `shows` (or NULL) is called ten times a second meanwhile. Where one of several local
 * ranks fails, the others have a few seconds to notice. */
int rank_wait(struct launch *, void (*shows)(const struct launch *), struct err *);

#endif
