/* SPDX-License-Identifier: Apache-2.0
 * topology_faults.c - stragglers, and links and devices that degrade or fail at a given time. */
#include "config.h"

#include "topology_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- links by name ---- */

/* Whether `name` is one or more whole words of a link's name: gpu3.nvlink, leaf0 or spine1 in "leaf0.spine1.out". */
static bool names_link(const char *name, const char *link)
{
    const size_t n = strlen(name);
    for (const char *at = link; (at = strstr(at, name)); at++)
        if ((at == link || at[-1] == '.') && (at[n] == '\0' || at[n] == '.'))
            return true;
    return false;
}

static int unknown_link(const struct topology *t, const char *name, const char *path, const char *file, struct err *err)
{
    const char **known = malloc(sizeof *known * ((size_t)t->n_links + 1));
    if (!known)
        return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    for (int32_t l = 0; l < t->n_links; l++)
        known[l] = t->link[l].name;
    const char *near = err_nearest(name, known, t->n_links);
    free(known);
    return err_set(err, ERR_INPUT, "%s: %slink: %s has no link \"%s\"%s%s%s", file, path, t->name, name,
                   near ? "; did you mean \"" : "", near ? near : " (see: moelab machine show)", near ? "\"?" : "");
}

/* ---- reading ---- */

static int add_change(struct topology *t, double at, int32_t link, double factor)
{
    if ((t->n_changes & (t->n_changes - 1)) == 0) {
        struct link_change *grown = realloc(t->change, sizeof *grown * (t->n_changes ? 2 * (size_t)t->n_changes : 1));
        if (!grown)
            return -1;
        t->change = grown;
    }
    t->change[t->n_changes++] = (struct link_change){ at, link, t->link[link].bandwidth * factor };
    return 0;
}

static int add_slow(struct topology *t, double at, int32_t device, double factor)
{
    struct slow_change *grown = realloc(t->slow, sizeof *grown * ((size_t)t->n_slow + 1));
    if (!grown)
        return -1;
    t->slow = grown;
    t->slow[t->n_slow++] = (struct slow_change){ at, device, factor };
    return 0;
}

static int check_device(const struct topology *t, int32_t device, const char *path, const char *file, struct err *err)
{
    if (device < t->n_devices)
        return 0;
    return err_set(err, ERR_INPUT, "%s: %sdevice: found %d, expected 0 to %d", file, path, device, t->n_devices - 1);
}

static int read_link(struct topology *t, const json_t *fault, const char *path, const char *file, struct err *err)
{
    const char *name = json_string_value(json_object_get(fault, "link"));
    const double at = topology_number(fault, "at"), factor = topology_number(fault, "factor");
    bool known = false;
    for (int32_t l = 0; l < t->n_links; l++) {
        const bool all = names_link(name, t->link[l].name);
        const int32_t n_strands = topology_strands(t, l);
        int rc = all && n_strands == 0 ? add_change(t, at, l, factor) : 0;
        known |= all;
        for (int32_t k = 0; k < n_strands && rc == 0; k++) {
            char strand[64];
            topology_strand_name(t, l, k, strand, sizeof strand);
            if (!all && !names_link(name, strand))
                continue;
            known = true;
            rc = topology_strand_change(t, at, l, k, factor);
        }
        if (rc)
            return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    }
    return known ? 0 : unknown_link(t, name, path, file, err);
}

static int read_device(struct topology *t, const json_t *fault, const char *path, const char *file, struct err *err)
{
    const int32_t device = topology_whole(fault, "device");
    const double at = topology_number(fault, "at");
    char name[32];
    if (json_object_get(fault, "factor"))
        return err_set(err, ERR_INPUT,
                       "%s: %sfactor: a device in faults has failed; one that is slower belongs in slow", file, path);
    if (t->platform)
        return err_set(err, ERR_INPUT, "%s: %sdevice: a platform does not say which links are a device's: name them",
                       file, path);
    if (check_device(t, device, path, file, err))
        return err->code;
    snprintf(name, sizeof name, "gpu%d", device);
    int rc = add_slow(t, at, device, INFINITY);
    for (int32_t l = 0; l < t->n_links && rc == 0; l++)
        if (names_link(name, t->link[l].name))
            rc = add_change(t, at, l, 0);
    return rc ? err_set(err, ERR_MEMORY, "%s: out of memory", file) : 0;
}

/* At one time a link keeps the least of what is said of it. */
static int by_time(const void *a, const void *b)
{
    const struct link_change *x = a, *y = b;
    if (x->at != y->at)
        return x->at < y->at ? -1 : 1;
    if (x->link != y->link)
        return x->link < y->link ? -1 : 1;
    return (x->bandwidth < y->bandwidth) - (x->bandwidth > y->bandwidth);
}

static int by_device(const void *a, const void *b)
{
    const struct slow_change *x = a, *y = b;
    if (x->device != y->device)
        return x->device < y->device ? -1 : 1;
    if (x->at != y->at)
        return x->at < y->at ? -1 : 1;
    return (x->factor > y->factor) - (x->factor < y->factor);
}

int topology_faults(struct topology *t, const struct parts *p, const char *file, struct err *err)
{
    char path[40];
    for (size_t i = 0; i < json_array_size(p->slow); i++) {
        const json_t *slow = json_array_get(p->slow, i);
        const int32_t device = topology_whole(slow, "device");
        snprintf(path, sizeof path, "slow[%zu].", i + 1);
        if (check_device(t, device, path, file, err))
            return err->code;
        if (add_slow(t, topology_number(slow, "at"), device, topology_number(slow, "factor")))
            return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    }
    for (size_t i = 0; i < json_array_size(p->faults); i++) {
        const json_t *fault = json_array_get(p->faults, i);
        const bool link = json_object_get(fault, "link"), device = json_object_get(fault, "device");
        snprintf(path, sizeof path, "faults[%zu].", i + 1);
        if (link == device)
            return err_set(err, ERR_INPUT, "%s: faults[%zu]: names %s, expected a link or a device", file, i + 1,
                           link ? "both" : "neither");
        if (link ? read_link(t, fault, path, file, err) : read_device(t, fault, path, file, err))
            return err->code;
    }
    if (topology_strand_sums(t, add_change))
        return err_set(err, ERR_MEMORY, "%s: out of memory", file);
    if (t->n_changes > 0)
        qsort(t->change, (size_t)t->n_changes, sizeof *t->change, by_time);
    if (t->n_slow > 0)
        qsort(t->slow, (size_t)t->n_slow, sizeof *t->slow, by_device);
    return 0;
}

/* ---- in time ---- */

double topology_compute_end(const struct topology *t, int32_t device, double now, double seconds)
{
    double factor = 1;
    for (int32_t i = 0; i < t->n_slow; i++) {
        const struct slow_change *c = &t->slow[i];
        if (c->device != device)
            continue;
        if (c->at > now) { /* as far as it comes before this */
            const double end = now + seconds * factor;
            if (end <= c->at)
                return end;
            seconds -= (c->at - now) / factor;
            now = c->at;
        }
        factor = isinf(factor) ? factor : c->factor; /* what has failed stays so */
    }
    return isinf(factor) ? INFINITY : now + seconds * factor;
}

double topology_work(const struct topology *t, int32_t device, double from, double to)
{
    double factor = 1, done = 0;
    for (int32_t i = 0; i < t->n_slow; i++) {
        const struct slow_change *c = &t->slow[i];
        if (c->device != device || c->at >= to)
            continue;
        if (c->at > from) {
            done += (c->at - from) / factor;
            from = c->at;
        }
        factor = isinf(factor) ? factor : c->factor;
    }
    return done + (to - from) / factor;
}

bool topology_device_failed(const struct topology *t, int32_t device, double *at)
{
    for (int32_t i = 0; i < t->n_slow; i++)
        if (t->slow[i].device == device && isinf(t->slow[i].factor)) {
            *at = t->slow[i].at;
            return true;
        }
    return false;
}
