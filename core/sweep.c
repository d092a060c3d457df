/* SPDX-License-Identifier: Apache-2.0
 * sweep.c - forks a process per run and watches over it. */
#include "config.h"

#include "sweep.h"
#include "child.h"
#include "rank.h"
#include "run.h"
#include "team.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct job {
    pid_t pid;          /* 0: this slot is free */
    int fd;             /* the child's answer comes here */
    size_t index;
    char *text;
    size_t n, room;
    double began, deadline;
    bool timed_out;
};

/* Shared with the children. */
struct board {
    atomic_flag warned; /* of runs that take long: once is enough */
    struct slot { struct policy_note note; struct run_progress progress; } slot[];
};

enum { LONG_S = 30 }; /* a run that is expected to take longer is announced */

struct state {
    json_t *specs, *results;
    struct job *job;
    int n_jobs;
    struct board *board; /* [n_jobs] slots */
    size_t n_started, n_done, n_failed, n_total;
    double began;
    bool bad_input;
    bool out_of_time;   /* a run on ranks that mpirun has started did not end */
    bool checking;      /* whether runs on machine host can go on; nothing runs yet */
    const struct sweep_options *options;
    struct err *err;
};

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the child ---- */

static void duration(double s, char text[32])
{
    if (s < 120)
        snprintf(text, 32, "%.0f s", s);
    else if (s < 7200)
        snprintf(text, 32, "%.0f min", s / 60);
    else
        snprintf(text, 32, "%.1f h", s / 3600);
}

static void warn_if_long(const struct state *s, const struct run *r)
{
    char text[200], takes[32], ends[80] = "";
    const double timeout = s->options->timeout_s, expected = run_forecast(r, text, sizeof text);
    if (expected < LONG_S || atomic_flag_test_and_set(&s->board->warned))
        return;
    duration(expected, takes);
    if (timeout > 0 && expected > timeout)
        snprintf(ends, sizeof ends, " It is ended after %g s: see --run-timeout.", timeout);
    fprintf(stderr, "%smoelab: %s: run %zu of %zu takes about %s on machine %s: %s.%s "
            "\"--machine flow --set tier=exact\" agrees with it and takes seconds. Said of the first such run only.\n",
            s->options->progress ? "\r\033[K" : "", r->where, s->n_started + 1, s->n_total, takes,
            r->machine.ops->name, text, ends);
}

static json_t *answer_of(json_t *o, double needed, const struct err *e)
{
    if (!o)
        o = json_pack("{s:s, s:s, s:b}", "status", "failed", "error", e->text, "bad_input", e->code != ERR_RUN);
    else
        json_object_set_new(o, "status", json_string("ok"));
    if (needed > 0 && e->code == 0)
        json_object_set_new(o, "memory_needed", json_integer((json_int_t)needed));
    return o;
}

static json_t *answer(const struct state *s, struct slot *slot)
{
    json_t *spec = json_array_get(s->specs, s->n_started);
    struct run run;
    struct err e = { 0 };
    json_t *o = NULL, *resolved = NULL;
    const json_t *found = json_array_get(s->results, s->n_started); /* what the check left, or null */
    double needed = json_number_value(json_object_get(found, "memory_needed"));
    if (s->checking) {
        o = rank_check(spec, s->options->team, &needed, &e) == 0 ? json_object() : NULL;
    } else if (rank_wanted(spec)) {
        o = rank_check_again(spec, needed, &e) == 0 ? rank_launch(spec, &e) : NULL;
    } else {
        if (run_open(&run, spec, &e) == 0) {
            resolved = run_resolve(&run);
            warn_if_long(s, &run);
            run.progress = &slot->progress;
            if (run_go(&run) == 0)
                o = run_result(&run);
        }
        run_close(&run);
    }
    o = answer_of(o, needed, &e);
    if (resolved)
        json_object_set_new(o, "spec", resolved);
    return o;
}

static void child(const struct state *s, struct slot *slot, int fd)
{
    json_t *o = answer(s, slot);
    char *text = json_dumps(o, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    if (text && !child_write(fd, text, strlen(text)))
        _exit(3);
    free(text);
    json_decref(o); /* fd stays open until the process has ended, which a policy can still prevent */
}

/* ---- the parent ---- */

/* The run that has been under way longest, and the shares of all runs under way that are done, in runs. */
static double look_at_running(const struct state *s, const struct job **oldest)
{
    double done = 0;
    *oldest = NULL;
    for (int i = 0; i < s->n_jobs; i++) {
        const struct run_progress *p = &s->board->slot[i].progress;
        if (!s->job[i].pid)
            continue;
        if (p->n_steps > 0)
            done += (double)p->step / p->n_steps;
        if (!*oldest || s->job[i].began < (*oldest)->began)
            *oldest = &s->job[i];
    }
    return done;
}

static void show_progress(const struct state *s, bool last)
{
    if (!s->options->progress)
        return;
    const struct job *oldest;
    char text[32];
    double now = now_s(), took = now - s->began, done = (double)s->n_done + look_at_running(s, &oldest);
    fprintf(stderr, "\r\033[K%zu of %zu runs%s", s->n_done, s->n_total, s->checking ? " checked" : "");
    if (s->n_failed)
        fprintf(stderr, ", %zu failed", s->n_failed);
    if (last)
        fprintf(stderr, " in %.1f s\n", took);
    if (!last && done > 0 && took > 0) {
        double rate = done / took;
        duration(((double)s->n_total - done) / rate, text);
        fprintf(stderr, ", %.1f/%s, %s left", rate >= 0.1 ? rate : 60 * rate, rate >= 0.1 ? "s" : "min", text);
    }
    if (!last && oldest && now - oldest->began >= 1) { /* few long runs: that something happens */
        const struct run_progress *p = &s->board->slot[oldest - s->job].progress;
        duration(now - oldest->began, text);
        fprintf(stderr, "; run %zu:", oldest->index + 1);
        if (p->n_steps > 0)
            fprintf(stderr, " step %d of %d,", p->step < p->n_steps ? p->step + 1 : p->n_steps, p->n_steps);
        fprintf(stderr, " %s", text);
    }
    fflush(stderr);
}

/* A run that is compared with one of machine host simulates the computer as fast as that found it (moelab_against.lua):
 * pace_of is the index of that run, which has ended. What becomes of it is part of the machine, and of the manifest. */
static int set_pace(const struct state *s, size_t index, struct err *e)
{
    json_t *spec = json_array_get(s->specs, index), *of = json_object_get(spec, "pace_of");
    json_t *description = json_object_get(json_object_get(spec, "machine"), "description");
    const double then = json_number_value(json_object_get(description, "probe_s"));
    const json_t *run = of ? json_array_get(s->results, (size_t)json_integer_value(of)) : NULL;
    const double now = json_number_value(json_object_get(run, "probe_s"));
    if (!of || s->checking)
        return 0;
    json_object_del(spec, "pace_of");
    if (then > 0 && now > 0 && !(now / then >= 0.1 && now / then <= 10))
        return err_set(e, ERR_RUN, "%s: the probe took %.3g ms beside the run and %.3g ms when the machine was "
                       "calibrated, expected within ten times of each other: calibrate again",
                       json_string_value(json_object_get(spec, "where")), 1e3 * now, 1e3 * then);
    if (then > 0 && now > 0)
        json_object_set_new(description, "pace", json_real(now / then));
    return 0;
}

static int start(struct state *s, struct job *j)
{
    int fd[2];
    if (pipe2(fd, O_CLOEXEC) < 0)
        return err_set(s->err, ERR_IO, "cannot make a pipe: %s", strerror(errno));
    struct slot *slot = &s->board->slot[j - s->job];
    memset(slot, 0, sizeof *slot);
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0) {
        close(fd[0]);
        close(fd[1]);
        return err_set(s->err, ERR_IO, "cannot start a process: %s", strerror(errno));
    }
    if (pid == 0) {
        setpgid(0, 0); /* so that a time-out also ends what the run started */
        child_begin(&slot->note);
        close(fd[0]);
        child(s, slot, fd[1]);
        if (s->options->team)
            _exit(0); /* this process is none of MPI's, whose handlers would run */
        exit(0); /* through atexit: sanitizers report leaks there */
    }
    close(fd[1]);
    *j = (struct job){ .pid = pid, .fd = fd[0], .index = s->n_started++, .began = now_s(),
                       .deadline = s->options->timeout_s > 0 ? now_s() + s->options->timeout_s : INFINITY };
    return 0;
}

static json_t *failure(const struct state *s, const struct job *j, int status)
{
    char text[400];
    child_fault(&s->board->slot[j - s->job].note, status, j->timed_out ? s->options->timeout_s : 0, text, sizeof text);
    return json_pack("{s:s, s:s}", "status", "failed", "error", text);
}

static void keep(struct state *s, size_t index, json_t *o)
{
    const char *error = json_string_value(json_object_get(o, "error"));
    if (json_is_true(json_object_get(o, "bad_input")) && !s->bad_input) {
        s->bad_input = true;
        err_set(s->err, ERR_INPUT, "%s", error);
    }
    json_object_del(o, "bad_input");
    s->n_failed += error != NULL;
    json_array_set_new(s->results, index, o);
    s->n_done++;
}

static void finish(struct state *s, struct job *j)
{
    int status = 0;
    while (waitpid(j->pid, &status, 0) < 0 && errno == EINTR)
        ;
    close(j->fd);
    json_t *o = NULL;
    bool clean = WIFEXITED(status) && WEXITSTATUS(status) == 0 && !j->timed_out;
    if (clean && j->n > 0)
        o = json_loadb(j->text, j->n, 0, NULL);
    if (!o) {
        o = failure(s, j, status);
        rank_clean(j->pid);
    }
    keep(s, j->index, o);
    free(j->text);
    memset(j, 0, sizeof *j);
    show_progress(s, false);
}

static void read_answer(struct state *s, struct job *j)
{
    if (j->n + 65536 > j->room) {
        char *grown = realloc(j->text, j->room + 262144);
        if (!grown) {
            kill(-j->pid, SIGKILL);
            finish(s, j);
            return;
        }
        j->text = grown;
        j->room += 262144;
    }
    ssize_t n = read(j->fd, j->text + j->n, 65536);
    if (n > 0)
        j->n += (size_t)n;
    else if (n == 0 || errno != EINTR)
        finish(s, j);
}

/* Waits for the next answer or deadline, or until the progress shown is old. */
static void watch(struct state *s)
{
    struct pollfd p[s->n_jobs];
    struct job *of[s->n_jobs];
    int n = 0;
    double first = INFINITY;
    for (int i = 0; i < s->n_jobs; i++)
        if (s->job[i].pid) {
            p[n] = (struct pollfd){ .fd = s->job[i].fd, .events = POLLIN };
            of[n++] = &s->job[i];
            if (!s->job[i].timed_out) /* that one is dying already */
                first = fmin(first, s->job[i].deadline);
        }
    double left = first - now_s();
    int ms = isinf(first) ? -1 : left <= 0 ? 0 : left > 3600 ? 3600000 : (int)(left * 1000) + 1;
    if (s->options->progress && (ms < 0 || ms > 500))
        ms = 500;
    int n_ready = poll(p, (nfds_t)n, ms);
    if (n_ready == 0)
        show_progress(s, false);
    for (int i = 0; i < n && n_ready > 0; i++)
        if (p[i].revents)
            read_answer(s, of[i]);
    for (int i = 0; i < n; i++)
        if (of[i]->pid && !of[i]->timed_out && now_s() >= of[i]->deadline) {
            of[i]->timed_out = true;
            kill(-of[i]->pid, SIGKILL);
            kill(of[i]->pid, SIGKILL);
        }
}

static int running(const struct state *s)
{
    int n = 0;
    for (int i = 0; i < s->n_jobs; i++)
        n += s->job[i].pid != 0;
    return n;
}

/* Ranks of a run on machine host want the processors for themselves, those of cuda the GPU: one such run at a time. */
static int jobs_for(json_t *specs, int wanted)
{
    size_t i;
    json_t *spec;
    json_array_foreach(specs, i, spec) {
        const char *executor = json_string_value(json_object_get(json_object_get(spec, "machine"), "executor"));
        if (executor && (!strcmp(executor, "host") || !strcmp(executor, "cuda")))
            return 1;
    }
    return wanted > 0 ? wanted : 1;
}

/* Whether a run is none of this pass: the check is for machine host, and what failed it does not run. */
static bool passed_over(const struct state *s, size_t index)
{
    return s->checking ? !rank_wanted(json_array_get(s->specs, index))
                       : json_object_get(json_array_get(s->results, index), "error") != NULL;
}

/* With ranks that mpirun has started this process is one of them, and the run is its own. */
static bool is_led(const struct state *s, size_t index)
{
    return s->options->team && !s->checking && rank_wanted(json_array_get(s->specs, index));
}

/* A run that takes too long is left where it is: its memory and what MPI has under way stay as they are, the team is
 * lost, and what was measured before is written. Should even that not end, the second ring ends the process. */
enum { LAST_S = 20 };
static sigjmp_buf back;

static void ring(int signal)
{
    static const char text[] = "moelab: a run did not end within its time (--run-timeout), nor did writing others\n";
    static volatile sig_atomic_t rung;
    (void)signal;
    if (!rung++) {
        alarm(LAST_S);
        siglongjmp(back, 1);
    }
    _exit(write(STDERR_FILENO, text, sizeof text - 1) < 0 ? 2 : 1);
}

static void keep_failed(struct state *s, size_t index, const char *fmt, double seconds)
{
    struct err e = { 0 };
    err_set(&e, ERR_RUN, fmt, seconds);
    keep(s, index, answer_of(NULL, 0, &e));
    show_progress(s, false);
}

/* What cannot be told to the others ends this process, and mpirun ends theirs. */
static void lead(struct state *s, size_t index)
{
    if (s->out_of_time) {
        keep_failed(s, index, "not begun: a run before it did not end", 0);
        return;
    }
    if (sigsetjmp(back, 1) != 0) {
        s->options->team->lost = s->out_of_time = true;
        keep_failed(s, index, "did not end within %g s (--run-timeout); the ranks are gone", s->options->timeout_s);
        return;
    }
    json_t *spec = json_array_get(s->specs, index), *o = NULL;
    const json_t *found = json_array_get(s->results, index);
    const double needed = json_number_value(json_object_get(found, "memory_needed"));
    struct err e = { 0 };
    signal(SIGALRM, ring);
    alarm(s->options->timeout_s > 0 ? (unsigned)ceil(s->options->timeout_s) : 0);
    if (rank_check_again(spec, needed, &e) == 0)
        rank_lead(s->options->team, spec, &o, &e);
    alarm(0);
    if (s->options->team->lost) {
        fflush(stdout);
        fprintf(stderr, "moelab: %s\n", e.text);
        _exit(err_exit_code(e.code));
    }
    keep(s, index, answer_of(o, needed, &e));
    show_progress(s, false);
}

static void pass(struct state *s)
{
    s->n_started = s->n_done = 0;
    s->began = now_s();
    while (s->n_done < s->n_started || (s->n_started < s->n_total && !s->err->code)) {
        for (int i = 0; i < s->n_jobs && !s->err->code; i++) {
            for (; s->n_started < s->n_total && passed_over(s, s->n_started); s->n_done++)
                s->n_started++;
            struct err e = { 0 };
            if (s->job[i].pid || s->n_started == s->n_total)
                continue; /* the pace of a run is known once the one before it has ended */
            if (set_pace(s, s->n_started, &e) < 0)
                keep(s, s->n_started++, answer_of(NULL, 0, &e));
            else if (is_led(s, s->n_started))
                lead(s, s->n_started++);
            else
                start(s, &s->job[i]);
        }
        if (running(s) > 0)
            watch(s);
    }
}

int sweep(json_t *specs, const struct sweep_options *options, json_t **results, struct err *e)
{
    struct state s = { .specs = specs, .results = json_array(), .n_jobs = jobs_for(specs, options->jobs),
                       .n_total = json_array_size(specs), .options = options, .err = e };
    size_t shared = sizeof(struct board) + sizeof(struct slot) * (size_t)s.n_jobs;
    s.job = calloc((size_t)s.n_jobs, sizeof *s.job);
    void *map = mmap(NULL, shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!s.job || !s.results || map == MAP_FAILED) {
        err_set(e, ERR_MEMORY, "out of memory for %d jobs", s.n_jobs);
        goto out;
    }
    s.board = map;
    for (size_t i = 0; i < s.n_total; i++)
        json_array_append_new(s.results, json_null());
    /* All runs on machine host are checked before the first begins: one that is too large need not wait its turn. */
    rank_warn(specs);
    s.checking = true;
    pass(&s);
    s.checking = false;
    if (!e->code)
        pass(&s);
    show_progress(&s, true);
out:
    if (map != MAP_FAILED)
        munmap(map, shared);
    free(s.job);
    if (e->code) {
        json_decref(s.results);
        s.results = NULL;
    }
    *results = s.results;
    return e->code;
}
