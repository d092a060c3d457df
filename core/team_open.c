/* SPDX-License-Identifier: Apache-2.0
 * team_open.c - how a process learns that it is one of several. */
#include "config.h"

#include "team.h"
#include "machine.h"

#include <stdlib.h>

int team_open(struct team **out, struct err *e)
{
    const char *pipes = getenv("MOELAB_TEAM"), *mpi = getenv("OMPI_COMM_WORLD_SIZE");
    *out = NULL;
    if (pipes && *pipes)
        team_join_pipes(out, pipes, e);
    else if (mpi && *mpi)
        machine_join_host(out, e);
    if (e->code || !*out)
        return e->code;
    (*out)->told = calloc((size_t)(*out)->size, sizeof *(*out)->told);
    return (*out)->told ? 0 : err_set(e, ERR_MEMORY, "out of memory for %d ranks", (*out)->size);
}

void team_leave(struct team *t)
{
    if (!t)
        return;
    free(t->told);
    t->ops->leave(t);
}
