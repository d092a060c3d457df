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

int quiet_room(struct quiet_best *b, const struct moe_graph *g, struct err *e)
{
    if (b->room >= g->n_tasks)
        return 0;
    double *grown = realloc(b->time, sizeof *grown * 2 * (size_t)g->n_tasks);
    if (!grown)
        return err_set(e, ERR_MEMORY, "out of memory for the times of %d tasks", g->n_tasks);
    b->time = grown;
    b->room = g->n_tasks;
    return 0;
}

static void keep(struct quiet_best *b, const struct moe_graph *g)
{
    for (int32_t i = 0; i < g->n_tasks; i++) {
        b->time[2 * i] = g->task[i].start;
        b->time[2 * i + 1] = g->task[i].end;
    }
}

int quiet_repeat(struct quiet_best *b, struct quiet_trial *t, struct moe_graph *g, struct err *e)
{
    b->attempts = 0;
    b->stolen = 0;
    for (;;) {
        struct quiet_seen seen = { 0 };
        if (t->once(t->self, &seen, e) < 0)
            return e->code;
        double worst[2] = { quiet_disturbance(seen.before_s, seen.after_s, *t->quiet_s, seen.stolen), seen.stolen };
        t->worst(t->self, worst, 2); /* all ranks decide alike */
        b->stolen = fmax(b->stolen, worst[1]);
        if (b->attempts++ == 0 || worst[0] < b->disturbance) {
            b->disturbance = worst[0];
            b->probe_s = (seen.before_s + seen.after_s) / 2;
            b->ended = seen.ended;
            keep(b, g);
        }
        if (worst[0] <= QUIET_ENOUGH || b->attempts == QUIET_ATTEMPTS || t->spare == 0)
            break;
        t->spare--;
        t->rest(t->self);
    }
    for (int32_t i = 0; i < g->n_tasks; i++) {
        g->task[i].start = b->time[2 * i];
        g->task[i].end = b->time[2 * i + 1];
    }
    return 0;
}
