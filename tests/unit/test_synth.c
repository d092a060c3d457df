/* SPDX-License-Identifier: Apache-2.0
 * test_synth.c - synthetic routing: that each parameter does what its name says and nothing else, that none of them
 * leaves chance, that logits agree with experts, and that --like measures alike. */
#include "config.h"

#include "consistency.h"
#include "moelab.h"
#include "trace_fixture.h"

#include <math.h>

static const struct trace_synth plain = {
    .n_layers = 6, .n_experts = 32, .top_k = 4, .n_requests = 16, .tokens_per_request = 512, .seed = 3
};

struct measured {
    double unevenness, within, overlap, overlap_chance, affinity, affinity_chance;
};

/* Routes in memory; offsets are part of the allocation. */
static struct routing routes_of(const struct trace_synth *p)
{
    int64_t n_tokens = (int64_t)p->n_requests * p->tokens_per_request;
    uint16_t *id = malloc((size_t)(n_tokens * p->n_layers * p->top_k) * sizeof *id);
    int64_t *offsets = malloc(((size_t)p->n_requests + 1) * sizeof *offsets);
    assert_true(id && offsets);
    for (int64_t r = 0; r <= p->n_requests; r++)
        offsets[r] = r * p->tokens_per_request;
    ok(trace_synth_routes(p, id, err));
    return (struct routing){ .n_tokens = n_tokens,
                             .n_layers = p->n_layers,
                             .n_experts = p->n_experts,
                             .top_k = p->top_k,
                             .n_requests = p->n_requests,
                             .item_bytes = 2,
                             .experts = id,
                             .offsets = offsets };
}

static void free_routes(struct routing *r)
{
    free((void *)(uintptr_t)r->experts);
    free((void *)(uintptr_t)r->offsets);
}

static struct measured measure(const struct trace_synth *p)
{
    struct measured m;
    struct routing r = routes_of(p);
    ok(routing_unevenness(&r, -1, &m.unevenness, &m.within, err));
    ok(routing_overlap(&r, -1, &m.overlap, &m.overlap_chance, err));
    ok(routing_affinity(&r, -1, &m.affinity, &m.affinity_chance, err));
    free_routes(&r);
    return m;
}

/* Uniform, independent: the floor of SRP within 0.3 points, and chance everywhere else. */
static void nothing_is_chance(void **state)
{
    static const struct {
        int32_t n, k;
    } shape[] = { { 8, 2 }, { 64, 8 }, { 32, 4 }, { 512, 8 } };
    (void)state;
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        struct trace_synth p = plain;
        p.n_experts = shape[i].n;
        p.top_k = shape[i].k;
        struct routing r = routes_of(&p);
        for (int32_t m = 4; m <= 256; m *= 4) {
            double hist[257] = { 0 };
            for (int32_t l = 0; l < p.n_layers; l++)
                ok(srp_count(&r, l, m, hist, NULL, err));
            double off = srp_of_histogram(hist, m).f1 - srp_floor(p.top_k, p.n_experts, m);
            if (fabs(off) > 0.003)
                fail_msg("%d of %d, m=%d: SRP %.4f off its floor", p.top_k, p.n_experts, m, off);
        }
        free_routes(&r);
        struct measured m = measure(&p);
        assert_true(m.unevenness < 0.01);
        assert_true(fabs(m.overlap - (double)p.top_k / p.n_experts) < 0.005);
        assert_true(fabs(m.affinity - m.affinity_chance) < 0.005);
    }
}

/* Every parameter moves its statistic, monotonously. */
static void parameters_act(void **state)
{
    static const double step[4] = { 0, 0.25, 0.5, 0.75 };
    struct measured skew[4], sticky[4], affine[4], drift[4];
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct trace_synth p = plain;
        p.skew = 2 * step[i];
        skew[i] = measure(&p);
        p = plain;
        p.stickiness = step[i];
        sticky[i] = measure(&p);
        p = plain;
        p.affinity = step[i];
        affine[i] = measure(&p);
        p = plain;
        p.skew = 1;
        p.drift = step[i];
        drift[i] = measure(&p);
    }
    for (int i = 1; i < 4; i++) {
        assert_true(skew[i].unevenness > skew[i - 1].unevenness + 0.2);
        assert_true(sticky[i].overlap > sticky[i - 1].overlap + 0.1);
        assert_true(affine[i].affinity > affine[i - 1].affinity + 0.1);
        assert_true(drift[i].unevenness < drift[i - 1].unevenness - 0.02);
        /* and leaves the rest where it was */
        assert_true(sticky[i].unevenness < 0.05 && affine[i].unevenness < 0.05);
        assert_true(fabs(affine[i].overlap - 0.125) < 0.01 && fabs(skew[i].overlap - skew[i].overlap_chance) < 0.01);
        assert_true(fabs(skew[i].affinity - skew[i].affinity_chance) < 0.01);
        assert_true(fabs(drift[i].within / drift[0].within - 1) < 0.1);
    }
    /* Uniform, sticky with s: a slot keeps its expert, or draws it again among those not kept. Between these. */
    for (int i = 1; i < 4; i++)
        assert_true(sticky[i].overlap > step[i] && sticky[i].overlap < step[i] + (1 - step[i]) * 0.125 + 0.01);
    for (int i = 1; i < 4; i++)
        assert_true(affine[i].affinity > step[i] && affine[i].affinity < step[i] + (1 - step[i]) * 0.125 + 0.01);
}

/* Affinity moves tokens between experts of the same popularity: skew does not fade with depth, but for the little
 * that drawing without replacement takes (12% here). Independent popularity per layer would leave 1/9 of it. */
static void affinity_keeps_skew(void **state)
{
    struct trace_synth p = plain;
    double first, last, unused;
    (void)state;
    p.skew = 1;
    p.affinity = 0.8;
    struct routing r = routes_of(&p);
    ok(routing_unevenness(&r, 0, &first, &unused, err));
    ok(routing_unevenness(&r, p.n_layers - 1, &last, &unused, err));
    assert_true(last / first > 0.8 && last / first < 1.02);
    free_routes(&r);
}

static void same_seed_same_routes(void **state)
{
    struct trace_synth p = plain;
    struct trace a, b;
    char one[65], two[65], other[65];
    struct scratch *s = *state;
    p.skew = 1, p.stickiness = 0.3, p.affinity = 0.4, p.drift = 0.2;
    p.tokens_per_request = 32;
    ok(trace_synthesise(&p, scratch_path(s, "a"), err));
    ok(trace_open(&a, scratch_path(s, "a"), err));
    ok(trace_checksum(&a, one, err));
    ok(trace_synthesise(&p, scratch_path(s, "b"), err));
    ok(trace_open(&b, scratch_path(s, "b"), err));
    ok(trace_checksum(&b, two, err));
    assert_string_equal(one, two);
    trace_close(&b);

    p.logits = true; /* routes do not depend on what else is written */
    ok(trace_synthesise(&p, scratch_path(s, "b"), err));
    ok(trace_open(&b, scratch_path(s, "b"), err));
    assert_memory_equal(a.experts.data, b.experts.data, (size_t)a.experts.count);
    trace_close(&b);

    p.n_requests += 3; /* nor on how many requests follow */
    ok(trace_synthesise(&p, scratch_path(s, "b"), err));
    ok(trace_open(&b, scratch_path(s, "b"), err));
    assert_memory_equal(a.experts.data, b.experts.data, (size_t)a.experts.count);
    trace_close(&b);

    p = plain;
    p.tokens_per_request = 32;
    p.seed++;
    ok(trace_synthesise(&p, scratch_path(s, "b"), err));
    ok(trace_open(&b, scratch_path(s, "b"), err));
    ok(trace_checksum(&b, other, err));
    assert_string_not_equal(one, other);
    trace_close(&b);
    trace_close(&a);
}

/* Any shape; trace_synthesise itself opens what it wrote with every check, distinct experts included. */
static void shapes(void **state)
{
    static const struct {
        int32_t layers, experts, k, requests, tokens;
        double skew;
    } shape[] = {
        { 1, 1, 1, 1, 1, 0 },     { 3, 4, 4, 2, 5, 10 },       { 2, 256, 8, 2, 9, 1 },  { 2, 257, 8, 2, 9, 1 },
        { 2, 1024, 32, 1, 9, 3 }, { 1, 1024, 1024, 1, 3, 10 }, { 61, 256, 8, 1, 2, 1 }, { 2, 8, 2, 0, 7, 1 },
        { 2, 8, 2, 3, 0, 1 },     { 1, 65536, 2, 1, 20, 1 },
    };
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int logits = 0; logits < 2; logits++) {
            struct trace_synth p = { shape[i].layers,
                                     shape[i].experts,
                                     shape[i].k,
                                     shape[i].requests,
                                     shape[i].tokens,
                                     shape[i].skew,
                                     0.5,
                                     0.5,
                                     0.5,
                                     logits,
                                     9 };
            struct trace t;
            ok(trace_synthesise(&p, scratch_path(*state, "t"), err));
            ok(trace_open(&t, scratch_path(*state, "t"), err));
            assert_int_equal(t.n_tokens, (int64_t)shape[i].requests * shape[i].tokens);
            assert_int_equal(t.experts.item_bytes, shape[i].experts <= 256 ? 1 : 2);
            trace_close(&t);
        }
}

/* Row by row, the largest k logits are the experts in order, ties (none are made) to the lower index; weights are
 * their softmax. */
static void logits_agree(void **state)
{
    static const struct {
        int32_t experts, k;
        double skew;
    } shape[] = { { 32, 4, 0 }, { 256, 8, 1.5 }, { 16, 16, 1 }, { 1024, 8, 8 } };
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
        struct trace_synth p = { 3, shape[i].experts, shape[i].k, 2, 60, shape[i].skew, 0.6, 0.6, 0.3, true, 11 };
        struct trace t;
        float logit[1024], weight[16];
        int32_t top[16], id[16];
        ok(trace_synthesise(&p, scratch_path(*state, "t"), err));
        ok(trace_open(&t, scratch_path(*state, "t"), err));
        for (int64_t row = 0; row < t.n_tokens * t.n_layers; row++) {
            npy_floats(&t.logits, row * p.n_experts, p.n_experts, logit);
            trace_experts(&t, row / 3, (int32_t)(row % 3), id);
            trace_weights(&t, row / 3, (int32_t)(row % 3), weight);
            moe_top_k(logit, p.n_experts, p.top_k, top);
            assert_memory_equal(top, id, (size_t)p.top_k * sizeof *id);
            float sum = 0, chosen[16];
            for (int32_t j = 0; j < p.top_k; j++)
                chosen[j] = logit[id[j]];
            moe_softmax(chosen, p.top_k, chosen);
            for (int32_t j = 0; j < p.top_k; j++) {
                assert_true(fabsf(chosen[j] - weight[j]) < 1e-3f);
                sum += weight[j];
            }
            assert_true(fabsf(sum - 1) < 5e-3f);
        }
        trace_close(&t);
    }
}

static void refuses(void **state)
{
    static const struct {
        struct trace_synth p;
        const char *says[2];
    } bad[] = {
        { { 0, 8, 2, 1, 1, 0, 0, 0, 0, false, 1 }, { "layers is 0", "expected 1..65536" } },
        { { 1, 65537, 2, 1, 1, 0, 0, 0, 0, false, 1 }, { "experts is 65537", "expected 1..65536" } },
        { { 1, 8, 9, 1, 1, 0, 0, 0, 0, false, 1 }, { "top_k is 9", "expected 1..8" } },
        { { 1, 8, 2, -1, 1, 0, 0, 0, 0, false, 1 }, { "requests is -1", "expected 0.." } },
        { { 1, 8, 2, 1, -1, 0, 0, 0, 0, false, 1 }, { "tokens per request is -1", "expected 0.." } },
        { { 1, 8, 2, 1, 1, -1, 0, 0, 0, false, 1 }, { "skew is -1", "expected 0 to 10" } },
        { { 1, 8, 2, 1, 1, 0, 1, 0, 0, false, 1 }, { "stickiness is 1", "below 1" } },
        { { 1, 8, 2, 1, 1, 0, 0, NAN, 0, false, 1 }, { "affinity is nan", "below 1" } },
        { { 1, 8, 2, 1, 1, 0, 0, 0, 1.5, false, 1 }, { "drift is 1.5", "expected 0 to 1" } },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct err err = { 0 };
        assert_says(&err, trace_synthesise(&bad[i].p, scratch_path(*state, "t"), &err), bad[i].says[0], bad[i].says[1],
                    NULL);
        assert_true(access(scratch_path(*state, "t"), F_OK) < 0 && access(scratch_path(*state, "t.part"), F_OK) < 0);
    }
}

static void assert_near(const json_t *report, const char *key, double tolerance)
{
    double target = json_number_value(json_object_get(json_object_get(report, "target"), key));
    double reached = json_number_value(json_object_get(json_object_get(report, "reached"), key));
    if (!(fabs(reached - target) <= tolerance))
        fail_msg("%s: reached %.4f, target %.4f", key, reached, target);
}

/* Synthetic routing is found again by what it measures; a parameter is as exact as its statistic. */
static void finds_its_own_parameters(void **state)
{
    struct trace_synth p = plain, q = plain;
    struct trace t;
    json_t *report = NULL;
    p.skew = 1, p.stickiness = 0.4, p.affinity = 0.5, p.drift = 0.2;
    q.drift = -1;
    q.seed = 77;
    ok(trace_synthesise(&p, scratch_path(*state, "t"), err));
    ok(trace_open(&t, scratch_path(*state, "t"), err));
    ok(trace_synth_like(&q, &t, &report, err));
    print_message("# skew %.3f stickiness %.3f affinity %.3f drift %.3f\n", q.skew, q.stickiness, q.affinity, q.drift);
    assert_true(fabs(q.skew - 1) < 0.1 && fabs(q.stickiness - 0.4) < 0.05);
    assert_true(fabs(q.affinity - 0.5) < 0.05 && fabs(q.drift - 0.2) < 0.15);
    assert_near(report, "overlap", 0.02);
    assert_near(report, "affinity", 0.03);
    assert_near(report, "unevenness", 0.1);
    json_decref(report);
    trace_close(&t);
}

static void like_the_recorded_trace(void **state)
{
    char path[512];
    struct trace t;
    struct trace_synth p = { 24, 32, 4, 30, 256, 0, 0, 0, -1, false, 1 };
    json_t *report = NULL;
    if (!shared_path("traces/gpt-oss-20b", path))
        skip();
    ok(trace_open(&t, path, err));
    ok(trace_synth_like(&p, &t, &report, err));
    assert_near(report, "overlap", 0.02);
    assert_near(report, "overlap_chance", 0.02);
    assert_near(report, "affinity", 0.06);
    json_decref(report);
    /* A statistic that was not fitted: between the floor, 0.32, and the trace's 0.54, it is much nearer the latter. */
    struct routing r = routes_of(&p), recorded = routing_of(&t);
    double hist[17] = { 0 }, like[17] = { 0 };
    for (int32_t l = 0; l < 24; l++) {
        ok(srp_count(&recorded, l, 16, hist, NULL, err));
        ok(srp_count(&r, l, 16, like, NULL, err));
    }
    print_message("# SRP at 16: %.3f, recorded %.3f\n", srp_of_histogram(like, 16).f1, srp_of_histogram(hist, 16).f1);
    assert_true(fabs(srp_of_histogram(like, 16).f1 - srp_of_histogram(hist, 16).f1) < 0.05);
    free_routes(&r);
    trace_close(&t);
    (void)state;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nothing_is_chance),
        cmocka_unit_test(parameters_act),
        cmocka_unit_test(affinity_keeps_skew),
        cmocka_unit_test_setup_teardown(same_seed_same_routes, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(shapes, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(logits_agree, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(refuses, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(finds_its_own_parameters, scratch_make, scratch_remove),
        cmocka_unit_test(like_the_recorded_trace),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("synth", tests, NULL, NULL);
}
