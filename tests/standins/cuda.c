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

/* copy: of a captured stream, on which one launch of its graph runs. */
struct CUstream_st { int number; bool copy; struct work *work; size_t done, n, room; struct CUstream_st *next; };
/* queued: marks that are in a stream, or were; reached: the last that one has come to; stream: of the last; captured:
 * the last became part of a graph, and tells nothing outside of it. */
struct CUevent_st { int64_t queued, reached; int stream; double time; bool captured; };
struct block { void *at; size_t bytes; struct block *next; };

/* What was captured: per stream its work, whose events are the graph's own; and those of a launch. External records
 * are real. */
struct captured { int stream; struct work *work; size_t *bytes, n, room; bool joined; };
struct CUgraph_st { cudaStream_t origin; struct captured *part; size_t n_parts; int64_t n_marks; };
struct CUgraphExec_st { struct CUgraph_st graph; };
struct mark { cudaEvent_t event; int64_t id; size_t part; };

static struct {
    struct CUgraph_st *capture; /* under way; or NULL */
    struct mark *mark;          /* of events that were recorded in it, the last of each */
    size_t n_marks, room_marks;
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

/* ---- graphs ---- */

/* Of the graph that is being captured, or NULL: the stream does not take part in it. joins: from now on it does. */
static struct captured *part_of(const struct CUstream_st *s, bool joins)
{
    struct CUgraph_st *g = all.capture;
    for (size_t i = 0; g && i < g->n_parts; i++)
        if (g->part[i].stream == s->number)
            return &g->part[i];
    if (!g || !joins)
        return NULL;
    g->part = realloc(g->part, (g->n_parts + 1) * sizeof *g->part);
    if (!g->part)
        abort();
    g->part[g->n_parts] = (struct captured){ .stream = s->number };
    return &g->part[g->n_parts++];
}

static void keep(struct captured *p, struct work w, size_t bytes)
{
    if (p->n == p->room) {
        p->room = 2 * p->room + 16;
        p->work = realloc(p->work, p->room * sizeof *p->work);
        p->bytes = realloc(p->bytes, p->room * sizeof *p->bytes);
        if (!p->work || !p->bytes)
            abort();
    }
    p->bytes[p->n] = bytes;
    p->work[p->n++] = w;
}

static struct mark *mark_of(cudaEvent_t event)
{
    for (size_t i = 0; i < all.n_marks; i++)
        if (all.mark[i].event == event)
            return &all.mark[i];
    return NULL;
}

static void set_mark(cudaEvent_t event, int64_t id, size_t part)
{
    struct mark *m = mark_of(event);
    if (!m) {
        if (all.n_marks == all.room_marks) {
            all.room_marks = 2 * all.room_marks + 64;
            all.mark = realloc(all.mark, all.room_marks * sizeof *all.mark);
            if (!all.mark)
                abort();
        }
        m = &all.mark[all.n_marks++];
    }
    *m = (struct mark){ event, id, part };
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode)
{
    (void)mode;
    if (all.capture)
        return cudaErrorIllegalState;
    all.capture = calloc(1, sizeof *all.capture);
    if (!all.capture)
        abort();
    all.capture->origin = s;
    all.n_marks = 0;
    part_of(s, true)->joined = true;
    return cudaSuccess;
}

static void free_parts(struct CUgraph_st *g)
{
    for (size_t i = 0; i < g->n_parts; i++) {
        for (size_t j = 0; j < g->part[i].n; j++)
            free(g->part[i].work[j].data);
        free(g->part[i].work);
        free(g->part[i].bytes);
    }
    free(g->part);
}

/* Every stream has to have come back: what it did last is waited for, directly or through others. */
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph)
{
    struct CUgraph_st *g = all.capture;
    *graph = NULL;
    if (!g || g->origin != s)
        return cudaErrorIllegalState;
    all.capture = NULL;
    for (size_t i = 0; i < g->n_parts; i++)
        if (!g->part[i].joined) {
            free_parts(g);
            free(g);
            return cudaErrorStreamCaptureUnjoined;
        }
    *graph = g;
    all.n_live++;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags)
{
    (void)flags;
    struct CUgraphExec_st *x = calloc(1, sizeof *x);
    if (!x)
        abort();
    x->graph = *graph;
    x->graph.part = calloc(graph->n_parts, sizeof *graph->part);
    for (size_t i = 0; i < graph->n_parts; i++) {
        const struct captured *p = &graph->part[i];
        x->graph.part[i] = (struct captured){ .stream = p->stream };
        for (size_t j = 0; j < p->n; j++) {
            struct work w = p->work[j];
            if (w.data) {
                w.data = malloc(p->bytes[j] + 1);
                memcpy(w.data, p->work[j].data, p->bytes[j]);
            }
            keep(&x->graph.part[i], w, p->bytes[j]);
        }
    }
    all.n_live++;
    *out = x;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    free_parts(graph);
    free(graph);
    all.n_live--;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x)
{
    free_parts(&x->graph);
    free(x);
    all.n_live--;
    return cudaSuccess;
}

struct release { struct CUevent_st *event; };

/* A launch's streams and events go once the stream that launched has come past it. */
static void release(const void *work)
{
    const struct release *r = work;
    free(r->event);
    for (struct CUstream_st **at = &all.streams; *at;) {
        struct CUstream_st *s = *at;
        if (s->copy && s->done == s->n) {
            *at = s->next;
            free(s->work);
            free(s);
        } else {
            at = &s->next;
        }
    }
}

/* Streams of its own, which begin when the launching one comes to it and which that one waits for. */
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s)
{
    const struct CUgraph_st *g = &x->graph;
    const int64_t n_own = g->n_marks + 1 + (int64_t)g->n_parts;
    struct CUevent_st *own = calloc((size_t)n_own, sizeof *own);
    struct CUstream_st *copy[g->n_parts];
    if (!own)
        abort();
    note("s%d launch %zu\n", s->number, g->n_parts);
    push(s, (struct work){ RECORD, NULL, NULL, &own[g->n_marks], 1 });
    for (size_t i = 0; i < g->n_parts; i++) {
        const struct captured *p = &g->part[i];
        copy[i] = calloc(1, sizeof *copy[i]);
        if (!copy[i])
            abort();
        copy[i]->number = p->stream;
        copy[i]->copy = true;
        push(copy[i], (struct work){ WAIT, NULL, NULL, &own[g->n_marks], 1 });
        for (size_t j = 0; j < p->n; j++) {
            struct work w = p->work[j];
            if (w.data) {
                w.data = malloc(p->bytes[j] + 1);
                memcpy(w.data, p->work[j].data, p->bytes[j]);
            }
            if (w.what == RECORD && w.record == 0) { /* external */
                w.record = ++w.event->queued;
            } else if (w.what != RUN) {
                w.event = &own[w.record - 1];
                w.record = 1;
            }
            push(copy[i], w);
        }
        push(copy[i], (struct work){ RECORD, NULL, NULL, &own[g->n_marks + 1 + (int64_t)i], 1 });
        push(s, (struct work){ WAIT, NULL, NULL, &own[g->n_marks + 1 + (int64_t)i], 1 });
    }
    for (size_t i = 0; i < g->n_parts; i++) {
        copy[i]->next = all.streams;
        all.streams = copy[i];
    }
    struct release *r = malloc(sizeof *r);
    if (!r)
        abort();
    *r = (struct release){ own };
    push(s, (struct work){ RUN, release, r, NULL, 0 });
    return cudaSuccess;
}

/* ---- streams, on ---- */

cudaError_t standin_queue(cudaStream_t s, const char *what, double size, void (*run)(const void *), const void *work,
                          size_t n)
{
    struct captured *part = s ? part_of(s, false) : NULL;
    if (all.capture && !part)
        return cudaErrorStreamCaptureImplicit; /* the default stream, or one that is not part of it */
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
    if (part) {
        keep(part, (struct work){ RUN, run, data, NULL, 0 }, n);
        part->joined = false;
        all.capture->part[0].joined = true;
    } else {
        push(s, (struct work){ RUN, run, data, NULL, 0 });
    }
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

/* Within a graph: ids count from 1, and 0 is an external one, which nobody waits for there. */
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned flags)
{
    struct captured *part = part_of(s, false);
    if (!all.capture)
        return cudaEventRecord(event, s);
    if (!part)
        return cudaErrorStreamCaptureIsolation;
    event->stream = s->number;
    if (flags & cudaEventRecordExternal) {
        keep(part, (struct work){ RECORD, NULL, NULL, event, 0 }, 0);
        return cudaSuccess;
    }
    event->captured = true;
    set_mark(event, ++all.capture->n_marks, (size_t)(part - all.capture->part));
    keep(part, (struct work){ RECORD, NULL, NULL, event, all.capture->n_marks }, 0);
    return cudaSuccess;
}

/* The first wait makes a stream part of the graph; what it waits for has come to its stream. */
static cudaError_t wait_captured(cudaStream_t s, cudaEvent_t event)
{
    const struct mark *m = mark_of(event);
    if (!m)
        return cudaErrorStreamCaptureIsolation;
    struct captured *part = part_of(s, true);
    keep(part, (struct work){ WAIT, NULL, NULL, event, m->id }, 0);
    struct captured *from = &all.capture->part[m->part];
    size_t last = from->n; /* nothing runs there after the mark */
    while (last > 0 && from->work[last - 1].what == RECORD && from->work[last - 1].record != m->id)
        last--;
    from->joined |= last > 0 && from->work[last - 1].what == RECORD;
    if (part != all.capture->part)
        part->joined = false;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s)
{
    if (all.capture)
        return cudaEventRecordWithFlags(event, s, 0);
    event->stream = s->number;
    event->captured = false;
    push(s, (struct work){ RECORD, NULL, NULL, event, ++event->queued });
    return cudaSuccess;
}

/* As CUDA has it: for the last mark that is queued by now; for none, nothing. */
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags)
{
    (void)flags;
    if (event->queued > 0)
        note("s%d waits s%d\n", s->number, event->stream);
    if (all.capture)
        return all.n_waits++ != all.lose ? wait_captured(s, event) : cudaSuccess;
    if (all.n_waits++ != all.lose && event->queued > 0)
        push(s, (struct work){ WAIT, NULL, NULL, event, event->queued });
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    if (from->captured || to->captured)
        return cudaErrorInvalidValue;
    if (from->reached == 0 || to->reached == 0)
        return cudaErrorInvalidResourceHandle;
    if (from->reached < from->queued || to->reached < to->queued)
        return cudaErrorNotReady;
    *ms = (float)(to->time - from->time);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    if (all.capture)
        return cudaErrorStreamCaptureUnsupported;
    if (event->captured)
        return cudaErrorCapturedEvent;
    run_all();
    return event->reached == event->queued ? cudaSuccess : cudaErrorNotReady;
}

/* More than is asked for, as a device may do. */
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    (void)s;
    if (all.capture)
        return cudaErrorStreamCaptureUnsupported;
    return run_all() ? cudaSuccess : cudaErrorLaunchTimeout;
}

cudaError_t cudaDeviceSynchronize(void)
{
    if (all.capture)
        return cudaErrorStreamCaptureUnsupported;
    return run_all() ? cudaSuccess : cudaErrorLaunchTimeout;
}

/* ---- memory ---- */

static cudaError_t take(void **p, size_t bytes)
{
    struct block *b = calloc(1, sizeof *b);
    *p = NULL;
    if (all.capture) {
        free(b);
        return cudaErrorStreamCaptureUnsupported;
    }
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
    if (all.capture || !run_all())
        return all.capture ? cudaErrorStreamCaptureImplicit : cudaErrorLaunchTimeout;
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    if (all.capture || !run_all())
        return all.capture ? cudaErrorStreamCaptureImplicit : cudaErrorLaunchTimeout;
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
