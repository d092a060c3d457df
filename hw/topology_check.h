/* SPDX-License-Identifier: Apache-2.0
 * topology_check.h - between the files that check a machine description and that build its links. */
#ifndef TOPOLOGY_CHECK_H
#define TOPOLOGY_CHECK_H

#include "machine.h"

enum section { TOP, DEVICE, PEAK, GEMM, NVLINK, PCIE, HOST, SSD, NIC, EXCHANGE, N_SECTIONS };

/* table[s]: where the section is in the description, NULL if it is not. Defaults are filled in. */
int topology_check(json_t *description, json_t *table[N_SECTIONS], const char *file, struct err *);

/* 0 if the key is not there. */
static inline double number(const json_t *table, const char *key)
{
    return json_number_value(json_object_get(table, key));
}

#endif
