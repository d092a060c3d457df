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
/* Hosts that stand in for devices on paths of their own; SimGrid keeps a table of all pairs of hosts. */
#define MAX_STAND_INS 4096

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
    int32_t n_told;  /* changes of links that the server knows of */
    int32_t n_paths; /* stand-ins of each device; 0: there is one path everywhere */
};

/* ---- the process ---- */

static int spawn_server(struct client *c, struct err *err)
{
    char path[4200];
    int rc = net_simgrid_find(path, sizeof path, err), ends[2];
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
    return net_endpoints(t) + device;
}

/* SimGrid has one route between two hosts. Where there are several paths, what takes the p-th (from 0) starts at a host
 * that stands in for the device, whose routes are all p-th paths. */
static int32_t stand_in(const struct topology *t, int32_t device, int32_t p)
{
    return net_endpoints(t) + (1 + p) * t->n_devices + device;
}

/* The host that a flow starts at, and the one that it goes to. */
static void hosts_of(const struct topology *t, const struct net_flow *f, int32_t *src, int32_t *dst)
{
    const int32_t n_paths = f->path > 0 && !f->loop ? topology_paths(t, f->src, f->dst) : 1;
    *src = n_paths > 1 ? stand_in(t, f->src, (f->path - 1) % n_paths) : f->src;
    *dst = f->loop ? shadow(t, f->src) : f->dst;
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

/* The routes between devices that have several, each path from a stand-in; without a client: how many. */
static long put_paths(struct client *c, const struct topology *t, struct err *err)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    long n_routes = 0;
    for (int32_t src = 0; src < t->n_devices; src++)
        for (int32_t dst = 0; dst < t->n_devices; dst++) {
            const int32_t n_paths = src == dst ? 1 : topology_paths(t, src, dst);
            for (int32_t p = 0; p < n_paths && n_paths > 1; p++, n_routes++)
                if (c && put_route(c, stand_in(t, src, p), dst, link, topology_route(t, src, dst, p + 1, link, NULL),
                                   err) < 0)
                    return -1;
        }
    return n_routes;
}

static int32_t most_paths(const struct topology *t)
{
    int32_t most = 1;
    for (int32_t src = 0; src < t->n_devices; src++)
        for (int32_t dst = 0; dst < t->n_devices; dst++) {
            const int32_t n = src == dst ? 1 : topology_paths(t, src, dst);
            most = n > most ? n : most;
        }
    return most > 1 ? most : 0;
}

static int put_platform(struct client *c, const struct topology *t, struct err *err)
{
    int32_t n = net_endpoints(t), link[TOPOLOGY_MAX_HOPS];
    long n_routes = put_paths(NULL, t, err);
    int rc = 0;
    for (int32_t src = 0; src < n; src++)
        for (int32_t dst = 0; dst < n; dst++)
            n_routes += topology_route(t, src, dst, 0, link, NULL) > 0;
    for (int32_t d = 0; d < t->n_devices; d++)
        n_routes += topology_loop(t, d, link) > 0;
    rc = put(c, err, "platform %d %d %ld\n", n + (1 + c->n_paths) * t->n_devices, t->n_links, n_routes);
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
    return rc == 0 && put_paths(c, t, err) < 0 ? err->code : rc;
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
    const int32_t n_paths = most_paths(t);
    if (n_paths * t->n_devices > MAX_STAND_INS)
        return err_set(err, ERR_INPUT, "tier simgrid: %s has %d devices with up to %d paths between two, expected at "
                       "most %d together: use tier exact, which agrees with it", t->name, t->n_devices, n_paths,
                       MAX_STAND_INS);
    struct client *c = net->priv = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_MEMORY, "tier simgrid: out of memory");
    c->n_paths = n_paths;
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
        if ((rc = take_flow(c, &id, err)))
            break;
        c->flow[id] = (struct flying){ slot, net->receiver_of[flow[i].dst], flow[i], latency, UNDER_WAY };
        int32_t src, dst;
        hosts_of(net->topology, &flow[i], &src, &dst);
        rc = put(c, err, "%lld %d %d %a\n", (long long)id, src, dst, flow[i].bytes);
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
