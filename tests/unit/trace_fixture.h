/* SPDX-License-Identifier: Apache-2.0
 * trace_fixture.h - scratch directories and small traces for the tests of npy and traces. */
#ifndef TRACE_FIXTURE_H
#define TRACE_FIXTURE_H

#include "trace.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

struct scratch { char dir[64], path[256]; };

static inline int scratch_make(void **state)
{
    struct scratch *s = calloc(1, sizeof *s);
    if (!s)
        return -1;
    snprintf(s->dir, sizeof s->dir, "/tmp/moelab-test-XXXXXX");
    *state = s;
    return mkdtemp(s->dir) ? 0 : -1;
}

static inline int scratch_remove(void **state)
{
    struct scratch *s = *state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", s->dir);
    int rc = system(command);
    free(s);
    return rc;
}

/* DIR/name; valid until the next call. */
static inline const char *scratch_path(struct scratch *s, const char *name)
{
    snprintf(s->path, sizeof s->path, "%s/%s", s->dir, name);
    return s->path;
}

static inline void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

static inline void write_bytes(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* The error is there and its text holds every one of the words given; ends with NULL. */
static inline void assert_says(const struct err *err, int rc, ...)
{
    va_list words;
    const char *word;
    assert_true(rc < 0);
    assert_int_equal(err->code, rc);
    va_start(words, rc);
    while ((word = va_arg(words, const char *)))
        if (!strstr(err->text, word))
            fail_msg("\"%s\" does not say \"%s\"", err->text, word);
    va_end(words);
}

#define ok(call)                                                                                                      \
    do {                                                                                                              \
        struct err err_ = { 0 };                                                                                      \
        struct err *err = &err_;                                                                                      \
        if ((call) < 0)                                                                                               \
            fail_msg("%s: %s", #call, err->text);                                                                     \
    } while (0)

/* A trace of 3 requests (2, 0 and 3 tokens), 2 layers, top 2 of 4 experts, with every optional file. */
static inline void small_trace(struct scratch *s, const char *name)
{
    static const uint8_t experts[5 * 2 * 2] = { 0, 1, 2, 3, 1, 2, 3, 0, 3, 2, 1, 0, 0, 2, 1, 3, 3, 1, 0, 2 };
    static const int64_t offsets[4] = { 0, 2, 2, 5 };
    static const int32_t ids[5] = { 7, 8, 9, 10, 11 }, positions[5] = { 0, 1, 0, 1, 2 };
    static const uint8_t domains[3] = { 0, 1, 1 };
    uint16_t half[5 * 2 * 4];
    float real[2 * 4 * 3] = { 0 };
    char path[256];
    for (size_t i = 0; i < sizeof half / sizeof *half; i++)
        half[i] = npy_float_to_half((float)i / 8);
    snprintf(path, sizeof path, "%s/%s", s->dir, name);
    assert_int_equal(mkdir(path, 0777), 0);
    const struct { const char *file, *dtype; int n_dims; int64_t shape[4]; const void *data; } file[] = {
        { "experts.npy", "u1", 3, { 5, 2, 2 }, experts }, { "offsets.npy", "i8", 1, { 4 }, offsets },
        { "weights.npy", "f2", 3, { 5, 2, 2 }, half },    { "logits.npy", "f2", 3, { 5, 2, 4 }, half },
        { "token_ids.npy", "i4", 1, { 5 }, ids },         { "positions.npy", "i4", 1, { 5 }, positions },
        { "importance.npy", "f4", 1, { 5 }, real },       { "hidden.npy", "f2", 3, { 2, 2, 3 }, half },
        { "gate.npy", "f4", 3, { 2, 4, 3 }, real },       { "domains.npy", "u1", 1, { 3 }, domains },
    };
    for (size_t i = 0; i < sizeof file / sizeof *file; i++) {
        snprintf(path, sizeof path, "%s/%s/%s", s->dir, name, file[i].file);
        ok(npy_write(path, file[i].dtype, file[i].n_dims, file[i].shape, file[i].data, err));
    }
    snprintf(path, sizeof path, "%s/%s/trace.json", s->dir, name);
    write_text(path, "{\"layers\": 2, \"experts\": 4, \"top_k\": 2, \"requests\": 3, \"tokens\": 5,\n"
                     " \"model\": \"small\", \"domains\": [\"prose\", \"code\"]}\n");
}

/* PATH under the shared material, or NULL where it is absent (then skip()). */
static inline const char *shared_path(const char *name, char path[512])
{
    const char *shared = getenv("MOELAB_SHARED"), *top = getenv("top_srcdir");
    if (shared)
        snprintf(path, 512, "%s/%s", shared, name);
    else
        snprintf(path, 512, "%s/../shared/%s", top ? top : ".", name);
    return access(path, R_OK) == 0 ? path : NULL;
}

#endif
