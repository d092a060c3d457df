/* SPDX-License-Identifier: Apache-2.0
 * team_pipes.c - a team of processes on one computer: rank 0 has a socket to each of the others.
 *
 * The process that starts them makes the pairs beforehand, so nothing has to be found or waited for; and a rank that
 * ends, however it ends, closes its socket, which is how the others know. */
#include "config.h"

#include "team.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct pipes { struct team team; int fd[]; }; /* of rank 0: to rank i + 1; of others: to rank 0 */

static struct pipes *of(struct team *t)
{
    return (struct pipes *)t;
}

/* ---- who starts them ---- */

int team_pipes_make(struct team_pipes *p, int size, struct err *e)
{
    p->size = size;
    for (int i = 0; i < TEAM_PIPES_MAX; i++)
        p->root[i] = p->own[i] = -1;
    if (size > TEAM_PIPES_MAX)
        return err_set(e, ERR_INPUT, "%d ranks, expected at most %d", size, TEAM_PIPES_MAX);
    for (int i = 1; i < size; i++) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
            return err_set(e, ERR_IO, "cannot make a socket: %s", strerror(errno));
        p->root[i] = pair[0];
        p->own[i] = pair[1];
    }
    return 0;
}

int team_pipes_become(const struct team_pipes *p, int rank)
{
    char text[32 + 12 * TEAM_PIPES_MAX];
    int n = snprintf(text, sizeof text, "%d %d", rank, p->size);
    for (int i = rank ? rank : 1; i < (rank ? rank + 1 : p->size); i++) {
        const int fd = rank ? p->own[i] : p->root[i];
        if (fcntl(fd, F_SETFD, 0) < 0)
            return -1;
        n += snprintf(text + n, sizeof text - (size_t)n, "%c%d", i == 1 || rank ? ' ' : ',', fd);
    }
    return setenv("MOELAB_TEAM", text, 1);
}

void team_pipes_close(struct team_pipes *p)
{
    for (int i = 1; i < p->size && i < TEAM_PIPES_MAX; i++) {
        if (p->root[i] >= 0)
            close(p->root[i]);
        if (p->own[i] >= 0)
            close(p->own[i]);
        p->root[i] = p->own[i] = -1;
    }
}

/* ---- they themselves ---- */

/* peer: for the message. */
static int pass(int fd, void *bytes, size_t n, bool sends, int peer, struct err *e)
{
    for (size_t at = 0; at < n;) {
        const ssize_t some = sends ? send(fd, (char *)bytes + at, n - at, MSG_NOSIGNAL)
                                   : recv(fd, (char *)bytes + at, n - at, 0);
        if (some < 0 && errno == EINTR)
            continue;
        if (some == 0 || (some < 0 && (errno == EPIPE || errno == ECONNRESET)))
            return err_set(e, ERR_RUN, "rank %d has ended", peer);
        if (some < 0)
            return err_set(e, ERR_IO, "cannot talk to rank %d: %s", peer, strerror(errno));
        at += (size_t)some;
    }
    return 0;
}

/* From everybody to rank 0, which gives all to everybody: nobody sends to one that is sending. */
static int gather(struct team *t, const void *mine, size_t n, void *all, struct err *e)
{
    const int *fd = of(t)->fd;
    memcpy((char *)all + (size_t)t->rank * n, mine, n);
    if (t->rank > 0) {
        if (pass(fd[0], (char *)all + (size_t)t->rank * n, n, true, 0, e) < 0)
            return e->code;
        return pass(fd[0], all, (size_t)t->size * n, false, 0, e);
    }
    for (int i = 1; i < t->size && !e->code; i++)
        pass(fd[i - 1], (char *)all + (size_t)i * n, n, false, i, e);
    for (int i = 1; i < t->size && !e->code; i++)
        pass(fd[i - 1], all, (size_t)t->size * n, true, i, e);
    return e->code;
}

static int tell(struct team *t, char **text, struct err *e)
{
    uint64_t n = t->rank == 0 ? strlen(*text) : 0;
    for (int i = 1; t->rank == 0 && i < t->size && !e->code; i++)
        if (pass(of(t)->fd[i - 1], &n, sizeof n, true, i, e) == 0)
            pass(of(t)->fd[i - 1], *text, n, true, i, e);
    if (t->rank == 0 || pass(of(t)->fd[0], &n, sizeof n, false, 0, e) < 0)
        return e->code;
    *text = malloc(n + 1);
    if (!*text)
        return err_set(e, ERR_MEMORY, "out of memory for %llu bytes", (unsigned long long)n);
    (*text)[n] = '\0';
    return pass(of(t)->fd[0], *text, n, false, 0, e);
}

static int alive(struct team *t, struct err *e)
{
    char byte;
    for (int i = 0; i < (t->rank ? 1 : t->size - 1); i++) {
        const ssize_t n = recv(of(t)->fd[i], &byte, 1, MSG_PEEK | MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno == ECONNRESET)) {
            t->lost = true;
            return err_set(e, ERR_RUN, "rank %d has ended", t->rank ? 0 : i + 1);
        }
    }
    return 0;
}

static void leave(struct team *t)
{
    for (int i = 0; i < (t->rank ? 1 : t->size - 1); i++)
        close(of(t)->fd[i]);
    free(t);
}

static const struct team_ops pipes_ops = { "pipes", gather, tell, alive, leave };

int team_join_pipes(struct team **out, const char *text, struct err *e)
{
    int rank, size, at = 0;
    *out = NULL;
    if (sscanf(text, "%d %d%n", &rank, &size, &at) != 2 || size < 1 || size > TEAM_PIPES_MAX || rank < 0 ||
        rank >= size)
        return err_set(e, ERR_INPUT, "MOELAB_TEAM=%s: expected \"RANK SIZE FD[,FD...]\"; moelab sets it, nobody else "
                       "needs to", text);
    const int n = rank ? 1 : size - 1;
    struct pipes *p = calloc(1, sizeof *p + sizeof *p->fd * (size_t)n);
    if (!p)
        return err_set(e, ERR_MEMORY, "out of memory for %d ranks", size);
    p->team = (struct team){ .ops = &pipes_ops, .rank = rank, .size = size };
    const char *rest = text + at;
    for (int i = 0; i < n; i++) {
        int used = 0;
        if (sscanf(rest, i ? ",%d%n" : " %d%n", &p->fd[i], &used) != 1 || fcntl(p->fd[i], F_SETFD, FD_CLOEXEC) < 0) {
            free(p);
            return err_set(e, ERR_INPUT, "MOELAB_TEAM=%s: expected %d open file descriptor%s", text, n,
                           n == 1 ? "" : "s");
        }
        rest += used;
    }
    *out = &p->team;
    return 0;
}
