/* SPDX-License-Identifier: Apache-2.0
 * host.c - the module hw/host.so: one MPI rank per device runs the task graph for real.
 *
 * Every rank holds the whole graph and goes through its tasks in one order that is the same everywhere, so that
 * exchanges, which are collective, meet. It computes the tasks of its own device and takes part in all exchanges.
 * What is computed, and what is not: doc/host.md. */
#include "config.h"

#include "host.h"
#include "host_model.h"
#include "host_need.h"
#include "host_order.h"
#include "host_rank.h"
#include "host_team.h"
#include "memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- the step ---- */

static bool is_mine(const struct host *h, const struct task *t)
{
    return t->kind == TASK_EXCHANGE || (t->kind != TASK_JOIN && t->device == h->rank);
}

/* When a task began and ended here, in seconds from the barrier; -infinity: it is not this rank's. */
static void run_mine(struct host *h, const struct moe_graph *g, int32_t id, double zero, struct err *e)
{
    const struct task *t = &g->task[id];
    double *time = &h->time[2 * id];
    if (t->kind == TASK_LOAD) {
        h->brings[id] = host_store_load(h->store, id);
        return;
    }
    host_store_wait(h->store, h->brings[id]);
    time[0] = host_now() - zero;
    host_run_task(h, g, id, e);
    time[1] = host_now() - zero;
    if (t->kind == TASK_ARRIVAL) /* when its exchange ended here, not when this was looked at */
        time[1] = h->time[2 * t->exchange + 1];
}

/* Runs the tasks in their order. brings[i]: the last load that has to have ended before task i begins, which a thread
 * does meanwhile. */
static int walk(struct host *h, const struct moe_graph *g, struct err *e)
{
    for (int32_t i = 0; i < g->n_tasks; i++) {
        h->time[2 * i] = h->time[2 * i + 1] = -INFINITY;
        h->brings[i] = 0;
    }
    MPI_Barrier(MPI_COMM_WORLD);
    const double zero = host_now();
    for (int32_t i = 0; i < g->n_tasks && !e->code; i++) {
        const int32_t id = h->sequence[i];
        const bool mine = is_mine(h, &g->task[id]);
        if (mine)
            run_mine(h, g, id, zero, e);
        const bool passes_on = !mine || g->task[id].kind == TASK_LOAD; /* others have waited */
        for (int64_t j = h->order.first[id]; passes_on && j < h->order.first[id + 1]; j++) {
            int32_t *next = &h->brings[h->order.next[j]];
            *next = *next > h->brings[id] ? *next : h->brings[id];
        }
    }
    for (int32_t id = 0; id < g->n_tasks && !e->code; id++)
        if (g->task[id].kind == TASK_LOAD && is_mine(h, &g->task[id])) {
            double *time = &h->time[2 * id];
            host_store_wait(h->store, h->brings[id]);
            host_store_times(h->store, h->brings[id], &time[0], &time[1]);
            time[0] -= zero;
            time[1] -= zero;
        }
    return e->code;
}

/* Gives every rank the times of all tasks. An exchange begins when the last rank comes to it, as on a simulated
 * machine, where it begins when all before it has ended, and ends when the last rank leaves it. */
static void share_times(struct machine *m, struct moe_graph *g)
{
    const struct host *h = m->priv;
    double last = 0, *time = h->time;
    MPI_Allreduce(MPI_IN_PLACE, time, 2 * g->n_tasks, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const int32_t id = h->sequence[i];
        struct task *t = &g->task[id];
        double *own = &time[2 * id];
        if (t->kind == TASK_ARRIVAL) {
            own[0] = time[2 * t->exchange];
            own[1] = fmax(own[0], own[1]);
        } else if (t->kind == TASK_JOIN) { /* the latest end before it, collected below */
            own[0] = own[1] = fmax(own[0], 0);
        }
        for (int64_t j = h->order.first[id]; j < h->order.first[id + 1]; j++)
            if (g->task[h->order.next[j]].kind == TASK_JOIN)
                time[2 * h->order.next[j]] = fmax(time[2 * h->order.next[j]], own[1]);
        t->start = m->now + own[0];
        t->end = m->now + own[1];
        last = fmax(last, own[1]);
    }
    m->now += last;
}

/* ---- after a step ---- */

/* Compares every layer of every own token with the reference, fed with what entered the layer here. The inputs of
 * layer 0 are made anew, and those of the others were compared as outputs: nothing is taken on trust. */
static int verify(struct machine *m, struct host *h, const struct moe_graph *g, struct err *e)
{
    const size_t d = (size_t)h->model->d_model, n = (size_t)h->n_own;
    float *input = malloc(sizeof *input * (n * d + 1));
    double *expected = malloc(sizeof *expected * (n * d + 1));
    const float **in = malloc(sizeof *in * (n + 1));
    if (!input || !expected || !in)
        err_set(e, ERR_MEMORY, "rank %d: out of memory to verify %zu tokens", h->rank, n);
    for (size_t i = 0; i < n && !e->code; i++) {
        host_input(h->model, h->draw, h->own[i], input + i * d);
        in[i] = input + i * d;
    }
    for (int32_t l = 0; l < g->n_route_layers && !e->code; l++) {
        int64_t first = g->route_first[l];
        host_reference(h->model, l, g->route + first, g->route_first[l + 1] - first, h->place, h->n_own, in, NULL,
                       expected, e);
        for (size_t i = 0; i < n && !e->code; i++) {
            const float *got = row_at(h, *token_row(h, g, l + 1, h->own[i]));
            int32_t at;
            double error = host_error(got, expected + i * d, (int32_t)d, &at);
            m->max_error = fmax(m->max_error, error);
            if (error > HOST_TOLERANCE)
                err_set(e, ERR_RUN, "rank %d: layer %d, token %d, element %d: got %.9g, expected %.9g (relative "
                        "error %.2g, allowed %.2g)", h->rank, l, h->own[i], at, (double)got[at],
                        expected[i * d + (size_t)at], error, HOST_TOLERANCE);
            in[i] = got;
        }
    }
    free(input);
    free(expected);
    free(in);
    MPI_Allreduce(MPI_IN_PLACE, &m->max_error, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return e->code;
}

static int finish(struct host *h, const struct moe_graph *g, struct err *e)
{
    for (int32_t i = 0; i < h->n_own && !e->code; i++)
        if (!host_combine(h, g, g->n_route_layers - 1, h->own[i]))
            err_set(e, ERR_RUN, "rank %d: token %d did not get all its outputs", h->rank, h->own[i]);
    return e->code;
}

/* ---- whether others are at work on this computer ---- */

enum { SPARE = 10 };
static const double MOST_NAP = 0.2;   /* s after a repetition that was */

/* Outside of all times. 0: there are no operands. */
static double look_around(struct host *h)
{
    int has = h->rings.room_in >= HOST_PROBE && h->rings.room_out >= HOST_PROBE;
    MPI_Allreduce(MPI_IN_PLACE, &has, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (!has)
        return 0;
    return host_look_around(&h->rings, &h->probe_s);
}

/* Once, with inputs of its own. In the walk a failure of one rank leaves the others waiting: its process ends, and
 * mpirun ends theirs. */
static int run_once(struct machine *m, struct moe_graph *g, struct err *e)
{
    struct host *h = m->priv;
    host_begin(h, g);
    if (walk(h, g, e) < 0) {
        m->team->lost = true;
        return e->code;
    }
    share_times(m, g);
    finish(h, g, e);
    if (team_agree(m->team, e) == 0 && m->verify) {
        verify(m, h, g, e);
        team_agree(m->team, e);
    }
    h->draw++;
    return e->code;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int keep_probe(struct machine *m, double probe, struct err *e)
{
    struct host *h = m->priv;
    if (h->n_probes == h->room_probes) {
        const int32_t room = 2 * h->room_probes + 64;
        double *grown = realloc(h->probe, sizeof *grown * (size_t)room);
        if (!grown)
            return err_set(e, ERR_MEMORY, "rank %d: out of memory for %d times", h->rank, room);
        h->probe = grown;
        h->room_probes = room;
    }
    h->probe[h->n_probes++] = probe;
    qsort(h->probe, (size_t)h->n_probes, sizeof *h->probe, by_value);
    m->probe_s = h->probe[h->n_probes / 2];
    return 0;
}

struct trial { struct machine *m; struct moe_graph *g; double began; };

/* Between two probes. */
static int once(void *self, struct quiet_seen *seen, struct err *e)
{
    const struct trial *t = self;
    struct host *h = t->m->priv;
    t->m->now = t->began;
    seen->before_s = look_around(h);
    const double stolen = quiet_stolen(), zero = host_now();
    if (run_once(t->m, t->g, e) < 0)
        return e->code;
    seen->stolen = quiet_share(stolen, quiet_stolen(), host_now() - zero, (int)sysconf(_SC_NPROCESSORS_ONLN));
    seen->after_s = look_around(h);
    seen->ended = t->m->now;
    return 0;
}

static void worst(void *self, double *value, int n)
{
    (void)self;
    MPI_Allreduce(MPI_IN_PLACE, value, n, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
}

/* As long as a step: such spells pass. */
static void rest(void *self)
{
    const struct trial *t = self;
    const double seconds = fmin(fmax(t->m->now - t->began, 0), MOST_NAP);
    nanosleep(&(struct timespec){ .tv_nsec = (long)(1e9 * seconds) }, NULL);
}

/* Once more. What somebody else on this computer has slowed down is done again: a processor whose other half is busy,
 * or that is taken away, takes half as long again for the probe before or after, too. Of several attempts the least
 * disturbed counts. */
static int run_again(struct machine *m, struct moe_graph *g, struct err *e)
{
    struct host *h = m->priv;
    struct trial trial = { m, g, m->now };
    struct quiet_trial t = { &trial, once, worst, rest, &h->probe_s, h->spare };
    if (quiet_repeat(&h->best, &t, g, e) < 0)
        return e->code;
    h->spare = t.spare;
    m->now = h->best.ended;
    m->set_aside += h->best.attempts - 1;
    m->disturbed += h->best.disturbance > QUIET_ENOUGH;
    m->stolen = fmax(m->stolen, h->best.stolen);
    keep_probe(m, h->best.probe_s, e);
    return team_agree(m->team, e);
}

static int host_run(struct machine *m, struct moe_graph *g, struct err *e)
{
    struct host *h = m->priv;
    if (g->n_route_layers != h->model->n_layers)
        err_set(e, ERR_RUN, "the graph keeps the routes of %d layers, expected %d", g->n_route_layers,
                h->model->n_layers);
    if (team_same_graph(m->team, host_graph_hash(g), e) < 0)
        return e->code;
    host_prepare(h, g, e);
    quiet_room(&h->best, g, e);
    if (h->spare == 0) /* there was no quiet in the last step: what is quiet is found anew */
        h->probe_s = 0;
    h->spare = SPARE;
    if (team_agree(m->team, e) < 0 || run_once(m, g, e) < 0)
        return e->code;
    m->peak_memory = memory_peak();
    MPI_Allreduce(MPI_IN_PLACE, &m->peak_memory, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    return 0;
}

static void host_close(struct machine *m)
{
    struct host *h = m->priv;
    if (!h)
        return;
    for (int32_t i = 0; h->weights && i < h->model->n_layers * h->model->n_experts; i++)
        free(h->weights[i]);
    struct pool *const pools[] = { &h->rows, &h->send, &h->gathered, &h->gate, &h->up };
    for (size_t i = 0; i < sizeof pools / sizeof *pools; i++)
        free(pools[i]->data);
    free(h->weights);
    free(h->probe);
    free(h->best.time);
    free(h->token_row);
    free(h->route_row);
    free(h->route_of);
    free(h->place);
    free(h->count);
    free(h->piece);
    free(h->sequence);
    free(h->time);
    free(h->brings);
    free(h->packed);
    free(h->sums);
    free(h->experts_left);
    free(h->send_at);
    free(h->expert_weights);
    graph_order_free(&h->order);
    host_rings_close(&h->rings);
    host_store_close(h->store);
    MPI_Type_free(&h->row);
    free(h);
    m->priv = NULL;
}

static const struct machine_ops host_ops = { .name = "host", .run = host_run, .again = run_again,
                                             .close = host_close };

static int host_open(struct machine *m, struct err *e)
{
    const struct team *t = m->team;
    if (!t || strcmp(t->ops->name, TEAM_MPI) != 0)
        return err_set(e, ERR_INPUT, "this process is no rank of MPI: moelab starts those, or mpirun does");
    if (t->size != m->topology->n_devices)
        return err_set(e, ERR_INPUT, "%d MPI ranks, expected one for each of the %d devices of %s", t->size,
                       m->topology->n_devices, m->topology->name);
    m->rank = t->rank;
    struct host *h = calloc(1, sizeof *h);
    if (!h)
        return err_set(e, ERR_MEMORY, "out of memory for the machine");
    h->model = m->model;
    h->rank = t->rank;
    h->n_ranks = t->size;
    h->probe_s = m->topology->probe_s;
    h->spare = SPARE;
    MPI_Type_contiguous(m->model->d_model, MPI_FLOAT, &h->row);
    MPI_Type_commit(&h->row);
    m->ops = &host_ops;
    m->priv = h;
    h->weights = calloc((size_t)m->model->n_layers * (size_t)m->model->n_experts, sizeof *h->weights);
    h->count = calloc(4 * (size_t)t->size, sizeof *h->count);
    if (!h->weights || !h->count)
        return err_set(e, ERR_MEMORY, "out of memory for the machine");
    return 0;
}

const struct host_module moelab_host_module = {
    .abi = HOST_ABI,
    .size = sizeof(struct host_module),
    .machine_size = sizeof(struct machine),
    .graph_size = sizeof(struct moe_graph),
    .task_size = sizeof(struct task),
    .model_size = sizeof(struct moe_model),
    .join = host_team_join,
    .open = host_open,
    .calibrate = host_calibrate,
};
