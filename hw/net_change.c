/* SPDX-License-Identifier: Apache-2.0
 * net_change.c - links that change or fail while exchanges are under way. */
#include "config.h"

#include "net.h"

#include <float.h>
#include <math.h>
#include <stdio.h>

double net_next_change(const struct net *net)
{
    const struct topology *t = net->topology;
    return net->n_changed < t->n_changes ? t->change[net->n_changed].at : INFINITY;
}

const struct link_change *net_due_change(const struct net *net, double now)
{
    /* `now` is a sum, and may have been rounded to just before it. */
    if (net_next_change(net) > now * (1 + 8 * DBL_EPSILON))
        return NULL;
    return &net->topology->change[net->n_changed];
}

void net_change(struct net *net)
{
    const struct link_change *c = &net->topology->change[net->n_changed++];
    net->capacity[c->link] = c->bandwidth;
}

int net_stuck(const struct net *net, int32_t link, int32_t src, int32_t slot, int32_t receiver, struct err *err)
{
    const struct topology *t = net->topology;
    const struct net_exchange *x = &net->exchange[slot];
    double at = 0;
    for (int32_t i = 0; i < net->n_changed; i++)
        if (t->change[i].link == link)
            at = t->change[i].at;
    char from[32] = "";
    if (src >= 0)
        snprintf(from, sizeof from, " from %d", src);
    return err_set(err, ERR_RUN, "link %s failed at %.9g s, for good: the exchange%s to %d can not end",
                   t->link[link].name, at, from, x->receiver[receiver].dst);
}
