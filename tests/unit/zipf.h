/* SPDX-License-Identifier: Apache-2.0
 * zipf.h - a seeded Zipf stream of requests, the same on every machine: for cache tests and benchmarks.
 *
 * splitmix64 stream of seed s: the i-th draw (i = 1, 2, ...) mixes s + i * golden. Ranks have weights 1/(r+1)^alpha and
 * are drawn by inverting the cumulative sum; a seeded shuffle turns ranks into object ids. The standard case is
 * 15360 objects (60 layers x 256 experts), 2,000,000 requests, alpha 0.99, seed 42, shuffle seed 7; its ids as
 * little-endian u16 have the SHA-256 a37f1d1b648366b7300a11584229f605bd9afccba8b28241483f5dcb0206b6a0. */
#ifndef ZIPF_H
#define ZIPF_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define ZIPF_OBJECTS 15360
#define ZIPF_REQUESTS 2000000
#define ZIPF_ALPHA 0.99
#define ZIPF_SEED 42
#define ZIPF_SHUFFLE_SEED 7

static inline uint64_t zipf_draw(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + i * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

/* n_requests object ids < n_objects (n_objects > 0) into out. Returns 0, or -1 when there is no memory. */
static inline int zipf_fill(uint32_t *out, size_t n_requests, uint32_t n_objects, double alpha, uint64_t seed,
                            uint64_t shuffle_seed)
{
    double *upto = malloc(n_objects * sizeof *upto);
    uint32_t *object = malloc(n_objects * sizeof *object);
    if (upto == NULL || object == NULL) {
        free(upto);
        free(object);
        return -1;
    }
    double sum = 0;
    for (uint32_t r = 0; r < n_objects; r++) {
        upto[r] = sum += 1 / pow(r + 1.0, alpha);
        object[r] = r;
    }
    for (uint32_t r = 0; r < n_objects; r++)
        upto[r] /= sum;
    for (uint32_t i = n_objects - 1; i > 0; i--) {
        uint32_t j = (uint32_t)(zipf_draw(shuffle_seed, n_objects - i) % (i + 1)), swap = object[i];
        object[i] = object[j];
        object[j] = swap;
    }
    for (size_t i = 0; i < n_requests; i++) {
        double u = (double)(zipf_draw(seed, i + 1) >> 11) * 0x1p-53;
        uint32_t low = 0, high = n_objects - 1; /* the first rank whose sum is > u is in [low, high] */
        while (low < high) {
            uint32_t middle = low + (high - low) / 2;
            if (upto[middle] > u)
                high = middle;
            else
                low = middle + 1;
        }
        out[i] = object[low];
    }
    free(upto);
    free(object);
    return 0;
}

#endif
