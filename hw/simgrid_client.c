/* SPDX-License-Identifier: Apache-2.0
 * simgrid_client.c - the solver of tier simgrid: talks to moelab-simgrid (simgrid_server.cpp describes how).
 *
 * The server is a process of its own, one per open net. It is spoken to over a socket rather than a pipe, because a
 * send to a process that died can then fail without a signal. */
#include "config.h"

#include "net.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define SERVER "moelab-simgrid"
#define HELLO  SERVER " 2"

/* A flow per pair costs SimGrid about N^4.5: over a minute for one exchange among 128 devices. */
#define MAX_DEVICES 128

extern char **environ;

#define UNDER_WAY (-2) /* in place of next_free */

struct flying {
    int32_t slot, receiver;
    struct net_flow flow;
    double latency;
    int64_t next_free;
};

struct client {
    pid_t pid;
    int fd;
    char *out; /* written, not yet sent */
    size_t n_out, room_out;
    char in[1 << 16]; /* received, not yet read: in[at .. n_in) */
    size_t at, n_in;
    struct flying *flow; /* a flow's id on the wire is its index */
    int64_t n_flows, room_flows, free_flow;
    int32_t n_told; /* changes of links that the server knows of */
};

/* ---- the process ---- */

/* Where the server may lie, in order; NULL ends the list. Each path is returned in `path`. */
static const char *candidate(int i, char *path, size_t size)
{
    const char *given = getenv("MOELAB_LIBEXEC");
    char self[4096];
    if (given && *given) { /* who names a place means it: nothing else is tried */
        snprintf(path, size, "%s/" SERVER, given);
        return i == 0 ? path : NULL;
    }
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = '\0';
    switch (i) {
    case 0:
        snprintf(path, size, "%s/hw/" SERVER, self);
        return path; /* in the build tree */
    case 1:
        snprintf(path, size, "%s/../hw/" SERVER, self);
        return path; /* libtool's .libs/ */
    case 2:
        snprintf(path, size, "%s/" SERVER, MOELAB_LIBEXECDIR);
        return path;
    default:
        return NULL;
    }
}

bool net_simgrid_server(char *path, size_t size, char *tried, size_t room)
{
    *tried = '\0';
    for (int i = 0; candidate(i, path, size); i++) {
        if (access(path, X_OK) == 0)
            return true;
        snprintf(tried + strlen(tried), room - strlen(tried), "%s%.200s", i ? ", " : "", path);
    }
    return false;
}

static int find_server(char *path, size_t size, struct err *err)
{
    char tried[700];
    if (net_simgrid_server(path, size, tried, sizeof tried))
        return 0;
    return err_set(err, ERR_INPUT,
                   "tier simgrid: no " SERVER " (looked for %s): it is not built --without-simgrid; "
                   "use tier exact, which shares its model, or set MOELAB_LIBEXEC",
                   tried);
}

bool net_simgrid_available(void)
{
    char path[1024];
    struct err why = { 0 };
    return find_server(path, sizeof path, &why) == 0;
}

/* Fitted to one exchange of uneven sizes among 8 to 96 devices, all pairs, on star-50GBps and dgx-h100 (SimGrid 3.32,
 * one core of a server): 1.5 ms, 8 ms, 69 ms, 0.28 s, 1.1 s and 6.4 s for 8, 16, 32, 48, 64 and 96. Where few routes
 * make many flows equal, down to a fifth of it was seen. */
double net_simgrid_seconds(double n_flows)
{
    return 3e-5 * n_flows + 7e-8 * n_flows * n_flows;
}

static int spawn_server(struct client *c, struct err *err)
{
    char path[4200];
    int rc = find_server(path, sizeof path, err), ends[2];
    if (rc)
        return rc;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
        return err_set(err, ERR_IO, "tier simgrid: socketpair: %s", strerror(errno));
    c->fd = ends[0];

    /* Not fork: that would copy the page tables of a large parent. */
    posix_spawn_file_actions_t actions;
    char *argv[] = { path, NULL };
    rc = posix_spawn_file_actions_init(&actions);
    if (rc == 0) {
        posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
        posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
        rc = posix_spawn(&c->pid, path, &actions, NULL, argv, environ);
        posix_spawn_file_actions_destroy(&actions);
    }
    close(ends[1]);
    if (rc) {
        c->pid = 0;
        return err_set(err, ERR_IO, "tier simgrid: %s: %s", path, strerror(rc));
    }
    return 0;
}

/* The connection broke: says how the server ended. */
static int died(struct client *c, struct err *err)
{
    int status = 0;
    if (c->pid > 0)
        waitpid(c->pid, &status, 0);
    c->pid = 0;
    if (WIFSIGNALED(status))
        return err_set(err, ERR_IO, "the SimGrid process died (signal %d, %s)", WTERMSIG(status),
                       strsignal(WTERMSIG(status)));
    return err_set(err, ERR_IO, "the SimGrid process died (exit %d)", WEXITSTATUS(status));
}

/* ---- lines ---- */

__attribute__((format(printf, 3, 4))) static int put(struct client *c, struct err *err, const char *fmt, ...)
{
    for (;;) {
        size_t room = c->room_out - c->n_out;
        va_list ap;
        va_start(ap, fmt);
        int n = vsnprintf(c->out ? c->out + c->n_out : NULL, room, fmt, ap);
        va_end(ap);
        if (n >= 0 && (size_t)n < room) {
            c->n_out += (size_t)n;
            return 0;
        }
        size_t bigger = 2 * c->room_out + 4096;
        char *out = realloc(c->out, bigger);
        if (!out)
            return err_set(err, ERR_MEMORY, "tier simgrid: out of memory");
        c->out = out;
        c->room_out = bigger;
    }
}

static int flush(struct client *c, struct err *err)
{
    for (size_t sent = 0; sent < c->n_out;) {
        ssize_t n = send(c->fd, c->out + sent, c->n_out - sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return died(c, err);
        sent += (size_t)n;
    }
    c->n_out = 0;
    return 0;
}

/* The next line, without its end. A line that reads "error ..." is the server's last word. */
static int get(struct client *c, char *line, size_t size, struct err *err)
{
    for (size_t n = 0;;) {
        if (c->at == c->n_in) {
            ssize_t got = recv(c->fd, c->in, sizeof c->in, 0);
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0)
                return died(c, err);
            c->at = 0;
            c->n_in = (size_t)got;
        }
        char byte = c->in[c->at++];
        if (byte != '\n') {
            if (n + 1 < size)
                line[n++] = byte;
            continue;
        }
        line[n] = '\0';
        if (strncmp(line, "error ", 6) == 0)
            return err_set(err, ERR_RUN, "the SimGrid process reports: %s", line + 6);
        return 0;
    }
}

static int expect(struct client *c, const char *what, struct err *err)
{
    char line[256];
    int rc = get(c, line, sizeof line, err);
    if (rc == 0 && strcmp(line, what) != 0)
        rc = err_set(err, ERR_IO,
                     "the SimGrid process: found \"%.100s\", expected \"%s\": is " SERVER " of another version?", line,
                     what);
    return rc;
}

/* ---- solver ---- */

/* A flow through its own device's port goes to a host of its own beside the endpoints: a shadow of the device. */
static int32_t shadow(const struct topology *t, int32_t device)
{
    return t->n_devices + 2 * t->n_nodes + device;
}

static int put_route(struct client *c, int32_t src, int32_t dst, const int32_t *link, int hops, struct err *err)
{
    int rc = put(c, err, "%d %d %d", src, dst, hops);
    for (int h = 0; h < hops && rc == 0; h++)
        rc = put(c, err, " %d", link[h]);
    return rc ? rc : put(c, err, "\n");
}

/* The most that a link will ever have. */
static double widest(const struct topology *t, int32_t link)
{
    double most = t->link[link].bandwidth;
    for (int32_t i = 0; i < t->n_changes; i++)
        if (t->change[i].link == link && t->change[i].bandwidth > most)
            most = t->change[i].bandwidth;
    return most;
}

static int put_platform(struct client *c, const struct topology *t, struct err *err)
{
    int32_t n = t->n_devices + 2 * t->n_nodes, link[TOPOLOGY_MAX_HOPS];
    long n_routes = 0;
    int rc = 0;
    for (int32_t src = 0; src < n; src++)
        for (int32_t dst = 0; dst < n; dst++)
            n_routes += topology_route(t, src, dst, 0, link, NULL) > 0;
    for (int32_t d = 0; d < t->n_devices; d++)
        n_routes += topology_loop(t, d, link) > 0;
    rc = put(c, err, "platform %d %d %ld\n", n + t->n_devices, t->n_links, n_routes);
    for (int32_t l = 0; l < t->n_links && rc == 0; l++)
        rc = put(c, err, "%a %a\n", t->link[l].bandwidth, widest(t, l));
    for (int32_t src = 0; src < n && rc == 0; src++) {
        for (int32_t dst = 0; dst < n && rc == 0; dst++) {
            int hops = topology_route(t, src, dst, 0, link, NULL);
            rc = hops > 0 ? put_route(c, src, dst, link, hops, err) : 0;
        }
    }
    for (int32_t d = 0; d < t->n_devices && rc == 0; d++) {
        int hops = topology_loop(t, d, link);
        rc = hops > 0 ? put_route(c, d, shadow(t, d), link, hops, err) : 0;
    }
    return rc;
}

/* Its platform has one route between two endpoints: another path has to be the same. */
static int check_path(const struct topology *t, const struct net_flow *f, struct err *err)
{
    int32_t link[2][TOPOLOGY_MAX_HOPS];
    if (f->loop || f->path == 0)
        return 0;
    int n = topology_route(t, f->src, f->dst, 0, link[0], NULL);
    if (n > 0 && n == topology_route(t, f->src, f->dst, f->path, link[1], NULL) &&
        memcmp(link[0], link[1], (size_t)n * sizeof link[0][0]) == 0)
        return 0;
    return err_set(err, ERR_RUN, "tier simgrid: flow %d -> %d takes path %d, and this tier's platform has one route "
                   "between two endpoints: use tier exact", f->src, f->dst, f->path);
}

/* Tells the server of changes that were made, each at its time. */
static int put_changes(struct net *net, struct client *c, struct err *err)
{
    int rc = 0;
    for (; c->n_told < net->n_changed && rc == 0; c->n_told++) {
        const struct link_change *change = &net->topology->change[c->n_told];
        rc = put(c, err, "bandwidth %a %d %a\n", change->at, change->link, change->bandwidth);
    }
    return rc;
}

static int client_open(struct net *net, struct err *err)
{
    const struct topology *t = net->topology;
    if (t->n_devices > MAX_DEVICES)
        return err_set(err, ERR_INPUT,
                       "tier simgrid: %s has %d devices, expected at most %d: use tier exact, which "
                       "agrees with it",
                       t->name, t->n_devices, MAX_DEVICES);
    struct client *c = net->priv = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_MEMORY, "tier simgrid: out of memory");
    c->fd = -1;
    c->free_flow = -1;
    int rc = spawn_server(c, err);
    if (rc || (rc = expect(c, HELLO, err)) || (rc = put_platform(c, t, err)) || (rc = flush(c, err)))
        return rc;
    return expect(c, "ready", err);
}

static void client_close(struct net *net)
{
    struct client *c = net->priv;
    if (!c)
        return;
    if (c->fd >= 0)
        close(c->fd);
    if (c->pid > 0) { /* it keeps nothing that would have to be saved */
        kill(c->pid, SIGKILL);
        waitpid(c->pid, NULL, 0);
    }
    free(c->out);
    free(c->flow);
    free(c);
    net->priv = NULL;
}

static int take_flow(struct client *c, int64_t *id, struct err *err)
{
    if (c->free_flow >= 0) {
        *id = c->free_flow;
        c->free_flow = c->flow[*id].next_free;
        return 0;
    }
    if (c->n_flows == c->room_flows) {
        int64_t room = 2 * c->room_flows + 256;
        struct flying *flow = realloc(c->flow, (size_t)room * sizeof *flow);
        if (!flow)
            return err_set(err, ERR_MEMORY, "tier simgrid: out of memory");
        c->flow = flow;
        c->room_flows = room;
    }
    *id = c->n_flows++;
    return 0;
}

static int client_start(struct net *net, double now, int32_t slot, const struct net_flow *flow, size_t n,
                        struct err *err)
{
    struct client *c = net->priv;
    int32_t link[TOPOLOGY_MAX_HOPS];
    double latency;
    size_t n_moving = 0;
    for (size_t i = 0; i < n; i++) {
        if (!net_moves(&flow[i]))
            continue;
        if (net_route(net->topology, &flow[i], link, &latency) > 0)
            n_moving++;
        else
            net_arrive(net, slot, net->receiver_of[flow[i].dst], now + latency);
    }
    int rc = put_changes(net, c, err);
    if (rc == 0)
        rc = put(c, err, "start %a %zu\n", now, n_moving);
    for (size_t i = 0; i < n && rc == 0; i++) {
        int64_t id = 0;
        if (!net_moves(&flow[i]) || net_route(net->topology, &flow[i], link, &latency) <= 0)
            continue;
        if ((rc = check_path(net->topology, &flow[i], err)) || (rc = take_flow(c, &id, err)))
            break;
        c->flow[id] = (struct flying){ slot, net->receiver_of[flow[i].dst], flow[i], latency, UNDER_WAY };
        int32_t dst = flow[i].loop ? shadow(net->topology, flow[i].src) : flow[i].dst;
        rc = put(c, err, "%lld %d %d %a\n", (long long)id, flow[i].src, dst, flow[i].bytes);
    }
    return rc; /* sent with the next advance */
}

static int read_end(struct net *net, struct client *c, struct err *err)
{
    char line[128];
    int rc = get(c, line, sizeof line, err);
    if (rc)
        return rc;
    char *at;
    long long id = strtoll(line, &at, 10);
    double time = strtod(at, &at);
    if (*at != '\0' || id < 0 || id >= c->n_flows || c->flow[id].next_free != UNDER_WAY || !isfinite(time))
        return err_set(err, ERR_IO, "the SimGrid process: found \"%.100s\", expected a flow under way and its time",
                       line);
    struct flying *f = &c->flow[id];
    int32_t link[TOPOLOGY_MAX_HOPS];
    int hops = net_route(net->topology, &f->flow, link, NULL);
    for (int h = 0; h < hops; h++)
        net->carrying[link[h]] += f->flow.bytes;
    net_part_end(net, f->slot, f->receiver, time + f->latency);
    f->next_free = c->free_flow;
    c->free_flow = id;
    return 0;
}

/* Whether every flow under way crosses a link that has failed: a link of SimGrid's carries a trickle even then. */
static int check_stuck(struct net *net, struct client *c, struct err *err)
{
    int32_t link[TOPOLOGY_MAX_HOPS], dead = -1;
    const struct flying *waits = NULL;
    for (int64_t i = 0; i < c->n_flows; i++) {
        const struct flying *f = &c->flow[i];
        if (f->next_free != UNDER_WAY)
            continue;
        int hops = net_route(net->topology, &f->flow, link, NULL), h = 0;
        while (h < hops && net->capacity[link[h]] > 0)
            h++;
        if (h == hops)
            return 0;
        if (!waits) {
            waits = f;
            dead = link[h];
        }
    }
    return waits ? net_stuck(net, dead, waits->flow.src, waits->slot, waits->receiver, err) : 0;
}

static int advance_to(struct net *net, struct client *c, double until, bool *any, struct err *err)
{
    char line[128];
    int n_ends = 0, length = 0;
    int rc = put(c, err, "advance %a\n", until);
    if (rc || (rc = flush(c, err)) || (rc = get(c, line, sizeof line, err)))
        return rc;
    if (sscanf(line, "done %d%n", &n_ends, &length) != 1 || line[length] != '\0')
        return err_set(err, ERR_IO, "the SimGrid process: found \"%.100s\", expected \"done N\"", line);
    if (n_ends == 0 && isinf(until))
        return err_set(err, ERR_RUN, "the SimGrid process: %d receivers wait for flows that never end", net->n_waiting);
    *any = n_ends > 0;
    for (int i = 0; i < n_ends && rc == 0; i++)
        rc = read_end(net, c, err);
    return rc;
}

static int client_advance(struct net *net, double until, bool *any, struct err *err)
{
    struct client *c = net->priv;
    for (;;) {
        double change = net_next_change(net);
        int rc = net->n_changed > 0 && change == INFINITY && isinf(until) ? check_stuck(net, c, err) : 0;
        if (rc || (rc = advance_to(net, c, change < until ? change : until, any, err)))
            return rc;
        if (*any || change > until || change == INFINITY)
            return 0;
        while (net_due_change(net, change))
            net_change(net);
        if ((rc = put_changes(net, c, err)))
            return rc;
    }
}

const struct net_ops net_simgrid_ops = { client_open, client_start, client_advance, client_close };
