/* SPDX-License-Identifier: Apache-2.0
 * timed.h - a CUDA runtime that computes nothing and takes made-up times, for tests of what measures them. Work of a
 * stream starts when the stream comes to it; streams share all rates evenly. Device memory cannot be touched: whoever
 * names a range that was not allocated ends the test. */
#ifndef TIMED_H
#define TIMED_H

#include "machine.h"

#include <cuda_runtime_api.h>

/* Seconds before each, bytes per second after that. */
struct timed_gpu {
    struct device_spec device;           /* products and plain work: as a simulated machine has them */
    double copy_s, copy_bandwidth;       /* within memory: read and written together */
    double load_s, load_bandwidth, store_s, store_bandwidth; /* from the host and to it */
    double permute_bandwidth, combine_bandwidth, top_k_bandwidth;
    double memory;                       /* bytes that there are */
    int capability;                      /* to compute, the number before the point; 0: 9 */
    cudaError_t devices;                 /* what looking for them says */
};

void timed_open(const struct timed_gpu *);
/* Allocations, streams and events that nobody has freed. */
int timed_left(void);

#endif
