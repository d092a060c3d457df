/* SPDX-License-Identifier: Apache-2.0
 * flow.h - the state of flow.c, which minds time, and of flow_rates.c, which shares links. */
#ifndef FLOW_H
#define FLOW_H

#include "net.h"

enum phase {
    STALE,  /* flows or links have changed: rates are to be found */
    FOUND,  /* rates hold from `now` on, the batch is known, nobody has heard of it */
    CLOSING /* the batch was handed over; rates hold until `close` */
};

/* The links of a flow. Two are the common case and lie inline, the sink standing in for a missing one; otherwise a is
 * ~(index of the first of b hops). */
struct ends { int32_t a, b; };
struct hop { int32_t link, weight, place; }; /* weight: crossings */

struct part { /* what is not needed to share links */
    double bytes, latency;
    int32_t slot, receiver, src;
};

struct link_pass { double moved, rate; };         /* bytes per flow in the interval past, rate in the present one */
struct link_share { double left; int32_t open; }; /* while rates are found: what is not taken, by how many crossings */

struct link_state {
    int32_t live;                 /* crossings by flows that have not ended */
    int32_t first, n;             /* its flows in list[] */
    double credit, extra;         /* bytes it could have carried; what it may do above its bandwidth because of that */
    double gone_rate, gone_bytes; /* of the batch: sum of the rates, and of the bytes that were left */
};

struct span { double start, alone; }; /* s: when an exchange started, what it would take by itself at the least */

struct flow {
    double now, close;    /* s since net->epoch */
    double first, horizon; /* s since now: the first end; when the interval closes */
    double repay;          /* s: slack of the last batch */
    enum phase phase;
    bool credits;

    int32_t n, n_live, room; /* flows; an ended one keeps its place, with INFINITY to go */
    double *work;            /* [room] bytes to go */
    struct ends *ends;       /* [room] */
    struct ends *place;      /* [room] of a flow with two links: where it is in list[] */
    struct part *part;       /* [room] */
    struct hop *hop;         /* of flows with more links, in the order of the flows */
    int32_t n_hops, room_hops;

    int32_t *list; /* by link: the other link of a flow with two, or ~flow */
    int32_t n_list, room_list;
    int32_t *batch, n_batch, room_batch;

    int32_t sink; /* a link that carries nothing and is never full */
    int32_t *used, n_used; /* links with flows when lists were made */
    struct link_state *link;
    struct link_pass *pass;
    struct link_share *share;
    int32_t *heap, n_heap; /* links that may fill next, lowest level first */
    double *level;         /* rate at which a link fills; what is known only grows */
    struct span *span;     /* [room_slots] by exchange */
    int32_t room_slots;
    double *bytes;         /* scratch of a start: [links], zero between calls */
};

/* fmin() and fmax() mind NaN, which cannot occur here, and are calls. */
static inline double larger(double a, double b)
{
    return a > b ? a : b;
}

static inline double smaller(double a, double b)
{
    return a < b ? a : b;
}

static inline double rate_of(const struct flow *s, int32_t f)
{
    struct ends e = s->ends[f];
    if (e.a >= 0)
        return smaller(s->pass[e.a].rate, s->pass[e.b].rate);
    double rate = INFINITY;
    for (const struct hop *h = s->hop + ~e.a, *end = h + e.b; h < end; h++)
        rate = smaller(rate, s->pass[h->link].rate);
    return rate;
}

/* Closes the gaps that ended flows left, and lists flows by link anew. */
void flow_relist(struct flow *);
/* The rate at which each link is full, by progressive filling: pass[].rate of the links in use. */
void flow_find_rates(const struct net *, struct flow *);

#endif
