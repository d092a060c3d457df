/* SPDX-License-Identifier: Apache-2.0
 * cuda_calibrate.c - how long the functions that machine cuda runs take on this GPU, over sizes: what `moelab calibrate
 * --gpu` fits a machine file to.
 *
 * Work is queued behind kernels that take longer than queueing it does, and timed between two events, as tasks are.
 * Several virtual ranks do the same at the same time, each on a stream; a figure is that of the last to end. Operands
 * come from a ring larger than caches, so that weights come from memory. */
#include "config.h"

#include "cuda_calibrate.h"
#include "cuda_check.h"
#include "cuda_kernels.h"
#include "cuda_rank.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Of each size in each pass; passes lie seconds apart, since clocks change with temperature. */
enum { TRIES = 7, LEAST_TRIES = 3, PASSES = 3, MOST_SIZES = 300, MOST_RANKS = 64 };
static const double LONG_ENOUGH = 0.05;  /* s of tries of one size, after which the least will do */
static const double BETWEEN_EVENTS = 5e-5; /* s, or as often as MOST_TIMES: events have a resolution of 0.5 us */
enum { MOST_TIMES = 32, LAUNCHES = 256 };
/* Bytes, of all ranks together: of operands that are read, of what is written, and in the host's memory; and what the
 * largest kernel needs of the first two. */
static const size_t READ = (size_t)1 << 30, WRITTEN = (size_t)1 << 29, PINNED = (size_t)1 << 28;
static const size_t LEAST_READ = 1 << 27, LEAST_WRITTEN = 3 << 26;
enum { MOST_SETS = 64 };               /* of operands that a size has, as many as lie in the ring */
enum { PLUG = 1 << 24, PLUGS = 4 }; /* floats, how often for each rank and MOST_TIMES: what the GPU does meanwhile */
/* Kernels of rows: tokens if there is room, their width, outputs of each that are summed, experts to choose from. */
enum { TOKENS = 1 << 16, WIDTH = 4096, OUTPUTS = 4, EXPERTS = 256, CHOSEN = 8 };

struct bench {
    struct cuda_calibration *c;
    struct cuda cuda;          /* as much of a machine as its kernels need: a stream of each rank, rings */
    cudaEvent_t zero, end[MOST_RANKS];
    char *pinned;
    size_t at_pinned, at_written;
    int64_t set;               /* of operands, next */
    bool fp8;                  /* the GPU has it */
    void *rows, *moved, *lists; /* of kernels of rows */
    int32_t tokens;
    struct host_sample *sample; /* of all passes, one behind another; NULL: sizes are only counted */
    int n, n_sizes;
};

typedef int work_fn(struct bench *, const struct host_sample *, struct err *);

static cudaStream_t stream_of(const struct bench *b, int32_t rank)
{
    return b->cuda.stream[rank].stream;
}

/* ---- clocks ---- */

/* The work `times` over on every rank's stream, from when the GPU comes to it: seconds of one. */
static double time_once(struct bench *b, const struct host_sample *s, work_fn *work, int times, struct err *e)
{
    struct cuda_rank *r = b->cuda.rank;
    double longest = 0;
    for (int i = 0; i < PLUGS * b->cuda.n_ranks * (1 + times / MOST_TIMES); i++)
        CUDA_TRY(e, 0, cuda_move(stream_of(b, 0), PLUG, r->operands.at, r->results.at));
    CUDA_TRY(e, 0, cudaEventRecord(b->zero, stream_of(b, 0)));
    for (int32_t i = 1; i < b->cuda.n_ranks; i++)
        CUDA_TRY(e, i, cudaStreamWaitEvent(stream_of(b, i), b->zero, 0));
    for (int i = 0; i < times && !e->code; i++)
        work(b, s, e);
    for (int32_t i = 0; i < b->cuda.n_ranks; i++)
        CUDA_TRY(e, i, cudaEventRecord(b->end[i], stream_of(b, i)));
    CUDA_TRY(e, 0, cudaDeviceSynchronize());
    for (int32_t i = 0; i < b->cuda.n_ranks; i++) {
        float ms = 0;
        CUDA_TRY(e, i, cudaEventElapsedTime(&ms, b->zero, b->end[i]));
        longest = fmax(longest, 1e-3 * (double)ms);
    }
    return fmax(longest / times, 1e-9);
}

/* One size. times: of the work between two events; 0: so that they lie far enough apart. */
static void measure(struct bench *b, struct host_sample s, work_fn *work, int times, struct err *e)
{
    double took[TRIES], sum = 0;
    int n = 0;
    b->n_sizes += !b->sample;
    if (!b->sample || e->code)
        return;
    const double first = time_once(b, &s, work, 1, e); /* does not count */
    if (times == 0)
        times = (int)fmin(MOST_TIMES, ceil(BETWEEN_EVENTS / first));
    while (n < TRIES && (n < LEAST_TRIES || sum < LONG_ENOUGH) && !e->code) {
        took[n] = time_once(b, &s, work, times, e);
        sum += times * took[n++];
    }
    if (e->code)
        return;
    b->sample[b->n++] = host_sample_of(s, took, n);
    if (b->c->step)
        b->c->step(b->c->taker, b->n, PASSES * b->n_sizes);
}

/* ---- what is measured ---- */

static struct kernel product_of(const struct host_sample *s)
{
    return (struct kernel){ .precision = s->precision, .groups = s->groups, .shape = s->shape };
}

static int multiply(struct bench *b, const struct host_sample *s, struct err *e)
{
    const struct kernel k = product_of(s);
    const int64_t n = b->cuda.n_ranks, first = b->set++ * n % b->cuda.products.n_calls;
    for (int32_t i = 0; i < n; i++)
        cuda_run_kernel(&b->cuda, &b->cuda.rank[i], &b->cuda.stream[i], &k, first + i, e);
    return e->code;
}

/* One task's products, as runs list them before a step; of each rank, all around its ring. */
static void measure_products(struct bench *b, const struct host_sample *s, struct err *e)
{
    const struct kernel k = product_of(s);
    const double element = k.precision == PREC_FP8 ? 1 : (double)b->cuda.element;
    const double each = element * (double)k.groups * (double)(k.shape.rows + k.shape.n) * (double)k.shape.k;
    int sets = b->sample ? (int)fmin(MOST_SETS, ceil((double)b->cuda.rank[0].operands.room / each)) : 0;
    cuda_products_clear(&b->cuda.products);
    for (b->set = 0; sets > 0 && !e->code; sets--)
        for (int32_t i = 0; i < b->cuda.n_ranks && !e->code; i++) {
            int64_t call;
            cuda_kernel_list(&b->cuda, &b->cuda.rank[i], &k, &call, e);
        }
    cuda_products_upload(&b->cuda.products, 0, e);
    measure(b, *s, multiply, 0, e);
}

/* Bytes alone, or squares for as many FLOPs. */
static int plain(struct bench *b, const struct host_sample *s, struct err *e)
{
    for (int32_t i = 0; i < b->cuda.n_ranks; i++)
        cuda_run_plain(&b->cuda, &b->cuda.rank[i], &b->cuda.stream[i], s->flops, s->bytes, e);
    return e->code;
}

/* Where the next bytes of a ring begin. */
static size_t next(size_t *at, size_t room, size_t bytes)
{
    bytes = (bytes + 255) / 256 * 256;
    *at = *at + bytes > room ? 0 : *at;
    *at += bytes;
    return *at - bytes;
}

static int copy(struct bench *b, const struct host_sample *s, struct err *e)
{
    const bool within = s->what == GPU_COPY, reads = s->what == HOST_READ;
    const size_t bytes = (size_t)(within ? s->bytes / 2 : s->bytes);
    const enum cudaMemcpyKind kind = within ? cudaMemcpyDeviceToDevice
                                     : reads ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    for (int32_t i = 0; i < b->cuda.n_ranks; i++) {
        struct cuda_rank *r = &b->cuda.rank[i];
        char *to = (char *)r->results.at + next(&b->at_written, r->results.room, bytes);
        char *host = within ? NULL : b->pinned + next(&b->at_pinned, PINNED, bytes);
        const char *from = within ? (char *)r->operands.at + next(&r->at_operands, r->operands.room, bytes) : host;
        CUDA_TRY(e, i, cudaMemcpyAsync(within || reads ? to : host, within || reads ? from : to, bytes, kind,
                                       stream_of(b, i)));
    }
    return e->code;
}

/* Every rank sends each other one as many bytes. */
static int exchange(struct bench *b, const struct host_sample *s, struct err *e)
{
    const struct cuda_comm_ops *ops = b->cuda.comm->ops;
    const size_t bytes = (size_t)s->bytes, all = bytes * (size_t)b->cuda.n_ranks;
    ops->group_begin(b->cuda.comm, e);
    for (int32_t i = 0; i < b->cuda.n_ranks && !e->code; i++) {
        struct cuda_rank *r = &b->cuda.rank[i];
        const char *from = (char *)r->operands.at + next(&r->at_operands, r->operands.room, all);
        for (int32_t j = 0; j < b->cuda.n_ranks && !e->code; j++) {
            if (j == i)
                continue;
            ops->send(b->cuda.comm, i, from + bytes * (size_t)j, bytes, j, stream_of(b, i), e);
            ops->recv(b->cuda.comm, i, (char *)r->results.at + bytes * (size_t)j, bytes, j, stream_of(b, i), e);
        }
    }
    return e->code ? e->code : ops->group_end(b->cuda.comm, e);
}

/* Nothing, as nearly as a kernel can. */
static int launch(struct bench *b, const struct host_sample *s, struct err *e)
{
    struct cuda_rank *r = b->cuda.rank;
    (void)s;
    return CUDA_TRY(e, 0, cuda_move(stream_of(b, 0), 1, r->operands.at, r->results.at));
}

/* Kernels of rows, of one rank alone. */
static int rows_kernel(struct bench *b, const struct host_sample *s, struct err *e)
{
    const size_t n = (size_t)b->tokens, bytes = WIDTH * b->cuda.element;
    const int32_t *order = b->lists, *before = order + n, *first = before + n, *row = first + n + 1;
    const struct cuda_combine lists = { before, first, row, (const float *)(const void *)(row + OUTPUTS * n) };
    struct cuda_rank *r = b->cuda.rank;
    switch (s->key.op) {
    case LATENCY_PERMUTE:
        return CUDA_TRY(e, 0, cuda_gather(stream_of(b, 0), bytes, b->tokens, order, b->rows, b->moved));
    case LATENCY_COMBINE:
        return CUDA_TRY(e, 0, cuda_combine(stream_of(b, 0), b->cuda.half, WIDTH, b->tokens, lists, b->rows, b->moved));
    default: {
        const size_t at = next(&r->at_operands, r->operands.room, n * EXPERTS * sizeof(float));
        return CUDA_TRY(e, 0, cuda_top_k(stream_of(b, 0), b->tokens, EXPERTS, CHOSEN,
                                         (const float *)(const void *)((char *)r->operands.at + at), r->results.at));
    }
    }
}

/* ---- sizes ---- */

/* In fp8 each is a call of its own, so that groups say nothing new. */
static void gemms(struct bench *b, enum precision p, struct err *e)
{
    static const struct gemm_group matrix[] = { { 0, 1536, 2560 }, { 0, 2560, 1536 }, { 0, 4096, 1792 },
                                                { 0, 896, 4096 } };
    static const int32_t groups[] = { 1, 4, 16 };
    const size_t n = sizeof matrix / sizeof *matrix;
    for (size_t i = 0; i < (p == PREC_BF16 ? n : n / 2) * (sizeof groups / sizeof *groups);
         i += p == PREC_FP8 ? sizeof groups / sizeof *groups : 1)
        for (int64_t rows = 1; rows <= 1024; rows *= groups[i % 3] == 1 ? 2 : 4) {
            struct host_sample s = { .what = HOST_GEMM, .precision = p, .groups = groups[i % 3],
                                     .shape = matrix[i / 3] };
            s.shape.rows = rows;
            measure_products(b, &s, e);
        }
    for (int32_t of = 1; of <= 8; of *= 8) /* as many rows, together and in groups of 512 */
        measure_products(b, &(struct host_sample){ .what = HOST_GEMM, .precision = p, .groups = of,
                                                   .shape = { 4096 / of, 4096, 1792 } }, e);
}

static void squares(struct bench *b, enum precision p, struct err *e)
{
    for (double flops = 4e9; flops < 1e11; flops *= 4)
        measure(b, (struct host_sample){ .what = GPU_SQUARES, .precision = p, .flops = flops }, plain, 0, e);
}

static void bytes(struct bench *b, struct err *e)
{
    const double n = b->cuda.n_ranks;
    for (double most = 4096; most <= 5e8; most *= 4)
        if (most <= 5e8 / n) {
            measure(b, (struct host_sample){ .what = HOST_MOVE, .precision = PREC_BF16, .bytes = most }, plain, 0, e);
            measure(b, (struct host_sample){ .what = GPU_COPY, .bytes = most }, copy, 0, e);
        }
    for (double most = 4096; most <= (double)PINNED / 2 / n; most *= 4) {
        measure(b, (struct host_sample){ .what = HOST_READ, .bytes = most }, copy, 0, e);
        measure(b, (struct host_sample){ .what = GPU_WRITE, .bytes = most }, copy, 0, e);
    }
    for (double most = 256; b->cuda.n_ranks > 1 && most * n <= (double)WRITTEN / 2 / n && most <= 1 << 24; most *= 4)
        measure(b, (struct host_sample){ .what = HOST_EXCHANGE, .bytes = most }, exchange, 0, e);
}

static void kernels(struct bench *b, struct err *e)
{
    const double n = b->tokens, row = (double)(WIDTH * b->cuda.element), word = 4;
    const struct { enum latency_op op; int64_t width, k; double bytes; } list[] = {
        { LATENCY_PERMUTE, WIDTH, 1, n * (2 * row + word) },
        { LATENCY_COMBINE, WIDTH, OUTPUTS, n * ((OUTPUTS + 2) * row + (2 + 2 * OUTPUTS) * word) },
        { LATENCY_TOP_K, EXPERTS, CHOSEN, n * (EXPERTS + CHOSEN) * word },
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        measure(b, (struct host_sample){ .what = GPU_KERNEL, .precision = PREC_BF16, .bytes = list[i].bytes,
                                         .key = { .op = list[i].op, .n = list[i].width, .k = list[i].k, .rows = n } },
                rows_kernel, 0, e);
}

/* How long the host takes to queue a kernel, whatever the GPU does. */
static void queue(struct bench *b, struct err *e)
{
    const struct host_sample s = { .what = GPU_QUEUE };
    double took[TRIES];
    b->n_sizes += !b->sample;
    for (int i = 0; b->sample && i < TRIES && !e->code; i++) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        for (int j = 0; j < LAUNCHES; j++)
            launch(b, &s, e);
        clock_gettime(CLOCK_MONOTONIC, &to);
        CUDA_TRY(e, 0, cudaDeviceSynchronize());
        took[i] = ((double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec)) / LAUNCHES;
    }
    if (b->sample && !e->code)
        b->sample[b->n++] = host_sample_of(s, took, TRIES);
}

/* ---- memory ---- */

static void set_precision(struct bench *b, enum precision p)
{
    b->cuda.half = p != PREC_FP32;
    b->cuda.element = b->cuda.half ? 2 : sizeof(float);
}

/* Random numbers of the precision that is set, a block of them again and again. */
static int fill(const struct bench *b, void *to, size_t room, struct err *e)
{
    enum { BLOCK = 1 << 20 };
    float *noise = malloc(BLOCK * sizeof *noise);
    void *made = noise ? malloc(BLOCK * sizeof *noise) : NULL;
    if (!made)
        err_set(e, ERR_MEMORY, "out of memory for operands");
    for (size_t i = 0; made && i < BLOCK; i++)
        noise[i] = (float)(2 * moe_unit(moe_mix(i)) - 1);
    if (made)
        cuda_from_floats(&b->cuda, BLOCK, noise, made);
    const size_t block = BLOCK * b->cuda.element;
    for (size_t at = 0; at < room && !e->code; at += block)
        CUDA_TRY(e, 0, cudaMemcpy((char *)to + at, made, room - at < block ? room - at : block,
                                  cudaMemcpyHostToDevice));
    free(noise);
    free(made);
    return e->code;
}

static int fill_rings(struct bench *b, enum precision p, struct err *e)
{
    set_precision(b, p);
    for (int32_t i = 0; b->sample && i < b->cuda.n_ranks && !e->code; i++)
        fill(b, b->cuda.rank[i].operands.at, b->cuda.rank[i].operands.room, e);
    return e->code;
}

static int open_ranks(struct bench *b, struct err *e)
{
    const size_t n = (size_t)b->c->n_ranks;
    struct cuda *c = &b->cuda;
    c->n_ranks = c->n_here = b->c->n_ranks;
    c->rank = calloc(n, sizeof *c->rank);
    c->stream = calloc(n * RANK_STREAMS, sizeof *c->stream);
    if (!c->rank || !c->stream)
        return err_set(e, ERR_MEMORY, "out of memory for %zu ranks", n);
    for (int32_t i = 0; i < c->n_ranks && !e->code; i++) {
        struct cuda_rank *r = &c->rank[i];
        struct cuda_stream *s = &c->stream[i];
        r->rank = i;
        CUDA_TRY(e, i, cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
        BLAS_TRY(e, i, cublasCreate(&s->blas));
        BLAS_TRY(e, i, cublasSetStream(s->blas, s->stream));
        CUDA_TRY(e, i, cudaEventCreate(&b->end[i]));
        const size_t read = READ / n, written = WRITTEN / n;
        cuda_take_more(&r->operands.at, &r->operands.room, read < LEAST_READ ? LEAST_READ : read, i, "operands", e);
        cuda_take_more(&r->results.at, &r->results.room, written < LEAST_WRITTEN ? LEAST_WRITTEN : written, i,
                       "results", e);
    }
    CUDA_TRY(e, 0, cudaEventCreate(&b->zero));
    return e->code || n == 1 ? e->code : cuda_comm_virtual(&c->comm, c->n_ranks, e);
}

/* As many tokens as there is room for, and lists that name all rows once, in no order. */
static int open_rows(struct bench *b, struct err *e)
{
    const size_t row = WIDTH * 2;
    size_t left = 0, all = 0;
    if (b->c->n_ranks > 1)
        return e->code; /* they are not measured */
    CUDA_TRY(e, 0, cudaMemGetInfo(&left, &all));
    for (b->tokens = TOKENS; b->tokens > 1024 && (OUTPUTS + 2) * row * (size_t)b->tokens > left / 4 * 3;)
        b->tokens /= 2;
    if (b->tokens < TOKENS)
        snprintf(b->c->note, sizeof b->c->note, "kernels of rows with %d tokens instead of %d, for want of memory",
                 b->tokens, TOKENS);
    const size_t n = (size_t)b->tokens, words = (3 + 2 * OUTPUTS) * n + 1;
    int32_t *list = malloc(words * sizeof *list), *row_of = list ? list + 3 * n + 1 : NULL;
    const float weight = 1.0f / OUTPUTS;
    if (!list)
        return err_set(e, ERR_MEMORY, "out of memory for lists of rows");
    for (size_t i = 0; i < n; i++) {
        const size_t j = moe_mix(i) % (i + 1); /* a permutation */
        list[i] = list[j];
        list[j] = (int32_t)i;
        list[n + i] = (int32_t)i;
    }
    for (size_t i = 0; i <= n; i++)
        list[2 * n + i] = (int32_t)(OUTPUTS * i);
    for (size_t i = 0; i < OUTPUTS * n; i++) {
        row_of[i] = (int32_t)(n * (1 + i % OUTPUTS)) + list[i / OUTPUTS];
        memcpy(&row_of[OUTPUTS * n + i], &weight, sizeof weight);
    }
    cuda_take(&b->rows, (OUTPUTS + 1) * n * row, 0, "rows", e);
    cuda_take(&b->moved, n * row, 0, "rows", e);
    cuda_take(&b->lists, words * sizeof *list, 0, "lists of rows", e);
    CUDA_TRY(e, 0, cudaMemcpy(b->lists, list, words * sizeof *list, cudaMemcpyHostToDevice));
    free(list);
    set_precision(b, PREC_BF16);
    return e->code ? e->code : fill(b, b->rows, (OUTPUTS + 1) * n * row, e);
}

static void close_bench(struct bench *b)
{
    struct cuda *c = &b->cuda;
    for (int32_t i = 0; c->rank && c->stream && i < c->n_ranks; i++) {
        if (c->stream[i].blas)
            cublasDestroy(c->stream[i].blas);
        if (c->stream[i].stream)
            cudaStreamDestroy(c->stream[i].stream);
        if (b->end[i])
            cudaEventDestroy(b->end[i]);
        cudaFree(c->stream[i].workspace.at);
        cudaFree(c->rank[i].operands.at);
        cudaFree(c->rank[i].results.at);
    }
    if (b->zero)
        cudaEventDestroy(b->zero);
    if (c->comm)
        c->comm->ops->close(c->comm);
    if (b->pinned)
        cudaFreeHost(b->pinned);
    cuda_products_free(&c->products);
    cudaFree(b->rows);
    cudaFree(b->moved);
    cudaFree(b->lists);
    free(c->rank);
    free(c->stream);
    free(b->sample);
}

/* ---- all of it ---- */

static int describe(struct bench *b, cublasHandle_t blas, struct err *e)
{
    struct cuda_calibration *c = b->c;
    struct cudaDeviceProp p = { 0 };
    int driver = 0, runtime = 0, lib = 0, clock = 0, width = 0;
    size_t left, all = 0;
    CUDA_TRY(e, 0, cudaGetDeviceProperties(&p, 0));
    CUDA_TRY(e, 0, cudaDriverGetVersion(&driver));
    CUDA_TRY(e, 0, cudaRuntimeGetVersion(&runtime));
    BLAS_TRY(e, 0, cublasGetVersion(blas, &lib));
    CUDA_TRY(e, 0, cudaMemGetInfo(&left, &all));
    if (cudaDeviceGetAttribute(&clock, cudaDevAttrMemoryClockRate, 0) != cudaSuccess ||
        cudaDeviceGetAttribute(&width, cudaDevAttrGlobalMemoryBusWidth, 0) != cudaSuccess)
        clock = 0; /* not every driver says */
    snprintf(c->name, sizeof c->name, "%.60s", p.name);
    snprintf(c->versions, sizeof c->versions, "moelab %s, %.60s (compute capability %d.%d, %d SMs), driver %d.%d, CUDA "
             "runtime %d.%d, cuBLAS %d.%d.%d (%s)", PACKAGE_VERSION, p.name, p.major, p.minor, p.multiProcessorCount,
             driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10, lib / 10000, lib % 10000 / 100,
             lib % 100, cuda_products_grouped() ? "products of a task in one call" : "products one by one");
    b->fp8 = 10 * p.major + p.minor >= CUDA_FP8_CAPABILITY;
    for (int32_t i = 0; b->fp8 && i < c->n_ranks; i++) {
        struct cuda_stream *s = &b->cuda.stream[i];
        cuda_take_more(&s->workspace.at, &s->workspace.room, CUDA_FP8_WORKSPACE, i, "cuBLASLt", e);
    }
    c->sms = p.multiProcessorCount;
    c->memory = (double)all;
    c->mem_bandwidth = 2 * 1e3 * (double)clock * (double)width / 8; /* kHz, both edges, bits */
    return e->code;
}

static void pass(struct bench *b, struct err *e)
{
    static const enum precision all[] = { PREC_FP32, PREC_BF16 };
    for (size_t i = 0; i < sizeof all / sizeof *all && fill_rings(b, all[i], e) == 0; i++) {
        gemms(b, all[i], e);
        squares(b, all[i], e);
    }
    if (b->fp8) /* the bytes of bf16 will do */
        gemms(b, PREC_FP8, e);
    bytes(b, e);
    if (b->c->n_ranks == 1)
        kernels(b, e);
    measure(b, (struct host_sample){ .what = GPU_LAUNCH }, launch, LAUNCHES, e);
    measure(b, (struct host_sample){ .what = GPU_EVENTS }, launch, 1, e);
    queue(b, e);
}

int cuda_calibrate(struct cuda_calibration *c, struct err *e)
{
    struct bench b = { .c = c };
    if (c->n_ranks < 1 || c->n_ranks > MOST_RANKS)
        return err_set(e, ERR_INPUT, "%d virtual ranks, expected 1 to %d", c->n_ranks, MOST_RANKS);
    if (cuda_find_device(e) < 0 || CUDA_TRY(e, 0, cudaSetDevice(0)) < 0)
        return e->code;
    if (open_ranks(&b, e) == 0 && describe(&b, b.cuda.stream[0].blas, e) == 0 && open_rows(&b, e) == 0 &&
        CUDA_TRY(e, 0, cudaHostAlloc((void **)&b.pinned, PINNED, cudaHostAllocDefault)) == 0) {
        memset(b.pinned, 0x3c, PINNED);
        pass(&b, e); /* counts */
        b.sample = malloc(sizeof *b.sample * PASSES * (size_t)b.n_sizes);
        if (!b.sample)
            err_set(e, ERR_MEMORY, "out of memory for samples");
    }
    for (int i = 0; i < PASSES && !e->code; i++)
        pass(&b, e);
    for (int i = 0; i < b.n_sizes && !e->code; i++) {
        const struct host_sample s = host_sample_middle(&b.sample[i], b.n_sizes, PASSES);
        c->take(c->taker, &s);
    }
    close_bench(&b);
    return e->code;
}
