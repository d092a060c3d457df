/* SPDX-License-Identifier: Apache-2.0
 * cuda.c - see standin.h: the part of libcudart that the module uses. */
#include "standin.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum what { RUN, RECORD, WAIT };

struct work {
    enum what what;
    void (*run)(const void *);
    void *data;
    struct CUevent_st *event;
    int64_t record; /* of the event that is marked or waited for */
};

struct CUstream_st { int number; struct work *work; size_t done, n, room; struct CUstream_st *next; };
/* queued: marks that are in a stream, or were; reached: the last that one has come to; stream: of the last. */
struct CUevent_st { int64_t queued, reached; int stream; double time; };
struct block { void *at; size_t bytes; struct block *next; };

static struct {
    enum standin_order order;
    uint64_t seed;
    int64_t lose, n_waits, n_events, n_streams, n_live;
    cudaError_t count;
    int n_devices, driver, device;
    size_t memory, used;
    double clock;
    struct CUstream_st *streams;
    struct block *blocks;
    char *calls;
    size_t length, room;
} all;

/* ---- records ---- */

static void note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void note(const char *fmt, ...)
{
    va_list args;
    if (all.room - all.length < 200) {
        all.room = 2 * all.room + 4096;
        all.calls = realloc(all.calls, all.room);
        if (!all.calls)
            abort();
    }
    va_start(args, fmt);
    all.length += (size_t)vsnprintf(all.calls + all.length, 200, fmt, args);
    va_end(args);
}

void standin_open(enum standin_order order, uint64_t seed, int64_t lose)
{
    all.order = order;
    all.seed = seed;
    all.lose = lose;
    all.n_waits = all.n_streams = 0;
    all.memory = 0;
    all.clock = 0;
    all.length = 0;
    standin_device(cudaSuccess, 1, CUDART_VERSION);
    standin_blas_clear();
}

void standin_device(cudaError_t count, int n, int driver)
{
    all.count = count;
    all.n_devices = n;
    all.device = 0;
    all.driver = driver;
}

int64_t standin_left(void) { return all.n_live; }
void standin_count(int n) { all.n_live += n; }
int64_t standin_waits(void) { return all.n_waits; }
void standin_memory(size_t bytes) { all.memory = bytes; }
const char *standin_calls(void) { return all.length ? all.calls : ""; }

/* ---- streams ---- */

static void push(cudaStream_t s, struct work w)
{
    if (s->n == s->room) {
        s->room = 2 * s->room + 16;
        s->work = realloc(s->work, s->room * sizeof *s->work);
        if (!s->work)
            abort();
    }
    s->work[s->n++] = w;
}

static bool can(const struct CUstream_st *s)
{
    const struct work *w = s->done < s->n ? &s->work[s->done] : NULL;
    return w && (w->what != WAIT || w->event->reached >= w->record);
}

static void step(cudaStream_t s)
{
    struct work *w = &s->work[s->done++];
    all.clock += 1e-3; /* ms */
    if (w->what == RUN)
        w->run(w->data);
    if (w->what == RECORD) {
        w->event->reached = w->record;
        w->event->time = all.clock;
    }
    free(w->data);
    if (s->done == s->n)
        s->done = s->n = 0;
}

/* Until nothing can go on; false: something waits for what never comes. */
static bool run_all(void)
{
    for (;;) {
        struct CUstream_st *chosen = NULL;
        int n = 0, waiting = 0;
        for (struct CUstream_st *s = all.streams; s; s = s->next) { /* the newest first */
            waiting += s->done < s->n;
            if (!can(s))
                continue;
            n++;
            all.seed = all.seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            if (!chosen || all.order == STANDIN_FIRST ||
                (all.order == STANDIN_ANY && (all.seed >> 33) % (unsigned)n == 0))
                chosen = s;
        }
        if (!chosen)
            return waiting == 0;
        step(chosen);
    }
}

cudaError_t standin_queue(cudaStream_t s, const char *what, double size, void (*run)(const void *), const void *work,
                          size_t n)
{
    void *data = malloc(n);
    if (!data)
        abort();
    memcpy(data, work, n);
    if (!s) { /* the default stream: after everything, before everything */
        const bool ran = run_all();
        run(data);
        free(data);
        return ran ? cudaSuccess : cudaErrorLaunchTimeout;
    }
    note("s%d %s %.0f\n", s->number, what, size);
    push(s, (struct work){ RUN, run, data, NULL, 0 });
    return cudaSuccess;
}

void standin_note(cudaStream_t s, const char *what, double size)
{
    note("s%d %s %.0f\n", s->number, what, size);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags)
{
    (void)flags;
    *s = calloc(1, sizeof **s);
    if (!*s)
        return cudaErrorMemoryAllocation;
    (*s)->number = (int)all.n_streams++;
    (*s)->next = all.streams;
    all.streams = *s;
    all.n_live++;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    struct CUstream_st **at = &all.streams;
    run_all();
    while (*at && *at != s)
        at = &(*at)->next;
    if (*at)
        *at = s->next;
    for (; s->done < s->n; s->done++)
        free(s->work[s->done].data);
    free(s->work);
    free(s);
    all.n_live--;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    *event = calloc(1, sizeof **event);
    all.n_live++;
    return *event ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    (void)flags;
    return cudaEventCreate(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    run_all();
    free(event);
    all.n_live--;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s)
{
    event->stream = s->number;
    push(s, (struct work){ RECORD, NULL, NULL, event, ++event->queued });
    return cudaSuccess;
}

/* As CUDA has it: for the last mark that is queued by now; for none, nothing. */
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags)
{
    (void)flags;
    if (event->queued > 0)
        note("s%d waits s%d\n", s->number, event->stream);
    if (all.n_waits++ != all.lose && event->queued > 0)
        push(s, (struct work){ WAIT, NULL, NULL, event, event->queued });
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    if (from->reached == 0 || to->reached == 0)
        return cudaErrorInvalidResourceHandle;
    if (from->reached < from->queued || to->reached < to->queued)
        return cudaErrorNotReady;
    *ms = (float)(to->time - from->time);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    run_all();
    return event->reached == event->queued ? cudaSuccess : cudaErrorNotReady;
}

/* More than is asked for, as a device may do. */
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    (void)s;
    return run_all() ? cudaSuccess : cudaErrorLaunchTimeout;
}

cudaError_t cudaDeviceSynchronize(void)
{
    return run_all() ? cudaSuccess : cudaErrorLaunchTimeout;
}

/* ---- memory ---- */

static cudaError_t take(void **p, size_t bytes)
{
    struct block *b = calloc(1, sizeof *b);
    *p = NULL;
    if (!b || (all.memory && all.used + bytes > all.memory) || !(b->at = malloc(bytes))) {
        free(b);
        return cudaErrorMemoryAllocation;
    }
    memset(b->at, 0xff, bytes);
    b->bytes = bytes;
    b->next = all.blocks;
    all.blocks = b;
    all.used += bytes;
    all.n_live++;
    *p = b->at;
    return cudaSuccess;
}

static cudaError_t give_back(void *p)
{
    run_all();
    for (struct block **at = &all.blocks; *at; at = &(*at)->next)
        if ((*at)->at == p) {
            struct block *b = *at;
            *at = b->next;
            all.used -= b->bytes;
            all.n_live--;
            free(b->at);
            free(b);
            return cudaSuccess;
        }
    return p ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes) { return take(p, bytes); }
cudaError_t cudaFree(void *p) { return give_back(p); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) { (void)flags; return take(p, bytes); }
cudaError_t cudaFreeHost(void *p) { return give_back(p); }

cudaError_t cudaMemGetInfo(size_t *left, size_t *whole)
{
    *whole = all.memory;
    *left = all.memory - all.used;
    return cudaSuccess;
}

struct copy { void *to; const void *from; size_t bytes; };

static void copy(const void *work)
{
    const struct copy *c = work;
    memcpy(c->to, c->from, c->bytes);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s)
{
    const struct copy c = { to, from, bytes };
    const char *const what = kind == cudaMemcpyDeviceToDevice ? "copy d2d" : "copy h2d";
    return standin_queue(s, what, (double)bytes, copy, &c, sizeof c);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    (void)kind;
    if (!run_all())
        return cudaErrorLaunchTimeout;
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    if (!run_all())
        return cudaErrorLaunchTimeout;
    memset(p, value, bytes);
    return cudaSuccess;
}

/* ---- the device ---- */

/* A count that fails leaves n alone. */
cudaError_t cudaGetDeviceCount(int *n)
{
    if (all.count == cudaSuccess)
        *n = all.n_devices;
    return all.count;
}

cudaError_t cudaGetDevice(int *device) { *device = all.device; return cudaSuccess; }

cudaError_t cudaSetDevice(int device)
{
    if (device < 0 || device >= all.n_devices)
        return cudaErrorInvalidDevice;
    all.device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *about, int device)
{
    memset(about, 0, sizeof *about);
    about->uuid.bytes[0] = (char)(device + 1);
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) { *version = all.driver; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t code) { return code == cudaErrorLaunchTimeout ? "hangs" : "an error"; }
