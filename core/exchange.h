/* SPDX-License-Identifier: Apache-2.0
 * exchange.h - what results and checks want to know of an exchange, so that its parts need not be kept.
 *
 * Between D devices an exchange has up to D^2 parts, and a step of 58 layers has 116 of them: on 4,096 devices half a
 * billion, which no memory holds. Where the machine needs no single part either (machine_ops.reduce), a layer's parts
 * are summed up and given back as soon as it has been laid out and checked: O(D) is kept of an exchange. Elsewhere
 * they stay in the graph until the next step. */
#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "graph.h"
#include "machine.h"

/* Time of an exchange whose bytes lie evenly on the links of every role it uses: links that differ only by the numbers
 * in their names play one role. */
struct evening {
    const struct topology *topology;
    int32_t *role, n_roles; /* [links] */
    double *bytes;          /* [roles] scratch: summed over an exchange's links */
    double *bandwidth;      /* [roles] of all its links */
};

int evening_open(struct evening *, const struct topology *, struct err *);
void evening_close(struct evening *);
double evening_seconds(struct evening *, const struct moe_graph *, const struct task *exchange);

/* Bytes between devices of one node, and of different ones. */
void exchange_bytes(const struct moe_graph *, const struct topology *, const struct task *exchange, double *intra,
                    double *inter);
/* side: [D], out: SIDE_ bits. */
void exchange_sides(const struct moe_graph *, const struct topology *, const struct task *exchange, uint8_t *side);

/* Of all exchanges from first_task on, whose parts begin at first_part: sums up, has the machine keep its share, gives
 * the parts back. Does nothing on a machine that needs them. */
int exchange_reduce(struct evening *, struct machine *, struct moe_graph *, int32_t first_task, int32_t first_part,
                    struct err *);

#endif
