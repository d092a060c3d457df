/* SPDX-License-Identifier: Apache-2.0
 * record.c - runs.jsonl, manifest.json and files that scenarios write. */
#include "config.h"

#include "record.h"
#include "revision.h"
#include "sha256.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SCHEMA = 2 }; /* of runs.jsonl and manifest.json: raised when a key's meaning changes */

static int make_parents(struct record *r, struct err *e)
{
    char part[512];
    snprintf(part, sizeof part, "%s", r->part);
    for (char *c = part + 1; *c; c++)
        if (*c == '/') {
            *c = '\0';
            if (mkdir(part, 0777) == 0)
                r->n_parents++;
            else if (errno != EEXIST)
                return err_set(e, ERR_IO, "--out %s: cannot make the directory %s: %s", r->out, part,
                               strerror(errno));
            *c = '/';
        }
    return 0;
}

/* Those that make_parents made, as long as nothing is in them. */
static void remove_parents(struct record *r)
{
    char part[512];
    snprintf(part, sizeof part, "%s", r->part);
    for (char *slash; r->n_parents > 0 && (slash = strrchr(part, '/')) && slash > part; r->n_parents--) {
        *slash = '\0';
        if (rmdir(part) < 0)
            return;
    }
}

/* Directories of results hold plain files only; what else is found there stays, and so does the directory. */
void record_discard(const char *path)
{
    DIR *d = opendir(path);
    if (!d)
        return;
    for (struct dirent *f; (f = readdir(d));)
        if (strcmp(f->d_name, ".") && strcmp(f->d_name, ".."))
            unlinkat(dirfd(d), f->d_name, 0);
    closedir(d);
    rmdir(path);
}

static bool is_empty(const char *path)
{
    DIR *d = opendir(path);
    int n = 0;
    for (struct dirent *f; d && (f = readdir(d));)
        n++;
    if (d)
        closedir(d);
    return n <= 2;
}

const char *record_base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static bool has_file(const char *dir, const char *name)
{
    char path[700];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return access(path, F_OK) == 0;
}

bool record_is_plain(const char *name)
{
    return *name && *name != '.' && *name != '-' && !strchr(name, '/') && strlen(name) <= 200;
}

static int put(struct record *r, const char *name, const char *mode, const char *text, size_t n, struct err *e)
{
    char path[700];
    snprintf(path, sizeof path, "%s/%s", r->part, name);
    FILE *f = fopen(path, mode);
    if (!f)
        return err_set(e, ERR_IO, "cannot write %s: %s", path, strerror(errno));
    bool ok = fwrite(text, 1, n, f) == n;
    int why = errno;
    if (fclose(f) != 0 && ok) {
        ok = false;
        why = errno;
    }
    return ok ? 0 : err_set(e, ERR_IO, "cannot write %s: %s", path, strerror(why));
}

int record_open(struct record *r, const char *out, struct err *e)
{
    memset(r, 0, sizeof *r);
    if (strlen(out) >= sizeof r->out)
        return err_set(e, ERR_INPUT, "--out: %zu characters, expected fewer than %zu", strlen(out), sizeof r->out);
    snprintf(r->out, sizeof r->out, "%s", out);
    size_t n = strlen(r->out);
    while (n > 1 && r->out[n - 1] == '/')
        r->out[--n] = '\0';
    const char *last = record_base_name(r->out);
    if (!*last || !strcmp(last, ".") || !strcmp(last, ".."))
        return err_set(e, ERR_INPUT, "--out \"%s\": expected the name of a directory to make", out);
    snprintf(r->part, sizeof r->part, "%s.part", r->out);
    struct stat st;
    if (lstat(r->out, &st) == 0 && S_ISLNK(st.st_mode))
        return err_set(e, ERR_INPUT, "%s: is a link; name the directory itself as --out", r->out);
    if (stat(r->out, &st) == 0 && (!S_ISDIR(st.st_mode) || (!is_empty(r->out) && !has_file(r->out, "manifest.json"))))
        return err_set(e, ERR_INPUT, "%s: exists and is not a results directory; choose another --out", r->out);
    if (stat(r->part, &st) == 0 && (!S_ISDIR(st.st_mode) || (!is_empty(r->part) && !has_file(r->part, "runs.jsonl"))))
        return err_set(e, ERR_INPUT, "%s: exists and was not left by moelab; results are built there: remove it or "
                       "choose another --out", r->part);
    if (make_parents(r, e) < 0)
        return e->code;
    int old = open(r->part, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool busy = old >= 0 && flock(old, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK;
    if (old >= 0)
        close(old);
    if (busy)
        return err_set(e, ERR_INPUT, "%s: another moelab is writing there; choose another --out", r->part);
    record_discard(r->part);
    if (mkdir(r->part, 0777) < 0)
        return err_set(e, ERR_IO, "--out %s: cannot make the directory %s, where results are built: %s", r->out,
                       r->part, strerror(errno));
    r->lock = open(r->part, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (r->lock >= 0)
        flock(r->lock, LOCK_EX | LOCK_NB); /* where a file system has no locks, nobody is kept out */
    r->open = true;
    r->experiments = json_array();
    r->machines = json_object();
    r->traces = json_object();
    r->trace_names = json_object();
    if (put(r, "runs.jsonl", "w", "", 0, e) < 0) /* what is left of an interrupted scenario is known by it */
        record_abandon(r);
    return e->code;
}

int record_file(struct record *r, const char *name, const char *text, size_t n, struct err *e)
{
    if (!record_is_plain(name))
        return err_set(e, ERR_INPUT, "\"%s\" is not a file name (no slashes, no leading dot or dash)", name);
    if (!strcmp(name, "runs.jsonl") || !strcmp(name, "manifest.json"))
        return err_set(e, ERR_INPUT, "%s is moelab's own; choose another name", name);
    return put(r, name, "w", text, n, e);
}

int record_runs(struct record *r, const char *experiment, json_t *specs, json_t *axes, json_t *results, struct err *e)
{
    const int first = r->n_runs;
    json_t *kept = json_array();
    for (size_t i = 0; i < json_array_size(results) && !e->code; i++) {
        json_t *result = json_array_get(results, i);
        json_t *line = json_pack("{s:i, s:i, s:s, s:O}", "schema", SCHEMA, "run", r->n_runs++, "experiment",
                                 experiment, "axes", json_array_get(axes, i));
        json_t *resolved = json_object_get(result, "spec");
        json_array_append_new(kept, record_spec(r, resolved ? resolved : json_array_get(specs, i), e));
        json_object_update(line, result);
        json_object_del(line, "spec"); /* which the manifest keeps, once for all runs where they share it */
        char *text = json_dumps(line, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
        if (!text || put(r, "runs.jsonl", "a", text, strlen(text), e) < 0 || put(r, "runs.jsonl", "a", "\n", 1, e) < 0)
            err_set(e, ERR_MEMORY, "out of memory for results");
        free(text);
        json_decref(line);
    }
    json_t *common = record_common(kept);
    for (size_t i = 0; i < json_array_size(kept); i++)
        json_object_set_new(json_array_get(kept, i), "run", json_integer(first + (json_int_t)i));
    json_array_append_new(r->experiments,
                          json_pack("{s:s, s:o, s:o}", "name", experiment, "common", common, "runs", kept));
    return e->code;
}

/* Names in a directory but . and .. ; sorted, so that a manifest does not depend on the file system. */
static json_t *list_files(const char *dir)
{
    json_t *names = json_array();
    struct dirent **entry = NULL;
    int n = scandir(dir, &entry, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        if (strcmp(entry[i]->d_name, ".") && strcmp(entry[i]->d_name, ".."))
            json_array_append_new(names, json_string(entry[i]->d_name));
        free(entry[i]);
    }
    free(entry);
    return names;
}

/* What lies in `from` and its manifest does not list is somebody else's (notes, edited copies): it moves to `to`,
 * but where a new file has its name. */
static void carry_over(const char *from, const char *to)
{
    char path[700], target[700];
    snprintf(path, sizeof path, "%s/manifest.json", from);
    json_t *manifest = json_load_file(path, 0, NULL), *ours = json_object_get(manifest, "files"), *name;
    json_t *found = ours ? list_files(from) : json_array(); /* older manifests have no list: all was taken for ours */
    size_t i;
    json_array_foreach(found, i, name) {
        size_t j = 0;
        while (j < json_array_size(ours) && !json_equal(json_array_get(ours, j), name))
            j++;
        snprintf(path, sizeof path, "%s/%s", from, json_string_value(name));
        snprintf(target, sizeof target, "%s/%s", to, json_string_value(name));
        if (j == json_array_size(ours) && renameat2(AT_FDCWD, path, AT_FDCWD, target, RENAME_NOREPLACE) < 0)
            fprintf(stderr, "moelab: warning: %s: %s\n", path,
                    errno == EEXIST ? "gives way to a new file of that name" : strerror(errno));
    }
    json_decref(found);
    json_decref(manifest);
}

/* Earlier results give way in one step where the file system can do that. */
static int put_in_place(const struct record *r)
{
    if (rename(r->part, r->out) == 0)
        return 0;
    if (errno != ENOTEMPTY && errno != EEXIST)
        return -1;
    if (renameat2(AT_FDCWD, r->part, AT_FDCWD, r->out, RENAME_EXCHANGE) == 0) {
        carry_over(r->part, r->out);
        return 0;
    }
    if (errno != EINVAL && errno != ENOSYS)
        return -1;
    carry_over(r->out, r->part);
    record_discard(r->out);
    return rename(r->part, r->out);
}

int record_commit(struct record *r, const char *scenario, const json_t *overrides, struct err *e)
{
    char hex[65] = "";
    if (sha256_file(scenario, hex, e) < 0)
        return e->code;
    json_t *m = json_pack("{s:i, s:s, s:s, s:{s:s, s:s}, s:O, s:O, s:O, s:O}", "schema", SCHEMA, "moelab",
                          PACKAGE_VERSION, "revision", MOELAB_REVISION, "scenario", "file", record_base_name(scenario),
                          "sha256", hex, "overrides", overrides, "machines", r->machines, "traces", r->traces,
                          "experiments", r->experiments);
    if (r->against)
        json_object_set_new(m, "against", json_pack("{s:s, s:s}", "measured", r->executor, "simulated", r->against));
    json_t *files = list_files(r->part);
    json_array_append_new(files, json_string("manifest.json"));
    json_object_set_new(m, "files", files);
    char *text = json_dumps(m, JSON_INDENT(1) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    json_decref(m);
    int code = text ? put(r, "manifest.json", "w", text, strlen(text), e)
                    : err_set(e, ERR_MEMORY, "out of memory for the manifest");
    free(text);
    if (code < 0)
        return code;
    if (put_in_place(r) < 0)
        return err_set(e, ERR_IO, "cannot rename %s to %s: %s", r->part, r->out, strerror(errno));
    record_abandon(r); /* what is there now is what was in the place before, if anything */
    return 0;
}

void record_abandon(struct record *r)
{
    if (!r->open)
        return;
    record_discard(r->part);
    remove_parents(r);
    json_decref(r->experiments);
    json_decref(r->machines);
    json_decref(r->traces);
    json_decref(r->trace_names);
    if (r->lock >= 0)
        close(r->lock);
    r->open = false;
}
