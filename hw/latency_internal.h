/* SPDX-License-Identifier: Apache-2.0
 * latency_internal.h - between the file that reads measured times and the one that answers from them. */
#ifndef LATENCY_INTERNAL_H
#define LATENCY_INTERNAL_H

#include "latency_table.h"

/* "gemm", ...: by op. */
extern const char *const latency_op_name[N_LATENCY_OPS];

struct entry {
    struct latency_key key;
    enum precision precision;
    double seconds;
    int32_t file, line;
};

struct latency_table {
    struct entry *entry; /* in order of shape, context, rows, file and line */
    int32_t n_entries, room;
    char **file, **path; /* as named; where it was found */
    int32_t n_files;
    char *files;
    struct entry *warned; /* what a warning was given for */
    int32_t n_warned;
    bool has[N_LATENCY_OPS];
    struct latency_counts count[N_LATENCY_FAMILIES];
};

static inline enum latency_family latency_family(enum latency_op op)
{
    return op == LATENCY_GEMM || op == LATENCY_GROUPED_GEMM ? LATENCY_PRODUCTS : LATENCY_OTHERS;
}

/* Order of entries but for their context and rows. */
int latency_compare_shape(const struct entry *, const struct entry *);

#endif
