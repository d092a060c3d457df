/* SPDX-License-Identifier: Apache-2.0
 * test_routers_learned.c - gates with learned tensors against closed forms worked out by hand. */
#include "router_test.h"

/* One layer of n_experts, with these tensors and hidden states. */
static void open_learned(struct run *r, const char *router, const char *settings, const struct moe_tensor *tensor,
                         int32_t n_tensors, int32_t n_tokens, int32_t n_experts, int32_t k, const float *hidden,
                         int32_t n_hidden)
{
    run_open_with(r, router, settings, tensor, n_tensors, &(struct policy_shape){ 2, n_experts, k, 1, 1, 0, 1 },
                  n_tokens);
    r->batch.hidden = hidden;
    r->batch.n_hidden = n_hidden;
}

static void near_to(double a, double b)
{
    if (!(fabs(a - b) <= 2e-6 * fmax(1, fabs(b))))
        fail_msg("%.9g, expected %.9g", a, b);
}

static void refuse(struct run *r, const char *part)
{
    assert_int_equal(run_route(r, NULL), MOE_EINVAL);
    if (strstr(r->host.failure, part) == NULL)
        fail_msg("\"%s\" does not say \"%s\"", r->host.failure, part);
    run_close(r);
}

/* Started without its tensors, a router names the first that is missing. */
static void refuse_bare(const char *router, const char *part)
{
    struct policy_host host;
    struct policy policy;
    policy_host_open(&host, &(struct policy_shape){ 1, 4, 1, 1, 1, 0, 1 });
    assert_int_equal(policy_start(&policy, &host, test_plugin("router", router), NULL), MOE_EINVAL);
    if (strstr(host.failure, part) == NULL)
        fail_msg("\"%s\" does not say \"%s\"", host.failure, part);
    policy_stop(&policy);
    policy_host_close(&host);
}

/* ---- cosine-router ---- */

static const float cosine_project[2][2][3] = { { { 1, 0, 0 }, { 0, 1, 0 } }, { { 0, 1, 0 }, { 0, 0, 1 } } };
static const float cosine_embedding[2][3][2] = { { { 2, 0 }, { 0, 5 }, { -3, -4 } }, { { 1, 1 }, { 1, 0 }, { 0, 1 } } };
static const struct moe_tensor cosine_tensors[2] = { { 3, { 2, 2, 3 }, &cosine_project[0][0][0] },
                                                     { 3, { 2, 3, 2 }, &cosine_embedding[0][0][0] } };

static void cosine(void **state)
{
    (void)state;
    const float hidden[2][3] = { { 3, 4, 100 },
                                 { 30, 40, 0 } }; /* cosines 0.6, 0.8, -1; the second token as the first */
    const double e[3] = { exp(0.6 / 0.3), exp(0.8 / 0.3), exp(-1 / 0.3) };
    struct run r;
    open_learned(&r, "cosine-router", "project=#0 embedding=#1", cosine_tensors, 2, 2, 3, 2, hidden[0], 3);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int32_t t = 0; t < 2; t++) {
        assert_int_equal(r.routes.expert[2 * t], 1);
        assert_int_equal(r.routes.expert[2 * t + 1], 0);
        near_to((double)weight_of(&r.routes, t, 1), e[1] / (e[0] + e[1] + e[2]));
        near_to((double)weight_of(&r.routes, t, 0), e[0] / (e[0] + e[1] + e[2]));
    }
    assert_true(r.own.flops >= 2 * 2 * (3 * 2 + 2 * 3));
    r.batch.layer = 1; /* (4, 100) against (1, 1), (1, 0), (0, 1) */
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.expert[0], 2);
    assert_int_equal(r.routes.expert[1], 0);
    run_close(&r);
    open_learned(&r, "cosine-router", "project=#0 embedding=#1 gate=sigmoid", cosine_tensors, 2, 1, 3, 1, hidden[0], 3);
    float add[3] = { 0, -INFINITY, 0 }, scale[3] = { 1, 1, 1 };
    assert_int_equal(run_route(&r, &(struct moe_bias){ add, scale }), MOE_OK);
    assert_int_equal(r.routes.expert[0], 0);
    near_to((double)r.routes.weight[0], 1 / (1 + exp(-0.6 / 0.07)));
    run_close(&r);
}

static void cosine_refuses(void **state)
{
    (void)state;
    float hidden[2][3] = { { 1, 1, 1 }, { 1, NAN, 1 } };
    struct run r;
    refuse_bare("cosine-router", "project: no tensor");
    open_learned(&r, "cosine-router", "project=#0 embedding=#1", cosine_tensors, 2, 2, 3, 1, hidden[0], 3);
    refuse(&r, "token 1, expert 0");
    open_learned(&r, "cosine-router", "project=#0 embedding=#1", cosine_tensors, 2, 1, 3, 1, hidden[0], 2);
    refuse(&r, "2 wide, project expects 3");
    open_learned(&r, "cosine-router", "project=#0 embedding=#1 top_k=4", cosine_tensors, 2, 1, 3, 1, hidden[0], 3);
    refuse(&r, "top_k = 4 of 3");
}

/* ---- activation-norm-router ---- */

static void loudest(void **state)
{
    (void)state;
    static const float factor[2][3][2][2] = {{{{1, 0}, {0, 1}}, {{2, 0}, {0, 0}}, {{0, 0}, {0, -1}}}};
    const struct moe_tensor tensor = {4, {2, 3, 2, 2}, &factor[0][0][0][0]};
    float hidden[1][2] = {{3, 4}}; /* norms 5, 6, 4 */
    struct run r;
    open_learned(&r, "activation-norm-router", "factor=#0", &tensor, 1, 1, 3, 2, hidden[0], 2);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.expert[0], 1);
    assert_int_equal(r.routes.expert[1], 0);
    near_to((double)r.routes.weight[0], 1 / (1 + exp(-1)));
    near_to((double)r.routes.weight[1], 1 / (1 + exp(1)));
    assert_true(r.own.flops >= 2 * 3 * 2 * 2);
    run_close(&r);
    open_learned(&r, "activation-norm-router", "factor=#0 response=softplus renormalise=false", &tensor, 1, 1, 3, 3,
                 hidden[0], 2);
    const double s[3] = {(log1p(exp(3)) + log1p(exp(4))) / 2, (log1p(exp(6)) + log(2)) / 2,
                         (log(2) + log1p(exp(-4))) / 2};
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.expert[0], 0); /* not the same winner */
    for (int32_t e = 0; e < 3; e++)
        near_to((double)weight_of(&r.routes, 0, e), exp(s[e]) / (exp(s[0]) + exp(s[1]) + exp(s[2])));
    hidden[0][1] = INFINITY;
    refuse(&r, "token 0, expert 0");
    refuse_bare("activation-norm-router", "factor: no tensor");
}

/* ---- attention-router ---- */

static void attention(void **state)
{
    (void)state;
    static const float gate[2][3][2][1] = {{{{1}, {-1}}, {{1}, {0}}, {{2}, {1}}}}; /* q = h, -h; k = h, 0; v = 2h, h */
    const struct moe_tensor tensor = {4, {2, 3, 2, 1}, &gate[0][0][0][0]};
    float hidden = 2;
    struct run r;
    open_learned(&r, "attention-router", "gate=#0", &tensor, 1, 1, 2, 2, &hidden, 1);
    const double a = 1 / (1 + exp(-4)), b = 1 / (1 + exp(4)); /* how much each query heeds the first key */
    const double s0 = 4 * a + 2 * (1 - a), s1 = 4 * b + 2 * (1 - b);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.expert[0], 0);
    near_to((double)r.routes.weight[0], 1 / (1 + exp(s1 - s0)));
    near_to((double)r.routes.weight[1], 1 / (1 + exp(s0 - s1)));
    assert_true(r.own.flops >= 3 * 2 * 2);
    hidden = NAN;
    refuse(&r, "token 0, expert 0");
    refuse_bare("attention-router", "gate: no tensor");
}

/* ---- prototype-router ---- */

static void posterior(void **state)
{
    (void)state;
    static const float mean[2][3][2] = {{{0, 0}, {3, 0}, {0, 1}}}, share[2][3] = {{0, 4, 0}};
    const struct moe_tensor tensor[2] = {{3, {2, 3, 2}, &mean[0][0][0]}, {2, {2, 3}, &share[0][0]}};
    float hidden[1][2] = {{1, 0}}; /* squared distances 1, 4, 2 */
    const double e[3] = {exp(-1 / 4.0), exp(-4 / 4.0), exp(-2 / 4.0)};
    struct run r;
    open_learned(&r, "prototype-router", "mean=#0 variance=2 renormalise=false", tensor, 2, 1, 3, 2, hidden[0], 2);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.expert[0], 0);
    assert_int_equal(r.routes.expert[1], 2);
    near_to((double)r.routes.weight[0], e[0] / (e[0] + e[1] + e[2]));
    near_to((double)r.routes.weight[1], e[2] / (e[0] + e[1] + e[2]));
    run_close(&r);
    open_learned(&r, "prototype-router", "mean=#0 log_share=#1 variance=2", tensor, 2, 1, 3, 1, hidden[0], 2);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.expert[0], 1); /* far, but popular */
    near_to((double)r.routes.weight[0], 1);
    hidden[0][0] = NAN;
    refuse(&r, "token 0, expert 0");
    refuse_bare("prototype-router", "mean: no tensor");
}

/* ---- cartesian-router ---- */

/* Against all sums, with many equal ones and with few. */
static void sums_of_rows_and_columns(void **state)
{
    (void)state;
    enum { P = 6, Q = 7, N = P * Q, TOKENS = 40 };
    static float row[2][P][2], column[2][Q][2], hidden[TOKENS][2], all[N];
    const struct moe_tensor tensor[2] = {{3, {2, P, 2}, &row[0][0][0]}, {3, {2, Q, 2}, &column[0][0][0]}};
    const struct moe_env env = {.seed = 5};
    for (int32_t i = 0; i < P * 2; i++)
        row[0][i / 2][i % 2] = (float)(moe_rand(&env, 0, 0, 0, i) % 5);
    for (int32_t i = 0; i < Q * 2; i++)
        column[0][i / 2][i % 2] = (float)(moe_rand(&env, 1, 0, 0, i) % 5);
    for (int32_t i = 0; i < TOKENS * 2; i++)
        hidden[i / 2][i % 2] = (float)(moe_rand(&env, 2, 0, 0, i) % (i < TOKENS ? 3 : 1000)) / 8;
    for (int32_t k = 1; k <= N; k++) {
        struct run r;
        int32_t best[N];
        open_learned(&r, "cartesian-router", "row=#0 column=#1", tensor, 2, TOKENS, N, k, hidden[0], 2);
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < TOKENS; t++) {
            double sum = 0;
            for (int32_t e = 0; e < N; e++)
                all[e] = (row[0][e / Q][0] + column[0][e % Q][0]) * hidden[t][0] +
                         (row[0][e / Q][1] + column[0][e % Q][1]) * hidden[t][1];
            moe_top_k(all, N, k, best);
            assert_memory_equal(r.routes.expert + r.routes.offset[t], best, (size_t)k * sizeof *best);
            for (int32_t i = 0; i < k; i++)
                sum += exp((double)(all[best[i]] - all[best[0]]));
            near_to((double)r.routes.weight[r.routes.offset[t]], 1 / sum);
        }
        assert_true(r.own.flops >= TOKENS * (P + Q) * 4 && r.own.flops < TOKENS * (P + Q) * 5 + TOKENS * k * 9.0);
        run_close(&r);
    }
}

static void best_of_each(void **state)
{
    (void)state;
    static const float row[2][3][1] = {{{0}, {2}, {1}}}, column[2][4][1] = {{{5}, {0}, {0}, {6}}};
    const struct moe_tensor tensor[2] = {{3, {2, 3, 1}, &row[0][0][0]}, {3, {2, 4, 1}, &column[0][0][0]}};
    const int32_t expected[4] = {7, 4, 11, 8}; /* rows 1, 2 and columns 3, 0: sums 8, 7, 7, 6 */
    float hidden[2] = {1, 1};
    struct run r;
    open_learned(&r, "cartesian-router", "row=#0 column=#1 each=2", tensor, 2, 1, 12, 1, hidden, 1);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n, 4);
    assert_memory_equal(r.routes.expert, expected, sizeof expected);
    const double a = 1 / (1 + exp(-1)), b = 1 - a; /* softmaxes over two that differ by 1 */
    near_to((double)weight_of(&r.routes, 0, 7), a * a);
    near_to((double)weight_of(&r.routes, 0, 4), a * b);
    near_to((double)weight_of(&r.routes, 0, 8), b * b);
    run_close(&r);
    open_learned(&r, "cartesian-router", "row=#0 column=#1 each=4", tensor, 2, 1, 12, 1, hidden, 1);
    refuse(&r, "each = 4 of 3 rows");
    open_learned(&r, "cartesian-router", "row=#0 column=#1", tensor, 2, 1, 11, 1, hidden, 1);
    refuse(&r, "expected a product of 11 experts");
    hidden[1] = NAN;
    open_learned(&r, "cartesian-router", "row=#0 column=#1", tensor, 2, 2, 12, 1, hidden, 1);
    refuse(&r, "token 1, expert 0");
    refuse_bare("cartesian-router", "row: no tensor");
}

/* ---- cross-layer-router ---- */

/* A cell of one number, whose steps are written out. */
static double recurrent_step(double x, double s)
{
    const double r = 1 / (1 + exp(-(0.5 * x + 0.1 + 0.7 * s))), z = 1 / (1 + exp(-(-0.4 * x + 0.3 * s + 0.2)));
    return (1 - z) * tanh(1.5 * x + r * (-0.9 * s + 0.6)) + z * s;
}

static void recurrent(void **state)
{
    (void)state;
    static const float project[2] = {2, -1}, input[3] = {0.5f, -0.4f, 1.5f}, again[3] = {0.7f, 0.3f, -0.9f};
    static const float input_bias[3] = {0.1f, 0, 0}, bias[3] = {0, 0.2f, 0.6f}, gate[2][2] = {{3, 0}, {0, 5}};
    const struct moe_tensor tensor[6] = {{3, {2, 1, 1}, project}, {3, {3, 1, 1}, input}, {3, {3, 1, 1}, again},
                                         {2, {3, 1}, input_bias}, {2, {3, 1}, bias}, {3, {2, 2, 1}, gate[0]}};
    const char *settings = "project=#0 input=#1 recurrent=#2 input_bias=#3 bias=#4 gate=#5";
    enum { TOKENS = 200 };
    float hidden[TOKENS] = {0}, turned[TOKENS] = {0};
    int32_t position[TOKENS];
    struct run r;
    open_learned(&r, "cross-layer-router", settings, tensor, 6, TOKENS, 2, 2, hidden, 1);
    r.batch.position = position;
    for (int32_t step = 0; step < 2; step++) { /* a step starts anew */
        r.batch.step = step;
        r.batch.layer = 0;
        r.batch.hidden = hidden;
        for (int32_t t = 0; t < TOKENS; t++) {
            hidden[t] = (float)(t - 100) / 100;
            turned[TOKENS - 1 - t] = hidden[t];
            position[t] = t;
        }
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < TOKENS; t++)
            near_to((double)weight_of(&r.routes, t, 0), 1 / (1 + exp(-3 * recurrent_step(2 * (double)hidden[t], 0))));
        for (int32_t t = 0; t < TOKENS; t++) /* in another order, states follow their tokens */
            position[t] = TOKENS - 1 - t;
        r.batch.layer = 1;
        r.batch.hidden = turned;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < TOKENS; t++) {
            const double h = (double)turned[t], s = recurrent_step(-h, recurrent_step(2 * h, 0));
            near_to((double)weight_of(&r.routes, t, 1), 1 / (1 + exp(-5 * s)));
        }
    }
    turned[3] = NAN;
    refuse(&r, "token 3, expert 0");
    refuse_bare("cross-layer-router", "project: no tensor");
}

/* ---- expert-groups ---- */

static void best_of_groups(void **state)
{
    (void)state;
    const float logits[6] = {5, 6, 4, 0, 1, 1}; /* the three largest are in one group */
    float add[6] = {0}, scale[6] = {1, 1, 1, 1, 1, 1};
    struct run r;
    run_open(&r, "expert-groups", NULL, 1, 6, 2);
    memcpy(r.logits, logits, sizeof logits);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n, 2);
    assert_int_equal(r.routes.expert[0], 1);
    assert_int_equal(r.routes.expert[1], 4); /* of two equal ones the lower id */
    near_to((double)r.routes.weight[0], 1 / (1 + exp(-1) + exp(-2)));
    near_to((double)r.routes.weight[1], 1 / (2 + exp(-1)));
    add[1] = add[3] = add[4] = add[5] = -INFINITY;
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    assert_int_equal(r.routes.n, 1);
    assert_int_equal(r.routes.expert[0], 0);
    r.logits[4] = NAN;
    refuse(&r, "token 0, expert 4");
    run_open(&r, "expert-groups", "groups=4", 1, 6, 2);
    refuse(&r, "groups = 4, expected a divisor of 6");
    run_open(&r, "expert-groups", "groups=3 renormalise=true", 1, 6, 2);
    memcpy(r.logits, logits, sizeof logits);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n, 3);
    near_to((double)(r.routes.weight[0] + r.routes.weight[1] + r.routes.weight[2]), 1);
    run_close(&r);
}

/* ---- label-guided-router ---- */

static void labels(void **state)
{
    (void)state;
    const float map[4] = {3, 3, 0, 4};
    const struct moe_tensor tensor = {1, {4}, map};
    int32_t label[3] = {1, 6, 2};
    const int32_t plain[3] = {1, 2, 2}, mapped[3] = {3, 3, 0};
    struct run r;
    open_learned(&r, "label-guided-router", NULL, NULL, 0, 3, 4, 2, NULL, 0);
    r.batch.label = label;
    for (r.batch.layer = 0; r.batch.layer < 2; r.batch.layer++) {
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        assert_int_equal(r.routes.n, 3);
        assert_memory_equal(r.routes.expert, plain, sizeof plain);
        near_to((double)r.routes.weight[1], 1);
    }
    label[2] = -1;
    refuse(&r, "token 2: label -1");
    label[1] = 0;
    label[2] = 2;
    open_learned(&r, "label-guided-router", "map=#0", &tensor, 1, 3, 4, 2, NULL, 0);
    r.batch.label = label;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_memory_equal(r.routes.expert, mapped, sizeof mapped);
    label[0] = 4;
    refuse(&r, "map has 4 labels");
    label[0] = 3;
    open_learned(&r, "label-guided-router", "map=#0", &tensor, 1, 3, 4, 2, NULL, 0);
    r.batch.label = label;
    refuse(&r, "label 3 has expert 4, expected one of 4");
}

/* ---- shared-router ---- */

static void one_gate_for_all_layers(void **state)
{
    (void)state;
    static const float gate[3][2] = {{1, 0}, {0, 1}, {1, 1}};
    const struct moe_tensor tensor = {2, {3, 2}, gate[0]};
    float hidden[2] = {1, -2}; /* scores 1, -2, -1 */
    struct run r;
    open_learned(&r, "shared-router", "gate=#0", &tensor, 1, 1, 3, 2, hidden, 2);
    for (r.batch.layer = 0; r.batch.layer < 2; r.batch.layer++) {
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        assert_int_equal(r.routes.expert[0], 0);
        assert_int_equal(r.routes.expert[1], 2);
        near_to((double)r.routes.weight[0], 1 / (1 + exp(-2)));
        near_to((double)r.routes.weight[1], 1 / (1 + exp(2)));
    }
    r.batch.layer = 1;
    hidden[1] = NAN;
    refuse(&r, "token 0, expert 0");
    refuse_bare("shared-router", "gate: no tensor");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cosine),
        cmocka_unit_test(cosine_refuses),
        cmocka_unit_test(loudest),
        cmocka_unit_test(attention),
        cmocka_unit_test(posterior),
        cmocka_unit_test(sums_of_rows_and_columns),
        cmocka_unit_test(best_of_each),
        cmocka_unit_test(recurrent),
        cmocka_unit_test(best_of_groups),
        cmocka_unit_test(labels),
        cmocka_unit_test(one_gate_for_all_layers),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
