/* SPDX-License-Identifier: Apache-2.0
 * machine_facts.h - what can be said of a machine without running anything on it. */
#ifndef MACHINE_FACTS_H
#define MACHINE_FACTS_H

#include "machine.h"

/* devices, hosts, links by sort, kinds of pairs, bisection, slow, faults, sources; NULL without memory. */
json_t *machine_facts(const struct topology *);
/* "gpu*.nvlink.out": what links of one sort have in common. */
void machine_link_sort(const char *name, char out[64]);

#endif
