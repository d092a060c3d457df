/* SPDX-License-Identifier: Apache-2.0
 * rank_start.c - see rank_start.h. */
#include "config.h"

#include "rank_start.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int find_self(const struct launch *l, char *self, size_t room, struct err *e)
{
    const ssize_t length = readlink("/proc/self/exe", self, room - 1);
    if (length <= 0)
        return err_set(e, ERR_IO, "machine %s: cannot find this program: %s", l->machine, strerror(errno));
    self[length] = '\0';
    return 0;
}

/* In a child: reads nothing, writes to the log, and ends with its parent, however that ends. Only what is safe between
 * fork and exec in a process with one thread, which this one is. */
static bool enter_child(const struct launch *l, pid_t parent)
{
    const int in = open("/dev/null", O_RDONLY), out = open(l->log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) /* which has ended already */
        _exit(1);
    return in >= 0 && out >= 0 && dup2(in, STDIN_FILENO) >= 0 && dup2(out, STDOUT_FILENO) >= 0 &&
           dup2(out, STDERR_FILENO) >= 0;
}

/* ---- by mpirun ---- */

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

static int start_mpirun(struct launch *l, struct err *e)
{
    enum { WORDS = 64, OWN = 7 };
    char command[2048], option[] = "-n", number[16], self[1024], rank[] = "rank", *argv[WORDS + OWN];
    const int n_words = split_command(command, sizeof command, argv, WORDS);
    if (n_words < 0)
        return err_set(e, ERR_INPUT, "machine %s: MOELAB_MPIRUN: expected a command of less than %d words", l->machine,
                       WORDS);
    if (find_self(l, self, sizeof self, e) < 0)
        return e->code;
    snprintf(number, sizeof number, "%d", l->n_ranks);
    char *const own[OWN] = { option, number, self, rank, l->spec, l->result, NULL };
    memcpy(argv + n_words, own, sizeof own);
    set_environment();
    int told[2], code = 0; /* what exec said, if it came back */
    if (pipe2(told, O_CLOEXEC) < 0)
        return err_set(e, ERR_IO, "machine %s: cannot make a pipe: %s", l->machine, strerror(errno));
    fflush(NULL);
    const pid_t parent = getpid();
    l->pid[0] = fork();
    if (l->pid[0] == 0) {
        close(told[0]);
        if (enter_child(l, parent))
            execvp(argv[0], argv);
        code = errno;
        _exit(write(told[1], &code, sizeof code) == sizeof code ? 127 : 126);
    }
    close(told[1]);
    if (l->pid[0] < 0)
        code = errno;
    else if (read(told[0], &code, sizeof code) <= 0)
        l->n_pids = 1;
    else
        waitpid(l->pid[0], NULL, 0);
    close(told[0]);
    if (code == ENOENT)
        return err_set(e, ERR_INPUT, "machine %s: no %s on PATH: install openmpi-bin", l->machine, argv[0]);
    return code ? err_set(e, ERR_IO, "machine %s: %s: %s", l->machine, argv[0], strerror(code)) : 0;
}

/* ---- one by one ---- */

/* The child. */
static void become(const struct launch *l, const struct team_pipes *pipes, int rank, char *self, pid_t parent)
{
    char word[] = "rank", spec[sizeof l->spec], result[sizeof l->result];
    memcpy(spec, l->spec, sizeof spec);
    memcpy(result, l->result, sizeof result);
    if (enter_child(l, parent) && team_pipes_become(pipes, rank) == 0)
        execv(self, (char *const[]){ self, word, spec, result, NULL });
    _exit(127);
}

static int start_local(struct launch *l, struct err *e)
{
    struct team_pipes pipes;
    char self[1024];
    if (team_pipes_make(&pipes, l->n_ranks, e) < 0)
        err_prefix(e, "machine %s", l->machine);
    else
        find_self(l, self, sizeof self, e);
    fflush(NULL);
    const pid_t parent = getpid();
    for (int i = 0; i < l->n_ranks && !e->code; i++) {
        const pid_t pid = fork();
        if (pid == 0)
            become(l, &pipes, i, self, parent);
        if (pid < 0)
            err_set(e, ERR_IO, "machine %s: cannot start rank %d: %s", l->machine, i, strerror(errno));
        else
            l->pid[l->n_pids++] = pid;
    }
    team_pipes_close(&pipes); /* so that a rank's end is seen by the others */
    return e->code;
}

int rank_start(struct launch *l, struct err *e)
{
    l->ended_rank = -1;
    return l->local ? start_local(l, e) : start_mpirun(l, e);
}

/* ---- until they end ---- */

enum { GRACE_MS = 3000, LOOK_MS = 100, MOMENT_MS = 5 };

static void nap(int ms)
{
    nanosleep(&(struct timespec){ .tv_nsec = 1000000L * ms }, NULL);
}

static void end_all(const struct launch *l)
{
    for (int i = 0; i < l->n_ranks; i++)
        if (l->pid[i] > 0)
            kill(l->pid[i], SIGKILL);
}

/* A rank that fails in good order has said why in the result, and ends with 1 or 2. */
static void note_end(struct launch *l, int rank, int status)
{
    if (l->status == 0)
        l->status = status;
    if (WIFSIGNALED(status) && !l->by_signal) {
        const int number = WTERMSIG(status);
        snprintf(l->ended, sizeof l->ended, "rank %d was ended by signal %d (%s)%s", rank, number, strsignal(number),
                 number == SIGKILL ? "; the kernel does that when memory runs out" : "");
        l->by_signal = true;
        l->ended_rank = rank;
    } else if (WIFEXITED(status) && WEXITSTATUS(status) != 0 && !l->ended[0]) {
        snprintf(l->ended, sizeof l->ended, "rank %d ended with exit code %d", rank, WEXITSTATUS(status));
        l->ended_rank = rank;
    }
}

static int wait_local(struct launch *l, struct err *e)
{
    for (int left = GRACE_MS; l->n_pids > 0;) {
        int status;
        const pid_t got = waitpid(-1, &status, l->status ? WNOHANG : 0);
        if (got < 0 && errno != EINTR)
            return err_set(e, ERR_IO, "machine %s: cannot wait for ranks: %s", l->machine, strerror(errno));
        for (int i = 0; i < l->n_ranks; i++)
            if (got > 0 && l->pid[i] == got) {
                l->pid[i] = 0;
                l->n_pids--;
                if (left > 0) /* later ends are of our making */
                    note_end(l, i, status);
            }
        if (got == 0 && left > 0 && (left -= MOMENT_MS) <= 0)
            end_all(l);
        if (got == 0)
            nap(MOMENT_MS);
    }
    return 0;
}

int rank_wait(struct launch *l, void (*shows)(const struct launch *), struct err *e)
{
    if (l->local)
        return wait_local(l, e);
    for (;;) {
        const pid_t got = waitpid(l->pid[0], &l->status, shows ? WNOHANG : 0);
        if (got == l->pid[0])
            return 0;
        if (got < 0 && errno != EINTR)
            return err_set(e, ERR_IO, "machine %s: cannot wait for mpirun: %s", l->machine, strerror(errno));
        if (shows) {
            shows(l);
            nap(LOOK_MS);
        }
    }
}
