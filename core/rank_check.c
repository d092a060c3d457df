/* SPDX-License-Identifier: Apache-2.0
 * rank_check.c - what is looked at before ranks start: how many they are, policies that they could not load, and
 * whether this machine has the memory that they will hold.
 *
 * The memory is counted, not guessed: one process takes all decisions of the run, as every rank will (without
 * computing, decisions are all there is), and host_need.c adds up the graphs that come of them. */
#include "config.h"

#include "host_calibrate.h"
#include "host_kernels.h"
#include "host_need.h"
#include "memory.h"
#include "rank.h"
#include "registry.h"
#include "run.h"
#include "team.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { MAX_RANKS = 256 }; /* processes on this machine */

bool rank_wanted(const json_t *spec)
{
    const char *executor = json_string_value(json_object_get(json_object_get(spec, "machine"), "executor"));
    return executor && (!strcmp(executor, "host") ||
                        (!strcmp(executor, "cuda") && !json_is_true(json_object_get(spec, "virtual_ranks"))));
}

static const char *executor_of(const json_t *spec)
{
    return json_string_value(json_object_get(json_object_get(spec, "machine"), "executor"));
}

static bool on_host(const json_t *spec)
{
    return rank_wanted(spec) && !strcmp(executor_of(spec), "host");
}

int rank_number(const json_t *spec, struct err *e)
{
    const json_t *machine = json_object_get(spec, "machine");
    const char *file = json_string_value(json_object_get(machine, "file"));
    struct topology *t = NULL;
    if (topology_build(&t, json_object_get(machine, "description"), file ? file : "machine", e) < 0)
        return e->code;
    int n = t->n_devices;
    topology_free(t);
    if (n > MAX_RANKS)
        return err_set(e, ERR_INPUT, "machine %s: %d devices, expected at most %d: each is a process here, and there "
                       "are %ld processors: make the machine's nodes fewer, or use machine flow", executor_of(spec), n,
                       MAX_RANKS, sysconf(_SC_NPROCESSORS_ONLN));
    return n;
}

/* A policy written in a scenario lives in the process that runs the scenario. */
static int check_policies(const json_t *spec, struct err *e)
{
    for (int kind = 0; kind < MOE_N_KINDS; kind++) {
        const json_t *list = json_object_get(json_object_get(spec, "policies"), kind_name[kind]);
        for (size_t i = 0; i < json_array_size(list); i++)
            if (json_object_get(json_array_get(list, i), "lua"))
                return err_set(e, ERR_INPUT, "machine %s: %s %s is written in Lua, which ranks do not load: write it "
                               "in C, or use machine flow", executor_of(spec), kind_name[kind],
                               json_string_value(json_object_get(json_array_get(list, i), "name")));
    }
    return 0;
}

/* What ranks may hold: $MOELAB_HOST_MEMORY, or what the machine has. */
static int read_left(struct memory_left *left, struct err *e)
{
    const char *given = getenv("MOELAB_HOST_MEMORY");
    if (!given || !*given) {
        memory_left("", left);
        return 0;
    }
    char *end;
    left->bytes = strtod(given, &end);
    snprintf(left->source, sizeof left->source, "MOELAB_HOST_MEMORY");
    if (*end || !(left->bytes > 0) || isinf(left->bytes))
        return err_set(e, ERR_INPUT, "machine host: MOELAB_HOST_MEMORY=%s: expected bytes, as in 8e9", given);
    return 0;
}

static int too_large(const struct run *r, const struct host_need *n, const struct host_bytes *b, int32_t steps,
                     const struct memory_left *left, struct err *e)
{
    char sum[16], there[16], weights[16], rows[16], buffers[16], processes[16], when[48];
    const struct moe_model *m = &r->model;
    if (steps == 0)
        snprintf(when, sizeof when, "before the first step");
    else if (steps < r->workload.n_steps)
        snprintf(when, sizeof when, "after %d of %d steps", steps, r->workload.n_steps);
    else
        snprintf(when, sizeof when, "after %d step%s", steps, steps == 1 ? "" : "s");
    return err_set(e, ERR_INPUT, "%s: machine host: %s the %d ranks would hold %s, and %s is available (%s): %s "
                   "weights of %lld experts (d_model %d, d_expert %d, 4 bytes an element), %s rows of %d tokens in %d "
                   "layers, %s buffers, %s processes: make d_model, d_expert, experts or layers smaller for the "
                   "weights, d_model or %s for rows and buffers, the machine's nodes for processes, or use machine "
                   "flow", r->where, when, n->n_ranks,
                   memory_text(b->sum, sum, sizeof sum), memory_text(left->bytes, there, sizeof there), left->source,
                   memory_text(b->weights, weights, sizeof weights), (long long)n->n_experts, m->d_model, m->d_expert,
                   memory_text(b->rows, rows, sizeof rows), r->workload.n_tokens, m->n_layers,
                   memory_text(b->buffers, buffers, sizeof buffers),
                   memory_text(b->processes, processes, sizeof processes),
                   r->workload.phase == MOE_DECODE ? "batch_per_device" : "tokens_per_device");
}

static bool fits(const struct host_bytes *b, const struct memory_left *left)
{
    return left->bytes < 0 || b->sum <= left->bytes;
}

/* Takes the decisions of all steps, or of as many as show that there is too little memory. */
static int count_steps(struct run *r, struct host_need *n, const struct memory_left *left, double before,
                       struct host_bytes *b, struct err *e)
{
    /* Tokens alone may be too many, for this process already. */
    host_need_bytes(n, fmax(memory_own() - before, 0), b);
    if (!fits(b, left))
        return too_large(r, n, b, 0, left, e);
    if (placement_start(r) < 0)
        return e->code;
    for (int32_t step = 0; step < r->workload.n_steps; step++) {
        if (pipeline_step(r, step) < 0)
            return e->code;
        if (host_need_step(n, &r->graph, e) < 0)
            return e->code;
        host_need_bytes(n, fmax(memory_own() - before, 0), b);
        if (!fits(b, left))
            return too_large(r, n, b, step + 1, left, e);
    }
    return 0;
}

/* The specification, but for a run that only counts. */
static json_t *counting(const json_t *spec)
{
    json_t *copy = json_copy((json_t *)(uintptr_t)spec), *machine = json_copy(json_object_get(spec, "machine"));
    json_object_set_new(machine, "counting", json_true());
    json_object_set_new(copy, "machine", machine);
    return copy;
}

/* mpirun has started as many ranks as the run has devices, or none. */
static int check_team(const json_t *spec, const struct team *t, int n, struct err *e)
{
    static const char *const other[] = { "PMIX_RANK", "PMI_RANK" };
    if (t && t->size != n)
        return err_set(e, ERR_INPUT, "machine %s: %d MPI ranks, expected one for each of the %d devices",
                       executor_of(spec), t->size, n);
    for (int i = 0; i < 2 && !t; i++)
        if (getenv(other[i]))
            return err_set(e, ERR_INPUT, "machine %s: %s is set, so this is a rank already, but not of Open MPI's "
                           "mpirun: start moelab with that, or alone", executor_of(spec), other[i]);
    return 0;
}

int rank_check(const json_t *spec, const struct team *team, double *needed, struct err *e)
{
    const char *given = json_string_value(json_object_get(spec, "where")), *where = given ? given : "run";
    struct memory_left left;
    struct host_need need = { 0 };
    struct host_bytes bytes = { 0 };
    struct run run;
    const int n = rank_number(spec, e);
    if (n < 0 || check_team(spec, team, n, e) < 0 || check_policies(spec, e) < 0)
        return err_prefix(e, "%s", where);
    if (!on_host(spec)) /* the device says itself what fits */
        return 0;
    if (read_left(&left, e) < 0)
        return err_prefix(e, "%s", where);
    double before = memory_own();
    json_t *copy = counting(spec);
    if (run_open(&run, copy, e) == 0) {
        if (host_need_open(&need, &run.model, run.topology->n_devices, run.workload.n_tokens,
                           json_is_true(json_object_get(spec, "verify")), e) == 0)
            count_steps(&run, &need, &left, before, &bytes, e);
        host_need_close(&need);
    }
    run_close(&run);
    json_decref(copy);
    *needed = bytes.sum;
    return e->code;
}

int rank_check_again(const json_t *spec, double needed, struct err *e)
{
    char sum[16], there[16];
    const char *given = json_string_value(json_object_get(spec, "where"));
    struct memory_left left;
    if (on_host(spec) && read_left(&left, e) == 0 && left.bytes >= 0 && needed > left.bytes)
        err_set(e, ERR_INPUT, "machine host: the ranks would hold %s, and %s is available by now (%s)",
                memory_text(needed, sum, sizeof sum), memory_text(left.bytes, there, sizeof there), left.source);
    return e->code ? err_prefix(e, "%s", given ? given : "run") : 0;
}

int rank_check_calibration(int n_ranks, const char *dir, struct err *e)
{
    const double holds = n_ranks * HOST_CALIBRATION_HOLDS(n_ranks), files = n_ranks * (double)HOST_CALIBRATION_FILE;
    char needed[16], there[16];
    struct memory_left left;
    struct statvfs disk;
    if (read_left(&left, e) < 0)
        return e->code;
    if (left.bytes >= 0 && holds > left.bytes)
        return err_set(e, ERR_INPUT, "calibrate: %d ranks hold %s, and %s is available (%s): fewer with --ranks N",
                       n_ranks, memory_text(holds, needed, sizeof needed),
                       memory_text(left.bytes, there, sizeof there), left.source);
    if (statvfs(dir, &disk) == 0 && files > (double)disk.f_bavail * (double)disk.f_frsize)
        return err_set(e, ERR_INPUT, "calibrate: %d ranks write files of %s, and %s has %s left: TMPDIR names another "
                       "directory", n_ranks, memory_text(files, needed, sizeof needed), dir,
                       memory_text((double)disk.f_bavail * (double)disk.f_frsize, there, sizeof there));
    return 0;
}

void rank_warn(const json_t *specs)
{
    size_t i;
    const json_t *spec;
    long most = 0, processors = sysconf(_SC_NPROCESSORS_ONLN);
    json_array_foreach(specs, i, spec) {
        struct err ignored = { 0 }; /* said by the run */
        long n = on_host(spec) ? rank_number(spec, &ignored) : 0;
        most = n > most ? n : most;
    }
    if (most == 0)
        return;
    if (processors > 0 && most > processors)
        fprintf(stderr, "moelab: machine host: %ld ranks take turns on %ld processor%s: what they compute is right, "
                "their times are not those of %ld devices\n", most, processors, processors == 1 ? "" : "s", most);
    struct memory_left left = { 0 };
    if (!getenv("MOELAB_HOST_MEMORY"))
        memory_left("", &left);
    if (left.bytes < 0)
        fprintf(stderr, "moelab: machine host: neither /proc/meminfo nor a cgroup says how much memory there is: "
                "not checked\n");
}
