/* SPDX-License-Identifier: Apache-2.0
 * fuzz_npy.c - npy_open on anything: it accepts, and then every element can be read, or refuses with a message. */
#include "config.h"

#include "fuzz.h"
#include "npy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char fuzz_name[] = "fuzz_npy";

/* A scratch file of this process: overwritten each time, removed at its end. */
static char path[64];

static void remove_scratch(void)
{
    unlink(path);
}

static void write_file(const uint8_t *data, size_t n)
{
    unlink(path); /* rewriting in place makes some file systems wait for the disk */
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f) != 0)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const int64_t any[4] = { -1, -1, -1, -1 };
    struct npy a;
    struct err err = { 0 };
    if (!*path) {
        snprintf(path, sizeof path, "/tmp/moelab-fuzz-%ld.npy", (long)getpid());
        atexit(remove_scratch);
    }
    write_file(data, n);
    int rc = npy_open(&a, path, &err);
    if (rc < 0) {
        if (err.code != rc || !strstr(err.text, path)) /* a refusal names the file */
            abort();
        return 0;
    }
    double sum = 0;
    int64_t ids = 0;
    for (int64_t i = 0; i < a.count; i++) {
        float f;
        char text[96];
        npy_floats(&a, i, 1, &f);
        sum += npy_real(&a, i) + (double)f;
        ids ^= npy_int(&a, i);
        npy_element(&a, i, text);
    }
    if (a.kind == 'f' && npy_expect_finite(&a, &err) == 0 && sum != sum && a.item_bytes < 8)
        abort(); /* finite f2 and f4 have a finite sum in double */
    npy_expect(&a, "u1|f4", 2, any, &err);
    if (a.kind != 'f')
        npy_expect_range(&a, ids, ids, &err);
    npy_close(&a);
    return 0;
}

size_t fuzz_seed(int i, uint8_t *out, size_t room)
{
    static const struct {
        const char *dtype;
        int n_dims;
        int64_t shape[4];
    } seed[] = {
        { "f4", 2, { 3, 4 } },    { "u1", 3, { 2, 3, 4 } }, { "i8", 1, { 5 } },
        { "f2", 3, { 2, 2, 2 } }, { "i2", 0, { 0 } },       { "f8", 4, { 1, 2, 0, 3 } },
    };
    static const unsigned char data[96] = { 0, 60, 0, 60, 1, 2, 3, 4, 5, 6, 7, 8 };
    char from[64];
    struct err err = { 0 };
    if (i < 0 || i >= (int)(sizeof seed / sizeof *seed))
        return 0;
    snprintf(from, sizeof from, "/tmp/moelab-fuzz-seed-%ld.npy", (long)getpid());
    if (npy_write(from, seed[i].dtype, seed[i].n_dims, seed[i].shape, data, &err) < 0)
        abort();
    FILE *f = fopen(from, "rb");
    if (!f)
        abort();
    size_t n = fread(out, 1, room, f);
    fclose(f);
    unlink(from);
    if (i == 1) /* one of version 2: the length takes four bytes */
        out[6] = 2, memmove(out + 12, out + 10, n - 10), out[10] = out[11] = 0, n += 2;
    return n;
}
