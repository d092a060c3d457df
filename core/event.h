/* SPDX-License-Identifier: Apache-2.0
 * event.h - a queue of events keyed (time, sequence): equal times leave in the order in which they came. */
#ifndef EVENT_H
#define EVENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct event { double time; uint64_t sequence; int32_t what; };
struct event_queue { struct event *heap; size_t n, room; uint64_t next_sequence; };

/* false: out of memory. */
bool event_push(struct event_queue *, double time, int32_t what);
/* false: empty. */
bool event_pop(struct event_queue *, struct event *);
/* Time of the first event; INFINITY when there is none. */
double event_next(const struct event_queue *);
void event_free(struct event_queue *);

#endif
