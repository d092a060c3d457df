/* SPDX-License-Identifier: Apache-2.0
 * exchange.h - what results and checks want to know of an exchange, so that its parts need not be kept.
 *
 * Between D devices an exchange has up to D^2 parts, and a step of 58 layers has 116 of them: on 4,096 devices half a
 * billion, which no memory holds. Where the machine needs no single part either (machine_ops.reduce), they are summed
 * up as they come, and of an exchange O(devices that it names) is kept. Elsewhere they stay in the graph until the next
 * step. */
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
    double *link_bytes;     /* [links] scratch */
};

int evening_open(struct evening *, const struct topology *, struct err *);
void evening_close(struct evening *);
double evening_seconds(struct evening *, const struct moe_graph *, const struct task *exchange);

/* Bytes between devices of one node, and of different ones. */
void exchange_bytes(const struct moe_graph *, const struct topology *, const struct task *exchange, double *intra,
                    double *inter);
/* side: [D], out: SIDE_ bits. */
void exchange_sides(const struct moe_graph *, const struct task *exchange, uint8_t *side);

/* What a layer's exchanges of one payload move, bytes to and from other devices, or nodes. */
enum moved { MOVED_IN, MOVED_OUT, MOVED_NODE /* into a node: hidden states; out of it: outputs */, N_MOVED };

/* Exchanges as dispatch lays them out. All that the core wants to know of parts is counted in one go: reading millions
 * of them takes longer than adding them up. */
struct tally {
    struct evening evening;
    struct machine *machine;     /* keeps its share of each, and no part goes into the graph; NULL: parts do */
    double *moved[2][N_MOVED];   /* of a layer, MOE_PAY_HIDDEN and MOE_PAY_OUTPUT; [D], [D], [N] */
    /* Of the exchange that is counted, all 0 between two. */
    double *out, *in;              /* [D] bytes to and from other devices */
    double intra, inter;           /* bytes between devices of one node, and of different ones */
    struct message_count *message; /* [D] */
    bool *is_named;                /* [D] by a part */
    int32_t *named, n_named;       /* those, in the order in which they came */
};

int tally_open(struct tally *, const struct topology *, struct err *);
void tally_close(struct tally *);
/* Anew for a layer. machine: NULL, or one that can reduce exchanges, which then must not be needed whole. */
void tally_layer(struct tally *, struct machine *);
/* Counts the exchange and appends it to the graph; its task, or a negative error. */
int32_t tally_exchange(struct tally *, struct moe_graph *, const struct moe_exchange *, struct err *);

#endif
