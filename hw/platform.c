/* SPDX-License-Identifier: Apache-2.0
 * platform.c - machines with explicit links and routes: description.platform checked, and kept.
 *
 *   platform = {
 *     hosts  = { "a", "b", ... },                                    device d is on hosts[d + 1], as Lua counts
 *     links  = { { name = "up", bandwidth = "50 GB/s", latency = "1 us" }, ... },
 *     routes = { { "a", "b", "up", ... }, ... },                     from, to, and the links between, in order
 *     source = "...",
 *   }
 *
 * A link has no direction of its own: routes that name it share it. Every pair of hosts has one route each way. */
#include "config.h"

#include "platform.h"
#include "units.h"

#include <assert.h>
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct platform {
    int32_t n;      /* hosts */
    int32_t *first; /* [n * n + 1] where the route from src to dst begins, at src * n + dst */
    int32_t *link;
};

/* While one is built. */
struct reader {
    struct topology *t;
    const char *file;
    struct err *err;
    json_t *host_id, *link_id; /* name -> id */
    int32_t *route_of;         /* [n * n] index into `routes` of who goes there; -1: nobody yet */
    const json_t *hosts, *links, *routes;
};

/* ---- what the description has to have ---- */

static const char *found(const json_t *v, char text[64])
{
    if (json_is_string(v))
        snprintf(text, 64, "\"%.40s\"", json_string_value(v));
    else if (json_is_number(v))
        snprintf(text, 64, "%.15g", json_number_value(v));
    else
        snprintf(text, 64, "%s",
                 json_is_object(v)    ? "a table"
                 : json_is_array(v)   ? "a list"
                 : json_is_boolean(v) ? "a boolean"
                                      : "nothing");
    return text;
}

static int check_keys(const json_t *table, const char *const *known, int n, const char *path, const char *file,
                      struct err *err)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)table, key, value) {
        int i = 0;
        while (i < n && strcmp(known[i], key) != 0)
            i++;
        if (i < n)
            continue;
        const char *near = err_nearest(key, known, n);
        return err_set(err, ERR_INPUT, "%s: %s%s: unknown key%s%s%s", file, path, key,
                       near ? ", did you mean \"" : "", near ? near : "", near ? "\"?" : "");
    }
    return 0;
}

/* nodes x devices = hosts; what is not given follows, one device per node if neither is. */
static int check_shape(json_t *top, size_t n_hosts, const char *file, struct err *err)
{
    static const char *const key[] = { "nodes", "devices" };
    double shape[2] = { 0, 0 };
    for (int i = 0; i < 2; i++) {
        const json_t *v = json_object_get(top, key[i]);
        shape[i] = json_number_value(v);
        if (v && !(shape[i] >= 1 && shape[i] == floor(shape[i])))
            return 0; /* topology_format refuses it */
    }
    if (shape[0] == 0)
        shape[0] = floor((double)n_hosts / fmax(shape[1], 1));
    if (shape[1] == 0)
        shape[1] = floor((double)n_hosts / shape[0]);
    if (shape[0] * shape[1] != (double)n_hosts)
        return err_set(err, ERR_INPUT, "%s: nodes x devices: found %g x %g, expected the %zu hosts of platform.hosts",
                       file, shape[0], shape[1], n_hosts);
    for (int i = 0; i < 2; i++)
        if (json_object_set_new(top, key[i], json_integer((json_int_t)shape[i])))
            return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    return 0;
}

int platform_check(json_t *top, const char *file, struct err *err)
{
    static const char *const others[] = { "nvlink", "pcie", "host", "ssd", "nic", "network", "groups" };
    static const char *const known[] = { "hosts", "links", "routes", "source", "assumed" };
    const json_t *platform = json_object_get(top, "platform");
    char text[64];
    if (!json_is_object(platform))
        return err_set(err, ERR_INPUT, "%s: platform: found %s, expected a table", file, found(platform, text));
    if (check_keys(platform, known, 5, "platform.", file, err))
        return err->code;
    for (int i = 0; i < 3; i++) {
        const json_t *v = json_object_get(platform, known[i]);
        /* An empty table of Lua's is no list; one host needs neither links nor routes. */
        if (!json_is_array(v) && !(json_is_object(v) && json_object_size(v) == 0 && i > 0))
            return err_set(err, ERR_INPUT, "%s: platform.%s: found %s, expected a list", file, known[i],
                           found(v, text));
    }
    if (!json_string_length(json_object_get(platform, "source")))
        return err_set(err, ERR_INPUT, "%s: platform.source: missing: every figure says where it comes from", file);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (json_object_get(top, others[i]))
            return err_set(err, ERR_INPUT, "%s: %s: platform has all links there are, expected no others", file,
                           others[i]);
    const size_t n = json_array_size(json_object_get(platform, "hosts"));
    if (n < 1 || n > PLATFORM_MAX_HOSTS)
        return err_set(err, ERR_INPUT, "%s: platform.hosts: found %zu, expected 1 to %d: a route is kept for every "
                       "pair", file, n, PLATFORM_MAX_HOSTS);
    return check_shape(top, n, file, err);
}

/* ---- hosts and links ---- */

static int no_memory(struct reader *r)
{
    return err_set(r->err, ERR_MEMORY, "%s: out of memory", r->file);
}

/* Notes that `name`, the i-th of its list, has that id. */
static int add_name(struct reader *r, json_t *ids, const char *list, size_t i, const json_t *name)
{
    char text[64];
    const char *word = json_string_value(name);
    const size_t room = sizeof r->t->link->name;
    size_t n = 0; /* until the first that moves the cursor of who reads it */
    while (word && word[n] && !iscntrl((unsigned char)word[n]))
        n++;
    if (n == 0 || n >= room || word[n])
        return err_set(r->err, ERR_INPUT, "%s: platform.%s[%zu]: found %s, expected a name of at most %zu characters, "
                       "none of them control characters", r->file, list, i + 1, found(name, text), room - 1);
    if (json_object_get(ids, word))
        return err_set(r->err, ERR_INPUT, "%s: platform.%s[%zu]: \"%s\" is there twice", r->file, list, i + 1, word);
    return json_object_set_new(ids, word, json_integer((json_int_t)i)) ? no_memory(r) : 0;
}

static int read_quantity(struct reader *r, const json_t *link, size_t i, const char *key, enum unit unit, double *value)
{
    const json_t *v = json_object_get(link, key);
    const bool bandwidth = unit == UNIT_BANDWIDTH;
    char why[200], text[64];
    if (json_is_string(v) && units_parse(unit, json_string_value(v), value, why, sizeof why)) {
        if (bandwidth ? *value > 0 && *value <= 1e18 : *value >= 0 && *value <= 1e6)
            return 0;
        snprintf(why, sizeof why, "expected %s", bandwidth ? "more than 0 B/s, and at most 1e6 TB/s" : "0 s to 1e6 s");
    } else if (json_is_number(v)) {
        units_refuse_number(unit, json_number_value(v), bandwidth ? 1e6 : 0, bandwidth ? 1e18 : 1, why, sizeof why);
    } else if (!json_is_string(v)) {
        snprintf(why, sizeof why, "expected %s", units_expected(unit));
    }
    return err_set(r->err, ERR_INPUT, "%s: platform.links[%zu], link \"%s\": %s: found %s: %s", r->file, i + 1,
                   r->t->link[i].name, key, found(v, text), why);
}

static int read_links(struct reader *r)
{
    static const char *const known[] = { "name", "bandwidth", "latency" };
    struct topology *t = r->t;
    t->n_links = (int32_t)json_array_size(r->links);
    if (!(t->link = calloc((size_t)t->n_links + 1, sizeof *t->link)))
        return no_memory(r);
    for (size_t i = 0; i < (size_t)t->n_links; i++) {
        const json_t *link = json_array_get(r->links, i), *name = json_object_get(link, "name");
        char path[64], text[64];
        snprintf(path, sizeof path, "platform.links[%zu].", i + 1);
        if (!json_is_object(link))
            return err_set(r->err, ERR_INPUT, "%s: platform.links[%zu]: found %s, expected a table", r->file, i + 1,
                           found(link, text));
        if (check_keys(link, known, 3, path, r->file, r->err) || add_name(r, r->link_id, "links", i, name))
            return r->err->code;
        snprintf(t->link[i].name, sizeof t->link[i].name, "%s", json_string_value(name));
        if (read_quantity(r, link, i, "bandwidth", UNIT_BANDWIDTH, &t->link[i].bandwidth) ||
            read_quantity(r, link, i, "latency", UNIT_SECONDS, &t->link[i].latency))
            return r->err->code;
    }
    return 0;
}

/* ---- routes ---- */

/* The id of what the i-th route names at k; -1: an error. */
static int32_t id_of(struct reader *r, size_t i, const json_t *name, const json_t *ids, const char *what)
{
    const char *word = json_string_value(name), *known[PLATFORM_MAX_HOSTS], *key, *near;
    const json_t *id = word ? json_object_get(ids, word) : NULL;
    char text[64];
    int n = 0;
    json_t *value;
    if (id)
        return (int32_t)json_integer_value(id);
    json_object_foreach((json_t *)(uintptr_t)ids, key, value)
        if (n < PLATFORM_MAX_HOSTS)
            known[n++] = key;
    near = word ? err_nearest(word, known, n) : NULL;
    err_set(r->err, ERR_INPUT, "%s: platform.routes[%zu]: found %s, expected the name of a %s%s%s%s", r->file, i + 1,
            found(name, text), what, near ? "; did you mean \"" : "", near ? near : "", near ? "\"?" : "");
    return -1;
}

/* Who goes where, and how many links in all. */
static int read_ends(struct reader *r, size_t *n_hops)
{
    const size_t n = json_array_size(r->hosts);
    *n_hops = 0;
    for (size_t i = 0; i < json_array_size(r->routes); i++) {
        const json_t *route = json_array_get(r->routes, i);
        const size_t length = json_array_size(route);
        char text[64];
        if (length < 3)
            return err_set(r->err, ERR_INPUT,
                           "%s: platform.routes[%zu]: found %s, expected a list: two hosts, and the links between",
                           r->file, i + 1, json_is_array(route) ? "a short one" : found(route, text));
        const int32_t src = id_of(r, i, json_array_get(route, 0), r->host_id, "host");
        const int32_t dst = src < 0 ? -1 : id_of(r, i, json_array_get(route, 1), r->host_id, "host");
        if (dst < 0)
            return r->err->code;
        const char *from = json_string_value(json_array_get(route, 0));
        const char *to = json_string_value(json_array_get(route, 1));
        if (src == dst)
            return err_set(r->err, ERR_INPUT, "%s: platform.routes[%zu]: from host \"%s\" to itself, which crosses "
                           "nothing", r->file, i + 1, from);
        if (length - 2 > TOPOLOGY_MAX_HOPS)
            return err_set(r->err, ERR_INPUT, "%s: platform.routes[%zu], \"%s\" to \"%s\": found %zu links, expected "
                           "at most %d", r->file, i + 1, from, to, length - 2, TOPOLOGY_MAX_HOPS);
        int32_t *there = &r->route_of[(size_t)src * n + (size_t)dst];
        if (*there >= 0)
            return err_set(r->err, ERR_INPUT, "%s: platform.routes[%zu]: \"%s\" to \"%s\" is there already, as "
                           "routes[%d]", r->file, i + 1, from, to, *there + 1);
        *there = (int32_t)i;
        *n_hops += length - 2;
    }
    return 0;
}

/* The links of the i-th route, behind those kept before. */
static int read_route(struct reader *r, size_t i, int32_t *link, int32_t *n)
{
    const json_t *route = json_array_get(r->routes, i);
    for (size_t h = 2; h < json_array_size(route); h++) {
        const int32_t id = id_of(r, i, json_array_get(route, h), r->link_id, "link");
        if (id < 0)
            return r->err->code;
        for (int32_t k = 0; k < *n; k++)
            if (link[k] == id)
                return err_set(r->err, ERR_INPUT, "%s: platform.routes[%zu], \"%s\" to \"%s\": a cycle: link \"%s\" is "
                               "crossed twice", r->file, i + 1, json_string_value(json_array_get(route, 0)),
                               json_string_value(json_array_get(route, 1)), r->t->link[id].name);
        link[(*n)++] = id;
    }
    return 0;
}

static int read_routes(struct reader *r)
{
    const size_t n = json_array_size(r->hosts);
    struct platform *p = r->t->platform;
    size_t n_hops;
    if (read_ends(r, &n_hops))
        return r->err->code;
    p->n = (int32_t)n;
    p->first = calloc(n * n + 1, sizeof *p->first);
    p->link = calloc(n_hops + 1, sizeof *p->link);
    if (!p->first || !p->link)
        return no_memory(r);
    for (size_t pair = 0; pair < n * n; pair++) {
        int32_t length = 0;
        if (pair / n != pair % n && r->route_of[pair] < 0)
            return err_set(r->err, ERR_INPUT, "%s: platform.routes: no route from host \"%s\" to host \"%s\"", r->file,
                           json_string_value(json_array_get(r->hosts, pair / n)),
                           json_string_value(json_array_get(r->hosts, pair % n)));
        if (r->route_of[pair] >= 0 &&
            read_route(r, (size_t)r->route_of[pair], p->link + p->first[pair], &length))
            return r->err->code;
        p->first[pair + 1] = p->first[pair] + length;
    }
    return 0;
}

int platform_build(struct topology *t, const char *file, struct err *err)
{
    const json_t *platform = json_object_get(t->description, "platform");
    struct reader r = { .t = t, .file = file, .err = err, .hosts = json_object_get(platform, "hosts"),
                        .links = json_object_get(platform, "links"), .routes = json_object_get(platform, "routes") };
    const size_t n = json_array_size(r.hosts);
    r.host_id = json_object();
    r.link_id = json_object();
    r.route_of = malloc(n * n * sizeof *r.route_of);
    t->platform = calloc(1, sizeof *t->platform);
    int rc = r.host_id && r.link_id && r.route_of && t->platform ? 0 : no_memory(&r);
    for (size_t i = 0; rc == 0 && i < n * n; i++)
        r.route_of[i] = -1;
    for (size_t i = 0; rc == 0 && i < n; i++)
        rc = add_name(&r, r.host_id, "hosts", i, json_array_get(r.hosts, i));
    if (rc == 0 && (rc = read_links(&r)) == 0)
        rc = read_routes(&r);
    json_decref(r.host_id);
    json_decref(r.link_id);
    free(r.route_of);
    return rc;
}

void platform_free(struct platform *p)
{
    if (!p)
        return;
    free(p->first);
    free(p->link);
    free(p);
}

int platform_route(const struct topology *t, int32_t src, int32_t dst, int32_t *link, double *latency)
{
    const struct platform *p = t->platform;
    if (latency)
        *latency = 0;
    if (src == dst)
        return 0;
    if (src >= p->n || dst >= p->n) /* hosts' memory and SSDs: a platform does not say */
        return -1;
    const int32_t at = p->first[src * p->n + dst], n = p->first[src * p->n + dst + 1] - at;
    assert(n > 0 && n <= TOPOLOGY_MAX_HOPS);
    for (int32_t h = 0; h < n; h++) {
        link[h] = p->link[at + h];
        if (latency)
            *latency += t->link[link[h]].latency;
    }
    return n;
}
