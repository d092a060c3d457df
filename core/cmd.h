/* SPDX-License-Identifier: Apache-2.0
 * cmd.h - subcommands. Each gets argv with its own name first and returns the exit code. */
#ifndef CMD_H
#define CMD_H

#include "err.h"
#include <stdbool.h>

int cmd_run(int argc, char **argv);
int cmd_plugins(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_papers(int argc, char **argv);
int cmd_reproduce(int argc, char **argv);
int cmd_trace(int argc, char **argv);
int cmd_machine(int argc, char **argv);
int machine_validate(int argc, char **argv); /* of cmd_machine */
int cmd_calibrate(int argc, char **argv);
int cmd_rank(int argc, char **argv); /* internal: one MPI rank of a run on machine host */

/* "moelab: TEXT" on stderr; the exit code that goes with it. */
int cmd_fail(const struct err *);
/* "moelab NAME: TEXT" and a hint at --help; 2. */
int cmd_usage(const char *name, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The same for an option that is none of the known ones ("--out", ...; ends with NULL). */
int cmd_unknown_option(const char *name, const char *given, const char *const *known);
/* Whether an argument is written as an option: "-" is standard input, or a file's name. */
bool cmd_is_option(const char *argument);
/* Of options, the nearest to the given one, which may come with "=value"; NULL if none is near. */
const char *cmd_nearest_option(const char *given, const char *const *known, int n);

#endif
