/* SPDX-License-Identifier: Apache-2.0
 * test_balancers_replicas.c - splits over replicas: the largest device load is the optimum, which duality gives. */
#include "policy_test.h"

enum { E = 9, D = 6, ROOM = E * D };

struct run {
    struct policy_host host;
    struct policy policy;
    struct policy_placement placement;
    struct moe_plan plan;
    struct moe_split split[ROOM];
    struct moe_weight_move move[ROOM];
};

/* Expert e has a replica on every device of bits[e]. */
static int plan_of(struct run *r, const int64_t *load, const unsigned *bits, int32_t n_experts, int32_t n_devices,
                   float fraction)
{
    struct moe_cost own = { 0 };
    memset(r, 0, sizeof *r);
    policy_host_open(&r->host, &(struct policy_shape){ 1, n_experts, 1, n_devices, 1, 0, 1 });
    if (policy_start(&r->policy, &r->host, test_plugin("balancer", "replica-lp"), "") != MOE_OK)
        fail_msg("%s", r->host.failure);
    policy_placement_init(&r->placement);
    for (int32_t e = 0; e < n_experts; e++)
        for (int32_t d = 0; d < n_devices; d++)
            if (bits[e] >> d & 1)
                r->host.host.place(&r->host.env, &r->placement.view, 0, e, d, fraction);
    policy_placement_seal(&r->placement, &r->host.model);
    r->plan = (struct moe_plan){ .max_splits = ROOM, .max_moves = ROOM, .split = r->split, .move = r->move };
    return r->policy.plugin->ops.balancer.plan(r->policy.state, 0, load, &r->placement.view, &r->plan, &own);
}

static void run_close(struct run *r)
{
    policy_placement_free(&r->placement);
    policy_stop(&r->policy);
    policy_host_close(&r->host);
}

/* Largest device load under the plan; every row is somewhere, once, where its expert is. */
static int64_t largest(const struct run *r, const int64_t *load, const unsigned *bits, int32_t n_experts)
{
    int64_t on[D] = { 0 }, most = 0, row[E] = { 0 };
    for (int32_t i = 0; i < r->plan.n_splits; i++) {
        const struct moe_split *s = &r->plan.split[i];
        assert_true(s->from == row[s->expert] && s->to > s->from && (bits[s->expert] >> s->device & 1));
        row[s->expert] = s->to;
        on[s->device] += s->to - s->from;
    }
    for (int32_t e = 0; e < n_experts; e++) {
        if ((bits[e] & (bits[e] - 1)) == 0) { /* one replica: rows stay, no split needed */
            assert_int_equal(row[e], 0);
            on[__builtin_ctz(bits[e])] += load[e];
        } else {
            assert_int_equal(row[e], load[e]);
        }
    }
    for (int32_t d = 0; d < D; d++)
        most = on[d] > most ? on[d] : most;
    return most;
}

/* No split can do better than tokens of some experts over all the devices that hold any of them, and one does as well:
 * the largest quotient over all sets of experts, rounded up. */
static int64_t bound(const int64_t *load, const unsigned *bits, int32_t n_experts)
{
    int64_t most = 0;
    for (unsigned set = 1; set < 1u << n_experts; set++) {
        int64_t sum = 0;
        unsigned devices = 0;
        for (int32_t e = 0; e < n_experts; e++)
            if (set >> e & 1) {
                sum += load[e];
                devices |= bits[e];
            }
        const int64_t n = __builtin_popcount(devices), least = (sum + n - 1) / n;
        most = least > most ? least : most;
    }
    return most;
}

static void optimal(void **state)
{
    (void)state;
    const struct moe_env env = { .seed = 5 };
    int n_uneven = 0;
    for (int32_t trial = 0; trial < 300; trial++) {
        int64_t load[E];
        unsigned bits[E];
        struct run r;
        for (int32_t e = 0; e < E; e++) {
            const double u = moe_unit(moe_rand(&env, 0, trial, 0, e));
            load[e] = (int64_t)(1000 * u * u * u * u);
            bits[e] = 1u << moe_rand(&env, 1, trial, 0, e) % D | 1u << moe_rand(&env, 2, trial, 0, e) % D;
        }
        assert_int_equal(plan_of(&r, load, bits, E, D, 1), MOE_OK);
        const int64_t ours = largest(&r, load, bits, E), best = bound(load, bits, E);
        if (ours != best)
            fail_msg("trial %d: %lld rows on a device, %lld would do", trial, (long long)ours, (long long)best);
        n_uneven += r.plan.n_splits > 0;
        assert_int_equal(r.plan.n_moves, 0);
        run_close(&r);
    }
    assert_true(n_uneven > 290);
}

/* Only a chain helps: even shares put 60, 40, 40, 20 on the devices; 20 rows of device 0 have to go to 1, which has to
 * pass as many others to 2, and 2 to 3. */
static void chain(void **state)
{
    (void)state;
    static const int64_t load[4] = { 40, 40, 40, 40 }, fixed[4] = { 80, 40, 20, 20 };
    static const unsigned bits[4] = { 1, 3, 6, 12 };
    struct run r;
    assert_int_equal(plan_of(&r, load, bits, 4, 4, 1), MOE_OK);
    assert_int_equal(largest(&r, load, bits, 4), 40);
    run_close(&r);
    assert_int_equal(plan_of(&r, fixed, bits, 4, 4, 1), MOE_OK);
    assert_int_equal(largest(&r, fixed, bits, 4), 80); /* an expert without a second replica stays */
    run_close(&r);
}

static void edges(void **state)
{
    (void)state;
    static const int64_t none[2] = { 0, 0 }, some[2] = { 3, 4 };
    static const unsigned both[2] = { 3, 3 }, one[2] = { 1, 1 }, missing[2] = { 0, 1 };
    struct run r;
    assert_int_equal(plan_of(&r, none, both, 2, 2, 1), MOE_OK);
    assert_int_equal(r.plan.n_splits, 0);
    run_close(&r);
    assert_int_equal(plan_of(&r, some, one, 2, 1, 1), MOE_OK);
    assert_int_equal(r.plan.n_splits, 0);
    run_close(&r);
    assert_int_equal(plan_of(&r, some, both, 2, 2, 0.5f), MOE_EUNSUPPORTED);
    assert_non_null(strstr(r.host.failure, "expert 0 is in shards"));
    run_close(&r);
    assert_int_equal(plan_of(&r, some, missing, 2, 2, 1), MOE_EINVAL);
    assert_non_null(strstr(r.host.failure, "expert 0 has 3 tokens and no replica"));
    run_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(optimal), cmocka_unit_test(chain), cmocka_unit_test(edges) };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
