/* SPDX-License-Identifier: Apache-2.0
 * compute.c - how long a piece of work takes on one device: a roofline with an efficiency curve over rows.
 *
 * A GEMM with r rows per expert reaches flops_efficiency * r / (r + half_rows) of the peak, which is the same as
 * saying that every expert costs half_rows rows more than it has: tiles that are not full. Which of arithmetic and
 * memory binds is decided for the launch as a whole, because a grouped kernel runs many experts at once.
 * A precision that the device lacks takes for ever (INFINITY); who opens a machine checks peak[] first. */
#include "config.h"

#include "machine.h"

#include <math.h>

/* Bytes of one activation element as a kernel of this precision reads it. */
static const double element_bytes[N_PRECISIONS] = { 4, 4, 2, 1, 1, 0.5 };

static double roofline(const struct device_spec *d, enum precision p, double flops, double bytes)
{
    double arithmetic = flops > 0 ? flops / (d->peak[p] * d->flops_efficiency) : 0;
    double memory = bytes / (d->mem_bandwidth * d->mem_efficiency);
    return fmax(arithmetic, memory) + d->launch_s;
}

double compute_experts(const struct device_spec *d, enum precision p, const struct moe_model *m, int32_t n,
                       const int64_t *rows, const double *width)
{
    double flops = 0, bytes = 0;
    for (int32_t i = 0; i < n; i++) {
        if (rows[i] <= 0)
            continue;
        double r = (double)rows[i];
        double hidden = (double)m->d_expert * (width ? width[i] : 1);
        double weights = 3.0 * m->d_model * hidden; /* gate, up, down */
        flops += 2 * weights * (r + d->half_rows);
        bytes += weights * m->weight_bytes;
        /* Tokens in, the product of gate and up written and read again, tokens out. */
        bytes += r * (m->d_model * (m->act_bytes + m->combine_bytes) + 2 * hidden * element_bytes[p]);
    }
    return flops > 0 ? roofline(d, p, flops, bytes) : 0;
}

double compute_plain(const struct device_spec *d, enum precision p, double flops, double bytes)
{
    return roofline(d, p, flops, bytes);
}
