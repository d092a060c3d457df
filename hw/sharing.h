/* SPDX-License-Identifier: Apache-2.0
 * sharing.h - kernels that run on one device at the same time share it.
 *
 * A kernel alone keeps a share of the device's arithmetic and a share of its memory bandwidth busy (kernel_cost). While
 * the shares of all that run together come to more than there is, all slow down alike: by the larger of the two sums.
 * An exchange whose kernel takes SMs leaves fewer to arithmetic, and memory bandwidth as it is. */
#ifndef SHARING_H
#define SHARING_H

#include "machine.h"

struct sharing;

/* When the kernel on a slot (device * n_streams + stream) ends as things are. What starts or ends beside it on the
 * device may give it another end, and this one is stale then. INFINITY: its device fails before. */
struct kernel_end { double time; int32_t slot; };

/* NULL: out of memory. */
struct sharing *sharing_open(const struct topology *, int32_t n_streams);
void sharing_close(struct sharing *);
/* Nothing runs any more. */
void sharing_reset(struct sharing *);

/* A kernel starts on an idle stream. Returns the ends that this changes, its own among them; *n of them, valid until
 * the next call. */
const struct kernel_end *sharing_start(struct sharing *, double now, int32_t device, int32_t stream,
                                       const struct kernel_cost *, int *n);
/* An exchange takes SMs of a device, or gives them back (< 0). */
const struct kernel_end *sharing_take(struct sharing *, double now, int32_t device, int32_t sms, int *n);
/* Whether the kernel on a slot ends exactly now. If so it is gone; *n of the others end at other times. */
bool sharing_finish(struct sharing *, double now, int32_t slot, const struct kernel_end **, int *n);

#endif
