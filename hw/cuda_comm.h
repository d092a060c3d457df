/* SPDX-License-Identifier: Apache-2.0
 * cuda_comm.h - how rows get from rank to rank: grouped sends and receives, as NCCL has them.
 *
 * Between group_begin and group_end, calls only note what is to be sent and received. From group_end on, whatever is
 * queued on a rank's stream waits for its sends to have left and its receives to be there. A pair's sends and receives
 * match in their order, with equal sizes. */
#ifndef CUDA_COMM_H
#define CUDA_COMM_H

#include "err.h"
#include "team.h"

#include <cuda_runtime_api.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cuda_comm;

struct cuda_comm_ops {
    const char *name;
    int (*group_begin)(struct cuda_comm *, struct err *);
    /* rank: whose call it is, of those in this process. */
    int (*send)(struct cuda_comm *, int32_t rank, const void *, size_t bytes, int32_t peer, cudaStream_t,
                struct err *);
    int (*recv)(struct cuda_comm *, int32_t rank, void *, size_t bytes, int32_t peer, cudaStream_t, struct err *);
    int (*group_end)(struct cuda_comm *, struct err *);
    /* What is queued on this stream afterwards begins on all ranks at about the same time. */
    int (*barrier)(struct cuda_comm *, cudaStream_t, struct err *);
    /* Until all that is queued on a stream is done, or cannot be any more. */
    int (*wait)(struct cuda_comm *, cudaStream_t, struct err *);
    void (*close)(struct cuda_comm *);
};

struct cuda_comm { const struct cuda_comm_ops *ops; };

/* All ranks are here, on one GPU: copies on the receiver's stream. */
int cuda_comm_virtual(struct cuda_comm **, int32_t n_ranks, struct err *);
/* One here, the others in the team's processes: NCCL. All of them call this. */
int cuda_comm_nccl(struct cuda_comm **, struct team *, struct err *);

#endif
