/* SPDX-License-Identifier: Apache-2.0
 * test_consistency.c - SRP and SCH against the authors' figures and closed forms; the other metrics against traces
 * whose answer is known. */
#include "config.h"

#include "consistency.h"
#include "trace_fixture.h"

#include <math.h>

/* ---- closed forms ---- */

/* arXiv 2505.16056: per cent, as derived from its formulas. */
static void floors_of_srp(void **state)
{
    static const struct {
        int32_t k, n, m;
        double floor;
    } row[] = {
        { 2, 8, 4, 56.49 },  { 2, 8, 16, 45.20 },  { 2, 8, 64, 40.91 },  { 2, 8, 256, 40.05 },
        { 8, 64, 4, 46.40 }, { 8, 64, 16, 32.14 }, { 8, 64, 64, 25.26 }, { 8, 64, 256, 22.94 },
    };
    (void)state;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++)
        if (fabs(100 * srp_floor(row[i].k, row[i].n, row[i].m) - row[i].floor) > 0.0051)
            fail_msg("m=%d %d/%d: %.4f, expected %.2f", row[i].m, row[i].k, row[i].n,
                     100 * srp_floor(row[i].k, row[i].n, row[i].m), row[i].floor);
    assert_true(srp_floor(4, 4, 16) == 1.0); /* every expert always: nothing to foretell */
}

static struct routing one_request(const uint8_t *experts, const int64_t offsets[2], int32_t layers, int32_t n,
                                  int32_t k)
{
    return (struct routing){ .n_tokens = offsets[1],
                             .n_layers = layers,
                             .n_experts = n,
                             .top_k = k,
                             .n_requests = 1,
                             .item_bytes = 1,
                             .experts = experts,
                             .offsets = offsets };
}

static void srp_by_hand(void **state)
{
    /* One expert per token of 2: 0 0 0 1. Windows of 2: {0,0} {0,0} {0,1}; activations of 0: 2 2 1, of 1: 0 0 1. */
    static const uint8_t id[] = { 0, 0, 0, 1 };
    static const int64_t offsets[] = { 0, 4 };
    struct routing r = one_request(id, offsets, 1, 2, 1);
    double hist[3] = { 0 };
    (void)state;
    ok(srp_count(&r, 0, 2, hist, NULL, err));
    assert_true(hist[0] == 2 && hist[1] == 2 && hist[2] == 2);
    struct srp srp = srp_of_histogram(hist, 2); /* a=2: 2*4/(4+6) = 0.8; a=1: 2*6/(8+6) = 0.857 */
    assert_true(fabs(srp.f1 - 12.0 / 14) < 1e-12);
    assert_int_equal(srp.threshold, 1);
    assert_true(fabs(srp.size_ratio - 8.0 / 6) < 1e-12);
}

static void sch_by_hand(void **state)
{
    /* Top 1 of 3: 0 1 2 0 1 with the whole future known and room for 2 is Belady: 0 and 1 are first touches with
     * free places (hits), 2 displaces one of them and misses; then either 0 or 1 is still there. */
    static const uint8_t id[] = { 0, 1, 2, 0, 1 };
    static const int64_t offsets[] = { 0, 5 };
    struct routing r = one_request(id, offsets, 1, 3, 1);
    double rate[3];
    (void)state;
    ok(sch_curve(&r, 0, 5, 3, rate, err));
    assert_true(fabs(rate[0] - 0.2) < 1e-12); /* the first touch */
    assert_true(fabs(rate[1] - 0.6) < 1e-12);
    assert_true(fabs(rate[2] - 1.0) < 1e-12);
}

/* A curve cut off at c is the beginning of the full one. */
static void sch_depth(void **state)
{
    static const int64_t offsets[] = { 0, 300, 301, 900 };
    struct routing shape = {
        .n_tokens = 900, .n_layers = 3, .n_experts = 8, .top_k = 2, .n_requests = 3, .offsets = offsets
    };
    struct routing r;
    double full[24], part[24];
    (void)state;
    ok(routing_iid(&r, &shape, 3, 5, err));
    ok(sch_curve(&r, -1, 16, 24, full, err));
    assert_true(full[23] == 1.0);
    for (int32_t c = 1; c < 24; c++) {
        ok(sch_curve(&r, -1, 16, c, part, err));
        assert_memory_equal(part, full, (size_t)c * sizeof *part);
    }
    routing_free_iid(&r);
}

/* ---- unrelated routing meets its floor, related routing does not ---- */

static void iid_meets_floor(void **state)
{
    static const struct {
        int32_t k, n;
    } row[] = { { 2, 8 }, { 8, 64 }, { 4, 32 } };
    static const int64_t offsets[] = { 0, 4000, 8000 };
    (void)state;
    for (size_t i = 0; i < 3; i++)
        for (int32_t m = 4; m <= 256; m *= 4) {
            struct routing shape = { .n_tokens = 8000,
                                     .n_layers = 4,
                                     .n_experts = row[i].n,
                                     .top_k = row[i].k,
                                     .n_requests = 2,
                                     .offsets = offsets };
            struct routing r;
            double hist[257] = { 0 }, value, chance;
            ok(routing_iid(&r, &shape, 4, 17, err));
            for (int32_t l = 0; l < 4; l++)
                ok(srp_count(&r, l, m, hist, NULL, err));
            double off = srp_of_histogram(hist, m).f1 - srp_floor(row[i].k, row[i].n, m);
            if (fabs(off) > 0.003)
                fail_msg("m=%d %d/%d: %.4f off the floor", m, row[i].k, row[i].n, off);
            ok(routing_overlap(&r, -1, &value, &chance, err));
            assert_true(fabs(value - (double)row[i].k / row[i].n) < 0.005);
            assert_true(fabs(chance - (double)row[i].k / row[i].n) < 0.005);
            ok(routing_affinity(&r, -1, &value, &chance, err));
            assert_true(fabs(value - chance) < 0.005);
            ok(routing_recall(&r, -1, &value, &chance, err));
            assert_true(fabs(value - chance) < 0.005);
            routing_free_iid(&r);
        }
}

static void overlap_and_load_by_hand(void **state)
{
    /* Two requests of 2 tokens, top 2 of 4: {0,1} {1,2} | {3,0} {0,3}: 1 + 2 of 4 places shared. */
    static const uint8_t id[] = { 0, 1, 1, 2, 3, 0, 0, 3 };
    static const int64_t offsets[] = { 0, 2, 4 };
    struct routing r = { .n_tokens = 4,
                         .n_layers = 1,
                         .n_experts = 4,
                         .top_k = 2,
                         .n_requests = 2,
                         .item_bytes = 1,
                         .experts = id,
                         .offsets = offsets };
    int64_t load[4];
    double value, chance;
    (void)state;
    routing_load(&r, 0, load);
    assert_true(load[0] == 3 && load[1] == 2 && load[2] == 1 && load[3] == 2);
    ok(routing_overlap(&r, -1, &value, &chance, err));
    assert_true(fabs(value - 3.0 / 4) < 1e-12);
    assert_true(fabs(chance - (9 + 4 + 1 + 4) / 16.0 / 2) < 1e-12);
    ok(routing_max_vio(&r, -1, 0, &value, err)); /* mean 2, most 3 */
    assert_true(fabs(value - 0.5) < 1e-12);
    ok(routing_max_vio(&r, -1, 2, &value, err)); /* {1,2,1,0} and {2,0,0,2}, mean 1 */
    assert_true(fabs(value - 1.0) < 1e-12);
}

static void affinity_by_hand(void **state)
{
    /* Layer 1 repeats layer 0 with 0 and 1 exchanged: certain. */
    static const uint8_t id[] = { 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0 };
    static const int64_t offsets[] = { 0, 6 };
    struct routing r = one_request(id, offsets, 2, 2, 1);
    double value, chance;
    (void)state;
    ok(routing_affinity(&r, -1, &value, &chance, err));
    assert_true(value == 1.0);
    assert_true(chance < 1.0);
}

static void recall_by_hand(void **state)
{
    /* Top 1 of 3, four tokens: 0 goes to 1 twice and to 2 once, 2 to 0. What is likeliest is right 3 times of 4. */
    static const uint8_t id[] = { 0, 1, 0, 2, 2, 0, 0, 1 };
    static const int64_t offsets[] = { 0, 4 };
    struct routing r = one_request(id, offsets, 2, 3, 1);
    double value, chance;
    (void)state;
    ok(routing_recall(&r, -1, &value, &chance, err));
    assert_true(value == 0.75);
    /* Two tokens further on: 0 to 0, 0 to 1, 2 to 1, 0 to 2: of 0's three successors the lowest id is taken. */
    assert_true(chance == 0.5);

    /* Top 2 of 4: {0,1} goes to {2,3}, {0,2} to {0,1}. Of {0,1}, 0 foretells 2, 3, 0, 1 alike (a half each), 1 also
     * 2 and 3 (once): both are found; of {0,2} likewise 0 and 1. */
    static const uint8_t two[] = { 0, 1, 2, 3, 0, 2, 0, 1 };
    static const int64_t both[] = { 0, 2 };
    r = one_request(two, both, 2, 4, 2);
    ok(routing_recall(&r, 0, &value, &chance, err));
    assert_true(value == 1.0);
    assert_true(chance == 1.0); /* each foretells the other one's as surely */
}

/* ---- the authors' figures: source and commit in the file itself ---- */

static void check_case(const json_t *c)
{
    int32_t n = (int32_t)json_integer_value(json_object_get(c, "num_experts"));
    int32_t k = (int32_t)json_integer_value(json_object_get(c, "topk"));
    const json_t *seq = json_object_get(c, "seq"), *curve, *want;
    int64_t offsets[2] = { 0, (int64_t)json_array_size(seq) };
    uint8_t *id = malloc((size_t)(offsets[1] * k));
    const char *key;
    size_t i, j;
    json_t *row;
    assert_non_null(id);
    json_array_foreach(seq, i, row) for (j = 0; j < (size_t)k; j++) id[i * (size_t)k + j] =
        (uint8_t)json_integer_value(json_array_get(row, j));
    struct routing r = one_request(id, offsets, 1, n, k);

    json_object_foreach(json_object_get(c, "sch"), key, row)
    {
        double *rate = calloc((size_t)n, sizeof *rate);
        ok(sch_curve(&r, 0, (int32_t)strtol(key, NULL, 10), n, rate, err));
        curve = row;
        assert_int_equal(json_array_size(curve), n);
        for (i = 0; i < (size_t)n; i++)
            if (lround(rate[i] * (double)(offsets[1] * k)) !=
                lround(json_number_value(json_array_get(curve, i)) * (double)(offsets[1] * k)))
                fail_msg("sch m=%s c=%zu: %.8f, expected %.8f (the same number of hits)", key, i + 1, rate[i],
                         json_number_value(json_array_get(curve, i)));
        free(rate);
    }
    json_object_foreach(json_object_get(c, "srp"), key, row)
    {
        int32_t m = (int32_t)strtol(key, NULL, 10);
        double *hist = calloc((size_t)m + 1, sizeof *hist), *each = calloc((size_t)(n * (m + 1)), sizeof *each);
        ok(srp_count(&r, 0, m, hist, each, err));
        struct srp srp = srp_of_histogram(hist, m); /* the authors compute in single precision */
        assert_true(fabs(srp.f1 - json_number_value(json_object_get(row, "best_f1"))) < 1e-6);
        assert_int_equal(srp.threshold, json_integer_value(json_object_get(row, "best_threshold")));
        assert_true(fabs(srp.size_ratio - json_number_value(json_object_get(row, "best_m"))) < 1e-6);
        want = json_object_get(row, "per_expert_best_f1");
        for (i = 0; i < json_array_size(want); i++)
            if (fabs(srp_of_histogram(each + i * ((size_t)m + 1), m).f1 - json_number_value(json_array_get(want, i))) >
                1e-6)
                fail_msg("srp m=%d expert %zu: %.7f, expected %.7f", m, i,
                         srp_of_histogram(each + i * ((size_t)m + 1), m).f1,
                         json_number_value(json_array_get(want, i)));
        free(hist);
        free(each);
    }
    free(id);
}

static void conforms_with_moelrc(void **state)
{
    char path[512];
    size_t i;
    json_t *c;
    (void)state;
    if (!shared_path("oracles/moelrc.json", path))
        skip();
    json_t *oracle = json_load_file(path, 0, NULL);
    assert_non_null(oracle);
    assert_true(json_array_size(json_object_get(oracle, "cases")) >= 3);
    json_array_foreach(json_object_get(oracle, "cases"), i, c) check_case(c);
    json_decref(oracle);
}

/* ---- the entry point ---- */

static double number(const json_t *j, const char *key)
{
    assert_true(json_is_number(json_object_get(j, key)));
    return json_number_value(json_object_get(j, key));
}

static void eval_every_metric(void **state)
{
    struct trace t;
    small_trace(*state, "t");
    ok(trace_open(&t, scratch_path(*state, "t"), err));
    for (const struct consistency_metric *m = consistency_metrics(); m->name; m++)
        for (int layer = -1; layer < 1; layer++) {
            struct err err = { 0 };
            json_t *o = json_pack("{s:i}", "segment", 2);
            if (layer >= 0)
                json_object_set_new(o, "layer", json_integer(layer));
            json_t *j = consistency_eval(m->name, &t, o, &err);
            if (!j)
                fail_msg("%s: %s", m->name, err.text);
            assert_true(isfinite(number(j, "value")) && isfinite(number(j, "floor")));
            json_decref(j);
            json_decref(o);
        }
    trace_close(&t);
}

static void eval_refuses(void **state)
{
    static const struct {
        const char *metric, *options, *says;
    } bad[] = {
        { "srp", "{\"segmnt\": 3}", "segmnt" },
        { "srp", "{\"segment\": 0}", "expected 1.." },
        { "srp", "{\"segment\": 4}", "no request" },
        { "srp", "{\"layer\": 2}", "expected 0..1" },
        { "sch", "{\"capacity\": -1}", "capacity" },
        { "sch", "{\"segment\": 2.5}", "not an integer" },
        { "affinity", "{\"layer\": 1}", "expected 0..0" },
        { "recall", "{\"layer\": 1}", "expected 0..0" },
        { "max-vio", "{\"segment\": 6}", "5 tokens" },
        { "overlp", "{}", "overlap" },
    };
    struct trace t;
    small_trace(*state, "t");
    ok(trace_open(&t, scratch_path(*state, "t"), err));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct err err = { 0 };
        json_t *o = json_loads(bad[i].options, 0, NULL);
        assert_null(consistency_eval(bad[i].metric, &t, o, &err));
        assert_says(&err, ERR_INPUT, bad[i].says, NULL);
        json_decref(o);
    }
    trace_close(&t);
}

static void recorded_trace(void **state)
{
    char path[512];
    struct trace t;
    struct err e = { 0 };
    (void)state;
    if (!shared_path("traces/gpt-oss-20b", path))
        skip();
    ok(trace_open(&t, path, err));
    json_t *j = consistency_eval("overlap", &t, NULL, &e);
    assert_non_null(j);
    assert_true(fabs(number(j, "value") - 0.42) < 0.005 && fabs(number(j, "floor") - 0.20) < 0.005);
    json_decref(j);
    j = consistency_eval("max-vio", &t, NULL, &e);
    assert_true(fabs(number(j, "value") - 1.9) < 0.1 && number(j, "floor") < 0.1);
    json_decref(j);
    trace_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(floors_of_srp),
        cmocka_unit_test(srp_by_hand),
        cmocka_unit_test(sch_by_hand),
        cmocka_unit_test(sch_depth),
        cmocka_unit_test(iid_meets_floor),
        cmocka_unit_test(overlap_and_load_by_hand),
        cmocka_unit_test(affinity_by_hand),
        cmocka_unit_test(recall_by_hand),
        cmocka_unit_test(conforms_with_moelrc),
        cmocka_unit_test_setup_teardown(eval_every_metric, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(eval_refuses, scratch_make, scratch_remove),
        cmocka_unit_test(recorded_trace),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("consistency", tests, NULL, NULL);
}
