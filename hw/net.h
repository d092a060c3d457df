/* SPDX-License-Identifier: Apache-2.0
 * net.h - what net.c and the solvers behind it share. Who only moves bytes reads machine.h.
 *
 * net.c knows exchanges, receivers, latency, the order of events, and exchanges that were solved before; a solver
 * (bound.c, flow.c, simgrid_client.c) knows when the last byte of a part has passed its links. A part is one flow, or
 * for tier `bound` one link that flows to the receiver cross. */
#ifndef NET_H
#define NET_H

#include "machine.h"

#include <stdbool.h>

struct net_receiver {
    int32_t dst;
    int32_t n_left; /* parts still on their way; net_start counts flows, a solver may change it before it returns */
    double arrival; /* of the latest part that has ended, in seconds since the epoch */
    bool told;      /* its arrival was reported */
};

struct net_exchange {
    int64_t id;
    struct net_receiver *receiver; /* NULL: this slot is free */
    int32_t n_receivers, n_left;   /* n_left: receivers not yet reported */
    int32_t next_free;
};

/* An exchange without its flows (bound.c). */
struct load_link {
    int32_t link, only; /* only: the receiver (index), if it is one; else -1 */
    int64_t at;         /* its row of bits while flows are added; afterwards where n_words of that lie, which begin */
    int32_t first_word, n_words; /* with first_word: the others are 0 */
    double bytes, payload;
    double latency; /* the least among its flows */
};

struct net_load {
    struct net_receiver *receiver; /* n_left: links; arrival: s after the start that it takes anyway, -1: none */
    struct load_link *link;
    uint64_t *bits; /* [n_rows * words] a bit for each receiver, while flows are added */
    int32_t n_receivers, n_links, n_rows, words;
};

struct net_event {
    double time;
    int64_t id;
    int32_t dst, slot, receiver;
};

struct net_ops {
    int (*open)(struct net *, struct err *);
    /* Flows that net_moves() count, the others are to be skipped. receiver_of[] holds for this call. Everything that
     * ends up to `now` has been advanced over before. With nothing under way a solver that counts from the epoch
     * calls net_epoch() first, and may not remember anything: what follows depends on what starts, not on when. */
    int (*start)(struct net *, double now, int32_t slot, const struct net_flow *, size_t n, struct err *);
    /* Goes on to the next end of any part, but not beyond `until`; hands what ends to net_part_end() and sets *any.
     * Called only while parts are under way. Links change on the way. */
    int (*advance)(struct net *, double until, bool *any, struct err *);
    void (*close)(struct net *);
    /* In place of start, where an exchange starts without its flows: adds some of them, whose receivers are listed in
     * the load, to what these wait for, and to fresh links; reduced() gives it the links, also after a failure.
     * start_load owns the load. */
    int (*reduce)(struct net *, const struct net_flow *, size_t n, struct net_load *, struct err *);
    int (*reduced)(struct net *, struct net_load *, struct err *);
    int (*start_load)(struct net *, double now, int32_t slot, struct net_load *, struct err *);
};

struct net_memo; /* exchanges solved before (net_memo.c) */

struct net {
    const struct net_ops *ops;
    const struct topology *topology;
    enum net_tier tier;
    double now;
    double epoch; /* time from which the solver counts; tier simgrid: 0 */
    void *priv;
    struct net_exchange *exchange; /* [n_slots] */
    int32_t n_slots, free_slot;
    int32_t n_waiting;       /* receivers with parts under way, over all exchanges */
    struct net_event *event; /* heap of arrivals not yet reported */
    size_t n_events, room_events;
    int32_t *receiver_of;        /* [endpoints] index into the receivers of the exchange that starts; else -1 */
    struct net_receiver *listed; /* [endpoints] those receivers */
    int32_t n_listed;
    double *capacity;  /* [n_links] B/s, as changed so far */
    int32_t n_changed; /* changes made */
    double *carried, *carrying, *link_bytes; /* [n_links] before the epoch; since, added to when a part ends; both */
    struct net_memo *memo;                   /* NULL: a tier that keeps none */
    const struct net_solved *solved;         /* of the exchange under way, which is repeated, not solved; or NULL */
    int32_t repeated, recorded;              /* slots: of that exchange; of the one that will be kept; or -1 */
};

extern const struct net_ops net_bound_ops;
extern const struct net_ops net_flow_ops; /* tiers flow, exact */
extern const struct net_ops net_simgrid_ops;

/* The path of moelab-simgrid; false: there is none, and `tried` lists where it was looked for. */
bool net_simgrid_server(char *path, size_t size, char *tried, size_t room);
/* The same; that there is none is an error. */
int net_simgrid_find(char *path, size_t size, struct err *);

/* Sizes are shares of messages: less than this is rounding, and counts as 0 bytes. */
#define NET_LEAST_BYTES 1e-6
/* Beyond that SimGrid's clock loses what a flow takes; it would be 100 s on the fastest link there is. */
#define NET_MOST_BYTES 1e15

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

/* While an exchange starts: a flow of its that no link holds up arrives at `arrival`, and is no part. */
static inline void net_arrive(struct net *net, int32_t slot, int32_t receiver, double arrival)
{
    struct net_receiver *r = &net->exchange[slot].receiver[receiver];
    r->n_left--;
    r->arrival = arrival > r->arrival ? arrival : r->arrival;
}

/* A part for this receiver ends its way at `arrival`, in seconds since the epoch, latency included. */
void net_part_end(struct net *, int32_t slot, int32_t receiver, double arrival);
/* Nothing is under way: times count from `now` on. */
void net_epoch(struct net *, double now);

/* When a link changes next, or INFINITY. */
double net_next_change(const struct net *);
/* The next change if its time has come at `now`, or NULL. net_change() makes it. */
const struct link_change *net_due_change(const struct net *, double now);
void net_change(struct net *);
/* ERR_RUN: `link` has failed for good, and this receiver waits for what it carries; src: from whom, -1 from several. */
int net_stuck(const struct net *, int32_t link, int32_t src, int32_t slot, int32_t receiver, struct err *);

/* ---- net_load.c ---- */

static inline int32_t net_endpoints(const struct topology *t)
{
    return t->n_devices + 2 * t->n_nodes;
}

/* Checks the flows of an exchange that starts `since` s after the epoch and adds their receivers to those listed, with
 * the number of flows that each waits for. One pass: there may be millions of flows. */
int net_list_receivers(struct net *, double since, int64_t id, const struct net_flow *, size_t n, struct err *);
/* None is listed any more. */
void net_unlist(struct net *);
/* net_reduce() of flows that are all there. */
int net_reduce_listed(struct net *, int64_t id, const struct net_flow *, size_t n, struct net_load **, struct err *);

/* ---- net_memo.c ---- */

/* One exchange that had the network to itself from its start to its end. */
struct net_solved {
    double end; /* s since its start: no byte is under way after that */
    int32_t n_receivers;
    struct net_receiver *receiver;
    int32_t n_links, *link; /* those that carried something, and how much */
    double *bytes;
};

struct net_memo *net_memo_open(void); /* NULL: out of memory */
void net_memo_close(struct net_memo *);
/* What came of the same flows on the same links, or NULL. Valid until net_memo_keep(). */
const struct net_solved *net_memo_find(struct net_memo *, const struct net_flow *, size_t n, int32_t n_changed);
/* Its flows, to be freed; NULL: out of memory. */
struct net_flow *net_memo_flows(const struct net_memo *, const struct net_solved *, size_t *n);
/* Notes the flows of an exchange that starts: whether there is room for them. */
bool net_memo_note(struct net_memo *, const struct net_flow *, size_t n, int32_t n_changed);
/* Keeps what came of the flows noted last. Out of memory: it does not. */
void net_memo_keep(struct net_memo *, const struct net_exchange *, const double *link_bytes, int32_t n_links);

#endif
