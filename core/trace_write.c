/* SPDX-License-Identifier: Apache-2.0
 *
 * trace_write.c - a trace directory appears whole or not at all.
 *
 * Files go to DIR.part, which is opened with every check and then renamed. What was at DIR before is replaced only
 * if it is empty or consists of a trace's files alone, and goes away last.
 */
#include "config.h"

#include "trace.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool is_trace_file(const char *name)
{
    char stem[256];
    size_t n = strlen(name);
    if (n > 5 && n < sizeof stem && !strcmp(name + n - 5, ".part")) { /* left by a writer that was killed */
        memcpy(stem, name, n - 5);
        stem[n - 5] = '\0';
        return trace_has_part(stem);
    }
    return trace_has_part(name);
}

/* Fails, naming it, if the directory holds anything that is not a trace's. A directory that is not there is fine. */
static int expect_trace_only(const char *dir, struct err *err)
{
    struct dirent *entry;
    int rc = 0;
    DIR *d = opendir(dir);
    if (!d && errno == ENOENT)
        return 0;
    if (!d)
        return err_set(err, ERR_IO, "%s: exists and is not a directory that can be replaced: %s", dir, strerror(errno));
    while (rc == 0 && (entry = readdir(d)))
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") && !is_trace_file(entry->d_name))
            rc = err_set(err, ERR_INPUT, "%s: not overwritten: it holds %s, which is not part of a trace", dir,
                         entry->d_name);
    closedir(d);
    return rc;
}

/* Removes a directory that expect_trace_only() has passed. */
static int remove_trace(const char *dir)
{
    struct dirent *entry;
    DIR *d = opendir(dir);
    if (!d)
        return errno == ENOENT ? 0 : -1;
    while ((entry = readdir(d)))
        if (is_trace_file(entry->d_name))
            unlinkat(dirfd(d), entry->d_name, 0);
    closedir(d);
    return rmdir(dir);
}

int trace_out_begin(struct trace_out *o, const char *dir, struct err *err)
{
    size_t n = strlen(dir);
    int rc;
    memset(o, 0, sizeof *o);
    while (n > 1 && dir[n - 1] == '/')
        n--;
    if (n == 0 || n + 1 > sizeof o->dir)
        return err_set(err, ERR_INPUT, "\"%s\": a directory name of %zu bytes, expected 1 to %zu", dir, n,
                       sizeof o->dir - 1);
    memcpy(o->dir, dir, n);
    snprintf(o->part, sizeof o->part, "%s.part", o->dir);
    if ((rc = expect_trace_only(o->dir, err)) < 0 || (rc = expect_trace_only(o->part, err)) < 0)
        return rc;
    if (remove_trace(o->part) < 0 || mkdir(o->part, 0777) < 0)
        return err_set(err, ERR_IO, "%s: cannot create: %s", o->part, strerror(errno));
    o->open = true;
    return 0;
}

const char *trace_out_path(struct trace_out *o, const char *file)
{
    snprintf(o->path, sizeof o->path, "%s/%s", o->part, file);
    return o->path;
}

static int write_meta(struct trace_out *o, const json_t *meta, struct err *err)
{
    const char *path = trace_out_path(o, "trace.json");
    FILE *file = fopen(path, "we");
    if (!file)
        return err_set(err, ERR_IO, "%s: cannot create: %s", path, strerror(errno));
    bool failed = json_dumpf(meta, file, JSON_INDENT(1)) < 0 || fputc('\n', file) == EOF || fflush(file) != 0;
    if (failed | (fclose(file) != 0))
        return err_set(err, ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    return 0;
}

/* DIR.part becomes DIR; a trace that was there steps aside first, and comes back if that fails. */
static int swap_in(struct trace_out *o, struct err *err)
{
    char old[416];
    snprintf(old, sizeof old, "%s.old", o->dir);
    bool replaces = access(o->dir, F_OK) == 0;
    int rc;
    if (replaces) {
        if ((rc = expect_trace_only(old, err)) < 0)
            return rc;
        if (remove_trace(old) < 0 || rename(o->dir, old) < 0)
            return err_set(err, ERR_IO, "%s: cannot replace: %s", o->dir, strerror(errno));
    }
    if (rename(o->part, o->dir) < 0) {
        rc = err_set(err, ERR_IO, "%s: cannot rename to %s: %s", o->part, o->dir, strerror(errno));
        if (replaces && rename(old, o->dir) < 0)
            return err_prefix(err, "the trace before is now %s", old);
        return rc;
    }
    o->open = false;
    if (replaces)
        remove_trace(old);
    return 0;
}

int trace_out_commit(struct trace_out *o, const json_t *meta, struct err *err)
{
    struct trace t;
    int rc = meta ? write_meta(o, meta, err) : err_set(err, ERR_MEMORY, "%s: no memory for trace.json", o->dir);
    if (rc == 0 && (rc = trace_open(&t, o->part, err)) == 0) {
        trace_close(&t);
        rc = swap_in(o, err);
    }
    if (rc < 0)
        trace_out_abandon(o);
    return rc;
}

void trace_out_abandon(struct trace_out *o)
{
    if (o->open)
        remove_trace(o->part);
    o->open = false;
}

json_t *trace_meta(int32_t n_layers, int32_t n_experts, int32_t top_k, int32_t n_requests, int64_t n_tokens)
{
    return json_pack("{s:i, s:i, s:i, s:i, s:I}", "layers", (int)n_layers, "experts", (int)n_experts, "top_k",
                     (int)top_k, "requests", (int)n_requests, "tokens", (json_int_t)n_tokens);
}
