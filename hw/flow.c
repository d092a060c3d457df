/* SPDX-License-Identifier: Apache-2.0
 * flow.c - max-min fair sharing of links by fluids: tiers bound, flow and exact of net.
 *
 * A fluid crosses all its links at one rate. All rates rise together; when a link is full, the fluids on it keep the
 * rate they have, the others go on rising: progressive filling (Bertsekas and Gallager, Data Networks, 2nd ed. 1992,
 * section 6.5.2). The rates hold until a fluid starts or ends.
 *
 *   flow, exact  a fluid is a flow; its work is bytes, its weight on a link 1 per crossing.
 *   bound        a fluid is a whole exchange; its work is seconds of running alone, at rate 1 when it does; its weight
 *                on a link is the bandwidth that it then needs of it on average. Exchanges that share a full link
 *                slow each other down to equal shares of its bandwidth. A receiver has everything when the exchange has
 *                done the share of its work that the busiest link to the receiver needs: alone, when that link is done.
 *
 * exact ends fluids together whose times differ by rounding only. flow lets those within 1e-3 of their exchange's
 * bound end together, at the time at which their sum of bytes has passed; the errors of single fluids cancel. */
#include "config.h"

#include "net.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double tolerance[N_NET_TIERS] = { [NET_BOUND] = 1e-12, [NET_FLOW] = 1e-3, [NET_EXACT] = 1e-12 };

struct fluid {
    double work, rate; /* to go; per second */
    double left;       /* seconds to the end of `work` at `rate` */
    double slack;      /* seconds: it may end that much after the first of a batch */
    int32_t hop, n_hops;
};

struct hop {
    int32_t link;
    double weight;
};

struct milestone { /* of a bound fluid; at: work done by then */
    double at, latency;
    int32_t receiver;
};

struct part { /* what is not needed to share links */
    int32_t slot, receiver;
    double latency, amount;      /* bytes per unit of weight: what a link carried when the fluid has ended */
    struct milestone *milestone; /* bound: ascending, the last is the end */
    int32_t next, n_milestones;
};

struct share { /* of a link, while rates are being found: bandwidth not taken, by whom it may be */
    double left, weight;
    int32_t open;
};

struct flow {
    double now;
    bool need_rates, need_next;
    double first, next; /* seconds from `now`: first end, and when its batch ends together */

    int32_t n, n_live, room; /* fluids; an ended one keeps its place, with work INFINITY at rate 0 */
    struct fluid *fluid;
    struct part *part; /* [room] too */
    struct hop *hop;   /* by fluid, in the order of the fluids */
    int32_t n_hops, room_hops;

    int32_t n_used, *used;               /* links with fluids when the lists were made */
    int32_t *list_first, *list_n, *list; /* fluids by link */
    int32_t *live;                       /* crossings by fluids that have not ended */
    double *load;                        /* and the sum of their weights */
    struct share *share;
    int32_t *heap, n_heap; /* links that may fill next, lowest level first */
    double *level;         /* rate at which a link fills; what is known only grows */

    /* Scratch of one start. */
    double *bytes, *seconds;     /* by link: what the exchange puts on it, zero between calls; how long that takes */
    int32_t n_touched, *touched; /* links with bytes */
};

/* fmax() minds NaN, which cannot occur here, and is a call. */
static inline double larger(double a, double b)
{
    return a > b ? a : b;
}

/* ---- memory ---- */

static void flow_close(struct net *net)
{
    struct flow *s = net->priv;
    if (!s)
        return;
    for (int32_t f = 0; f < s->n; f++)
        free(s->part[f].milestone);
    void *const all[] = { s->fluid, s->part,  s->hop,  s->used,  s->list_first, s->list_n,  s->list,   s->live,
                          s->load,  s->share, s->heap, s->level, s->bytes,      s->seconds, s->touched };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    free(s);
    net->priv = NULL;
}

static int flow_open(struct net *net, struct err *err)
{
    struct flow *s = net->priv = calloc(1, sizeof *s);
    size_t n = (size_t)net->topology->n_links + 1;
    if (s && (s->used = calloc(n, sizeof *s->used)) && (s->list_first = calloc(n + 1, sizeof *s->list_first)) &&
        (s->list_n = calloc(n, sizeof *s->list_n)) && (s->live = calloc(n, sizeof *s->live)) &&
        (s->load = calloc(n, sizeof *s->load)) && (s->share = calloc(n, sizeof *s->share)) &&
        (s->heap = calloc(n, sizeof *s->heap)) && (s->level = calloc(n, sizeof *s->level)) &&
        (s->bytes = calloc(n, sizeof *s->bytes)) && (s->seconds = calloc(n, sizeof *s->seconds)) &&
        (s->touched = calloc(n, sizeof *s->touched)))
        return 0;
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

/* Room for n more fluids with n_hops crossings in all. */
static int reserve(struct flow *s, size_t n, size_t n_hops, struct err *err)
{
    size_t fluids = (size_t)s->n + n, hops = (size_t)s->n_hops + n_hops;
    if (fluids > INT32_MAX / 2 || hops > INT32_MAX / 2)
        return err_set(err, ERR_RUN, "net: %zu flows at once, expected at most %d", fluids, INT32_MAX / 2);
    if (fluids > (size_t)s->room) {
        fluids += (size_t)s->n; /* doubles when fluids are added one by one */
        if (grow(&s->fluid, fluids, sizeof *s->fluid) || grow(&s->part, fluids, sizeof *s->part))
            goto fail;
        s->room = (int32_t)fluids;
    }
    if (hops > (size_t)s->room_hops) {
        hops += (size_t)s->n_hops;
        if (grow(&s->hop, hops, sizeof *s->hop) || grow(&s->list, hops, sizeof *s->list))
            goto fail;
        s->room_hops = (int32_t)hops;
    }
    return 0;
fail:
    return err_set(err, ERR_MEMORY, "net: out of memory for %zu flows", n);
}

/* Closes the gaps that ended fluids left, and lists fluids by link anew. */
static void relist(struct flow *s)
{
    int32_t n = 0, n_hops = 0;
    for (int32_t i = 0; i < s->n_used; i++) {
        s->live[s->used[i]] = 0;
        s->load[s->used[i]] = 0;
    }
    s->n_used = 0;
    for (int32_t f = 0; f < s->n; f++) {
        struct fluid moved = s->fluid[f];
        if (moved.work == INFINITY)
            continue;
        for (int32_t h = moved.hop, to = n_hops; h < moved.hop + moved.n_hops; h++, to++) {
            struct hop hop = s->hop[to] = s->hop[h];
            if (s->live[hop.link]++ == 0)
                s->used[s->n_used++] = hop.link;
            s->load[hop.link] += hop.weight;
        }
        moved.hop = n_hops;
        n_hops += moved.n_hops;
        s->part[n] = s->part[f];
        s->fluid[n++] = moved;
    }
    s->n = s->n_live = n;
    s->n_hops = n_hops;

    int32_t first = 0;
    for (int32_t i = 0; i < s->n_used; i++) {
        int32_t l = s->used[i];
        s->list_first[l] = first;
        s->list_n[l] = 0;
        first += s->live[l];
    }
    for (int32_t f = 0; f < n; f++) {
        const struct hop *hop = s->hop + s->fluid[f].hop;
        for (int32_t h = 0; h < s->fluid[f].n_hops; h++)
            s->list[s->list_first[hop[h].link] + s->list_n[hop[h].link]++] = f;
    }
}

/* ---- rates ---- */

static void heap_down(struct flow *s, int32_t i)
{
    int32_t link = s->heap[i];
    for (int32_t child; (child = 2 * i + 1) < s->n_heap; i = child) {
        if (child + 1 < s->n_heap && s->level[s->heap[child + 1]] < s->level[s->heap[child]])
            child++;
        if (s->level[s->heap[child]] >= s->level[link])
            break;
        s->heap[i] = s->heap[child];
    }
    s->heap[i] = link;
}

static void heap_drop(struct flow *s)
{
    s->heap[0] = s->heap[--s->n_heap];
    if (s->n_heap > 0)
        heap_down(s, 0);
}

/* Link l is full at `rate`: its fluids that were still rising stay there, and leave their other links the rest. */
static void fill(struct flow *s, int32_t l, double rate)
{
    int32_t *list = s->list + s->list_first[l], n = 0;
    for (int32_t i = 0; i < s->list_n[l]; i++) {
        struct fluid *f = &s->fluid[list[i]];
        if (f->work == INFINITY)
            continue;
        list[n++] = list[i]; /* those that ended leave the list on the way */
        if (f->rate >= 0)
            continue;
        f->rate = rate;
        for (const struct hop *h = s->hop + f->hop, *end = h + f->n_hops; h < end; h++) {
            if (h->link == l)
                continue;
            struct share *k = &s->share[h->link];
            k->left -= rate * h->weight;
            k->weight -= h->weight;
            k->open--;
        }
    }
    s->list_n[l] = n;
    s->share[l].open = 0;
}

static void find_rates(struct flow *s, const struct link *link)
{
    s->n_heap = 0;
    for (int32_t i = 0; i < s->n_used; i++) {
        int32_t l = s->used[i];
        if (s->live[l] == 0)
            continue;
        s->share[l] = (struct share){ link[l].bandwidth, s->load[l], s->live[l] };
        s->level[l] = link[l].bandwidth / s->load[l];
        s->heap[s->n_heap++] = l;
    }
    for (int32_t i = s->n_heap / 2 - 1; i >= 0; i--)
        heap_down(s, i);
    for (struct fluid *f = s->fluid, *end = f + s->n; f < end; f++)
        f->rate = f->work == INFINITY ? 0 : -1; /* -1: still rising */

    double full = 0;
    while (s->n_heap > 0) {
        int32_t l = s->heap[0];
        const struct share *k = &s->share[l];
        if (k->open == 0) {
            heap_drop(s);
            continue;
        }
        /* Fluids that stopped elsewhere left room here, so the level may have risen since it was last looked at.
         * It cannot fall: rounding apart, no fluid stopped above it. */
        double level = larger(k->left / k->weight, full);
        if (level > s->level[l]) {
            s->level[l] = level;
            heap_down(s, 0);
            if (s->heap[0] != l)
                continue;
        }
        full = s->level[l];
        heap_drop(s);
        fill(s, l, full);
    }
    s->need_rates = false;
    s->need_next = true;
}

static void find_next(struct flow *s)
{
    double first = INFINITY, work = 0, rate = 0;
    struct fluid *end = s->fluid + s->n;
    for (struct fluid *f = s->fluid; f < end; f++) {
        f->left = f->work / f->rate;
        first = f->left < first ? f->left : first;
    }
    for (const struct fluid *f = s->fluid; f < end; f++) {
        if (f->left <= first + f->slack) {
            work += f->work;
            rate += f->rate;
        }
    }
    s->first = first;
    s->next = work / rate;
    s->need_next = false;
}

/* ---- time ---- */

/* Fluid f reaches the end of its work; a bound fluid may have another stretch before it. */
static void end_fluid(struct net *net, struct flow *s, int32_t f)
{
    struct part *p = &s->part[f];
    if (!p->milestone) {
        net_part_end(net, p->slot, p->receiver, s->now + p->latency);
    } else {
        const struct milestone *m = &p->milestone[p->next];
        double at = m->at;
        for (; p->next < p->n_milestones && m->at == at; m++, p->next++)
            net_part_end(net, p->slot, m->receiver, s->now + m->latency);
        if (p->next < p->n_milestones) {
            s->fluid[f].work = m->at - at;
            return;
        }
    }
    for (const struct hop *h = s->hop + s->fluid[f].hop, *end = h + s->fluid[f].n_hops; h < end; h++) {
        net->link_bytes[h->link] += h->weight * p->amount;
        s->load[h->link] = --s->live[h->link] > 0 ? s->load[h->link] - h->weight : 0;
    }
    free(p->milestone);
    p->milestone = NULL;
    s->fluid[f].work = INFINITY;
    s->fluid[f].rate = 0;
    s->n_live--;
    s->need_rates = true;
}

static void work_on(struct fluid *f, double seconds)
{
    f->work = larger(f->work - f->rate * seconds, 0);
}

static int flow_advance(struct net *net, double until, bool *any, struct err *err)
{
    (void)err;
    struct flow *s = net->priv;
    if (s->need_rates) {
        if (s->n > 64 && s->n_live < s->n / 2)
            relist(s);
        find_rates(s, net->topology->link);
    }
    if (s->need_next)
        find_next(s);
    if (s->now + s->next > until)
        return 0; /* nothing is moved: a start before `until` would have to move it back */
    s->need_next = true;
    *any = true;
    s->now += s->next;
    for (int32_t f = 0; f < s->n; f++) {
        if (s->fluid[f].left <= s->first + s->fluid[f].slack)
            end_fluid(net, s, f);
        else
            work_on(&s->fluid[f], s->next);
    }
    return 0;
}

/* ---- start ---- */

/* Sums bytes[] by link and lists the links in touched[]; returns the exchange's bound, counts crossings. */
static double weigh(struct flow *s, const struct topology *t, const struct net_flow *flow, size_t n, size_t *n_flows,
                    size_t *n_hops)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    *n_flows = *n_hops = 0;
    s->n_touched = 0;
    for (size_t i = 0; i < n; i++) {
        if (!net_moves(&flow[i]))
            continue;
        int hops = net_route(t, &flow[i], link, NULL);
        for (int h = 0; h < hops; h++) {
            if (s->bytes[link[h]] == 0)
                s->touched[s->n_touched++] = link[h];
            s->bytes[link[h]] += flow[i].bytes;
        }
        *n_hops += (size_t)hops;
        ++*n_flows;
    }
    double bound = 0;
    for (int32_t i = 0; i < s->n_touched; i++) {
        int32_t l = s->touched[i];
        s->seconds[l] = s->bytes[l] / t->link[l].bandwidth;
        bound = larger(bound, s->seconds[l]);
    }
    return bound;
}

static int by_time(const void *a, const void *b)
{
    const struct milestone *x = a, *y = b;
    return x->at != y->at ? (x->at < y->at ? -1 : 1) : x->receiver - y->receiver;
}

/* When each receiver's busiest link is done, were the exchange alone. */
static int find_milestones(struct net *net, struct flow *s, int32_t slot, const struct net_flow *flow, size_t n,
                           struct part *p, struct err *err)
{
    const struct net_exchange *x = &net->exchange[slot];
    const struct topology *t = net->topology;
    p->milestone = calloc((size_t)x->n_receivers, sizeof *p->milestone);
    if (!p->milestone)
        return err_set(err, ERR_MEMORY, "net: out of memory for %d receivers", x->n_receivers);
    int32_t link[TOPOLOGY_MAX_HOPS];
    double latency;
    for (size_t i = 0; i < n; i++) {
        if (!net_moves(&flow[i]))
            continue;
        struct milestone *m = &p->milestone[net->receiver_of[flow[i].dst]];
        int hops = net_route(t, &flow[i], link, &latency);
        double at = 0;
        for (int h = 0; h < hops; h++)
            at = larger(at, s->seconds[link[h]]);
        if (at > m->at || (at == m->at && latency < m->latency)) { /* the least that the last byte can need */
            m->at = at;
            m->latency = latency;
        }
    }
    for (int32_t r = 0; r < x->n_receivers; r++) {
        p->milestone[r].receiver = r;
        if (p->milestone[r].at > 0) {
            x->receiver[r].n_left = 1; /* one part, however many flows */
            p->milestone[p->n_milestones++] = p->milestone[r];
        }
    }
    qsort(p->milestone, (size_t)p->n_milestones, sizeof *p->milestone, by_time);
    return 0;
}

static int start_bound(struct net *net, struct flow *s, int32_t slot, const struct net_flow *flow, size_t n,
                       double bound, struct err *err)
{
    int rc = reserve(s, 1, (size_t)s->n_touched, err);
    struct part p = { .slot = slot, .amount = bound };
    if (rc || (rc = find_milestones(net, s, slot, flow, n, &p, err)))
        return rc;
    s->fluid[s->n] = (struct fluid){
        .work = p.milestone[0].at, .slack = bound * tolerance[NET_BOUND], .hop = s->n_hops, .n_hops = s->n_touched
    };
    s->part[s->n++] = p;
    for (int32_t i = 0; i < s->n_touched; i++)
        s->hop[s->n_hops++] = (struct hop){ s->touched[i], s->bytes[s->touched[i]] / bound };
    return 0;
}

static int start_flows(struct net *net, struct flow *s, int32_t slot, const struct net_flow *flow, size_t n,
                       double bound, size_t n_flows, size_t n_hops, struct err *err)
{
    int rc = reserve(s, n_flows, n_hops, err);
    if (rc)
        return rc;
    for (size_t i = 0; i < n; i++) {
        if (!net_moves(&flow[i]))
            continue;
        int32_t link[TOPOLOGY_MAX_HOPS];
        struct part p = { .slot = slot, .receiver = net->receiver_of[flow[i].dst], .amount = flow[i].bytes };
        int hops = net_route(net->topology, &flow[i], link, &p.latency);
        s->fluid[s->n] = (struct fluid){
            .work = flow[i].bytes, .slack = bound * tolerance[net->tier], .hop = s->n_hops, .n_hops = hops
        };
        s->part[s->n++] = p;
        for (int h = 0; h < hops; h++)
            s->hop[s->n_hops++] = (struct hop){ link[h], 1 };
    }
    return 0;
}

static int flow_start(struct net *net, double now, int32_t slot, const struct net_flow *flow, size_t n, struct err *err)
{
    struct flow *s = net->priv;
    size_t n_flows, n_hops;
    if (now > s->now) {
        if (s->need_rates && s->n_live > 0)
            find_rates(s, net->topology->link);
        for (int32_t f = 0; f < s->n; f++)
            work_on(&s->fluid[f], now - s->now);
        s->now = now;
    }
    double bound = weigh(s, net->topology, flow, n, &n_flows, &n_hops);
    int rc = net->tier == NET_BOUND ? start_bound(net, s, slot, flow, n, bound, err)
                                    : start_flows(net, s, slot, flow, n, bound, n_flows, n_hops, err);
    for (int32_t i = 0; i < s->n_touched; i++)
        s->bytes[s->touched[i]] = 0;
    if (rc == 0)
        relist(s);
    s->need_rates = true;
    return rc;
}

const struct net_ops net_flow_ops = { flow_open, flow_start, flow_advance, flow_close };
