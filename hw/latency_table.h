/* SPDX-License-Identifier: Apache-2.0
 * latency_table.h - matrix products that were timed elsewhere, from CSV files: inside their range they go before the
 * model. */
#ifndef LATENCY_TABLE_H
#define LATENCY_TABLE_H

#include "machine.h"

#include <stdbool.h>

enum latency_op { LATENCY_GEMM, LATENCY_GROUPED_GEMM, N_LATENCY_OPS };

struct latency_table;

/* files: description.tables, a list of names; those that are not there are looked for beside machine_file. */
int latency_table_read(struct latency_table **, const json_t *files, const char *machine_file, struct err *);
void latency_table_free(struct latency_table *);

/* Seconds of `groups` products rows x k times k x n in one launch: as measured, or on the line between the nearest
 * numbers of rows measured below and above; false: this shape was not measured, or not on both sides. */
bool latency_table_lookup(const struct latency_table *, enum latency_op, enum precision, int32_t groups, double rows,
                          int64_t n, int64_t k, double *seconds);

/* What a grouped GEMM that the model gives `modelled` seconds takes. The table answers if all groups with rows have one
 * n and k, weights as wide as what they multiply, and none more than 1.1 times the mean of rows, which it is asked for.
 * Otherwise the model does; for each matrix the first time on standard error. */
double latency_table_gemm(struct latency_table *, enum precision, int32_t n_groups, const struct gemm_group *,
                          const struct gemm_bytes *, double modelled);

/* The i-th file as it was named, and where it was found; false: there are not so many. */
bool latency_table_file(const struct latency_table *, int32_t i, const char **name, const char **path);
/* The files, with ", " between, and how many products so far had their time from them, and from the model. */
const char *latency_table_files(const struct latency_table *);
void latency_table_counts(const struct latency_table *, int64_t *measured, int64_t *modelled);

#endif
