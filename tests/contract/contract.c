/* SPDX-License-Identifier: Apache-2.0
 * contract.c - the contract suite: runs every check of a kind over every plugin of that kind.
 *
 * usage: contract [FILE.so | DIRECTORY]...
 * Without arguments: the directories of $MOELAB_PLUGIN_PATH, or "plugins". A directory is searched as DIR/KIND/NAME.so
 * and DIR/NAME.so. A new plugin is covered by being there; nothing in here names one, except that belady's misses are
 * compared with an optimum. */
#include "contract.h"

#include <dirent.h>
#include <sys/stat.h>

static const char *const kinds[MOE_N_KINDS] = {"router", "balancer", "placement", "dispatch", "offload"};
static const struct contract_check *const checks[MOE_N_KINDS] = {
    contract_router, contract_balancer, contract_placement, contract_dispatch, contract_offload,
};

struct suite {
    struct CMUnitTest *test;
    size_t n, room;
    int n_bad; /* files that are no plugins */
};

static void add_plugin(struct suite *s, const char *path)
{
    char why[512] = "";
    const struct moe_plugin *plugin = policy_load(path, why);
    if (plugin == NULL || (unsigned)plugin->kind >= MOE_N_KINDS) {
        fprintf(stderr, "%s: %s\n", path, plugin == NULL ? why : "unknown kind");
        s->n_bad++;
        return;
    }
    for (const struct contract_check *c = checks[plugin->kind]; c->name != NULL; c++) {
        char name[256];
        snprintf(name, sizeof name, "%s/%s: %s", kinds[plugin->kind], plugin->name, c->name);
        if (s->n == s->room) {
            s->room = s->room * 2 + 64;
            s->test = realloc(s->test, s->room * sizeof *s->test);
        }
        if (s->test == NULL)
            abort();
        s->test[s->n++] = (struct CMUnitTest){
            .name = strdup(name), .test_func = c->run, .initial_state = (void *)(uintptr_t)plugin,
        };
    }
}

static int is_plugin(const struct dirent *d)
{
    size_t n = strlen(d->d_name);
    return n > 3 && strcmp(d->d_name + n - 3, ".so") == 0;
}

static void add_directory(struct suite *s, const char *dir)
{
    struct dirent **found;
    int n = scandir(dir, &found, is_plugin, alphasort);
    for (int i = 0; i < n; i++) {
        char path[1024];
        snprintf(path, sizeof path, "%s/%s", dir, found[i]->d_name);
        add_plugin(s, path);
        free(found[i]);
    }
    if (n >= 0)
        free(found);
}

static void add_path(struct suite *s, const char *path)
{
    struct stat what;
    if (stat(path, &what) == 0 && !S_ISDIR(what.st_mode)) {
        add_plugin(s, path);
        return;
    }
    add_directory(s, path);
    for (int k = 0; k < MOE_N_KINDS; k++) {
        char below[1024];
        snprintf(below, sizeof below, "%s/%s", path, kinds[k]);
        add_directory(s, below);
    }
}

int main(int argc, char **argv)
{
    struct suite s = {0};
    for (int i = 1; i < argc; i++)
        add_path(&s, argv[i]);
    if (argc == 1) {
        const char *path = getenv("MOELAB_PLUGIN_PATH");
        char *all = strdup(path != NULL ? path : "plugins");
        for (char *next = all, *dir; (dir = strsep(&next, ":")) != NULL;)
            add_path(&s, dir);
        free(all);
    }
    if (s.n == 0) {
        fprintf(stderr, "contract: no plugin found; give files or directories, or set MOELAB_PLUGIN_PATH\n");
        return 2;
    }
    cmocka_set_message_output(CM_OUTPUT_TAP);
    int failed = _cmocka_run_group_tests("contract", s.test, s.n, NULL, NULL);
    for (size_t i = 0; i < s.n; i++)
        free((void *)(uintptr_t)s.test[i].name);
    free(s.test);
    return failed != 0 || s.n_bad != 0;
}
