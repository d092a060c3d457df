/* SPDX-License-Identifier: Apache-2.0
 * latency_table.h - kernels that were timed elsewhere, from CSV files: inside their range they go before the model. */
#ifndef LATENCY_TABLE_H
#define LATENCY_TABLE_H

#include "machine.h"

#include <stdbool.h>

struct latency_table;

/* files: description.tables, a list of names; those that are not there are looked for beside machine_file. */
int latency_table_read(struct latency_table **, const json_t *files, const char *machine_file, struct err *);
void latency_table_free(struct latency_table *);

/* Seconds of a kernel: as measured, or on the line between the nearest rows measured below and above; where it has a
 * context, that at the nearest contexts below and above which have such rows, and on the line between the two. false:
 * this shape was not measured, or not on all sides. A GEMM's groups count, and are 1 without any. */
bool latency_table_lookup(const struct latency_table *, enum precision, const struct latency_key *, double *seconds);

/* What a grouped GEMM that the model gives `modelled` seconds takes. The table answers if all groups with rows have one
 * n and k, weights as wide as what they multiply, and none more than 1.1 times the mean of rows, which it is asked for.
 * Otherwise the model does; for each matrix the first time on standard error, if there is any matrix in the table. */
double latency_table_gemm(struct latency_table *, enum precision, int32_t n_groups, const struct gemm_group *,
                          const struct gemm_bytes *, double modelled);
/* The same of any other kernel; of what is of an op that the table does not speak of, nothing is said or counted. */
double latency_table_kernel(struct latency_table *, enum precision, const struct latency_key *, double modelled);

/* The i-th file as it was named, and where it was found; false: there are not so many. */
bool latency_table_file(const struct latency_table *, int32_t i, const char **name, const char **path);
/* The files, with ", " between. */
const char *latency_table_files(const struct latency_table *);
/* Whether there are matrix products in it, or others; how many kernels so far had their time from it, and how many
 * from the model instead. */
struct latency_counts { bool any; int64_t measured, modelled; };
enum latency_family { LATENCY_PRODUCTS, LATENCY_OTHERS, N_LATENCY_FAMILIES };
struct latency_counts latency_table_counts(const struct latency_table *, enum latency_family);

#endif
