/* SPDX-License-Identifier: Apache-2.0
 * net.c - exchanges, receivers, latency and the order of events; see net.h for the division of work. */
#include "config.h"

#include "net.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const net_tier_name[N_NET_TIERS] = { "bound", "flow", "exact", "simgrid" };

static int32_t net_endpoints(const struct topology *t)
{
    return t->n_devices + 2 * t->n_nodes;
}

int net_open(struct net **out, const struct topology *t, enum net_tier tier, struct err *err)
{
    *out = NULL;
    struct net *net = calloc(1, sizeof *net);
    if (!net)
        return err_set(err, ERR_MEMORY, "net: out of memory");
    net->ops = tier == NET_SIMGRID ? &net_simgrid_ops : &net_flow_ops;
    net->topology = t;
    net->tier = tier;
    net->free_slot = -1;
    int32_t n = net_endpoints(t);
    net->receiver_of = malloc((size_t)n * sizeof *net->receiver_of);
    net->listed = malloc((size_t)n * sizeof *net->listed);
    net->link_bytes = calloc((size_t)t->n_links + 1, sizeof *net->link_bytes);
    int rc = net->receiver_of && net->listed && net->link_bytes ? net->ops->open(net, err)
                                                                : err_set(err, ERR_MEMORY, "net: out of memory");
    if (rc) {
        net_close(net);
        return rc;
    }
    for (int32_t i = 0; i < n; i++)
        net->receiver_of[i] = -1;
    *out = net;
    return 0;
}

void net_close(struct net *net)
{
    if (!net)
        return;
    net->ops->close(net);
    for (int32_t i = 0; i < net->n_slots; i++)
        free(net->exchange[i].receiver);
    free(net->exchange);
    free(net->event);
    free(net->receiver_of);
    free(net->listed);
    free(net->link_bytes);
    free(net);
}

const double *net_link_bytes(const struct net *net)
{
    return net->link_bytes;
}

/* ---- arrivals: a heap keyed (time, exchange, dst) ---- */

static bool event_before(const struct net_event *a, const struct net_event *b)
{
    if (a->time != b->time)
        return a->time < b->time;
    return a->id != b->id ? a->id < b->id : a->dst < b->dst;
}

/* Room was made in net_start: every receiver is pushed once. */
static void event_push(struct net *net, struct net_event e)
{
    size_t i = net->n_events++;
    for (; i > 0 && event_before(&e, &net->event[(i - 1) / 2]); i = (i - 1) / 2)
        net->event[i] = net->event[(i - 1) / 2];
    net->event[i] = e;
}

static struct net_event event_pop(struct net *net)
{
    struct net_event top = net->event[0], last = net->event[--net->n_events];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < net->n_events; i = child) {
        if (child + 1 < net->n_events && event_before(&net->event[child + 1], &net->event[child]))
            child++;
        if (!event_before(&net->event[child], &last))
            break;
        net->event[i] = net->event[child];
    }
    net->event[i] = last;
    return top;
}

static void receiver_complete(struct net *net, int32_t slot, const struct net_receiver *r)
{
    event_push(net, (struct net_event){ r->arrival, net->exchange[slot].id, r->dst, slot });
}

void net_part_end(struct net *net, int32_t slot, int32_t receiver, double arrival)
{
    struct net_receiver *r = &net->exchange[slot].receiver[receiver];
    assert(r->n_left > 0);
    if (arrival > r->arrival)
        r->arrival = arrival;
    if (--r->n_left == 0) {
        net->n_waiting--;
        receiver_complete(net, slot, r);
    }
}

/* ---- exchanges ---- */

static int slot_take(struct net *net, int32_t *slot, struct err *err)
{
    if (net->free_slot < 0) {
        int32_t n = net->n_slots ? 2 * net->n_slots : 16;
        struct net_exchange *x = realloc(net->exchange, (size_t)n * sizeof *x);
        if (!x)
            return err_set(err, ERR_MEMORY, "net: out of memory");
        for (int32_t i = net->n_slots; i < n; i++)
            x[i] = (struct net_exchange){ .next_free = i + 1 < n ? i + 1 : -1 };
        net->free_slot = net->n_slots;
        net->exchange = x;
        net->n_slots = n;
    }
    *slot = net->free_slot;
    net->free_slot = net->exchange[*slot].next_free;
    return 0;
}

static void slot_release(struct net *net, int32_t slot)
{
    struct net_exchange *x = &net->exchange[slot];
    free(x->receiver);
    *x = (struct net_exchange){ .next_free = net->free_slot };
    net->free_slot = slot;
}

/* Checks the flows and lists their receivers, with the number of flows that each waits for. One pass: there may be
 * millions of flows. */
static int list_receivers(struct net *net, int64_t id, const struct net_flow *flow, size_t n, double now,
                          struct err *err)
{
    const struct topology *t = net->topology;
    int32_t n_endpoints = net_endpoints(t), link[TOPOLOGY_MAX_HOPS];
    for (size_t i = 0; i < n; i++) {
        const struct net_flow *f = &flow[i];
        if (f->src < 0 || f->src >= n_endpoints || f->dst < 0 || f->dst >= n_endpoints)
            return err_set(err, ERR_RUN, "exchange %lld, flow %zu: found %d -> %d, expected endpoints below %d",
                           (long long)id, i, f->src, f->dst, n_endpoints);
        if (!(f->bytes >= 0 && f->bytes < INFINITY))
            return err_set(err, ERR_RUN, "exchange %lld, flow %zu (%d -> %d): found %g bytes, expected a size >= 0",
                           (long long)id, i, f->src, f->dst, f->bytes);
        /* Devices always reach each other: topology_build sees to that. */
        if ((f->src >= t->n_devices || f->dst >= t->n_devices) && net_moves(f) &&
            topology_route(t, f->src, f->dst, 0, link, NULL) < 0)
            return err_set(err, ERR_RUN, "exchange %lld, flow %zu: %s has no way from endpoint %d to %d", (long long)id,
                           i, t->name, f->src, f->dst);
        int32_t r = net->receiver_of[f->dst];
        if (r < 0) {
            r = net->receiver_of[f->dst] = net->n_listed++;
            net->listed[r] = (struct net_receiver){ .dst = f->dst, .arrival = now };
        }
        if (net_moves(f)) {
            net->listed[r].n_left++;
            net->listed[r].arrival = fmax(net->listed[r].arrival, now + f->at_least);
        }
    }
    return 0;
}

/* Gives exchange x its receivers, and the heap room for their arrivals. */
static int keep_receivers(struct net *net, struct net_exchange *x, struct err *err)
{
    size_t n = (size_t)net->n_listed, room = net->n_events + (size_t)net->n_waiting + n;
    if (room > net->room_events) {
        struct net_event *e = realloc(net->event, 2 * room * sizeof *e);
        if (!e)
            return err_set(err, ERR_MEMORY, "net: out of memory");
        net->event = e;
        net->room_events = 2 * room;
    }
    if (!(x->receiver = malloc(n * sizeof *x->receiver)))
        return err_set(err, ERR_MEMORY, "net: out of memory");
    memcpy(x->receiver, net->listed, n * sizeof *x->receiver);
    x->n_receivers = x->n_left = net->n_listed;
    return 0;
}

/* Lets what is under way go on to `now`: arrivals wait in the heap. */
static int catch_up(struct net *net, double now, struct err *err)
{
    int rc = 0;
    for (bool any = true; any && rc == 0 && net->n_waiting > 0;) {
        any = false;
        rc = net->ops->advance(net, now, &any, err);
    }
    return rc;
}

int net_start(struct net *net, double now, int64_t id, const struct net_flow *flow, size_t n, struct err *err)
{
    int32_t slot = -1, n_moving = 0;
    if (!(now >= net->now && now < INFINITY))
        return err_set(err, ERR_RUN, "exchange %lld: starts at %.9g s, but the clock shows %.9g s", (long long)id, now,
                       net->now);
    int rc = catch_up(net, now, err);
    if (rc || n == 0)
        return rc;
    net->now = now;

    if ((rc = list_receivers(net, id, flow, n, now, err)) || (rc = slot_take(net, &slot, err)))
        goto out;
    struct net_exchange *x = &net->exchange[slot];
    x->id = id;
    if ((rc = keep_receivers(net, x, err)))
        goto out;
    for (int32_t r = 0; r < x->n_receivers; r++)
        n_moving += x->receiver[r].n_left > 0;
    if (n_moving > 0 && (rc = net->ops->start(net, now, slot, flow, n, err)))
        goto out;
    net->n_waiting += n_moving;
    for (int32_t r = 0; r < x->n_receivers; r++)
        if (x->receiver[r].n_left == 0)
            receiver_complete(net, slot, &x->receiver[r]);
out:
    for (int32_t r = 0; r < net->n_listed; r++)
        net->receiver_of[net->listed[r].dst] = -1;
    net->n_listed = 0;
    if (rc && slot >= 0)
        slot_release(net, slot);
    return rc;
}

int net_advance(struct net *net, double until, struct net_done *done, size_t room, size_t *n, struct err *err)
{
    *n = 0;
    /* A part that ends before the first known arrival may arrive before it. */
    for (bool any = true; any && net->n_waiting > 0;) {
        double limit = net->n_events > 0 && net->event[0].time < until ? net->event[0].time : until;
        any = false;
        int rc = net->ops->advance(net, limit, &any, err);
        if (rc)
            return rc;
    }
    if (net->n_events == 0 || net->event[0].time > until) {
        if (until > net->now && until < INFINITY)
            net->now = until;
        return 0;
    }
    double time = net->event[0].time;
    while (*n < room && net->n_events > 0 && net->event[0].time == time) {
        struct net_event e = event_pop(net);
        done[(*n)++] = (struct net_done){ e.id, e.dst, e.time };
        if (--net->exchange[e.slot].n_left == 0)
            slot_release(net, e.slot);
    }
    if (time > net->now)
        net->now = time;
    return 0;
}
