/* SPDX-License-Identifier: Apache-2.0
 * flow_rates.c - which flows are on which link, and the rates that links then allow. Most time goes to fill(). */
#include "config.h"

#include "flow.h"

#include <math.h>
#include <string.h>

/* ---- lists ---- */

static void use(struct flow *s, int32_t l, int32_t weight, int32_t n)
{
    struct link_state *k = &s->link[l];
    if (k->live == 0 && l != s->sink)
        s->used[s->n_used++] = l;
    k->live += weight;
    k->n += n;
}

void flow_relist(struct flow *s)
{
    int32_t n = 0, n_hops = 0;
    for (int32_t i = 0; i < s->n_used; i++)
        s->link[s->used[i]].live = s->link[s->used[i]].n = 0;
    s->n_used = 0;
    for (int32_t f = 0; f < s->n; f++) {
        if (!(s->work[f] < INFINITY))
            continue;
        struct ends e = s->ends[f];
        if (e.a >= 0) {
            use(s, e.a, 1, 1);
            use(s, e.b, 1, 1);
        } else {
            memmove(s->hop + n_hops, s->hop + ~e.a, sizeof *s->hop * (size_t)e.b);
            e.a = ~n_hops;
            for (int32_t h = 0; h < e.b; h++, n_hops++)
                use(s, s->hop[n_hops].link, s->hop[n_hops].weight, 1);
        }
        s->work[n] = s->work[f];
        s->ends[n] = e;
        s->part[n++] = s->part[f];
    }
    s->n = s->n_live = n;
    s->n_hops = n_hops;

    int32_t first = 0;
    for (int32_t i = 0; i < s->n_used; i++) {
        struct link_state *k = &s->link[s->used[i]];
        k->first = first;
        first += k->n;
        k->n = 0;
    }
    s->n_list = first;
    s->link[s->sink] = (struct link_state){ .n = 0 };
    for (int32_t f = 0; f < n; f++) {
        struct ends e = s->ends[f];
        if (e.a >= 0) {
            struct link_state *a = &s->link[e.a], *b = &s->link[e.b];
            s->place[f].a = a->first + a->n++;
            s->list[s->place[f].a] = e.b;
            if (e.b == s->sink)
                continue;
            s->place[f].b = b->first + b->n++;
            s->list[s->place[f].b] = e.a;
        } else {
            for (struct hop *h = s->hop + ~e.a, *end = h + e.b; h < end; h++) {
                struct link_state *k = &s->link[h->link];
                h->place = k->first + k->n++;
                s->list[h->place] = ~f;
            }
        }
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

/* Link l is full at `rate`: its flows that were still rising stay there, and leave their other links the rest. Those
 * are the flows none of whose links was full: a full link has nothing open. */
static void fill(struct flow *s, int32_t l, double rate)
{
    const int32_t *list = s->list + s->link[l].first;
    const double taken[2] = { 0, rate };
    for (int32_t i = 0, n = s->link[l].n; i < n; i++) {
        if (list[i] >= 0) { /* most are here, and half of them rise: no branch */
            struct link_share *k = &s->share[list[i]];
            int32_t open = k->open > 0;
            k->open -= open;
            k->left -= taken[open];
            continue;
        }
        struct ends e = s->ends[~list[i]];
        const struct hop *hop = s->hop + ~e.a;
        int32_t h = 0;
        while (h < e.b && s->share[hop[h].link].open > 0)
            h++;
        for (int32_t k = 0; h == e.b && k < e.b; k++) {
            if (hop[k].link == l)
                continue;
            s->share[hop[k].link].left -= rate * hop[k].weight;
            s->share[hop[k].link].open -= hop[k].weight;
        }
    }
    s->pass[l].rate = rate;
    s->share[l].open = 0;
}

void flow_find_rates(const struct net *net, struct flow *s)
{
    s->n_heap = 0;
    for (int32_t i = 0; i < s->n_used; i++) {
        int32_t l = s->used[i];
        struct link_state *k = &s->link[l];
        s->pass[l].rate = INFINITY; /* stays so on a link that is never full */
        if (k->live == 0) {
            s->share[l].open = 0;
            continue;
        }
        double capacity = net->capacity[l];
        k->extra = s->credits ? smaller(k->credit / s->repay, capacity) : 0;
        s->share[l] = (struct link_share){ capacity + k->extra, k->live };
        s->level[l] = s->share[l].left / k->live;
        s->heap[s->n_heap++] = l;
    }
    for (int32_t i = s->n_heap / 2 - 1; i >= 0; i--)
        heap_down(s, i);

    double full = 0;
    while (s->n_heap > 0) {
        int32_t l = s->heap[0];
        const struct link_share *k = &s->share[l];
        if (k->open == 0) {
            heap_drop(s);
            continue;
        }
        /* Flows that stopped elsewhere left room here, so the level may have risen since it was last looked at.
         * It cannot fall: rounding apart, no flow stopped above it. */
        double level = larger(k->left / k->open, full);
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
}
