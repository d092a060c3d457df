/* SPDX-License-Identifier: Apache-2.0
 * test_groups.c - layouts with several groups of devices that hold all experts each (edp), and with experts in shards
 * (etp): who gets what, bytes and times by hand, gradients, new placements, and what is refused. Sizes are
 * core_test.h's; every device is a node of its own. */
#include "core_test.h"

static const uint8_t all_zero[64] = { 0 };

static double nic(double bytes) /* star-50GBps */
{
    return bytes / 50e9 + 0.5 * US;
}

/* n devices, a token each, all for expert 0 of 2; experts {ep, etp}. */
static json_t *spec_of(struct scratch *s, int n, int ep, int etp)
{
    json_t *spec = test_spec(test_description("star-50GBps", n), test_trace(s, "zero", 8, 4, 1, 2, 1, all_zero), 1, 2,
                             1, 1, 1);
    test_set(spec, NULL, "layout", json_pack("{s:{s:i, s:i}}", "experts", "ep", ep, "etp", etp));
    return spec;
}

static struct run *run_of(json_t *spec)
{
    struct err e = { 0 };
    struct run *r = test_open_run(spec, &e);
    test_ok(run_go(r), &e);
    json_decref(spec);
    return r;
}

static void training(json_t *spec)
{
    test_set(spec, "workload", "kind", json_string("train"));
    json_object_del(json_object_get(spec, "workload"), "batch_per_device");
    test_set(spec, "workload", "tokens_per_device", json_integer(1));
}

/* Bytes from one device to another, as tokens' rows (of one payload) or in collectives; -1: any other device. */
static double bytes_of(const struct run *r, bool collective, enum moe_payload payload, int32_t src, int32_t dst)
{
    double sum = 0;
    for (int32_t t = 0; t < r->graph.n_tasks; t++) {
        const struct task *x = &r->graph.task[t];
        if (x->kind != TASK_EXCHANGE || x->collective != collective || x->payload != payload)
            continue;
        for (int32_t i = x->first; i < x->first + x->n; i++) {
            const struct moe_part *p = &r->graph.part[i];
            if (p->src != p->dst && (src < 0 || p->src == src) && (dst < 0 || p->dst == dst))
                sum += p->bytes;
        }
    }
    return sum;
}

static double sent(const struct run *r, enum moe_payload payload, int32_t src, int32_t dst)
{
    return bytes_of(r, false, payload, src, dst);
}

/* ---- groups ---- */

/* Experts 0 1 0 1: devices 1 and 3 send their row to the expert of their own group. As two devices alone. */
static void tokens_stay_in_their_group(void **state)
{
    struct run *r = run_of(spec_of(*state, 4, 2, 1)), *alone = run_of(spec_of(*state, 2, 2, 1));
    assert_int_equal(r->edp, 2);
    assert_int_equal(r->placed.view.n, 4);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(r->placed.replica[i].device, i);
        assert_int_equal(r->placed.replica[i].expert, i % 2);
        assert_near(r->placed_bytes[i], 3e6, 1e-12);
    }
    assert_near(sent(r, MOE_PAY_HIDDEN, 1, 0), 1000, 1e-12);
    assert_near(sent(r, MOE_PAY_HIDDEN, 3, 2), 1000, 1e-12);
    assert_near(test_metric(r, METRIC_inter_node_bytes, 0), 4 * 1000, 1e-12);
    assert_near(test_metric(r, METRIC_step_s, 0),
                attention(&h100, 1) + gate(&h100, 1, 2) + permute(&h100, 1) + nic(1000) + experts(&h100, 1, 2) +
                    nic(1000) + combine(&h100, 1, 1), 1e-9);
    assert_near(test_metric(r, METRIC_step_s, 0), test_metric(alone, METRIC_step_s, 0), 1e-12);
    assert_near(test_metric(r, METRIC_imbalance, 0), 2, 1e-12);
    test_close_run(r);
    test_close_run(alone);
}

/* One group is slow; the other's exchanges do not wait for it. */
static void groups_do_not_wait_for_each_other(void **state)
{
    json_t *spec = spec_of(*state, 4, 2, 1);
    json_t *machine = json_object_get(json_object_get(spec, "machine"), "description");
    test_set(spec, "workload", "context", json_integer(1000));
    json_object_set_new(machine, "slow", json_pack("[{s:s, s:i, s:f}]", "at", "0 s", "device", 3, "factor", 10.0));
    struct run *r = run_of(spec);
    double end[4] = { 0 };
    for (int32_t t = 0; t < r->graph.n_tasks; t++)
        if (r->graph.task[t].kind == TASK_COMPUTE && r->graph.task[t].op == MOE_OP_COMBINE)
            end[r->graph.task[t].device] = r->graph.task[t].end;
    assert_near(end[1], end[0] + nic(1000), 1e-9); /* its output has the way back */
    assert_true(end[0] > 0 && end[2] > 2 * end[0]); /* it gets a row of device 3's, which took long */
    test_close_run(r);
}

/* Both experts, 3e6 weights of 4-byte gradients: rings of two, half of the bytes twice each way. */
static void gradients_of_groups_are_reduced(void **state)
{
    json_t *spec = spec_of(*state, 4, 2, 1);
    training(spec);
    struct run *r = run_of(spec);
    for (int32_t d = 0; d < 4; d++)
        assert_near(bytes_of(r, true, MOE_PAY_BYTES, d, (d + 2) % 4), 4 * 3e6, 1e-12);
    assert_near(sent(r, MOE_PAY_HIDDEN, -1, -1), 2 * 2000, 1e-12); /* forward and backward, two groups */
    assert_near(sent(r, MOE_PAY_OUTPUT, -1, -1), 2 * 2000, 1e-12);
    test_close_run(r);
}

/* ---- shards ---- */

/* Expert 0 is on 0 and 1. Rows of 2 and 3 come in there, on 0 and on 1; with their own the two have two rows each that
 * the other needs. Both compute all four at half the width and send the other its two rows' other half, which is added:
 * two rows read and one written, twice. */
static void shards_by_hand(void **state)
{
    struct run *r = run_of(spec_of(*state, 4, 2, 2));
    assert_int_equal(r->edp, 1);
    assert_near(sent(r, MOE_PAY_HIDDEN, 2, 0), 1000, 1e-12);
    assert_near(sent(r, MOE_PAY_HIDDEN, 3, 1), 1000, 1e-12);
    assert_near(sent(r, MOE_PAY_HIDDEN, 0, 1), 2000, 1e-12);
    assert_near(sent(r, MOE_PAY_HIDDEN, 1, 0), 2000, 1e-12);
    assert_near(sent(r, MOE_PAY_HIDDEN, -1, -1), 6000, 1e-12);
    assert_near(sent(r, MOE_PAY_OUTPUT, 0, 1), 2000, 1e-12);
    assert_near(sent(r, MOE_PAY_OUTPUT, 1, 0), 2000, 1e-12);
    assert_near(sent(r, MOE_PAY_OUTPUT, 0, 2), 1000, 1e-12);
    assert_near(sent(r, MOE_PAY_OUTPUT, 1, 3), 1000, 1e-12);
    assert_near(sent(r, MOE_PAY_OUTPUT, -1, -1), 6000, 1e-12);
    const double half = gemm(&h100, 1, 4, 1000, 1000) + by_hand(&h100, 0, 4 * 2500) + gemm(&h100, 1, 4, 1000, 500);
    const double sum = by_hand(&h100, 2 * 1000, 2 * 3 * 1000);
    assert_near(test_metric(r, METRIC_experts_s, 0), half, 1e-9);
    assert_near(test_metric(r, METRIC_a2a_s, 0), 2 * nic(1000) + 2 * nic(2000), 1e-9);
    assert_near(test_metric(r, METRIC_step_s, 0),
                attention(&h100, 1) + gate(&h100, 1, 2) + permute(&h100, 1) + nic(1000) + nic(2000) + half +
                    nic(2000) + sum + nic(1000) + combine(&h100, 1, 1), 1e-9);
    assert_near(test_metric(r, METRIC_imbalance, 0), 2, 1e-12);
    for (int32_t d = 0; d < 4; d++)
        assert_near(r->placed_bytes[d], 3e6 / 2, 1e-12);
    test_close_run(r);
}

/* A third of 999 is 333: as an expert of that width, on every device. */
static void thirds_are_thirds(void **state)
{
    json_t *thirds = spec_of(*state, 3, 1, 3);
    test_set(thirds, "model", "d_expert", json_integer(999));
    struct run *r = run_of(thirds);
    const double by_third = gemm(&h100, 1, 3, 666, 1000) + by_hand(&h100, 0, 3 * 333 * 5.0) +
                            gemm(&h100, 1, 3, 1000, 333);
    assert_near(test_metric(r, METRIC_experts_s, 0), by_third, 1e-7);
    assert_near(sent(r, MOE_PAY_HIDDEN, -1, -1), 3 * 2 * 1000, 1e-12); /* every token is at home on a holder */
    assert_near(sent(r, MOE_PAY_OUTPUT, -1, -1), 3 * 2 * 1000, 1e-12);
    test_close_run(r);
}

/* Two groups of one slot: halves of both experts' gradients, on a ring of two for each place. With the optimiser's
 * state in shares, half of the 4-byte gradients once, half of the 1-byte weights later; a device updates half. */
static void gradients_of_shards_are_reduced(void **state)
{
    double attention = 0;
    for (int share = 0; share < 2; share++) {
        json_t *spec = spec_of(*state, 4, 1, 2);
        training(spec);
        test_set(spec, "workload", "shard_optimizer", json_boolean(share));
        struct run *r = run_of(spec);
        assert_int_equal(r->edp, 2);
        for (int32_t d = 0; d < 4; d++) {
            const double here = 2 * 3e6 / 2;
            assert_near(r->placed_bytes[d], here, 1e-12);
            assert_near(bytes_of(r, true, MOE_PAY_BYTES, d, (d + 2) % 4), share ? 4 * here / 2 + here / 2 : 4 * here,
                        1e-12);
            attention = share ? attention : memory_updated(r, d) - here;
            assert_near(memory_updated(r, d), share ? attention / 4 + here / 2 : attention + here, 1e-12);
        }
        /* A row to the neighbour and a part of a sum back, of each token, there and backwards. */
        assert_near(sent(r, MOE_PAY_HIDDEN, -1, -1), 2 * 4 * 1000, 1e-12);
        assert_near(sent(r, MOE_PAY_OUTPUT, -1, -1), 2 * 4 * 1000, 1e-12);
        json_t *memory = device_memory_json(r);
        assert_near(json_real_value(json_object_get(memory, "optimizer")), 12 * memory_updated(r, 0), 1e-12);
        json_decref(memory);
        test_close_run(r);
    }
}

/* ---- placements ---- */

/* Expert e on slot e, the next time on the next one; replicas are chosen by the place of a token's slot. */
static int place_in_turn(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct moe_env *env = ((struct test_env *)self)->env;
    const int32_t n = env->topology->n_devices, shift = stats->current ? stats->current->replica[0].device + 1 : 0;
    for (int32_t e = 0; e < 2; e++)
        if (env->host->place(env, out, 0, e, (e + shift) % n, 1) < 0)
            return MOE_EFAIL;
    return 0;
}

static int always_due(void *self, const struct moe_stats *stats, bool *rebalance)
{
    const struct moe_env *env = ((struct test_env *)self)->env;
    *rebalance = true;
    return stats->current->n == 2 ? 0 : (env->host->fail)(env, MOE_EFAIL, "%d replicas", stats->current->n);
}

static int select_first(void *self, const struct moe_batch *b, const struct moe_routes *r,
                        const struct moe_placement *p, int32_t *replica)
{
    const struct moe_env *env = ((struct test_env *)self)->env;
    for (int32_t t = 0; t < b->n_tokens; t++)
        if (b->device[t] >= env->topology->n_devices || b->placement != p)
            return (env->host->fail)(env, MOE_EFAIL, "token %d on device %d", t, b->device[t]);
    for (int64_t i = 0; i < r->n; i++)
        replica[i] = p->by_expert[p->expert_first[r->expert[i]]];
    return 0;
}

static const struct moe_plugin in_turn =
    TEST_POLICY(MOE_PLACEMENT, "in-turn", .state_size = sizeof(struct test_env), .init = test_keep_env,
                .ops.placement = { .place = place_in_turn, .due = always_due, .select = select_first });

/* A slot is where its first device is: of two nodes of eight, each is one. */
static void slots_know_their_nodes(void **state)
{
    struct err e = { 0 };
    json_t *spec = test_spec(test_description("dgx-h100", 2), test_trace(*state, "zero", 16, 4, 1, 2, 1, all_zero), 1,
                             2, 1, 1, 1);
    test_set(spec, NULL, "layout", json_pack("{s:{s:i, s:i}}", "experts", "ep", 2, "etp", 8));
    struct run *r = test_open_run(spec, &e);
    assert_int_equal(r->slots.view.n_devices, 2);
    assert_int_equal(r->slots.view.n_nodes, 2);
    assert_true(r->slots.view.node[0] == 0 && r->slots.view.node[1] == 1);
    test_close_run(r);
    json_decref(spec);
}

/* Two groups of two slots of two: each shard moves to the other slot of its group, from its own place there. */
static void shards_move(void **state)
{
    struct err e = { 0 };
    json_t *spec = spec_of(*state, 8, 2, 2);
    struct run *r = test_open_run(spec, &e);
    test_swap_policy(r, &r->placement, &in_turn);
    assert_near(r->slots.view.memory[0], 2 * r->context.view.memory[0], 1e-12);
    assert_int_equal(r->slots.view.n_devices, 2);
    test_ok(run_go(r), &e);
    for (int64_t i = 0; i < r->routes.n + r->before.n; i++) /* the step's routes: expert 0, slot 0, group 0 or 1 */
        assert_int_equal(r->placed.replica[r->replica[i]].expert, 0);
    assert_int_equal(r->n_migration, 8);
    bool moved[8] = { false };
    for (int i = 0; i < 8; i++) {
        assert_int_equal(r->migration[i].src, r->migration[i].dst ^ 2);
        assert_near(r->migration[i].bytes, 3e6 / 2, 1e-12);
        moved[r->migration[i].dst] = true;
    }
    for (int i = 0; i < 8; i++)
        assert_true(moved[i]);
    test_close_run(r);
    json_decref(spec);
}

enum { LAYERS = 2, EXPERTS = 8, TOKENS = 64 };

static json_t *uneven(struct scratch *s, const char *placement, int ep, int etp, const char *tier)
{
    uint8_t expert[TOKENS * LAYERS * 2];
    for (int i = 0; i < TOKENS * LAYERS; i++) {
        expert[2 * i] = (uint8_t)(i % 5 % 4);
        expert[2 * i + 1] = (uint8_t)(4 + i % 7 % 4);
    }
    json_t *spec = test_spec(test_description("star-50GBps", 8),
                             test_trace(s, "uneven", 16, TOKENS / 16, LAYERS, EXPERTS, 2, expert), LAYERS, EXPERTS, 2,
                             4, 2);
    test_set(spec, NULL, "layout", json_pack("{s:{s:i, s:i}}", "experts", "ep", ep, "etp", etp));
    test_set(spec, "machine", "tier", json_string(tier));
    test_policy(spec, "placement", placement);
    return spec;
}

/* Every group holds every expert whole and alike; what travels stays in it; nothing is below its bound. */
static void every_placement_runs(void **state)
{
    static const char *const name[] = { "contiguous", "round-robin", "eplb" };
    static const int shape[][2] = { { 4, 1 }, { 2, 2 }, { 4, 2 }, { 2, 4 }, { 1, 8 }, { 1, 1 } };
    for (int i = 0; i < 18; i++) {
        const int ep = shape[i / 3][0], etp = shape[i / 3][1], group = ep * etp;
        struct run *r = run_of(uneven(*state, name[i % 3], ep, etp, "exact"));
        double held[8][LAYERS][EXPERTS] = { 0 };
        for (int32_t k = 0; k < r->placed.view.n; k++) {
            const struct moe_replica *x = &r->placed.replica[k];
            held[x->device / group][x->layer][x->expert] += (double)x->fraction;
        }
        for (int l = 0; l < LAYERS; l++)
            for (int e = 0; e < EXPERTS; e++)
                for (int g = 0; g < 8 / group; g++) {
                    assert_true(held[g][l][e] > 1 - 1e-6);
                    assert_near(held[g][l][e], held[0][l][e], 1e-12);
                }
        for (int32_t src = 0; src < 8; src++)
            for (int32_t dst = 0; dst < 8; dst++)
                if (src / group != dst / group)
                    assert_near(sent(r, MOE_PAY_HIDDEN, src, dst) + sent(r, MOE_PAY_OUTPUT, src, dst), 0, 0);
        const uint64_t decisions = test_decisions(json_incref(r->spec), NULL);
        assert_true(decisions == r->decisions);
        struct run *bound = run_of(uneven(*state, name[i % 3], ep, etp, "bound"));
        assert_true(bound->decisions == r->decisions);
        for (int s = 0; s < 2; s++) {
            assert_true(test_metric(r, METRIC_bound_s, s) <= test_metric(r, METRIC_step_s, s) * (1 + 1e-9));
            assert_true(test_metric(bound, METRIC_step_s, s) <= test_metric(r, METRIC_step_s, s) * (1 + 1e-9));
        }
        json_decref(r->spec);
        test_close_run(r);
        test_close_run(bound);
    }
}

/* ---- refusals ---- */

static void refused(json_t *spec, int code, const char *a, const char *b, const char *c)
{
    struct err e = { 0 };
    struct run *r = malloc(sizeof *r);
    int rc = run_open(r, spec, &e);
    if (rc == 0)
        rc = run_go(r);
    assert_says(&e, rc, a, b, c, NULL);
    assert_int_equal(e.code, code);
    test_close_run(r);
    json_decref(spec);
}

static int plan_nothing(void *self, int32_t layer, const int64_t *load, const struct moe_placement *p,
                        struct moe_plan *out, struct moe_cost *own)
{
    (void)self, (void)layer, (void)load, (void)p, (void)out, (void)own;
    return 0;
}

static const struct moe_plugin planner = TEST_POLICY(MOE_BALANCER, "planner", .ops.balancer = { .plan = plan_nothing });

static void bad_layouts(void **state)
{
    refused(spec_of(*state, 4, 3, 1), ERR_INPUT, "layout.experts: ep x etp = 3 x 1 = 3", "has 4 devices",
            "ep x etp x edp = 4");
    refused(spec_of(*state, 4, 4, 2), ERR_INPUT, "ep x etp = 4 x 2 = 8", "has 4 devices", "ep x etp x edp = 4");
    refused(spec_of(*state, 8, 4, 1), ERR_INPUT, "layout.experts.ep: 4 is more than the model's 2 experts", "etp 1",
            "edp 2");
    refused(spec_of(*state, 3, 1, 3), ERR_INPUT, "layout.experts.etp", "3 does not divide", "d_expert, 1000");
    json_t *spec = spec_of(*state, 4, 2, 2);
    test_policy(spec, "dispatch", "node-dedup");
    refused(spec, ERR_RUN, "dispatch node-dedup", "expert 0 is sharded", "one device");
    spec = test_spec(test_description("dgx-h100", 1), test_trace(*state, "zero", 2, 4, 1, 2, 1, all_zero), 1, 2, 1,
                     1, 1);
    test_set(spec, NULL, "layout", json_pack("{s:{s:i, s:i}}", "experts", "ep", 2, "etp", 4));
    test_policy(spec, "offload", "lru");
    test_set(spec, NULL, "cache", json_real(0.5));
    refused(spec, ERR_INPUT, "offload lru", "layout.experts.etp", "expected etp 1");
    struct err e = { 0 };
    spec = spec_of(*state, 4, 2, 1);
    struct run *r = test_open_run(spec, &e);
    r->balancer[0].plugin = &planner;
    r->n_balancers = 1;
    assert_int_equal(groups_check(r), ERR_INPUT);
    assert_says(&e, e.code, "balancer planner", "ep 2, etp 1", "2 groups", NULL);
    r->n_balancers = 0;
    test_close_run(r);
    json_decref(spec);
}

#define WITH_SCRATCH(test) cmocka_unit_test_setup_teardown(test, scratch_make, scratch_remove)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SCRATCH(tokens_stay_in_their_group),      WITH_SCRATCH(groups_do_not_wait_for_each_other),
        WITH_SCRATCH(gradients_of_groups_are_reduced), WITH_SCRATCH(shards_by_hand),
        WITH_SCRATCH(slots_know_their_nodes),
        WITH_SCRATCH(thirds_are_thirds),               WITH_SCRATCH(gradients_of_shards_are_reduced),
        WITH_SCRATCH(shards_move),                     WITH_SCRATCH(every_placement_runs),
        WITH_SCRATCH(bad_layouts),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
