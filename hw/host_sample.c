/* SPDX-License-Identifier: Apache-2.0
 * host_sample.c - medians of what was measured, of machines host and cuda alike. */
#include "config.h"

#include "host_calibrate.h"

#include <math.h>
#include <stdlib.h>

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct host_sample host_sample_of(struct host_sample s, double *took, int n)
{
    qsort(took, (size_t)n, sizeof *took, by_value);
    s.seconds = n % 2 ? took[n / 2] : (took[n / 2 - 1] + took[n / 2]) / 2;
    s.low = took[n / 4];
    s.high = took[n - 1 - n / 4];
    s.n = n;
    return s;
}

struct host_sample host_sample_middle(const struct host_sample *first, int n_sizes, int n_passes)
{
    struct host_sample s = *first;
    double pass[n_passes];
    s.n = 0;
    for (int p = 0; p < n_passes; p++) {
        const struct host_sample *x = &first[p * n_sizes];
        pass[p] = x->seconds;
        s.low = fmin(s.low, x->low);
        s.high = fmax(s.high, x->high);
        s.n += x->n;
    }
    qsort(pass, (size_t)n_passes, sizeof *pass, by_value);
    s.seconds = pass[n_passes / 2];
    return s;
}
