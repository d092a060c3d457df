/* SPDX-License-Identifier: Apache-2.0
 * nccl_load.c - see cuda_nccl.h. */
#include "config.h"

#ifdef HAVE_NCCL_H

#include "cuda_nccl.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

int nccl_load(struct nccl *n, struct err *e)
{
    const char *given = getenv("MOELAB_NCCL"), *path = given && *given ? given : "libnccl.so.2";
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const struct { const char *name; void *to; } calls[] = {
        { "ncclGetVersion", &n->version },       { "ncclGetUniqueId", &n->unique_id },
        { "ncclCommInitRankConfig", &n->open },  { "ncclCommDestroy", &n->destroy },
        { "ncclCommAbort", &n->abort },          { "ncclCommGetAsyncError", &n->state },
        { "ncclGroupStart", &n->group_start },   { "ncclGroupEnd", &n->group_end },
        { "ncclSend", &n->send },                { "ncclRecv", &n->recv },
        { "ncclGetErrorString", &n->error },     { "ncclGetLastError", &n->last_error },
    };
    if (!handle)
        return err_set(e, ERR_INPUT, "no NCCL: %s: install it, or name its library in MOELAB_NCCL, or put all ranks on "
                       "one GPU with virtual_ranks = true", dlerror());
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        void *symbol = dlsym(handle, calls[i].name);
        if (!symbol)
            return err_set(e, ERR_INPUT, "%s has no %s: expected NCCL 2.14 or newer", path, calls[i].name);
        memcpy(calls[i].to, &symbol, sizeof symbol); /* a function's address, which C does not let be assigned */
    }
    return 0;
}

#endif
