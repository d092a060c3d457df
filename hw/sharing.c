/* SPDX-License-Identifier: Apache-2.0
 * sharing.c - processor sharing of a device by the kernels that run on it; see sharing.h for the rule. */
#include "config.h"

#include "sharing.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct running {
    bool runs;
    double left;               /* seconds of running alone still to go, at `since` */
    double arithmetic, memory; /* shares of the device while it runs alone */
    double end;                /* as last told */
};

struct device {
    double since;   /* when `left` of its kernels was brought up to date */
    double slower;  /* by what all of them run slower than alone */
    int32_t n, sms; /* kernels; SMs that exchanges hold */
};

struct sharing {
    const struct topology *topology;
    int32_t n_streams;
    struct device *device;  /* [D] */
    struct running *kernel;  /* [D][n_streams] */
    struct kernel_end *end; /* [n_streams] what is returned */
};

struct sharing *sharing_open(const struct topology *t, int32_t n_streams)
{
    struct sharing *k = calloc(1, sizeof *k);
    if (!k)
        return NULL;
    k->topology = t;
    k->n_streams = n_streams;
    k->device = calloc((size_t)t->n_devices, sizeof *k->device);
    k->kernel = calloc((size_t)t->n_devices * (size_t)n_streams, sizeof *k->kernel);
    k->end = calloc((size_t)n_streams, sizeof *k->end);
    if (!k->device || !k->kernel || !k->end) {
        sharing_close(k);
        return NULL;
    }
    sharing_reset(k);
    return k;
}

void sharing_close(struct sharing *k)
{
    if (!k)
        return;
    free(k->device);
    free(k->kernel);
    free(k->end);
    free(k);
}

void sharing_reset(struct sharing *k)
{
    memset(k->kernel, 0, sizeof *k->kernel * (size_t)k->topology->n_devices * (size_t)k->n_streams);
    for (int32_t d = 0; d < k->topology->n_devices; d++)
        k->device[d] = (struct device){ .slower = 1 };
}

static struct running *sharing_of(struct sharing *k, int32_t device)
{
    return k->kernel + (size_t)device * (size_t)k->n_streams;
}

/* Takes the work done since the last change off what is left. */
static void catch_up(struct sharing *k, int32_t device, double now)
{
    struct device *d = &k->device[device];
    const double done = topology_work(k->topology, device, d->since, now) / d->slower;
    for (int32_t s = 0; s < k->n_streams && d->n > 0; s++) {
        struct running *x = &sharing_of(k, device)[s];
        x->left = x->runs ? fmax(0, x->left - done) : 0;
    }
    d->since = now;
}

/* The shares of what runs now, and the ends that follow. A kernel whose pace stays keeps its end to the last bit: only
 * `fresh`, which may be NULL, is told anew then. */
static const struct kernel_end *share(struct sharing *k, int32_t device, const struct running *fresh, int *n)
{
    struct device *d = &k->device[device];
    struct running *kernel = sharing_of(k, device);
    double arithmetic = 0, memory = 0;
    for (int32_t s = 0; s < k->n_streams; s++) {
        arithmetic += kernel[s].runs ? kernel[s].arithmetic : 0;
        memory += kernel[s].runs ? kernel[s].memory : 0;
    }
    const double sms = k->topology->device[device].gemm.sms, rest = fmax(sms - d->sms, 1) / sms;
    const double slower = fmax(1, fmax(arithmetic / rest, memory));
    const bool same = slower == d->slower;
    d->slower = slower;
    *n = 0;
    for (int32_t s = 0; s < k->n_streams; s++) {
        struct running *x = &kernel[s];
        if (!x->runs || (same && x != fresh))
            continue;
        x->end = topology_compute_end(k->topology, device, d->since, x->left * slower);
        k->end[(*n)++] = (struct kernel_end){ x->end, device * k->n_streams + s };
    }
    return k->end;
}

const struct kernel_end *sharing_start(struct sharing *k, double now, int32_t device, int32_t stream,
                                       const struct kernel_cost *cost, int *n)
{
    struct running *x = &sharing_of(k, device)[stream];
    assert(!x->runs);
    catch_up(k, device, now);
    const double alone = cost->seconds > 0 ? cost->seconds : 1;
    *x = (struct running){ .runs = true, .left = cost->seconds, .arithmetic = fmin(1, cost->arithmetic / alone),
                          .memory = fmin(1, cost->memory / alone) };
    k->device[device].n++;
    return share(k, device, x, n);
}

const struct kernel_end *sharing_take(struct sharing *k, double now, int32_t device, int32_t sms, int *n)
{
    catch_up(k, device, now);
    k->device[device].sms += sms;
    return share(k, device, NULL, n);
}

bool sharing_finish(struct sharing *k, double now, int32_t slot, const struct kernel_end **end, int *n)
{
    const int32_t device = slot / k->n_streams;
    struct running *x = &k->kernel[slot];
    *n = 0;
    if (!x->runs || x->end != now)
        return false;
    catch_up(k, device, now);
    x->runs = false;
    k->device[device].n--;
    *end = share(k, device, NULL, n);
    return true;
}
