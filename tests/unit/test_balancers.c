/* SPDX-License-Identifier: Apache-2.0
 * test_balancers.c - biases, prices, plans and rewrites against Megatron-LM's and LeastLoadedEP's outputs, published
 * counts, exact solutions and hand-made cases. */
#include "policy_test.h"

struct run {
    struct policy_host host;
    struct policy policy;
    struct moe_cost own;
};

static void run_open(struct run *r, const char *balancer, const char *settings, const struct policy_shape *shape)
{
    memset(r, 0, sizeof *r);
    policy_host_open(&r->host, shape);
    if (policy_start(&r->policy, &r->host, test_plugin("balancer", balancer), settings) != MOE_OK)
        fail_msg("%s: %s", balancer, r->host.failure);
}

static void run_close(struct run *r)
{
    policy_stop(&r->policy);
    policy_host_close(&r->host);
}

static const struct moe_balancer_ops *ops_of(const struct run *r)
{
    return &r->policy.plugin->ops.balancer;
}

static float uniform(int64_t i)
{
    const struct moe_env env = { .seed = 21 };
    return (float)moe_unit(moe_rand(&env, 0, 0, 0, i));
}

/* One expert after the other on devices, as many each. */
static void place_contiguous(struct run *r, struct policy_placement *p, int32_t n_experts, int32_t n_devices)
{
    policy_placement_init(p);
    for (int32_t e = 0; e < n_experts; e++)
        r->host.host.place(&r->host.env, &p->view, 0, e, e / (n_experts / n_devices), 1);
    policy_placement_seal(p, &r->host.model);
}

/* ---- loss-free-bias ---- */

static void observe_and_read(struct run *r, const int64_t *load, int32_t n, float *add, float *scale)
{
    const struct moe_batch batch = { .n_experts = n };
    assert_int_equal(ops_of(r)->observe(r->policy.state, 0, load), MOE_OK);
    for (int32_t e = 0; e < n; e++) {
        add[e] = 0;
        scale[e] = 1;
    }
    assert_int_equal(ops_of(r)->adjust(r->policy.state, &batch, NULL, &(struct moe_bias){ add, scale }, &r->own),
                     MOE_OK);
}

/* The bias that Megatron has before is of no matter: its change is compared. */
static void megatron_bias(void **state)
{
    (void)state;
    json_t *all = test_shared("oracles/megatron_router.json"), *c;
    size_t i, n_cases = 0;
    json_array_foreach(json_object_get(json_object_get(all, "cases"), "expert_bias"), i, c)
    {
        const json_t *tokens = json_object_get(c, "tokens");
        const int32_t n = (int32_t)json_array_size(tokens);
        int64_t load[64];
        float add[64], scale[64];
        char settings[40];
        struct run r;
        snprintf(settings, sizeof settings, "rate=%g", json_number_value(json_object_get(c, "rate")));
        run_open(&r, "loss-free-bias", settings, &(struct policy_shape){ 1, n, 2, 1, 1, 0, 1 });
        for (int32_t e = 0; e < n; e++)
            load[e] = (int64_t)test_at(tokens, e);
        observe_and_read(&r, load, n, add, scale);
        for (int32_t e = 0; e < n; e++) {
            const double change = test_at(json_object_get(c, "updated"), e) - test_at(json_object_get(c, "bias"), e);
            assert_true(fabs(change - (double)add[e]) < 1e-6 && scale[e] == 1);
        }
        run_close(&r);
        n_cases++;
    }
    assert_int_equal(n_cases, 2);
    json_decref(all);
}

static void variants_of_bias(void **state)
{
    (void)state;
    static const int64_t load[4] = { 7, 1, 4, 4 }; /* errors -3 3 0 0 */
    static const struct {
        const char *settings;
        float add[2], scale[2];
    } cases[] = {
        { "rate=0.01", { -0.02f, 0.02f }, { 1, 1 } },
        { "rate=0.01 update=error", { -0.06f, 0.06f }, { 1, 1 } },
        { "rate=0.01 form=scale", { 0, 0 }, { 0.98f, 1.02f } },
        { "rate=0.01 decay=sqrt", { -0.01f - 0.01f / 1.41421356f, 0.01f + 0.01f / 1.41421356f }, { 1, 1 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct run r;
        float add[4], scale[4];
        run_open(&r, "loss-free-bias", cases[i].settings, &(struct policy_shape){ 1, 4, 2, 1, 1, 0, 1 });
        observe_and_read(&r, load, 4, add, scale);
        observe_and_read(&r, load, 4, add, scale);
        for (int e = 0; e < 2; e++)
            assert_true(fabsf(add[e] - cases[i].add[e]) < 1e-6f && fabsf(scale[e] - cases[i].scale[e]) < 1e-6f);
        assert_true(add[2] == 0 && scale[2] == 1);
        run_close(&r);
    }
}

/* ---- bip-balancer ---- */

enum { T = 512, E = 16, K = 2 };

static void adjust(struct run *r, const float *scores, int32_t n_tokens, int32_t n, int32_t k, float *add)
{
    float scale[64];
    const struct moe_batch batch = { .n_tokens = n_tokens, .n_experts = n, .top_k = k };
    for (int32_t e = 0; e < n; e++) {
        add[e] = 0;
        scale[e] = 1;
    }
    assert_int_equal(ops_of(r)->adjust(r->policy.state, &batch, scores, &(struct moe_bias){ add, scale }, &r->own),
                     MOE_OK);
    policy_host_end_hook(&r->host);
}

static double max_vio(const float *scores, const float *add, int32_t n_tokens, int32_t n, int32_t k)
{
    int32_t load[64] = { 0 }, most = 0, chosen[8];
    float row[64];
    for (int32_t t = 0; t < n_tokens; t++) {
        for (int32_t e = 0; e < n; e++)
            row[e] = scores[t * n + e] + add[e];
        moe_top_k(row, n, k, chosen);
        for (int32_t i = 0; i < k; i++)
            load[chosen[i]]++;
    }
    for (int32_t e = 0; e < n; e++)
        most = load[e] > most ? load[e] : most;
    return (double)most * n / ((double)n_tokens * k) - 1;
}

/* The dual's value at prices q, with the best p for them. */
static double dual(const float *scores, const float *add, int32_t n_tokens, int32_t n, int32_t k)
{
    double value = 0;
    for (int32_t e = 0; e < n; e++)
        value += (double)n_tokens * k / n * -(double)add[e];
    for (int32_t t = 0; t < n_tokens; t++) {
        float row[64];
        int32_t order[64];
        for (int32_t e = 0; e < n; e++)
            row[e] = scores[t * n + e] + add[e];
        moe_top_k(row, n, k, order);
        for (int32_t i = 0; i < k; i++)
            value += fmax(0, (double)row[order[i]]);
    }
    return value;
}

/* Two experts that everybody prefers: balanced from the first batch on, and the dual falls with every round. */
static void prices_balance_at_once(void **state)
{
    (void)state;
    static float scores[T * E];
    float add[E], none[E] = { 0 };
    for (int32_t i = 0; i < T * E; i++)
        scores[i] = uniform(i) * 0.5f + (i % E < 2 ? 0.4f : 0);
    const double before = max_vio(scores, none, T, E, K);
    double last = dual(scores, none, T, E, K);
    assert_true(before > 3);
    for (int rounds = 1; rounds <= 16; rounds *= 2) {
        char settings[40];
        struct run r;
        snprintf(settings, sizeof settings, "rounds=%d", rounds);
        run_open(&r, "bip-balancer", settings, &(struct policy_shape){ 1, E, K, 1, 1, 0, 1 });
        adjust(&r, scores, T, E, K, add);
        const double now = dual(scores, add, T, E, K);
        assert_true(now <= last * (1 + 1e-6));
        last = now;
        run_close(&r);
        for (int32_t e = 0; e < E; e++)
            assert_true(add[e] <= 0);
    }
    assert_true(max_vio(scores, add, T, E, K) < 0.2);
}

/* Four tokens, two experts, one each, two per expert: the best assignment by looking at all, and the dual above it. */
static void prices_against_the_optimum(void **state)
{
    (void)state;
    for (int trial = 0; trial < 50; trial++) {
        float scores[8], add[2];
        double best = 0;
        struct run r;
        for (int i = 0; i < 8; i++)
            scores[i] = uniform(1000 + 8 * trial + i);
        for (unsigned to = 0; to < 16; to++)
            if (__builtin_popcount(to) == 2) {
                double sum = 0;
                for (int t = 0; t < 4; t++)
                    sum += (double)scores[2 * t + (int)(to >> t & 1)];
                best = fmax(best, sum);
            }
        run_open(&r, "bip-balancer", "rounds=50", &(struct policy_shape){ 1, 2, 1, 1, 1, 0, 1 });
        adjust(&r, scores, 4, 2, 1, add);
        const double bound = dual(scores, add, 4, 2, 1);
        assert_true(bound >= best - 1e-5 && bound <= best + 0.5);
        run_close(&r);
    }
}

/* ---- llep ---- */

static struct moe_plan *plan_of(struct run *r, const struct policy_placement *p, const int64_t *load, int32_t room)
{
    static struct moe_plan plan;
    free(plan.split);
    free(plan.move);
    plan = (struct moe_plan){ .max_splits = room, .max_moves = room };
    plan.split = calloc((size_t)room, sizeof *plan.split);
    plan.move = calloc((size_t)room, sizeof *plan.move);
    assert_int_equal(ops_of(r)->plan(r->policy.state, 0, load, &p->view, &plan, &r->own), MOE_OK);
    policy_host_end_hook(&r->host);
    return &plan;
}

static void device_loads(const struct moe_plan *plan, const int64_t *load, int32_t n_experts, int32_t n_devices,
                         int64_t *on)
{
    memset(on, 0, (size_t)n_devices * sizeof *on);
    for (int32_t e = 0; e < n_experts; e++)
        on[e / (n_experts / n_devices)] += load[e];
    for (int32_t i = 0; i < plan->n_splits; i++) {
        const struct moe_split *s = &plan->split[i];
        on[s->expert / (n_experts / n_devices)] -= s->to - s->from;
        on[s->device] += s->to - s->from;
    }
}

/* Plans are identical: every expert's rows on every device. */
static void published_plans(void **state)
{
    (void)state;
    json_t *all = test_shared("oracles/llep.json"), *c;
    size_t i, n_cases = 0;
    json_array_foreach(json_object_get(all, "cases"), i, c)
    {
        const json_t *counts = json_object_get(c, "counts"), *spans, *span;
        const int32_t n = (int32_t)json_array_size(counts), devices = test_int(c, "ep_size");
        int64_t load[256], *rows = calloc((size_t)(n * devices), sizeof *rows);
        char settings[100];
        const char *expert;
        size_t at;
        struct run r;
        struct policy_placement p;
        snprintf(settings, sizeof settings, "lambda=0 alpha=%g min_rows=%d",
                 json_number_value(json_object_get(c, "max_tokens_factor")), test_int(c, "min_tokens_per_gemm"));
        run_open(&r, "llep", settings, &(struct policy_shape){ 1, n, 1, devices, 1, 0, 1 });
        place_contiguous(&r, &p, n, devices);
        for (int32_t e = 0; e < n; e++)
            load[e] = (int64_t)test_at(counts, e);
        const struct moe_plan *plan = plan_of(&r, &p, load, n * devices);
        for (int32_t e = 0; e < n; e++)
            rows[e * devices + e / (n / devices)] = load[e];
        for (int32_t s = 0; s < plan->n_splits; s++) {
            const struct moe_split *x = &plan->split[s];
            rows[x->expert * devices + x->expert / (n / devices)] -= x->to - x->from;
            rows[x->expert * devices + x->device] += x->to - x->from;
        }
        json_object_foreach((json_t *)(uintptr_t)json_object_get(c, "plan"), expert, spans)
            json_array_foreach(spans, at, span) rows[strtol(expert, NULL, 10) * devices + (int32_t)test_at(span, 0)] -=
            (int64_t)(test_at(span, 2) - test_at(span, 1));
        for (int32_t x = 0; x < n * devices; x++)
            if (rows[x] != 0)
                fail_msg("case %zu: expert %d, device %d: %lld rows apart", i, x / devices, x % devices,
                         (long long)rows[x]);
        free(rows);
        policy_placement_free(&p);
        run_close(&r);
        n_cases++;
    }
    assert_int_equal(n_cases, 12);
    json_decref(all);
}

/* The paper's loads as whole numbers: a share f of P B K slots on h hot experts, what is over one each from the first.
 */
static void hot_loads(int32_t n, int32_t h, double f, int64_t slots, int64_t *load)
{
    const int64_t hot = (int64_t)(f * (double)slots), cold = slots - hot;
    for (int32_t e = 0; e < n; e++)
        load[e] = e < h ? hot / h + (e < hot % h) : cold / (n - h) + (e - h < cold % (n - h));
}

/* Expert transfers, and no device above the mean: 24 published counts. */
static void published_transfers(void **state)
{
    (void)state;
    static const struct {
        int32_t n, k, h;
        int count[4];
    } rows[] = {
        { 128, 4, 1, { 7, 7, 7, 7 } },      { 256, 8, 1, { 7, 7, 7, 7 } },      { 384, 8, 1, { 7, 7, 7, 7 } },
        { 128, 4, 16, { 16, 18, 20, 20 } }, { 256, 8, 16, { 18, 20, 20, 20 } }, { 384, 8, 16, { 19, 20, 20, 20 } },
    };
    static const double share[4] = { 0.3, 0.5, 0.8, 0.95 };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int f = 0; f < 4; f++) {
            const int32_t n = rows[i].n;
            const int64_t slots = INT64_C(8) * 32768 * rows[i].k;
            int64_t load[384], on[8];
            struct run r;
            struct policy_placement p;
            run_open(&r, "llep", NULL, &(struct policy_shape){ 1, n, 1, 8, 1, 0, 1 });
            place_contiguous(&r, &p, n, 8);
            hot_loads(n, rows[i].h, share[f], slots, load);
            const struct moe_plan *plan = plan_of(&r, &p, load, n * 8);
            assert_int_equal(plan->n_moves, rows[i].count[f]);
            device_loads(plan, load, n, 8, on);
            for (int d = 0; d < 8; d++)
                assert_int_equal(on[d], slots / 8);
            policy_placement_free(&p);
            run_close(&r);
        }
}

static void balanced_loads_stay(void **state)
{
    (void)state;
    static const int64_t load[8] = { 100, 110, 90, 100, 100, 100, 120, 80 };
    struct run r;
    struct policy_placement p;
    run_open(&r, "llep", "min_rows=1", &(struct policy_shape){ 1, 8, 1, 4, 1, 0, 1 });
    place_contiguous(&r, &p, 8, 4);
    assert_int_equal(plan_of(&r, &p, load, 32)->n_splits, 0); /* 1.2 < 1.3 */
    policy_placement_free(&p);
    run_close(&r);
    run_open(&r, "llep", "min_rows=1 lambda=1.1", &(struct policy_shape){ 1, 8, 1, 4, 1, 0, 1 });
    place_contiguous(&r, &p, 8, 4);
    const struct moe_plan *plan = plan_of(&r, &p, load, 32);
    assert_true(plan->n_splits == 1 && plan->n_moves == 1); /* device 0 has 210 of 200, device 1 190 */
    assert_true(plan->split[0].device == 1 && plan->split[0].to - plan->split[0].from == 10);
    policy_placement_free(&p);
    run_close(&r);
}

/* ---- rewrites ---- */

static const float *gate; /* [T][E] */

static void routes_of_top(struct moe_routes *r, const float *scores, int32_t n_tokens, int32_t n, int32_t k)
{
    policy_routes_init(r, n_tokens);
    for (int32_t t = 0; t < n_tokens; t++) {
        int32_t chosen[8];
        moe_top_k(scores + (int64_t)t * n, n, k, chosen);
        for (int32_t i = 0; i < k; i++)
            policy_routes_push(r, t, chosen[i], scores[(int64_t)t * n + chosen[i]]);
    }
    gate = scores;
}

static float weight_of(const struct moe_routes *r, int32_t token, int32_t expert)
{
    for (int64_t i = r->offset[token]; i < r->offset[token + 1]; i++)
        if (r->expert[i] == expert)
            return r->weight[i];
    return -1;
}

static void rewrite(const char *balancer, const char *settings, int32_t n, int32_t k, int32_t n_devices,
                    const int32_t *device, struct moe_routes *routes)
{
    struct run r;
    struct policy_placement p;
    const struct moe_batch batch = { .n_tokens = routes->n_tokens, .n_experts = n, .top_k = k, .device = device };
    run_open(&r, balancer, settings, &(struct policy_shape){ 1, n, k, n_devices, 1, 0, 1 });
    place_contiguous(&r, &p, n, n_devices);
    if (ops_of(&r)->rewrite(r.policy.state, &batch, gate, &p.view, routes, &r.own) != MOE_OK)
        fail_msg("%s: %s", balancer, r.host.failure);
    policy_placement_free(&p);
    run_close(&r);
}

/* Tokens 0 to 3 on device 0 and 4 to 7 on device 1; experts 0 and 1 on device 0. All want expert 0, by their number. */
static const int32_t half[8] = { 0, 0, 0, 0, 1, 1, 1, 1 };
static const float wants[8 * 4] = { 0.50f, 0.2f,  0.2f,  0.1f, 0.51f, 0.2f,  0.2f,  0.09f, 0.52f, 0.3f,  0.1f,
                                    0.08f, 0.53f, 0.1f,  0.3f, 0.07f, 0.54f, 0.2f,  0.2f,  0.06f, 0.55f, 0.3f,
                                    0.1f,  0.05f, 0.56f, 0.1f, 0.3f,  0.04f, 0.57f, 0.3f,  0.1f,  0.03f };

/* C = ceil(2 * 1 * 4 / 4) = 2 for each device's tokens. */
static void capacity_of_a_device(void **state)
{
    (void)state;
    static const struct {
        const char *settings;
        int32_t kept[4];
    } cases[] = {
        { "factor=2", { 2, 3, 6, 7 } },
        { "factor=2 drop=order", { 0, 1, 4, 5 } },
        { "factor=2 drop=reverse", { 2, 3, 6, 7 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_routes r;
        routes_of_top(&r, wants, 8, 4, 1);
        rewrite("capacity-aware", cases[i].settings, 4, 1, 2, half, &r);
        assert_int_equal(r.n, 4);
        for (int j = 0; j < 4; j++)
            assert_true(weight_of(&r, cases[i].kept[j], 0) > 0);
        policy_routes_free(&r);
    }
    struct moe_routes r; /* drawn: as many, and not always the same */
    routes_of_top(&r, wants, 8, 4, 1);
    rewrite("capacity-aware", "factor=2 drop=random", 4, 1, 2, half, &r);
    assert_int_equal(r.n, 4);
    policy_routes_free(&r);
    /* Both experts of device 0 together may have 2 C = 4 of each device's tokens. */
    routes_of_top(&r, wants, 8, 4, 1);
    rewrite("capacity-aware", "factor=2 level=device", 4, 1, 2, half, &r);
    assert_int_equal(r.n, 8);
    policy_routes_free(&r);
    routes_of_top(&r, wants, 8, 4, 1);
    rewrite("capacity-aware", "factor=1 level=device", 4, 1, 2, half, &r);
    assert_int_equal(r.n, 4);
    policy_routes_free(&r);
}

/* With expansion tokens of device 0 are offered expert 1, those of device 1 experts 2 and 3, 2 each at most. */
static void expanded_drop(void **state)
{
    (void)state;
    struct moe_routes r;
    routes_of_top(&r, wants, 8, 4, 1);
    rewrite("capacity-aware", "factor=2 expand=true", 4, 1, 2, half, &r);
    assert_int_equal(r.n, 4 + 2 + 4);
    assert_true(fabsf(weight_of(&r, 2, 1) - 0.3f) < 1e-6f); /* scores, as weights are */
    assert_true(weight_of(&r, 0, 1) > 0 && weight_of(&r, 1, 1) < 0 && weight_of(&r, 0, 2) < 0);
    assert_true(weight_of(&r, 6, 2) > 0 && weight_of(&r, 4, 2) > 0 && weight_of(&r, 4, 3) > 0);
    policy_routes_free(&r);
}

/* C = ceil(1 * 8 / 4) = 2: expert 0 keeps tokens 6 and 7, and the six others lose it. */
static void rectified(void **state)
{
    (void)state;
    struct moe_routes r;
    int32_t load[4] = { 0 };
    routes_of_top(&r, wants, 8, 4, 1);
    rewrite("rectify-router", "factor=1 fill=false", 4, 1, 2, half, &r);
    for (int64_t i = 0; i < r.n; i++)
        load[r.expert[i]]++;
    assert_true(load[0] == 2 && load[1] == 2 && load[2] == 2 && load[3] == 0); /* tokens 0, 1; then 4, 5: first come */
    assert_true(weight_of(&r, 0, 1) > 0 && weight_of(&r, 1, 1) > 0 && weight_of(&r, 4, 2) > 0 &&
                weight_of(&r, 5, 2) > 0);
    for (int32_t t = 0; t < 8; t++) /* nobody else travels */
        for (int32_t e = 1; e < 4; e++)
            assert_true(weight_of(&r, t, e) < 0 || e / 2 == half[t]);
    policy_routes_free(&r);
    routes_of_top(&r, wants, 8, 4, 1);
    rewrite("rectify-router", "factor=1 intra=false", 4, 1, 2, half, &r);
    assert_int_equal(r.n, 8);
    assert_true(weight_of(&r, 2, 1) > 0 && weight_of(&r, 5, 1) > 0); /* .3 .3 .3 of 2, 5, 7: the earlier */
    assert_true(weight_of(&r, 3, 2) > 0 && weight_of(&r, 6, 2) > 0);
    assert_true(weight_of(&r, 0, 3) > 0 && weight_of(&r, 1, 3) > 0);
    policy_routes_free(&r);
    routes_of_top(&r, wants, 8, 4, 1);
    rewrite("rectify-router", "factor=1 fill=false overfull=true", 4, 1, 2, half, &r);
    assert_int_equal(r.n, 8); /* nothing is lost */
    policy_routes_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(megatron_bias),          cmocka_unit_test(variants_of_bias),
        cmocka_unit_test(prices_balance_at_once), cmocka_unit_test(prices_against_the_optimum),
        cmocka_unit_test(published_plans),        cmocka_unit_test(published_transfers),
        cmocka_unit_test(balanced_loads_stay),    cmocka_unit_test(capacity_of_a_device),
        cmocka_unit_test(expanded_drop),          cmocka_unit_test(rectified),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
