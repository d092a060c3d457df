/* SPDX-License-Identifier: Apache-2.0
 * host_store.h - where a rank's experts are when they are offloaded: in a file that is mapped into memory, and in
 * slots that loads fill.
 *
 * The file has no name: it is gone with the rank. A load reads an expert's weights past the cache of pages, as a
 * device's copy engine would, or where a file system does not have that copies them out of the mapping, whose pages
 * were given back before: every load reads the file (in memory there is none). A thread of its own does that, one load
 * after another, while the rank goes on. */
#ifndef HOST_STORE_H
#define HOST_STORE_H

#include "err.h"
#include "graph.h"

#include <stdbool.h>

struct host_store;

/* dir: where the file goes. */
int host_store_open(struct host_store **, const struct moe_model *, int32_t device, const char *dir, struct err *);
void host_store_close(struct host_store *);
/* A file of so many bytes of nothing in particular, to measure how long reading takes. */
int host_store_open_plain(struct host_store **, int32_t device, const char *dir, size_t bytes, struct err *);
/* Queues a read of it, from a whole page, into whole pages that host_take() gave; its number. At most HOST_READS, and
 * more after host_store_rewind() when all have ended. */
enum { HOST_READS = 8 };
int32_t host_store_read(struct host_store *, size_t at, size_t bytes, float *to);

/* Before a step's clock starts: assigns a slot to each of its loads, in the order of their ids, writes what is not in
 * the file yet, and has weights[i] point to where entry i of the graph's experts will find its own. weights:
 * [g->n_experts]. */
int host_store_prepare(struct host_store *, const struct moe_graph *, const float **weights, struct err *);
/* Before each time the step runs: what the slots had at its start, with the file's pages out of memory; drops times. */
void host_store_rewind(struct host_store *);

/* Queues a load; its number counts from 1. */
int32_t host_store_load(struct host_store *, int32_t task);
/* Until the load of that number has ended; 0: none. */
void host_store_wait(struct host_store *, int32_t number);
bool host_store_ended(struct host_store *, int32_t number);
/* Of a load that has ended: its beginning and end on the clock of `now`. */
void host_store_times(struct host_store *, int32_t number, double *start, double *end);

#endif
