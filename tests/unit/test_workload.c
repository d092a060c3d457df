/* SPDX-License-Identifier: Apache-2.0
 * test_workload.c - which tokens a step brings, who is profiled, and that a batch says what the trace says. */
#include "core_test.h"

static struct moe_model model_of(int layers, int experts, int k)
{
    struct moe_model m = test_model;
    m.n_layers = layers;
    m.n_experts = experts;
    m.top_k = k;
    return m;
}

/* Opens on small_trace() (3 requests of 2, 0 and 3 tokens). */
static int open_small(struct workload *w, struct scratch *s, int n_devices, const char *kind, int tokens,
                      double profile, struct err *e)
{
    struct moe_model m = model_of(2, 4, 2);
    json_t *spec = json_pack("{s:s, s:s, s:i, s:i, s:f}", "trace", scratch_path(s, "small"), "kind", kind,
                             !strcmp(kind, "prefill") ? "tokens_per_device" : "batch_per_device", tokens, "steps", 3,
                             "profile", profile);
    memset(e, 0, sizeof *e);
    int code = workload_open(w, spec, &m, n_devices, 1, "test:1", e);
    json_decref(spec);
    return code;
}

static int with_small_trace(void **state)
{
    int rc = scratch_make(state);
    if (rc == 0)
        small_trace(*state, "small");
    return rc;
}

static void split_is_a_share(void **state)
{
    struct scratch *s = *state;
    enum { N = 40 };
    struct err e = { 0 };
    struct moe_model m = model_of(1, 4, 1);
    uint8_t expert[N * 3] = { 0 };
    const char *dir = test_trace(s, "forty", N, 3, 1, 4, 1, expert);
    for (int percent = 5; percent <= 95; percent += 15) {
        struct workload w, again;
        json_t *spec = json_pack("{s:s, s:f, s:i}", "trace", dir, "profile", percent / 100.0, "batch_per_device", 2);
        test_ok(workload_open(&w, spec, &m, 2, 1, "test:1", &e), &e);
        test_ok(workload_open(&again, spec, &m, 2, 77, "test:1", &e), &e);
        assert_int_equal(w.n_profiled, N * percent / 100);
        assert_int_equal(w.n_played + w.n_profiled, N);
        int seen[N] = { 0 };
        for (int32_t i = 0; i < w.n_played; i++)
            seen[w.played[i]]++;
        for (int32_t i = 0; i < w.n_profiled; i++)
            seen[w.profiled[i]]++;
        for (int i = 0; i < N; i++)
            assert_int_equal(seen[i], 1); /* every request in one part */
        assert_memory_equal(w.profiled, again.profiled, sizeof *w.profiled * (size_t)w.n_profiled); /* not the seed's */
        struct statistics p;
        const struct moe_model one = { .n_layers = 1, .n_experts = 4 };
        test_ok(statistics_open(&p, &one, 0, "here", &e), &e);
        assert_int_equal(workload_profile(&w, &p), 3 * w.n_profiled);
        assert_true(p.load[0] == 3 * w.n_profiled && p.load[1] == 0);
        assert_true(!p.transitions && !p.coactivation);
        statistics_free(&p);
        workload_close(&w);
        workload_close(&again);
        json_decref(spec);
    }
}

static void profile_of_nothing_or_all(void **state)
{
    struct workload w;
    struct err e;
    test_ok(open_small(&w, *state, 1, "decode", 1, 0, &e), &e); /* 0: what is played is what is known */
    assert_int_equal(w.n_played, 2);                            /* the empty request is neither */
    assert_int_equal(w.n_profiled, 2);
    workload_close(&w);
    assert_says(&e, open_small(&w, *state, 1, "decode", 1, 0.01, &e), "workload.profile", "none to profile", NULL);
    workload_close(&w);
    assert_says(&e, open_small(&w, *state, 1, "decode", 1, 1, &e), "workload.profile", "within [0, 1)", NULL);
    workload_close(&w);
}

static void profiled_counts(void **state)
{
    struct scratch *s = *state;
    struct err e;
    struct workload w;
    struct statistics p;
    const struct moe_model m = { .n_layers = 2, .n_experts = 4 };
    test_ok(open_small(&w, s, 1, "decode", 1, 0, &e), &e);
    test_ok(statistics_open(&p, &m, MOE_NEEDS_TRANSITIONS | MOE_NEEDS_COACTIVATION, "here", &e), &e);
    assert_int_equal(workload_profile(&w, &p), 5);
    const double *transitions = p.transitions;
    /* small_trace(): layer 0 has 01 12 32 02 31, layer 1 has 23 30 10 13 02. */
    const double loads[] = { 2, 3, 3, 2, 3, 2, 2, 3 };
    assert_memory_equal(p.load, loads, sizeof loads);
    double sum = 0;
    for (int i = 0; i < 16; i++)
        sum += transitions[i];
    assert_true(sum == 5 * 2 * 2);
    assert_true(transitions[0 * 4 + 3] == 2); /* 0 then 3: tokens 0 and 3 */
    assert_true(transitions[2 * 4 + 0] == 2); /* 2 then 0: tokens 1 and 2 */
    assert_true(transitions[0 * 4 + 0] == 0);
    /* Layer 0: 01 12 23 02 13; layer 1: 23 03 01 13 02. Counted both ways, never with itself. */
    const double pairs[] = { 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0,
                             0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0 };
    assert_memory_equal(p.coactivation, pairs, sizeof pairs);
    statistics_reset(&p);
    assert_true(p.load[0] == 0 && p.transitions[3] == 0 && p.coactivation[1] == 0);
    /* ids that are no experts (null, zero, copy) are nobody's */
    statistics_add(&p, 1, (const int32_t[]){ 1, 4 }, 2, (const int32_t[]){ 5, 2 }, 2);
    assert_true(p.load[4 + 1] == 1 && p.transitions[2 * 4 + 1] == 1 && p.coactivation[16 + 4] == 0);
    statistics_free(&p);
    workload_close(&w);
}

/* One stream: requests whole and in turn, from their first tokens. */
static void single_stream(void **state)
{
    struct workload w;
    struct err e;
    test_ok(open_small(&w, *state, 1, "decode", 1, 0, &e), &e);
    const int64_t *offset = w.trace.offsets.data;
    for (int round = 0; round < 3; round++)
        for (int32_t i = 0; i < w.n_played; i++)
            for (int64_t row = offset[w.played[i]]; row < offset[w.played[i] + 1]; row++) {
                workload_step(&w);
                assert_int_equal(w.row[0], row);
                assert_int_equal(w.request[0], w.played[i]);
                assert_int_equal(w.position[0], row - offset[w.played[i]]);
            }
    workload_close(&w);
}

/* Streams start anywhere, walk their request, then take the next; a rewind gives the same tokens again. */
static void many_streams(void **state)
{
    struct scratch *s = *state;
    enum { N = 12, LENGTH = 5, STREAMS = 16 };
    struct err e = { 0 };
    struct moe_model m = model_of(1, 4, 1);
    uint8_t expert[N * LENGTH] = { 0 };
    struct workload w;
    json_t *spec = json_pack("{s:s, s:i, s:i}", "trace", test_trace(s, "twelve", N, LENGTH, 1, 4, 1, expert),
                             "profile", 0, "batch_per_device", STREAMS / 4);
    test_ok(workload_open(&w, spec, &m, 4, 9, "test:1", &e), &e);
    json_decref(spec);
    assert_int_equal(w.n_tokens, STREAMS);
    int64_t first[20][STREAMS], last[STREAMS];
    bool anywhere = false;
    for (int step = 0; step < 20; step++) {
        workload_step(&w);
        for (int i = 0; i < STREAMS; i++) {
            assert_int_equal(w.device[i], i / 4);
            if (step > 0 && last[i] % LENGTH == LENGTH - 1) { /* the request is over: the next one's beginning */
                int32_t at = 0;
                while (w.played[at] != last[i] / LENGTH)
                    at++;
                assert_int_equal(w.row[i], (int64_t)w.played[(at + 1) % w.n_played] * LENGTH);
            } else if (step > 0) {
                assert_int_equal(w.row[i], last[i] + 1);
            } else {
                anywhere |= w.row[i] % LENGTH != 0;
            }
            first[step][i] = last[i] = w.row[i];
        }
    }
    assert_true(anywhere);
    workload_rewind(&w, 9);
    for (int step = 0; step < 20; step++) {
        workload_step(&w);
        assert_memory_equal(w.row, first[step], sizeof first[step]);
    }
    workload_close(&w);
}

static void prefill(void **state)
{
    struct workload w;
    struct err e;
    test_ok(open_small(&w, *state, 2, "prefill", 7, 0, &e), &e);
    assert_int_equal(w.n_tokens, 14);
    workload_step(&w);
    for (int i = 0; i < 14; i++) {
        assert_int_equal(w.device[i], i / 7);
        bool follows = i % 7 == 0 || w.row[i] == w.row[i - 1] + 1 || w.position[i] == 0;
        assert_true(follows);
    }
    struct moe_batch b;
    test_ok(workload_batch(&w, 0, 0, 0, &b, &e), &e);
    assert_int_equal(b.phase, MOE_PREFILL);
    workload_close(&w);
}

static void batch_is_the_trace(void **state)
{
    struct workload w;
    struct err e;
    struct moe_batch b;
    test_ok(open_small(&w, *state, 2, "decode", 3, 0, &e), &e);
    const struct trace *t = &w.trace;
    const uint32_t needs = MOE_NEEDS_LOGITS | MOE_NEEDS_RECORDED | MOE_NEEDS_PREVIOUS_LOGITS;
    for (int32_t step = 0; step < 4; step++) {
        workload_step(&w);
        for (int32_t layer = 0; layer < 2; layer++) {
            test_ok(workload_batch(&w, step, layer, needs, &b, &e), &e);
            assert_int_equal(b.step, step);
            assert_int_equal(b.layer, layer);
            assert_int_equal(b.n_tokens, 6);
            assert_true((b.previous_logits != NULL) == (layer > 0));
            assert_null(b.hidden);
            test_ok(routes_check(b.recorded, 4, "trace", &e), &e);
            for (int32_t i = 0; i < 6; i++) {
                int64_t row = w.row[i], at = row * 2 + layer;
                int32_t request = trace_request(t, row);
                assert_int_equal(b.request[i], request);
                assert_int_equal(b.token_id[i], npy_int(&t->token_ids, row));
                int64_t first = ((const int64_t *)t->offsets.data)[request];
                assert_int_equal(b.previous_token_id[i], row > first ? npy_int(&t->token_ids, row - 1) : -1);
                assert_int_equal(b.position[i], npy_int(&t->positions, row));
                assert_int_equal(b.label[i], npy_int(&t->domains, request));
                assert_true((double)b.importance[i] == npy_real(&t->importance, row));
                for (int x = 0; x < 4; x++) {
                    assert_true((double)b.router_logits[i * 4 + x] == npy_real(&t->logits, at * 4 + x));
                    if (layer > 0)
                        assert_true((double)b.previous_logits[i * 4 + x] == npy_real(&t->logits, (at - 1) * 4 + x));
                }
                for (int k = 0; k < 2; k++) {
                    assert_int_equal(b.recorded->expert[i * 2 + k], npy_int(&t->experts, at * 2 + k));
                    assert_true((double)b.recorded->weight[i * 2 + k] == npy_real(&t->weights, at * 2 + k));
                }
            }
        }
    }
    workload_close(&w);
}

/* Six layers on a trace of two: 0 to 2 play the first, 3 to 5 the second. */
static void recorded_layers_repeat(void **state)
{
    struct workload w;
    struct err e = { 0 };
    struct moe_batch b;
    struct statistics p;
    struct moe_model m = model_of(6, 4, 2);
    json_t *spec = json_pack("{s:s, s:i, s:i, s:i}", "trace", scratch_path(*state, "small"), "batch_per_device", 2,
                             "profile", 0, "layer_repeat", 3);
    test_ok(workload_open(&w, spec, &m, 1, 1, "test:1", &e), &e);
    workload_step(&w);
    for (int32_t layer = 0; layer < 6; layer++) {
        test_ok(workload_batch(&w, 0, layer, MOE_NEEDS_RECORDED | MOE_NEEDS_PREVIOUS_LOGITS, &b, &e), &e);
        assert_int_equal(b.layer, layer);
        for (int32_t i = 0; i < 4; i++)
            assert_int_equal(b.recorded->expert[i],
                             npy_int(&w.trace.experts, (w.row[i / 2] * 2 + layer / 3) * 2 + i % 2));
        for (int x = 0; layer > 0 && x < 8; x++)
            assert_true((double)b.previous_logits[x] ==
                        npy_real(&w.trace.logits, (w.row[x / 4] * 2 + (layer - 1) / 3) * 4 + x % 4));
    }
    test_ok(statistics_open(&p, &m, MOE_NEEDS_TRANSITIONS, "here", &e), &e);
    assert_int_equal(workload_profile(&w, &p), 5);
    assert_memory_equal(p.load, p.load + 4, 4 * sizeof *p.load);
    assert_true(p.load[0] == 2 && p.load[3 * 4] == 3);
    assert_true(p.transitions[0] == 2 && p.transitions[1] == 1); /* from layer 0 to itself: what was chosen together */
    assert_true(p.transitions[(2 * 4 + 0) * 4 + 3] == 2);        /* from the first recorded layer to the second */
    statistics_free(&p);
    workload_close(&w);
    json_object_set_new(spec, "layer_repeat", json_integer(2));
    assert_says(&e, workload_open(&w, spec, &m, 1, 1, "test:1", &e), "6 layers", "2 layers", "layer_repeat 2", NULL);
    workload_close(&w);
    json_decref(spec);
}

static void what_is_lacking_is_named(void **state)
{
    struct scratch *s = *state;
    struct workload w;
    struct err e;
    test_ok(open_small(&w, s, 1, "decode", 1, 0, &e), &e);
    assert_null(workload_lacks(&w, MOE_NEEDS_LOGITS | MOE_NEEDS_SCORES | MOE_NEEDS_IMPORTANCE | MOE_NEEDS_TOKEN_ID |
                                   MOE_NEEDS_LABEL | MOE_NEEDS_RECORDED | MOE_NEEDS_PREVIOUS));
    assert_non_null(strstr(workload_lacks(&w, MOE_NEEDS_HIDDEN), "hidden.npy")); /* 2 of 5 tokens have one */
    workload_close(&w);

    struct moe_model m = model_of(1, 4, 1);
    uint8_t expert[6] = { 0 };
    json_t *spec = json_pack("{s:s, s:i}", "trace", test_trace(s, "bare", 2, 3, 1, 4, 1, expert), "profile", 0);
    memset(&e, 0, sizeof e);
    test_ok(workload_open(&w, spec, &m, 1, 1, "test:1", &e), &e);
    json_decref(spec);
    static const struct { uint32_t need; const char *file; } lacks[] = {
        { MOE_NEEDS_LOGITS, "logits.npy" },         { MOE_NEEDS_SCORES, "logits.npy" },
        { MOE_NEEDS_HIDDEN, "hidden.npy" },         { MOE_NEEDS_IMPORTANCE, "importance.npy" },
        { MOE_NEEDS_TOKEN_ID, "token_ids.npy" },    { MOE_NEEDS_LABEL, "domains.npy" },
    };
    for (size_t i = 0; i < sizeof lacks / sizeof *lacks; i++)
        assert_non_null(strstr(workload_lacks(&w, lacks[i].need), lacks[i].file));
    assert_null(workload_lacks(&w, MOE_NEEDS_RECORDED | MOE_CROSS_BATCH));
    workload_close(&w);
}

static void bad_specifications(void **state)
{
    struct scratch *s = *state;
    struct workload w;
    struct err e;
    struct moe_model right = model_of(2, 4, 2), wrong = model_of(2, 8, 2);
    const char *dir = scratch_path(s, "small");
#define REFUSED(model, spec_, ...)                                                                                    \
    do {                                                                                                              \
        json_t *spec = spec_;                                                                                         \
        memset(&e, 0, sizeof e);                                                                                      \
        assert_says(&e, workload_open(&w, spec, &model, 2, 1, "test:1", &e), "test:1", __VA_ARGS__, NULL);            \
        workload_close(&w);                                                                                           \
        json_decref(spec);                                                                                            \
    } while (0)
    REFUSED(right, json_pack("{}"), "workload.trace");
    REFUSED(right, json_pack("{s:s}", "trace", "/no/such"), "/no/such");
    REFUSED(wrong, json_pack("{s:s}", "trace", dir), "2 layers, 8 experts, top_k 2", "2 layers, 4 experts, top_k 2");
    REFUSED(right, json_pack("{s:s, s:s}", "trace", dir, "kind", "training"), "workload.kind", "\"training\"");
    REFUSED(right, json_pack("{s:s, s:i}", "trace", dir, "batch_per_device", 0), "workload.batch_per_device", "0 is");
    REFUSED(right, json_pack("{s:s, s:f}", "trace", dir, "steps", 1.5), "workload.steps", "whole number");
    REFUSED(right, json_pack("{s:s, s:s}", "trace", dir, "profile", "all"), "workload.profile");
    REFUSED(right, json_pack("{s:s, s:s, s:i}", "trace", dir, "kind", "prefill", "tokens_per_device", 1 << 21),
            "workload.tokens_per_device", "out of range");
    REFUSED(right, json_pack("{s:s, s:f}", "trace", dir, "context", 1e9), "workload.context", "1e+09 is out of range");
#undef REFUSED
    json_t *thousand = json_pack("{s:s, s:i, s:f}", "trace", dir, "batch_per_device", 2, "context", 1e3);
    memset(&e, 0, sizeof e);
    test_ok(workload_open(&w, thousand, &right, 2, 1, "test:1", &e), &e);
    assert_int_equal(w.context, 1000);
    workload_close(&w);
    json_decref(thousand);
    json_t *spec = json_pack("{s:s, s:i}", "trace", dir, "batch_per_device", 1 << 20);
    memset(&e, 0, sizeof e);
    assert_says(&e, workload_open(&w, spec, &right, 1024, 1, "test:1", &e), "1024 devices", "16777216", NULL);
    workload_close(&w);
    json_decref(spec);
}

#define WITH_SCRATCH(test) cmocka_unit_test_setup_teardown(test, with_small_trace, scratch_remove)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SCRATCH(split_is_a_share),
        WITH_SCRATCH(profile_of_nothing_or_all),
        WITH_SCRATCH(profiled_counts),
        WITH_SCRATCH(single_stream),
        WITH_SCRATCH(many_streams),
        WITH_SCRATCH(prefill),
        WITH_SCRATCH(batch_is_the_trace),
        WITH_SCRATCH(recorded_layers_repeat),
        WITH_SCRATCH(what_is_lacking_is_named),
        WITH_SCRATCH(bad_specifications),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
