/* SPDX-License-Identifier: Apache-2.0
 * message.c - what an exchange costs beside its bytes on the links and their latency.
 *
 *   start-up   of the kernel, and for each other device that a device sends to: later arrivals
 *   messages   each has bytes of its own on the links (headers), so small ones use them badly: size / (size +
 *              overhead); and its sender is busy with it for a time, so that nothing of a device that sends m messages
 *              is complete before m such times, whatever the links could do (LogGP's o; A. Alexandrov et al. 1995) */
#include "config.h"

#include "machine.h"

#include <string.h>

void message_apply(const struct topology *t, struct net_flow *flow, size_t n, double message_bytes, bool fused,
                   const struct message_count *sends)
{
    const struct exchange_costs *c = &t->exchange;
    for (size_t i = 0; i < n; i++) {
        struct net_flow *f = &flow[i];
        const struct message_count *out = &sends[f->src];
        if (f->bytes > 0 && (f->src != f->dst || f->loop))
            f->bytes += messages_of(f->bytes, message_bytes) * c->message_overhead;
        f->delay = fused ? 0 : c->startup + out->peers * c->per_peer;
        f->at_least = f->delay + out->messages * c->per_message;
    }
}

void message_costs(const struct topology *t, struct net_flow *flow, size_t n, double message_bytes, bool fused,
                   struct message_count *sends)
{
    const struct exchange_costs *c = &t->exchange;
    if (c->startup == 0 && c->per_peer == 0 && c->per_message == 0 && c->message_overhead == 0)
        return; /* flows are listed without costs */
    memset(sends, 0, sizeof *sends * (size_t)t->n_devices);
    for (size_t i = 0; i < n; i++) /* those of loops are flows only where there is one */
        message_add(t, sends, flow[i].src, flow[i].dst, flow[i].src != flow[i].dst || flow[i].loop ? flow[i].bytes : 0,
                    message_bytes);
    message_apply(t, flow, n, message_bytes, fused, sends);
}
