/* SPDX-License-Identifier: Apache-2.0
 * forecast.c - how long a run will take those who wait for it, where that is long enough to say so beforehand. */
#include "config.h"

#include "run.h"

#include <math.h>
#include <stdio.h>

/* Devices that a device with `n` routes to experts anywhere sends something to. */
static double destinations(double n, double n_devices)
{
    return (n_devices - 1) * (1 - pow(1 - 1 / n_devices, n));
}

double run_forecast(const struct run *r, char *text, size_t room)
{
    const double n_devices = r->topology->n_devices, n_steps = r->workload.n_steps;
    if (r->tier != NET_SIMGRID || n_devices < 2)
        return 0;
    double routes = (double)r->workload.n_tokens / n_devices * r->model.top_k;
    double flows = n_devices * destinations(routes, r->ep), one = net_simgrid_seconds(flows);
    /* there and back; in training backwards, too, and with `recompute` once more forward */
    const int exchanges = r->workload.phase != MOE_TRAIN ? 2 : r->workload.recompute ? 6 : 4;
    snprintf(text, room, "%.0f steps of %d layers, each with %d exchanges of about %.0f flows that take SimGrid about "
             "%.2g s apiece", n_steps, r->model.n_layers, exchanges, flows, one);
    return exchanges * one * r->model.n_layers * n_steps;
}
