/* SPDX-License-Identifier: Apache-2.0
 * record_draw.c - pictures in a results directory, by gnuplot, which may be absent, broken or stuck. */
#include "config.h"

#include "record.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct said { char text[2000]; size_t n; }; /* the beginning of what gnuplot wrote */

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static pid_t start(const char *dir, const char *gp, int *from)
{
    int fd[2];
    if (pipe(fd) < 0)
        return -1;
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        setpgid(0, 0); /* so that the limit also ends what it started */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(fd[1], 2);
        dup2(fd[1], 1);
        close(fd[0]);
        close(fd[1]);
        if (chdir(dir) == 0)
            execlp("gnuplot", "gnuplot", gp, (char *)NULL);
        _exit(errno == ENOENT ? 127 : 126);
    }
    close(fd[1]);
    if (pid < 0)
        close(fd[0]);
    else
        setpgid(pid, pid); /* whichever of the two comes first */
    *from = fd[0];
    return pid;
}

/* Takes what gnuplot wrote, within `ms`. Returns 1, 0 at its end, -1 when there was nothing. */
static int listen_to(int fd, struct said *said, int ms)
{
    char more[500];
    struct pollfd p = { .fd = fd, .events = POLLIN };
    if (poll(&p, 1, ms) <= 0)
        return -1;
    ssize_t got = read(fd, more, sizeof more);
    if (got <= 0)
        return got < 0 && errno == EINTR ? -1 : 0;
    size_t room = sizeof said->text - 1 - said->n, kept = (size_t)got < room ? (size_t)got : room;
    memcpy(said->text + said->n, more, kept);
    said->n += kept;
    return 1;
}

/* gnuplot shows a command that it does not take, and below it what is wrong: the line that counts. Else the first. */
static const char *first_words(char *text)
{
    const char *first = NULL, *error = NULL;
    for (char *rest = text, *line; !error && (line = strtok_r(rest, "\n", &rest));) {
        if (!first && line[strspn(line, " \t\r^")])
            first = line;
        const char *at = strstr(line, "line ");
        if (at && at[5] >= '0' && at[5] <= '9')
            error = line;
    }
    return error ? error : first ? first : "it said nothing";
}

enum drawn record_draw(struct record *r, const char *stem, double limit_s, char *why, size_t room)
{
    struct said said = { .n = 0 };
    char gp[256], png[700];
    int fd, status = 0;
    snprintf(gp, sizeof gp, "%.200s.gp", stem);
    snprintf(png, sizeof png, "%s/%.200s.png", r->part, stem);
    pid_t pid = start(r->part, gp, &fd);
    if (pid < 0) {
        snprintf(why, room, "gnuplot cannot be started: %s", strerror(errno));
        return GNUPLOT_FAILED;
    }
    const double until = now_s() + limit_s;
    bool more = true, hangs = false;
    while (!hangs) {
        if (more)
            more = listen_to(fd, &said, 50) != 0;
        else
            poll(NULL, 0, 5); /* it closed its end, and is about to go */
        if (waitpid(pid, &status, WNOHANG) != 0)
            break;
        if ((hangs = now_s() > until)) {
            kill(-pid, SIGKILL);
            waitpid(pid, &status, 0);
        }
    }
    while (said.n < sizeof said.text - 1 && listen_to(fd, &said, 0) > 0) {
        /* its last words; who it left behind may go on */
    }
    close(fd);
    said.text[said.n] = '\0';
    if (!hangs && WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return DRAWN;
    unlink(png); /* begun, perhaps */
    if (!hangs && WIFEXITED(status) && WEXITSTATUS(status) == 127)
        return NO_GNUPLOT;
    const char *words = first_words(said.text);
    if (hangs)
        snprintf(why, room, "gnuplot %s did not end within %g s: %s", gp, limit_s, words);
    else if (WIFSIGNALED(status))
        snprintf(why, room, "gnuplot %s failed (signal %d, %s): %s", gp, WTERMSIG(status), strsignal(WTERMSIG(status)),
                 words);
    else
        snprintf(why, room, "gnuplot %s failed (exit %d): %s", gp, WEXITSTATUS(status), words);
    return hangs ? GNUPLOT_HANGS : GNUPLOT_FAILED;
}
