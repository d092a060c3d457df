/* SPDX-License-Identifier: Apache-2.0
 * items_check.h - that a graph names every row that it computes and sends, as machines that really compute need. */
#ifndef ITEMS_CHECK_H
#define ITEMS_CHECK_H

#include "err.h"
#include "graph.h"

/* machine: what messages call it. */
int items_check(const struct moe_model *, const struct moe_graph *, const char *machine, struct err *);

#endif
