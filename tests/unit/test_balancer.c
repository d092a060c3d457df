/* SPDX-License-Identifier: Apache-2.0
 * test_balancer.c - balancer capacity against Megatron's outputs, Switch's formula and hand-made cases. */
#include "policy_test.h"

/* Runs capacity over `r` in place. device: [T] or NULL. */
static void trim(const char *settings, int32_t n_experts, int32_t n_devices, const int32_t *device,
                 struct moe_routes *r)
{
    struct policy_shape shape = {1, n_experts, 1, n_devices, 1, 0, 1};
    struct policy_host host;
    struct policy policy;
    const struct moe_plugin *capacity = test_plugin("balancer", "capacity");
    struct moe_batch batch = {.n_tokens = r->n_tokens, .n_experts = n_experts, .top_k = 1, .device = device};
    policy_host_open(&host, &shape);
    assert_int_equal(policy_start(&policy, &host, capacity, settings), MOE_OK);
    struct moe_cost own = {0, 0, 0};
    assert_int_equal(capacity->ops.balancer.rewrite(policy.state, &batch, NULL, NULL, r, &own), MOE_OK);
    policy_stop(&policy);
    policy_host_close(&host);
}

/* Routes from a [T][E] array of weights, 0 where there is none. */
static void routes_of(const json_t *dense, struct moe_routes *r)
{
    int32_t n_tokens = (int32_t)json_array_size(dense);
    policy_routes_init(r, n_tokens);
    for (int32_t t = 0; t < n_tokens; t++) {
        const json_t *row = json_array_get(dense, (size_t)t);
        for (int32_t e = 0; e < (int32_t)json_array_size(row); e++)
            if (test_at(row, e) > 0)
                policy_routes_push(r, t, e, (float)test_at(row, e));
    }
}

static void check_equal(const struct moe_routes *a, const struct moe_routes *b)
{
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->offset, b->offset, ((size_t)a->n_tokens + 1) * sizeof *a->offset);
    assert_memory_equal(a->expert, b->expert, (size_t)a->n * sizeof *a->expert);
    assert_memory_equal(a->weight, b->weight, (size_t)a->n * sizeof *a->weight);
}

static void count(const struct moe_routes *r, int64_t load[8])
{
    memset(load, 0, 8 * sizeof *load);
    for (int64_t i = 0; i < r->n; i++)
        load[r->expert[i]]++;
}

/* By score every route is Megatron's. By position its survivors are an accident of a top-k over equal values, so only
 * how many each expert keeps can agree. */
static void megatron_drops(void **state)
{
    (void)state;
    json_t *all = test_golden("router.json"), *c;
    size_t at, n = 0;
    json_array_foreach(json_object_get(all, "cases"), at, c) {
        struct moe_routes given, kept;
        int64_t ours[8], theirs[8];
        if (strcmp(test_text(c, "kind"), "drop") != 0)
            continue;
        bool by_score = strcmp(test_text(c, "policy"), "probs") == 0;
        routes_of(json_object_get(c, "probs"), &given);
        routes_of(json_object_get(c, "kept"), &kept);
        trim(by_score ? "factor=1 drop=score" : "factor=1 drop=position", 8, 1, NULL, &given);
        count(&given, ours);
        count(&kept, theirs);
        assert_memory_equal(ours, theirs, sizeof ours);
        if (by_score)
            check_equal(&given, &kept);
        policy_routes_free(&given);
        policy_routes_free(&kept);
        n++;
    }
    assert_int_equal(n, 2);
    json_decref(all);
}

/* Switch: the share dropped is sum over experts of max(0, load - C) / T, C = ceil(T / E * factor). */
static void switch_drop_share(void **state)
{
    (void)state;
    const int64_t load[4] = {57, 23, 13, 7};
    const double factor[4] = {1, 1.25, 1.5, 2};
    const int64_t dropped[4] = {32, 25, 19, 7};
    for (int i = 0; i < 4; i++) {
        struct moe_routes r;
        char settings[64];
        policy_routes_init(&r, 100);
        for (int32_t t = 0, e = 0, used = 0; t < 100; t++) {
            if (used++ == load[e]) {
                e++;
                used = 1;
            }
            policy_routes_push(&r, t, e, 1);
        }
        snprintf(settings, sizeof settings, "factor=%g drop=position", factor[i]);
        trim(settings, 4, 1, NULL, &r);
        assert_int_equal(100 - r.n, dropped[i]);
        policy_routes_free(&r);
    }
}

/* Four tokens want expert 0, which takes two of them. */
static void four_for_two(struct moe_routes *r)
{
    const float weight[4] = {0.25f, 0.75f, 0.5f, 0.75f};
    policy_routes_init(r, 4);
    for (int32_t t = 0; t < 4; t++) {
        policy_routes_push(r, t, 0, weight[t]);
        policy_routes_push(r, t, 1 + t % 2, 1 - weight[t]);
    }
}

static int64_t keeps(const struct moe_routes *r, int32_t token, int32_t expert)
{
    for (int64_t i = r->offset[token]; i < r->offset[token + 1]; i++)
        if (r->expert[i] == expert)
            return 1;
    return 0;
}

static void who_is_dropped(void **state)
{
    (void)state;
    struct moe_routes r;
    four_for_two(&r);
    trim("tokens=2 drop=score", 4, 1, NULL, &r);
    assert_true(!keeps(&r, 0, 0) && keeps(&r, 1, 0) && !keeps(&r, 2, 0) && keeps(&r, 3, 0));
    assert_true(r.n == 6 && r.offset[4] == 6 && keeps(&r, 0, 1) && r.weight[0] == 0.75f);
    policy_routes_free(&r);
    four_for_two(&r);
    trim("tokens=2 drop=position", 4, 1, NULL, &r);
    assert_true(keeps(&r, 0, 0) && keeps(&r, 1, 0) && !keeps(&r, 2, 0) && !keeps(&r, 3, 0));
    policy_routes_free(&r);
    four_for_two(&r); /* equal weights: the earlier token stays */
    trim("tokens=1 drop=score", 4, 1, NULL, &r);
    assert_true(keeps(&r, 1, 0) && !keeps(&r, 3, 0));
    policy_routes_free(&r);
}

/* As many as by any other rule, and every token now and then: of 4,000 for 1,000 places each fourth, and the same again
 * with the same seed. */
static void drawn_at_random(void **state)
{
    (void)state;
    enum { N = 4000 };
    int64_t kept[2] = {0, 0};
    for (int twice = 0; twice < 2; twice++) {
        struct moe_routes r;
        int64_t early = 0;
        policy_routes_init(&r, N);
        for (int32_t t = 0; t < N; t++)
            policy_routes_push(&r, t, 0, 1);
        trim("tokens=1000 drop=random", 4, 1, NULL, &r);
        assert_int_equal(r.n, 1000);
        for (int32_t t = 0; t < N; t++) {
            early += t < N / 2 && keeps(&r, t, 0);
            kept[twice] += t * keeps(&r, t, 0);
        }
        assert_in_range(early, 400, 600);
        policy_routes_free(&r);
    }
    assert_int_equal(kept[0], kept[1]);
}

static void renormalise_keeps_the_sum(void **state)
{
    (void)state;
    struct moe_routes r;
    four_for_two(&r);
    trim("tokens=2 drop=score renormalise=true", 4, 1, NULL, &r);
    assert_true(fabsf(r.weight[0] - 1) < 1e-6f); /* token 0 lost expert 0 */
    policy_routes_free(&r);
}

/* Tokens 0, 1 on device 0 and 2, 3 on device 1: one each. */
static void each_device_by_itself(void **state)
{
    (void)state;
    const int32_t device[4] = {0, 0, 1, 1};
    struct moe_routes r;
    four_for_two(&r);
    trim("tokens=1 drop=score scope=device", 4, 2, device, &r);
    assert_true(!keeps(&r, 0, 0) && keeps(&r, 1, 0) && !keeps(&r, 2, 0) && keeps(&r, 3, 0));
    policy_routes_free(&r);
}

/* Experts that cost nothing have no capacity. */
static void free_experts_are_not_limited(void **state)
{
    (void)state;
    struct moe_routes r;
    policy_routes_init(&r, 6);
    for (int32_t t = 0; t < 6; t++)
        policy_routes_push(&r, t, t < 4 ? 4 : 0, 1);
    r.n_free = 1;
    trim("factor=1 drop=position", 4, 1, NULL, &r); /* C = ceil(2 / 4) = 1 */
    assert_int_equal(r.n, 5);
    policy_routes_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(megatron_drops),        cmocka_unit_test(switch_drop_share),
        cmocka_unit_test(who_is_dropped),        cmocka_unit_test(drawn_at_random),
        cmocka_unit_test(renormalise_keeps_the_sum),
        cmocka_unit_test(each_device_by_itself), cmocka_unit_test(free_experts_are_not_limited),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
