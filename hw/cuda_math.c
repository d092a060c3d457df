/* SPDX-License-Identifier: Apache-2.0
 * cuda_math.c - what is no list of products: as many bytes, or as many FLOPs, on numbers that mean nothing. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_kernels.h"
#include "cuda_rank.h"

#include <math.h>
#include <stdlib.h>

enum { BLOCK = 1024, MOVED = 1 << 26 /* bytes at a time */ };
/* Fewer FLOPs per byte than this, and memory is what takes time on any GPU in bf16 or fp32. */
#define FLOPS_PER_BYTE 20

static void room_plain(const struct cuda *c, double flops, double bytes, size_t *in, size_t *out)
{
    const bool multiplies = flops > FLOPS_PER_BYTE * bytes;
    const size_t moved = (size_t)fmin(bytes / 2 + 16, MOVED), block = c->element * BLOCK * BLOCK;
    const size_t reads = multiplies ? 2 * block : moved, writes = multiplies ? block : moved;
    *in = reads > *in ? reads : *in;
    *out = writes > *out ? writes : *out;
}

void cuda_math_room(const struct cuda *c, const struct moe_graph *g, int32_t device, size_t *in, size_t *out)
{
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        if (t->kind != TASK_COMPUTE || t->device != device)
            continue;
        if (!t->listed)
            room_plain(c, t->flops, t->bytes, in, out);
        for (int32_t i = t->first; t->listed && i < t->first + t->n; i++) {
            const struct kernel *k = &g->kernel[i];
            if (k->groups == 0) {
                room_plain(c, k->flops, k->traffic, in, out);
                continue;
            }
            cuda_kernel_room(c, k, in, out);
        }
    }
}

int cuda_run_plain(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, double flops, double bytes,
                   struct err *e)
{
    if (flops <= FLOPS_PER_BYTE * bytes) {
        for (double left = bytes / 2; left >= (double)sizeof(float) && !e->code; left -= MOVED) {
            const size_t some = (size_t)fmin(left, MOVED);
            CUDA_TRY(e, r->rank, cuda_move(s->stream, (int64_t)(some / sizeof(float)),
                                           (const float *)(const void *)cuda_operand(r, some), r->results.at));
        }
        return e->code;
    }
    const size_t block = c->element * BLOCK * BLOCK;
    for (double left = flops; left > 0 && !e->code; left -= 2.0 * BLOCK * BLOCK * BLOCK) {
        const char *a = cuda_operand(r, 2 * block);
        const struct cuda_product p = { BLOCK, BLOCK, BLOCK, a, a + block, r->results.at, NULL };
        cuda_product_run(&p, c->half, s->blas, r->rank, e);
    }
    return e->code;
}
