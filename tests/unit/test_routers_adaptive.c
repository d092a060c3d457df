/* SPDX-License-Identifier: Apache-2.0
 * test_routers_adaptive.c - routers that give tokens different numbers of experts, against cases worked out by hand. */
#include "router_test.h"

static uint64_t draw(int64_t i)
{
    const struct moe_env env = { .seed = 9 };
    return moe_rand(&env, 1, 0, 0, i);
}

static void fill(float *x, int64_t n, int64_t seed)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(6 * moe_unit(draw(seed * 1000000 + i)) - 3);
}

/* Logits whose softmax is p[n]. */
static void logits_of(struct run *r, int32_t token, const double *p)
{
    for (int32_t e = 0; e < r->batch.n_experts; e++)
        r->logits[token * r->batch.n_experts + e] = (float)log(p[e]);
}

/* Exactly the experts in `mask`, bit e for expert e. */
static void has(const struct run *r, int32_t token, unsigned mask)
{
    unsigned found = 0;
    for (int64_t i = r->routes.offset[token]; i < r->routes.offset[token + 1]; i++)
        found |= 1u << r->routes.expert[i];
    if (found != mask)
        fail_msg("token %d: experts %#x, expected %#x", token, found, mask);
}

static void near(float found, double expected)
{
    if (!(fabs((double)found - expected) <= 1e-6))
        fail_msg("found %.9g, expected %.9g", (double)found, expected);
}

/* What a router says when it refuses a batch of two tokens whose logits are all 0. */
static void refuses(const char *router, const char *settings, int32_t n_experts, int32_t top_k, const char *why)
{
    struct run r;
    run_open(&r, router, settings, 2, n_experts, top_k);
    assert_int_equal(run_route(&r, NULL), MOE_EINVAL);
    assert_string_equal(r.host.failure, why);
    run_close(&r);
}

static void refuses_nan(const char *router)
{
    struct run r;
    run_open(&r, router, NULL, 2, 4, 2);
    r.logits[6] = NAN;
    r.logits[7] = NAN;
    assert_int_equal(run_route(&r, NULL), MOE_EINVAL);
    assert_non_null(strstr(r.host.failure, "layer 0: logit of token 1, expert 2: found "));
    assert_non_null(strstr(r.host.failure, "nan, expected a finite number"));
    run_close(&r);
}

/* ---- expert-race ---- */

/* Two tokens, k = 2: the four best of eight pairs are three of the second token and one of the first. */
static void race(void **state)
{
    (void)state;
    struct run r;
    run_open(&r, "expert-race", NULL, 2, 4, 2);
    logits_of(&r, 0, (const double[]){ 0.91, 0.05, 0.03, 0.01 });
    logits_of(&r, 1, (const double[]){ 0.1, 0.3, 0.35, 0.25 });
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    has(&r, 0, 1);
    has(&r, 1, 14);
    near(weight_of(&r.routes, 0, 0), 0.91);
    near(weight_of(&r.routes, 1, 3), 0.25);
    /* without expert 2, the next best pair takes the place; the weight stays the score */
    float add[4] = { 0, 0, -INFINITY, 0 }, scale[4] = { 1, 1, 1, 1 };
    assert_int_equal(run_route(&r, &(struct moe_bias){ add, scale }), MOE_OK);
    has(&r, 0, 1);
    has(&r, 1, 11);
    run_close(&r);
    run_open(&r, "expert-race", "score=sigmoid top_k=1", 2, 2, 2);
    r.logits[0] = 1;
    r.logits[1] = 2;
    r.logits[2] = 0;
    r.logits[3] = -1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    has(&r, 0, 3);
    has(&r, 1, 0);
    near(weight_of(&r.routes, 0, 1), 1 / (1 + exp(-2.0)));
    run_close(&r);
    refuses("expert-race", "top_k=5", 4, 2, "layer 0: top_k = 5 of 4 experts");
    refuses_nan("expert-race");
}

/* The total is T k whatever the scores, with equal ones as well: those go to the first. */
static void race_is_of_fixed_length(void **state)
{
    (void)state;
    struct run r;
    for (int32_t k = 1; k <= 8; k++) {
        run_open(&r, "expert-race", NULL, 37, 8, k);
        fill(r.logits, 37 * 8, k);
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        assert_int_equal(r.routes.n, 37 * k);
        float least = INFINITY, best = 0; /* taken, left: all that are taken are at least as good */
        for (int32_t t = 0; t < 37; t++)
            for (int32_t e = 0; e < 8; e++) {
                const float s = r.scores[t * 8 + e];
                if (weight_of(&r.routes, t, e) > 0)
                    least = fminf(least, s);
                else
                    best = fmaxf(best, s);
            }
        assert_true(least >= best);
        run_close(&r);
    }
    run_open(&r, "expert-race", NULL, 4, 2, 1);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n, 4);
    has(&r, 0, 3);
    has(&r, 1, 3);
    has(&r, 2, 0);
    run_close(&r);
}

/* ---- entropy-hybrid ---- */

/* Four experts, .4 .3 .2 .1: normalised entropies 0.92322 (q = 1), 0.93333 (q = 2: 1 - .3 over 1 - 1/4). */
static void unsure_tokens(void **state)
{
    (void)state;
    static const struct {
        const char *settings;
        unsigned mask;
        double first;
    } cases[] = {
        { "rule=broadcast threshold=0.9232", 15, 0.4 },
        { "rule=broadcast threshold=0.9233", 3, 4 / 7.0 },
        { "rule=broadcast threshold=0.9233 top_k=1", 1, 1 },
        { "rule=broadcast threshold=0.9232 phases=train", 3, 4 / 7.0 },
        { "q=2 threshold=0.9333", 15, 0.4 },
        { "q=2 threshold=0.9334 p=0.39", 1, 1 },
        { "q=2 threshold=0.9334 p=0.41 renormalise=false", 3, 0.4 },
        { "q=2 threshold=0.9334 p=0.39 at_least=3", 7, 4 / 9.0 },
        { "q=1 threshold=0.9232", 15, 0.4 },
        { "q=1 threshold=0.9233 p=0.39", 1, 1 },
        { "threshold=1 p=1", 15, 0.4 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct run r;
        run_open(&r, "entropy-hybrid", cases[i].settings, 1, 4, 2);
        logits_of(&r, 0, (const double[]){ 0.4, 0.3, 0.2, 0.1 });
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        has(&r, 0, cases[i].mask);
        near(weight_of(&r.routes, 0, 0), cases[i].first);
        run_close(&r);
    }
    struct run r; /* fine-tuning broadcasts; an expert that does not exist stays away from everybody */
    float add[4] = { 0, -INFINITY, 0, 0 }, scale[4] = { 1, 1, 1, 1 };
    run_open(&r, "entropy-hybrid", "rule=broadcast threshold=0.5 phases=train", 2, 4, 2);
    logits_of(&r, 0, (const double[]){ 0.4, 0.3, 0.2, 0.1 });
    logits_of(&r, 1, (const double[]){ 0.99, 0.005, 0.003, 0.002 });
    r.batch.phase = MOE_TRAIN;
    assert_int_equal(run_route(&r, &(struct moe_bias){ add, scale }), MOE_OK);
    has(&r, 0, 13);
    has(&r, 1, 5);
    run_close(&r);
    refuses("entropy-hybrid", "rule=broadcast top_k=5", 4, 2, "layer 0: top_k = 5 of 4 experts");
    refuses("entropy-hybrid", "at_least=5", 4, 2, "layer 0: at_least = 5 of 4 experts");
    refuses_nan("entropy-hybrid");
}

/* ---- importance-k ---- */

static void important_tokens(void **state)
{
    (void)state;
    static const float importance[6] = { 0, 0.25f, 0.26f, 0.5f, 1, 7 };
    static const unsigned mask[6] = { 1, 1, 3, 3, 15, 15 }, at_least_3[6] = { 7, 7, 7, 7, 15, 15 };
    struct run r;
    for (int floor = 0; floor < 2; floor++) {
        run_open(&r, "importance-k", floor ? "min_k=3" : "", 6, 5, 4);
        r.batch.importance = importance;
        for (int32_t t = 0; t < 6; t++)
            logits_of(&r, t, (const double[]){ 0.4, 0.3, 0.15, 0.1, 0.05 });
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < 6; t++)
            has(&r, t, floor ? at_least_3[t] : mask[t]);
        near(weight_of(&r.routes, 4, 0), 0.4 / 0.95);
        run_close(&r);
    }
    run_open(&r, "importance-k", "min_k=0 max_k=2 full=10 renormalise=false", 6, 5, 4);
    r.batch.importance = importance;
    for (int32_t t = 0; t < 6; t++)
        logits_of(&r, t, (const double[]){ 0.05, 0.1, 0.15, 0.3, 0.4 });
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    has(&r, 0, 0);
    has(&r, 1, 16);
    has(&r, 5, 24);
    near(weight_of(&r.routes, 5, 3), 0.3);
    float bad[6] = { 1, 1, -0.5f, NAN, 1, 1 };
    r.batch.importance = bad;
    assert_int_equal(run_route(&r, NULL), MOE_EINVAL);
    assert_string_equal(r.host.failure, "layer 0: importance of token 2: found -0.5, expected 0 or more");
    run_close(&r);
    refuses("importance-k", NULL, 4, 2, "the workload has no importance of tokens");
    run_open(&r, "importance-k", "max_k=6", 1, 5, 4);
    r.batch.importance = importance;
    assert_int_equal(run_route(&r, NULL), MOE_EINVAL);
    assert_string_equal(r.host.failure, "layer 0: min_k = 1, max_k = 6 of 5 experts");
    run_close(&r);
    refuses_nan("importance-k");
}

/* ---- dynamic-k ---- */

static void above_a_threshold(void **state)
{
    (void)state;
    static const struct {
        const char *settings;
        unsigned mask;
        double first;
    } cases[] = {
        { "threshold=0.14", 7, 0.4 / 0.85 },
        { "threshold=0.29 renormalise=false", 3, 0.4 },
        { "threshold=0.5", 1, 1 }, /* the best stays */
        { "threshold=0", 31, 0.4 },
        { "threshold=0 max_k=2", 3, 4 / 7.0 },
        { "above=percentile threshold=0.5", 3, 4 / 7.0 }, /* above the third of five */
        { "above=percentile threshold=0.49", 7, 0.4 / 0.85 },
        { "above=percentile threshold=0", 15, 0.4 / 0.95 },
        { "above=percentile threshold=1", 1, 1 },
    };
    struct run r;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        run_open(&r, "dynamic-k", cases[i].settings, 1, 5, 5);
        logits_of(&r, 0, (const double[]){ 0.4, 0.3, 0.15, 0.1, 0.05 });
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        has(&r, 0, cases[i].mask);
        near(weight_of(&r.routes, 0, 0), cases[i].first);
        run_close(&r);
    }
    refuses("dynamic-k", "max_k=5", 4, 2, "layer 0: min_k = 1, max_k = 5 of 4 experts");
    refuses("dynamic-k", "min_k=3", 4, 2, "layer 0: min_k = 3, max_k = 2 of 4 experts");
    refuses_nan("dynamic-k");
}

/* Five layers, 2 to 6 experts, a threshold that everybody passes. */
static void schedules_of_layers(void **state)
{
    (void)state;
    static const struct {
        const char *settings;
        int32_t k[5];
    } cases[] = {
        { "schedule=constant min_k=2 max_k=6 threshold=0", { 6, 6, 6, 6, 6 } },
        { "schedule=descending min_k=2 max_k=6 threshold=0", { 6, 5, 4, 3, 2 } },
        { "schedule=ascending min_k=2 max_k=6 threshold=0", { 2, 3, 4, 5, 6 } },
        { "schedule=pyramid min_k=2 max_k=6 threshold=0", { 2, 4, 6, 4, 2 } },
        { "schedule=wave min_k=2 max_k=6 threshold=0", { 2, 6, 2, 6, 2 } },
        { "schedule=ascending min_k=1 max_k=3 threshold=0", { 1, 2, 2, 3, 3 } }, /* 1.5 and 2.5 go up */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct run r;
        run_open_with(&r, "dynamic-k", cases[i].settings, NULL, 0, &(struct policy_shape){ 5, 8, 2, 1, 1, 0, 1 }, 1);
        for (r.batch.layer = 0; r.batch.layer < 5; r.batch.layer++) {
            assert_int_equal(run_route(&r, NULL), MOE_OK);
            assert_int_equal(r.routes.n, cases[i].k[r.batch.layer]);
        }
        run_close(&r);
    }
}

/* ---- expert-skipping ---- */

/* Probabilities .4 .3 .15 .1 .05; a layer that matters half as much skips at twice the probability. */
static void skipped_experts(void **state)
{
    (void)state;
    static const float importance[2] = { 1, 0.5f };
    const struct moe_tensor alpha = { 1, { 2 }, importance };
    static const struct {
        const char *settings;
        int32_t layer;
        unsigned mask[2];
        double first;
    } cases[] = {
        { "threshold=0", 0, { 15, 15 }, 0.4 / 0.95 },
        { "threshold=0.12", 0, { 7, 7 }, 0.4 / 0.95 },
        { "threshold=0.12 rescale=true", 0, { 7, 7 }, 0.4 / 0.85 },
        { "threshold=0.12 alpha=#0", 0, { 7, 7 }, 0.4 / 0.95 },
        { "threshold=0.12 alpha=#0", 1, { 3, 3 }, 0.4 / 0.95 },
        { "threshold=0.12 other=0.2", 0, { 7, 3 }, 0.4 / 0.95 },
        { "threshold=0.12 other=0", 0, { 7, 15 }, 0.4 / 0.95 },
        { "threshold=0.9", 0, { 1, 1 }, 0.4 / 0.95 },
        { "threshold=0.9 at_least=2 top_k=2 rescale=true", 0, { 3, 3 }, 4 / 7.0 },
        { "threshold=0.9 at_least=0", 0, { 0, 0 }, 0 },
    };
    static const int32_t label[2] = { 0, 1 };
    const struct policy_shape shape = { 2, 5, 4, 1, 1, 0, 1 };
    struct run r;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        run_open_with(&r, "expert-skipping", cases[i].settings, &alpha, 1, &shape, 2);
        for (int32_t t = 0; t < 2; t++)
            logits_of(&r, t, (const double[]){ 0.4, 0.3, 0.15, 0.1, 0.05 });
        r.batch.layer = cases[i].layer;
        r.batch.label = label;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < 2; t++)
            has(&r, t, cases[i].mask[t]);
        near(weight_of(&r.routes, 0, 0), cases[i].first);
        run_close(&r);
    }
    run_open_with(&r, "expert-skipping", "alpha=#0", &alpha, 1, &shape, 2);
    r.batch.layer = 2;
    assert_int_equal(run_route(&r, NULL), MOE_EINVAL);
    assert_string_equal(r.host.failure, "alpha: 2 layers, found layer 2");
    run_close(&r);
    refuses("expert-skipping", "other=0.1", 4, 2, "other = 0.1: the workload has no labels");
    refuses("expert-skipping", "top_k=5", 4, 2, "layer 0: top_k = 5 of 4 experts");
    refuses_nan("expert-skipping");
}

/* ---- k-schedule ---- */

static void k_falls(void **state)
{
    (void)state;
    static const struct {
        const char *settings;
        int32_t layer, step, k;
    } cases[] = {
        { "steps=6", 0, 0, 8 }, /* from all */
        { "steps=6", 0, 3, 5 },
        { "steps=6", 2, 6, 2 }, /* to the model's */
        { "steps=6", 2, 1000, 2 },
        { "from=4 to=1 steps=6", 0, 1, 4 }, /* 3.5 goes up */
        { "from=4 to=1 steps=6", 0, 2, 3 },
        { "from=4 to=1 steps=6", 0, 5, 2 },
        { "from=4 to=1 steps=6 layers=2", 1, 0, 4 },
        { "from=4 to=1 steps=6 layers=2", 2, 0, 1 },
        { "from=1 to=4 steps=3", 0, 2, 3 },
    };
    struct run r;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        run_open(&r, "k-schedule", cases[i].settings, 3, 8, 2);
        fill(r.logits, 3 * 8, (int64_t)i);
        r.batch.layer = cases[i].layer;
        r.batch.step = cases[i].step;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < 3; t++) {
            float sum = 0, least = INFINITY, left = 0;
            assert_int_equal(r.routes.offset[t + 1] - r.routes.offset[t], cases[i].k);
            for (int32_t e = 0; e < 8; e++) {
                const float weight = weight_of(&r.routes, t, e), s = r.scores[t * 8 + e];
                sum += weight;
                least = weight > 0 ? fminf(least, s) : least;
                left = weight > 0 ? left : fmaxf(left, s);
            }
            near(sum, 1);
            assert_true(least > left);
        }
        run_close(&r);
    }
    run_open(&r, "k-schedule", "to=1 steps=1 renormalise=false", 1, 4, 2);
    logits_of(&r, 0, (const double[]){ 0.1, 0.2, 0.4, 0.3 });
    r.batch.step = 1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    has(&r, 0, 4);
    near(weight_of(&r.routes, 0, 2), 0.4);
    run_close(&r);
    refuses("k-schedule", "from=5", 4, 2, "layer 0: from = 5, to = 2 of 4 experts");
    refuses("k-schedule", "to=5", 4, 2, "layer 0: from = 4, to = 5 of 4 experts");
    refuses_nan("k-schedule");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(race),
        cmocka_unit_test(race_is_of_fixed_length),
        cmocka_unit_test(unsure_tokens),
        cmocka_unit_test(important_tokens),
        cmocka_unit_test(above_a_threshold),
        cmocka_unit_test(schedules_of_layers),
        cmocka_unit_test(skipped_experts),
        cmocka_unit_test(k_falls),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
