/* SPDX-License-Identifier: Apache-2.0
 * host_quiet.c - see host_quiet.h. */
#include "config.h"

#include "host_quiet.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

double quiet_disturbance(double before_s, double after_s, double quiet_s, double stolen)
{
    const double probes = quiet_s > 0 ? fmax(before_s, after_s) / quiet_s - 1 : 0;
    return fmax(probes, 0) + fmax(stolen, 0);
}

/* "cpu  user nice system idle iowait irq softirq steal ..." in ticks. */
double quiet_stolen_of(const char *stat, double ticks_per_s)
{
    unsigned long long steal;
    return sscanf(stat, "cpu %*u %*u %*u %*u %*u %*u %*u %llu", &steal) == 1 ? (double)steal / ticks_per_s : -1;
}

double quiet_stolen(void)
{
    char line[400] = "";
    FILE *f = fopen("/proc/stat", "r");
    const bool read = f && fgets(line, sizeof line, f);
    if (f)
        fclose(f);
    return read ? quiet_stolen_of(line, (double)sysconf(_SC_CLK_TCK)) : -1;
}

double quiet_share(double stolen_before, double stolen_after, double seconds, int n_processors)
{
    const bool known = stolen_before >= 0 && stolen_after >= stolen_before && seconds > 0 && n_processors > 0;
    return known ? (stolen_after - stolen_before) / (seconds * n_processors) : 0;
}

int quiet_offer(struct quiet_best *b, int attempt, double disturbance, const struct moe_graph *g, struct err *e)
{
    if (attempt > 0 && disturbance >= b->disturbance)
        return 0;
    if (b->room < g->n_tasks) {
        double *grown = realloc(b->time, sizeof *grown * 2 * (size_t)g->n_tasks);
        if (!grown)
            return err_set(e, ERR_MEMORY, "out of memory for the times of %d tasks", g->n_tasks);
        b->time = grown;
        b->room = g->n_tasks;
    }
    b->disturbance = disturbance;
    for (int32_t i = 0; i < g->n_tasks; i++) {
        b->time[2 * i] = g->task[i].start;
        b->time[2 * i + 1] = g->task[i].end;
    }
    return 0;
}

void quiet_take(const struct quiet_best *b, struct moe_graph *g)
{
    for (int32_t i = 0; i < g->n_tasks; i++) {
        g->task[i].start = b->time[2 * i];
        g->task[i].end = b->time[2 * i + 1];
    }
}
