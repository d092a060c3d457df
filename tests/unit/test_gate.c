/* SPDX-License-Identifier: Apache-2.0
 * test_gate.c - a gate that is trained: products, derivatives against finite differences, the mixture, the teacher. */
#include "core_test.h"
#include "products.h"

enum { TOKENS = 24, EXPERTS = 10, HIDDEN = 12, TOP_K = 3 };

static const struct moe_model gate_model = { .n_layers = 2, .n_experts = EXPERTS, .top_k = TOP_K, .d_model = HIDDEN,
                                             .d_expert = 4, .weight_bytes = 1, .act_bytes = 1, .combine_bytes = 1 };

static void start(struct gate *g, const struct moe_model *m, const char *settings, const struct trace *trace,
                  int32_t n_tokens, uint64_t seed)
{
    struct err e = { 0 };
    json_t *o = json_loads(settings, 0, NULL);
    test_ok(gate_open(g, o, trace, m, n_tokens, seed, "test:1", &e), &e);
    json_decref(o);
}

/* ---- products ---- */

static float some(uint64_t i)
{
    return gate_normal(gate_bits(7, (int64_t)i));
}

static void products_are_sums(void **state)
{
    (void)state;
    static const int64_t size[][3] = { { 1, 1, 1 }, { 4, 8, 8 }, { 5, 3, 9 }, { 70, 13, 17 }, { 130, 6, 24 } };
    for (size_t c = 0; c < sizeof size / sizeof *size; c++) {
        const int64_t m = size[c][0], k = size[c][1], n = size[c][2];
        float a[130 * 24], b[130 * 24], first[24 * 24], sum[130 * 24], back[130 * 24], room[24 * 24];
        for (int64_t i = 0; i < 130 * 24; i++) {
            a[i] = some((uint64_t)i);
            b[i] = some((uint64_t)i + 5000);
            sum[i] = back[i] = some((uint64_t)i + 9000);
            first[i % (24 * 24)] = 1;
        }
        product_add(a, b, sum, m, k, n);
        product_add_first(a, b, first, m, k, n);
        product_add_second(a, b, back, m, k, n, room);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                double is = (double)some((uint64_t)(i * n + j) + 9000);
                for (int64_t p = 0; p < k; p++)
                    is += (double)a[i * k + p] * (double)b[p * n + j];
                assert_near((double)sum[i * n + j] + 100, is + 100, 1e-6);
            }
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < n; j++) {
                double is = 1;
                for (int64_t p = 0; p < m; p++)
                    is += (double)a[p * k + i] * (double)b[p * n + j];
                assert_near((double)first[i * n + j] + 100, is + 100, 1e-6);
            }
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < k; j++) {
                double is = (double)some((uint64_t)(i * k + j) + 9000);
                for (int64_t p = 0; p < n; p++)
                    is += (double)a[i * n + p] * (double)b[j * n + p];
                assert_near((double)back[i * k + j] + 100, is + 100, 1e-6);
            }
    }
}

/* ---- derivatives ---- */

/* The routes of a router whose weights follow a rule, to the experts that `chosen` names for every layer and token. */
struct routing_by { enum gate_rule rule; double factor; const int32_t *chosen; };

static void route(const struct gate *g, int32_t layer, const struct routing_by *by, struct moe_routes *r)
{
    struct err e = { 0 };
    int32_t room = 0;
    *r = (struct moe_routes){ 0 };
    test_ok(routes_begin(r, g->n_tokens, &room, &e), &e);
    test_ok(routes_reserve(r, (int64_t)g->n_tokens * TOP_K, &e), &e);
    for (int32_t t = 0; t < g->n_tokens; t++) {
        const float *x = g->logits + ((int64_t)layer * g->n_tokens + t) * EXPERTS;
        const int32_t *chosen = by->chosen + ((int64_t)layer * g->n_tokens + t) * TOP_K;
        double w[TOP_K], sum = 0, all = 0;
        for (int i = 0; i < EXPERTS; i++)
            all += exp((double)x[i]);
        for (int k = 0; k < TOP_K; k++) {
            const double l = (double)x[chosen[k]];
            w[k] = by->rule == RULE_SOFTMAX || by->rule == RULE_CHOSEN_SOFTMAX ? exp(l)
                   : by->rule == RULE_LOGIT ? fmax(l, 0) : 1 / (1 + exp(-l));
            sum += w[k];
        }
        const double over = by->rule == RULE_SOFTMAX ? all
                            : by->rule == RULE_CHOSEN_SOFTMAX || by->rule == RULE_CHOSEN_SIGMOID ? sum : 1;
        for (int k = 0; k < TOP_K; k++) {
            r->expert[t * TOP_K + k] = chosen[k];
            r->weight[t * TOP_K + k] = (float)(by->factor * w[k] / over);
        }
        r->offset[t + 1] = (t + 1) * TOP_K;
    }
    r->n = (int64_t)g->n_tokens * TOP_K;
}

/* A loss of a balancer's: the mean of squared logits of layer 1, which has to go back to all that made them. */
static double other_loss(struct gate *g)
{
    const int64_t n = (int64_t)g->n_tokens * EXPERTS;
    double sum = 0;
    for (int64_t i = n; i < 2 * n; i++) {
        sum += 0.5 * (double)g->logits[i] * (double)g->logits[i] / (double)n;
        g->d_logits[i] += g->logits[i] / (float)n;
    }
    return sum;
}

static double loss_of(struct gate *g, const struct routing_by *by)
{
    struct err e = { 0 };
    g->loss = 0;
    for (int32_t l = 0; l < g->n_layers; l++) {
        struct moe_routes r;
        gate_logits(g, l);
        route(g, l, by, &r);
        test_ok(gate_learn(g, l, &r, "router test", &e), &e);
        routes_free(&r);
    }
    return g->loss + other_loss(g);
}

static void forget_slopes(struct gate *g)
{
    for (int32_t i = 0; i < g->n_layers * GATE_TENSORS + N_SHARED_TENSORS; i++)
        if (g->tensor[i].n > 0)
            memset(g->tensor[i].slope, 0, sizeof(float) * (size_t)g->tensor[i].n);
}

/* Along a random direction of each tensor the loss grows as its derivatives say. */
static void derivatives_are_differences(void **state)
{
    (void)state;
    static const char *const kinds[] = { "linear", "cosine", "gru" };
    for (int kind = 0; kind < 3; kind++)
        for (enum gate_rule rule = 0; rule < N_GATE_RULES; rule++) {
            char settings[200];
            snprintf(settings, sizeof settings, "{\"gate\": \"%s\", \"width\": 6, \"clusters\": 5}", kinds[kind]);
            struct gate g;
            start(&g, &gate_model, settings, NULL, TOKENS, 3 + (uint64_t)rule);
            gate_draw(&g);
            for (int64_t i = 0; i < gate_of(&g, 0, EXPERT_TENSOR)->n; i++) { /* experts that say something */
                gate_of(&g, 0, EXPERT_TENSOR)->value[i] *= 5;
                gate_of(&g, 1, EXPERT_TENSOR)->value[i] *= 5;
            }
            int32_t chosen[2 * TOKENS * TOP_K];
            gate_logits(&g, 0);
            gate_logits(&g, 1);
            for (int t = 0; t < 2 * TOKENS; t++)
                moe_top_k(g.logits + t * EXPERTS, EXPERTS, TOP_K, chosen + t * TOP_K);
            const struct routing_by by = { rule, rule == RULE_LOGIT ? 1 : 1.5, chosen };
            loss_of(&g, &by);
            gate_back(&g);
            int n_seen = 0;
            for (int32_t i = 0; i < g.n_layers * GATE_TENSORS + N_SHARED_TENSORS; i++) {
                struct gate_tensor *t = &g.tensor[i];
                if (t->n == 0)
                    continue;
                float was[t->n], way[t->n];
                double slope = 0, length = 0;
                memcpy(was, t->value, sizeof was);
                for (int64_t j = 0; j < t->n; j++) { /* mostly along the slope, so that there is something to see */
                    way[j] = 0.3f * some((uint64_t)(j + 100 * i)) * (float)fabs((double)t->slope[j]) + t->slope[j];
                    length += (double)way[j] * (double)way[j];
                }
                if (length == 0) /* the state before the first layer is zero: only its first use has none */
                    continue;
                const double step = 4e-3 / sqrt(length);
                for (int64_t j = 0; j < t->n; j++)
                    slope += (double)t->slope[j] * (double)way[j];
                double at[2];
                float kept[t->n];
                memcpy(kept, t->slope, sizeof kept);
                for (int side = 0; side < 2; side++) {
                    for (int64_t j = 0; j < t->n; j++)
                        t->value[j] = was[j] + (float)((side ? step : -step) * (double)way[j]);
                    at[side] = loss_of(&g, &by);
                }
                memcpy(t->value, was, sizeof was);
                const double found = (at[1] - at[0]) / (2 * step);
                if (fabs(found - slope) > 0.02 * fabs(slope) + 2e-3 * sqrt(length))
                    fail_msg("%s, rule %d, tensor %d: derivative %g, difference %g", kinds[kind], (int)rule, i, slope,
                             found);
                n_seen++;
                forget_slopes(&g);
                loss_of(&g, &by);
                gate_back(&g);
            }
            assert_int_equal(n_seen, kind == 0 ? 4 : kind == 1 ? 8 : 10);
            gate_close(&g);
        }
}

/* A random gate's weights are nobody's: refused by name. */
static void other_weights_are_refused(void **state)
{
    (void)state;
    struct gate g;
    struct moe_routes r;
    struct err e = { 0 };
    int32_t chosen[2 * TOKENS * TOP_K];
    start(&g, &gate_model, "{}", NULL, TOKENS, 1);
    gate_draw(&g);
    gate_logits(&g, 0);
    for (int t = 0; t < TOKENS; t++)
        moe_top_k(g.logits + t * EXPERTS, EXPERTS, TOP_K, chosen + t * TOP_K);
    route(&g, 0, &(struct routing_by){ RULE_SOFTMAX, 1, chosen }, &r);
    for (int64_t i = 0; i < r.n; i++)
        r.weight[i] = 1 + 0.3f * some((uint64_t)i);
    assert_says(&e, gate_learn(&g, 0, &r, "router odd, step 0", &e), "router odd, step 0", "no function of the logits",
                NULL);
    memset(&e, 0, sizeof e);
    r.n_free = 2;
    assert_says(&e, gate_learn(&g, 0, &r, "router odd", &e), "experts that cost nothing", NULL);
    routes_free(&r);
    gate_close(&g);
}

/* ---- the mixture ---- */

static void tokens_follow_shares(void **state)
{
    (void)state;
    struct gate g;
    struct moe_model m = gate_model;
    m.n_layers = 1;
    start(&g, &m, "{\"clusters\": 7, \"drift\": 0, \"skew\": 1.2}", NULL, 4096, 9);
    int64_t n[7] = { 0 };
    double share[7], sum = 0, square = 0, target = 0;
    for (int s = 0; s < 20; s++) {
        gate_draw(&g);
        for (int32_t t = 0; t < g.n_tokens; t++)
            n[g.cluster[t]]++;
        for (int64_t i = 0; i < (int64_t)g.n_tokens * HIDDEN; i++)
            square += (double)g.x[i] * (double)g.x[i] / (20.0 * 4096);
        for (int64_t i = 0; i < (int64_t)g.n_tokens * g.conf->outputs; i++)
            target += (double)g.y[i] * (double)g.y[i] / (20.0 * 4096);
    }
    for (int c = 0; c < 7; c++)
        sum += share[c] = exp(1.2 * (double)g.share[c]);
    for (int c = 0; c < 7; c++) { /* six standard deviations */
        const double p = share[c] / sum, expected = p * 20 * 4096;
        assert_true(fabs((double)n[c] - expected) < 6 * sqrt(expected * (1 - p)));
    }
    assert_true(square > 0.5 && square < 2); /* one draw of a mean and 7 centres in 12 dimensions */
    assert_true(target > 0.3 && target < 3);
    gate_close(&g);
}

/* Popularity z after n steps correlates with what it was as (1 - drift^2)^(n/2). */
static void shares_drift(void **state)
{
    (void)state;
    enum { CLUSTERS = 4000, STEPS = 50 };
    struct gate g;
    struct moe_model m = gate_model;
    m.n_layers = 1;
    start(&g, &m, "{\"clusters\": 4000, \"drift\": 0.15}", NULL, 1, 5);
    gate_draw(&g);
    float was[CLUSTERS];
    memcpy(was, g.share, sizeof was);
    for (int s = 0; s < STEPS; s++)
        gate_draw(&g);
    double both = 0, a = 0, b = 0;
    for (int c = 0; c < CLUSTERS; c++) {
        both += (double)was[c] * (double)g.share[c];
        a += (double)was[c] * (double)was[c];
        b += (double)g.share[c] * (double)g.share[c];
    }
    assert_near(both / sqrt(a * b) + 1, pow(1 - 0.15 * 0.15, STEPS / 2.0) + 1, 0.04); /* 0.57; 1/sqrt(4000) is 0.016 */
    assert_near(b / CLUSTERS, 1, 0.1);
    gate_close(&g);
}

static void seeds_are_all(void **state)
{
    (void)state;
    struct gate a, b;
    start(&a, &gate_model, "{}", NULL, TOKENS, 4);
    start(&b, &gate_model, "{}", NULL, TOKENS, 4);
    const size_t bytes = sizeof(float) * 2 * TOKENS * EXPERTS;
    for (int s = 0; s < 3; s++) {
        gate_draw(&a);
        gate_logits(&a, 0);
        gate_logits(&a, 1);
    }
    for (int s = 0; s < 5; s++) {
        gate_draw(&b);
        gate_of(&b, 0, 0)->slope[0] = 1;
        gate_descend(&b);
    }
    gate_reset(&b, 4);
    for (int s = 0; s < 3; s++)
        gate_draw(&b);
    gate_logits(&b, 0);
    gate_logits(&b, 1);
    assert_memory_equal(a.logits, b.logits, bytes);
    gate_reset(&b, 5);
    for (int s = 0; s < 3; s++)
        gate_draw(&b);
    gate_logits(&b, 0);
    gate_logits(&b, 1);
    assert_true(memcmp(a.logits, b.logits, bytes) != 0);
    gate_close(&a);
    gate_close(&b);
}

/* ---- a trace ---- */

/* Hidden states are the trace's, of domains by shares; targets what recorded routes make of fixed experts. */
static void shipped_trace(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct trace t;
    char dir[600];
    snprintf(dir, sizeof dir, "%s/scenarios/traces/tiny-moe", getenv("top_srcdir") ? getenv("top_srcdir") : ".");
    test_ok(trace_open(&t, dir, &e), &e);
    const struct moe_model m = { .n_layers = 3, .n_experts = 16, .top_k = 2, .d_model = 128, .d_expert = 4,
                                 .weight_bytes = 1, .act_bytes = 1, .combine_bytes = 1 };
    struct gate g;
    start(&g, &m, "{\"noise\": 0, \"skew\": 0}", &t, 300, 2);
    gate_draw(&g);
    assert_int_equal(g.n_clusters, 7);
    int64_t n_pool = g.pool_first[7], n_found = 0;
    assert_int_equal(n_pool, 745);
    double square = 0;
    for (int64_t i = 0; i < n_pool * 3 * 8; i++)
        square += (double)g.pool_y[i] * (double)g.pool_y[i] / (double)(3 * n_pool);
    assert_near(square, 1, 1e-5);
    for (int32_t i = 0; i < 300; i++) { /* in layer 2, each token is one of its cluster's */
        const float *x = g.x + (2 * 300 + i) * 128;
        for (int64_t p = g.pool_first[g.cluster[i]]; p < g.pool_first[g.cluster[i] + 1]; p++)
            if (memcmp(x, g.pool_x + (p * 3 + 2) * 128, sizeof(float) * 128) == 0) {
                n_found++;
                assert_int_equal(npy_int(&t.domains, trace_request(&t, g.pool[p])), g.cluster[i]);
                break;
            }
    }
    assert_int_equal(n_found, 300);
    gate_close(&g);
    struct moe_model wide = m;
    wide.d_model = 64;
    json_t *none = json_object();
    assert_says(&e, gate_open(&g, none, &t, &wide, 10, 1, "test:1", &e), "width 128", "d_model 64", NULL);
    gate_close(&g);
    json_decref(none);
    trace_close(&t);
}

static void bad_settings(void **state)
{
    (void)state;
    static const struct { const char *settings, *says, *more; } bad[] = {
        { "{\"outputs\": 6}", "workload.outputs: 6", "multiple of 4" },
        { "{\"common\": 0.7, \"noise\": 0.4}", "workload.common", "1 at most" },
        { "{\"gate\": \"square\"}", "gate", "linear" },
        { "{\"learning_rat\": 1}", "learning_rat", "did you mean" },
        { "{\"drift\": 2}", "drift", "2" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct gate g;
        struct err e = { 0 };
        json_t *o = json_loads(bad[i].settings, 0, NULL);
        assert_says(&e, gate_open(&g, o, NULL, &gate_model, TOKENS, 1, "test:1", &e), "test:1", bad[i].says,
                    bad[i].more, NULL);
        gate_close(&g);
        json_decref(o);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_are_sums),     cmocka_unit_test(derivatives_are_differences),
        cmocka_unit_test(other_weights_are_refused), cmocka_unit_test(tokens_follow_shares),
        cmocka_unit_test(shares_drift),          cmocka_unit_test(seeds_are_all),
        cmocka_unit_test(shipped_trace),         cmocka_unit_test(bad_settings),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
