/* SPDX-License-Identifier: Apache-2.0
 * cuda_virtual.c - several ranks on one GPU: what one sends, the other's stream copies.
 *
 * At the end of a group every sender's stream marks that its buffers are ready, every receiver's waits for its senders'
 * marks, copies and marks that it is done, and every sender's waits for its receivers'. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_comm.h"

#include <stdlib.h>
#include <string.h>

struct half { int32_t rank, peer; void *at; size_t bytes; cudaStream_t stream; bool matched; };
struct list { struct half *half; size_t n, room; };

struct virtual_comm {
    struct cuda_comm comm;
    int32_t n_ranks;
    struct list sends, recvs;
    cudaEvent_t *ready, *done; /* [n_ranks] */
    bool *marked;              /* [n_ranks] ready or done, in this group */
};

static struct virtual_comm *of(struct cuda_comm *c)
{
    return (struct virtual_comm *)c;
}

static int begin(struct cuda_comm *c, struct err *e)
{
    of(c)->sends.n = of(c)->recvs.n = 0;
    return e->code;
}

static int add(struct list *l, struct half h, struct err *e)
{
    if (l->n == l->room) {
        const size_t room = 2 * l->room + 16;
        struct half *grown = realloc(l->half, room * sizeof *grown);
        if (!grown)
            return err_set(e, ERR_MEMORY, "out of memory for %zu transfers", room);
        l->half = grown;
        l->room = room;
    }
    l->half[l->n++] = h;
    return 0;
}

static int send_one(struct cuda_comm *c, int32_t rank, const void *at, size_t bytes, int32_t peer, cudaStream_t s,
                    struct err *e)
{
    union { const void *from; void *at; } u = { at }; /* is only read */
    return e->code ? e->code : add(&of(c)->sends, (struct half){ rank, peer, u.at, bytes, s, false }, e);
}

static int receive_one(struct cuda_comm *c, int32_t rank, void *at, size_t bytes, int32_t peer, cudaStream_t s,
                       struct err *e)
{
    return e->code ? e->code : add(&of(c)->recvs, (struct half){ rank, peer, at, bytes, s, false }, e);
}

/* The first send to this receive that is still without one. */
static struct half *sent(struct virtual_comm *v, const struct half *recv, struct err *e)
{
    for (size_t i = 0; i < v->sends.n; i++) {
        struct half *s = &v->sends.half[i];
        if (s->matched || s->rank != recv->peer || s->peer != recv->rank)
            continue;
        if (s->bytes != recv->bytes) {
            err_set(e, ERR_RUN, "rank %d sends %zu bytes to rank %d, which expects %zu", s->rank, s->bytes, s->peer,
                    recv->bytes);
            return NULL;
        }
        s->matched = true;
        return s;
    }
    err_set(e, ERR_RUN, "rank %d expects %zu bytes from rank %d, which sends none", recv->rank, recv->bytes,
            recv->peer);
    return NULL;
}

static int copy(struct virtual_comm *v, struct half *recv, struct err *e)
{
    struct half *s = sent(v, recv, e);
    if (!s)
        return e->code;
    CUDA_TRY(e, recv->rank, cudaStreamWaitEvent(recv->stream, v->ready[s->rank], 0));
    return CUDA_TRY(e, recv->rank, cudaMemcpyAsync(recv->at, s->at, s->bytes, cudaMemcpyDeviceToDevice, recv->stream));
}

static int end(struct cuda_comm *c, struct err *e)
{
    struct virtual_comm *v = of(c);
    const size_t n = (size_t)v->n_ranks;
    memset(v->marked, 0, n * sizeof *v->marked);
    for (size_t i = 0; i < v->sends.n; i++) {
        const struct half *s = &v->sends.half[i];
        if (!v->marked[s->rank])
            CUDA_TRY(e, s->rank, cudaEventRecord(v->ready[s->rank], s->stream));
        v->marked[s->rank] = true;
    }
    for (size_t i = 0; i < v->recvs.n && !e->code; i++)
        copy(v, &v->recvs.half[i], e);
    memset(v->marked, 0, n * sizeof *v->marked);
    for (size_t i = 0; i < v->recvs.n; i++) {
        const struct half *r = &v->recvs.half[i];
        if (!v->marked[r->rank])
            CUDA_TRY(e, r->rank, cudaEventRecord(v->done[r->rank], r->stream));
        v->marked[r->rank] = true;
    }
    for (size_t i = 0; i < v->sends.n && !e->code; i++) {
        const struct half *s = &v->sends.half[i];
        if (!s->matched)
            return err_set(e, ERR_RUN, "rank %d sends %zu bytes to rank %d, which expects none", s->rank, s->bytes,
                           s->peer);
        CUDA_TRY(e, s->rank, cudaStreamWaitEvent(s->stream, v->done[s->peer], 0));
    }
    return e->code;
}

/* All ranks are behind one event as it is. */
static int barrier(struct cuda_comm *c, cudaStream_t s, struct err *e)
{
    (void)c;
    (void)s;
    return e->code;
}

static int wait_for(struct cuda_comm *c, cudaStream_t s, struct err *e)
{
    (void)c;
    return CUDA_TRY(e, 0, cudaStreamSynchronize(s));
}

static void close_all(struct cuda_comm *c)
{
    struct virtual_comm *v = of(c);
    for (int32_t i = 0; i < v->n_ranks; i++) {
        if (v->ready && v->ready[i])
            cudaEventDestroy(v->ready[i]);
        if (v->done && v->done[i])
            cudaEventDestroy(v->done[i]);
    }
    free(v->ready);
    free(v->done);
    free(v->marked);
    free(v->sends.half);
    free(v->recvs.half);
    free(v);
}

static const struct cuda_comm_ops virtual_ops = { "virtual", begin, send_one, receive_one, end, barrier, wait_for,
                                                 close_all };

int cuda_comm_virtual(struct cuda_comm **out, int32_t n_ranks, struct err *e)
{
    const size_t n = (size_t)n_ranks;
    struct virtual_comm *v = calloc(1, sizeof *v);
    if (!v)
        return err_set(e, ERR_MEMORY, "out of memory for %d ranks", n_ranks);
    v->comm.ops = &virtual_ops;
    v->n_ranks = n_ranks;
    v->ready = calloc(n, sizeof *v->ready);
    v->done = calloc(n, sizeof *v->done);
    v->marked = calloc(n, sizeof *v->marked);
    *out = &v->comm;
    if (!v->ready || !v->done || !v->marked)
        return err_set(e, ERR_MEMORY, "out of memory for %d ranks", n_ranks);
    for (int32_t i = 0; i < n_ranks; i++) {
        CUDA_TRY(e, i, cudaEventCreateWithFlags(&v->ready[i], cudaEventDisableTiming));
        CUDA_TRY(e, i, cudaEventCreateWithFlags(&v->done[i], cudaEventDisableTiming));
    }
    return e->code;
}
