/* SPDX-License-Identifier: Apache-2.0
 * energy.h - joules of what ran, on machines whose file says what theirs are. */
#ifndef ENERGY_H
#define ENERGY_H

#include "topology_internal.h"

/* Of a machine with the table `energy`: topology->energy. */
struct energy_figures {
    double *idle, *busy, *memory; /* [D] W, W, J/B of device memory (0: busy has it in it) */
    double *link;                 /* [L] J/B, of memory at its ends too where that is a device's */
    double nodes;                 /* W of all nodes beside their devices */
};

/* Fills t->energy, if there is such a table; links are there. Half a table is an error that names the key. */
int energy_build(struct topology *, const struct parts *, const char *file, struct err *);
void energy_figures_free(struct energy_figures *);

/* What a simulated machine spends. */
struct energy_meter;
/* *out NULL: the machine does not say. */
int energy_open(struct energy_meter **out, const struct topology *, struct err *);
void energy_close(struct energy_meter *);
/* A kernel starts on a device; it ends. Several at a time make a device as busy as one. */
void energy_start(struct energy_meter *, double now, int32_t device, const struct kernel_cost *);
void energy_end(struct energy_meter *, double now, int32_t device);
/* Joules since the last reading, `seconds` ago: nothing runs. link_bytes: all that links ever carried, [L]. */
double energy_read(struct energy_meter *, double seconds, const double *link_bytes);

#endif
