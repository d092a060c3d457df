/* SPDX-License-Identifier: Apache-2.0
 * cuda_gpu.c - which GPU a process takes: of those on its computer that it sees, the one of its place among the ranks
 * there. Launchers may show each process another one; that no two have the same is checked by the GPU's own number. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_rank.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct where { char host[128]; int32_t n_gpus; };
struct taken { char gpu[16]; };

/* Its name, and what no other has: containers may share a name. */
static void name_host(struct where *w)
{
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r");
    char name[64] = "?", boot[40] = "";
    gethostname(name, sizeof name - 1);
    if (f && fgets(boot, sizeof boot, f))
        boot[strcspn(boot, "\n")] = '\0';
    if (f)
        fclose(f);
    snprintf(w->host, sizeof w->host, "%.63s %.39s", name, boot);
}

static bool together(const struct where *a, const struct where *b)
{
    return memcmp(a->host, b->host, sizeof a->host) == 0;
}

static void find_twins(const struct team *t, const struct where *all, const struct taken *gpu, struct err *e)
{
    for (int i = 0; i < t->size; i++)
        for (int j = 0; j < i && !e->code; j++) {
            int n = 0;
            if (memcmp(&gpu[i], &gpu[j], sizeof *gpu) != 0 || !together(&all[i], &all[j]))
                continue;
            for (int k = 0; k < t->size; k++)
                n += together(&all[k], &all[i]);
            err_set(e, ERR_INPUT, "ranks %d and %d would share a GPU: there are %d ranks on %.*s and each sees %d "
                    "GPU%s, expected one for each: run on fewer devices, or set virtual_ranks = true", j, i, n,
                    (int)strcspn(all[i].host, " "), all[i].host, all[i].n_gpus, all[i].n_gpus == 1 ? "" : "s");
        }
}

static int check_precision(const struct cuda *c, int32_t rank, int device, struct err *e)
{
    int major = 0, minor = 0;
    if (!c->fp8)
        return e->code;
    CUDA_TRY(e, rank, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_TRY(e, rank, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (!e->code && 10 * major + minor < CUDA_FP8_CAPABILITY)
        err_set(e, ERR_INPUT, "rank %d, GPU %d: model.precision: fp8 needs compute capability 8.9 or higher, found "
                "%d.%d", rank, device, major, minor);
    return e->code;
}

int cuda_take_gpu(struct cuda *c, struct err *e)
{
    struct team *t = c->team;
    struct where mine = { .host = "" }, *all = NULL;
    struct taken *gpu = NULL, own = { .gpu = "" };
    struct cudaDeviceProp about;
    int place = 0, n = 0;
    if (!t) {
        CUDA_TRY(e, 0, cudaSetDevice(0));
        return check_precision(c, 0, 0, e);
    }
    name_host(&mine);
    CUDA_TRY(e, t->rank, cudaGetDeviceCount(&n));
    mine.n_gpus = n;
    all = malloc(sizeof *all * (size_t)t->size);
    gpu = malloc(sizeof *gpu * (size_t)t->size);
    if (!all || !gpu)
        err_set(e, ERR_MEMORY, "out of memory for %d ranks", t->size);
    if (team_agree(t, e) == 0)
        t->ops->gather(t, &mine, sizeof mine, all, e);
    for (int i = 0; i < t->rank && !e->code; i++)
        place += together(&all[i], &mine);
    CUDA_TRY(e, t->rank, cudaSetDevice(place % (n > 0 ? n : 1)));
    CUDA_TRY(e, t->rank, cudaGetDeviceProperties(&about, place % (n > 0 ? n : 1)));
    if (!e->code)
        memcpy(own.gpu, &about.uuid, sizeof own.gpu);
    if (team_agree(t, e) == 0 && t->ops->gather(t, &own, sizeof own, gpu, e) == 0)
        find_twins(t, all, gpu, e); /* the same on all */
    free(all);
    free(gpu);
    check_precision(c, t->rank, place % (n > 0 ? n : 1), e);
    return team_agree(t, e);
}
