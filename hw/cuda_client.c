/* SPDX-License-Identifier: Apache-2.0
 * cuda_client.c - finds and loads the module that runs task graphs on a GPU (cuda.c). */
#include "config.h"

#include "cuda.h"
#include "registry.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int find_module(char *path, size_t room, struct err *e)
{
    snprintf(path, room, "%s/hw/cuda.so", registry_exe_dir()); /* in the build tree */
    if (access(path, R_OK) == 0)
        return 0;
    char here[1024];
    snprintf(here, sizeof here, "%s", path);
    snprintf(path, room, "%s/machine/cuda.so", MOELAB_PLUGINDIR);
    if (access(path, R_OK) == 0)
        return 0;
    return err_set(e, ERR_INPUT, "no module cuda.so (looked for %s, %s): configure builds it where it finds nvcc (see "
                   "--with-cuda)", here, path);
}

bool machine_cuda_available(void)
{
    char path[1024];
    struct err why = { 0 };
    return find_module(path, sizeof path, &why) == 0;
}

static int check(const struct cuda_module *c, const char *path, struct err *e)
{
    if (!c)
        return err_set(e, ERR_INPUT, "%s: has no symbol \"moelab_cuda_module\"", path);
    if (c->abi != CUDA_ABI || c->size != sizeof *c || c->machine_size != sizeof(struct machine) ||
        c->graph_size != sizeof(struct moe_graph) || c->task_size != sizeof(struct task) ||
        c->kernel_size != sizeof(struct kernel) || c->model_size != sizeof(struct moe_model))
        return err_set(e, ERR_INPUT, "%s: built for another version of moelab: rebuild it", path);
    return 0;
}

static const struct cuda_module *load(struct err *e)
{
    char path[1024];
    if (find_module(path, sizeof path, e) < 0)
        return NULL;
    /* Never closed: the CUDA runtime does not survive being unloaded. */
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        err_set(e, ERR_INPUT, "%s", dlerror());
        return NULL;
    }
    const struct cuda_module *c = dlsym(handle, "moelab_cuda_module");
    return check(c, path, e) < 0 ? NULL : c;
}

int machine_open_cuda(struct machine *m, const struct topology *t, const struct moe_model *model, enum precision p,
                      bool verify, bool graphs, struct team *team, struct err *e)
{
    memset(m, 0, sizeof *m);
    m->topology = t;
    m->model = model;
    m->precision = p;
    m->verify = verify;
    m->graphs = graphs;
    m->virtual_ranks = !team;
    m->team = team;
    if (p != PREC_BF16 && p != PREC_FP32 && p != PREC_FP8)
        return err_set(e, ERR_INPUT, "model.precision: computes in bf16, fp32 and fp8, found %s", precision_name[p]);
    const struct cuda_module *c = load(e);
    return c ? c->open(m, e) : e->code;
}

int machine_calibrate_cuda(struct cuda_calibration *c, struct err *e)
{
    const struct cuda_module *module = load(e);
    return module ? module->calibrate(c, e) : e->code;
}
