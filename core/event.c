/* SPDX-License-Identifier: Apache-2.0
 * event.c - binary heap; invariant: no element is before its parent. */
#include "config.h"

#include "event.h"

#include <math.h>
#include <stdlib.h>

static bool before(const struct event *a, const struct event *b)
{
    return a->time < b->time || (a->time == b->time && a->sequence < b->sequence);
}

bool event_push(struct event_queue *q, double time, int32_t what)
{
    if (q->n == q->room) {
        size_t room = q->room ? 2 * q->room : 64;
        struct event *heap = realloc(q->heap, room * sizeof *heap);
        if (!heap)
            return false;
        q->heap = heap;
        q->room = room;
    }
    struct event e = { time, q->next_sequence++, what };
    size_t i = q->n++;
    while (i > 0 && before(&e, &q->heap[(i - 1) / 2])) {
        q->heap[i] = q->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    q->heap[i] = e;
    return true;
}

bool event_pop(struct event_queue *q, struct event *out)
{
    if (q->n == 0)
        return false;
    *out = q->heap[0];
    struct event last = q->heap[--q->n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= q->n)
            break;
        if (child + 1 < q->n && before(&q->heap[child + 1], &q->heap[child]))
            child++;
        if (!before(&q->heap[child], &last))
            break;
        q->heap[i] = q->heap[child];
        i = child;
    }
    q->heap[i] = last;
    return true;
}

double event_next(const struct event_queue *q)
{
    return q->n ? q->heap[0].time : INFINITY;
}

void event_free(struct event_queue *q)
{
    free(q->heap);
    *q = (struct event_queue){ 0 };
}
