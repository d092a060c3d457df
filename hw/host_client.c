/* SPDX-License-Identifier: Apache-2.0
 * host_client.c - finds and loads the module that runs task graphs over MPI (host.c). */
#include "config.h"

#include "host.h"
#include "registry.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int find_module(char *path, size_t room, struct err *e)
{
    snprintf(path, room, "%s/hw/host.so", registry_exe_dir()); /* in the build tree */
    if (access(path, R_OK) == 0)
        return 0;
    char here[1024];
    snprintf(here, sizeof here, "%s", path);
    snprintf(path, room, "%s/machine/host.so", MOELAB_PLUGINDIR);
    if (access(path, R_OK) == 0)
        return 0;
    return err_set(e, ERR_INPUT, "no module host.so (looked for %s, %s): it is not built --without-mpi or "
                   "--without-openblas", here, path);
}

bool machine_host_available(void)
{
    char path[1024];
    struct err why = { 0 };
    return find_module(path, sizeof path, &why) == 0;
}

static int check(const struct host_module *h, const char *path, struct err *e)
{
    if (!h)
        return err_set(e, ERR_INPUT, "%s: has no symbol \"moelab_host_module\"", path);
    if (h->abi != HOST_ABI || h->size != sizeof *h || h->machine_size != sizeof(struct machine) ||
        h->graph_size != sizeof(struct moe_graph) || h->task_size != sizeof(struct task) ||
        h->model_size != sizeof(struct moe_model))
        return err_set(e, ERR_INPUT, "%s: built for another version of moelab: rebuild it", path);
    return 0;
}

static const struct host_module *load(struct err *e)
{
    char path[1024];
    if (find_module(path, sizeof path, e) < 0)
        return NULL;
    /* Never closed: MPI does not survive being unloaded. */
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        err_set(e, ERR_INPUT, "%s", dlerror());
        return NULL;
    }
    const struct host_module *h = dlsym(handle, "moelab_host_module");
    return check(h, path, e) < 0 ? NULL : h;
}

int machine_join_host(struct team **t, struct err *e)
{
    const struct host_module *h = load(e);
    return h ? h->join(t, e) : e->code;
}

int machine_open_host(struct machine *m, const struct topology *t, const struct moe_model *model, bool verify,
                      struct team *team, struct err *e)
{
    memset(m, 0, sizeof *m);
    m->topology = t;
    m->model = model;
    m->precision = PREC_FP32;
    m->verify = verify;
    m->team = team;
    const struct host_module *h = load(e);
    return h ? h->open(m, e) : e->code;
}

int machine_calibrate_host(struct host_calibration *c, struct err *e)
{
    const struct host_module *h = load(e);
    return h ? h->calibrate(c, e) : e->code;
}
