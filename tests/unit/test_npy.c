/* SPDX-License-Identifier: Apache-2.0
 * test_npy.c - what npy_open accepts, what it refuses and with which words; half precision; nothing half-written. */
#include "config.h"

#include "trace_fixture.h"

#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <sys/resource.h>

/* A file of the given version with the given dict, padded to `pad` bytes of header text, and data. */
static const char *make(void **state, int version, const char *dict, size_t pad, const void *data, size_t bytes)
{
    unsigned char file[4096];
    size_t n = strlen(dict), length = pad > n ? pad : n, prefix = version == 1 ? 10 : 12;
    assert_true(prefix + length + bytes <= sizeof file);
    memcpy(file, "\x93NUMPY", 6);
    file[6] = (unsigned char)version;
    file[7] = 0;
    file[8] = (unsigned char)length;
    file[9] = (unsigned char)(length >> 8);
    file[10] = file[11] = 0;
    memset(file + prefix, ' ', length);
    memcpy(file + prefix, dict, n);
    memcpy(file + prefix + length, data, bytes);
    write_bytes(scratch_path(*state, "a.npy"), file, prefix + length + bytes);
    return scratch_path(*state, "a.npy");
}

#define DICT(descr, shape) "{'descr': '" descr "', 'fortran_order': False, 'shape': " shape ", }"

static void accepts(void **state)
{
    static const int16_t data[6] = { 1, -2, 3, -4, 5, 32767 };
    static const struct {
        int version;
        const char *dict;
        size_t pad;
        int n_dims;
        int64_t count;
        size_t bytes;
    } good[] = {
        { 1, DICT("<i2", "(2, 3)") "\n", 118, 2, 6, 12 },
        { 2, DICT("<i2", "(2, 3)") "\n", 116, 2, 6, 12 },
        { 3, DICT("=i2", "(6,)"), 116, 1, 6, 12 },
        { 1, "{\"shape\":(6L,),\"descr\":\"<i2\",\"fortran_order\":False}", 118, 1, 6, 12 },
        { 1, DICT("<i2", "(3, 2, 1, 1)"), 0, 4, 6, 12 }, /* data at an odd offset */
        { 1, DICT("<i2", "()"), 118, 0, 1, 2 },
        { 1, DICT("<i2", "(0, 7)"), 118, 2, 0, 0 },
        { 1, DICT("<i2", "(7, 0)"), 0, 2, 0, 0 },
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct npy a;
        ok(npy_open(&a, make(state, good[i].version, good[i].dict, good[i].pad, data, good[i].bytes), err));
        assert_int_equal(a.n_dims, good[i].n_dims);
        assert_int_equal(a.count, good[i].count);
        assert_true(a.kind == 'i' && a.item_bytes == 2 && a.data != NULL);
        assert_true((uintptr_t)a.data % 2 == 0 || a.count == 0);
        for (int64_t j = 0; j < a.count; j++)
            assert_int_equal(npy_int(&a, j), data[j]);
        npy_close(&a);
        npy_close(&a); /* twice does no harm */
    }
}

static void refuses(void **state)
{
    static const char data[64] = { 0 };
    static const struct {
        int version;
        const char *dict;
        size_t bytes;
        const char *says[2];
    } bad[] = {
        { 1, DICT("<f4", "(4,)"), 15, { "truncated: 15 bytes of data", "expected 16 for shape (4,) of f4" } },
        { 1, DICT("<f4", "(4,)"), 17, { "trailing bytes: 17", "expected 16" } },
        { 1, DICT("<f4", "(0,)"), 1, { "trailing bytes", "expected 0" } },
        { 1, DICT(">f4", "(4,)"), 16, { ">f4", "little endian" } },
        { 1, DICT("|O", "(4,)"), 16, { "|O", "u1 u2 u4" } },
        { 1, DICT("<c8", "(2,)"), 16, { "<c8", "expected one of" } },
        { 1, DICT("<f3", "(2,)"), 6, { "<f3", "expected one of" } },
        { 1, DICT("<U1", "(2,)"), 8, { "<U1", "expected one of" } },
        { 1, DICT("", "(2,)"), 8, { "dtype is \"\"", "expected one of" } },
        { 1,
          "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,), }",
          16,
          { "structured dtype", "plain" } },
        { 1,
          "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }",
          16,
          { "Fortran order", "expected C order" } },
        { 1, "{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 2), }", 16, { "found \"0,", "True or False" } },
        { 1, "{'descr': '<f4', 'shape': (2, 2), }", 16, { "no key 'fortran_order'", NULL } },
        { 1, "{'descr': '<f4', 'descr': '<f4', 'shape': (2, 2), }", 16, { "found \"'descr'", "once" } },
        { 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), 'x': 1}", 16, { "found \"'x'", "once" } },
        { 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)} x", 16, { "found \"x", "end of the header" } },
        { 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)", 16, { "header ends", "',' or '}'" } },
        { 1, "{'descr': '<f4, 'fortran_order': False", 16, { "dtype is \"<f4, \"", "expected one of" } },
        { 1, "", 0, { "header ends", "'{'" } },
        { 1, DICT("<f4", "4"), 16, { "found \"4", "a shape" } },
        { 1, DICT("<f4", "(-4,)"), 16, { "found \"-4", "0 or more" } },
        { 1, DICT("<f4", "(2 2)"), 16, { "found \"2)", "',' or ')'" } },
        { 1, DICT("<f4", "(1, 1, 1, 2, 2)"), 16, { "more than 4 dimensions", NULL } },
        { 1, DICT("<f4", "(99999999999999999999,)"), 16, { "dimension 0", "beyond 2^63" } },
        { 1, DICT("<f4", "(4294967296, 4294967296)"), 16, { "(4294967296, 4294967296)", "overflows" } },
        { 1, DICT("<f8", "(2305843009213693952,)"), 16, { "overflows", NULL } },
        { 1, DICT("<f4", "(0, 4294967296, 4294967296)"), 0, { "overflows", NULL } },
        { 4, DICT("<f4", "(4,)"), 16, { "version 4.0", "expected 1, 2 or 3" } },
        { 0, DICT("<f4", "(4,)"), 16, { "version 0.0", "expected 1, 2 or 3" } },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct npy a;
        struct err err = { 0 };
        const char *path = make(state, bad[i].version, bad[i].dict, 64, data, bad[i].bytes);
        assert_says(&err, npy_open(&a, path, &err), path, bad[i].says[0], bad[i].says[1], NULL);
        assert_true(a.map == NULL && a.data == NULL);
    }
}

/* Every prefix of a good file is refused, whatever it cuts through. */
static void refuses_every_prefix(void **state)
{
    unsigned char file[256];
    static const float data[4] = { 1, 2, 3, 4 };
    const char *path = make(state, 2, DICT("<f4", "(4,)"), 116, data, sizeof data);
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(file, 1, sizeof file, f);
    fclose(f);
    assert_int_equal(n, 144);
    for (size_t cut = 0; cut < n; cut++) {
        struct npy a;
        struct err err = { 0 };
        write_bytes(path, file, cut);
        assert_true(npy_open(&a, path, &err) < 0);
        assert_non_null(strstr(err.text, path));
    }
}

static void refuses_other_files(void **state)
{
    struct npy a;
    struct scratch *s = *state;
    char text[600];
    struct err none = { 0 }, dir = { 0 }, fifo = { 0 }, magic = { 0 }, header = { 0 }, name = { 0 };
    assert_says(&none, npy_open(&a, scratch_path(s, "none.npy"), &none), "none.npy", "No such file", NULL);
    assert_says(&dir, npy_open(&a, s->dir, &dir), "not a regular file", NULL);
    assert_int_equal(mkfifo(scratch_path(s, "fifo"), 0600), 0);
    assert_says(&fifo, npy_open(&a, scratch_path(s, "fifo"), &fifo), "not a regular file", NULL); /* and no waiting */
    write_text(scratch_path(s, "x.npy"), "PK\3\4 a zip archive");
    assert_says(&magic, npy_open(&a, scratch_path(s, "x.npy"), &magic), "not a .npy file", NULL);
    write_bytes(scratch_path(s, "x.npy"), "\x93NUMPY\x02\x00\xff\xff\xff\xff{}", 14);
    assert_says(&header, npy_open(&a, scratch_path(s, "x.npy"), &header), "4294967295 bytes", "has 2 after byte 12",
                NULL);
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    assert_says(&name, npy_open(&a, text, &name), "path of 599 bytes", NULL);
}

static void expects(void **state)
{
    static const float data[6] = { 0, 1, 2, NAN, 4, -INFINITY };
    static const int32_t ids[3] = { 5, -1, 9 };
    static const int64_t shape[2] = { 2, 3 }, any[2] = { -1, 3 }, other[2] = { -1, 4 };
    struct npy a;
    struct err dtype = { 0 }, dims = { 0 }, size = { 0 }, nan_ = { 0 }, range = { 0 };
    ok(npy_write(scratch_path(*state, "a.npy"), "f4", 2, shape, data, err));
    ok(npy_open(&a, scratch_path(*state, "a.npy"), err));
    ok(npy_expect(&a, "f2|f4", 2, any, err));
    assert_says(&dtype, npy_expect(&a, "u1|u2", 2, any, &dtype), "a.npy", "dtype is f4", "expected u1|u2", NULL);
    assert_says(&dims, npy_expect(&a, "f4", 1, any, &dims), "shape is (2, 3)", "expected (any,)", NULL);
    assert_says(&size, npy_expect(&a, "f4", 2, other, &size), "shape is (2, 3)", "expected (any, 4)", NULL);
    assert_says(&nan_, npy_expect_finite(&a, &nan_), "a.npy[1,0]", "found NaN", "finite", NULL);
    npy_close(&a);
    ok(npy_write(scratch_path(*state, "a.npy"), "i4", 1, &(int64_t){ 3 }, ids, err));
    ok(npy_open(&a, scratch_path(*state, "a.npy"), err));
    ok(npy_expect_range(&a, -1, 9, err));
    ok(npy_expect_finite(&a, err));
    assert_says(&range, npy_expect_range(&a, 0, 9, &range), "a.npy[1]", "found -1", "expected 0..9", NULL);
    npy_close(&a);
}

/* One bad value at any place, in whole blocks and in the rest, for every width. */
static void finds_bad_values(void **state)
{
    enum { N = 600 };
    static const struct {
        const char *dtype;
        int bytes;
        uint64_t infinity;
    } type[] = { { "f2", 2, 0x7c00 }, { "f4", 4, 0x7f800000 }, { "f8", 8, 0x7ff0000000000000 } };
    unsigned char data[N * 8] = { 0 };
    for (size_t i = 0; i < 3; i++)
        for (int64_t at = 0; at < N; at += 1 + at % 7) {
            struct npy a;
            struct err bad = { 0 };
            char place[16];
            memcpy(data + at * type[i].bytes, &type[i].infinity, (size_t)type[i].bytes);
            ok(npy_write(scratch_path(*state, "a.npy"), type[i].dtype, 1, &(int64_t){ N }, data, err));
            ok(npy_open(&a, scratch_path(*state, "a.npy"), err));
            snprintf(place, sizeof place, "[%d]", (int)at);
            assert_says(&bad, npy_expect_finite(&a, &bad), place, "found +infinity", NULL);
            npy_close(&a);
            memset(data, 0, sizeof data);
        }
}

static void values(void **state)
{
    static const double real[5] = { 1.5, -2.75, 1e300, -1e300, NAN };
    static const uint64_t wide[2] = { UINT64_MAX, 7 };
    static const uint8_t bytes[3] = { 0, 1, 255 };
    struct npy a;
    float f[3];
    ok(npy_write(scratch_path(*state, "a.npy"), "f8", 1, &(int64_t){ 5 }, real, err));
    ok(npy_open(&a, scratch_path(*state, "a.npy"), err));
    assert_true(npy_real(&a, 1) == -2.75 && npy_int(&a, 1) == -2);
    assert_true(npy_int(&a, 2) == INT64_MAX && npy_int(&a, 3) == INT64_MIN && npy_int(&a, 4) == 0);
    npy_floats(&a, 0, 2, f);
    assert_true(f[0] == 1.5f && f[1] == -2.75f);
    npy_close(&a);
    ok(npy_write(scratch_path(*state, "a.npy"), "u8", 1, &(int64_t){ 2 }, wide, err));
    ok(npy_open(&a, scratch_path(*state, "a.npy"), err));
    assert_true(npy_int(&a, 0) == INT64_MAX && npy_real(&a, 0) == 0x1p64 && npy_int(&a, 1) == 7);
    npy_close(&a);
    ok(npy_write(scratch_path(*state, "a.npy"), "u1", 1, &(int64_t){ 3 }, bytes, err));
    ok(npy_open(&a, scratch_path(*state, "a.npy"), err));
    npy_floats(&a, 1, 2, f);
    assert_true(f[0] == 1 && f[1] == 255 && npy_real(&a, 2) == 255);
    npy_close(&a);
}

static void half_precision(void **state)
{
    static const struct {
        float f;
        uint16_t h;
    } known[] = {
        { 0, 0 },
        { 1, 0x3c00 },
        { -2, 0xc000 },
        { 65504, 0x7bff },
        { 65519, 0x7bff },
        { 65520, 0x7c00 },
        { 0x1p-14f, 0x0400 },
        { 0x1p-24f, 0x0001 },
        { 0x1p-25f, 0x0000 },
        { 0x1.8p-25f, 0x0001 },
        { 0x1.8p-24f, 2 },
        { 1 + 0x1p-11f, 0x3c00 },
        { 1 + 0x3p-11f, 0x3c02 },
        { INFINITY, 0x7c00 },
        { -INFINITY, 0xfc00 },
    };
    (void)state;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        assert_int_equal(npy_float_to_half(known[i].f), known[i].h);
    assert_true(isnan(npy_half_to_float(npy_float_to_half(NAN))));
    for (uint32_t h = 0; h < 0x10000; h++) { /* every half there is comes back, and halves order as their floats do */
        float f = npy_half_to_float((uint16_t)h);
        if (isnan(f))
            assert_true((h & 0x7c00) == 0x7c00 && (h & 0x3ff));
        else
            assert_int_equal(npy_float_to_half(f), h);
        if (h > 0 && h <= 0x7c00)
            assert_true(f > npy_half_to_float((uint16_t)(h - 1)));
    }
}

/* ---- writing ---- */

static int count_entries(const char *dir)
{
    int n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n - 2;
}

static void round_trip(void **state)
{
    static const char *const dtypes[] = { "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "b1" };
    static const unsigned char data[24 * 8] = { 1, 0, 1 };
    static const int64_t shape[4] = { 2, 3, 1, 4 };
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        for (int n_dims = 0; n_dims <= 4; n_dims++) {
            struct npy a;
            ok(npy_write(scratch_path(*state, "a.npy"), dtypes[i], n_dims, shape, data, err));
            ok(npy_open(&a, scratch_path(*state, "a.npy"), err));
            ok(npy_expect(&a, dtypes[i], n_dims, shape, err));
            assert_memory_equal(a.data, data, (size_t)a.count * (size_t)a.item_bytes);
            assert_int_equal((uintptr_t)a.data % 64, 0); /* as NumPy lays them out */
            npy_close(&a);
        }
    assert_int_equal(count_entries(((struct scratch *)*state)->dir), 1);
}

/* A file-size limit stands for the full disk: an error, no file, no .part, and what was there before stays. */
static void full_disk(void **state)
{
    static const unsigned char data[1 << 16] = { 0 };
    struct rlimit old, small;
    struct npy a;
    struct err full = { 0 };
    struct scratch *s = *state;
    ok(npy_write(scratch_path(s, "a.npy"), "u1", 1, &(int64_t){ 3 }, data, err));
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small = old;
    small.rlim_cur = 4096;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    int rc = npy_write(scratch_path(s, "a.npy"), "u1", 1, &(int64_t){ sizeof data }, data, &full);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_says(&full, rc, "a.npy", "cannot write", NULL);
    assert_int_equal(rc, ERR_IO);
    assert_int_equal(count_entries(s->dir), 1);
    ok(npy_open(&a, scratch_path(s, "a.npy"), err));
    assert_int_equal(a.count, 3);
    npy_close(&a);
}

static void writer_keeps_to_its_shape(void **state)
{
    static const unsigned char data[8] = { 0 };
    struct npy_writer w;
    struct err more = { 0 }, less = { 0 }, dtype = { 0 }, place = { 0 }, dims = { 0 };
    struct scratch *s = *state;
    ok(npy_create(&w, scratch_path(s, "a.npy"), "u2", 1, &(int64_t){ 3 }, err));
    ok(npy_append(&w, data, 4, err));
    assert_says(&more, npy_append(&w, data, 4, &more), "more data", NULL);
    ok(npy_create(&w, scratch_path(s, "a.npy"), "u2", 1, &(int64_t){ 3 }, err));
    ok(npy_append(&w, data, 4, err));
    assert_says(&less, npy_finish(&w, &less), "less data", NULL);
    npy_abandon(&w);
    assert_int_equal(count_entries(s->dir), 0);
    assert_says(&dtype, npy_write(scratch_path(s, "a.npy"), "f3", 1, &(int64_t){ 1 }, data, &dtype), "f3", NULL);
    assert_says(&place, npy_write(scratch_path(s, "no/a.npy"), "f4", 1, &(int64_t){ 1 }, data, &place), "cannot create",
                NULL);
    assert_says(&dims, npy_write(scratch_path(s, "a.npy"), "f4", 1, &(int64_t){ -1 }, data, &dims), "dimension 0",
                NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(accepts, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(refuses, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(refuses_every_prefix, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(refuses_other_files, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(expects, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(finds_bad_values, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(values, scratch_make, scratch_remove),
        cmocka_unit_test(half_precision),
        cmocka_unit_test_setup_teardown(round_trip, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(full_disk, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(writer_keeps_to_its_shape, scratch_make, scratch_remove),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("npy", tests, NULL, NULL);
}
