/* SPDX-License-Identifier: Apache-2.0
 * net_memo.c - exchanges that were solved before: layers and steps repeat them byte for byte.
 *
 * What a solver gives depends on the flows, in their order, and on the links alone, when nothing else is under way: so
 * an exchange that is found here need not be solved again. Flows are kept and compared, not hashed; they are needed
 * besides when something starts beside the repeated exchange after all. What was not used for longest goes first. */
#include "config.h"

#include "net.h"

#include <stdlib.h>
#include <string.h>

/* Bytes in all; an exchange may take half of them. */
static const size_t most = (size_t)64 << 20;

struct thin { int32_t src, dst; double bytes; };      /* of most flows that is all */
struct rest { double delay, at_least; int32_t path; bool loop; };

struct entry {
    struct net_solved solved; /* first: found by its address */
    struct thin *thin;        /* [n] */
    struct rest *rest;        /* [n], or NULL: all are zero */
    size_t n, size;           /* flows; bytes of all this */
    int32_t n_changed;
    uint64_t used;
};

struct net_memo {
    struct entry **entry; /* [n] */
    size_t n, room, size;
    uint64_t clock;
    struct entry *noted; /* or NULL */
};

struct net_memo *net_memo_open(void)
{
    return calloc(1, sizeof(struct net_memo));
}

static void entry_free(struct entry *e)
{
    if (!e)
        return;
    free(e->thin);
    free(e->rest);
    free(e->solved.receiver);
    free(e->solved.link);
    free(e->solved.bytes);
    free(e);
}

void net_memo_close(struct net_memo *m)
{
    if (!m)
        return;
    for (size_t i = 0; i < m->n; i++)
        entry_free(m->entry[i]);
    entry_free(m->noted);
    free(m->entry);
    free(m);
}

static bool is_thin(const struct net_flow *f)
{
    return f->path == 0 && !f->loop && f->delay == 0 && f->at_least == 0;
}

static inline uint64_t bits(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

/* Whether the entry's flows are these. Most calls look at all of them: differences are looked for a block at a time,
 * without a branch each. */
static bool same(const struct entry *e, const struct net_flow *flow)
{
    static const struct rest none = { 0, 0, 0, false };
    const struct rest *rest = e->rest ? e->rest : &none;
    size_t step = e->rest ? 1 : 0;
    for (size_t i = 0, end; i < e->n; i = end) {
        uint64_t differ = 0;
        int32_t others = 0;
        end = i + 64 < e->n ? i + 64 : e->n;
        for (size_t k = i; k < end; k++, rest += step) {
            const struct net_flow *f = &flow[k];
            const struct thin *t = &e->thin[k];
            differ |= (bits(f->bytes) ^ bits(t->bytes)) | (bits(f->delay) ^ bits(rest->delay)) |
                      (bits(f->at_least) ^ bits(rest->at_least));
            others |= (f->src ^ t->src) | (f->dst ^ t->dst) | (f->path ^ rest->path) | (f->loop ^ rest->loop);
        }
        if (differ || others)
            return false;
    }
    return true;
}

const struct net_solved *net_memo_find(struct net_memo *m, const struct net_flow *flow, size_t n, int32_t n_changed)
{
    for (size_t i = 0; i < m->n; i++) {
        struct entry *e = m->entry[i];
        if (e->n == n && e->n_changed == n_changed && same(e, flow)) {
            e->used = ++m->clock;
            return &e->solved;
        }
    }
    return NULL;
}

struct net_flow *net_memo_flows(const struct net_memo *m, const struct net_solved *solved, size_t *n)
{
    (void)m;
    const struct entry *e = (const struct entry *)(const void *)solved;
    struct net_flow *flow = malloc(e->n * sizeof *flow);
    *n = e->n;
    for (size_t i = 0; flow && i < e->n; i++) {
        flow[i] = (struct net_flow){ .src = e->thin[i].src, .dst = e->thin[i].dst, .bytes = e->thin[i].bytes };
        if (e->rest) {
            flow[i].path = e->rest[i].path;
            flow[i].loop = e->rest[i].loop;
            flow[i].delay = e->rest[i].delay;
            flow[i].at_least = e->rest[i].at_least;
        }
    }
    return flow;
}

bool net_memo_note(struct net_memo *m, const struct net_flow *flow, size_t n, int32_t n_changed)
{
    bool thin = true;
    entry_free(m->noted);
    m->noted = NULL;
    for (size_t i = 0; i < n && thin; i++)
        thin = is_thin(&flow[i]);
    size_t size = n * (sizeof(struct thin) + (thin ? 0 : sizeof(struct rest)));
    if (size > most / 2)
        return false;
    struct entry *e = m->noted = calloc(1, sizeof *e);
    if (!e || !(e->thin = malloc(n * sizeof *e->thin)) || (!thin && !(e->rest = malloc(n * sizeof *e->rest)))) {
        entry_free(e);
        m->noted = NULL;
        return false;
    }
    e->n = n;
    e->size = size;
    e->n_changed = n_changed;
    for (size_t i = 0; i < n; i++) {
        e->thin[i] = (struct thin){ flow[i].src, flow[i].dst, flow[i].bytes };
        if (!thin)
            e->rest[i] = (struct rest){ flow[i].delay, flow[i].at_least, flow[i].path, flow[i].loop };
    }
    return true;
}

/* Until there is room for `size` more bytes. */
static void forget(struct net_memo *m, size_t size)
{
    while (m->n > 0 && m->size + size > most) {
        size_t oldest = 0;
        for (size_t i = 1; i < m->n; i++)
            if (m->entry[i]->used < m->entry[oldest]->used)
                oldest = i;
        m->size -= m->entry[oldest]->size;
        entry_free(m->entry[oldest]);
        m->entry[oldest] = m->entry[--m->n];
    }
}

static bool fill_in(struct entry *e, const struct net_exchange *x, const double *link_bytes, int32_t n_links)
{
    struct net_solved *s = &e->solved;
    for (int32_t l = 0; l < n_links; l++)
        s->n_links += link_bytes[l] != 0;
    s->n_receivers = x->n_receivers;
    s->receiver = malloc((size_t)s->n_receivers * sizeof *s->receiver);
    s->link = malloc((size_t)s->n_links * sizeof *s->link + 1);
    s->bytes = malloc((size_t)s->n_links * sizeof *s->bytes + 1);
    if (!s->receiver || !s->link || !s->bytes)
        return false;
    memcpy(s->receiver, x->receiver, (size_t)s->n_receivers * sizeof *s->receiver);
    for (int32_t r = 0; r < s->n_receivers; r++) {
        s->receiver[r].told = false;
        s->end = s->receiver[r].arrival > s->end ? s->receiver[r].arrival : s->end;
    }
    for (int32_t l = 0, n = 0; l < n_links; l++) {
        if (link_bytes[l] != 0) {
            s->link[n] = l;
            s->bytes[n++] = link_bytes[l];
        }
    }
    e->size += sizeof *e + (size_t)s->n_receivers * sizeof *s->receiver + (size_t)s->n_links * 12;
    return true;
}

void net_memo_keep(struct net_memo *m, const struct net_exchange *x, const double *link_bytes, int32_t n_links)
{
    struct entry *e = m->noted;
    m->noted = NULL;
    if (!e || !fill_in(e, x, link_bytes, n_links)) {
        entry_free(e);
        return;
    }
    forget(m, e->size);
    if (m->n == m->room) {
        size_t room = 2 * m->room + 16;
        struct entry **all = realloc(m->entry, room * sizeof *all);
        if (!all) {
            entry_free(e);
            return;
        }
        m->entry = all;
        m->room = room;
    }
    e->used = ++m->clock;
    m->size += e->size;
    m->entry[m->n++] = e;
}
