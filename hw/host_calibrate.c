/* SPDX-License-Identifier: Apache-2.0
 * host_calibrate.c - how long the functions that ranks run take on this computer, over sizes: what `moelab calibrate`
 * fits a machine file to.
 *
 * All ranks measure at the same time, as they run: they share memory, caches and clocks. A figure is that of the
 * slowest rank, as a step waits for it; of several tries the median counts. */
#include "config.h"

#include "host_calibrate.h"
#include "host_rank.h"

#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of each size in each pass. Passes are seconds apart, since a computer that others share is not always as fast. */
enum { TRIES = 9, LEAST_TRIES = 3, PASSES = 3, MOST_SIZES = 200, OTHERS = 1 << 26 /* bytes */,
       ATTEMPTS = 4, SPARE = 150 /* attempts of all sizes beside the first */ };
static const double LONG_ENOUGH = 0.2; /* s of tries of one size, after which the least will do */

struct bench {
    int rank, n_ranks;
    struct host_rings rings;
    char *out, *in;  /* of exchanges: for each rank, and from each */
    size_t piece;    /* bytes of one of those */
    size_t at, room; /* of `in`: what comes in goes where nothing was of late, as rows do */
    struct host_store *store;
    size_t at_file;
    char *to;        /* where loads go, one behind another: what was written to of late is in a cache */
    size_t at_to;
    struct host_sample *sample; /* of all passes, one behind another */
    int n, n_passes;
    const float *rows;          /* that will be summed */
    double probe_s;             /* the shortest so far */
    double took;                /* what `work` says of its own time; 0: from its call to its return */
    int spare;                  /* attempts that are left */
    struct host_calibration *c;
};

/* In a run products have been in the caches since the last exchange, and what is sent was just put in order. After
 * products an exchange takes 5 to 30 us longer than after bytes moved, whatever its size, with a barrier before it or
 * without. */
static void forget(struct bench *b, size_t bytes)
{
    const struct kernel product = { .groups = 1, .shape = { 24, 896, 448 } };
    for (size_t read = 0; read < OTHERS; read += sizeof(float) * 896 * 448)
        host_run_kernel(&b->rings, &product);
    for (int r = 0; r < b->n_ranks; r++)
        if (r != b->rank)
            memset(b->out + (size_t)r * b->piece, b->n & 0x7f, bytes);
}

/* Two rows read and one written for each, which is how tasks count them. */
static int64_t tokens_of(const struct host_sample *s)
{
    return (int64_t)(s->bytes / (3.0 * sizeof(float) * (double)s->key.n));
}

/* What runs have been at before this, untimed. */
static void before(struct bench *b, const struct host_sample *s)
{
    if (s->what == HOST_EXCHANGE)
        forget(b, (size_t)s->bytes);
    if (s->what == HOST_SUM)
        b->rows = host_make_rows(&b->rings, 3 * tokens_of(s), (int32_t)s->key.n);
}

double host_look_around(struct host_rings *rings, double *shortest)
{
    double span;
    MPI_Barrier(MPI_COMM_WORLD);
    span = -host_now();
    host_probe(rings);
    span += host_now();
    MPI_Allreduce(MPI_IN_PLACE, &span, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    *shortest = *shortest > 0 && *shortest < span ? *shortest : span;
    return span;
}

static struct host_sample try(struct bench *b, struct host_sample s,
                              void (*work)(struct bench *, const struct host_sample *))
{
    double took[TRIES], sum = 0;
    int n = 0;
    before(b, &s);
    work(b, &s); /* the first time does not count */
    b->took = 0;
    while (n < TRIES && (n < LEAST_TRIES || sum < LONG_ENOUGH)) {
        double span[2];
        before(b, &s);
        MPI_Barrier(MPI_COMM_WORLD);
        const double zero = host_now();
        work(b, &s);
        span[0] = b->took > 0 ? b->took : host_now() - zero;
        b->took = 0;
        MPI_Allreduce(&span[0], &span[1], 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        took[n++] = span[1];
        sum += span[1];
    }
    return host_sample_of(s, took, n);
}

/* One size: runs `work` again and again, on all ranks at once; and once more if somebody else was at work on this
 * computer, which a probe before and after tells. Of several such the least disturbed counts. */
static void measure(struct bench *b, struct host_sample s, void (*work)(struct bench *, const struct host_sample *))
{
    struct host_sample *best = &b->sample[b->n];
    double least = INFINITY;
    for (int i = 0; i < ATTEMPTS && least > HOST_DISTURBED * b->probe_s && (i == 0 || b->spare > 0); i++) {
        b->spare -= i > 0;
        const double calm = host_look_around(&b->rings, &b->probe_s);
        const struct host_sample one = try(b, s, work);
        const double disturbed = fmax(calm, host_look_around(&b->rings, &b->probe_s));
        if (disturbed < least) {
            least = disturbed;
            *best = one;
        }
    }
    b->n++;
    if (b->rank == 0 && b->c->step)
        b->c->step(b->c->taker);
}

static void hand_over(const struct bench *b)
{
    const int n = b->n / b->n_passes;
    for (int i = 0; i < n; i++) {
        const struct host_sample s = host_sample_middle(&b->sample[i], n, b->n_passes);
        b->c->take(b->c->taker, &s);
    }
}

/* ---- what is measured ---- */

static void multiply(struct bench *b, const struct host_sample *s)
{
    host_run_kernel(&b->rings, &(struct kernel){ .groups = 1, .shape = s->shape });
}

static void move(struct bench *b, const struct host_sample *s)
{
    host_run_plain(&b->rings, 0, s->bytes);
}

static void sum_up(struct bench *b, const struct host_sample *s)
{
    host_run_sums(&b->rings, b->rows, tokens_of(s), (int32_t)s->key.n);
}

static void probe(struct bench *b, const struct host_sample *s)
{
    (void)s;
    host_probe(&b->rings);
}

static void attend(struct bench *b, const struct host_sample *s)
{
    host_run_kernel(&b->rings, &(struct kernel){ .key = s->key });
}

/* Every rank sends each other one as many bytes. */
static void exchange(struct bench *b, const struct host_sample *s)
{
    int count[b->n_ranks], at[b->n_ranks], into[b->n_ranks];
    for (int r = 0; r < b->n_ranks; r++) {
        count[r] = r == b->rank ? 0 : (int)s->bytes;
        at[r] = r * (int)b->piece;
    }
    const size_t step = (size_t)s->bytes * (size_t)b->n_ranks;
    for (int r = 0; r < b->n_ranks; r++)
        into[r] = r * (int)s->bytes;
    b->at = b->at + step > b->room ? 0 : b->at;
    MPI_Alltoallv(b->out, count, at, MPI_BYTE, b->in + b->at, count, into, MPI_BYTE, MPI_COMM_WORLD);
    b->at += step;
}

static size_t next_of(size_t *at, size_t bytes, size_t room)
{
    const size_t here = *at + bytes > room ? 0 : *at;
    *at = here + bytes;
    return here;
}

/* As loads are: several in a row, by their thread, while the rank computes. What was read last is behind what will be:
 * whoever keeps the file may remember some of it. The mean of the row. */
static void read_some(struct bench *b, const struct host_sample *s)
{
    const size_t bytes = (size_t)s->bytes;
    const int n = (int)fmin(HOST_READS, fmax(2, (double)(1 << 25) / s->bytes));
    int32_t number = 0;
    double first, start, end;
    host_store_rewind(b->store);
    for (int i = 0; i < n; i++)
        number = host_store_read(b->store, next_of(&b->at_file, bytes, HOST_CALIBRATION_FILE), bytes,
                                 (float *)(void *)(b->to + next_of(&b->at_to, bytes, HOST_CALIBRATION_ROOM)));
    while (!host_store_ended(b->store, number))
        host_probe(&b->rings);
    host_store_times(b->store, number - n + 1, &first, &end);
    host_store_times(b->store, number, &start, &end);
    b->took = (end - first) / n;
}

/* ---- sizes ---- */

static void gemms(struct bench *b)
{
    static const struct gemm_group matrix[] = { { 0, 384, 512 }, { 0, 448, 896 }, { 0, 896, 448 }, { 0, 1792, 640 },
                                                { 0, 1344, 1344 } };
    /* Libraries cut them into fours or eights, and rests. */
    static const int64_t rows[] = { 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 16, 19, 22, 24, 29, 32, 42, 48, 64, 79,
                                    96, 128, 192, 256, 384, 512 };
    for (size_t i = 0; i < sizeof matrix / sizeof *matrix; i++)
        for (size_t j = 0; j < sizeof rows / sizeof *rows; j++) {
            struct host_sample s = { .what = HOST_GEMM, .shape = matrix[i] };
            s.shape.rows = rows[j];
            measure(b, s, multiply);
        }
}

static void moves(struct bench *b)
{
    for (double bytes = 4096; bytes <= 5e7; bytes *= 4)
        measure(b, (struct host_sample){ .what = HOST_MOVE, .bytes = bytes }, move);
}

/* Of 32 to 512 tokens. */
static void sums(struct bench *b)
{
    for (double tokens = 32; tokens <= 512; tokens *= 4)
        for (int32_t d = 896; d <= 1408; d += 512)
            measure(b, (struct host_sample){ .what = HOST_SUM, .key.n = d, .bytes = 3.0 * 4 * d * tokens }, sum_up);
}

static void attentions(struct bench *b)
{
    static const struct latency_key key[] = {
        { LATENCY_DECODE, 0, 6, 6, 64, 64, 24, 96 },     { LATENCY_DECODE, 0, 6, 6, 64, 64, 48, 384 },
        { LATENCY_DECODE, 0, 12, 3, 64, 64, 24, 768 },   { LATENCY_DECODE, 0, 12, 12, 96, 96, 96, 192 },
        { LATENCY_DECODE, 0, 20, 5, 64, 64, 72, 192 },   { LATENCY_DECODE, 0, 6, 3, 80, 80, 128, 320 },
        { LATENCY_PREFILL, 0, 6, 6, 64, 64, 384, 384 },  { LATENCY_PREFILL, 0, 12, 3, 96, 96, 192, 192 },
    };
    for (size_t i = 0; i < sizeof key / sizeof *key; i++)
        measure(b, (struct host_sample){ .what = HOST_ATTENTION, .key = key[i] }, attend);
}

static void exchanges(struct bench *b)
{
    measure(b, (struct host_sample){ .what = HOST_EXCHANGE, .bytes = 8 }, exchange);
    for (double bytes = 1024; bytes <= (double)b->piece; bytes *= 4)
        measure(b, (struct host_sample){ .what = HOST_EXCHANGE, .bytes = bytes }, exchange);
}

static int reads(struct bench *b, const char *dir, struct err *e)
{
    if (!b->to) {
        b->to = host_take(HOST_CALIBRATION_ROOM);
        if (!b->to)
            return err_set(e, ERR_MEMORY, "rank %d: out of memory for reads", b->rank);
        memset(b->to, 0, HOST_CALIBRATION_ROOM);
        if (host_store_open_plain(&b->store, b->rank, dir, HOST_CALIBRATION_FILE, e) < 0)
            return e->code;
    }
    for (double bytes = 1 << 18; bytes <= 1 << 24; bytes *= 2)
        measure(b, (struct host_sample){ .what = HOST_READ, .bytes = bytes }, read_some);
    return 0;
}

/* "Open MPI v4.1.4, ..." up to the comma. */
static void say_versions(struct host_calibration *c)
{
    char mpi[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int n = 0;
    MPI_Get_library_version(mpi, &n);
    mpi[strcspn(mpi, ",\n")] = '\0';
    snprintf(c->versions, sizeof c->versions, "moelab %s, %s, %s", PACKAGE_VERSION, openblas_get_config(), mpi);
}

int host_calibrate(struct host_calibration *c, struct err *e)
{
    struct bench b = { .c = c, .n_passes = PASSES, .piece = 1 << 22, .spare = SPARE };
    MPI_Comm_rank(MPI_COMM_WORLD, &b.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &b.n_ranks);
    const size_t all = b.piece * (size_t)b.n_ranks;
    b.out = host_take(all);
    b.room = all > sizeof(float) * HOST_RING ? all : sizeof(float) * HOST_RING;
    b.in = host_take(b.room);
    b.sample = malloc(sizeof *b.sample * PASSES * MOST_SIZES);
    if (!b.out || !b.in || !b.sample)
        err_set(e, ERR_MEMORY, "rank %d: out of memory for %zu bytes of exchanges", b.rank, all);
    if (e->code || host_rings_open(&b.rings, (struct host_room){ HOST_RINGS * HOST_RING, 2 * HOST_RING }, e) < 0)
        goto out;
    say_versions(c);
    memset(b.out, 1, all);
    memset(b.in, 1, b.room);
    for (int pass = 0; pass < PASSES && !e->code; pass++) {
        measure(&b, (struct host_sample){ .what = HOST_PACE }, probe);
        gemms(&b);
        measure(&b, (struct host_sample){ .what = HOST_PACE }, probe);
        moves(&b);
        sums(&b);
        attentions(&b);
        exchanges(&b);
        reads(&b, c->dir, e);
        measure(&b, (struct host_sample){ .what = HOST_PACE }, probe);
    }
    if (b.rank == 0 && !e->code)
        hand_over(&b);
out:
    free(b.sample);
    free(b.out);
    free(b.in);
    free(b.to);
    host_rings_close(&b.rings);
    host_store_close(b.store);
    return e->code;
}
