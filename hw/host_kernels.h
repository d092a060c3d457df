/* SPDX-License-Identifier: Apache-2.0
 * host_kernels.h - what a rank runs for the kernels that are not routed experts: attention, gates, norms, dense and
 * shared FFNs, the head. Products have the shapes of the list, everything else moves its bytes; numbers are made up and
 * results unused. What `moelab calibrate` measures are these functions. */
#ifndef HOST_KERNELS_H
#define HOST_KERNELS_H

#include "err.h"
#include "graph.h"

#include <stdbool.h>
#include <stddef.h>

/* Operands are taken one after another from a ring that is larger than caches are, so that weights come from memory, as
 * those of a layer that ran long ago; results go around another. What is in the first never changes. */
struct host_rings { float *in, *out; size_t room_in, room_out, at_in, at_out; };

/* Floats of each, if no kernel needs more; queries of a prompt that are looked at together; floats that are moved at
 * once. */
enum { HOST_RING = 1 << 23, HOST_RINGS = 8 /* of the first, at most */, HOST_QUERIES = 64, HOST_MOVED = 1 << 16 };

/* Memory for what kernels work on, to be freed with free(); NULL: there is none. Whole pages, and large ones where the
 * system has those: with small ones speed depends on where they happen to lie, and differs from process to process. */
void *host_take(size_t bytes);
size_t host_taken(size_t bytes); /* what that makes of it */

/* Of all the tasks of a device, the floats that they read, but at most HOST_RINGS rings unless one needs more, and the
 * most that one writes; 0: it has no such task. */
struct host_room { size_t in, out; };
struct host_room host_kernel_room(const struct kernel *);
struct host_room host_rings_room(const struct moe_graph *, int32_t device);
/* Attention's core: tokens of a sequence that it looks at, and queries that do so at a time. */
bool host_is_attention(const struct kernel *);
int64_t host_seen(const struct kernel *);
size_t host_queries(const struct kernel *);

int host_rings_open(struct host_rings *, struct host_room, struct err *);
void host_rings_close(struct host_rings *);

void host_run_kernel(struct host_rings *, const struct kernel *);
/* A task that is no list: its FLOPs if they are what takes time, else its bytes. */
void host_run_plain(struct host_rings *, double flops, double bytes);

/* out = sum of weight[i] * row[i], of n rows of d floats, to which `before` is added unless NULL; out may be row[0]. */
void host_add_rows(float *out, const float *before, int64_t n, const float *const *row, const float *weight, int32_t d);
/* At least n rows of d, written by products of few rows, each with a matrix of its own, as outputs of experts are. */
float *host_make_rows(struct host_rings *, int64_t n, int32_t d);
/* What a combine task does: for each token two rows are added to a third and the result is normalised. rows: three for
 * each token, taken in no order. */
void host_run_sums(struct host_rings *, const float *rows, int64_t tokens, int32_t d);
/* What tells whether this processor is as fast as it can be at the moment: a few products. Rings of HOST_PROBE. */
enum { HOST_PROBE = 1 << 17 };
void host_probe(struct host_rings *);

/* C (m x n) = A (m x k) B (k x n), row by row, on one thread. */
void host_gemm(int64_t m, int64_t n, int64_t k, const float *a, const float *b, float *c);
/* gate[i] = silu(gate[i]) * up[i]. */
void host_activate(float *gate, const float *up, int64_t n);

#endif
