/* SPDX-License-Identifier: Apache-2.0
 * host_team.c - all ranks that mpirun has started, as a team (team.h). */
#include "config.h"

#include "host_team.h"

#include <cblas.h>
#include <limits.h>
#include <mpi.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int gather(struct team *t, const void *mine, size_t n, void *all, struct err *e)
{
    if (n > INT_MAX / (size_t)t->size)
        return err_set(e, ERR_RUN, "%zu bytes of each of %d ranks are too many", n, t->size);
    MPI_Allgather(mine, (int)n, MPI_BYTE, all, (int)n, MPI_BYTE, MPI_COMM_WORLD);
    return 0;
}

/* MPI's own waiting keeps a processor busy, and rank 0 may be simulating. */
static void broadcast(void *bytes, int n)
{
    MPI_Request request;
    int done = 0;
    MPI_Ibcast(bytes, n, MPI_BYTE, 0, MPI_COMM_WORLD, &request);
    while (MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && !done)
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
}

static int tell(struct team *t, char **text, struct err *e)
{
    uint64_t n = t->rank == 0 ? strlen(*text) : 0;
    broadcast(&n, sizeof n);
    char *got = n < INT_MAX ? t->rank == 0 ? *text : malloc(n + 1) : NULL;
    if (!got) { /* the others would wait for ever */
        t->lost = true;
        return err_set(e, ERR_MEMORY, "out of memory for %llu bytes", (unsigned long long)n);
    }
    broadcast(got, (int)n);
    got[n] = '\0';
    *text = got;
    return 0;
}

/* mpirun ends all when one does. */
static int alive(struct team *t, struct err *e)
{
    (void)t;
    return e->code;
}

static void leave(struct team *t)
{
    free(t);
    MPI_Finalize();
}

static const struct team_ops mpi_ops = { TEAM_MPI, gather, tell, alive, leave };

/* Each rank of a computer keeps to its share of the processors, if there is one for each: moved to another's while a
 * thread reads for that one, it is milliseconds late for the next exchange. */
static void keep_apart(void)
{
#ifdef __linux__
    MPI_Comm here;
    cpu_set_t all, mine;
    int rank, n, n_cpus = 0;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    MPI_Comm_rank(here, &rank);
    MPI_Comm_size(here, &n);
    MPI_Comm_free(&here);
    if (sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) < n)
        return;
    CPU_ZERO(&mine);
    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &all) && (int64_t)n_cpus++ * n / CPU_COUNT(&all) == rank)
            CPU_SET(cpu, &mine);
    sched_setaffinity(0, sizeof mine, &mine); /* where that may not be done, they move as they did */
#endif
}

int host_team_join(struct team **out, struct err *e)
{
    if (MPI_Init(NULL, NULL) != MPI_SUCCESS)
        return err_set(e, ERR_IO, "MPI does not start");
    struct team *t = calloc(1, sizeof *t);
    if (!t)
        return err_set(e, ERR_MEMORY, "out of memory for a rank");
    t->ops = &mpi_ops;
    MPI_Comm_size(MPI_COMM_WORLD, &t->size);
    MPI_Comm_rank(MPI_COMM_WORLD, &t->rank);
    openblas_set_num_threads(1); /* a rank is one device */
    keep_apart();
    *out = t;
    return 0;
}
