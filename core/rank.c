/* SPDX-License-Identifier: Apache-2.0
 * rank.c - starts a run's ranks: SPEC -> mpirun -n DEVICES moelab rank SPEC RESULT -> RESULT (cmd_rank.c).
 *
 * SPEC is the run's specification, RESULT what rank 0 measured or the first failure of any rank. Both lie in a
 * temporary directory, next to what the ranks print. */
#include "config.h"

#include "rank.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

struct launch { char dir[200], spec[220], result[220], log[220]; };

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

static int spawn(struct launch *l, int n_ranks, pid_t *pid, struct err *e)
{
    char mpirun[] = "mpirun", option[] = "-n", number[16], self[1024], rank[] = "rank";
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length <= 0)
        return err_set(e, ERR_IO, "machine host: cannot find this program: %s", strerror(errno));
    self[length] = '\0';
    snprintf(number, sizeof number, "%d", n_ranks);
    char *const argv[] = { mpirun, option, number, self, rank, l->spec, l->result, NULL };
    posix_spawn_file_actions_t actions;
    set_environment();
    int code = posix_spawn_file_actions_init(&actions);
    if (code == 0) {
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, l->log, O_WRONLY | O_CREAT | O_APPEND, 0600);
        posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
        code = posix_spawnp(pid, mpirun, &actions, NULL, argv, environ);
        posix_spawn_file_actions_destroy(&actions);
    }
    if (code == ENOENT)
        return err_set(e, ERR_INPUT, "machine host: no mpirun on PATH: install openmpi-bin");
    return code ? err_set(e, ERR_IO, "machine host: mpirun: %s", strerror(code)) : 0;
}

/* The line in which mpirun says how a rank ended, or the first that is no frame. */
static void last_words(const struct launch *l, char *text, size_t room)
{
    char line[400];
    FILE *f = fopen(l->log, "r");
    text[0] = '\0';
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = '\0';
        bool ended = strstr(line, "exited on signal") != NULL;
        if (ended || (!text[0] && line[0] && line[0] != '-'))
            snprintf(text, room, "%s", line);
        if (ended)
            break;
    }
    if (f)
        fclose(f);
}

static void show_log(const struct launch *l)
{
    char line[400];
    FILE *f = fopen(l->log, "r");
    while (f && fgets(line, sizeof line, f))
        fputs(line, stderr);
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
        char words[400];
        last_words(l, words, sizeof words);
        show_log(l);
        if (WIFSIGNALED(status))
            snprintf(words, sizeof words, "mpirun: %s", strsignal(WTERMSIG(status)));
        err_set(e, ERR_RUN, "%s: machine host: the ranks ended without a result: %s", where,
                words[0] ? words : "they said nothing");
    } else {
        show_log(l); /* warnings */
    }
    if (e->code) {
        json_decref(o);
        return NULL;
    }
    return o;
}

json_t *rank_launch(json_t *spec, struct err *e)
{
    const char *given = json_string_value(json_object_get(spec, "where")), *where = given ? given : "run";
    struct launch l = { .dir = "" };
    json_t *result = NULL;
    pid_t pid;
    int status;
    int n_ranks = rank_number(spec, e);
    if (n_ranks < 0 || open_launch(&l, spec, e) < 0 || spawn(&l, n_ranks, &pid, e) < 0) {
        err_prefix(e, "%s", where);
        goto out;
    }
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) {
            err_set(e, ERR_IO, "machine host: cannot wait for mpirun: %s", strerror(errno));
            goto out;
        }
    result = read_result(&l, where, status, e);
out:
    close_launch(&l);
    return result;
}
