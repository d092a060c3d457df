/* SPDX-License-Identifier: Apache-2.0
 * flow.c - max-min fair sharing of links by flows: tiers flow and exact of net.
 *
 * All rates rise together; when a link is full, the flows on it keep the rate they have, the others go on rising:
 * progressive filling (Bertsekas and Gallager, Data Networks, 2nd ed. 1992, section 6.5.2). So a flow's rate is the
 * lowest among the levels at which its links filled, and is never stored: a round reads each flow once, in order.
 *
 * Time goes in intervals of constant rates. The first end, and those up to `slack` after it, make a batch: each ends
 * at its own time, but what they leave is shared anew only when the last of them has ended and the interval closes.
 * exact has no slack but for rounding. With that of flow, a link that was full meanwhile has the bytes that it could
 * have carried added to the next interval, which is one slack long at most: so full links carry exactly what they can,
 * and single flows end a fraction of a slack early or late.
 *
 * Times are counted from net->epoch, when something started on an idle network: the same exchange gives the same bits
 * whenever it starts, and nothing depends on how often or how far advance() is asked to go. */
#include "config.h"

#include "flow.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Slack, by what an exchange still has to go: many flows are under way at first, and few when it matters most. */
static const double tolerance[N_NET_TIERS] = { [NET_FLOW] = 2e-3, [NET_EXACT] = 1e-12 };
static const double least_left = 0.3; /* of what it takes alone */
static const double many_receivers = 256;

/* Bytes that are as good as none, far below NET_LEAST_BYTES: rounding may leave them. */
static const double nothing = 1e-9;
/* Later than any end, and 0 times it is 0. */
static const double never = DBL_MAX / 4;

/* ---- memory ---- */

static void flow_close(struct net *net)
{
    struct flow *s = net->priv;
    if (!s)
        return;
    void *const all[] = { s->work, s->ends, s->place, s->part,  s->hop,  s->list,  s->batch, s->used,
                          s->link, s->pass, s->share, s->heap,  s->level, s->span, s->bytes };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    free(s);
    net->priv = NULL;
}

static int flow_open(struct net *net, struct err *err)
{
    struct flow *s = net->priv = calloc(1, sizeof *s);
    size_t n = (size_t)net->topology->n_links + 1;
    if (s && (s->used = calloc(n, sizeof *s->used)) && (s->link = calloc(n, sizeof *s->link)) &&
        (s->pass = calloc(n, sizeof *s->pass)) && (s->share = calloc(n, sizeof *s->share)) &&
        (s->heap = calloc(n, sizeof *s->heap)) && (s->level = calloc(n, sizeof *s->level)) &&
        (s->bytes = calloc(n, sizeof *s->bytes))) {
        s->sink = net->topology->n_links;
        s->pass[s->sink] = (struct link_pass){ INFINITY, INFINITY };
        return 0;
    }
    return err_set(err, ERR_MEMORY, "net: out of memory for %zu links", n);
}

static int grow(void *array, size_t n, size_t size)
{
    void **p = array;
    void *bigger = realloc(*p, n * size);
    if (!bigger)
        return -1;
    *p = bigger;
    return 0;
}

/* Room for n more flows with n_list places in lists, and n_hops hops of those with more than two links. */
static int reserve(struct net *net, struct flow *s, size_t n, size_t n_list, size_t n_hops, struct err *err)
{
    size_t flows = (size_t)s->n + n, lists = (size_t)s->n_list + n_list, hops = (size_t)s->n_hops + n_hops;
    if (flows > INT32_MAX / 2 || lists > INT32_MAX / 2)
        return err_set(err, ERR_RUN, "net: %zu flows at once, expected at most %d", flows, INT32_MAX / 2);
    if (flows > (size_t)s->room) {
        flows += (size_t)s->n; /* doubles when flows are added one by one */
        if (grow(&s->work, flows, sizeof *s->work) || grow(&s->ends, flows, sizeof *s->ends) ||
            grow(&s->place, flows, sizeof *s->place) || grow(&s->part, flows, sizeof *s->part))
            goto fail;
        s->room = (int32_t)flows;
    }
    if (lists > (size_t)s->room_list) {
        lists += (size_t)s->n_list;
        if (grow(&s->list, lists, sizeof *s->list))
            goto fail;
        s->room_list = (int32_t)lists;
    }
    if (hops > (size_t)s->room_hops) {
        hops += (size_t)s->n_hops;
        if (grow(&s->hop, hops, sizeof *s->hop))
            goto fail;
        s->room_hops = (int32_t)hops;
    }
    if (net->n_slots > s->room_slots) {
        if (grow(&s->span, (size_t)net->n_slots, sizeof *s->span))
            goto fail;
        s->room_slots = net->n_slots;
    }
    return 0;
fail:
    return err_set(err, ERR_MEMORY, "net: out of memory for %zu flows", flows);
}

/* ---- the batch ---- */

static int batch_add(struct flow *s, int32_t f, struct err *err)
{
    if (s->n_batch == s->room_batch) {
        int32_t room = 2 * s->room_batch + 64;
        if (grow(&s->batch, (size_t)room, sizeof *s->batch))
            return err_set(err, ERR_MEMORY, "net: out of memory for %d flows", s->n);
        s->room_batch = room;
    }
    s->batch[s->n_batch++] = f;
    return 0;
}

static double time_left(const struct flow *s, int32_t f)
{
    return s->work[f] > nothing ? s->work[f] / rate_of(s, f) : 0;
}

static double slack_of(const struct net *net, const struct flow *s, int32_t f)
{
    struct span x = s->span[s->part[f].slot];
    /* A link that narrows stretches what a batch was wrong by before: such machines get smaller batches. So do
     * exchanges with few receivers, where errors do not average out. */
    double finer = net->topology->n_changes > 0 ? 0.1 : 1;
    if (net->exchange[s->part[f].slot].n_receivers < many_receivers)
        finer *= larger(net->exchange[s->part[f].slot].n_receivers / many_receivers, 0.125);
    return finer * tolerance[net->tier] * larger(x.start + x.alone - s->now, least_left * x.alone);
}

/* Moves all flows over the interval past; finds those that end first at the rates that begin, and, with their slack,
 * when the interval closes. No later than `limit`. */
static int find_batch(const struct net *net, struct flow *s, double limit, struct err *err)
{
    const struct link_pass *pass = s->pass;
    double horizon = limit;
    s->n_batch = 0;
    for (int32_t f = 0; f < s->n; f++) {
        struct ends e = s->ends[f];
        double moved, rate;
        if (e.a >= 0) {
            moved = smaller(pass[e.a].moved, pass[e.b].moved);
            rate = smaller(pass[e.a].rate, pass[e.b].rate);
        } else {
            moved = rate = INFINITY;
            for (const struct hop *h = s->hop + ~e.a, *end = h + e.b; h < end; h++) {
                moved = smaller(moved, pass[h->link].moved);
                rate = smaller(rate, pass[h->link].rate);
            }
        }
        double work = s->work[f] -= moved;
        if (!(work <= rate * horizon + nothing && work < INFINITY))
            continue;
        double left = work > nothing ? work / rate : 0;
        horizon = smaller(horizon, left + slack_of(net, s, f));
        if (batch_add(s, f, err))
            return ERR_MEMORY;
    }
    /* The horizon came nearer on the way. */
    int32_t n = 0;
    double last = 0;
    s->first = INFINITY;
    for (int32_t i = 0; i < s->n_batch; i++) {
        double left = time_left(s, s->batch[i]);
        if (left > horizon)
            continue;
        s->first = smaller(s->first, left);
        last = larger(last, left);
        s->batch[n++] = s->batch[i];
    }
    s->n_batch = n;
    s->horizon = n > 0 ? last : horizon; /* nothing is left to share any more after the last of them */
    return 0;
}

/* Counts flow f, which had `work` to go, out of a link. */
static void leave(struct net *net, struct flow *s, int32_t l, int32_t weight, int32_t place, double rate, double work,
                  double bytes)
{
    if (l == s->sink)
        return;
    struct link_state *k = &s->link[l];
    s->list[place] = s->sink;
    k->live -= weight;
    k->gone_rate += rate * weight;
    k->gone_bytes += work * weight;
    net->carrying[l] += bytes * weight;
}

static void hand_over(struct net *net, struct flow *s)
{
    for (int32_t i = 0; i < s->n_batch; i++) {
        int32_t f = s->batch[i];
        const struct part *p = &s->part[f];
        struct ends e = s->ends[f];
        double rate = rate_of(s, f), work = s->work[f];
        net_part_end(net, p->slot, p->receiver, s->now + time_left(s, f) + p->latency);
        if (e.a >= 0) {
            leave(net, s, e.a, 1, s->place[f].a, rate, work, p->bytes);
            leave(net, s, e.b, 1, s->place[f].b, rate, work, p->bytes);
        } else {
            for (const struct hop *h = s->hop + ~e.a, *end = h + e.b; h < end; h++)
                leave(net, s, h->link, h->weight, h->place, rate, work, p->bytes);
        }
        s->work[f] = INFINITY;
        s->n_live--;
    }
}

/* ---- time ---- */

/* Ends the interval after `seconds`; flows are moved by find_batch() or settle(). */
static void close_interval(struct net *net, struct flow *s, double seconds)
{
    s->credits = false;
    for (int32_t i = 0; i < s->n_used; i++) {
        int32_t l = s->used[i];
        struct link_state *k = &s->link[l];
        double rate = s->pass[l].rate;
        s->pass[l].moved = rate < INFINITY ? rate * seconds : INFINITY;
        if (net->tier == NET_FLOW && rate < INFINITY && k->live > 0) {
            k->credit += k->gone_rate * seconds - k->gone_bytes - k->extra * seconds;
            if (fabs(k->credit) < 1e-6 * net->capacity[l] * s->repay)
                k->credit = 0; /* rounding: not worth an interval */
            s->credits = s->credits || k->credit != 0;
        } else { /* who did not use all of it has no use for more */
            k->credit = 0;
        }
        k->gone_rate = k->gone_bytes = k->extra = 0;
    }
    s->now += seconds;
    s->phase = STALE;
}

/* Who can never move again is named: a flow, the link that failed, and when. */
static int stuck(const struct net *net, const struct flow *s, struct err *err)
{
    for (int32_t f = 0; f < s->n; f++) {
        if (!(s->work[f] < INFINITY))
            continue;
        struct ends e = s->ends[f];
        int32_t link[2] = { e.a, e.b };
        for (int32_t h = 0; h < (e.a >= 0 ? 2 : e.b); h++) {
            int32_t l = e.a >= 0 ? link[h] : s->hop[~e.a + h].link;
            if (l != s->sink && net->capacity[l] <= 0)
                return net_stuck(net, l, s->part[f].src, s->part[f].slot, s->part[f].receiver, err);
        }
    }
    return err_set(err, ERR_RUN, "net: %d flows can not move", s->n_live);
}

static void change_links(struct net *net, const struct flow *s)
{
    while (net_due_change(net, net->epoch + s->now))
        net_change(net);
}

static int find(struct net *net, struct flow *s, struct err *err)
{
    change_links(net, s);
    double change = net_next_change(net) - net->epoch;
    if (s->n > 64 && s->n_live < s->n - s->n / 16)
        flow_relist(s);
    flow_find_rates(net, s);
    double limit = smaller(change - s->now, s->credits ? s->repay : never);
    int rc = find_batch(net, s, limit, err);
    if (rc)
        return rc;
    for (int32_t i = 0; i < s->n_used; i++)
        s->pass[s->used[i]].moved = 0;
    if (s->n_batch > 0)
        s->repay = larger(slack_of(net, s, s->batch[0]), 1e-9 * (s->now + s->first)); /* the clock has to move */
    s->close = s->now + s->horizon;
    s->phase = s->n_batch > 0 || s->horizon >= never ? FOUND : CLOSING; /* first is INFINITY where nothing moves */
    return 0;
}

static int flow_advance(struct net *net, double until, bool *any, struct err *err)
{
    struct flow *s = net->priv;
    for (;;) {
        if (s->phase == CLOSING) {
            if (net->epoch + s->close > until || s->n_live == 0)
                return 0;
            close_interval(net, s, s->close - s->now);
        }
        if (s->phase == STALE) {
            int rc = find(net, s, err);
            if (rc)
                return rc;
        }
        if (s->phase == CLOSING)
            continue;
        if (net->epoch + (s->now + s->first) > until)
            return 0; /* a start before that would change it */
        if (s->n_batch == 0)
            return stuck(net, s, err);
        hand_over(net, s);
        s->phase = CLOSING;
        *any = true;
        return 0;
    }
}

/* ---- start ---- */

/* Brings all flows to `now`, where one is to start. */
static int settle(struct net *net, struct flow *s, double now, struct err *err)
{
    if (s->n_live == 0) {
        for (int32_t i = 0; i < s->n_used; i++) {
            int32_t l = s->used[i];
            s->link[l] = (struct link_state){ .n = 0 };
            s->pass[l].moved = 0;
        }
        s->n = s->n_hops = s->n_list = s->n_used = 0;
        s->now = 0;
        s->credits = false;
        s->phase = STALE;
        net_epoch(net, now);
        return 0;
    }
    if (s->phase == STALE) { /* several start at one time */
        if (net->epoch + s->now >= now)
            return 0;
        int rc = find(net, s, err);
        if (rc)
            return rc;
    }
    close_interval(net, s, larger(now - net->epoch - s->now, 0));
    for (int32_t f = 0; f < s->n; f++) {
        struct ends e = s->ends[f];
        double moved = INFINITY;
        if (e.a >= 0)
            moved = smaller(s->pass[e.a].moved, s->pass[e.b].moved);
        else
            for (const struct hop *h = s->hop + ~e.a, *end = h + e.b; h < end; h++)
                moved = smaller(moved, s->pass[h->link].moved);
        s->work[f] = s->work[f] < INFINITY ? larger(s->work[f] - moved, 0) : INFINITY;
    }
    for (int32_t i = 0; i < s->n_used; i++)
        s->pass[s->used[i]].moved = 0;
    return 0;
}

/* The links of a flow, each once with its crossings; their number. */
static int distinct_links(const struct net *net, const struct net_flow *f, struct hop hop[TOPOLOGY_MAX_HOPS],
                          double *latency)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    int n_links = net_route(net->topology, f, link, latency), n = 0;
    for (int i = 0; i < n_links; i++) {
        int h = 0;
        while (h < n && hop[h].link != link[i])
            h++;
        if (h == n)
            hop[n++] = (struct hop){ link[i], 0, 0 };
        hop[h].weight++;
    }
    return n;
}

static bool is_long(const struct hop *hop, int n)
{
    return n > 2 || (n > 0 && hop[0].weight > 1) || (n > 1 && hop[1].weight > 1);
}

/* Appends the exchange's flows. */
static void append(struct net *net, struct flow *s, int32_t slot, const struct net_flow *flow, size_t n)
{
    struct hop hop[TOPOLOGY_MAX_HOPS];
    for (size_t i = 0; i < n; i++) {
        if (!net_moves(&flow[i]))
            continue;
        struct part p = {
            .bytes = flow[i].bytes, .slot = slot, .receiver = net->receiver_of[flow[i].dst], .src = flow[i].src
        };
        int hops = distinct_links(net, &flow[i], hop, &p.latency);
        if (hops == 0) {
            net_arrive(net, slot, p.receiver, s->now + p.latency);
            continue;
        }
        struct ends e = { hop[0].link, hops > 1 ? hop[1].link : s->sink };
        if (is_long(hop, hops)) {
            e = (struct ends){ ~s->n_hops, hops };
            memcpy(s->hop + s->n_hops, hop, sizeof *hop * (size_t)hops);
            s->n_hops += hops;
        }
        for (int h = 0; h < hops; h++)
            s->pass[hop[h].link].moved = 0; /* of a time when others used it */
        s->work[s->n] = flow[i].bytes;
        s->ends[s->n] = e;
        s->part[s->n++] = p;
    }
}

/* Sums bytes[] by link for the exchange's flows, the last ones; returns what it takes alone and clears them again. */
static double weigh(const struct net *net, struct flow *s, int32_t first)
{
    double bound = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t f = first; f < s->n; f++) {
            struct ends e = s->ends[f];
            const struct hop two[2] = { { e.a, 1, 0 }, { e.b, 1, 0 } }, *hop = e.a >= 0 ? two : s->hop + ~e.a;
            for (int32_t h = 0; h < (e.a >= 0 ? 2 : e.b); h++) {
                double *bytes = &s->bytes[hop[h].link];
                if (pass == 0) {
                    *bytes += s->work[f] * hop[h].weight;
                } else if (*bytes > 0) {
                    if (hop[h].link != s->sink && net->capacity[hop[h].link] > 0)
                        bound = larger(bound, *bytes / net->capacity[hop[h].link]);
                    *bytes = 0;
                }
            }
        }
    }
    return bound;
}

static int flow_start(struct net *net, double now, int32_t slot, const struct net_flow *flow, size_t n, struct err *err)
{
    struct flow *s = net->priv;
    struct hop hop[TOPOLOGY_MAX_HOPS];
    size_t n_flows = 0, n_hops = 0, n_list = 0;
    int rc = settle(net, s, now, err);
    if (rc)
        return rc;
    for (size_t i = 0; i < n; i++) {
        if (!net_moves(&flow[i]))
            continue;
        int hops = distinct_links(net, &flow[i], hop, NULL);
        n_flows++;
        n_list += (size_t)hops;
        n_hops += is_long(hop, hops) ? (size_t)hops : 0;
    }
    if ((rc = reserve(net, s, n_flows, n_list, n_hops, err)))
        return rc;
    change_links(net, s);
    int32_t first = s->n;
    append(net, s, slot, flow, n);
    s->span[slot] = (struct span){ s->now, weigh(net, s, first) };
    flow_relist(s);
    s->phase = STALE;
    return 0;
}

const struct net_ops net_flow_ops = { flow_open, flow_start, flow_advance, flow_close };
