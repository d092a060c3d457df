/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_trace.c - trace_open on a good trace with one file replaced by anything. The input's first byte says which
 * file; the rest is what it holds. What is accepted must be readable to the last id, and must hold what trace_open
 * promises.
 */
#include "config.h"

#include "fuzz.h"
#include "routing.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const char fuzz_name[] = "fuzz_trace";

static const char *const files[] = { "trace.json",    "experts.npy", "offsets.npy", "weights.npy", "logits.npy",
                                     "token_ids.npy", "hidden.npy",  "gate.npy",    "domains.npy" };
enum { N_FILES = sizeof files / sizeof *files, ROOM = 4096 };

/* The good trace: made once per process, removed at its end. */
static struct {
    char dir[64];
    uint8_t good[N_FILES][ROOM];
    size_t n[N_FILES];
} fixture;

static void path_of(int i, char path[128])
{
    snprintf(path, 128, "%s/%s", fixture.dir, files[i]);
}

static void write_file(int i, const uint8_t *data, size_t n)
{
    char path[128];
    path_of(i, path);
    unlink(path); /* rewriting in place makes some file systems wait for the disk */
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f) != 0)
        abort();
}

static void remove_fixture(void)
{
    char path[128];
    for (int i = 0; i < N_FILES; i++) {
        path_of(i, path);
        unlink(path);
    }
    rmdir(fixture.dir);
}

static void make_fixture(void)
{
    static const int32_t ids[6] = { 1, 2, 3, 4, 5, 6 };
    static const uint8_t domains[2] = { 0, 1 };
    static const float real[24] = { 1, 2, 3 };
    struct trace_synth p = { 2, 4, 2, 2, 3, 1, 0.5, 0.5, 0.5, true, 1 };
    const struct {
        int file;
        const char *dtype;
        int n_dims;
        int64_t shape[3];
        const void *data;
    } more[] = { { 5, "i4", 1, { 6 }, ids },
                 { 6, "f4", 3, { 4, 2, 3 }, real },
                 { 7, "f4", 3, { 2, 4, 3 }, real },
                 { 8, "u1", 1, { 2 }, domains } };
    struct err err = { 0 };
    char path[128];
    snprintf(fixture.dir, sizeof fixture.dir, "/tmp/moelab-fuzz-%ld", (long)getpid());
    if (trace_synthesise(&p, fixture.dir, &err) < 0)
        abort();
    atexit(remove_fixture);
    for (size_t i = 0; i < sizeof more / sizeof *more; i++) {
        path_of(more[i].file, path);
        if (npy_write(path, more[i].dtype, more[i].n_dims, more[i].shape, more[i].data, &err) < 0)
            abort();
    }
    for (int i = 0; i < N_FILES; i++) {
        path_of(i, path);
        FILE *f = fopen(path, "rb");
        if (!f)
            abort();
        fixture.n[i] = fread(fixture.good[i], 1, ROOM, f);
        fclose(f);
    }
}

/* Everything that trace_open promises, by the plainest means. */
static void use(const struct trace *t)
{
    const int64_t *at = t->offsets.data;
    int32_t *id = malloc((size_t)t->top_k * sizeof *id);
    float *weight = malloc((size_t)t->top_k * sizeof *weight);
    struct routing r = routing_of(t);
    struct err err = { 0 };
    double overlap, chance;
    char hex[65];
    if (!id || !weight || at[0] != 0 || at[t->n_requests] != t->n_tokens)
        abort();
    for (int64_t token = 0; token < t->n_tokens; token++) {
        int32_t q = trace_request(t, token);
        if (q < 0 || q >= t->n_requests || token < at[q] || token >= at[q + 1])
            abort();
        for (int32_t l = 0; l < t->n_layers; l++) {
            trace_experts(t, token, l, id);
            trace_weights(t, token, l, weight);
            for (int32_t i = 0; i < t->top_k; i++) {
                if (id[i] < 0 || id[i] >= t->n_experts || !(weight[i] - weight[i] == 0))
                    abort();
                for (int32_t j = 0; j < i; j++)
                    if (id[i] == id[j])
                        abort();
            }
        }
    }
    if (routing_overlap(&r, -1, &overlap, &chance, &err) == 0 && !(overlap >= 0 && overlap <= 1))
        abort();
    if (trace_checksum(t, hex, &err) < 0)
        abort();
    free(id);
    free(weight);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct trace t;
    struct err err = { 0 };
    if (n == 0)
        return 0;
    if (!*fixture.dir)
        make_fixture();
    int file = data[0] % N_FILES;
    write_file(file, data + 1, n - 1);
    int rc = trace_open(&t, fixture.dir, &err);
    if (rc < 0) {
        if (err.code != rc || !strstr(err.text, fixture.dir)) /* a refusal names a file */
            abort();
    } else {
        use(&t);
        trace_close(&t);
    }
    write_file(file, fixture.good[file], fixture.n[file]);
    return 0;
}

size_t fuzz_seed(int i, uint8_t *out, size_t room)
{
    if (!*fixture.dir)
        make_fixture();
    if (i < 0 || i >= N_FILES || fixture.n[i] + 1 > room)
        return 0;
    out[0] = (uint8_t)i;
    memcpy(out + 1, fixture.good[i], fixture.n[i]);
    return fixture.n[i] + 1;
}
