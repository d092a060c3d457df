/* SPDX-License-Identifier: Apache-2.0
 * host_order.h - in which order ranks go through a graph's tasks, and where rows wait to be sent. Both are worked out
 * from the graph alone, so that all ranks agree and what they need can be counted before they start. */
#ifndef HOST_ORDER_H
#define HOST_ORDER_H

#include "err.h"
#include "graph.h"

#include <stdbool.h>

/* sequence: [tasks] out, first those that wait for nothing, then in the order in which the last of what they wait for
 * is done. Uses up order->n_before. */
void host_sequence(const struct moe_graph *, struct graph_order *order, int32_t *sequence);

/* Where outputs of a token are added up before they travel. sums: [tasks] out, true of combine tasks that outputs leave
 * after, and of exchanges that carry what those added up, or what was added up farther from home. */
void host_find_sums(const struct moe_graph *, const struct graph_order *order, const int32_t *sequence, bool *sums);

/* Items of a part from item `from` on that are one row: where sums travel, what is next to each other of one token. */
int64_t host_row_items(const struct moe_graph *, const struct task *, int32_t part, int64_t from, bool sums);
int64_t host_part_rows(const struct moe_graph *, const struct task *, int32_t part, bool sums);

/* Rows of the send buffer that one rank needs in a step. They are put there by a permute, experts or combine task
 * that the exchange waits for, or by itself, and stay until it has run. sums: as found, or NULL: outputs travel one by
 * one. at: [tasks] out or NULL: where an exchange's begin. packed: [tasks] scratch. */
size_t host_place_sends(const struct moe_graph *, const struct graph_order *, const int32_t *sequence, int32_t rank,
                        const bool *sums, size_t *at, bool *packed);

/* Over everything that a rank acts on. The graph keeps at least one layer's routes. */
uint64_t host_graph_hash(const struct moe_graph *);

#endif
