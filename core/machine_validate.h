/* SPDX-License-Identifier: Apache-2.0
 * machine_validate.h - published measurements against the models. */
#ifndef MACHINE_VALIDATE_H
#define MACHINE_VALIDATE_H

#include "err.h"
#include <jansson.h>

/* Appends a row per row of a table (machine_validate.c says which there are) to `rows`: table, row, line, unit,
 * measured, modelled, error (of time, modelled over measured - 1), binds, measured_GBps and modelled_GBps where the
 * table has a rate beside, machine, fitted, source. machine: NULL: the table's own. rows: NULL: it is only checked, and
 * warned of rates that contradict what they stand beside. */
int machine_validate_table(const char *file, const char *machine, json_t *rows, struct err *);

#endif
