/* SPDX-License-Identifier: Apache-2.0
 * host_room.c - how much room the made-up operands of kernels take: for ranks, and to count it before they start. */
#include "config.h"

#include "host_kernels.h"

#include <stdlib.h>
#include <sys/mman.h>

enum { SMALL = 1 << 12, LARGE = 1 << 21 };

/* A large page for what is left over, if that is not much more than is asked for: reading a file into small ones takes
 * several times as long a byte. */
size_t host_taken(size_t bytes)
{
    const size_t whole = (bytes + LARGE - 1) / LARGE * LARGE;
    return whole - bytes <= bytes / 8 ? whole : bytes;
}

void *host_take(size_t bytes)
{
    void *p = NULL;
    bytes = host_taken(bytes);
    if (posix_memalign(&p, bytes < LARGE ? SMALL : LARGE, bytes ? bytes : 1) != 0)
        return NULL;
    if (bytes >= LARGE)
        madvise(p, bytes / LARGE * LARGE, MADV_HUGEPAGE); /* advice: it is as well without */
    return p;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

bool host_is_attention(const struct kernel *k)
{
    return k->groups == 0 && (k->key.op == LATENCY_DECODE || k->key.op == LATENCY_PREFILL);
}

int64_t host_seen(const struct kernel *k)
{
    const double context = k->key.op == LATENCY_PREFILL ? k->key.context / 2 : k->key.context;
    return context < 1 ? 1 : (int64_t)context;
}

size_t host_queries(const struct kernel *k)
{
    const int32_t per_key = (k->key.heads + k->key.kv_heads - 1) / k->key.kv_heads;
    return k->key.op == LATENCY_PREFILL ? HOST_QUERIES : (size_t)per_key;
}

struct host_room host_kernel_room(const struct kernel *k)
{
    const size_t n = (size_t)k->shape.n, depth = (size_t)k->shape.k, rows = (size_t)k->shape.rows;
    if (k->groups > 0)
        return (struct host_room){ rows * depth + depth * n, rows * n };
    if (!host_is_attention(k))
        return (struct host_room){ 2 * HOST_MOVED, HOST_MOVED };
    const size_t q = host_queries(k), key = (size_t)k->key.n, value = (size_t)k->key.k, tokens = (size_t)host_seen(k);
    return (struct host_room){ tokens * (key + value) + q * key, q * (tokens + value) };
}

/* What is read lies in as much memory as the step reads: weights that all fit into a cache may be there. */
struct host_room host_rings_room(const struct moe_graph *g, int32_t device)
{
    struct host_room most = { 0, 0 };
    size_t read = 0;
    for (int32_t id = 0; id < g->n_tasks; id++) {
        const struct task *t = &g->task[id];
        if (t->kind != TASK_COMPUTE || t->device != device)
            continue;
        most = (struct host_room){ larger(most.in, HOST_RING), larger(most.out, HOST_RING) };
        for (int32_t i = t->first; t->listed && i < t->first + t->n; i++) {
            const struct host_room room = host_kernel_room(&g->kernel[i]);
            most = (struct host_room){ larger(most.in, room.in), larger(most.out, room.out) };
            read += room.in;
        }
    }
    read = read < HOST_RINGS * HOST_RING ? read : HOST_RINGS * HOST_RING;
    return (struct host_room){ larger(most.in, read), most.out };
}
