/* SPDX-License-Identifier: Apache-2.0
 * bound.c - tier bound of net: every link on its own.
 *
 * A link carries the bytes that each exchange puts on it as if all of them were there from the start, and nothing else
 * held them back; exchanges that are on it together have equal shares of its bandwidth. A receiver has everything when
 * the last of the links that its flows cross is done with the exchange. No way of sharing links keeps one busier, so
 * that the last arrival is never later than in a tier that minds every flow.
 *
 * A link does not look at its exchanges one by one: `served` counts the bytes that each of them has had since the link
 * was last idle, and an exchange is done when that has grown by what it brought. */
#include "config.h"

#include "net.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct job { /* what one exchange has for one link */
    double end, bytes; /* done when `served` is at end */
    double latency;    /* the least among its flows */
    int32_t slot;
    int32_t of; /* of the exchange's load, its link: whom that concerns */
    int32_t next;      /* by (end, job), or free; -1 ends */
};

struct station { /* a link */
    double served, at; /* brought up to date at that time */
    double due;        /* when the first job is done, at the present bandwidth */
    double latency;    /* the least among the flows since it was last idle: any of them might be its last */
    int32_t first, n;  /* jobs */
    int32_t heap;      /* place, or -1 */
};

struct crowd { /* an exchange under way */
    struct net_load *load;
    int32_t n_links;
};

struct bound {
    double now; /* s since net->epoch */
    struct station *link;
    int32_t *heap, n_heap; /* links with jobs, first due first */
    struct job *job;
    int32_t n_jobs, room_jobs, free_job;
    struct crowd *crowd; /* by exchange */
    int32_t room_slots;
    struct load_link *fresh; /* [links] those of the exchange that is reduced */
    int32_t n_fresh, *fresh_of; /* fresh_of: by link, -1 between calls */
};

/* ---- memory ---- */

static void bound_close(struct net *net)
{
    struct bound *s = net->priv;
    if (!s)
        return;
    for (int32_t i = 0; i < s->room_slots; i++)
        net_load_free(s->crowd[i].load);
    void *const all[] = { s->link, s->heap, s->job, s->crowd, s->fresh, s->fresh_of };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    free(s);
    net->priv = NULL;
}

static int bound_open(struct net *net, struct err *err)
{
    struct bound *s = net->priv = calloc(1, sizeof *s);
    size_t n = (size_t)net->topology->n_links + 1;
    if (!s || !(s->link = calloc(n, sizeof *s->link)) || !(s->heap = calloc(n, sizeof *s->heap)) ||
        !(s->fresh = calloc(n, sizeof *s->fresh)) || !(s->fresh_of = calloc(n, sizeof *s->fresh_of)))
        return err_set(err, ERR_MEMORY, "net: out of memory for %zu links", n);
    for (size_t l = 0; l < n; l++) {
        s->link[l] = (struct station){ .first = -1, .heap = -1 };
        s->fresh_of[l] = -1;
    }
    s->free_job = -1;
    return 0;
}

static int crowd_reserve(struct net *net, struct bound *s, struct err *err)
{
    if (net->n_slots <= s->room_slots)
        return 0;
    struct crowd *c = realloc(s->crowd, (size_t)net->n_slots * sizeof *c);
    if (!c)
        return err_set(err, ERR_MEMORY, "net: out of memory for %d exchanges", net->n_slots);
    memset(c + s->room_slots, 0, (size_t)(net->n_slots - s->room_slots) * sizeof *c);
    s->crowd = c;
    s->room_slots = net->n_slots;
    return 0;
}

static int32_t job_take(struct bound *s)
{
    int32_t j = s->free_job;
    if (j >= 0) {
        s->free_job = s->job[j].next;
        return j;
    }
    if (s->n_jobs == s->room_jobs) {
        int32_t room = 2 * s->room_jobs + 256;
        struct job *job = realloc(s->job, (size_t)room * sizeof *job);
        if (!job)
            return -1;
        s->job = job;
        s->room_jobs = room;
    }
    return s->n_jobs++;
}

/* ---- links with jobs, by (due, link) ---- */

static bool before(const struct bound *s, int32_t a, int32_t b)
{
    return s->link[a].due != s->link[b].due ? s->link[a].due < s->link[b].due : a < b;
}

static void heap_put(struct bound *s, int32_t i, int32_t l)
{
    s->heap[i] = l;
    s->link[l].heap = i;
}

/* Link l, at place i or with a gap there, goes where it belongs. */
static void heap_settle(struct bound *s, int32_t i, int32_t l)
{
    for (; i > 0 && before(s, l, s->heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap_put(s, i, s->heap[(i - 1) / 2]);
    for (int32_t child; (child = 2 * i + 1) < s->n_heap; i = child) {
        if (child + 1 < s->n_heap && before(s, s->heap[child + 1], s->heap[child]))
            child++;
        if (!before(s, s->heap[child], l))
            break;
        heap_put(s, i, s->heap[child]);
    }
    heap_put(s, i, l);
}

static void heap_drop(struct bound *s, int32_t l)
{
    int32_t i = s->link[l].heap, last = s->heap[--s->n_heap];
    s->link[l].heap = -1;
    if (last != l)
        heap_settle(s, i, last);
}

/* ---- one link ---- */

static void bring_up(const struct net *net, struct bound *s, int32_t l)
{
    struct station *k = &s->link[l];
    if (k->n > 0)
        k->served += (s->now - k->at) * net->capacity[l] / k->n;
    k->at = s->now;
}

/* Jobs or bandwidth of a link that was brought up to date have changed. */
static void schedule(const struct net *net, struct bound *s, int32_t l)
{
    struct station *k = &s->link[l];
    if (k->n == 0) {
        k->served = 0;
        if (k->heap >= 0)
            heap_drop(s, l);
        return;
    }
    double left = s->job[k->first].end - k->served;
    if (left < 0)
        left = 0;
    k->due = net->capacity[l] > 0 ? k->at + left * k->n / net->capacity[l] : INFINITY;
    heap_settle(s, k->heap >= 0 ? k->heap : s->n_heap++, l);
}

static void job_add(struct bound *s, int32_t l, int32_t j)
{
    struct station *k = &s->link[l];
    int32_t *at = &k->first;
    s->job[j].end = k->served + s->job[j].bytes;
    while (*at >= 0 && s->job[*at].end <= s->job[j].end)
        at = &s->job[*at].next;
    s->job[j].next = *at;
    *at = j;
    if (k->n++ == 0 || s->job[j].latency < k->latency)
        k->latency = s->job[j].latency;
}

/* The first job of link l is done: so is that link for its receivers. */
static void job_end(struct net *net, struct bound *s, int32_t l)
{
    struct station *k = &s->link[l];
    int32_t j = k->first;
    struct job job = s->job[j];
    struct crowd *c = &s->crowd[job.slot];
    const struct load_link *load = &c->load->link[job.of];
    k->first = job.next;
    k->n--;
    k->served = job.end; /* as counted, but for rounding */
    s->job[j].next = s->free_job;
    s->free_job = j;
    net->carrying[l] += job.bytes;
    if (load->only >= 0)
        net_part_end(net, job.slot, load->only, s->now + k->latency);
    else
        for (int32_t w = 0; w < load->n_words; w++)
            for (uint64_t bits = c->load->bits[load->at + w]; bits; bits &= bits - 1)
                net_part_end(net, job.slot, 64 * (load->first_word + w) + __builtin_ctzll(bits), s->now + k->latency);
    if (--c->n_links == 0) {
        net_load_free(c->load);
        c->load = NULL;
    }
}

/* ---- time ---- */

static void change_links(struct net *net, struct bound *s)
{
    for (const struct link_change *c; (c = net_due_change(net, net->epoch + s->now));) {
        bring_up(net, s, c->link);
        net_change(net);
        if (s->link[c->link].n > 0)
            schedule(net, s, c->link);
    }
}

static int stuck(const struct net *net, const struct bound *s, int32_t l, struct err *err)
{
    const struct job *job = &s->job[s->link[l].first];
    const struct net_load *x = s->crowd[job->slot].load;
    const struct load_link *load = &x->link[job->of];
    const int32_t receiver = load->only >= 0 ? load->only
                                             : 64 * load->first_word + __builtin_ctzll(x->bits[load->at]);
    return net_stuck(net, l, -1, job->slot, receiver, err);
}

static int bound_advance(struct net *net, double until, bool *any, struct err *err)
{
    struct bound *s = net->priv;
    while (s->n_heap > 0) {
        int32_t l = s->heap[0];
        double due = s->link[l].due, change = net_next_change(net) - net->epoch;
        if (change < due) {
            if (net->epoch + change > until)
                return 0;
            s->now = change > s->now ? change : s->now;
            change_links(net, s);
            continue;
        }
        if (net->epoch + due > until)
            return 0;
        if (due == INFINITY)
            return stuck(net, s, l, err);
        s->now = due;
        bring_up(net, s, l);
        job_end(net, s, l);
        schedule(net, s, l);
        *any = true;
        if (s->n_heap == 0 || s->link[s->heap[0]].due > due)
            return 0;
    }
    return 0;
}

/* ---- start ---- */

/* Room for one more row of bits; doubles. */
static int row_add(struct net_load *x, struct err *err)
{
    int32_t n = x->n_rows;
    if ((n & (n - 1)) == 0) {
        size_t words = (size_t)x->words, room = n ? 2 * (size_t)n : 1;
        uint64_t *bits = realloc(x->bits, room * words * sizeof *bits);
        if (!bits)
            return err_set(err, ERR_MEMORY, "net: out of memory for %d receivers on %zu links", x->n_receivers, room);
        memset(bits + (size_t)n * words, 0, (room - (size_t)n) * words * sizeof *bits);
        x->bits = bits;
    }
    x->n_rows++;
    return 0;
}

/* Receiver r waits for the link, too. Many links have one receiver, and no row. */
static int concern(struct net_load *x, struct load_link *l, int32_t r, struct err *err)
{
    if (l->only == r)
        return 0;
    if (l->only >= 0) {
        if (row_add(x, err))
            return ERR_MEMORY;
        l->at = x->n_rows - 1;
        x->bits[(size_t)l->at * (size_t)x->words + (size_t)(l->only / 64)] |= (uint64_t)1 << (l->only % 64);
        l->only = -1;
    }
    uint64_t *word = &x->bits[(size_t)l->at * (size_t)x->words + (size_t)(r / 64)], bit = (uint64_t)1 << (r % 64);
    x->receiver[r].n_left += !(*word & bit);
    *word |= bit;
    return 0;
}

/* More of the exchange's flows by link, in fresh[]; whom each link concerns. */
static int bound_reduce(struct net *net, const struct net_flow *flow, size_t n, struct net_load *x, struct err *err)
{
    struct bound *s = net->priv;
    int32_t link[TOPOLOGY_MAX_HOPS];
    double latency;
    for (size_t i = 0; i < n; i++) {
        if (!net_moves(&flow[i]))
            continue;
        int hops = net_route(net->topology, &flow[i], link, &latency);
        int32_t r = net->receiver_of[flow[i].dst];
        if (hops == 0 && latency > x->receiver[r].arrival)
            x->receiver[r].arrival = latency;
        for (int h = 0; h < hops; h++) {
            int32_t *of = &s->fresh_of[link[h]];
            if (*of < 0) {
                *of = s->n_fresh++;
                s->fresh[*of] = (struct load_link){ .link = link[h], .only = r, .latency = latency };
                x->receiver[r].n_left++;
            }
            struct load_link *l = &s->fresh[*of];
            l->bytes += flow[i].bytes;
            l->payload += flow[i].payload;
            l->latency = latency < l->latency ? latency : l->latency;
            if (concern(x, l, r, err))
                return ERR_MEMORY;
        }
    }
    return 0;
}

/* Of every link's row, the words from the first to the last that are not 0: receivers that are numbered one after
 * another, as those of a node are, have one or two. */
static int keep_words(struct net_load *x, struct err *err)
{
    int64_t n = 0;
    for (int32_t i = 0; i < x->n_links; i++) {
        struct load_link *l = &x->link[i];
        const uint64_t *row = x->bits + (size_t)l->at * (size_t)x->words;
        int32_t first = 0, end = l->only >= 0 ? 0 : x->words;
        while (first < end && !row[first])
            first++;
        while (first < end && !row[end - 1])
            end--;
        l->first_word = first;
        l->n_words = end - first;
        n += l->n_words;
    }
    uint64_t *bits = n > 0 ? malloc((size_t)n * sizeof *bits) : NULL;
    if (n > 0 && !bits)
        return err_set(err, ERR_MEMORY, "net: out of memory for %d receivers", x->n_receivers);
    n = 0;
    for (int32_t i = 0; i < x->n_links; i++) {
        struct load_link *l = &x->link[i];
        if (l->n_words > 0)
            memcpy(bits + n, x->bits + (size_t)l->at * (size_t)x->words + (size_t)l->first_word,
                   (size_t)l->n_words * sizeof *bits);
        l->at = n;
        n += l->n_words;
    }
    free(x->bits);
    x->bits = bits;
    return 0;
}

static int bound_reduced(struct net *net, struct net_load *x, struct err *err)
{
    struct bound *s = net->priv;
    for (int32_t i = 0; i < s->n_fresh; i++)
        s->fresh_of[s->fresh[i].link] = -1;
    x->n_links = s->n_fresh;
    s->n_fresh = 0;
    if (x->n_links > 0 && !(x->link = malloc((size_t)x->n_links * sizeof *x->link)))
        return err_set(err, ERR_MEMORY, "net: out of memory for %d links", x->n_links);
    if (x->n_links > 0)
        memcpy(x->link, s->fresh, (size_t)x->n_links * sizeof *x->link);
    return keep_words(x, err);
}

static int bound_start_load(struct net *net, double now, int32_t slot, struct net_load *x, struct err *err)
{
    struct bound *s = net->priv;
    if (crowd_reserve(net, s, err) < 0) {
        net_load_free(x);
        return err->code;
    }
    if (s->n_heap == 0) {
        net_epoch(net, now);
        s->now = 0;
    } else if (now - net->epoch > s->now) {
        s->now = now - net->epoch;
    }
    change_links(net, s);
    if (x->n_links == 0) {
        net_load_free(x);
        return 0;
    }
    s->crowd[slot] = (struct crowd){ x, x->n_links };
    for (int32_t i = 0; i < x->n_links; i++) {
        const struct load_link *l = &x->link[i];
        int32_t j = job_take(s);
        if (j < 0)
            return err_set(err, ERR_MEMORY, "net: out of memory for jobs");
        bring_up(net, s, l->link);
        s->job[j] = (struct job){ .bytes = l->bytes, .latency = l->latency, .slot = slot, .of = i };
        job_add(s, l->link, j);
        schedule(net, s, l->link);
    }
    return 0;
}

const struct net_ops net_bound_ops = { .open = bound_open, .advance = bound_advance, .close = bound_close,
                                       .reduce = bound_reduce, .reduced = bound_reduced,
                                       .start_load = bound_start_load };
