/* SPDX-License-Identifier: Apache-2.0
 * net.c - exchanges, receivers, latency and the order of events; see net.h for the division of work. */
#include "config.h"

#include "net.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const net_tier_name[N_NET_TIERS] = { "bound", "flow", "exact", "simgrid" };

int net_open(struct net **out, const struct topology *t, enum net_tier tier, struct err *err)
{
    *out = NULL;
    struct net *net = calloc(1, sizeof *net);
    if (!net)
        return err_set(err, ERR_MEMORY, "net: out of memory");
    net->ops = tier == NET_SIMGRID ? &net_simgrid_ops : tier == NET_BOUND ? &net_bound_ops : &net_flow_ops;
    net->topology = t;
    net->tier = tier;
    net->free_slot = net->repeated = net->recorded = -1;
    int32_t n = net_endpoints(t);
    size_t n_links = (size_t)t->n_links + 1;
    net->receiver_of = malloc((size_t)n * sizeof *net->receiver_of);
    net->listed = malloc((size_t)n * sizeof *net->listed);
    net->capacity = calloc(n_links, sizeof *net->capacity);
    net->carried = calloc(n_links, sizeof *net->carried);
    net->carrying = calloc(n_links, sizeof *net->carrying);
    net->link_bytes = calloc(n_links, sizeof *net->link_bytes);
    bool keeps = tier == NET_FLOW || tier == NET_EXACT; /* the others are as fast, or never set their clock back */
    net->memo = keeps ? net_memo_open() : NULL;
    int rc;
    if (net->receiver_of && net->listed && net->capacity && net->carried && net->carrying && net->link_bytes &&
        (net->memo || !keeps))
        rc = net->ops->open(net, err);
    else
        rc = err_set(err, ERR_MEMORY, "net: out of memory");
    if (rc) {
        net_close(net);
        return rc;
    }
    for (int32_t l = 0; l < t->n_links; l++)
        net->capacity[l] = t->link[l].bandwidth;
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
    free(net->capacity);
    free(net->carried);
    free(net->carrying);
    free(net->link_bytes);
    net_memo_close(net->memo);
    free(net);
}

void net_epoch(struct net *net, double now)
{
    for (int32_t l = 0; l < net->topology->n_links; l++) {
        net->carried[l] += net->carrying[l];
        net->carrying[l] = 0;
    }
    net->epoch = now;
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

static void receiver_complete(struct net *net, int32_t slot, int32_t receiver, double time)
{
    const struct net_exchange *x = &net->exchange[slot];
    const struct net_receiver *r = &x->receiver[receiver];
    if (!r->told)
        event_push(net, (struct net_event){ time, x->id, r->dst, slot, receiver });
}

void net_part_end(struct net *net, int32_t slot, int32_t receiver, double arrival)
{
    struct net_receiver *r = &net->exchange[slot].receiver[receiver];
    assert(r->n_left > 0);
    if (arrival > r->arrival)
        r->arrival = arrival;
    if (--r->n_left == 0) {
        net->n_waiting--;
        receiver_complete(net, slot, receiver, net->epoch + r->arrival);
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

/* Receiver r waits for one more flow, of an exchange that starts at `since` s after the epoch. */
static void expect(struct net_receiver *r, const struct net_flow *f, double since)
{
    if (!net_moves(f))
        return;
    r->n_left++;
    r->arrival = fmax(r->arrival, since + f->at_least);
}

/* Seconds from the epoch to a start `now`; with nothing under way the solver begins a new one. */
static double since_epoch(const struct net *net, double now)
{
    return net->tier != NET_SIMGRID && net->n_waiting == 0 ? 0 : now - net->epoch;
}

int net_list_receivers(struct net *net, double since, int64_t id, const struct net_flow *flow, size_t n,
                       struct err *err)
{
    const struct topology *t = net->topology;
    int32_t n_endpoints = net_endpoints(t), link[TOPOLOGY_MAX_HOPS];
    for (size_t i = 0; i < n; i++) {
        const struct net_flow *f = &flow[i];
        if (f->src < 0 || f->src >= n_endpoints || f->dst < 0 || f->dst >= n_endpoints)
            return err_set(err, ERR_RUN, "exchange %lld, flow %zu: found %d -> %d, expected endpoints below %d",
                           (long long)id, i, f->src, f->dst, n_endpoints);
        if (!(f->bytes >= 0 && f->bytes <= NET_MOST_BYTES))
            return err_set(err, ERR_RUN, "exchange %lld, flow %zu (%d -> %d): found %g bytes, expected 0 to %g",
                           (long long)id, i, f->src, f->dst, f->bytes, NET_MOST_BYTES);
        /* Devices always reach each other: topology_build sees to that. */
        if ((f->src >= t->n_devices || f->dst >= t->n_devices) && net_moves(f) &&
            topology_route(t, f->src, f->dst, 0, link, NULL) < 0)
            return err_set(err, ERR_RUN, "exchange %lld, flow %zu: %s has no way from endpoint %d to %d", (long long)id,
                           i, t->name, f->src, f->dst);
        int32_t r = net->receiver_of[f->dst];
        if (r < 0) {
            r = net->receiver_of[f->dst] = net->n_listed++;
            net->listed[r] = (struct net_receiver){ .dst = f->dst };
        }
        expect(&net->listed[r], f, since);
    }
    return 0;
}

/* Gives exchange x its receivers, and the heap room for their arrivals. */
static int keep_receivers(struct net *net, struct net_exchange *x, const struct net_receiver *receiver,
                          int32_t n_receivers, struct err *err)
{
    size_t n = (size_t)n_receivers, room = net->n_events + (size_t)net->n_waiting + n;
    if (room > net->room_events) {
        struct net_event *e = realloc(net->event, 2 * room * sizeof *e);
        if (!e)
            return err_set(err, ERR_MEMORY, "net: out of memory");
        net->event = e;
        net->room_events = 2 * room;
    }
    if (!(x->receiver = malloc(n * sizeof *x->receiver)))
        return err_set(err, ERR_MEMORY, "net: out of memory");
    memcpy(x->receiver, receiver, n * sizeof *x->receiver);
    x->n_receivers = x->n_left = n_receivers;
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

/* Those that nothing is on its way to are complete. */
static void await_receivers(struct net *net, double now, int32_t slot)
{
    const struct net_exchange *x = &net->exchange[slot];
    for (int32_t r = 0; r < x->n_receivers; r++) {
        if (x->receiver[r].n_left > 0)
            net->n_waiting++;
        else
            receiver_complete(net, slot, r, x->receiver[r].arrival > 0 ? net->epoch + x->receiver[r].arrival : now);
    }
}

/* Hands the flows to the solver; receivers that nothing is on its way to have everything `now`. */
static int solve(struct net *net, double now, int32_t slot, const struct net_flow *flow, size_t n, struct err *err)
{
    const struct net_exchange *x = &net->exchange[slot];
    bool any = false;
    for (int32_t r = 0; r < x->n_receivers && !any; r++)
        any = x->receiver[r].n_left > 0;
    int rc = any ? net->ops->start(net, now, slot, flow, n, err) : 0;
    if (rc == 0)
        await_receivers(net, now, slot);
    return rc;
}

/* ---- exchanges solved before ---- */

/* Fewer flows are solved sooner than found. */
#define MEMO_LEAST_FLOWS 16

static int repeat(struct net *net, double now, int32_t slot, const struct net_solved *solved, struct err *err)
{
    struct net_exchange *x = &net->exchange[slot];
    net->n_listed = 0;
    for (int32_t r = 0; r < solved->n_receivers; r++)
        net->listed[net->n_listed++] = solved->receiver[r];
    int rc = keep_receivers(net, x, net->listed, net->n_listed, err);
    if (rc)
        return rc;
    net_epoch(net, now);
    for (int32_t r = 0; r < x->n_receivers; r++)
        receiver_complete(net, slot, r, now + x->receiver[r].arrival);
    net->solved = solved;
    net->repeated = slot;
    return 0;
}

/* What is repeated does not have the network to itself to its end, or someone wants to know what has passed so far:
 * solves it from its start to now. */
static int solve_after_all(struct net *net, double now, struct err *err)
{
    int32_t slot = net->repeated;
    struct net_exchange *x = &net->exchange[slot];
    size_t n;
    struct net_flow *flow = net_memo_flows(net->memo, net->solved, &n);
    net->solved = NULL;
    net->repeated = -1;
    net->n_events = 0;
    net->n_listed = 0;
    if (!flow)
        return err_set(err, ERR_MEMORY, "net: out of memory for %zu flows", n);
    for (int32_t r = 0; r < x->n_receivers; r++) {
        x->receiver[r].n_left = 0;
        x->receiver[r].arrival = 0;
        net->receiver_of[x->receiver[r].dst] = r;
    }
    for (size_t i = 0; i < n; i++)
        expect(&x->receiver[net->receiver_of[flow[i].dst]], &flow[i], 0);
    int rc = solve(net, net->epoch, slot, flow, n, err);
    for (int32_t r = 0; r < x->n_receivers; r++)
        net->receiver_of[x->receiver[r].dst] = -1;
    free(flow);
    return rc ? rc : catch_up(net, now, err);
}

/* All receivers of the exchange have been told. */
static void exchange_end(struct net *net, int32_t slot)
{
    if (slot == net->repeated) {
        for (int32_t i = 0; i < net->solved->n_links; i++)
            net->carrying[net->solved->link[i]] = net->solved->bytes[i];
        net->solved = NULL;
        net->repeated = -1;
    }
    if (slot == net->recorded) {
        net_memo_keep(net->memo, &net->exchange[slot], net->carrying, net->topology->n_links);
        net->recorded = -1;
    }
    slot_release(net, slot);
}

const double *net_link_bytes(struct net *net)
{
    struct err e = { 0 };
    if (net->repeated >= 0 && solve_after_all(net, net->now, &e))
        return NULL;
    for (int32_t l = 0; l < net->topology->n_links; l++)
        net->link_bytes[l] = net->carried[l] + net->carrying[l];
    return net->link_bytes;
}

/* ---- the calls ---- */

static int start_listed(struct net *net, double now, int64_t id, const struct net_flow *flow, size_t n, bool alone,
                        struct err *err)
{
    int32_t slot = -1;
    int rc = slot_take(net, &slot, err);
    if (rc)
        return rc;
    struct net_exchange *x = &net->exchange[slot];
    x->id = id;
    const struct net_solved *solved = NULL;
    if (alone && n >= MEMO_LEAST_FLOWS)
        solved = net_memo_find(net->memo, flow, n, net->n_changed);
    if (solved && now + solved->end < net_next_change(net)) {
        rc = repeat(net, now, slot, solved, err);
    } else if ((rc = net_list_receivers(net, since_epoch(net, now), id, flow, n, err)) == 0 &&
               (rc = keep_receivers(net, x, net->listed, net->n_listed, err)) == 0) {
        if (alone && !solved && n >= MEMO_LEAST_FLOWS && net_memo_note(net->memo, flow, n, net->n_changed))
            net->recorded = slot;
        rc = solve(net, now, slot, flow, n, err);
    }
    if (rc) {
        net->recorded = -1;
        slot_release(net, slot);
    }
    return rc;
}

static int check_clock(const struct net *net, double now, int64_t id, struct err *err)
{
    if (now >= net->now && now < INFINITY)
        return 0;
    return err_set(err, ERR_RUN, "exchange %lld: starts at %.9g s, but the clock shows %.9g s", (long long)id, now,
                   net->now);
}

void net_unlist(struct net *net)
{
    for (int32_t r = 0; r < net->n_listed; r++)
        net->receiver_of[net->listed[r].dst] = -1;
    net->n_listed = 0;
}

int net_start_load(struct net *net, double now, int64_t id, struct net_load *load, struct err *err)
{
    int32_t slot = -1;
    if (check_clock(net, now, id, err) < 0 || (now > net->now && catch_up(net, now, err) < 0) ||
        load->n_receivers == 0 || slot_take(net, &slot, err) < 0) {
        net_load_free(load);
        return err->code;
    }
    net->now = now;
    struct net_exchange *x = &net->exchange[slot];
    const double since = since_epoch(net, now);
    bool any = false;
    x->id = id;
    int rc = keep_receivers(net, x, load->receiver, load->n_receivers, err);
    for (int32_t r = 0; rc == 0 && r < x->n_receivers; r++) {
        any |= x->receiver[r].arrival >= 0;
        x->receiver[r].arrival = x->receiver[r].arrival >= 0 ? since + x->receiver[r].arrival : 0;
    }
    if (rc || !any)
        net_load_free(load);
    else
        rc = net->ops->start_load(net, now, slot, load, err);
    if (rc)
        slot_release(net, slot);
    else
        await_receivers(net, now, slot);
    return rc;
}

static int start_flows(struct net *net, double now, int64_t id, const struct net_flow *flow, size_t n,
                       struct err *err)
{
    if (check_clock(net, now, id, err) < 0)
        return err->code;
    if (net->ops->reduce) {
        struct net_load *load;
        return net_reduce_listed(net, id, flow, n, &load, err) < 0 ? err->code
                                                                   : net_start_load(net, now, id, load, err);
    }
    int rc = n > 0 && net->repeated >= 0 ? solve_after_all(net, now, err)
             : now > net->now            ? catch_up(net, now, err) : 0;
    if (rc || n == 0)
        return rc;
    net->now = now;
    bool alone = net->memo && net->n_waiting == 0 && net->n_events == 0;
    net->recorded = -1; /* that one did not have the network to itself */
    if (net->n_waiting == 0)
        while (net_due_change(net, now))
            net_change(net);
    rc = start_listed(net, now, id, flow, n, alone, err);
    net_unlist(net);
    return rc;
}

int net_start(struct net *net, double now, int64_t id, const struct net_flow *flow, size_t n, struct err *err)
{
    struct net_flow *split;
    size_t n_split = 0;
    int rc = topology_split(net->topology, now, flow, n, &split, &n_split, err);
    if (rc == 0)
        rc = start_flows(net, now, id, split ? split : flow, split ? n_split : n, err);
    free(split);
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
        struct net_exchange *x = &net->exchange[e.slot];
        done[(*n)++] = (struct net_done){ e.id, e.dst, e.time };
        x->receiver[e.receiver].told = true;
        if (--x->n_left == 0)
            exchange_end(net, e.slot);
    }
    if (time > net->now)
        net->now = time;
    return 0;
}
