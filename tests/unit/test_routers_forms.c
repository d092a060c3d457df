/* SPDX-License-Identifier: Apache-2.0
 * test_routers_forms.c - routers whose result is not k experts per token: mixes of tokens, merged experts, tokens that
 * leave a layer out. Against their definitions in plain loops. */
#include "router_field.h"

enum { N = 24, E = 5 };
static const int32_t requests[N] = {4, 9, 4, 2, 9, 4, 4, 2, 2, 9, 4, 4, 9, 2, 4, 9, 2, 4, 4, 9, 9, 2, 4, 4};

static void number_positions(int32_t *position)
{
    for (int32_t t = 0; t < N; t++) {
        position[t] = 0;
        for (int32_t u = 0; u < t; u++)
            position[t] += requests[u] == requests[t];
    }
}

/* Which of the routes of t is to this expert; the routers here list all. */
static int64_t at(const struct run *r, int32_t t, int32_t e)
{
    for (int64_t i = r->routes.offset[t]; i < r->routes.offset[t + 1]; i++)
        if (r->routes.expert[i] == e)
            return i;
    fail_msg("token %d: no expert %d", t, e);
    return 0;
}

/* ---- soft-moe ---- */

/* group[t]: tokens with equal numbers are mixed. The full reference: T S E loops over tokens, slots and experts. */
static void check_soft(struct run *r, const int32_t *group, bool same)
{
    const float *x = r->logits;
    assert_int_equal(r->routes.form, MOE_SLOTS);
    assert_int_equal(r->routes.n, N * E);
    int32_t expert_of[N * E], n_slots = 0;
    double in[N * E] = {0};
    memset(expert_of, 0xff, sizeof expert_of);
    for (int32_t t = 0; t < N; t++) {
        double whole = 0, out = 0;
        for (int32_t e = 0; e < E; e++)
            whole += exp((double)x[t * E + e]);
        for (int32_t e = 0; e < E; e++) {
            const int64_t i = at(r, t, e);
            const int32_t slot = r->routes.slot[i];
            double sum = 0;
            assert_true(slot >= 0 && slot < r->routes.n_slots);
            assert_true(expert_of[slot] < 0 || expert_of[slot] == e);
            n_slots += expert_of[slot] < 0;
            expert_of[slot] = e;
            for (int32_t u = 0; u < N; u++) {
                assert_int_equal(r->routes.slot[at(r, u, e)] == slot, group[u] == group[t]);
                sum += group[u] == group[t] ? exp((double)x[u * E + e]) : 0;
            }
            near_to((double)r->routes.weight[i], exp((double)x[t * E + e]) / sum);
            in[slot] += (double)r->routes.weight[i];
            if (same)
                assert_null(r->routes.combine);
            else
                near_to((double)r->routes.combine[i], exp((double)x[t * E + e]) / whole);
            out += same ? 1.0 / E : (double)r->routes.combine[i];
        }
        near_to(out, 1);
    }
    assert_int_equal(n_slots, r->routes.n_slots); /* none is empty */
    for (int32_t s = 0; s < n_slots; s++)
        near_to(in[s], 1);
}

static void soft(void **state)
{
    (void)state;
    int32_t position[N], group[N];
    struct run r;
    number_positions(position);
    run_open(&r, "soft-moe", NULL, N, E, 1);
    draw_logits(&r, N * E);
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    check_soft(&r, (int32_t[N]){0}, false); /* no requests: all are one */
    r.batch.request = requests;
    r.batch.position = position;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    check_soft(&r, requests, false);
    assert_int_equal(r.routes.n_slots, 3 * E);
    near_to(r.own.flops, 2 * 4 * N * E);
    r.batch.n_tokens = 0;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n_slots, 0);
    r.batch.n_tokens = N;
    r.logits[7] = NAN;
    refuse(&r, "token 1, expert 2");
    run_open(&r, "soft-moe", "size=4 combine=same", N, E, 1); /* four of a request, as they follow each other */
    draw_logits(&r, N * E);
    r.batch.request = requests;
    r.batch.position = position;
    for (int32_t t = 0; t < N; t++)
        group[t] = requests[t] * 100 + position[t] / 4;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    check_soft(&r, group, true);
    run_close(&r);
}

static void soft_across(void **state)
{
    (void)state;
    int32_t position[N], group[N];
    struct run r;
    number_positions(position);
    run_open(&r, "soft-moe", "group=position size=2 combine=same", N, E, 1);
    draw_logits(&r, N * E);
    r.batch.request = requests;
    r.batch.position = position;
    for (int32_t t = 0; t < N; t++) { /* the order of requests 2, 4, 9 in twos */
        int32_t before = 0;
        for (int32_t u = 0; u < N; u++)
            before += position[u] == position[t] && requests[u] < requests[t];
        group[t] = position[t] * 2 + before / 2;
    }
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    check_soft(&r, group, true);
    r.batch.request = NULL;
    refuse(&r, "group = position: the workload has no requests of tokens");
    run_open(&r, "soft-moe", "group=position", N, E, 1);
    refuse(&r, "group = position: the workload has no positions of tokens");
}

/* ---- soft-merge ---- */

static void merged(void **state)
{
    (void)state;
    struct run r;
    float alone[E];
    run_open(&r, "soft-merge", NULL, N, E, 1);
    r.host.model.d_model = 10;
    draw_logits(&r, N * E);
    r.batch.request = requests;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.form, MOE_MERGED);
    assert_int_equal(r.routes.n_slots, 3);
    near_to(r.own.flops, N * 10 + 3 * (2 * 10 * E + 4 * E));
    for (int32_t t = 0; t < N; t++) {
        double mean[E] = {0}, sum = 0;
        int32_t n = 0;
        for (int32_t u = 0; u < N; u++) {
            assert_int_equal(r.routes.slot[at(&r, t, 0)] == r.routes.slot[at(&r, u, 0)], requests[t] == requests[u]);
            n += requests[u] == requests[t];
            for (int32_t e = 0; e < E; e++)
                mean[e] += requests[u] == requests[t] ? (double)r.logits[u * E + e] : 0;
        }
        for (int32_t e = 0; e < E; e++)
            sum += exp(mean[e] / n);
        for (int32_t e = 0; e < E; e++) {
            near_to((double)r.routes.weight[at(&r, t, e)], exp(mean[e] / n) / sum);
            assert_int_equal(r.routes.slot[at(&r, t, e)], r.routes.slot[at(&r, t, 0)]);
        }
    }
    for (int32_t e = 0; e < E; e++)
        alone[e] = r.routes.weight[at(&r, 0, e)];
    for (int32_t t = 0, n = 0; t < N; t++) /* request 4 by itself: its first tokens move up */
        if (requests[t] == 4) {
            memmove(r.logits + (int64_t)n++ * E, r.logits + (int64_t)t * E, E * sizeof *r.logits);
            r.batch.n_tokens = n;
        }
    r.batch.request = NULL;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n_slots, 1);
    for (int32_t e = 0; e < E; e++)
        near_to((double)r.routes.weight[at(&r, 0, e)], (double)alone[e]);
    r.logits[E] = INFINITY;
    refuse(&r, "token 1, expert 0");
}

static void merged_by_label(void **state)
{
    (void)state;
    static const float table[2][3] = {{0, 1, 2}, {5, 5, 5}};
    const struct moe_tensor tensor = {2, {2, 3}, table[0]};
    int32_t label[3] = {1, 0, 1};
    const double sum = 1 + exp(1) + exp(2);
    struct run r;
    open_one(&r, "soft-merge", "table=#0", &tensor, 1, 3, 3, 1);
    r.batch.label = label;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_int_equal(r.routes.n_slots, 2);
    for (int32_t e = 0; e < 3; e++) {
        near_to((double)r.routes.weight[at(&r, 0, e)], 1.0 / 3);
        near_to((double)r.routes.weight[at(&r, 1, e)], exp(e) / sum);
    }
    assert_int_equal(r.routes.slot[at(&r, 2, 0)], r.routes.slot[at(&r, 0, 0)]);
    label[1] = 2;
    refuse(&r, "token 1: label 2, but table has 2 labels");
    open_one(&r, "soft-merge", "table=#0", &tensor, 1, 3, 3, 1);
    refuse(&r, "no labels");
    const float bad[2][3] = {{0, 1, 2}, {5, NAN, 5}};
    refuse_open("soft-merge", "table=#0", &(struct moe_tensor){2, {2, 3}, bad[0]}, 1, "label 1, expert 1: found nan");
}

/* ---- mixture-of-depths ---- */

/* Those who stay are the first of their request in the order of scores, share of them in number. */
static void check_depth(const struct run *r, const double *score, double share, int halves)
{
    assert_non_null(r->routes.skip);
    for (int32_t t = 0; t < N; t++) {
        int32_t n = 0, before = 0;
        for (int32_t u = 0; u < N; u++) {
            n += requests[u] == requests[t];
            before += requests[u] == requests[t] &&
                      (score[u] > score[t] || (u < t && score[u] >= score[t] && score[u] <= score[t]));
        }
        const bool stays = before < share * n;
        assert_int_equal(r->routes.skip[t], stays ? 0 : halves);
        assert_int_equal(r->routes.offset[t + 1] - r->routes.offset[t], stays || halves == MOE_HALF_ATTENTION ? 2 : 0);
        if (r->routes.offset[t + 1] > r->routes.offset[t]) { /* top-k as ever */
            int32_t best[2];
            moe_top_k(r->logits + t * E, E, 2, best);
            goes_to(r, t, 2, best);
        }
    }
}

static void depths(void **state)
{
    static const char *const half[] = {"halves=both", "halves=attention", "halves=experts"};
    static const int bits[] = {MOE_HALF_ATTENTION | MOE_HALF_EXPERTS, MOE_HALF_ATTENTION, MOE_HALF_EXPERTS};
    (void)state;
    float importance[N];
    double score[N];
    const struct moe_env env = {.seed = 8};
    for (int32_t t = 0; t < N; t++)
        score[t] = (double)(importance[t] = (float)(moe_rand(&env, 0, 0, 0, t) % 6)); /* equals among them */
    for (int i = 0; i < 3; i++) {
        char settings[100];
        struct run r;
        snprintf(settings, sizeof settings, "every=1 share=0.4 top_k=2 %s", half[i]);
        run_open(&r, "mixture-of-depths", settings, N, E, 1);
        draw_logits(&r, N * E);
        r.batch.request = requests;
        r.batch.importance = importance;
        assert_int_equal(run_route(&r, NULL), MOE_OK);
        check_depth(&r, score, 0.4, bits[i]);
        run_close(&r);
    }
}

static void depths_learned(void **state)
{
    (void)state;
    enum { H = 3 };
    const float gate[2][H] = {{9, 9, 9}, {1, -2, 0.5f}}, shares[2] = {1, 0.25f}, wrong[2] = {1, 0};
    const struct moe_tensor tensor[2] = {{2, {2, H}, gate[0]}, {1, {2}, shares}};
    float hidden[N * H];
    double score[N];
    const struct moe_env env = {.seed = 9};
    struct run r;
    for (int32_t i = 0; i < N * H; i++)
        hidden[i] = (float)(moe_unit(moe_rand(&env, 0, 0, 0, i)) - 0.5);
    for (int32_t t = 0; t < N; t++) {
        const float *x = hidden + t * H;
        score[t] = (double)x[0] - 2 * (double)x[1] + 0.5 * (double)x[2];
    }
    open_one(&r, "mixture-of-depths", "gate=#0 shares=#1 top_k=2", tensor, 2, N, E, 2);
    draw_logits(&r, N * E);
    r.batch.request = requests;
    r.batch.hidden = hidden;
    r.batch.n_hidden = H;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    assert_null(r.routes.skip); /* layer 0 of every = 2 */
    assert_int_equal(r.routes.n, 2 * N);
    r.batch.layer = 1;
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    check_depth(&r, score, 0.25, 3);
    near_to(r.own.flops, 4.0 * N * E + 2 * H * N);
    r.batch.n_hidden = 2;
    refuse(&r, "made for 3 numbers per hidden state, this workload gives 2");
    open_one(&r, "mixture-of-depths", "gate=#0 choice=threshold threshold=0.55", tensor, 1, N, E, 2);
    draw_logits(&r, N * E);
    r.batch = (struct moe_batch){.n_tokens = N, .n_experts = E, .top_k = 2, .router_logits = r.logits, .layer = 1,
                                 .hidden = hidden, .n_hidden = H};
    assert_int_equal(run_route(&r, NULL), MOE_OK);
    int32_t n_out = 0;
    for (int32_t t = 0; t < N; t++) {
        assert_int_equal(r.routes.skip[t] == 0, 1 / (1 + exp(-score[t])) > 0.55);
        n_out += r.routes.skip[t] != 0;
    }
    assert_true(n_out > 0 && n_out < N);
    hidden[4] = NAN;
    refuse(&r, "token 1: score of depth is nan");
    refuse_open("mixture-of-depths", "shares=#0", &(struct moe_tensor){1, {2}, wrong}, 1, "layer 1 has 0");
    run_open(&r, "mixture-of-depths", "every=1", N, E, 1);
    refuse(&r, "no importance of tokens, and there is no gate");
    run_open(&r, "mixture-of-depths", "top_k=6", N, E, 1);
    refuse(&r, "top_k = 6 of 5");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(soft), cmocka_unit_test(soft_across), cmocka_unit_test(merged),
        cmocka_unit_test(merged_by_label), cmocka_unit_test(depths), cmocka_unit_test(depths_learned),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
