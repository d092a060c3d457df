/* SPDX-License-Identifier: Apache-2.0
 * test_routers_choice.c - routers that decide by rank, task, carved neurons and cascades, or weigh apart from choosing,
 * against closed forms worked out by hand. */
#include "router_field.h"

/* ---- test-time-reroute ---- */

static void reroute(void **state)
{
    (void)state;
    const float x[5] = {0, 4, 1, 3, 2};
    struct run r;
    open_one(&r, "test-time-reroute", "", NULL, 0, 1, 5, 2); /* the two after the best two */
    memcpy(r.logits, x, sizeof x);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 4, 2);
    near_to((double)r.routes.weight[0], 1 / (1 + exp(-1)));
    float add[5] = {0, 0, 0, -INFINITY, 0}, scale[5] = {1, 1, 1, 1, 1};
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    GOES_TO(&r, 0, 2, 0);
    add[0] = -INFINITY; /* three left: no more than the last two */
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    GOES_TO(&r, 0, 4, 2);
    run_close(&r);
    open_one(&r, "test-time-reroute", "rank=2 top_k=1 renormalise=false", NULL, 0, 1, 5, 2);
    memcpy(r.logits, x, sizeof x);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 3);
    near_to((double)r.routes.weight[0], exp(3) / (1 + exp(1) + exp(2) + exp(3) + exp(4)));
    run_close(&r);
    const float bonus[2][5] = {{0}, {7, 0, 0, 1.5f, 0}};
    const struct moe_tensor tensor = {2, {2, 5}, bonus[0]};
    open_one(&r, "test-time-reroute", "choose=best bonus=#0", &tensor, 1, 1, 5, 2);
    memcpy(r.logits, x, sizeof x);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 1, 3);
    r.batch.layer = 1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 0, 3);
    near_to((double)r.routes.weight[0], 1 / (1 + exp(4.5 - 7)));
    run_close(&r);
    open_one(&r, "test-time-reroute", "rank=5", NULL, 0, 1, 5, 2);
    refuse(&r, "ranks 5 to 6 of 5");
    refuse_open("test-time-reroute", "rank=2 choose=random", NULL, 0, "rank = 2 is for choose = rank alone");
    open_one(&r, "test-time-reroute", "", NULL, 0, 1, 5, 2);
    r.logits[3] = NAN;
    refuse(&r, "token 0, expert 3");
}

/* Drawn evenly whatever the gate says, of those that exist, and anew in every step. */
static void reroute_at_random(void **state)
{
    enum { N = 4000, E = 5, K = 2 };
    (void)state;
    int32_t position[N], load[E] = {0}, same = 0, before[N * K];
    float add[E] = {0, 0, -INFINITY, 0, 0}, scale[E] = {1, 1, 1, 1, 1};
    struct run r;
    open_one(&r, "test-time-reroute", "choose=random", NULL, 0, N, E, K);
    for (int32_t t = 0; t < N; t++) {
        position[t] = t;
        r.logits[t * E + 1] = 50;
    }
    r.batch.position = position;
    for (int32_t step = 0; step < 2; step++) {
        r.batch.step = step;
        assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
        assert_int_equal(r.routes.n, N * K);
        for (int64_t i = 0; i < r.routes.n; i++) {
            load[r.routes.expert[i]]++;
            same += step == 1 && before[i] == r.routes.expert[i];
            before[i] = r.routes.expert[i];
        }
    }
    assert_int_equal(load[2], 0);
    for (int32_t e = 0; e < E; e++) /* half of 8,000: standard deviation 45 */
        assert_true(e == 2 || abs(load[e] - N) < 250);
    assert_true(same < N * K / 2);
    run_close(&r);
}

/* ---- global-local-router ---- */

static void global_local(void **state)
{
    (void)state;
    static const float task[2][2] = {{3, 4}, {0, 0}}, expert[2][3][2] = {{{1, 0}, {0, 2}, {-3, -4}}, {{3, 4}}};
    const struct moe_tensor tensor[2] = {{2, {2, 2}, task[0]}, {3, {2, 3, 2}, expert[0][0]}};
    const float x[3] = {1, 0, 2};
    int32_t label[2] = {0, 1};
    struct run r;
    for (int32_t dot = 0; dot < 2; dot++) {
        const double g[3] = {dot ? 3 : 0.6, dot ? 8 : 0.8, dot ? -25 : -1};
        double e[3], sum = 0;
        open_one(&r, "global-local-router",
                 dot ? "task=#0 expert=#1 strength=2 renormalise=false top_k=3 match=dot"
                     : "task=#0 expert=#1 strength=2 renormalise=false top_k=3", tensor, 2, 2, 3, 1);
        memcpy(r.logits, x, sizeof x);
        memcpy(r.logits + 3, x, sizeof x);
        r.batch.label = label;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t i = 0; i < 3; i++)
            sum += e[i] = exp((double)x[i] + 2 * g[i]);
        for (int32_t i = 0; i < 3; i++) {
            near_to((double)weight_of(&r.routes, 0, i), e[i] / sum);
            near_to((double)weight_of(&r.routes, 1, i), exp((double)x[i]) / (exp(1) + 1 + exp(2))); /* no direction */
        }
        run_close(&r);
    }
    open_one(&r, "global-local-router", "task=#0 expert=#1", tensor, 2, 2, 3, 1);
    r.batch.label = label;
    label[1] = 2;
    refuse(&r, "token 1: label 2, task has 2 labels");
    label[1] = 0;
    open_one(&r, "global-local-router", "task=#0 expert=#1", tensor, 2, 2, 3, 1);
    r.batch.label = label;
    r.logits[4] = NAN;
    refuse(&r, "token 1, expert 1");
    refuse_open("global-local-router", NULL, NULL, 0, "task: no tensor given");
    refuse_open("global-local-router", "task=#0", tensor, 1, "expert: no tensor given");
    const struct moe_tensor wide[2] = {{2, {1, 4}, task[0]}, tensor[1]};
    refuse_open("global-local-router", "task=#0 expert=#1", wide, 2, "task has 4 numbers per label, expert has 2");
    const float far[2][2] = {{1e30f, 1e30f}, {0, 0}};
    const struct moe_tensor large[2] = {{2, {2, 2}, far[0]}, {3, {2, 1, 2}, far[0]}};
    refuse_open("global-local-router", "task=#0 expert=#1 match=dot", large, 2, "layer 0: task 0, expert 0");
}

/* ---- decoupled-gate ---- */

static void decoupled(void **state)
{
    (void)state;
    static const float adapter[2][3][2] = {{{1, 0}, {0, 0.5f}, {0, 0}}, {{0}}};
    const struct moe_tensor tensor = {3, {2, 3, 2}, adapter[0][0]};
    float hidden[2] = {-2, 4};
    struct run r;
    for (int32_t equal = 0; equal < 2; equal++) {
        open_one(&r, "decoupled-gate", equal ? "weights=equal" : "adapter=#0", &tensor, 1, 1, 3, 2);
        r.logits[0] = 1;
        r.logits[2] = -1;
        r.batch.hidden = hidden;
        r.batch.n_hidden = 2;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        GOES_TO(&r, 0, 0, 1);
        near_to((double)r.routes.weight[0], equal ? 0.5 : 1 / (1 + exp(-1)) - 2);
        near_to((double)r.routes.weight[1], equal ? 0.5 : 1 / (1 + exp(1)) + 2);
        near_to(r.own.flops, equal ? 4 * 3 : 4 * 3 + 2 * 2 * 2);
        run_close(&r);
    }
    open_one(&r, "decoupled-gate", "adapter=#0", &tensor, 1, 1, 3, 2);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 1;
    refuse(&r, "1 wide, adapter expects 2");
    open_one(&r, "decoupled-gate", "adapter=#0", &tensor, 1, 1, 3, 2);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 2;
    hidden[0] = NAN;
    refuse(&r, "token 0, expert 0: weight nan");
    open_one(&r, "decoupled-gate", "weights=equal top_k=4", &tensor, 1, 1, 3, 2);
    refuse(&r, "top_k = 4 of 3");
    refuse_open("decoupled-gate", NULL, NULL, 0, "adapter: no tensor given");
}

/* ---- carved-experts ---- */

static void carved(void **state)
{
    (void)state;
    static const float gate[2][3][2] = {{{1, 0}, {0, 1}, {-1, 0}}, {{0}}};
    static const float up[2][3][2] = {{{1, 0}, {1, 0}, {1, 0}}, {{0}}};
    const struct moe_tensor tensor[2] = {{3, {2, 3, 2}, gate[0][0]}, {3, {2, 3, 2}, up[0][0]}};
    float hidden[2] = {2, -3};
    struct run r;
    const double a[3] = {2 / (1 + exp(-2)) * 2, 3 / (1 + exp(3)) * 2, 2 / (1 + exp(2)) * 2}; /* magnitudes */
    open_one(&r, "carved-experts", "gate_neuron=#0 up_neuron=#1", tensor, 2, 1, 3, 2);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 2;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 0, 2);
    near_to((double)r.routes.weight[0], 1);
    near_to((double)r.routes.weight[1], 1);
    for (int32_t e = 0; e < 3; e++)
        near_to((double)r.scores[e], exp(a[e]) / (exp(a[0]) + exp(a[1]) + exp(a[2])));
    assert_true(r.own.flops >= 4 * 3 * 2);
    float add[3] = {0, 1, 0}, scale[3] = {1, 1, 1};
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    GOES_TO(&r, 0, 1, 0);
    hidden[1] = INFINITY;
    refuse(&r, "token 0, expert 0");
    hidden[1] = -3;
    open_one(&r, "carved-experts", "gate_neuron=#0 up_neuron=#1 weights=softmax", tensor, 2, 1, 3, 2);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 2;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    near_to((double)r.routes.weight[0], 1 / (1 + exp(a[2] - a[0])));
    r.batch.n_hidden = 3;
    refuse(&r, "3 wide, gate_neuron expects 2");
    refuse_open("carved-experts", NULL, NULL, 0, "gate_neuron: no tensor given");
    refuse_open("carved-experts", "gate_neuron=#0", tensor, 1, "up_neuron: no tensor given");
    const struct moe_tensor wide[2] = {tensor[0], {3, {2, 2, 3}, up[0][0]}};
    refuse_open("carved-experts", "gate_neuron=#0 up_neuron=#1", wide, 2, "gate_neuron is 2 wide, up_neuron 3");
}

/* ---- confidence-cascade ---- */

static void cascades(void **state)
{
    (void)state;
    static const float gate[2][4][1] = {{{1}, {-1}, {5}, {9}}, {{0}}};
    const struct moe_tensor tensor = {3, {2, 4, 1}, gate[0][0]};
    float hidden[3] = {1, -1, 0}; /* on after the first, not the second; not even that; a half is not above a half */
    struct run r;
    open_one(&r, "confidence-cascade", "gate=#0", &tensor, 1, 3, 4, 2);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 0, 1);
    GOES_TO(&r, 1, 0);
    GOES_TO(&r, 2, 0);
    near_to((double)r.routes.weight[0], 0.5);
    near_to(r.own.flops, (2 + 1 + 1) * (2 * 1 + 4));
    run_close(&r);
    for (int32_t most = 0; most < 2; most++) { /* nothing is enough */
        open_one(&r, "confidence-cascade", most ? "gate=#0 enough=0 most=3" : "gate=#0 enough=0", &tensor, 1, 3, 4, 2);
        r.batch.hidden = hidden;
        r.batch.n_hidden = 1;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        assert_int_equal(r.routes.n, most ? 9 : 12);
        near_to((double)r.routes.weight[0], most ? 1.0 / 3 : 0.25);
        near_to(r.own.flops, 3 * (most ? 2 : 3) * (2 * 1 + 4)); /* the last is not asked */
        hidden[1] = NAN;
        refuse(&r, "token 1, expert 0: gate nan");
        hidden[1] = -1;
    }
    open_one(&r, "confidence-cascade", "gate=#0 most=5", &tensor, 1, 3, 4, 2);
    r.batch.n_hidden = 1;
    refuse(&r, "most = 5 of 4");
    open_one(&r, "confidence-cascade", "gate=#0", &tensor, 1, 3, 4, 2);
    r.batch.n_hidden = 2;
    refuse(&r, "2 wide, gate expects 1");
    refuse_open("confidence-cascade", NULL, NULL, 0, "gate: no tensor given");
}

/* ---- expanding-experts ---- */

/* Twelve tasks of four kinds, in turn: an expert is added for each kind, none for what comes again. */
static void expands_for_what_is_new(void **state)
{
    enum { N = 32, E = 6, H = 4 };
    (void)state;
    const int32_t kind[12] = {0, 0, 1, 0, 2, 1, 2, 3, 0, 1, 2, 3}, expected[12] = {1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4};
    const struct moe_env env = {.seed = 9};
    float hidden[N * H];
    struct run r;
    open_one(&r, "expanding-experts", "", NULL, 0, N, E, 2);
    r.batch.hidden = hidden;
    r.batch.n_hidden = H;
    for (int32_t e = 0; e < E; e++)
        r.logits[e] = (float)e;
    for (int32_t task = 0; task < 12; task++) {
        for (int32_t i = 0; i < N * H; i++)
            hidden[i] = (float)(10 * (kind[task] == i % H) + moe_unit(moe_rand(&env, 0, task, 0, i)));
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        assert_int_equal(r.routes.offset[1], expected[task]); /* all that are there */
        near_to((double)weight_of(&r.routes, 0, expected[task] - 1), expected[task] == 1 ? 1
                    : exp(expected[task] - 1) / (1 + exp(1) + (expected[task] > 2) * exp(2) +
                                                 (expected[task] > 3) * exp(3)));
    }
    r.batch.layer = 1; /* layers grow for themselves */
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.offset[1], 1);
    hidden[H + 1] = INFINITY;
    refuse(&r, "token 1: element 1 of its hidden state is inf");
}

static void expands_no_further(void **state)
{
    (void)state;
    float hidden[2][2] = {{1, 0}, {0, 1}};
    float add[3] = {0, -INFINITY, 0}, scale[3] = {1, 1, 1};
    struct run r;
    open_one(&r, "expanding-experts", "start=2 top_k=1", NULL, 0, 2, 3, 2);
    r.batch.hidden = hidden[0];
    r.batch.n_hidden = 2;
    add[2] = 9; /* what is not there yet cannot be forced */
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    GOES_TO(&r, 0, 0);
    add[2] = 0;
    r.logits[1] = r.logits[3 + 1] = 5;
    for (int32_t step = 0; step < 4; step++) { /* further out every time: one more, then all are there */
        for (int32_t i = 0; i < 4; i++)
            hidden[i / 2][i % 2] *= 10;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        GOES_TO(&r, 0, 1);
    }
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    GOES_TO(&r, 0, 0);
    r.batch.n_hidden = 1;
    refuse(&r, "1 wide, and were 2");
    open_one(&r, "expanding-experts", "start=4", NULL, 0, 2, 3, 2);
    r.batch.hidden = hidden[0];
    r.batch.n_hidden = 2;
    refuse(&r, "start = 4 of 3");
    open_one(&r, "expanding-experts", "", NULL, 0, 2, 3, 2);
    r.batch.hidden = hidden[0];
    r.batch.n_hidden = 2;
    r.logits[4] = NAN;
    refuse(&r, "token 1, expert 1");
}

/* ---- settings of expert-skipping and random-gate ---- */

/* Every layer its own k, nobody skipped. */
static void k_by_layer(void **state)
{
    (void)state;
    float k[2] = {3, 1};
    const struct moe_tensor tensor = {1, {2}, k};
    struct run r;
    open_one(&r, "expert-skipping", "layer_k=#0 threshold=0", &tensor, 1, 1, 4, 2);
    for (int32_t e = 0; e < 4; e++)
        r.logits[e] = (float)e;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 3, 2, 1);
    r.batch.layer = 1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 3);
    run_close(&r);
    refuse_open("expert-skipping", "layer_k=#0 top_k=2", &tensor, 1, "top_k = 2 and layer_k");
    k[1] = 0.5f;
    refuse_open("expert-skipping", "layer_k=#0", &tensor, 1, "layer 1: found 0.5");
    k[1] = 5;
    open_one(&r, "expert-skipping", "layer_k=#0", &tensor, 1, 1, 4, 2);
    r.batch.layer = 1;
    refuse(&r, "layer 1: top_k = 5 of 4");
}

/* One expert at step 0, all four at step 8 and after, in a straight line. */
static void k_rises(void **state)
{
    (void)state;
    const float hidden[2] = {1, -1};
    const int32_t expected[] = {1, 1, 2, 2, 3, 3, 3, 4, 4, 4}; /* 1 + 3 step / 8, halves up */
    struct run r;
    open_one(&r, "random-gate", "from=1 steps=8", NULL, 0, 1, 8, 4);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 2;
    for (int32_t step = 0; step < 10; step++) {
        r.batch.step = step;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        assert_int_equal(r.routes.n, expected[step]);
    }
    run_close(&r);
    open_one(&r, "random-gate", "from=5", NULL, 0, 1, 8, 4);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 2;
    refuse(&r, "from = 5, expected top_k = 4 or less");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reroute),
        cmocka_unit_test(reroute_at_random),
        cmocka_unit_test(global_local),
        cmocka_unit_test(decoupled),
        cmocka_unit_test(carved),
        cmocka_unit_test(cascades),
        cmocka_unit_test(expands_for_what_is_new),
        cmocka_unit_test(expands_no_further),
        cmocka_unit_test(k_by_layer),
        cmocka_unit_test(k_rises),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
