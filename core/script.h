/* SPDX-License-Identifier: Apache-2.0
 * script.h - Lua scenarios. Only core/script*.c include lua.h; everything beyond them sees JSON. */
#ifndef SCRIPT_H
#define SCRIPT_H

#include "err.h"
#include "moelab.h"
#include <jansson.h>
#include <stdbool.h>

struct team;

struct script_options {
    const char *out;            /* results directory; NULL: results/NAME-OF-SCRIPT */
    const char *executor;       /* --machine, or NULL */
    const char *against;        /* --against, or NULL; then executor is something else */
    const char *const *set;     /* "key=value" */
    int n_set, jobs;
    double timeout_s;           /* of one run, and of the script's own loops */
    bool unsafe, progress, quiet;
    bool extrapolate;           /* --allow-extrapolation */
    struct team *team;          /* sweep.h */
};

/* Runs a scenario. What it wrote is in `out` if this returns 0 or ERR_RUN (some runs failed), else nothing is.
 * The script's own results table for `moelab reproduce` (rows of scenarios/lib/paper.lua) goes to *claims. */
int script_run(const char *path, const struct script_options *, json_t **claims, struct err *);

/* A machine file as JSON: a name under hw/machines/, or a path of such a file or of a SimGrid platform (.xml). file:
 * where it was found. */
int script_machine(const char *name_or_path, json_t **description, char *file, size_t room, struct err *);

/* Gives a description with a platform the devices of the machine that it, or else its own key `like`, names. */
int script_machine_like(json_t *description, const char *like, const char *file, struct err *);

/* The policy that the running scenario registered under this id (moe.policy). */
const struct moe_plugin *script_policy(int id);

#endif
