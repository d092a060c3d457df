/* SPDX-License-Identifier: Apache-2.0
 * rank.c - starts a run's ranks: SPEC -> DEVICES times moelab rank SPEC RESULT -> RESULT (cmd_rank.c).
 *
 * SPEC is the run's specification, RESULT what rank 0 measured or the first failure of any rank. Both lie in a
 * temporary directory, next to what the ranks print. mpirun starts the ranks (rank_start.c); those of machine cuda are
 * started without it, unless $MOELAB_MPIRUN says otherwise. */
#include "config.h"

#include "machine.h"
#include "rank.h"
#include "rank_start.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int open_launch(struct launch *l, json_t *spec, struct err *e)
{
    const char *tmp = getenv("TMPDIR");
    int n = snprintf(l->dir, sizeof l->dir, "%s/moelab-%ld-XXXXXX", tmp && *tmp ? tmp : "/tmp", (long)getpid());
    if ((size_t)n >= sizeof l->dir || !mkdtemp(l->dir)) {
        err_set(e, ERR_IO, "machine %s: cannot make the directory %s: %s", l->machine, l->dir, strerror(errno));
        l->dir[0] = '\0';
        return e->code;
    }
    snprintf(l->spec, sizeof l->spec, "%s/spec.json", l->dir);
    snprintf(l->result, sizeof l->result, "%s/result.json", l->dir);
    snprintf(l->log, sizeof l->log, "%s/log", l->dir);
    snprintf(l->progress, sizeof l->progress, "%s.progress", l->result); /* cmd_rank.c */
    if (json_dump_file(spec, l->spec, JSON_COMPACT | JSON_REAL_PRECISION(17)) < 0)
        return err_set(e, ERR_IO, "machine %s: cannot write %s: %s", l->machine, l->spec, strerror(errno));
    return 0;
}

static void remove_dir(const char *dir)
{
    char path[1400];
    DIR *d = opendir(dir);
    for (const struct dirent *f; d && (f = readdir(d));)
        if (f->d_name[0] != '.' && (size_t)snprintf(path, sizeof path, "%s/%s", dir, f->d_name) < sizeof path)
            unlink(path);
    if (d)
        closedir(d);
    rmdir(dir);
}

static void close_launch(const struct launch *l)
{
    if (l->dir[0])
        remove_dir(l->dir);
}

void rank_clean(pid_t launcher)
{
    const char *tmp = getenv("TMPDIR");
    char own[40], dir[1024];
    const int n = snprintf(own, sizeof own, "moelab-%ld-", (long)launcher);
    tmp = tmp && *tmp ? tmp : "/tmp";
    DIR *d = opendir(tmp);
    for (const struct dirent *f; d && (f = readdir(d));)
        if (!strncmp(f->d_name, own, (size_t)n) &&
            (size_t)snprintf(dir, sizeof dir, "%s/%s", tmp, f->d_name) < sizeof dir)
            remove_dir(dir);
    if (d)
        closedir(d);
}

/* ---- what they said ---- */

static bool is_frame(const char *line)
{
    return strspn(line, "-") >= 40;
}

/* What the log says. mpirun puts its own words between two lines of dashes: that it ends the others, how to see more of
 * its help. A rank that dies may say something at the same time, in the same line, so that a frame is not seen.
 * `ended`: how the first rank that failed ended, if mpirun says so; `first`: the first line outside frames, which a
 * rank has written (but for Open MPI's, which says which signal in the next), or the first inside. */
struct words { char ended[200], first[400]; bool outside; };

static void read_ending(const char *line, int *rank, struct words *w)
{
    int number;
    char name[64];
    const char *process = strstr(line, "process rank "), *signal = strstr(line, "exited on signal ");
    if (w->ended[0])
        return;
    if (process && signal && sscanf(process, "process rank %d", rank) == 1 &&
        sscanf(signal, "exited on signal %d (%63[^)])", &number, name) == 2)
        snprintf(w->ended, sizeof w->ended, "rank %d was ended by signal %d (%s)%s", *rank, number, name,
                 number == SIGKILL ? "; the kernel does that when memory runs out" : "");
    sscanf(line, " Process name: [[%*d,%*d],%d]", rank); /* the line before that of its code */
    if (*rank >= 0 && sscanf(line, " Exit code: %d", &number) == 1)
        snprintf(w->ended, sizeof w->ended, "rank %d ended with exit code %d", *rank, number);
}

static void read_log(const struct launch *l, struct words *w)
{
    char line[400];
    bool framed = false;
    int rank = -1;
    FILE *f = fopen(l->log, "r");
    *w = (struct words){ .ended = "" };
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = '\0';
        read_ending(line, &rank, w);
        if (is_frame(line)) {
            framed = !framed;
        } else if (line[0] && !strstr(line, "*** Process received signal ***") &&
                   (!w->first[0] || (!framed && !w->outside))) {
            snprintf(w->first, sizeof w->first, "%s", line);
            w->outside = !framed;
        }
    }
    if (f)
        fclose(f);
}

/* frames: mpirun's own words too. */
static void show_log(const struct launch *l, bool frames)
{
    char line[400];
    bool framed = false, whole = true; /* whole: what is read next begins a line */
    FILE *f = fopen(l->log, "r");
    while (f && fgets(line, sizeof line, f)) {
        bool frame = whole && is_frame(line);
        if (frames || (!framed && !frame))
            fputs(line, stderr);
        framed ^= frame;
        whole = strchr(line, '\n') != NULL;
    }
    if (f)
        fclose(f);
}

/* Whether an error is only what others saw of a rank that has ended. */
static bool is_echo(const struct launch *l, const char *error)
{
    char seen[40];
    snprintf(seen, sizeof seen, "rank %d has ended", l->ended_rank);
    return l->ended_rank >= 0 && strstr(error, seen) != NULL;
}

/* What the ranks left: rank 0's result, or the first failure. */
static json_t *read_result(const struct launch *l, const char *where, struct err *e)
{
    json_t *o = json_load_file(l->result, 0, NULL);
    const char *error = json_string_value(json_object_get(o, "error"));
    if (error && !l->by_signal && !is_echo(l, error)) {
        err_set(e, (int)json_integer_value(json_object_get(o, "code")), "%s", error);
    } else if (error || !o || !WIFEXITED(l->status) || WEXITSTATUS(l->status) != 0) {
        struct words words;
        read_log(l, &words);
        if (l->local)
            snprintf(words.ended, sizeof words.ended, "%s", l->ended);
        else if (WIFSIGNALED(l->status))
            snprintf(words.ended, sizeof words.ended, "mpirun: %s", strsignal(WTERMSIG(l->status)));
        show_log(l, !words.ended[0] && !words.outside); /* mpirun's words when there are no others */
        err_set(e, ERR_RUN, "%s: machine %s: the ranks ended without a result: %s", where, l->machine,
                words.ended[0] ? words.ended : words.first[0] ? words.first : "they said nothing");
    } else {
        show_log(l, true); /* warnings */
    }
    if (e->code) {
        json_decref(o);
        return NULL;
    }
    return o;
}

/* How far ranks are that measure: a byte in a file for each size. */
static void show_sizes(const struct launch *l)
{
    struct stat st;
    if (stat(l->progress, &st) == 0)
        fprintf(stderr, "\rcalibrating with %d ranks: %lld of %d sizes", l->n_ranks, (long long)st.st_size,
                RANK_CALIBRATION_SIZES);
}

static json_t *launch(struct launch *l, json_t *spec, const char *where, bool shows, struct err *e)
{
    json_t *result = NULL;
    shows = shows && isatty(STDERR_FILENO);
    if (l->n_ranks < 0 || open_launch(l, spec, e) < 0 || rank_start(l, e) < 0)
        err_prefix(e, "%s", where);
    if (l->n_pids > 0) {
        rank_wait(l, shows ? show_sizes : NULL, e);
        if (shows)
            fprintf(stderr, "\r\033[K");
    }
    if (!e->code)
        result = read_result(l, where, e);
    close_launch(l);
    return result;
}

json_t *rank_launch(json_t *spec, struct err *e)
{
    const char *given = json_string_value(json_object_get(spec, "where")), *mpirun = getenv("MOELAB_MPIRUN");
    const char *executor = json_string_value(json_object_get(json_object_get(spec, "machine"), "executor"));
    struct launch l = { .machine = executor, .n_ranks = rank_number(spec, e),
                        .local = strcmp(executor, "host") != 0 && !(mpirun && *mpirun) };
    return launch(&l, spec, given ? given : "run", false, e);
}

json_t *rank_calibrate(int n_ranks, struct err *e)
{
    const char *tmp = getenv("TMPDIR");
    if (!machine_host_available()) {
        err_set(e, ERR_INPUT, "calibrate: built without MPI or OpenBLAS: there is no machine host to calibrate");
        return NULL;
    }
    if (getenv("OMPI_COMM_WORLD_SIZE")) {
        err_set(e, ERR_INPUT, "calibrate: this is an MPI rank already: start moelab without mpirun");
        return NULL;
    }
    if (rank_check_calibration(n_ranks, tmp && *tmp ? tmp : "/tmp", e) < 0)
        return NULL;
    json_t *spec = json_pack("{s:{s:s}}", "calibrate", "dir", tmp && *tmp ? tmp : "/tmp");
    struct launch l = { .machine = "host", .n_ranks = n_ranks };
    json_t *result = launch(&l, spec, "calibrate", true, e);
    json_decref(spec);
    return result;
}
