/* SPDX-License-Identifier: Apache-2.0
 * standin.h - a CUDA runtime, cuBLAS and our kernels for tests: on the host's memory, without a GPU.
 *
 * What is queued on a stream stays there until somebody waits for it, and then streams run one piece of work at a time
 * in an order that is as bad as the seed makes it: only what a stream or an event orders is ordered. So whoever forgets
 * an event reads what is not there yet. Every call that is queued is recorded. */
#ifndef STANDIN_H
#define STANDIN_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Which stream goes on: the last that can, the first that can, or any. */
enum standin_order { STANDIN_LAST, STANDIN_FIRST, STANDIN_ANY };

/* Forgets records and what went wrong. lose: the number of the next wait for an event that is not made, or -1. */
void standin_open(enum standin_order, uint64_t seed, int64_t lose);
/* Device memory and events and streams that nobody has freed. */
int64_t standin_left(void);
int64_t standin_waits(void);
/* Bytes that the device has; 0: as many as asked for. */
void standin_memory(size_t);
/* What is asked about the devices answers; standin_open() makes it one device, and a driver as old as the runtime. */
void standin_device(cudaError_t count, int n, int driver);
/* Compute capability of the devices, 9.0 unless told. */
void standin_capability(int major, int minor);
/* One line for each call that was queued, in order: "s1 copy d2d 40", "s0 waits s1" (for what is marked there). Streams
 * by number, from 0. */
const char *standin_calls(void);

/* Calls of cuBLAS since standin_open(), in the order in which they were queued: as it has them, columns first. */
struct standin_product { int m, n, k; const void *a, *b; void *c; };
struct standin_call { int n; struct standin_product *product; };
size_t standin_blas(const struct standin_call **);
void standin_blas_clear(void);
void standin_blas_note(struct standin_product);
/* What bf16 keeps of a number. */
uint16_t standin_half(float);
/* So many more things that somebody has to free. */
void standin_count(int);

/* Work that runs when its stream comes to it; `work` is copied. */
cudaError_t standin_queue(cudaStream_t, const char *what, double size, void (*run)(const void *work), const void *work,
                          size_t n);

/* A line of the record, and nothing else. */
void standin_note(cudaStream_t, const char *what, double size);

/* NCCL between processes that the test forks (nccl.c): sockets for n ranks, before; then each says which it is. A group
 * moves its bytes when its stream comes to it, and sends and receives that do not match end the process with a word on
 * stderr. dies: the group at which this rank ends without one, or -1. */
void standin_nccl_open(int n_ranks);
void standin_nccl_become(int rank, int dies);
void standin_nccl_close(void);

#endif
