/* SPDX-License-Identifier: Apache-2.0
 * test_routers.c - routers that need no trained gate of their own: against the outputs of Megatron-LM and of fairseq's
 * auction, and against closed forms. */
#include "router_test.h"

static uint64_t draw(int64_t i)
{
    const struct moe_env env = { .seed = 5 };
    return moe_rand(&env, 1, 0, 0, i);
}

static void fill(float *x, int64_t n, int64_t seed)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(6 * moe_unit(draw(seed * 1000000 + i)) - 3);
}

static void count(const struct moe_routes *r, int32_t n_experts, int32_t *load)
{
    memset(load, 0, (size_t)n_experts * sizeof *load);
    for (int64_t i = 0; i < r->n; i++)
        if (r->expert[i] < n_experts)
            load[r->expert[i]]++;
}

static int32_t experts_of(const struct run *r, int32_t t)
{
    return (int32_t)(r->routes.offset[t + 1] - r->routes.offset[t]);
}

/* What a router says when it refuses. */
static void refuses(const char *router, const char *settings, int32_t n_experts, int32_t top_k, const char *why)
{
    struct run r;
    run_open(&r, router, settings, 2, n_experts, top_k);
    const float hidden[2 * 24] = { 0 };
    r.batch.n_hidden = 24;
    r.batch.hidden = hidden;
    assert_int_equal(run_route(&r, NULL), MOE_EINVAL);
    assert_string_equal(r.host.failure, why);
    run_close(&r);
}

/* ---- Megatron ---- */

static void fill_logits(struct run *r, const json_t *logits)
{
    for (int32_t t = 0; t < r->batch.n_tokens; t++)
        for (int32_t e = 0; e < r->batch.n_experts; e++)
            r->logits[t * r->batch.n_experts + e] = (float)test_at(json_array_get(logits, (size_t)t), e);
}

/* probs: 0 where a token does not go. Exact ids, weights within 1e-6. */
static void check_probs(const struct run *r, const json_t *probs)
{
    for (int32_t t = 0; t < r->batch.n_tokens; t++)
        for (int32_t e = 0; e < r->batch.n_experts; e++) {
            const double expected = test_at(json_array_get(probs, (size_t)t), e);
            const float ours = weight_of(&r->routes, t, e);
            assert_true((expected > 0) == (ours > 0) && fabs((double)ours - expected) <= 1e-6 * fmax(expected, 1));
        }
}

static void megatron_top_k(void **state)
{
    (void)state;
    json_t *all = test_shared("oracles/megatron_router.json"), *c;
    size_t i, n = 0;
    json_array_foreach(json_object_get(json_object_get(all, "cases"), "topk_routing"), i, c)
    {
        const json_t *args = json_object_get(c, "args"), *given = json_object_get(args, "expert_bias");
        const bool sigmoid = json_object_get(args, "score_function") != NULL;
        const int groups = (int)json_integer_value(json_object_get(args, "num_groups"));
        const int top = (int)json_integer_value(json_object_get(args, "group_topk")), k = test_int(c, "topk");
        char settings[200];
        struct run r;
        float add[16] = { 0 }, scale[16];
        snprintf(settings, sizeof settings, "score=%s groups=%d top_groups=%d best_of_group=%d renormalise=%s",
                 sigmoid ? "sigmoid" : "softmax", groups ? groups : 1, top ? top : 1, top ? k / top : 1,
                 json_is_true(json_object_get(args, "use_pre_softmax")) ? "false" : "true");
        run_open(&r, "group-limited-top-k", settings, test_int(c, "T"), test_int(c, "E"), k);
        fill_logits(&r, json_object_get(c, "logits"));
        for (int32_t e = 0; e < r.batch.n_experts; e++) {
            add[e] = (float)test_at(given, e);
            scale[e] = 1;
        }
        assert_int_equal(run_route(&r, &(struct moe_bias){ add, scale }), MOE_OK);
        assert_int_equal(r.routes.n, r.batch.n_tokens * k);
        check_probs(&r, json_object_get(c, "probs"));
        run_close(&r);
        n++;
    }
    assert_int_equal(n, 5);
    json_decref(all);
}

static void megatron_sinkhorn(void **state)
{
    (void)state;
    json_t *all = test_shared("oracles/megatron_router.json"), *c;
    size_t i, n = 0;
    json_array_foreach(json_object_get(json_object_get(all, "cases"), "sinkhorn"), i, c)
    {
        const json_t *logits = json_object_get(c, "logits"), *top = json_object_get(c, "top1");
        struct run r;
        run_open(&r, "sinkhorn-router", "rounds=100000", (int32_t)json_array_size(logits),
                 (int32_t)json_array_size(json_array_get(logits, 0)), 1);
        fill_logits(&r, logits);
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < r.batch.n_tokens; t++) {
            const int32_t e = (int32_t)json_integer_value(json_array_get(top, (size_t)t));
            const double logit = test_at(json_array_get(logits, (size_t)t), e);
            assert_int_equal(r.routes.expert[t], e);
            assert_true(fabs(1 / (1 + exp(-logit)) - (double)r.routes.weight[t]) < 1e-6);
        }
        run_close(&r);
        n++;
    }
    assert_int_equal(n, 2);
    json_decref(all);
}

/* ---- BASE ---- */

static void fairseq_auction(void **state)
{
    (void)state;
    json_t *all = test_shared("oracles/base.json"), *c;
    size_t i, n = 0;
    json_array_foreach(json_object_get(all, "cases"), i, c)
    {
        struct run r;
        int32_t load[64];
        double sum = 0;
        run_open(&r, "base-auction", NULL, test_int(c, "tokens"), test_int(c, "workers"), 1);
        fill_logits(&r, json_object_get(c, "scores"));
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < r.batch.n_tokens; t++) {
            const float logit = r.logits[t * r.batch.n_experts + r.routes.expert[t]];
            sum += (double)logit;
            assert_true(fabsf(r.routes.weight[t] - 1 / (1 + expf(-logit))) < 1e-6f);
        }
        count(&r.routes, r.batch.n_experts, load);
        for (int32_t e = 0; e < r.batch.n_experts; e++)
            assert_int_equal(load[e], r.batch.n_tokens / r.batch.n_experts);
        assert_true(fabs(sum / json_number_value(json_object_get(c, "auction_score")) - 1) < 1e-6);
        assert_true(sum <= json_number_value(json_object_get(c, "optimal_score")) * (1 + 1e-6));
        run_close(&r);
        n++;
    }
    assert_int_equal(n, 5);
    json_decref(all);
}

/* Balanced whatever the scores, after one round too; tokens that do not divide leave experts one apart at most. */
static void auction_balances(void **state)
{
    (void)state;
    for (int trial = 0; trial < 30; trial++) {
        const int32_t n = 1 + trial * 7 % 50, n_experts = 1 + trial % 8;
        struct run r;
        int32_t load[8];
        run_open(&r, "base-auction", trial % 3 ? NULL : "max_rounds=1", n, n_experts, 1);
        fill(r.logits, (int64_t)n * n_experts, trial);
        for (int32_t t = 0; t < n && trial % 2; t++)
            r.logits[t * n_experts] += 10; /* everybody wants expert 0 */
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        count(&r.routes, n_experts, load);
        for (int32_t e = 0; e < n_experts; e++)
            assert_true(load[e] <= (n + n_experts - 1) / n_experts);
        run_close(&r);
    }
    struct run r;
    run_open(&r, "base-auction", "greedy=true", 3, 2, 1);
    const float logits[6] = { 2, 1, 2, 1, 3, 1 };
    memcpy(r.logits, logits, sizeof logits);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    for (int32_t t = 0; t < 3; t++)
        assert_int_equal(r.routes.expert[t], 0);
    run_close(&r);
}

/* ---- expert choice ---- */

/* Two experts, four tokens, one each token: expert 0 takes the two that prefer it most, so does 1. */
static void experts_choose(void **state)
{
    (void)state;
    const float logits[8] = { 3, 0, 2, 0, 1, 0, 0, 4 };
    struct run r;
    run_open(&r, "expert-choice", "factor=1", 4, 2, 1);
    memcpy(r.logits, logits, sizeof logits);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n, 4);
    assert_true(experts_of(&r, 0) == 1 && experts_of(&r, 1) == 1 && experts_of(&r, 2) == 1 && experts_of(&r, 3) == 1);
    assert_true(fabsf(weight_of(&r.routes, 0, 0) - 1 / (1 + expf(-3))) < 1e-6f);
    assert_true(fabsf(weight_of(&r.routes, 2, 1) - 1 / (1 + expf(1))) < 1e-6f); /* what was left for it */
    run_close(&r);
}

static void choice_is_balanced(void **state)
{
    (void)state;
    for (int trial = 0; trial < 12; trial++) {
        const int32_t n = 10 + 9 * trial, n_experts = 4 + 4 * (trial % 3);
        struct run r;
        int32_t load[16], request[200];
        run_open(&r, "expert-choice", trial % 2 ? "factor=2" : "factor=1.5 per=request", n, n_experts, 2);
        fill(r.logits, (int64_t)n * n_experts, trial);
        for (int32_t t = 0; t < n; t++)
            request[t] = t % 3;
        r.batch.request = request;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        count(&r.routes, n_experts, load);
        int32_t expected = trial % 2 ? (int32_t)ceil(2.0 * n / n_experts) : 0;
        for (int32_t q = 0; q < 3 && trial % 2 == 0; q++)
            expected += (int32_t)ceil(1.5 * ((n + 2 - q) / 3) / n_experts);
        for (int32_t e = 0; e < n_experts; e++)
            assert_int_equal(load[e], expected);
        run_close(&r);
    }
}

/* 8 experts with 8 of 32 tokens each: without a limit some have 3 of them, with 2 every token has 2. */
static void capped_choice(void **state)
{
    (void)state;
    for (int limit = 0; limit <= 2; limit += 2) {
        char settings[60];
        struct run r;
        int32_t most = 0, without = 0;
        snprintf(settings, sizeof settings, "factor=2 limit=%d projections=10000", limit);
        run_open(&r, "expert-choice", settings, 32, 8, 2);
        fill(r.logits, 32 * 8, 4);
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t t = 0; t < 32; t++) {
            most = experts_of(&r, t) > most ? experts_of(&r, t) : most;
            without += experts_of(&r, t) == 0;
        }
        if (limit == 0)
            assert_true(most > 2);
        if (limit == 2)
            assert_true(most == 2 && without == 0);
        assert_int_equal(r.routes.n, 64);
        run_close(&r);
    }
}

/* ---- top-p ---- */

static void top_p_takes_what_it_takes(void **state)
{
    (void)state;
    static const struct {
        const char *settings;
        int32_t n;
        float first;
    } cases[] = {
        { "p=0.3", 1, 0.4f },       { "p=0.39", 1, 0.4f },
        { "p=0.41", 2, 0.4f },      { "p=0.69", 2, 0.4f },
        { "p=0.71", 3, 0.4f },      { "p=0.91", 4, 0.4f },
        { "p=1", 4, 0.4f },         { "p=0", 1, 0.4f },
        { "p=1 max_k=2", 2, 0.4f }, { "p=0.5 renormalise=true", 2, 4 / 7.0f },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct run r;
        run_open(&r, "top-p", cases[i].settings, 1, 4, 2);
        for (int32_t e = 0; e < 4; e++)
            r.logits[e] = logf(0.1f * (float)(e + 1));
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        assert_int_equal(r.routes.n, cases[i].n);
        assert_int_equal(r.routes.expert[0], 3);
        assert_true(fabsf(r.routes.weight[0] - cases[i].first) < 1e-6f);
        run_close(&r);
    }
    struct run r; /* more than the first eight that it looks for */
    run_open(&r, "top-p", "p=0.9", 1, 100, 2);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_in_range(r.routes.n, 90, 91);
    run_close(&r);
}

/* ---- hash ---- */

static void hashes(void **state)
{
    (void)state;
    enum { N = 4000, E = 8, V = 500 };
    static int32_t id[N], before[N], position[N];
    for (int32_t t = 0; t < N; t++) {
        id[t] = (int32_t)(draw(t) % V);
        before[t] = t % 50 ? id[t - 1] : -1;
        position[t] = t % 50;
    }
    static const char *const by[] = { "token", "position", "bigram", "previous", "mod" };
    for (int i = 0; i < 5; i++) {
        char settings[40];
        struct run r;
        snprintf(settings, sizeof settings, "by=%s top_k=2", by[i]);
        run_open(&r, "hash-router", settings, N, E, 2);
        r.batch.token_id = id;
        r.batch.previous_token_id = before;
        r.batch.position = position;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        int32_t different = 0;
        for (int32_t t = 0; t < N; t++) {
            const int32_t *own = r.routes.expert + 2 * t;
            assert_true(own[0] != own[1] && r.routes.weight[2 * t] == 0.5f);
            if (i == 4)
                assert_true(own[0] == id[t] % E && own[1] == (id[t] + 1) % E);
            for (int32_t u = 0; u < t && u < 100; u++) {
                const bool same = i == 0 || i == 4 ? id[t] == id[u]
                                  : i == 1         ? position[t] == position[u]
                                  : i == 3         ? before[t] == before[u]
                                                   : id[t] == id[u] && before[t] == before[u];
                if (same)
                    assert_true(own[0] == r.routes.expert[2 * u] && own[1] == r.routes.expert[2 * u + 1]);
                else
                    different += own[0] != r.routes.expert[2 * u];
            }
        }
        assert_true(different > 0);
        run_close(&r);
    }
}

/* Zipf's law over ids: a random hash is as uneven as its most frequent ids, the balanced one is even up to one id. */
static void balanced_hash_is_balanced(void **state)
{
    (void)state;
    enum { E = 16, V = 2000 };
    static float frequency[V];
    static int32_t id[V];
    double load[2][E] = { { 0 } }, sum = 0;
    for (int32_t v = 0; v < V; v++) {
        id[v] = v;
        sum += (double)(frequency[v] = 1 / (float)(v + 20));
    }
    const struct moe_tensor tensor = { 1, { V, 0, 0, 0 }, frequency };
    const struct policy_shape shape = { 1, E, 1, 1, 1, 0, 1 };
    for (int balanced = 0; balanced < 2; balanced++) {
        struct run r;
        run_open_with(&r, "hash-router", balanced ? "by=balanced frequency=#0" : "by=token", &tensor, 1, &shape, V);
        r.batch.token_id = id;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        for (int32_t v = 0; v < V; v++)
            load[balanced][r.routes.expert[v]] += (double)frequency[v];
        run_close(&r);
    }
    double most[2] = { 0, 0 };
    for (int i = 0; i < 2; i++)
        for (int e = 0; e < E; e++)
            most[i] = fmax(most[i], load[i][e] * E / sum);
    assert_true(most[0] > 1.1 && most[1] < 1.002);
}

static void table_over_positions(void **state)
{
    (void)state;
    static const float table[2 * 4] = { 0, 1, 2, 3, 5, 5, 0, 0 };
    const struct moe_tensor tensor = { 2, { 2, 4, 0, 0 }, table };
    const struct policy_shape shape = { 1, 4, 2, 1, 1, 0, 1 };
    static const int32_t position[3] = { 0, 1, 2 }, id[3] = { 0, 0, 0 };
    struct run r;
    run_open_with(&r, "hash-router", "by=table table=#0 top_k=2", &tensor, 1, &shape, 3);
    r.batch.token_id = id;
    r.batch.position = position;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    static const int32_t expected[6] = { 3, 2, 0, 1, 3, 2 };
    assert_memory_equal(r.routes.expert, expected, sizeof expected);
    assert_true(fabsf(r.routes.weight[0] - 1 / (1 + expf(-1))) < 1e-6f && r.routes.weight[2] == 0.5f);
    run_close(&r);
}

/* ---- random ---- */

static void random_experts(void **state)
{
    (void)state;
    enum { N = 64, E = 8, STEPS = 800 };
    for (int per_token = 0; per_token < 2; per_token++) {
        struct run r;
        int32_t load[E] = { 0 }, request[N], position[N];
        run_open(&r, "random-router", per_token ? "per=token" : "per=batch", N, E, 2);
        for (int32_t t = 0; t < N; t++) {
            request[t] = t / 8;
            position[t] = t % 8;
        }
        r.batch.request = request;
        r.batch.position = position;
        for (r.batch.step = 0; r.batch.step < STEPS; r.batch.step++) {
            assert_int_equal(run_route(&r, NULL), MOE_OK);
            int32_t same = 0, own[E];
            count(&r.routes, E, own);
            for (int32_t e = 0; e < E; e++)
                load[e] += own[e];
            for (int32_t t = 1; t < N; t++)
                same +=
                    r.routes.expert[2 * t] == r.routes.expert[0] && r.routes.expert[2 * t + 1] == r.routes.expert[1];
            assert_true(per_token ? same < N - 1 : same == N - 1);
        }
        for (int32_t e = 0; e < E; e++) { /* a quarter each; six standard deviations */
            const double draws = per_token ? (double)N * STEPS : STEPS, mean = draws / 4,
                         deviation = sqrt(draws * 3) / 4;
            assert_true(fabs(load[e] / (per_token ? 1.0 : N) - mean) < 6 * deviation);
        }
        run_close(&r);
    }
}

/* ---- gates on hidden states that are not trained ---- */

static void slices_score_themselves(void **state)
{
    (void)state;
    const float hidden[2 * 6] = { 0, 0, 3, 1, 1, 0, 1, 1, 0, 1, 0, 0 };
    struct run r;
    run_open(&r, "locmoe", NULL, 2, 3, 1);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 6;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_true(r.routes.expert[0] == 1 && r.routes.expert[1] == 0); /* means 0 2 .5 and 1 .5 0 */
    assert_true(fabs((double)r.routes.weight[0] - exp(2) / (1 + exp(2) + exp(0.5))) < 1e-6);
    run_close(&r);
    refuses("locmoe", NULL, 5, 1, "layer 0: 5 experts do not divide a hidden state of 24 into slices");
}

/* Fixed by the seed; another layer has another; variance 1 / H makes logits of unit vectors about 1 / sqrt(H). */
static void gate_that_was_drawn(void **state)
{
    (void)state;
    enum { N = 32, E = 16, H = 64 };
    static float hidden[N * H];
    int32_t expert[2][N * 2];
    const struct policy_shape shape = { 2, E, 2, 1, 1, 0, 1 };
    fill(hidden, N * H, 3);
    for (int layer = 0; layer < 2; layer++) {
        struct run r;
        run_open_with(&r, "random-gate", NULL, NULL, 0, &shape, N);
        r.batch.hidden = hidden;
        r.batch.n_hidden = H;
        r.batch.layer = layer;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        memcpy(expert[layer], r.routes.expert, sizeof expert[layer]);
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        assert_memory_equal(expert[layer], r.routes.expert, sizeof expert[layer]);
        for (int32_t t = 0; t < N; t++)
            assert_true(fabsf(r.routes.weight[2 * t] + r.routes.weight[2 * t + 1] - 1) < 1e-6f);
        run_close(&r);
    }
    assert_true(memcmp(expert[0], expert[1], sizeof expert[0]) != 0);
}

/* ---- two levels ---- */

/* Four experts in two groups: the second group has more together, though the best expert is in the first. */
static void groups_first(void **state)
{
    (void)state;
    const float p[4] = { 0.4f, 0.05f, 0.3f, 0.25f };
    struct run r;
    run_open(&r, "bilevel-router", "groups=2", 1, 4, 1);
    for (int32_t e = 0; e < 4; e++)
        r.logits[e] = logf(p[e]) + 1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.expert[0], 2);
    assert_true(fabsf(r.routes.weight[0] - 0.3f) < 1e-6f); /* .55 * .3 / .55 */
    run_close(&r);
    run_open(&r, "bilevel-router", "groups=2 top_k=2 renormalise=true", 1, 4, 1);
    for (int32_t e = 0; e < 4; e++)
        r.logits[e] = logf(p[e]);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_true(r.routes.expert[0] == 2 && r.routes.expert[1] == 3);
    assert_true(fabsf(r.routes.weight[0] - 0.3f / 0.55f) < 1e-6f);
    run_close(&r);
    run_open(&r, "bilevel-router", "groups=2 top_k=3", 1, 4, 1); /* more than a group has */
    for (int32_t e = 0; e < 4; e++)
        r.logits[e] = logf(p[e]);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_true(r.routes.expert[0] == 0 && r.routes.expert[1] == 2 && r.routes.expert[2] == 3);
    run_close(&r);
    const float gate[2 * 2] = { 1, 0, 0, 1 }, hidden[2] = { 2, 1 };
    const struct moe_tensor tensor = { 3, { 1, 2, 2, 0 }, gate };
    run_open_with(&r, "bilevel-router", "groups=2 gate=#0", &tensor, 1, &(struct policy_shape){ 1, 4, 1, 1, 1, 0, 1 },
                  1);
    r.batch.hidden = hidden;
    r.batch.n_hidden = 2;
    for (int32_t e = 0; e < 4; e++)
        r.logits[e] = logf(p[e]);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.expert[0], 0);
    assert_true(fabs((double)r.routes.weight[0] - 1 / (1 + exp(-1)) * 0.4 / 0.45) < 1e-6);
    run_close(&r);
}

/* ---- Selective Sinkhorn ---- */

/* The published example: C = .73 .27 / .27 .73, xi = .5 gives .715 .285 / .285 .715. */
static void selective_sinkhorn(void **state)
{
    (void)state;
    struct run r;
    run_open(&r, "sinkhorn-router", "kernel=probabilities xi=0.5 top_k=2 tolerance=1e-6", 2, 2, 2);
    for (int32_t i = 0; i < 4; i++)
        r.logits[i] = logf(i == 0 || i == 3 ? 0.73f : 0.27f);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_true(fabsf(weight_of(&r.routes, 0, 0) - 0.715f) < 1e-3f &&
                fabsf(weight_of(&r.routes, 0, 1) - 0.285f) < 1e-3f);
    assert_true(fabs((double)weight_of(&r.routes, 1, 1) - 1 / (1 + exp(-0.92))) < 1e-5);
    run_close(&r);
    /* All tokens prefer expert 0 a little; the plan spreads them, and steps that do not use it do not. */
    for (int share = 0; share < 2; share++) {
        int32_t load[4];
        run_open(&r, "sinkhorn-router",
                 share ? "kernel=probabilities top_k=1 share=1" : "kernel=probabilities top_k=1 share=0", 64, 4, 1);
        fill(r.logits, 64 * 4, 9);
        for (int32_t t = 0; t < 64; t++)
            r.logits[4 * t] += 3;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        count(&r.routes, 4, load);
        assert_true(share ? load[0] < 38 : load[0] > 40);
        run_close(&r);
    }
}

/* ---- numbers of experts that differ ---- */

static void positive_logits(void **state)
{
    (void)state;
    const float logits[12] = { 1, -1, 2, 0, -1, -2, -3, -4, 3, 3, 3, 3 };
    struct run r;
    run_open(&r, "relu-router", NULL, 3, 4, 2);
    memcpy(r.logits, logits, sizeof logits);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_true(experts_of(&r, 0) == 2 && experts_of(&r, 1) == 0 && experts_of(&r, 2) == 4);
    assert_true(r.routes.expert[0] == 0 && r.routes.expert[1] == 2 && r.routes.weight[1] == 2);
    run_close(&r);
    run_open(&r, "relu-router", "norm=rms shift=-1", 1, 4, 2);
    memcpy(r.logits, logits, 4 * sizeof *logits);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n, 3); /* 2 0 3 1 */
    assert_true(fabsf(weight_of(&r.routes, 0, 2) - 3 / sqrtf(3.5f)) < 1e-5f);
    run_close(&r);
}

/* Two experts of probability .4 and .1, two free ones of .25 each. */
static void free_experts(void **state)
{
    (void)state;
    struct run r;
    run_open(&r, "zero-compute-experts", "free=2 top_k=2 rule=null free_logit=-1.3862944", 1, 2, 2);
    r.logits[0] = logf(0.4f);
    r.logits[1] = logf(0.1f);
    assert_int_equal(r.batch.n_free, 2);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_true(r.routes.n_free == 2 && r.routes.expert[0] == 0 && r.routes.weight[0] == 1);
    assert_true(r.routes.expert[1] == 2 && r.routes.weight[1] == 0);
    run_close(&r);
    const float before[2] = { 0, 2 };
    run_open(&r, "zero-compute-experts", "free=1 top_k=2 rule=moe++ free_logit=0 residual=0.5", 1, 2, 2);
    r.logits[0] = -1;
    r.logits[1] = -0.5f;
    r.batch.previous_logits = before; /* -1, .5 and 0 */
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_true(r.routes.expert[0] == 1 && r.routes.expert[1] == 2);
    const double sum = exp(-1) + exp(0.5) + 1;
    assert_true(fabs((double)r.routes.weight[0] - exp(0.5) / sum) < 1e-6);
    assert_true(fabs((double)r.routes.weight[1] - 1 / sum) < 1e-6);
    run_close(&r);
    run_open(&r, "zero-compute-experts", "free=2 top_k=2 free_logit=9", 1, 2, 2); /* none but null ones */
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_true(r.routes.expert[0] == 2 && r.routes.expert[1] == 3 && r.routes.weight[0] == 0 &&
                r.routes.weight[1] == 0);
    run_close(&r);
    /* A balancer's bias reaches free experts, too. */
    float add[4] = { 0, 0, 0, 5 }, scale[4] = { 1, 1, 1, 1 };
    run_open(&r, "zero-compute-experts", "free=2 top_k=1 free_logit=-9", 1, 2, 1);
    assert_int_equal(run_route(&r, &(struct moe_bias){ add, scale }), MOE_OK);
    assert_int_equal(r.routes.expert[0], 3);
    run_close(&r);
}

/* ---- what they refuse ---- */

static void bad_parameters(void **state)
{
    (void)state;
    refuses("group-limited-top-k", "groups=3", 8, 2, "layer 0: groups = 3 does not divide 8 experts");
    refuses("group-limited-top-k", "groups=4 top_groups=1", 8, 3,
            "layer 0: top_k = 3, but top_groups = 1 groups have 2 experts");
    refuses("group-limited-top-k", "groups=4 top_groups=2 best_of_group=3", 8, 3,
            "layer 0: best_of_group = 3 of 2 experts in a group");
    refuses("group-limited-top-k", "top_k=9", 8, 3, "layer 0: top_k = 9, but top_groups = 1 groups have 8 experts");
    refuses("hash-router", NULL, 8, 2, "the workload has no token ids");
    refuses("hash-router", "by=position", 8, 2, "the workload has no positions");
    refuses("random-router", "top_k=9", 8, 2, "layer 0: top_k = 9 of 8 experts");
    refuses("random-gate", "top_k=9", 8, 2, "layer 0: top_k = 9 of 8 experts");
    refuses("bilevel-router", "groups=3", 8, 2, "layer 0: groups = 3 does not divide 8 experts");
    refuses("bilevel-router", "top_k=9", 8, 2, "layer 0: top_k = 9 of 8 experts");
    refuses("sinkhorn-router", "top_k=9", 8, 2, "layer 0: top_k = 9 of 8 experts");
    refuses("zero-compute-experts", "top_k=20", 8, 2, "layer 0: top_k = 20 of 8 experts and 4 free ones");
    refuses("expert-choice", "per=request", 8, 2, "per = request: the workload does not say whose tokens are whose");
}

static void bad_settings(void **state)
{
    (void)state;
    static const struct {
        const char *router, *settings, *why;
    } cases[] = {
        { "group-limited-top-k", "groups=2 top_groups=3", "top_groups = 3 of groups = 2" },
        { "hash-router", "by=balanced", "by = balanced: frequency is missing, a .npy of [V] counts of token ids" },
        { "hash-router", "by=table", "by = table: table is missing, a .npy of [P][E] preferences" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct policy_shape shape = { 1, 8, 2, 1, 1, 0, 1 };
        struct policy_host host;
        struct policy policy;
        policy_host_open(&host, &shape);
        assert_int_equal(policy_start(&policy, &host, test_plugin("router", cases[i].router), cases[i].settings),
                         MOE_EINVAL);
        assert_string_equal(host.failure, cases[i].why);
        policy_stop(&policy);
        policy_host_close(&host);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(megatron_top_k),
        cmocka_unit_test(megatron_sinkhorn),
        cmocka_unit_test(fairseq_auction),
        cmocka_unit_test(auction_balances),
        cmocka_unit_test(experts_choose),
        cmocka_unit_test(choice_is_balanced),
        cmocka_unit_test(capped_choice),
        cmocka_unit_test(top_p_takes_what_it_takes),
        cmocka_unit_test(hashes),
        cmocka_unit_test(balanced_hash_is_balanced),
        cmocka_unit_test(table_over_positions),
        cmocka_unit_test(random_experts),
        cmocka_unit_test(slices_score_themselves),
        cmocka_unit_test(gate_that_was_drawn),
        cmocka_unit_test(groups_first),
        cmocka_unit_test(selective_sinkhorn),
        cmocka_unit_test(positive_logits),
        cmocka_unit_test(free_experts),
        cmocka_unit_test(bad_parameters),
        cmocka_unit_test(bad_settings),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
