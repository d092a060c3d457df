/* SPDX-License-Identifier: Apache-2.0
 * record.h - a results directory: built beside its place under another name, renamed when everything is in it. */
#ifndef RECORD_H
#define RECORD_H

#include "err.h"
#include <jansson.h>
#include <stdbool.h>

struct record {
    char out[400], part[420];
    int n_parents;       /* directories above that were made for it, the nearest ones */
    bool open;
    int lock;            /* on part, as long as this process builds there */
    json_t *experiments; /* for the manifest */
    json_t *machines, *traces;
    json_t *trace_names; /* directory -> its key in traces */
    int n_runs;
    const char *executor, *against; /* that every run was executed on: --machine, --against; NULL without the latter */
};

/* Refuses a directory that holds something other than results of moelab. */
int record_open(struct record *, const char *out, struct err *);
/* A file in the directory; `name` without slashes. */
int record_file(struct record *, const char *name, const char *text, size_t n, struct err *);
/* Appends one line per run to runs.jsonl, and what the runs were made of to the manifest. */
int record_runs(struct record *, const char *experiment, json_t *specs, json_t *axes, json_t *results, struct err *);
/* A specification without this machine's paths: its machine and its trace are named, and listed once in the record. */
json_t *record_spec(struct record *, const json_t *spec, struct err *);
/* Takes out of a list of tables what all of them hold, and returns it. Each table laid over it, table by table, is
 * what it was. */
json_t *record_common(json_t *list);
/* What follows the last slash. */
const char *record_base_name(const char *path);
/* Writes manifest.json and puts the directory in its place. */
int record_commit(struct record *, const char *scenario, const json_t *overrides, struct err *);
/* Removes what was written. Harmless after record_commit. */
void record_abandon(struct record *);
/* Removes a results directory (plain files and the directory itself). */
void record_discard(const char *out);
/* Whether a name stays in the directory, and is nobody's option. */
bool record_is_plain(const char *name);
/* Draws STEM.gp in the directory with gnuplot, in at most limit_s seconds. What it does not draw is no error of the
 * scenario: its data are there. `why` says how gnuplot ended and its first words. record_draw.c */
enum drawn { DRAWN, NO_GNUPLOT, GNUPLOT_FAILED, GNUPLOT_HANGS };
enum drawn record_draw(struct record *, const char *stem, double limit_s, char *why, size_t room);

#endif
