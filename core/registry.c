/* SPDX-License-Identifier: Apache-2.0
 * registry.c - dlopen with everything compared before anything is called. */
#include "config.h"

#include "registry.h"
#include "param.h"

#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const char *const kind_name[MOE_N_KINDS] = { "router", "balancer", "placement", "dispatch", "offload" };

static const char *const a_kind[MOE_N_KINDS] = { "a router", "a balancer", "a placement", "a dispatch", "an offload" };

enum { OTHER_KIND = ERR_RUN - 1 }; /* within this file only: right file, another kind */

/* Process-wide, because dlopen is: what was loaded stays loaded. */
static struct registry_entry *entries;
static int n_entries;

int kind_of(const char *name)
{
    for (int k = 0; k < MOE_N_KINDS; k++)
        if (!strcmp(name, kind_name[k]))
            return k;
    return -1;
}

const char *registry_exe_dir(void)
{
    static char dir[512];
    if (!dir[0]) {
        ssize_t n = readlink("/proc/self/exe", dir, sizeof dir - 1);
        dir[n > 0 ? n : 0] = '\0';
        char *slash = strrchr(dir, '/');
        if (slash)
            *slash = '\0';
        else
            snprintf(dir, sizeof dir, ".");
    }
    return dir;
}

static bool is_file(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* The program runs uninstalled when its own directory holds the build tree's plugins. */
static bool in_build_tree(void)
{
    char path[600];
    struct stat st;
    snprintf(path, sizeof path, "%s/plugins/router", registry_exe_dir());
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int registry_data(const char *sub, char *path, size_t room)
{
    const char *given = getenv("MOELAB_DATA_PATH");
    if (given) {
        snprintf(path, room, "%s/%s", given, sub);
        if (access(path, R_OK) == 0)
            return 0;
    }
    if (in_build_tree()) {
        snprintf(path, room, "%s/%s", registry_exe_dir(), sub);
        if (access(path, R_OK) == 0)
            return 0;
        snprintf(path, room, "%s/%s", MOELAB_SRCDIR, sub); /* a build outside the source tree */
        if (access(path, R_OK) == 0)
            return 0;
    }
    snprintf(path, room, "%s/%s", MOELAB_PKGDATADIR, sub);
    return access(path, R_OK) == 0 ? 0 : -1;
}

int registry_data_names(const char *sub, char (*names)[64], int room)
{
    char path[1024];
    struct dirent **file = NULL;
    int n = registry_data(sub, path, sizeof path) == 0 ? scandir(path, &file, NULL, alphasort) : 0, n_names = 0;
    for (int i = 0; i < n; i++) {
        const size_t length = strlen(file[i]->d_name);
        if (n_names < room && length >= 5 && length - 4 < sizeof *names &&
            strcmp(file[i]->d_name + length - 4, ".lua") == 0)
            snprintf(names[n_names++], sizeof *names, "%.*s", (int)length - 4, file[i]->d_name);
        free(file[i]);
    }
    free(file);
    return n_names;
}

void registry_nearest_data(const char *sub, const char *name, char *near, size_t room)
{
    enum { MAX_FILES = 256 };
    char file[MAX_FILES][64];
    const char *names[MAX_FILES];
    const int n = registry_data_names(sub, file, MAX_FILES);
    for (int i = 0; i < n; i++)
        names[i] = file[i];
    const char *found = err_nearest(name, names, n);
    snprintf(near, room, "%s", found ? found : "");
}

static int check(const struct moe_plugin *p, enum moe_kind kind, const char *name, const char *path, struct err *e)
{
    if (p->abi != MOE_ABI)
        return err_set(e, ERR_INPUT, "%s: built for ABI %u, this moelab speaks %u: rebuild it", path, p->abi, MOE_ABI);
    if (p->size != sizeof *p)
        return err_set(e, ERR_INPUT, "%s: struct moe_plugin has %u bytes, expected %zu: rebuild it", path, p->size,
                       sizeof *p);
    if (p->kind != kind)
        return err_set(e, OTHER_KIND, "%s: is %s, expected %s", path,
                       (unsigned)p->kind < MOE_N_KINDS ? a_kind[p->kind] : "a policy of unknown kind", a_kind[kind]);
    if (!p->name || strcmp(p->name, name))
        return err_set(e, ERR_INPUT, "%s: calls itself \"%s\", expected \"%s\" (the file's stem)", path,
                       p->name ? p->name : "", name);
    if (!p->summary || !p->source)
        return err_set(e, ERR_INPUT, "%s: has no %s", path, p->summary ? "source" : "summary");
    const uint32_t unknown = p->needs & ~(2u * MOE_HEEDS_BIAS - 1); /* that is the last of enum moe_needs */
    if (unknown)
        return err_set(e, ERR_INPUT, "%s: needs has unknown bits 0x%x", path, unknown);
    const char *missing = NULL;
    switch (kind) {
    case MOE_ROUTER:
        if (!p->ops.router.route && !(p->ops.router.score && p->ops.router.select))
            missing = "route, or score and select";
        break;
    case MOE_BALANCER: {
        const struct moe_balancer_ops *b = &p->ops.balancer;
        if (!b->adjust && !b->rewrite && !b->plan && !b->observe && !b->loss)
            missing = "adjust, rewrite, plan, observe or loss";
        break;
    }
    case MOE_PLACEMENT:
        missing = p->ops.placement.place ? NULL : "place";
        break;
    case MOE_DISPATCH:
        missing = p->ops.dispatch.lay_out ? NULL : "lay_out";
        break;
    case MOE_OFFLOAD:
        missing = !p->ops.offload.insert == !p->ops.offload.evict ? NULL : p->ops.offload.insert ? "evict" : "insert";
        break;
    }
    if (missing)
        return err_set(e, ERR_INPUT, "%s: required hook missing: %s", path, missing);
    const struct moe_offload_ops *o = &p->ops.offload;
    if (kind == MOE_OFFLOAD && !o->insert && (o->hit || o->remove || o->observe))
        return err_set(e, ERR_INPUT, "%s: hooks without insert and evict, which nothing would call: %s", path,
                       o->hit ? "hit" : o->remove ? "remove" : "observe");
    return param_check_table(p, path, e);
}

static int load_file(enum moe_kind kind, const char *name, const char *path, const struct moe_plugin **out,
                     struct err *e)
{
    for (int i = 0; i < n_entries; i++)
        if (!strcmp(entries[i].path, path)) {
            *out = entries[i].plugin;
            return 0;
        }
    /* Policies link against libc alone, so nothing they would need is found lazily later. */
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return err_set(e, ERR_INPUT, "%s", dlerror());
    const struct moe_plugin *p = dlsym(handle, "moe_plugin");
    if (!p)
        err_set(e, ERR_INPUT, "%s: has no symbol \"moe_plugin\"; is it a moelab policy?", path);
    else
        check(p, kind, name, path, e);
    if (e->code) {
        dlclose(handle);
        return e->code;
    }
    struct registry_entry *grown = realloc(entries, sizeof *grown * (size_t)(n_entries + 1));
    if (!grown)
        return err_set(e, ERR_MEMORY, "out of memory");
    entries = grown;
    struct registry_entry *r = &entries[n_entries++];
    memset(r, 0, sizeof *r);
    r->kind = kind;
    snprintf(r->name, sizeof r->name, "%s", name);
    snprintf(r->path, sizeof r->path, "%s", path);
    r->plugin = p;
    *out = p;
    return 0;
}

/* The i-th directory searched for a kind, or false. $MOELAB_PLUGIN_PATH gives two per element. */
static bool search_dir(enum moe_kind kind, int i, char *out, size_t room)
{
    const char *path = getenv("MOELAB_PLUGIN_PATH");
    for (const char *at = path; at && *at;) {
        size_t n = strcspn(at, ":");
        if (n > 0) {
            if (i == 0)
                return snprintf(out, room, "%.*s", (int)n, at) > 0;
            if (i == 1)
                return snprintf(out, room, "%.*s/%s", (int)n, at, kind_name[kind]) > 0;
            i -= 2;
        }
        at += n + (at[n] == ':');
    }
    if (in_build_tree()) {
        if (i == 0)
            return snprintf(out, room, "%s/plugins/%s", registry_exe_dir(), kind_name[kind]) > 0;
        return false; /* an uninstalled program never mixes with installed policies */
    }
    if (i == 0)
        return snprintf(out, room, "%s/%s", MOELAB_PLUGINDIR, kind_name[kind]) > 0;
    return false;
}

/* Files that could be policies of a kind, first on the search path wins. The caller frees *out. */
static int scan(enum moe_kind kind, struct registry_entry **out)
{
    struct registry_entry *found = NULL;
    int n = 0;
    char dir[1024];
    for (int i = 0; search_dir(kind, i, dir, sizeof dir); i++) {
        DIR *d = opendir(dir);
        for (struct dirent *f; d && (f = readdir(d));) {
            struct registry_entry one = { .kind = kind };
            size_t len = strlen(f->d_name);
            if (len < 4 || len - 3 >= sizeof one.name || strcmp(f->d_name + len - 3, ".so"))
                continue;
            memcpy(one.name, f->d_name, len - 3);
            if ((size_t)snprintf(one.path, sizeof one.path, "%s/%s", dir, f->d_name) >= sizeof one.path)
                continue;
            bool known = false;
            for (int j = 0; j < n; j++)
                known |= !strcmp(found[j].name, one.name);
            struct registry_entry *grown = known ? NULL : realloc(found, sizeof *grown * (size_t)(n + 1));
            if (!grown)
                continue;
            found = grown;
            found[n++] = one;
        }
        if (d)
            closedir(d);
    }
    *out = found;
    return n;
}

int registry_load(enum moe_kind kind, const char *name, const char *who, const struct moe_plugin **out,
                  struct err *e)
{
    char dir[1024], path[1200];
    struct err other = { 0 };
    if (!*name || strchr(name, '/') || strlen(name) > 60)
        return err_set(e, ERR_INPUT, "%s: \"%s\" is not a policy's name", who, name);
    for (int i = 0; search_dir(kind, i, dir, sizeof dir); i++) {
        snprintf(path, sizeof path, "%s/%s.so", dir, name);
        if (!is_file(path))
            continue;
        if (load_file(kind, name, path, out, e) == 0)
            return 0;
        if (e->code == OTHER_KIND) { /* a flat directory on the path may hold policies of every kind */
            err_set(&other, ERR_INPUT, "%s", e->text);
            memset(e, 0, sizeof *e);
            continue;
        }
        return err_prefix(e, "%s", who);
    }
    if (other.code)
        return err_set(e, ERR_INPUT, "%s: %s", who, other.text);
    for (int k = 0; k < MOE_N_KINDS; k++)
        for (int i = 0; k != (int)kind && search_dir((enum moe_kind)k, i, dir, sizeof dir); i++) {
            snprintf(path, sizeof path, "%s/%s.so", dir, name);
            if (is_file(path))
                return err_set(e, ERR_INPUT, "%s: \"%s\" is %s, expected %s", who, name, a_kind[k], a_kind[kind]);
        }
    struct registry_entry *found;
    int n = scan(kind, &found);
    const char *candidate[n + 1];
    for (int i = 0; i < n; i++)
        candidate[i] = found[i].name;
    const char *near = err_nearest(name, candidate, n);
    if (near)
        err_set(e, ERR_INPUT, "%s: no %s named \"%s\"; did you mean \"%s\"?", who, kind_name[kind], name, near);
    else
        err_set(e, ERR_INPUT, "%s: no %s named \"%s\" (see: moelab plugins)", who, kind_name[kind], name);
    free(found);
    return e->code;
}

static int by_kind_and_name(const void *a, const void *b)
{
    const struct registry_entry *x = a, *y = b;
    return x->kind != y->kind ? (int)x->kind - (int)y->kind : strcmp(x->name, y->name);
}

void registry_list(const struct registry_entry **out, int *n_out)
{
    for (int kind = 0; kind < MOE_N_KINDS; kind++) {
        struct registry_entry *found;
        int n = scan((enum moe_kind)kind, &found);
        for (int i = 0; i < n; i++) {
            struct err one = { 0 };
            const struct moe_plugin *p;
            int code = load_file((enum moe_kind)kind, found[i].name, found[i].path, &p, &one);
            if (code < 0 && code != OTHER_KIND)
                fprintf(stderr, "moelab: left out: %s\n", one.text);
        }
        free(found);
    }
    if (n_entries)
        qsort(entries, (size_t)n_entries, sizeof *entries, by_kind_and_name);
    *out = entries;
    *n_out = n_entries;
}

const char *registry_foreign(const struct moe_plugin *plugin)
{
    char own[1024];
    if (in_build_tree())
        snprintf(own, sizeof own, "%s/plugins/", registry_exe_dir());
    else
        snprintf(own, sizeof own, "%s/", MOELAB_PLUGINDIR);
    for (int i = 0; i < n_entries; i++)
        if (entries[i].plugin == plugin)
            return strncmp(entries[i].path, own, strlen(own)) ? entries[i].path : NULL;
    return NULL;
}
