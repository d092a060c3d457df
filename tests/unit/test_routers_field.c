/* SPDX-License-Identifier: Apache-2.0
 * test_routers_field.c - routers that decide by token id, segment, prompt and neighbours, against closed forms worked
 * out by hand. */
#include "router_field.h"

/* ---- mask-router ---- */

/* A rare id has one expert whatever the gate says, a frequent one the best of those that it sees. */
static void mask(void **state)
{
    enum { N = 400, E = 8, SEEN = 4, K = 2 };
    (void)state;
    const float count[10] = {3, 1, 9, 0, 8, 2, 2, 5, 1, 0}; /* ids 2 and 4 are the most frequent fifth */
    const struct moe_tensor tensor = {1, {10}, count};
    int32_t id[N], seen[10][E] = {{0}}, n_seen[10] = {0};
    struct run r;
    open_one(&r, "mask-router", "frequency=#0 frequent=0.2 visible=4", &tensor, 1, N, E, K);
    r.batch.token_id = id;
    draw_logits(&r, N * E);
    for (int32_t t = 0; t < N; t++)
        id[t] = t % 10;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int64_t t = 0; t < N; t++)
        for (int64_t i = r.routes.offset[t]; i < r.routes.offset[t + 1]; i++)
            n_seen[id[t]] += !seen[id[t]][r.routes.expert[i]]++;
    for (int32_t v = 0; v < 10; v++)
        assert_int_equal(n_seen[v], v == 2 || v == 4 ? SEEN : 1);
    for (int32_t t = 0; t < N; t++) {
        const float *x = r.logits + t * E;
        int32_t best[K] = {-1, -1};
        double sum = 0;
        for (int32_t e = 0; e < E; e++) {
            sum += (double)r.scores[t * E + e];
            assert_true(seen[id[t]][e] == 0 ? r.scores[t * E + e] <= 0 : r.scores[t * E + e] > 0);
        }
        near_to(sum, 1);
        if (n_seen[id[t]] == 1) {
            assert_int_equal(r.routes.offset[t + 1] - r.routes.offset[t], 1);
            near_to((double)r.routes.weight[r.routes.offset[t]], 1);
            continue;
        }
        for (int32_t e = 0; e < E; e++) {
            const bool first = seen[id[t]][e] && (best[0] < 0 || x[e] > x[best[0]]);
            best[1] = first ? best[0] : seen[id[t]][e] && (best[1] < 0 || x[e] > x[best[1]]) ? e : best[1];
            best[0] = first ? e : best[0];
        }
        goes_to(&r, t, K, best);
        near_to((double)weight_of(&r.routes, t, best[0]), 1 / (1 + exp((double)(x[best[1]] - x[best[0]]))));
    }
    float add[E] = {0}, scale[E];
    for (int32_t e = 0; e < E; e++) {
        scale[e] = 1;
        add[e] = seen[0][e] ? -INFINITY : 0; /* all that id 0 may see is gone */
    }
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    assert_int_equal(r.routes.offset[1], 0);
    run_close(&r);
}

/* All ids frequent and all experts seen: plain top-k. Masks are the layer's and the seed's. */
static void mask_draws(void **state)
{
    enum { N = 64, E = 8 };
    (void)state;
    float count[N] = {0};
    const struct moe_tensor tensor = {1, {N}, count};
    int32_t id[N], expert[4][N], differ[3] = {0};
    struct run r;
    for (int32_t t = 0; t < N; t++)
        id[t] = t;
    open_one(&r, "mask-router", "frequency=#0 frequent=1 visible=8 top_k=1", &tensor, 1, N, E, 2);
    r.batch.token_id = id;
    draw_logits(&r, N * E);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int32_t t = 0; t < N; t++)
        assert_true(r.logits[t * E + r.routes.expert[t]] >= moe_largest(r.logits + t * E, E));
    run_close(&r);
    for (int32_t i = 0; i < 4; i++) { /* again; another layer; another seed */
        run_open_with(&r, "mask-router", "frequency=#0 frequent=0", &tensor, 1,
                      &(struct policy_shape){2, E, 2, 1, 1, 0, i == 3 ? 2 : 1}, N);
        r.batch.token_id = id;
        r.batch.layer = i == 2;
        r.batch.step = i;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        memcpy(expert[i], r.routes.expert, sizeof expert[i]);
        run_close(&r);
        for (int32_t t = 0; i > 0 && t < N; t++)
            differ[i - 1] += expert[i][t] != expert[0][t];
    }
    assert_int_equal(differ[0], 0);
    assert_true(differ[1] > N / 2 && differ[2] > N / 2); /* 7 of 8 on average */
}

static void mask_refuses(void **state)
{
    (void)state;
    float count[4] = {1, 2, NAN, 4};
    const struct moe_tensor tensor = {1, {4}, count};
    int32_t id[1] = {4};
    struct run r;
    refuse_open("mask-router", NULL, NULL, 0, "frequency: no tensor given");
    refuse_open("mask-router", "frequency=#0", &tensor, 1, "id 2 has nan");
    count[2] = 3;
    open_one(&r, "mask-router", "frequency=#0", &tensor, 1, 1, 4, 1);
    r.batch.token_id = id;
    refuse(&r, "token 0: id 4, but frequency has 4 ids");
    id[0] = 0;
    open_one(&r, "mask-router", "frequency=#0 visible=5", &tensor, 1, 1, 4, 1);
    r.batch.token_id = id;
    refuse(&r, "visible = 5 of 4");
    open_one(&r, "mask-router", "frequency=#0 top_k=5", &tensor, 1, 1, 4, 1);
    r.batch.token_id = id;
    refuse(&r, "top_k = 5 of 4");
    open_one(&r, "mask-router", "frequency=#0", &tensor, 1, 1, 4, 1);
    r.batch.token_id = id;
    r.logits[2] = NAN;
    refuse(&r, "token 0, expert 2");
}

/* ---- distilled-router ---- */

static void distilled(void **state)
{
    (void)state;
    static const float embedding[3][2] = {{1, 0}, {0, 2}, {-1, -1}};
    static const float centroid[2][3][2] = {{{1, 0}, {0, 1}, {-2, -1}}, {{0, 1}, {1, 0}, {0, 0}}};
    const struct moe_tensor tensor[2] = {{2, {3, 2}, embedding[0]}, {3, {2, 3, 2}, centroid[0][0]}};
    int32_t id[4] = {0, 1, 2, 1}, beyond = 3;
    struct run r;
    open_one(&r, "distilled-router", "embedding=#0 centroid=#1", tensor, 2, 4, 3, 2);
    r.batch.token_id = id;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 0); /* 1, 0, -2 */
    GOES_TO(&r, 1, 1); /* 0, 2, -2 */
    GOES_TO(&r, 2, 2); /* -1, -1, 3 */
    GOES_TO(&r, 3, 1);
    near_to((double)r.routes.weight[0], 1 / (1 + exp(-1)));
    near_to((double)r.routes.weight[2], 1 / (1 + exp(-3)));
    near_to(r.own.flops, 4 * (2 * 2 * 3 + 4 * 3));
    r.batch.layer = 1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 1, 0);
    run_close(&r);
    open_one(&r, "distilled-router", "embedding=#0 centroid=#1 top_k=0 renormalise=true", tensor, 2, 1, 3, 2);
    r.batch.token_id = id;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 0, 1);
    near_to((double)r.routes.weight[1], 0.5 / (0.5 + 1 / (1 + exp(-1))));
    r.batch.token_id = &beyond;
    refuse(&r, "id 3, but embedding has 3 ids");
    refuse_open("distilled-router", NULL, NULL, 0, "embedding: no tensor given");
    refuse_open("distilled-router", "embedding=#0", tensor, 1, "centroid: no tensor given");
    const struct moe_tensor wide[2] = {tensor[0], {3, {2, 2, 3}, centroid[0][0]}};
    refuse_open("distilled-router", "embedding=#0 centroid=#1", wide, 2,
                "embedding has 2 numbers per id, centroid has 3");
    const float infinite[3][2] = {{INFINITY, 0}, {0, 0}, {0, 0}};
    const struct moe_tensor bad[2] = {{2, {3, 2}, infinite[0]}, tensor[1]};
    open_one(&r, "distilled-router", "embedding=#0 centroid=#1", bad, 2, 1, 3, 1);
    r.batch.token_id = id;
    refuse(&r, "token id 0, expert 0");
}

/* ---- segment-router ---- */

static void segment(void **state)
{
    (void)state;
    /* request 0 at positions 2, 3, 4 and request 7 at 3, mixed; windows of 2: {2, 3}, {4} and {3} */
    const int32_t request[4] = {0, 7, 0, 0}, position[4] = {3, 3, 2, 4};
    const float x[4][3] = {{4, 0, 1}, {0, 1, 0}, {-2, 0, 3}, {0, 5, 0}}; /* mean of 0 and 2: 1, 0, 2 */
    const float windows[2] = {1, 3};
    struct moe_tensor tensor = {1, {2}, windows};
    const double sum = exp(1) + 1 + exp(2);
    struct run r;
    open_one(&r, "segment-router", "window=2 top_k=2 renormalise=false", NULL, 0, 4, 3, 1);
    memcpy(r.logits, x, sizeof x);
    r.batch.request = request;
    r.batch.position = position;
    r.host.model.d_model = 10;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int32_t t = 0; t < 3; t += 2) {
        GOES_TO(&r, t, 2, 0);
        near_to((double)weight_of(&r.routes, t, 2), exp(2) / sum);
        near_to((double)weight_of(&r.routes, t, 0), exp(1) / sum);
    }
    GOES_TO(&r, 1, 1, 0);
    GOES_TO(&r, 3, 1, 0);
    near_to(r.own.flops, 3 * (2 * 10 * 3 + 4 * 3) + 4 * 10); /* three decisions, four tokens in means */
    run_close(&r);
    open_one(&r, "segment-router", "windows=#0", &tensor, 1, 4, 3, 1);
    memcpy(r.logits, x, sizeof x);
    r.batch.request = request;
    r.batch.position = position;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 0); /* windows of 1: every token for itself */
    GOES_TO(&r, 2, 2);
    r.batch.layer = 1; /* of 3: positions 3 and 4 are one, 2 is another */
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 0, 1); /* 2, 2.5, 0.5 */
    GOES_TO(&r, 3, 1);
    GOES_TO(&r, 2, 2);
    r.logits[5] = INFINITY;
    refuse(&r, "token 1, expert 2");
    const float half[2] = {2, 1.5f};
    tensor.data = half;
    refuse_open("segment-router", "windows=#0", &tensor, 1, "layer 1 has 1.5");
    open_one(&r, "segment-router", "top_k=4", NULL, 0, 1, 3, 1);
    refuse(&r, "top_k = 4 of 3");
}

/* ---- prompt-level-router ---- */

static void prompt(void **state)
{
    (void)state;
    const int32_t first[3] = {5, 9, 5}, later[3] = {9, 5, 6};
    const float x[3][3] = {{3, 0, 0}, {0, 1, 0}, {-1, 0, 4}}; /* request 5: 1, 0, 2 on average */
    const double sum = exp(1) + exp(2);
    struct run r;
    open_one(&r, "prompt-level-router", "requests=3", NULL, 0, 3, 3, 2);
    memcpy(r.logits, x, sizeof x);
    r.batch.request = first;
    r.host.model.d_model = 10;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int32_t t = 0; t < 3; t += 2) {
        GOES_TO(&r, t, 2, 0);
        near_to((double)weight_of(&r.routes, t, 2), exp(2) / sum);
    }
    GOES_TO(&r, 1, 1, 0);
    near_to(r.own.flops, 2 * (2 * 10 * 3 + 4 * 3) + 3 * 10);
    r.batch.step = 1; /* other logits and a balancer: 5 and 9 stay, 6 decides on its own */
    r.batch.request = later;
    for (int32_t i = 0; i < 9; i++)
        r.logits[i] = (float)(i % 3 == 1 ? 9 : i % 3);
    float add[3] = {0, -INFINITY, 0}, scale[3] = {1, 1, 1};
    assert_int_equal(run_route(&r, &(struct moe_bias){add, scale}), MOE_OK);
    GOES_TO(&r, 0, 1, 0);
    GOES_TO(&r, 1, 2, 0);
    GOES_TO(&r, 2, 2, 0);
    near_to((double)weight_of(&r.routes, 1, 2), exp(2) / sum);
    near_to((double)r.scores[3 + 1], 0); /* of 5, whose gate did not run */
    near_to((double)r.scores[3 + 2], exp(2) / (sum + 1));
    near_to(r.own.flops, 2 * 10 * 3 + 4 * 3 + 10);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 2, 2, 0); /* as decided, though the balancer is gone */
    near_to(r.own.flops, 0);
    r.batch.layer = 1; /* layers decide for themselves */
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    GOES_TO(&r, 1, 1, 2);
    const int32_t fourth[3] = {5, 6, 8};
    r.batch.request = fourth;
    refuse(&r, "more than requests = 3");
    open_one(&r, "prompt-level-router", "top_k=4", NULL, 0, 1, 3, 1);
    refuse(&r, "top_k = 4 of 3");
    open_one(&r, "prompt-level-router", "", NULL, 0, 1, 3, 1);
    r.logits[1] = NAN;
    refuse(&r, "token 0, expert 1");
}

/* Many requests, met in any order: every one keeps what it had. */
static void prompts_are_kept_apart(void **state)
{
    enum { N = 300, E = 8 };
    (void)state;
    int32_t request[N], expert[N];
    struct run r;
    open_one(&r, "prompt-level-router", "requests=300 top_k=1", NULL, 0, N, E, 1);
    r.batch.request = request;
    draw_logits(&r, N * E);
    for (int32_t t = 0; t < N; t++)
        request[t] = t * 1024;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int32_t t = 0; t < N; t++) {
        expert[t] = r.routes.expert[t];
        assert_true(r.logits[t * E + expert[t]] >= moe_largest(r.logits + t * E, E));
    }
    for (int32_t t = 0; t < N; t++)
        request[t] = (N - 1 - t) * 1024;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int32_t t = 0; t < N; t++)
        assert_int_equal(r.routes.expert[t], expert[N - 1 - t]);
    run_close(&r);
}

/* ---- token-graph-router ---- */

static void graph(void **state)
{
    (void)state;
    /* tokens 0 and 3 are of request 0 and alike (cosine 0.6), 1 has no direction, 2 is of request 1 */
    const int32_t request[4] = {0, 0, 1, 0}, position[4] = {0, 1, 0, 2};
    float hidden[4][2] = {{5, 0}, {0, 0}, {5, 0}, {3, 4}};
    const double a = exp((0.6 - 1) / 0.5), none = exp(-1 / 0.5);
    struct run r;
    for (int32_t causal = 0; causal < 2; causal++) {
        open_one(&r, "token-graph-router",
                 causal ? "tau=0.5 renormalise=false" : "tau=0.5 renormalise=false causal=false", NULL, 0, 4, 2, 2);
        const float x[4] = {2, 0, -1, 1}; /* of expert 0; expert 1 has 0: p = sigmoid */
        double p[4];
        for (int32_t t = 0; t < 4; t++) {
            r.logits[2 * t] = x[t];
            p[t] = 1 / (1 + exp(-(double)x[t]));
        }
        r.batch.request = request;
        r.batch.position = position;
        r.batch.hidden = hidden[0];
        r.batch.n_hidden = 2;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        near_to((double)weight_of(&r.routes, 3, 0), (p[3] + a * p[0] + none * p[1]) / (1 + a + none));
        near_to((double)weight_of(&r.routes, 3, 1), 1 - (p[3] + a * p[0] + none * p[1]) / (1 + a + none));
        near_to((double)weight_of(&r.routes, 2, 0), p[2]);
        near_to((double)weight_of(&r.routes, 0, 0), causal ? p[0] : (p[0] + a * p[3] + none * p[1]) / (1 + a + none));
        near_to((double)weight_of(&r.routes, 1, 0), causal ? (p[1] + none * p[0]) / (1 + none)
                                                           : (p[1] + none * (p[0] + p[3])) / (1 + 2 * none));
        assert_true(r.own.flops >= (causal ? 7 : 10) * 2 * (2 + 2)); /* pairs */
        run_close(&r);
    }
    open_one(&r, "token-graph-router", "tau=0.001 renormalise=false", NULL, 0, 4, 2, 2); /* everyone for himself */
    r.batch.hidden = hidden[0];
    r.batch.n_hidden = 2;
    r.logits[6] = 1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    near_to((double)weight_of(&r.routes, 1, 0), 0.5);
    near_to((double)weight_of(&r.routes, 3, 0), 1 / (1 + exp(-1)));
    run_close(&r);
    open_one(&r, "token-graph-router", "", NULL, 0, 4, 2, 1);
    r.batch.hidden = hidden[0];
    r.batch.n_hidden = 2;
    hidden[1][1] = NAN;
    refuse(&r, "token 1: its hidden state is nan long");
    open_one(&r, "token-graph-router", "", NULL, 0, 1, 2, 1);
    r.batch.hidden = hidden[0];
    r.batch.n_hidden = 2;
    r.logits[1] = -INFINITY;
    refuse(&r, "token 0, expert 1");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mask),
        cmocka_unit_test(mask_draws),
        cmocka_unit_test(mask_refuses),
        cmocka_unit_test(distilled),
        cmocka_unit_test(segment),
        cmocka_unit_test(prompt),
        cmocka_unit_test(prompts_are_kept_apart),
        cmocka_unit_test(graph),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
