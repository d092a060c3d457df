/* SPDX-License-Identifier: Apache-2.0
 * net_load.c - exchanges without their flows: what they put on links, and whom that concerns. Only tier bound asks for
 * no more (bound.c). */
#include "config.h"

#include "net.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void net_load_free(struct net_load *load)
{
    if (!load)
        return;
    free(load->receiver);
    free(load->link);
    free(load->bits);
    free(load);
}

/* Flows are looked at while they are in the cache. */
#define FLOWS_AT_ONCE 256

/* Adds flows to the load; their receivers become its own. */
static int reduce_some(struct net *net, int64_t id, const struct net_flow *flow, size_t n, struct net_load *x,
                       struct err *err)
{
    if (net_list_receivers(net, 0, id, flow, n, err) < 0)
        return err->code;
    for (; x->n_receivers < net->n_listed; x->n_receivers++)
        x->receiver[x->n_receivers] = (struct net_receiver){ .dst = net->listed[x->n_receivers].dst };
    return net->ops->reduce(net, flow, n, x, err);
}

int net_reduce(struct net *net, int64_t id, size_t (*next)(void *from, struct net_flow *room, size_t n), void *from,
               struct net_load **out, struct err *err)
{
    struct net_flow flow[FLOWS_AT_ONCE];
    const size_t endpoints = (size_t)net_endpoints(net->topology);
    struct net_load *x = *out = calloc(1, sizeof *x);
    int rc = 0;
    if (!x || !(x->receiver = malloc(endpoints * sizeof *x->receiver)))
        rc = err_set(err, ERR_MEMORY, "net: out of memory for %zu receivers", endpoints);
    else
        x->words = (int32_t)((endpoints + 63) / 64);
    for (size_t n; rc == 0 && (n = next(from, flow, FLOWS_AT_ONCE)) > 0;)
        rc = reduce_some(net, id, flow, n, x, err);
    if (x && net->ops->reduced(net, x, err) < 0)
        rc = err->code;
    for (int32_t r = 0; rc == 0 && r < x->n_receivers; r++) {
        const struct net_receiver *l = &net->listed[r]; /* counts flows; parts are links */
        x->receiver[r].arrival = l->n_left > 0 ? fmax(l->arrival, x->receiver[r].arrival) : -1;
    }
    net_unlist(net);
    if (rc) {
        net_load_free(x);
        *out = NULL;
        return rc;
    }
    if (x->n_receivers > 0) {
        struct net_receiver *fits = realloc(x->receiver, (size_t)x->n_receivers * sizeof *fits);
        x->receiver = fits ? fits : x->receiver;
    }
    return 0;
}

struct listed_flows { const struct net_flow *flow; size_t n; };

static size_t next_listed(void *from, struct net_flow *room, size_t n)
{
    struct listed_flows *l = from;
    n = n < l->n ? n : l->n;
    memcpy(room, l->flow, n * sizeof *room);
    l->flow += n;
    l->n -= n;
    return n;
}

int32_t net_load_receivers(const struct net_load *load, uint8_t *gets)
{
    for (int32_t r = 0; r < load->n_receivers; r++)
        gets[load->receiver[r].dst] = 1;
    return load->n_receivers;
}

void net_load_payload(const struct net_load *load, double *bytes)
{
    for (int32_t i = 0; i < load->n_links; i++)
        bytes[load->link[i].link] += load->link[i].payload;
}

int net_reduce_listed(struct net *net, int64_t id, const struct net_flow *flow, size_t n, struct net_load **out,
                      struct err *err)
{
    struct listed_flows all = { flow, n };
    return net_reduce(net, id, next_listed, &all, out, err);
}
