/* SPDX-License-Identifier: Apache-2.0
 * host_store.c - see host_store.h. */
#include "config.h"

#include "host_rank.h"
#include "host_model.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* object: what is in it, at_start: when the step begins, planned: after the loads looked at so far; -1: nothing, or
 * nothing that is known. passing: the layer for which it has what is not kept, -1. */
struct slot { float *weights; int64_t object, at_start, planned; int32_t passing; };

struct load { int32_t slot; int64_t object, at; size_t bytes; float *to; double start, end; };

struct host_store {
    const struct moe_model *model;
    int32_t device;
    int fd, direct;       /* the same file, read past the cache of pages; -1: not there */
    char dir[200];
    size_t bytes, room, mapped; /* of one expert (the widest); of the file, and as much of it as `map` has */
    char *map;
    int64_t *offset;      /* [L * E] in the file, or -1 */
    int32_t *slot_of;     /* [L * E] as planned, or -1 */
    struct slot *slot;
    int32_t n_slots;
    int32_t *load_of;     /* [tasks] index of a load */
    struct load *load;
    int32_t n_loads;
    int32_t *queue;       /* [n_loads] in the order in which they were asked for */
    int32_t queued, done;
    bool ends;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool runs;            /* the thread is there */
};

static size_t expert_bytes(const struct host_store *s, int64_t object)
{
    const int32_t layer = (int32_t)(object / s->model->n_experts), expert = (int32_t)(object % s->model->n_experts);
    return 3 * sizeof(float) * (size_t)s->model->d_model * (size_t)host_width(s->model, layer, expert);
}

/* ---- the file ---- */

static size_t whole_pages(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

static int write_all(const struct host_store *s, const char *data, size_t n, int64_t at, struct err *e)
{
    while (n > 0) {
        const ssize_t some = pwrite(s->fd, data, n, at);
        if (some < 0 && errno == EINTR)
            continue;
        if (some <= 0)
            return err_set(e, ERR_IO, "rank %d: offloaded experts in %s: %s after %.3g GB: set TMPDIR to a place with "
                           "more room", s->device, s->dir, some < 0 ? strerror(errno) : "nothing written",
                           (double)at / 1e9);
        data += some;
        at += some;
        n -= (size_t)some;
    }
    return 0;
}

static int write_expert(struct host_store *s, int64_t object, struct err *e)
{
    const int32_t layer = (int32_t)(object / s->model->n_experts), expert = (int32_t)(object % s->model->n_experts);
    const size_t bytes = expert_bytes(s, object);
    float *w = host_weights(s->model, layer, expert);
    if (!w)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for the weights of layer %d, expert %d", s->device, layer,
                       expert);
    s->offset[object] = (int64_t)s->room;
    write_all(s, (const char *)w, bytes, s->offset[object], e);
    s->room += whole_pages(bytes);
    free(w);
    return e->code;
}

/* After writing: on the disk, so that its pages can be dropped, and mapped as a whole. */
static int map_file(struct host_store *s, struct err *e)
{
    if (s->room == s->mapped)
        return 0;
    if (s->map)
        munmap(s->map, s->mapped);
    s->map = NULL;
    s->mapped = 0;
    if (ftruncate(s->fd, (off_t)s->room) < 0 || fsync(s->fd) < 0)
        return err_set(e, ERR_IO, "rank %d: offloaded experts in %s: %s", s->device, s->dir, strerror(errno));
    s->map = mmap(NULL, s->room, PROT_READ, MAP_SHARED, s->fd, 0);
    if (s->map == MAP_FAILED) {
        s->map = NULL;
        return err_set(e, ERR_IO, "rank %d: cannot map %zu bytes of offloaded experts: %s", s->device, s->room,
                       strerror(errno));
    }
    s->mapped = s->room;
    return 0;
}

/* Past the cache of pages, as a device's copies: the processor has next to nothing to do with it, and goes on with what
 * the rank computes. Addresses and sizes are whole pages. False: this file system does not have that. */
static bool read_direct(struct host_store *s, int64_t at, size_t bytes, float *to)
{
    for (size_t done = 0, n = whole_pages(bytes); s->direct >= 0 && done < n;) {
        const ssize_t some = pread(s->direct, (char *)to + done, n - done, at + (int64_t)done);
        if (some == 0 || (some < 0 && errno != EINTR)) {
            close(s->direct);
            s->direct = -1;
        }
        done += some > 0 ? (size_t)some : 0;
    }
    return s->direct >= 0;
}

/* Pages may lie in memory as parts of larger pieces, which go only as a whole. */
enum { PIECE = 1 << 21 };

static void copy_from(struct host_store *s, int64_t at, size_t bytes, float *to)
{
    if (read_direct(s, at, bytes, to))
        return;
    char *from = s->map + at;
    const size_t pages = whole_pages(bytes), first = (size_t)at / PIECE * PIECE;
    const size_t end = ((size_t)at + pages + PIECE - 1) / PIECE * PIECE, last = end < s->mapped ? end : s->mapped;
    madvise(from, pages, MADV_WILLNEED); /* asks for all at once */
    memcpy(to, from, bytes);
    madvise(s->map + first, last - first, MADV_DONTNEED);
    posix_fadvise(s->fd, (off_t)first, (off_t)(last - first), POSIX_FADV_DONTNEED);
}

static void copy_expert(struct host_store *s, int64_t object, float *to)
{
    copy_from(s, s->offset[object], expert_bytes(s, object), to);
}

/* ---- the thread ---- */

static void *work(void *self)
{
    struct host_store *s = self;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->ends && s->done == s->queued)
            pthread_cond_wait(&s->changed, &s->lock);
        if (s->ends)
            break;
        struct load *l = &s->load[s->queue[s->done]];
        pthread_mutex_unlock(&s->lock);
        l->start = host_now();
        copy_from(s, l->at, l->bytes, l->to);
        l->end = host_now();
        pthread_mutex_lock(&s->lock);
        if (l->slot >= 0)
            s->slot[l->slot].object = l->object;
        s->done++;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static int32_t enqueue(struct host_store *s, int32_t load)
{
    pthread_mutex_lock(&s->lock);
    s->queue[s->queued++] = load;
    const int32_t number = s->queued;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return number;
}

int32_t host_store_load(struct host_store *s, int32_t task)
{
    return enqueue(s, s->load_of[task]);
}

bool host_store_ended(struct host_store *s, int32_t number)
{
    pthread_mutex_lock(&s->lock);
    const bool ended = s->done >= number;
    pthread_mutex_unlock(&s->lock);
    return ended;
}

int32_t host_store_read(struct host_store *s, size_t at, size_t bytes, float *to)
{
    s->load[s->queued] = (struct load){ .slot = -1, .at = (int64_t)at, .bytes = bytes, .to = to };
    return enqueue(s, s->queued);
}

void host_store_wait(struct host_store *s, int32_t number)
{
    if (number == 0)
        return;
    pthread_mutex_lock(&s->lock);
    while (s->done < number)
        pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

void host_store_times(struct host_store *s, int32_t number, double *start, double *end)
{
    const struct load *l = &s->load[s->queue[number - 1]];
    *start = l->start;
    *end = l->end;
}

/* ---- slots ---- */

static int32_t add_slot(struct host_store *s, struct err *e)
{
    struct slot *grown = realloc(s->slot, sizeof *grown * ((size_t)s->n_slots + 1));
    float *w = grown ? host_take(whole_pages(s->bytes)) : NULL;
    if (grown)
        s->slot = grown;
    if (!w)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for a slot of %zu bytes, after %d", s->device, s->bytes,
                       s->n_slots);
    memset(w, 0xff, s->bytes); /* not a number, until something is loaded */
    s->slot[s->n_slots] = (struct slot){ w, -1, -1, -1, -1 };
    return s->n_slots++;
}

static int32_t free_slot(struct host_store *s, struct err *e)
{
    for (int32_t i = 0; i < s->n_slots; i++)
        if (s->slot[i].planned < 0)
            return i;
    return add_slot(s, e);
}

/* What passed through in other layers than this one is not needed any more. */
static void let_go(struct host_store *s, int32_t layer)
{
    for (int32_t i = 0; i < s->n_slots; i++)
        if (s->slot[i].passing >= 0 && s->slot[i].passing != layer) {
            s->slot_of[s->slot[i].planned] = -1;
            s->slot[i].planned = s->slot[i].passing = -1;
        }
}

static int plan_load(struct host_store *s, const struct task *t, int32_t id, struct err *e)
{
    const int64_t object = t->object;
    int32_t slot = t->victim == NO_OBJECT ? -1 : s->slot_of[t->victim];
    let_go(s, t->layer);
    if (s->slot_of[object] >= 0 || (t->victim != NO_OBJECT && slot < 0))
        return err_set(e, ERR_RUN, "rank %d: task %d loads layer %d, expert %d, %s", s->device, id,
                       (int32_t)(object / s->model->n_experts), (int32_t)(object % s->model->n_experts),
                       slot < 0 ? "in place of what has no slot" : "which has a slot already");
    if (slot >= 0)
        s->slot_of[t->victim] = -1;
    else if ((slot = free_slot(s, e)) < 0)
        return e->code;
    s->slot[slot].planned = object;
    s->slot[slot].passing = t->passes ? t->layer : -1;
    s->slot_of[object] = slot;
    if (s->offset[object] < 0 && write_expert(s, object, e) < 0)
        return e->code;
    s->load_of[id] = s->n_loads;
    s->load[s->n_loads++] = (struct load){ .slot = slot, .object = object, .at = s->offset[object],
                                           .bytes = expert_bytes(s, object), .to = s->slot[slot].weights };
    return 0;
}

static int plan_experts(struct host_store *s, const struct moe_graph *g, const struct task *t, const float **weights,
                        struct err *e)
{
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const int32_t slot = s->slot_of[(int64_t)t->layer * s->model->n_experts + g->expert[i]];
        if (g->rows[i] == 0)
            continue;
        if (slot < 0)
            return err_set(e, ERR_RUN, "rank %d: layer %d, expert %d is computed and no load brings it", s->device,
                           t->layer, g->expert[i]);
        weights[i] = s->slot[slot].weights;
    }
    return 0;
}

int host_store_prepare(struct host_store *s, const struct moe_graph *g, const float **weights, struct err *e)
{
    const size_t n = (size_t)g->n_tasks + 1;
    free(s->load_of);
    free(s->load);
    free(s->queue);
    s->load_of = malloc(n * sizeof *s->load_of);
    s->load = malloc(n * sizeof *s->load);
    s->queue = malloc(n * sizeof *s->queue);
    s->n_loads = s->queued = s->done = 0;
    if (!s->load_of || !s->load || !s->queue)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for %zu tasks", s->device, n);
    let_go(s, -1);
    for (int32_t i = 0; i < s->n_slots; i++)
        s->slot[i].at_start = s->slot[i].planned;
    for (int32_t id = 0; id < g->n_tasks && !e->code; id++) {
        const struct task *t = &g->task[id];
        if (t->kind == TASK_LOAD && t->device == s->device)
            plan_load(s, t, id, e);
        else if (t->kind == TASK_EXPERTS && t->device == s->device)
            plan_experts(s, g, t, weights, e);
    }
    return e->code ? e->code : map_file(s, e);
}

void host_store_rewind(struct host_store *s)
{
    s->queued = s->done = 0;
    for (int32_t i = 0; i < s->n_slots; i++) {
        struct slot *x = &s->slot[i];
        if (x->at_start < 0)
            memset(x->weights, 0xff, s->bytes);
        else if (x->object != x->at_start)
            copy_expert(s, x->at_start, x->weights);
        x->object = x->at_start;
    }
}

/* ---- all of it ---- */

static int open_file(struct host_store *s, const char *dir, struct err *e)
{
    char path[240];
    if (snprintf(s->dir, sizeof s->dir, "%s", dir) >= (int)sizeof s->dir)
        return err_set(e, ERR_INPUT, "TMPDIR: longer than %zu characters: %s", sizeof s->dir - 1, dir);
    snprintf(path, sizeof path, "%s/moelab-experts-XXXXXX", dir);
    if ((s->fd = mkstemp(path)) < 0)
        return err_set(e, ERR_IO, "rank %d: cannot make %s: %s", s->device, path, strerror(errno));
    s->direct = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    unlink(path);
    return 0;
}

static struct host_store *allocate(int32_t device, struct err *e)
{
    struct host_store *s = calloc(1, sizeof *s);
    if (!s) {
        err_set(e, ERR_MEMORY, "rank %d: out of memory for offloaded experts", device);
        return NULL;
    }
    s->device = device;
    s->fd = s->direct = -1;
    return s;
}

static int start(struct host_store *s, struct err *e)
{
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    const int code = pthread_create(&s->thread, NULL, work, s);
    s->runs = code == 0;
    return code ? err_set(e, ERR_IO, "rank %d: cannot start a thread for loads: %s", s->device, strerror(code)) : 0;
}

int host_store_open(struct host_store **out, const struct moe_model *m, int32_t device, const char *dir,
                    struct err *e)
{
    const size_t n = (size_t)m->n_layers * (size_t)m->n_experts;
    struct host_store *s = *out = allocate(device, e);
    if (!s)
        return e->code;
    s->model = m;
    s->offset = malloc(n * sizeof *s->offset);
    s->slot_of = malloc(n * sizeof *s->slot_of);
    if (!s->offset || !s->slot_of)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for %zu experts", device, n);
    memset(s->offset, 0xff, n * sizeof *s->offset);
    memset(s->slot_of, 0xff, n * sizeof *s->slot_of);
    for (size_t i = 0; i < n; i++)
        s->bytes = expert_bytes(s, (int64_t)i) > s->bytes ? expert_bytes(s, (int64_t)i) : s->bytes;
    if (open_file(s, dir, e) < 0)
        return e->code;
    return start(s, e);
}

int host_store_open_plain(struct host_store **out, int32_t device, const char *dir, size_t bytes, struct err *e)
{
    struct host_store *s = *out = allocate(device, e);
    if (!s || open_file(s, dir, e) < 0)
        return e->code;
    char *data = malloc(bytes);
    if (!data)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for %zu bytes", device, bytes);
    for (size_t i = 0; i < bytes; i++) /* a file system may treat zeros as nothing */
        data[i] = (char)moe_mix(i);
    if (write_all(s, data, bytes, 0, e) == 0) {
        s->room = whole_pages(bytes);
        map_file(s, e);
    }
    free(data);
    s->load = calloc(HOST_READS, sizeof *s->load);
    s->queue = calloc(HOST_READS, sizeof *s->queue);
    if (!s->load || !s->queue)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for reads", device);
    return e->code ? e->code : start(s, e);
}

void host_store_close(struct host_store *s)
{
    if (!s)
        return;
    if (s->runs) {
        pthread_mutex_lock(&s->lock);
        s->ends = true;
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->lock);
        pthread_join(s->thread, NULL);
        pthread_mutex_destroy(&s->lock);
        pthread_cond_destroy(&s->changed);
    }
    if (s->map)
        munmap(s->map, s->mapped);
    if (s->fd >= 0)
        close(s->fd);
    if (s->direct >= 0)
        close(s->direct);
    for (int32_t i = 0; i < s->n_slots; i++)
        free(s->slot[i].weights);
    free(s->slot);
    free(s->offset);
    free(s->slot_of);
    free(s->load_of);
    free(s->load);
    free(s->queue);
    free(s);
}
