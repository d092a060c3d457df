/* SPDX-License-Identifier: Apache-2.0
 * rank.c - starts a run's ranks: SPEC -> mpirun -n DEVICES moelab rank SPEC RESULT -> RESULT (cmd_rank.c).
 *
 * SPEC is the run's specification, RESULT what rank 0 measured or the first failure of any rank. Both lie in a
 * temporary directory, next to what the ranks print. */
#include "config.h"

#include "machine.h"
#include "rank.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

struct launch { char dir[200], spec[220], result[220], log[220], progress[240]; };

static int open_launch(struct launch *l, json_t *spec, struct err *e)
{
    const char *tmp = getenv("TMPDIR");
    int n = snprintf(l->dir, sizeof l->dir, "%s/moelab-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if ((size_t)n >= sizeof l->dir || !mkdtemp(l->dir)) {
        err_set(e, ERR_IO, "machine host: cannot make the directory %s: %s", l->dir, strerror(errno));
        l->dir[0] = '\0';
        return e->code;
    }
    snprintf(l->spec, sizeof l->spec, "%s/spec.json", l->dir);
    snprintf(l->result, sizeof l->result, "%s/result.json", l->dir);
    snprintf(l->log, sizeof l->log, "%s/log", l->dir);
    snprintf(l->progress, sizeof l->progress, "%s.progress", l->result); /* cmd_rank.c */
    if (json_dump_file(spec, l->spec, JSON_COMPACT | JSON_REAL_PRECISION(17)) < 0)
        return err_set(e, ERR_IO, "machine host: cannot write %s: %s", l->spec, strerror(errno));
    return 0;
}

static void close_launch(const struct launch *l)
{
    if (!l->dir[0])
        return;
    unlink(l->spec);
    unlink(l->result);
    unlink(l->log);
    unlink(l->progress);
    rmdir(l->dir);
}

/* As environment rather than arguments, which only Open MPI would understand. What the user has set stays. */
static void set_environment(void)
{
    static const char *const settings[][2] = {
        { "OMPI_MCA_rmaps_base_oversubscribe", "1" },           /* more ranks than cores is no mistake */
        { "OMPI_MCA_mpi_yield_when_idle", "1" },
        { "OMPI_MCA_hwloc_base_binding_policy", "none" },
        { "OMPI_MCA_btl_vader_single_copy_mechanism", "none" }, /* containers forbid ptrace, and it says so at length */
        { "OPENBLAS_NUM_THREADS", "1" },                        /* a rank is one device */
    };
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        setenv(settings[i][0], settings[i][1], 0);
    if (geteuid() == 0) {
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    }
}

/* $MOELAB_MPIRUN in words, as in "mpirun --hostfile hosts"; or mpirun. Ends with NULL; < 0: there are too many. */
static int split_command(char *text, size_t room, char **word, int most)
{
    const char *given = getenv("MOELAB_MPIRUN");
    int n = 0;
    if ((size_t)snprintf(text, room, "%s", given && *given ? given : "mpirun") >= room)
        return -1;
    for (char *rest = text, *one; n < most && (one = strtok_r(rest, " \t\n", &rest)) != NULL;)
        word[n++] = one;
    return n < most && n > 0 ? n : -1;
}

static int spawn(struct launch *l, int n_ranks, pid_t *pid, struct err *e)
{
    enum { WORDS = 64, OWN = 7 };
    char command[2048], option[] = "-n", number[16], self[1024], rank[] = "rank", *argv[WORDS + OWN];
    const int n_words = split_command(command, sizeof command, argv, WORDS);
    if (n_words < 0)
        return err_set(e, ERR_INPUT, "machine host: MOELAB_MPIRUN: expected a command of less than %d words", WORDS);
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length <= 0)
        return err_set(e, ERR_IO, "machine host: cannot find this program: %s", strerror(errno));
    self[length] = '\0';
    snprintf(number, sizeof number, "%d", n_ranks);
    char *const own[OWN] = { option, number, self, rank, l->spec, l->result, NULL };
    memcpy(argv + n_words, own, sizeof own);
    posix_spawn_file_actions_t actions;
    set_environment();
    int code = posix_spawn_file_actions_init(&actions);
    if (code == 0) {
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, l->log, O_WRONLY | O_CREAT | O_APPEND, 0600);
        posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
        code = posix_spawnp(pid, argv[0], &actions, NULL, argv, environ);
        posix_spawn_file_actions_destroy(&actions);
    }
    if (code == ENOENT)
        return err_set(e, ERR_INPUT, "machine host: no %s on PATH: install openmpi-bin", argv[0]);
    return code ? err_set(e, ERR_IO, "machine host: %s: %s", argv[0], strerror(code)) : 0;
}

static bool is_frame(const char *line)
{
    return strspn(line, "-") >= 40;
}

/* What the log says. mpirun puts its own words between two lines of dashes: that it ends the others, how to see more of
 * its help. `ended`: how the first rank that failed ended, if mpirun says so; `first`: the first line outside frames,
 * which a rank has written, or the first inside. */
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
        if (framed)
            read_ending(line, &rank, w);
        if (is_frame(line)) {
            framed = !framed;
        } else if (line[0] && (!w->first[0] || (!framed && !w->outside))) {
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

/* What the ranks left: rank 0's result, or the first failure. */
static json_t *read_result(const struct launch *l, const char *where, int status, struct err *e)
{
    json_t *o = json_load_file(l->result, 0, NULL);
    const char *error = json_string_value(json_object_get(o, "error"));
    if (error) {
        err_set(e, (int)json_integer_value(json_object_get(o, "code")), "%s", error);
    } else if (!o || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        struct words words;
        read_log(l, &words);
        if (WIFSIGNALED(status))
            snprintf(words.ended, sizeof words.ended, "mpirun: %s", strsignal(WTERMSIG(status)));
        show_log(l, !words.ended[0] && !words.outside); /* mpirun's words when there are no others */
        err_set(e, ERR_RUN, "%s: machine host: the ranks ended without a result: %s", where,
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
static void show_sizes(const struct launch *l, int n_ranks, bool ended)
{
    struct stat st;
    if (!isatty(STDERR_FILENO) || stat(l->progress, &st) < 0)
        return;
    if (ended)
        fprintf(stderr, "\r\033[K");
    else
        fprintf(stderr, "\rcalibrating with %d ranks: %lld of %d sizes", n_ranks, (long long)st.st_size,
                RANK_CALIBRATION_SIZES);
}

/* Waits for mpirun; `shows`: and says how far they are meanwhile. */
static int wait_for(const struct launch *l, pid_t pid, int n_ranks, bool shows, int *status, struct err *e)
{
    for (;;) {
        const pid_t got = waitpid(pid, status, shows ? WNOHANG : 0);
        if (got == pid)
            break;
        if (got < 0 && errno != EINTR)
            return err_set(e, ERR_IO, "machine host: cannot wait for mpirun: %s", strerror(errno));
        if (shows) {
            show_sizes(l, n_ranks, false);
            nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
        }
    }
    if (shows)
        show_sizes(l, n_ranks, true);
    return 0;
}

static json_t *launch(json_t *spec, const char *where, int n_ranks, bool shows, struct err *e)
{
    struct launch l = { .dir = "" };
    json_t *result = NULL;
    pid_t pid;
    int status;
    if (n_ranks < 0 || open_launch(&l, spec, e) < 0 || spawn(&l, n_ranks, &pid, e) < 0)
        err_prefix(e, "%s", where);
    else if (wait_for(&l, pid, n_ranks, shows, &status, e) == 0)
        result = read_result(&l, where, status, e);
    close_launch(&l);
    return result;
}

json_t *rank_launch(json_t *spec, struct err *e)
{
    const char *given = json_string_value(json_object_get(spec, "where"));
    return launch(spec, given ? given : "run", rank_number(spec, e), false, e);
}

json_t *rank_calibrate(int n_ranks, struct err *e)
{
    const char *tmp = getenv("TMPDIR");
    if (!machine_host_available()) {
        err_set(e, ERR_INPUT, "calibrate: built without MPI or OpenBLAS: there is no machine host to calibrate");
        return NULL;
    }
    json_t *spec = json_pack("{s:{s:s}}", "calibrate", "dir", tmp && *tmp ? tmp : "/tmp");
    json_t *result = launch(spec, "calibrate", n_ranks, true, e);
    json_decref(spec);
    return result;
}
