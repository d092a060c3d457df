/* SPDX-License-Identifier: Apache-2.0
 * cmd.h - subcommands. Each gets argv with its own name first and returns the exit code. */
#ifndef CMD_H
#define CMD_H

#include "err.h"

int cmd_run(int argc, char **argv);
int cmd_plugins(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_papers(int argc, char **argv);
int cmd_reproduce(int argc, char **argv);
int cmd_trace(int argc, char **argv);
int cmd_rank(int argc, char **argv); /* internal: one MPI rank of a run on machine host */

/* "moelab: TEXT" on stderr; the exit code that goes with it. */
int cmd_fail(const struct err *);
/* "moelab NAME: TEXT" and a hint at --help; 2. */
int cmd_usage(const char *name, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
