/* SPDX-License-Identifier: Apache-2.0
 * net.h - what net.c and the solvers behind it share. Who only moves bytes reads machine.h.
 *
 * net.c knows exchanges, receivers, latency and the order of events; a solver (flow.c, simgrid_client.c) knows when
 * the last byte of a part has passed its links. A part is one flow, or for tier `bound` all flows to one receiver. */
#ifndef NET_H
#define NET_H

#include "machine.h"

#include <stdbool.h>

struct net_receiver {
    int32_t dst;
    int32_t n_left; /* parts still on their way; net_start counts flows, a solver may lower it before it returns */
    double arrival; /* of the latest part that has ended */
};

struct net_exchange {
    int64_t id;
    struct net_receiver *receiver; /* NULL: this slot is free */
    int32_t n_receivers, n_left;   /* n_left: receivers not yet reported */
    int32_t next_free;
};

struct net_event {
    double time;
    int64_t id;
    int32_t dst, slot;
};

struct net_ops {
    int (*open)(struct net *, struct err *);
    /* Flows with src != dst and bytes > 0 count, the others are to be skipped. receiver_of[] holds for this call.
     * Everything that ends up to `now` has been advanced over before. */
    int (*start)(struct net *, double now, int32_t slot, const struct net_flow *, size_t n, struct err *);
    /* Goes on to the next end of any part, but not beyond `until`; hands what ends to net_part_end() and sets *any.
     * Called only while parts are under way. */
    int (*advance)(struct net *, double until, bool *any, struct err *);
    void (*close)(struct net *);
};

struct net {
    const struct net_ops *ops;
    const struct topology *topology;
    enum net_tier tier;
    double now;
    void *priv;
    struct net_exchange *exchange; /* [n_slots] */
    int32_t n_slots, free_slot;
    int32_t n_waiting;       /* receivers with parts under way, over all exchanges */
    struct net_event *event; /* heap of arrivals not yet reported */
    size_t n_events, room_events;
    int32_t *receiver_of;        /* [endpoints] index into the receivers of the exchange that starts; else -1 */
    struct net_receiver *listed; /* [endpoints] those receivers */
    int32_t n_listed;
    double *link_bytes; /* [n_links]: added to when a part ends */
};

extern const struct net_ops net_flow_ops; /* tiers bound, flow, exact */
extern const struct net_ops net_simgrid_ops;

/* Sizes are shares of messages: less than this is rounding, and counts as 0 bytes. */
#define NET_LEAST_BYTES 1e-6

static inline bool net_moves(const struct net_flow *f)
{
    return (f->src != f->dst || f->loop) && f->bytes > NET_LEAST_BYTES;
}

/* The links of a flow that moves; their number. latency (may be NULL): what its arrival has on top. */
static inline int net_route(const struct topology *t, const struct net_flow *f, int32_t link[TOPOLOGY_MAX_HOPS],
                            double *latency)
{
    int n;
    if (latency)
        *latency = 0;
    if (f->loop)
        n = topology_loop(t, f->src, link);
    else
        n = topology_route(t, f->src, f->dst, f->path, link, latency);
    if (latency)
        *latency += f->delay;
    return n;
}
/* A part for this receiver ends its way at `arrival`, latency included. */
void net_part_end(struct net *, int32_t slot, int32_t receiver, double arrival);

#endif
