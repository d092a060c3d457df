/* SPDX-License-Identifier: Apache-2.0
 * memory.c - see memory.h. */
#include "config.h"

#include "memory.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* The figure behind "key" in a file of lines "key figure" or "key: figure kB"; -1: there is none. */
static double figure(const char *path, const char *key)
{
    char line[512], unit[8];
    double value = -1;
    FILE *f = fopen(path, "r");
    const size_t n = strlen(key);
    while (f && value < 0 && fgets(line, sizeof line, f)) {
        double x;
        if (strncmp(line, key, n) || (line[n] != ':' && line[n] != ' '))
            continue;
        int found = sscanf(line + n + 1, "%lf %7s", &x, unit);
        if (found >= 1)
            value = found == 2 && !strcmp(unit, "kB") ? x * 1024 : x;
    }
    if (f)
        fclose(f);
    return value;
}

/* A file that is one number; -1: it is not ("max"). */
static double number(const char *path)
{
    double x = -1;
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%lf", &x) != 1)
        x = -1;
    if (f)
        fclose(f);
    return x;
}

static void least(struct memory_left *m, double bytes, const char *source)
{
    if (m->bytes >= 0 && bytes >= m->bytes)
        return;
    m->bytes = bytes;
    snprintf(m->source, sizeof m->source, "%s", source);
}

struct version { const char *limit, *used, *cache; };
static const struct version version_1 = { "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file" };
static const struct version version_2 = { "memory.max", "memory.current", "inactive_file" };

/* The limits in a cgroup's directory and in those above it. What files take that nobody has used lately is given back
 * before a limit hurts. */
static void limits(struct memory_left *m, const char *root, const char *mount, const char *cgroup,
                   const struct version *v)
{
    char at[256], dir[640], path[704], source[400];
    snprintf(at, sizeof at, "%s", cgroup);
    for (;;) {
        size_t n = strlen(at);
        while (n > 0 && at[n - 1] == '/')
            at[--n] = '\0';
        snprintf(dir, sizeof dir, "%s%s%s", root, mount, at);
        snprintf(path, sizeof path, "%s/%s", dir, v->limit);
        double limit = number(path);
        snprintf(path, sizeof path, "%s/%s", dir, v->used);
        double used = number(path);
        snprintf(path, sizeof path, "%s/memory.stat", dir);
        double cache = figure(path, v->cache);
        if (limit >= 0) {
            snprintf(source, sizeof source, "%s%s/%s", mount, at, v->limit);
            least(m, fmax(limit - fmax(used, 0) + fmax(cache, 0), 0), source);
        }
        char *slash = strrchr(at, '/');
        if (!slash)
            return;
        *slash = '\0';
    }
}

void memory_left(const char *root, struct memory_left *m)
{
    char path[512], line[512];
    m->bytes = -1;
    m->source[0] = '\0';
    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    double available = figure(path, "MemAvailable");
    if (available >= 0)
        least(m, available, "MemAvailable of /proc/meminfo");
    /* Lines "ID:CONTROLLERS:PATH". In a container the path may be one that only the outside sees; then the limit stands
     * at the top, where the search ends in any case. */
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *f = fopen(path, "r");
    bool listed = false;
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':'), *cgroup = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!cgroup)
            continue;
        *cgroup++ = '\0';
        listed = true;
        if (!strcmp(controllers + 1, "memory"))
            limits(m, root, "/sys/fs/cgroup/memory", cgroup, &version_1);
        else if (!controllers[1])
            limits(m, root, "/sys/fs/cgroup", cgroup, &version_2);
    }
    if (f)
        fclose(f);
    if (!listed)
        limits(m, root, "/sys/fs/cgroup", "", &version_2);
}

double memory_own(void)
{
    return fmax(figure("/proc/self/status", "RssAnon"), 0) + fmax(figure("/proc/self/status", "RssShmem"), 0);
}

double memory_peak(void)
{
    double most = figure("/proc/self/status", "VmHWM"), files = figure("/proc/self/status", "RssFile");
    return fmax(most - fmax(files, 0), 0);
}

const char *memory_text(double bytes, char *text, size_t room)
{
    static const char *const unit[] = { "kB", "MB", "GB", "TB", "PB", "EB" };
    size_t u = 0;
    for (bytes /= 1000; bytes >= 999.5 && u + 1 < sizeof unit / sizeof *unit; u++)
        bytes /= 1000;
    snprintf(text, room, "%.*f %s", bytes < 99.95 ? 1 : 0, bytes, unit[u]);
    return text;
}

void *memory_large(void *p, size_t bytes)
{
#ifdef MADV_HUGEPAGE
    const size_t page = (size_t)1 << 21, begin = ((uintptr_t)p + page - 1) & ~(page - 1);
    const size_t end = ((uintptr_t)p + bytes) & ~(page - 1);
    if (p && bytes >= 4 * page && end > begin)
        (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* advice: no harm if it is not taken */
#else
    (void)bytes;
#endif
    return p;
}
