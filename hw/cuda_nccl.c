/* SPDX-License-Identifier: Apache-2.0
 * cuda_nccl.c - ranks in processes of their own, each on its GPU: rows go by NCCL's grouped sends and receives.
 *
 * The communicator does not block: whoever waits for others asks now and then whether they are still there, so that a
 * rank that dies ends the run and does not hang it. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_comm.h"

#include <stdlib.h>
#include <time.h>

#ifdef HAVE_NCCL_H

#include "cuda_nccl.h"

enum { OLDEST = NCCL_VERSION(2, 14, 0), NAP_NS = 20000, LOOKS = 500 /* naps between looks at the others */ };

struct nccl_comm {
    struct cuda_comm comm;
    struct nccl nccl;
    struct team *team;
    ncclComm_t at;
    char *token;       /* a byte for each rank on the device, which barriers send */
    cudaEvent_t reached;
};

static struct nccl_comm *of(struct cuda_comm *c)
{
    return (struct nccl_comm *)c;
}

static int failed(const struct nccl_comm *c, ncclResult_t code, const char *call, struct err *e)
{
    int device = -1;
    cudaGetDevice(&device);
    const char *more = c->nccl.last_error(c->at);
    return err_set(e, ERR_RUN, "rank %d, GPU %d: %s: %s%s%s", c->team->rank, device, call, c->nccl.error(code),
                   more && *more ? ": " : "", more ? more : "");
}

/* Naps for a moment, and looks now and then whether the others are there. */
static int wait_a_bit(struct nccl_comm *c, int *naps, struct err *e)
{
    nanosleep(&(struct timespec){ .tv_nsec = NAP_NS }, NULL);
    if (++*naps % LOOKS == 0)
        c->team->ops->alive(c->team, e);
    return e->code;
}

/* A call that has only begun is done once the communicator says so; nothing may be queued before. */
static int settle(struct nccl_comm *c, ncclResult_t code, const char *call, struct err *e)
{
    int naps = 0;
    while (code == ncclInProgress && !e->code) {
        const ncclResult_t asked = c->nccl.state(c->at, &code);
        if (asked != ncclSuccess)
            code = asked;
        if (code == ncclInProgress)
            wait_a_bit(c, &naps, e);
    }
    return e->code || code == ncclSuccess ? e->code : failed(c, code, call, e);
}

static int begin(struct cuda_comm *c, struct err *e)
{
    return e->code ? e->code : settle(of(c), of(c)->nccl.group_start(), "ncclGroupStart", e);
}

static int send_one(struct cuda_comm *c, int32_t rank, const void *from, size_t bytes, int32_t peer, cudaStream_t s,
                    struct err *e)
{
    (void)rank;
    return e->code ? e->code
                   : settle(of(c), of(c)->nccl.send(from, bytes, ncclInt8, peer, of(c)->at, s), "ncclSend", e);
}

static int receive_one(struct cuda_comm *c, int32_t rank, void *to, size_t bytes, int32_t peer, cudaStream_t s,
                       struct err *e)
{
    (void)rank;
    return e->code ? e->code : settle(of(c), of(c)->nccl.recv(to, bytes, ncclInt8, peer, of(c)->at, s), "ncclRecv", e);
}

static int end(struct cuda_comm *c, struct err *e)
{
    return e->code ? e->code : settle(of(c), of(c)->nccl.group_end(), "ncclGroupEnd", e);
}

/* A byte from everybody to everybody. */
static int barrier(struct cuda_comm *c, cudaStream_t s, struct err *e)
{
    struct nccl_comm *n = of(c);
    const int me = n->team->rank;
    if (n->team->size < 2)
        return e->code;
    begin(c, e);
    for (int i = 0; i < n->team->size; i++)
        if (i != me) {
            send_one(c, me, n->token + me, 1, i, s, e);
            receive_one(c, me, n->token + i, 1, i, s, e);
        }
    return end(c, e);
}

/* The device may be waiting for a rank that is no more: asking it costs little, and it is not part of any time. */
static int wait_for(struct cuda_comm *c, cudaStream_t s, struct err *e)
{
    struct nccl_comm *n = of(c);
    const int32_t rank = n->team->rank;
    int naps = 0;
    ncclResult_t state = ncclSuccess;
    CUDA_TRY(e, rank, cudaEventRecord(n->reached, s));
    while (!e->code) {
        const cudaError_t code = cudaEventQuery(n->reached);
        if (code == cudaSuccess)
            return 0;
        if (code != cudaErrorNotReady)
            return CUDA_TRY(e, rank, cudaEventQuery(n->reached));
        const ncclResult_t asked = n->nccl.state(n->at, &state);
        if (asked != ncclSuccess || (state != ncclSuccess && state != ncclInProgress))
            return failed(n, asked != ncclSuccess ? asked : state, "an exchange", e);
        wait_a_bit(n, &naps, e);
    }
    return e->code;
}

static void close_all(struct cuda_comm *c)
{
    struct nccl_comm *n = of(c);
    if (n->at) { /* without the others it would wait for them */
        if (n->team->lost)
            n->nccl.abort(n->at);
        else
            n->nccl.destroy(n->at);
    }
    if (n->reached)
        cudaEventDestroy(n->reached);
    cudaFree(n->token);
    free(n);
}

static const struct cuda_comm_ops nccl_ops = { "NCCL", begin, send_one, receive_one, end, barrier, wait_for,
                                               close_all };

static int load(struct nccl_comm *c, ncclUniqueId *id, struct err *e)
{
    int version = 0;
    if (nccl_load(&c->nccl, e) < 0)
        return e->code;
    const ncclResult_t code = c->nccl.version(&version);
    if (code != ncclSuccess)
        return failed(c, code, "ncclGetVersion", e);
    if (version < OLDEST)
        return err_set(e, ERR_INPUT, "NCCL %d.%d.%d: expected 2.14 or newer", version / 10000, version % 10000 / 100,
                       version % 100);
    if (c->team->rank > 0)
        return 0;
    const ncclResult_t made = c->nccl.unique_id(id);
    return made == ncclSuccess ? 0 : failed(c, made, "ncclGetUniqueId", e);
}

int cuda_comm_nccl(struct cuda_comm **out, struct team *team, struct err *e)
{
    ncclUniqueId id = { .internal = "" }, *all = NULL;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    struct nccl_comm *c = calloc(1, sizeof *c);
    if (!c || !(all = malloc(sizeof *all * (size_t)team->size)))
        err_set(e, ERR_MEMORY, "out of memory for %d ranks", team->size);
    if (c) {
        c->comm.ops = &nccl_ops;
        c->team = team;
    }
    if (!e->code && load(c, &id, e) == 0) {
        void *token = NULL;
        cuda_take(&token, (size_t)team->size, team->rank, "barriers", e);
        c->token = token;
        CUDA_TRY(e, team->rank, cudaEventCreateWithFlags(&c->reached, cudaEventDisableTiming));
    }
    if (team_agree(team, e) == 0 && team->ops->gather(team, &id, sizeof id, all, e) == 0) {
        config.blocking = 0;
        if (settle(c, c->nccl.open(&c->at, team->size, all[0], team->rank, &config), "ncclCommInitRankConfig", e) < 0)
            team->lost = true; /* others may wait for this rank within NCCL */
        team_agree(team, e);
    }
    free(all);
    *out = c ? &c->comm : NULL;
    return e->code;
}

#else

int cuda_comm_nccl(struct cuda_comm **out, struct team *team, struct err *e)
{
    *out = NULL;
    err_set(e, ERR_INPUT, "no NCCL: this module was built without nccl.h: put all ranks on one GPU with virtual_ranks "
            "= true, or build it where NCCL is");
    return team_agree(team, e);
}

#endif
