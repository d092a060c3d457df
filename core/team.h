/* SPDX-License-Identifier: Apache-2.0
 * team.h - the processes of a run on real hardware, a rank each, and what they say to each other beside the run itself.
 *
 * Whoever calls one of these waits for the others to call the same. Ranks take the same decisions, so they come to the
 * same calls; a failure is told with team_agree(), so that all stop at one place and say one thing. */
#ifndef TEAM_H
#define TEAM_H

#include "err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct team;

struct team_ops {
    const char *name;
    /* What each of all ranks gives, n bytes, in order of rank. */
    int (*gather)(struct team *, const void *mine, size_t n, void *all, struct err *);
    /* Rank 0's text becomes everybody's, to be freed; the others may wait for hours, and take no processor's time. */
    int (*tell)(struct team *, char **text, struct err *);
    /* An error: some rank is known to have ended. Waits for nothing. */
    int (*alive)(struct team *, struct err *);
    void (*leave)(struct team *);
};

struct team {
    const struct team_ops *ops;
    int rank, size;
    bool agreed;       /* all ranks have the last failure */
    bool lost;         /* others are where they cannot be told of this rank's failure: its process has to end */
    struct err *told;  /* [size] room */
};

enum { TEAM_PIPES_MAX = 64 }; /* ranks that moelab starts by itself */

/* This process's, if it was started as one of several: by moelab ($MOELAB_TEAM) or by Open MPI's mpirun; else NULL. */
int team_open(struct team **, struct err *);
void team_leave(struct team *); /* NULL is fine */
/* The failure of the lowest rank that has one becomes every rank's, with that rank's number. */
int team_agree(struct team *, struct err *);
/* An error everywhere unless all ranks have the same text of at most 127 characters; `what` is for the message. */
int team_same(struct team *, const char *what, const char *text, struct err *);
/* The same for what their decisions come to. */
int team_same_graph(struct team *, uint64_t hash, struct err *);

/* How moelab's own children talk: rank 0 has a socket to each of the others. team_pipes.c
 * fds: [size] what each rank keeps of the pairs that team_pipes_make() made: rank i fds[i], rank 0 fds[0 .. size - 2]
 * of its own end. */
struct team_pipes { int size, root[TEAM_PIPES_MAX], own[TEAM_PIPES_MAX]; };
int team_pipes_make(struct team_pipes *, int size, struct err *);
/* In the child that becomes this rank: keeps its ends over exec and says so in $MOELAB_TEAM. */
int team_pipes_become(const struct team_pipes *, int rank);
void team_pipes_close(struct team_pipes *);
/* text: the value of $MOELAB_TEAM, "RANK SIZE FD[,FD...]". */
int team_join_pipes(struct team **, const char *text, struct err *);

#endif
