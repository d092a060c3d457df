/* SPDX-License-Identifier: Apache-2.0
 * test_trace.c - every way in which a trace can be wrong, and the words it gets; reading; importing; replacing. */
#include "config.h"

#include "sha256.h"
#include "trace_fixture.h"

#include <signal.h>
#include <sys/resource.h>
#include <time.h>

static void opens_and_reads(void **state)
{
    struct trace t;
    struct npy *optional[] = { &t.weights,    &t.logits, &t.token_ids, &t.positions,
                               &t.importance, &t.hidden, &t.gate,      &t.domains };
    int32_t id[2];
    float w[2];
    small_trace(*state, "t");
    char dir[300];
    snprintf(dir, sizeof dir, "%s//", scratch_path(*state, "t"));
    ok(trace_open(&t, dir, err));
    assert_true(t.n_tokens == 5 && t.n_layers == 2 && t.n_experts == 4 && t.top_k == 2 && t.n_requests == 3);
    assert_string_equal(json_string_value(json_object_get(t.meta, "model")), "small");
    for (size_t i = 0; i < sizeof optional / sizeof *optional; i++)
        assert_non_null(optional[i]->data);
    trace_experts(&t, 3, 1, id);
    assert_true(id[0] == 1 && id[1] == 3);
    trace_weights(&t, 1, 1, w);
    assert_true(w[0] == 6.0f / 8 && w[1] == 7.0f / 8);
    static const int32_t request[5] = { 0, 0, 2, 2, 2 }; /* the second request is empty */
    for (int64_t token = 0; token < 5; token++)
        assert_int_equal(trace_request(&t, token), request[token]);
    trace_close(&t);
    trace_close(&t);

    snprintf(dir, sizeof dir, "%s/weights.npy", scratch_path(*state, "t"));
    unlink(dir);
    ok(trace_open(&t, scratch_path(*state, "t"), err));
    assert_null(t.weights.data);
    trace_weights(&t, 1, 1, w);
    assert_true(w[0] == 0.5f && w[1] == 0.5f);
    trace_close(&t);
}

/* The checksum is what `sha256sum` prints, hashed. */
static void checksum(void **state)
{
    struct trace t;
    char hex[65], want[65], command[400], line[80];
    small_trace(*state, "t");
    ok(trace_open(&t, scratch_path(*state, "t"), err));
    ok(trace_checksum(&t, hex, err));
    trace_close(&t);
    snprintf(command, sizeof command, "cd '%s' && LC_ALL=C sh -c 'sha256sum *' | sha256sum", scratch_path(*state, "t"));
    FILE *p = popen(command, "r");
    assert_non_null(p);
    assert_non_null(fgets(line, sizeof line, p));
    pclose(p);
    snprintf(want, sizeof want, "%.64s", line);
    assert_string_equal(hex, want);
}

/* ---- bad input ---- */

struct damage {
    const char *file, *dtype;
    int n_dims;
    int64_t shape[4];
    const void *data;
    const char *says[3];
};

static void refuses_arrays(void **state)
{
    static const uint8_t range[20] = { 0, 1, 2, 3, 1, 4 }, twice[20] = { 0, 1, 2, 3, 1, 2, 3, 3 };
    static const uint8_t fine[20] = { 0, 1, 2, 3, 1, 2, 3, 0, 3, 2, 1, 0, 0, 2, 1, 3, 3, 1, 0, 2 };
    static const uint16_t wide[20] = { 0, 1, 2, 3, 1, 2, 3, 0, 3, 2, 1, 0, 0, 2, 1, 3, 3, 1, 0, 40000 };
    static const int64_t falls[4] = { 0, 3, 2, 5 }, begins[4] = { 1, 2, 2, 5 }, ends[4] = { 0, 2, 2, 4 };
    static const int64_t minus[4] = { 0, -1, 2, 5 };
    static const int32_t negative[5] = { 1, 2, -3, 4, 5 };
    static const uint8_t domains[3] = { 0, 2, 1 };
    static const uint16_t half[48] = { 0, 0, 0, 0, 0, 0x7e00 }, infinite[48] = { 0, 0xfc00 };
    static const float real[30] = { 0 };
    static const struct damage bad[] = {
        { "experts.npy", "i2", 3, { 5, 2, 2 }, half, { "experts.npy", "dtype is i2", "expected u1|u2" } },
        { "experts.npy", "u1", 3, { 5, 2, 1 }, fine, { "experts.npy", "(5, 2, 1)", "expected (5, 2, 2)" } },
        { "experts.npy", "u1", 2, { 5, 4 }, fine, { "experts.npy", "(5, 4)", "expected (5, 2, 2)" } },
        { "experts.npy", "u1", 3, { 5, 2, 2 }, range, { "experts.npy[1,0,1]", "found expert 4", "expected 0..3" } },
        { "experts.npy",
          "u1",
          3,
          { 5, 2, 2 },
          twice,
          { "experts.npy[1,1,1]", "found expert 3 a second time", "2 different" } },
        { "experts.npy", "u2", 3, { 5, 2, 2 }, wide, { "experts.npy[4,1,1]", "found expert 40000", "expected 0..3" } },
        { "offsets.npy", "i4", 1, { 4 }, negative, { "offsets.npy", "dtype is i4", "expected i8" } },
        { "offsets.npy", "i8", 1, { 3 }, falls, { "offsets.npy", "(3,)", "expected (4,)" } },
        { "offsets.npy", "i8", 1, { 4 }, falls, { "offsets.npy[2]", "found 2", "expected at least 3" } },
        { "offsets.npy", "i8", 1, { 4 }, minus, { "offsets.npy[1]", "found -1", "expected at least 0" } },
        { "offsets.npy", "i8", 1, { 4 }, begins, { "offsets.npy[0]", "found 1", "expected 0" } },
        { "offsets.npy", "i8", 1, { 4 }, ends, { "offsets.npy[3]", "found 4", "expected 5, the number of tokens" } },
        { "weights.npy", "f2", 3, { 5, 2, 2 }, half, { "weights.npy[1,0,1]", "found NaN", "finite" } },
        { "weights.npy", "f8", 3, { 1, 1, 1 }, falls, { "weights.npy", "dtype is f8", "expected f2|f4" } },
        { "logits.npy", "f2", 3, { 5, 2, 4 }, infinite, { "logits.npy[0,0,1]", "found -infinity", "finite" } },
        { "logits.npy", "f2", 3, { 5, 4, 2 }, half, { "logits.npy", "(5, 4, 2)", "expected (5, 2, 4)" } },
        { "token_ids.npy", "i4", 1, { 5 }, negative, { "token_ids.npy[2]", "found -3", "expected 0.." } },
        { "positions.npy", "i4", 1, { 5 }, negative, { "positions.npy[2]", "found -3", "expected 0.." } },
        { "positions.npy", "i4", 1, { 4 }, negative, { "positions.npy", "(4,)", "expected (5,)" } },
        { "importance.npy", "f2", 1, { 5 }, infinite, { "importance.npy[1]", "found -infinity", "finite" } },
        { "hidden.npy", "f2", 3, { 2, 2, 3 }, half, { "hidden.npy[0,1,2]", "found NaN", "finite" } },
        { "hidden.npy", "f2", 3, { 6, 2, 3 }, real, { "hidden.npy", "6 tokens", "at most the trace's 5" } },
        { "hidden.npy", "f2", 3, { 2, 2, 4 }, real, { "hidden.npy", "width 4", "expected 3 as in gate.npy" } },
        { "gate.npy", "f4", 3, { 2, 3, 3 }, real, { "gate.npy", "(2, 3, 3)", "expected (2, 4, any)" } },
        { "domains.npy", "u1", 1, { 3 }, domains, { "domains.npy[1]", "found 2", "expected 0..1" } },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct trace t;
        struct err wrong = { 0 };
        char name[16], path[512];
        snprintf(name, sizeof name, "t%zu", i);
        small_trace(*state, name);
        snprintf(path, sizeof path, "%s/%s", scratch_path(*state, name), bad[i].file);
        ok(npy_write(path, bad[i].dtype, bad[i].n_dims, bad[i].shape, bad[i].data, err));
        assert_says(&wrong, trace_open(&t, scratch_path(*state, name), &wrong), bad[i].says[0], bad[i].says[1],
                    bad[i].says[2], NULL);
        assert_int_equal(wrong.code, ERR_INPUT);
    }
}

static void refuses_missing_and_truncated(void **state)
{
    static const char *const required[] = { "trace.json", "experts.npy", "offsets.npy" };
    static const char *const every[] = { "experts.npy", "offsets.npy", "weights.npy", "logits.npy", "domains.npy" };
    struct trace t;
    char path[512], name[16];
    for (size_t i = 0; i < 3; i++) {
        struct err gone = { 0 };
        snprintf(name, sizeof name, "m%zu", i);
        small_trace(*state, name);
        snprintf(path, sizeof path, "%s/%s", scratch_path(*state, name), required[i]);
        unlink(path);
        assert_says(&gone, trace_open(&t, scratch_path(*state, name), &gone), required[i], "No such file", NULL);
    }
    for (size_t i = 0; i < 5; i++) {
        struct err cut = { 0 };
        struct stat st;
        snprintf(name, sizeof name, "c%zu", i);
        small_trace(*state, name);
        snprintf(path, sizeof path, "%s/%s", scratch_path(*state, name), every[i]);
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(truncate(path, st.st_size - 1), 0);
        assert_says(&cut, trace_open(&t, scratch_path(*state, name), &cut), every[i], "truncated", "expected", NULL);
    }
    struct err none = { 0 }, file = { 0 };
    assert_says(&none, trace_open(&t, scratch_path(*state, "none"), &none), "none", "expected a trace directory", NULL);
    write_text(scratch_path(*state, "file"), "x");
    assert_says(&file, trace_open(&t, scratch_path(*state, "file"), &file), "not a directory", NULL);
}

/* The numbers as text, so that they need not be numbers. */
#define META(layers, experts, top_k, requests, tokens)                                                 \
    "{\"layers\": " layers ", \"experts\": " experts ", \"top_k\": " top_k ", \"requests\": " requests \
    ", \"tokens\": " tokens "}"

static void refuses_meta(void **state)
{
    static const struct {
        const char *json, *says[2];
    } bad[] = {
        { "{\"layers\": 2, \"experts\": 4, \"top_k\": 2, \"requests\": 3}", { "trace.json", "no key \"tokens\"" } },
        { META("2.5", "4", "2", "3", "5"), { "\"layers\" is 2.5", "expected an integer" } },
        { META("0", "4", "2", "3", "5"), { "\"layers\" is 0", "expected 1.." } },
        { META("2", "4", "5", "3", "5"), { "\"top_k\" is 5", "expected 1..4" } },
        { META("2", "4", "2", "-3", "5"), { "\"requests\" is -3", "expected 0.." } },
        { META("2", "4", "2", "3", "9223372036854775807"), { "\"tokens\" is 9223372036854775807", "expected 0.." } },
        { META("2", "4", "2", "3", "6"), { "experts.npy: shape is (5, 2, 2)", "expected (6, 2, 2)" } },
        { META("3", "4", "2", "3", "5"), { "experts.npy: shape is (5, 2, 2)", "expected (5, 3, 2)" } },
        { META("2", "3", "2", "3", "5"), { "gate.npy", "expected (2, 3, any)" } },
        { "[1]", { "trace.json", "not an object" } },
        { "{\"layers\": 2,\n oops}", { "trace.json:2", "" } },
        { "{\"layers\": 2, \"layers\": 3}", { "trace.json:1", "duplicate" } },
    };
    small_trace(*state, "t");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct trace t;
        struct err err = { 0 };
        write_text(scratch_path(*state, "t/trace.json"), bad[i].json);
        assert_says(&err, trace_open(&t, scratch_path(*state, "t"), &err), bad[i].says[0], bad[i].says[1], NULL);
    }
}

static void empty_trace(void **state)
{
    static const int64_t zero[1] = { 0 }, shape[3] = { 0, 3, 2 };
    struct trace_out o;
    struct trace t;
    ok(trace_out_begin(&o, scratch_path(*state, "t"), err));
    ok(npy_write(trace_out_path(&o, "experts.npy"), "u2", 3, shape, "", err));
    ok(npy_write(trace_out_path(&o, "offsets.npy"), "i8", 1, &(int64_t){ 1 }, zero, err));
    json_t *meta = trace_meta(3, 1000, 2, 0, 0);
    ok(trace_out_commit(&o, meta, err));
    json_decref(meta);
    ok(trace_open(&t, scratch_path(*state, "t"), err));
    assert_int_equal(t.n_tokens, 0);
    trace_close(&t);
}

/* ---- writing ---- */

static void replaces_traces_only(void **state)
{
    struct trace_out o;
    struct scratch *s = *state;
    struct trace_synth p = { .n_layers = 1, .n_experts = 4, .top_k = 2, .n_requests = 1, .tokens_per_request = 3 };
    struct trace t;
    struct err foreign = { 0 }, file = { 0 }, parent = { 0 };
    small_trace(s, "t");
    ok(trace_synthesise(&p, scratch_path(s, "t"), err)); /* a trace is replaced, optional files and all */
    ok(trace_open(&t, scratch_path(s, "t"), err));
    assert_true(t.n_tokens == 3 && t.domains.data == NULL);
    trace_close(&t);
    assert_true(access(scratch_path(s, "t.part"), F_OK) < 0 && access(scratch_path(s, "t.old"), F_OK) < 0);

    write_text(scratch_path(s, "t/thesis.tex"), "years of work");
    assert_says(&foreign, trace_synthesise(&p, scratch_path(s, "t"), &foreign), "not overwritten", "thesis.tex", NULL);
    assert_int_equal(access(scratch_path(s, "t/thesis.tex"), F_OK), 0);
    write_text(scratch_path(s, "file"), "x");
    assert_says(&file, trace_synthesise(&p, scratch_path(s, "file"), &file), "file", "not a directory", NULL);
    assert_says(&parent, trace_synthesise(&p, scratch_path(s, "no/t"), &parent), "no/t.part", "cannot create", NULL);

    assert_int_equal(mkdir(scratch_path(s, "empty"), 0777), 0);
    ok(trace_synthesise(&p, scratch_path(s, "empty"), err));

    ok(trace_out_begin(&o, scratch_path(s, "gone"), err)); /* a killed writer's leavings are no obstacle */
    write_text(trace_out_path(&o, "experts.npy.part"), "half");
    ok(trace_synthesise(&p, scratch_path(s, "gone"), err));
    assert_true(access(scratch_path(s, "gone.part"), F_OK) < 0);
}

static void full_disk(void **state)
{
    struct trace_synth p = {
        .n_layers = 4, .n_experts = 64, .top_k = 4, .n_requests = 2, .tokens_per_request = 200, .logits = true
    };
    struct scratch *s = *state;
    struct rlimit old, small;
    struct trace t;
    struct err full = { 0 };
    small_trace(s, "t");
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small = old;
    small.rlim_cur = 65536; /* experts fit, logits do not */
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    int rc = trace_synthesise(&p, scratch_path(s, "t"), &full);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_says(&full, rc, "logits.npy", "cannot write", NULL);
    assert_int_equal(rc, ERR_IO);
    assert_true(access(scratch_path(s, "t.part"), F_OK) < 0);
    ok(trace_open(&t, scratch_path(s, "t"), err)); /* what was there before */
    assert_int_equal(t.n_tokens, 5);
    trace_close(&t);
}

/* ---- importing ---- */

enum { LAYERS = 2, K = 2 };

static void import(void **state)
{
    /* Token 1 is padding; requests of 2, 1 and 1 tokens. */
    static const int16_t ids[4 * LAYERS * K] = { 0, 1, 2, 300, -1, -1, -1, -1, 5, 4, 3, 2, 1, 0, 299, 7 };
    static const int64_t offsets[4] = { 0, 2, 3, 4 }, shape[3] = { 4, LAYERS, K };
    struct scratch *s = *state;
    char in[300], at[300];
    struct trace_import how = { .format = "vllm", .input = in, .offsets = at, .drop_padding = true };
    struct trace_import_report report;
    struct trace t;
    int32_t id[2];
    snprintf(in, sizeof in, "%s/ids.npy", s->dir);
    snprintf(at, sizeof at, "%s/at.npy", s->dir);
    ok(npy_write(in, "i2", 3, shape, ids, err));
    ok(npy_write(at, "i8", 1, &(int64_t){ 4 }, offsets, err));
    ok(trace_import_vllm(&how, scratch_path(s, "t"), &report, err));
    assert_true(report.n_tokens == 3 && report.n_dropped == 1 && report.n_experts == 301 && report.longest_run == 1);
    ok(trace_open(&t, scratch_path(s, "t"), err));
    assert_true(t.n_tokens == 3 && t.n_requests == 3 && t.experts.item_bytes == 2);
    assert_true(npy_int(&t.offsets, 1) == 1 && npy_int(&t.offsets, 2) == 2 && npy_int(&t.offsets, 3) == 3);
    trace_experts(&t, 2, 1, id);
    assert_true(id[0] == 299 && id[1] == 7);
    trace_close(&t);

    how.first_layer = 1;
    how.n_experts = 512;
    how.offsets = NULL;
    ok(trace_import_vllm(&how, scratch_path(s, "t"), NULL, err));
    ok(trace_open(&t, scratch_path(s, "t"), err));
    assert_true(t.n_layers == 1 && t.n_experts == 512 && t.n_requests == 1);
    trace_experts(&t, 1, 0, id);
    assert_true(id[0] == 3 && id[1] == 2);
    trace_close(&t);
}

static void import_refuses(void **state)
{
    static const int64_t shape[3] = { 3, LAYERS, K };
    static const int16_t padded[12] = { 0, 1, 2, 3, -1, -1, -1, -1, 0, 1, 2, 3 };
    static const int16_t partly[12] = { 0, 1, 2, 3, 0, 1, -1, -1, 0, 1, 2, 3 };
    static const int16_t dense[12] = { 0, 0, 2, 3, 0, 0, 2, 1, 0, 0, 2, 3 };
    static const int16_t twice[12] = { 0, 1, 2, 3, 0, 1, 2, 2, 0, 1, 2, 3 };
    static const int16_t fine[12] = { 0, 1, 2, 3, 0, 1, 2, 9, 0, 1, 2, 3 };
    static const int64_t falls[3] = { 0, 2, 1 }, beyond[3] = { 0, 4, 3 }, brief[3] = { 0, 1, 2 };
    const struct {
        const int16_t *ids;
        const int64_t *at;
        bool drop;
        int32_t experts, first;
        const char *says[3];
    } bad[] = {
        { padded, NULL, false, 0, 0, { "ids.npy[1,0,0]", "found -1", "--drop-padding" } },
        { partly, NULL, true, 0, 0, { "ids.npy[1,1,0]", "found -1", "only 2 of this token's 4" } },
        { dense, NULL, false, 0, 0, { "ids.npy[0,0,1]", "expert 0 a second time", "--first-layer" } },
        { twice, NULL, false, 0, 0, { "ids.npy[1,1,1]", "expert 2 a second time", "2 different" } },
        { fine, NULL, false, 8, 0, { "ids.npy[1,1,1]", "found expert 9", "expected 0..7" } },
        { fine, NULL, false, 0, 2, { "ids.npy", "first layer 2", "expected 0..1" } },
        { fine, falls, false, 0, 0, { "at.npy[2]", "found 1", "never decrease" } },
        { fine, beyond, false, 0, 0, { "at.npy[1]", "found 4", "from 0 to 3" } },
        { fine, brief, false, 0, 0, { "at.npy[2]", "found 2", "from 0 to 3" } },
    };
    struct scratch *s = *state;
    char in[300], at[300];
    snprintf(in, sizeof in, "%s/ids.npy", s->dir);
    snprintf(at, sizeof at, "%s/at.npy", s->dir);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct trace_import how = { .format = "vllm",
                                    .input = in,
                                    .offsets = bad[i].at ? at : NULL,
                                    .drop_padding = bad[i].drop,
                                    .n_experts = bad[i].experts,
                                    .first_layer = bad[i].first };
        struct err wrong = { 0 };
        ok(npy_write(in, "i2", 3, shape, bad[i].ids, err));
        if (bad[i].at)
            ok(npy_write(at, "i8", 1, &(int64_t){ 3 }, bad[i].at, err));
        assert_says(&wrong, trace_import_vllm(&how, scratch_path(s, "t"), NULL, &wrong), bad[i].says[0], bad[i].says[1],
                    bad[i].says[2], NULL);
        assert_true(access(scratch_path(s, "t"), F_OK) < 0 && access(scratch_path(s, "t.part"), F_OK) < 0);
    }
    struct trace_import how = { .format = "vllm", .input = in };
    struct err dims = { 0 };
    ok(npy_write(in, "i2", 2, shape, fine, err));
    assert_says(&dims, trace_import_vllm(&how, scratch_path(s, "t"), NULL, &dims), "shape is (3, 2)", "expected (any",
                NULL);
}

static void import_finds_dummy_rows(void **state)
{
    enum { T = 200 };
    int16_t ids[T * LAYERS * K];
    char in[300];
    struct trace_import how = { .format = "vllm", .input = in };
    struct trace_import_report report;
    for (int16_t i = 0; i < T * LAYERS * K; i++)
        ids[i] = (int16_t)(i / 4 >= 50 && i / 4 < 150 ? i % 4 : i % 4 + i / 4);
    snprintf(in, sizeof in, "%s/ids.npy", ((struct scratch *)*state)->dir);
    ok(npy_write(in, "i2", 3, (int64_t[]){ T, LAYERS, K }, ids, err));
    ok(trace_import_vllm(&how, scratch_path(*state, "t"), &report, err));
    assert_true(report.longest_run == 100 && report.longest_run_at == 50);
}

/* ---- the recorded trace ---- */

static void recorded_trace(void **state)
{
    char path[512];
    struct trace t;
    struct timespec a, b;
    (void)state;
    if (!shared_path("traces/gpt-oss-20b", path))
        skip();
    ok(trace_open(&t, path, err));
    trace_close(&t);
    clock_gettime(CLOCK_MONOTONIC, &a);
    ok(trace_open(&t, path, err));
    clock_gettime(CLOCK_MONOTONIC, &b);
    double ms = (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6;
    print_message("# checked %lld ids in %.1f ms\n", (long long)t.experts.count, ms);
    assert_true(t.n_tokens == 7684 && t.n_layers == 24 && t.n_experts == 32 && t.top_k == 4 && t.n_requests == 30);
    trace_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(opens_and_reads, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(checksum, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(refuses_arrays, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(refuses_missing_and_truncated, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(refuses_meta, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(empty_trace, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(replaces_traces_only, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(full_disk, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(import, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(import_refuses, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(import_finds_dummy_rows, scratch_make, scratch_remove),
        cmocka_unit_test(recorded_trace),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("trace", tests, NULL, NULL);
}
