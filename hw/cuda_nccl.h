/* SPDX-License-Identifier: Apache-2.0
 * cuda_nccl.h - NCCL, as far as the module uses it. It is loaded when ranks are processes: one GPU needs none. */
#ifndef CUDA_NCCL_H
#define CUDA_NCCL_H

#include "err.h"

#include <nccl.h>

struct nccl {
    ncclResult_t (*version)(int *);
    ncclResult_t (*unique_id)(ncclUniqueId *);
    ncclResult_t (*open)(ncclComm_t *, int n_ranks, ncclUniqueId, int rank, ncclConfig_t *);
    ncclResult_t (*destroy)(ncclComm_t);
    ncclResult_t (*abort)(ncclComm_t);
    ncclResult_t (*state)(ncclComm_t, ncclResult_t *);
    ncclResult_t (*group_start)(void);
    ncclResult_t (*group_end)(void);
    ncclResult_t (*send)(const void *, size_t, ncclDataType_t, int peer, ncclComm_t, cudaStream_t);
    ncclResult_t (*recv)(void *, size_t, ncclDataType_t, int peer, ncclComm_t, cudaStream_t);
    const char *(*error)(ncclResult_t);
    const char *(*last_error)(ncclComm_t);
};

/* $MOELAB_NCCL, or libnccl.so.2; stays loaded. */
int nccl_load(struct nccl *, struct err *);

#endif
