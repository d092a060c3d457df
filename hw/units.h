/* SPDX-License-Identifier: Apache-2.0
 * units.h - quantities as people write them, "50 GB/s", to and from SI. */
#ifndef UNITS_H
#define UNITS_H

#include <stdbool.h>
#include <stddef.h>

enum unit { UNIT_BYTES, UNIT_BANDWIDTH, UNIT_RATE, UNIT_SECONDS, UNIT_POWER, UNIT_JOULES_PER_BYTE, N_UNITS };

/* Reads "50 GB/s" (UNIT_BANDWIDTH), "80 GB", "989.4 TFLOP/s", "500 ns". False if it is anything else; `why` then says
 * what it is, and how the quantity is written if that can be told: `bits; write "50 GB/s"`. */
bool units_parse(enum unit, const char *text, double *value, char *why, size_t room);
/* What a bare number should have been: `without a unit; write "50 GB/s"`, where 50e9 B/s are within [min, max]; else
 * what lies there with one unit or another: `without a unit: "50 MB/s", "50 GB/s" or "50 TB/s"?`. */
void units_refuse_number(enum unit, double value, double min, double max, char *why, size_t room);
/* `figures` significant digits under the largest fitting prefix: "53.55 GB/s". Returns out. */
char *units_write(enum unit, double value, int figures, char *out, size_t room);
/* "a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" */
const char *units_expected(enum unit);

#endif
