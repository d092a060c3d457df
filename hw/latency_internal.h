/* SPDX-License-Identifier: Apache-2.0
 * latency_internal.h - between the file that reads measured times and the one that answers from them. */
#ifndef LATENCY_INTERNAL_H
#define LATENCY_INTERNAL_H

#include "latency_table.h"

extern const char *const latency_op_name[N_LATENCY_OPS];

struct entry {
    enum latency_op op;
    enum precision precision;
    int32_t groups;
    int64_t n, k, rows;
    double seconds;
    int32_t file, line;
};

struct matrix { /* what a warning was given for */
    enum precision precision;
    bool grouped;
    int64_t n, k;
};

struct latency_table {
    struct entry *entry; /* in order of compare() */
    int32_t n_entries, room;
    char **file, **path; /* as named; where it was found */
    int32_t n_files;
    char *files;
    struct matrix *warned;
    int32_t n_warned;
    int64_t measured, modelled;
};

/* Order of entries but for their rows. */
int latency_compare_shape(const struct entry *, const struct entry *);

#endif
