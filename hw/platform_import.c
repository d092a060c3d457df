/* SPDX-License-Identifier: Apache-2.0
 * platform_import.c - a platform in SimGrid's XML as a machine description with explicit links and routes.
 *
 * SimGrid itself reads the file, in the process that its network tier uses (simgrid_platform.cpp describes what that
 * one writes): its zones, clusters and ways to find routes are its own. When it does not like a file it throws, aborts
 * or crashes; what it said on the way, or how far it came, becomes the message. */
#include "config.h"

#include "net.h"
#include "platform.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define HELLO "moelab-simgrid platform 1"

extern char **environ;

struct import {
    const char *file;
    json_t *hosts, *links, *routes;
    FILE *answer, *complaint; /* the process's standard output and standard error */
    char *line;
    size_t room;
    int status;
    int32_t src, dst; /* the pair whose route was asked for last; -1: none yet */
    bool complete;
    struct err *err;
};

bool platform_is_xml(const char *name)
{
    const size_t n = strlen(name);
    return n > 4 && !strcmp(name + n - 4, ".xml");
}

/* ---- the process ---- */

static int ask_simgrid(struct import *p)
{
    char path[4200], tried[700], most[16];
    if (!net_simgrid_server(path, sizeof path, tried, sizeof tried))
        return err_set(p->err, ERR_INPUT,
                       "%s: SimGrid reads platforms, and there is no moelab-simgrid (looked for %s): install "
                       "libsimgrid-dev and build without --without-simgrid, or set MOELAB_LIBEXEC",
                       p->file, tried);
    if (access(p->file, R_OK) != 0)
        return err_set(p->err, ERR_INPUT, "%s: %s", p->file, strerror(errno));
    if (!(p->answer = tmpfile()) || !(p->complaint = tmpfile()))
        return err_set(p->err, ERR_IO, "%s: no file for what SimGrid answers: %s", p->file, strerror(errno));
    snprintf(most, sizeof most, "%d", PLATFORM_MAX_HOSTS);

    char *const argv[] = { path, (char *)(uintptr_t)"--platform", (char *)(uintptr_t)p->file, most, NULL };
    posix_spawn_file_actions_t actions;
    pid_t pid = 0;
    int rc = posix_spawn_file_actions_init(&actions);
    if (rc == 0) {
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_adddup2(&actions, fileno(p->answer), STDOUT_FILENO);
        posix_spawn_file_actions_adddup2(&actions, fileno(p->complaint), STDERR_FILENO);
        rc = posix_spawn(&pid, path, &actions, NULL, argv, environ);
        posix_spawn_file_actions_destroy(&actions);
    }
    if (rc)
        return err_set(p->err, ERR_IO, "%s: %s: %s", p->file, path, strerror(rc));
    while (waitpid(pid, &p->status, 0) < 0)
        if (errno != EINTR)
            return err_set(p->err, ERR_IO, "%s: waitpid: %s", p->file, strerror(errno));
    rewind(p->answer);
    rewind(p->complaint);
    return 0;
}

/* The next line without its end, or NULL. */
static char *next_line(struct import *p, FILE *from)
{
    const ssize_t n = getline(&p->line, &p->room, from);
    if (n < 0)
        return NULL;
    if (n > 0 && p->line[n - 1] == '\n')
        p->line[n - 1] = '\0';
    return p->line;
}

/* What was said before the process ended: the last line on standard error that is no backtrace. */
static void last_words(struct import *p, char *text, size_t room)
{
    *text = '\0';
    for (const char *line; (line = next_line(p, p->complaint)) && strncmp(line, "Backtrace", 9) != 0;)
        if (*line)
            snprintf(text, room, "%.300s", line);
    if (!*text && WIFSIGNALED(p->status))
        snprintf(text, room, "%s", strsignal(WTERMSIG(p->status)));
    else if (!*text)
        snprintf(text, room, "exit code %d", WEXITSTATUS(p->status));
}

static const char *host_name(const struct import *p, int32_t id)
{
    return json_string_value(json_array_get(p->hosts, (size_t)id));
}

static int no_route(struct import *p, const char *words)
{
    return err_set(p->err, ERR_INPUT, "%s: no route from host \"%.60s\" to host \"%.60s\"%s%s%s", p->file,
                   host_name(p, p->src), host_name(p, p->dst), *words ? " (SimGrid: " : "", words, *words ? ")" : "");
}

/* ---- its answer ---- */

static int no_memory(struct import *p)
{
    return err_set(p->err, ERR_MEMORY, "%s: out of memory", p->file);
}

static int not_understood(struct import *p)
{
    return err_set(p->err, ERR_IO, "%s: moelab-simgrid answers \"%.60s\": is it of another version?", p->file, p->line);
}

/* Quantities as a machine file has them, exactly: the shortest digits that are read as the same number. */
static json_t *quantity(double value, const char *unit)
{
    char text[64];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value)
            break;
    }
    return json_sprintf("%s %s", text, unit);
}

static int read_link(struct import *p, const char *at)
{
    char *second, *end;
    const double bandwidth = strtod(at, &second), latency = strtod(second, &end);
    if (second == at || end == second || *end != ' ')
        return not_understood(p);
    json_t *link = json_pack("{s:s, s:o, s:o}", "name", end + 1, "bandwidth", quantity(bandwidth, "B/s"), "latency",
                             quantity(latency, "s"));
    if (!link) /* json_pack also refuses what is no UTF-8 */
        return err_set(p->err, ERR_INPUT, "%s: a link's name is no UTF-8, or out of memory", p->file);
    return json_array_append_new(p->links, link) ? no_memory(p) : 0;
}

static int read_route(struct import *p, const char *at)
{
    char *end;
    const long n = strtol(at, &end, 10);
    if (p->dst < 0)
        return not_understood(p);
    if (n == 0)
        return no_route(p, "");
    if (n > TOPOLOGY_MAX_HOPS)
        return err_set(p->err, ERR_INPUT, "%s: host \"%.60s\" to \"%.60s\": found a route of %ld links, expected at "
                       "most %d", p->file, host_name(p, p->src), host_name(p, p->dst), n, TOPOLOGY_MAX_HOPS);
    json_t *route = json_array();
    int bad = !route || json_array_append(route, json_array_get(p->hosts, (size_t)p->src)) ||
              json_array_append(route, json_array_get(p->hosts, (size_t)p->dst));
    for (long i = 0; i < n && !bad; i++) {
        const long id = strtol(end, &end, 10);
        bad = id < 0 ||
              json_array_append(route, json_object_get(json_array_get(p->links, (size_t)id), "name"));
    }
    if (bad || json_array_append_new(p->routes, route)) {
        if (bad)
            json_decref(route);
        return not_understood(p);
    }
    p->dst = -1;
    return 0;
}

static int read_pair(struct import *p, const char *at)
{
    char *end;
    const long src = strtol(at, &end, 10), dst = strtol(end, &end, 10), n = (long)json_array_size(p->hosts);
    if (*end || src < 0 || src >= n || dst < 0 || dst >= n)
        return not_understood(p);
    p->src = (int32_t)src;
    p->dst = (int32_t)dst;
    return 0;
}

static int read_line(struct import *p, char *line)
{
    static const char parse[] = "Parse error at ";
    const size_t n = strcspn(line, " ");
    const char *rest = line + n + (line[n] == ' ');
    if (n == 4 && !memcmp(line, "link", n))
        return read_link(p, rest);
    if (n == 5 && !memcmp(line, "route", n))
        return read_route(p, rest);
    if (n == 4 && !memcmp(line, "pair", n))
        return read_pair(p, rest);
    if (n == 4 && !memcmp(line, "host", n))
        return json_array_append_new(p->hosts, json_string(rest))
                   ? err_set(p->err, ERR_INPUT, "%s: a host's name is no UTF-8, or out of memory", p->file)
                   : 0;
    if (n == 3 && !memcmp(line, "end", n)) {
        p->complete = true;
        return 0;
    }
    if (n != 5 || memcmp(line, "error", n) != 0)
        return not_understood(p);
    if (!strncmp(rest, parse, strlen(parse))) /* names the file itself, and the line */
        return err_set(p->err, ERR_INPUT, "%.700s", rest + strlen(parse));
    return err_set(p->err, ERR_INPUT, "%s: %.500s", p->file, rest);
}

static int read_answer(struct import *p)
{
    char *line = next_line(p, p->answer), words[400];
    int rc = 0;
    if (line && strcmp(line, HELLO) != 0)
        return not_understood(p);
    while (rc == 0 && !p->complete && (line = next_line(p, p->answer)))
        rc = read_line(p, line);
    if (rc || p->complete)
        return rc;
    last_words(p, words, sizeof words);
    return p->dst >= 0 ? no_route(p, words) : err_set(p->err, ERR_INPUT, "%s: SimGrid: %s", p->file, words);
}

/* ---- the description ---- */

static json_t *describe(struct import *p)
{
    const char *slash = strrchr(p->file, '/'), *base = slash ? slash + 1 : p->file;
    const size_t n = strlen(base) - strlen(".xml");
    char name[64], summary[120];
    snprintf(name, sizeof name, "%.*s", (int)n, base);
    snprintf(summary, sizeof summary, "SimGrid platform: %zu hosts, %zu links", json_array_size(p->hosts),
             json_array_size(p->links));
    return json_pack("{s:s, s:s, s:{s:O, s:O, s:O, s:s}}", "name", *name ? name : "platform", "summary", summary,
                     "platform", "hosts", p->hosts, "links", p->links, "routes", p->routes, "source",
                     "imported from SimGrid's XML");
}

int platform_import(const char *file, json_t **description, struct err *err)
{
    struct import p = { .file = file, .src = -1, .dst = -1, .err = err };
    p.hosts = json_array();
    p.links = json_array();
    p.routes = json_array();
    int rc = p.hosts && p.links && p.routes ? ask_simgrid(&p) : no_memory(&p);
    if (rc == 0 && (rc = read_answer(&p)) == 0 && !(*description = describe(&p)))
        rc = err_set(err, ERR_INPUT, "%s: its name is no UTF-8, or out of memory", file);
    if (p.answer)
        fclose(p.answer);
    if (p.complaint)
        fclose(p.complaint);
    free(p.line);
    json_decref(p.hosts);
    json_decref(p.links);
    json_decref(p.routes);
    return rc;
}
