/* SPDX-License-Identifier: Apache-2.0
 * host_team.h - all ranks that mpirun has started, as a team. */
#ifndef HOST_TEAM_H
#define HOST_TEAM_H

#include "team.h"

#define TEAM_MPI "MPI" /* the name of its operations */

int host_team_join(struct team **, struct err *);

#endif
