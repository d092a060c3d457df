/* SPDX-License-Identifier: Apache-2.0
 * nccl.c - see standin.h: NCCL between forked processes, over sockets. Communicators do not block, as those that
 * hw/cuda_nccl.c asks for: calls say "in progress" now and then, and whoever queues something before asking again is
 * ended. */
#include "standin.h"

#include "cuda_nccl.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_RANKS = 8, MAX_CALLS = 64 };

struct call { int peer; bool sends; char *at; size_t bytes, done; uint64_t header; };
struct group { int n; struct call call[MAX_CALLS]; };
struct ncclComm { int rank; };

static struct {
    int n_ranks, rank, fd[MAX_RANKS][MAX_RANKS];
    int dies, n_groups, depth, pending;
    bool open, lost;
    cudaStream_t stream;
    struct group group;
    struct ncclComm comm;
} all;

static void end(const char *what)
{
    fprintf(stderr, "NCCL's stand-in, rank %d: %s\n", all.rank, what);
    _exit(9);
}

void standin_nccl_open(int n_ranks)
{
    memset(&all, 0, sizeof all);
    all.n_ranks = n_ranks;
    for (int i = 0; i < n_ranks; i++)
        for (int j = 0; j < i; j++) {
            int pair[2];
            if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) < 0)
                end("no sockets");
            all.fd[i][j] = pair[0];
            all.fd[j][i] = pair[1];
        }
}

static void close_row(int rank)
{
    for (int j = 0; j < all.n_ranks; j++)
        if (j != rank)
            close(all.fd[rank][j]);
}

void standin_nccl_become(int rank, int dies)
{
    all.rank = rank;
    all.dies = dies;
    for (int i = 0; i < all.n_ranks; i++)
        if (i != rank)
            close_row(i);
}

void standin_nccl_close(void)
{
    for (int i = 0; i < all.n_ranks; i++)
        close_row(i);
}

/* ---- a group ---- */

/* The first of a peer's that is not done: they go one after another. */
static struct call *next(struct group *g, int peer, bool sends)
{
    for (int i = 0; i < g->n; i++) {
        struct call *c = &g->call[i];
        if (c->peer == peer && c->sends == sends && c->done < sizeof c->header + c->bytes)
            return c;
    }
    return NULL;
}

/* As far as the socket goes: the number of bytes, and the bytes. */
static void go_on(struct call *c, int fd)
{
    for (;;) {
        const bool head = c->done < sizeof c->header;
        char *at = head ? (char *)&c->header + c->done : c->at + (c->done - sizeof c->header);
        const size_t left = head ? sizeof c->header - c->done : c->bytes + sizeof c->header - c->done;
        const ssize_t n = left == 0 ? 0 : c->sends ? send(fd, at, left, MSG_NOSIGNAL) : recv(fd, at, left, 0);
        if (left == 0 || (n < 0 && errno == EAGAIN))
            return;
        if (n <= 0) {
            all.lost = true;
            return;
        }
        c->done += (size_t)n;
        if (!c->sends && c->done == sizeof c->header && c->header != c->bytes)
            end("a rank receives another number of bytes than is sent");
    }
}

static void move(const void *work)
{
    static struct group copy; /* what is captured is moved more than once */
    struct group *const g = &copy;
    memcpy(g, work, sizeof *g);
    if (all.dies >= 0 && all.n_groups == all.dies)
        _exit(0);
    all.n_groups++;
    for (bool busy = true; busy && !all.lost;) {
        struct pollfd p[2 * MAX_RANKS];
        struct call *of[2 * MAX_RANKS];
        nfds_t n = 0;
        for (int peer = 0; peer < all.n_ranks; peer++)
            for (int sends = 0; sends < 2; sends++) {
                struct call *c = peer == all.rank ? NULL : next(g, peer, sends);
                if (!c)
                    continue;
                of[n] = c;
                p[n++] = (struct pollfd){ .fd = all.fd[all.rank][peer], .events = sends ? POLLOUT : POLLIN };
            }
        busy = n > 0;
        if (busy && poll(p, n, 10000) <= 0)
            end("a group waits for what never comes");
        for (nfds_t i = 0; i < n; i++)
            if (p[i].revents)
                go_on(of[i], p[i].fd);
    }
}

/* ---- its calls ---- */

/* One call in three is not done at once. */
static ncclResult_t soon(void)
{
    static int n;
    all.pending = n++ % 3 == 0 ? 2 : 0;
    return all.pending ? ncclInProgress : ncclSuccess;
}

static void settled(void)
{
    if (!all.open)
        end("no communicator is open");
    if (all.pending)
        end("called while a call is in progress");
}

static ncclResult_t version(int *v) { *v = NCCL_VERSION_CODE; return ncclSuccess; }

static ncclResult_t unique_id(ncclUniqueId *id)
{
    memset(id, 0x5a, sizeof *id);
    return ncclSuccess;
}

static ncclResult_t open_comm(ncclComm_t *comm, int n_ranks, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    for (size_t i = 0; i < sizeof id.internal; i++)
        if (id.internal[i] != 0x5a)
            end("not the number that rank 0 made");
    if (n_ranks != all.n_ranks || rank != all.rank || config->blocking != 0)
        return ncclInvalidArgument;
    all.open = true;
    all.comm.rank = rank;
    *comm = &all.comm;
    return soon();
}

static ncclResult_t close_comm(ncclComm_t comm)
{
    (void)comm;
    all.open = false;
    return ncclSuccess;
}

static ncclResult_t state(ncclComm_t comm, ncclResult_t *code)
{
    (void)comm;
    all.pending -= all.pending > 0;
    *code = all.lost ? ncclRemoteError : all.pending ? ncclInProgress : ncclSuccess;
    return ncclSuccess;
}

static ncclResult_t group_start(void)
{
    settled();
    all.depth++;
    all.group.n = 0;
    all.stream = NULL;
    return ncclSuccess;
}

static ncclResult_t add(struct call c, cudaStream_t s)
{
    settled();
    if (all.depth != 1 || c.peer == all.rank || c.peer < 0 || c.peer >= all.n_ranks || (all.stream && s != all.stream))
        return ncclInvalidUsage;
    if (all.group.n == MAX_CALLS)
        end("too many calls in a group");
    all.stream = s;
    all.group.call[all.group.n++] = c;
    return ncclSuccess;
}

static ncclResult_t send_some(const void *at, size_t n, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t s)
{
    union { const void *from; char *at; } u = { at };
    (void)comm;
    return type != ncclInt8 ? ncclInvalidArgument : add((struct call){ peer, true, u.at, n, 0, n }, s);
}

static ncclResult_t receive_some(void *at, size_t n, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t s)
{
    (void)comm;
    return type != ncclInt8 ? ncclInvalidArgument : add((struct call){ peer, false, at, n, 0, 0 }, s);
}

/* One line for each call, as "s2 send to 1, 96"; a group has one of its own. */
static ncclResult_t group_end(void)
{
    settled();
    if (all.depth-- != 1)
        return ncclInvalidUsage;
    if (all.group.n == 0)
        return ncclSuccess;
    const struct group *g = &all.group;
    for (int i = 0; i < g->n; i++) {
        char what[40];
        snprintf(what, sizeof what, "%s %d,", g->call[i].sends ? "send to" : "receive from", g->call[i].peer);
        standin_note(all.stream, what, (double)g->call[i].bytes);
    }
    standin_queue(all.stream, "group of", g->n, move, g, sizeof *g);
    return soon();
}

static const char *error(ncclResult_t code) { return code == ncclRemoteError ? "remote error" : "an error"; }
static const char *last_error(ncclComm_t comm) { (void)comm; return ""; }

int nccl_load(struct nccl *n, struct err *e)
{
    *n = (struct nccl){ version, unique_id, open_comm, close_comm, close_comm, state, group_start, group_end, send_some,
                        receive_some, error, last_error };
    return e->code;
}
