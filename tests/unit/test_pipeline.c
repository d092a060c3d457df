/* SPDX-License-Identifier: Apache-2.0
 * test_pipeline.c - whole runs from their specification: step times worked out by hand, decisions that no machine
 * changes, weights that move, and what a run says when something is wrong with it. */
#include "core_test.h"

static double nic(double bytes) /* star-50GBps */
{
    return bytes / 50e9 + 0.5 * US;
}

static json_t *star(int n)
{
    return test_description("star-50GBps", n);
}

/* ---- step times ---- */

/* Two devices, one token each, both for expert 0, which is on device 0. */
static void one_layer_two_devices(void **state)
{
    static const uint8_t all_zero[8] = { 0 };
    static const char *const tiers[] = { "bound", "flow", "exact" };
    for (int i = 0; i < 3; i++) {
        struct err e = { 0 };
        json_t *spec = test_spec(star(2), test_trace(*state, "zero", 2, 4, 1, 2, 1, all_zero), 1, 2, 1, 1, 3);
        test_set(spec, "machine", "tier", json_string(tiers[i]));
        struct run *r = test_open_run(spec, &e);
        test_ok(run_go(r), &e);
        double step = attention(&h100, 1) + gate(&h100, 1, 2) + permute(&h100, 1) + nic(1000) + experts(&h100, 1, 2) +
                      nic(1000) + combine(&h100, 1, 1);
        for (int s = 0; s < 3; s++) {
            assert_near(test_metric(r, METRIC_step_s, s), step, 1e-9);
            assert_near(test_metric(r, METRIC_tokens_per_s, s), 2 / step, 1e-9);
            assert_near(test_metric(r, METRIC_a2a_s, s), 2 * nic(1000), 1e-9);
            assert_near(test_metric(r, METRIC_experts_s, s), experts(&h100, 1, 2), 1e-9);
            assert_near(test_metric(r, METRIC_inter_node_bytes, s), 2000, 1e-9);
            assert_near(test_metric(r, METRIC_imbalance, s), 2, 1e-12);
            assert_near(test_metric(r, METRIC_max_vio, s), 1, 1e-12);
            assert_near(test_metric(r, METRIC_routes, s), 2, 1e-12);
            /* Spread evenly: one row's bytes on both NICs, the experts' time halved, no latency. */
            assert_near(test_metric(r, METRIC_bound_s, s), step - 2 * nic(500) - experts(&h100, 1, 2) / 2, 1e-9);
        }
        test_close_run(r);
        json_decref(spec);
    }
}

/* The second layer starts where the first ends; a shared expert runs beside the routed ones and is shorter. */
static void layers_and_shared_experts(void **state)
{
    static const uint8_t all_zero[16] = { 0 };
    struct err e = { 0 };
    json_t *spec = test_spec(star(2), test_trace(*state, "zero", 2, 4, 2, 2, 1, all_zero), 2, 2, 1, 1, 1);
    test_set(spec, "model", "shared", json_integer(1));
    struct run *r = test_open_run(spec, &e);
    test_ok(run_go(r), &e);
    double layer = attention(&h100, 1) + gate(&h100, 1, 2) + permute(&h100, 1) + nic(1000) + experts(&h100, 1, 2) +
                   nic(1000) + combine(&h100, 1, 1);
    assert_near(test_metric(r, METRIC_step_s, 0), 2 * layer, 1e-9);
    test_close_run(r);
    json_decref(spec);
}

/* In decode every token reads the keys and values of its own context. */
static void every_token_reads_its_context(void **state)
{
    static const uint8_t all_zero[8] = { 0 };
    const double rows = 4, context = 1e5;
    struct err e = { 0 };
    json_t *spec = test_spec(star(1), test_trace(*state, "zero", 2, 4, 1, 2, 1, all_zero), 1, 2, 1, (int)rows, 1);
    test_set(spec, "workload", "context", json_integer((json_int_t)context));
    struct run *r = test_open_run(spec, &e);
    test_ok(run_go(r), &e);
    assert_near(test_metric(r, METRIC_attention_s, 0),
                attention_of(&h100, rows, context), 1e-9);
    test_close_run(r);
    json_decref(spec);
}

static void warmup_is_left_out(void **state)
{
    struct scratch *s = *state;
    struct trace_synth p = { .n_layers = 2, .n_experts = 8, .top_k = 2, .n_requests = 6, .tokens_per_request = 20,
                             .skew = 1, .stickiness = 0.3, .affinity = 0.4, .seed = 5 };
    struct err e = { 0 };
    test_ok(trace_synthesise(&p, scratch_path(s, "synth"), &e), &e);
    json_t *spec = test_spec(star(4), scratch_path(s, "synth"), 2, 8, 2, 3, 6);
    struct run *whole = test_open_run(spec, &e);
    test_ok(run_go(whole), &e);
    test_set(spec, NULL, "warmup", json_integer(2));
    struct run *late = test_open_run(spec, &e);
    test_ok(run_go(late), &e);
    assert_int_equal(late->metrics.n_steps, 4);
    for (int i = 0; i < 4; i++)
        assert_true(test_metric(late, METRIC_step_s, i) == test_metric(whole, METRIC_step_s, i + 2));
    assert_true(late->decisions == whole->decisions); /* made all the same */
    test_close_run(whole);
    test_close_run(late);
    json_decref(spec);
}

/* ---- decisions ---- */

static void machines_change_no_decision(void **state)
{
    struct scratch *s = *state;
    struct trace_synth p = { .n_layers = 3, .n_experts = 16, .top_k = 4, .n_requests = 10, .tokens_per_request = 30,
                             .skew = 1, .stickiness = 0.3, .affinity = 0.4, .seed = 5 };
    struct err e = { 0 };
    static const char *const tiers[] = { "bound", "flow", "exact" };
    test_ok(trace_synthesise(&p, scratch_path(s, "synth"), &e), &e);
    uint64_t first = 0;
    for (int i = 0; i < 3; i++) {
        json_t *spec = test_spec(test_description("dgx-h100", 1), scratch_path(s, "synth"), 3, 16, 4, 4, 4);
        test_set(spec, "machine", "tier", json_string(tiers[i]));
        uint64_t h = test_decisions(spec, NULL);
        first = i ? first : h;
        assert_true(h == first);
        test_policy(spec, "offload", "lru"); /* where weights lie changes no route */
        test_set(spec, NULL, "cache", json_real(0.2));
        assert_true(test_decisions(spec, NULL) == first);
        test_set(spec, NULL, "seed", json_integer(2));
        assert_true(test_decisions(spec, NULL) != first);
        json_decref(spec);
    }
}

/* ---- a placement that changes ---- */

struct swapper { struct test_env env; int32_t n_placed, n_due, n_steps; double load, together, last; };

/* Expert e on device e at first, on the other one from the second placement on. */
static int swap_place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    struct swapper *s = self;
    (void)stats;
    for (int32_t x = 0; x < 2; x++)
        if (s->env.env->host->place(s->env.env, out, 0, x, s->n_placed ? 1 - x : x, 1) < 0)
            return MOE_EFAIL;
    s->n_placed++;
    return 0;
}

static int swap_due(void *self, const struct moe_stats *stats, bool *rebalance)
{
    struct swapper *s = self;
    s->n_due++;
    *rebalance = stats->step == 1;
    s->last = stats->load[0];
    if (*rebalance) {
        s->load = stats->load[0];
        s->together = stats->coactivation[1];
        s->n_steps = stats->n_steps;
    }
    return stats->current ? 0 : MOE_EINVAL;
}

static const struct moe_plugin swap_plugin =
    TEST_POLICY(MOE_PLACEMENT, "swap", .needs = MOE_NEEDS_COACTIVATION, .state_size = sizeof(struct swapper),
                .init = test_keep_env,
                .ops.placement = { .place = swap_place, .due = swap_due });

/* Every token goes to both experts, so both placements cost the same; after step 1 both experts change places: 3e6 B
 * each way, before step 2 begins. */
static void migration_is_counted_and_timed(void **state)
{
    static const uint8_t both[16] = { 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1 };
    struct err e = { 0 };
    json_t *spec = test_spec(star(2), test_trace(*state, "both", 2, 4, 1, 2, 2, both), 1, 2, 2, 1, 4);
    struct run *r = test_open_run(spec, &e);
    test_swap_policy(r, &r->placement, &swap_plugin);
    test_ok(run_go(r), &e);
    double step = attention(&h100, 1) + gate(&h100, 1, 2) + permute(&h100, 2) + nic(1000) + experts(&h100, 1, 2) +
                  nic(1000) + combine(&h100, 2, 1);
    const struct swapper *s = r->placement.self;
    for (int i = 0; i < 4; i++) {
        assert_near(test_metric(r, METRIC_migration_s, i), i == 2 ? nic(3e6) : 0, 1e-9);
        assert_near(test_metric(r, METRIC_step_s, i), step + (i == 2 ? nic(3e6) : 0), 1e-9);
        assert_near(test_metric(r, METRIC_inter_node_bytes, i), 4000 + (i == 2 ? 6e6 : 0), 1e-12);
    }
    assert_int_equal(s->n_placed, 2);
    assert_int_equal(s->n_due, 4);
    assert_int_equal(s->n_steps, 2); /* steps 0 and 1, two tokens each */
    assert_near(s->load, 4, 0);
    assert_near(s->together, 4, 0);
    assert_near(s->last, 4, 0); /* steps 2 and 3: counted anew */
    test_close_run(r);
    json_decref(spec);
}

struct watcher { struct test_env env; double pairs[4]; };

static int watch_place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct moe_env *env = ((struct watcher *)self)->env.env;
    (void)stats;
    for (int32_t i = 0; i < 4; i++)
        if (env->host->place(env, out, i / 2, i % 2, i % 2, 1) < 0)
            return MOE_EFAIL;
    return 0;
}

static int watch_due(void *self, const struct moe_stats *stats, bool *rebalance)
{
    memcpy(((struct watcher *)self)->pairs, stats->transitions, sizeof ((struct watcher *)self)->pairs);
    *rebalance = false;
    return 0;
}

static const struct moe_plugin watch_plugin =
    TEST_POLICY(MOE_PLACEMENT, "watch", .needs = MOE_NEEDS_TRANSITIONS, .state_size = sizeof(struct watcher),
                .init = test_keep_env, .ops.placement = { .place = watch_place, .due = watch_due });

/* Every token goes to expert 0, then to expert 1: two tokens a step, three steps. */
static void transitions_are_counted_on_the_way(void **state)
{
    static const uint8_t zero_then_one[16] = { 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1 };
    static const double pairs[4] = { 0, 6, 0, 0 };
    struct err e = { 0 };
    json_t *spec = test_spec(star(2), test_trace(*state, "way", 2, 4, 2, 2, 1, zero_then_one), 2, 2, 1, 1, 3);
    struct run *r = test_open_run(spec, &e);
    test_swap_policy(r, &r->placement, &watch_plugin);
    test_ok(run_go(r), &e);
    assert_memory_equal(((const struct watcher *)r->placement.self)->pairs, pairs, sizeof pairs);
    test_close_run(r);
    json_decref(spec);
}

/* ---- replicas ---- */

/* Expert 0 on the second device of each node, expert 1 on the first device. */
static int twin_place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct moe_env *env = ((const struct test_env *)self)->env;
    (void)stats;
    return env->host->place(env, out, 0, 0, 1, 1) < 0 || env->host->place(env, out, 0, 0, 9, 1) < 0 ||
                   env->host->place(env, out, 0, 1, 0, 1) < 0 ? MOE_EFAIL : 0;
}

static const struct moe_plugin twin_plugin = TEST_POLICY(MOE_PLACEMENT, "twin", .state_size = sizeof(struct test_env),
                                                         .init = test_keep_env,
                                                         .ops.placement = { .place = twin_place });

static void replicas_on_the_node_come_first(void **state)
{
    static const uint8_t all_zero[16] = { 0 };
    struct err e = { 0 };
    json_t *spec = test_spec(test_description("dgx-h100", 2), test_trace(*state, "zero", 16, 1, 1, 2, 1, all_zero), 1,
                             2, 1, 1, 1);
    struct run *r = test_open_run(spec, &e);
    test_swap_policy(r, &r->placement, &twin_plugin);
    test_ok(run_go(r), &e);
    for (int32_t t = 0; t < 16; t++)
        assert_int_equal(r->to[t], t < 8 ? 1 : 9);
    assert_near(test_metric(r, METRIC_inter_node_bytes, 0), 0, 0);
    assert_near(test_metric(r, METRIC_intra_node_bytes, 0), 2 * 14 * 1000, 1e-12); /* 9 and 1 have their own */
    test_close_run(r);
    json_decref(spec);
}

/* ---- a balancer that drops ---- */

static int halve(void *self, const struct moe_batch *b, const float *scores, const struct moe_placement *p,
                 struct moe_routes *io, struct moe_cost *own)
{
    (void)self, (void)b, (void)scores, (void)p, (void)own;
    for (int32_t t = 0; t < io->n_tokens; t++) {
        io->expert[t] = io->expert[io->offset[t]];
        io->weight[t] = io->weight[io->offset[t]];
    }
    for (int32_t t = 0; t <= io->n_tokens; t++)
        io->offset[t] = t;
    io->n = io->n_tokens;
    return 0;
}

static const struct moe_plugin halve_plugin = TEST_POLICY(MOE_BALANCER, "halve", .ops.balancer = { .rewrite = halve });

static void dropped_is_a_share_of_all_layers(void **state)
{
    static const uint8_t both[32] = { 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1,
                                      0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1 };
    struct err e = { 0 };
    json_t *spec = test_spec(star(2), test_trace(*state, "both", 2, 4, 2, 2, 2, both), 2, 2, 2, 1, 2);
    struct run *r = test_open_run(spec, &e);
    test_ok(policy_open(&r->balancer[r->n_balancers++], &r->context, &halve_plugin, NULL, "test", &e), &e);
    test_ok(run_go(r), &e);
    for (int s = 0; s < 2; s++) {
        assert_near(test_metric(r, METRIC_routes, s), 8, 0);
        assert_near(test_metric(r, METRIC_dropped, s), 0.5, 1e-12);
    }
    test_close_run(r);
    json_decref(spec);
}

/* ---- a balancer that plans ---- */

struct planner {
    struct moe_plan plan;
    struct moe_split split[4];
    struct moe_weight_move move[4];
    int64_t load;
    double cost_bytes;
};

static int plan(void *self, int32_t layer, const int64_t *load, const struct moe_placement *p, struct moe_plan *out,
                struct moe_cost *own)
{
    struct planner *s = self;
    (void)layer, (void)p;
    own->bytes = s->cost_bytes;
    s->load = load[0];
    memcpy(out->split, s->split, sizeof s->split);
    memcpy(out->move, s->move, sizeof s->move);
    out->n_splits = s->plan.n_splits;
    out->n_moves = s->plan.n_moves;
    return 0;
}

static const struct moe_plugin plan_plugin = TEST_POLICY(MOE_BALANCER, "planner", .state_size = sizeof(struct planner),
                                                         .ops.balancer = { .plan = plan });

/* Two devices of two tokens; all four want expert 0 of device 0. */
static struct run *open_planned(struct scratch *s, const struct planner *p, struct err *e)
{
    static const uint8_t all_zero[16] = { 0 };
    json_t *spec = test_spec(star(2), test_trace(s, "zero", 4, 4, 1, 2, 1, all_zero), 1, 2, 1, 2, 1);
    struct run *r = test_open_run(spec, e);
    json_decref(spec);
    test_ok(policy_open(&r->balancer[r->n_balancers++], &r->context, &plan_plugin, NULL, "test", e), e);
    memcpy(r->balancer[0].self, p, sizeof *p);
    return r;
}

/* What planning costs is the gates' to carry, each device's tokens their share: here a half. */
static void planning_costs(void **state)
{
    double took[2];
    for (int i = 0; i < 2; i++) {
        struct err e = { 0 };
        struct planner p = { .cost_bytes = i * 1e6 };
        struct run *r = open_planned(*state, &p, &e);
        test_ok(run_go(r), &e);
        took[i] = test_metric(r, METRIC_step_s, 0);
        test_close_run(r);
    }
    assert_near(took[1] - took[0], 0.5e6 / h100.bandwidth, 1e-6);
    struct err e = { 0 };
    struct planner bad = { .cost_bytes = NAN };
    struct run *r = open_planned(*state, &bad, &e);
    assert_says(&e, run_go(r), "balancer planner: deciding costs 0 FLOPs, nan bytes", NULL);
    test_close_run(r);
}

/* Rows 2 and 3 stay where their tokens are, on device 1, which is sent the weights once both gates have spoken. Nothing
 * else travels; device 1's experts wait for them. */
static void plans_move_rows_and_weights(void **state)
{
    struct err e = { 0 };
    struct planner p = { .plan = { .n_splits = 1, .n_moves = 1 }, .split = { { 0, 1, 2, 4 } },
                         .move = { { 0, 0, 1 } } };
    struct run *r = open_planned(*state, &p, &e);
    test_ok(run_go(r), &e);
    assert_int_equal(((struct planner *)r->balancer[0].self)->load, 4);
    assert_near(test_metric(r, METRIC_imbalance, 0), 1, 1e-12);
    assert_near(test_metric(r, METRIC_inter_node_bytes, 0), 3e6, 1e-12);
    assert_near(test_metric(r, METRIC_migration_s, 0), nic(3e6), 1e-9);
    assert_near(test_metric(r, METRIC_step_s, 0), attention(&h100, 2) + gate(&h100, 2, 2) + nic(3e6) +
                experts(&h100, 1, 2) + combine(&h100, 2, 2), 1e-9);
    /* What arrives needs room beside what is there: one expert of its own, one that is sent. */
    double *room = (double *)(uintptr_t)r->context.view.expert_room;
    room[1] = 2 * 3e6;
    test_ok(device_memory_moves(r, "planner"), &e);
    room[1] -= 1;
    assert_says(&e, device_memory_moves(r, "planner"), "planner: sends device 1 experts of 0.003 GB", NULL);
    for (int32_t t = 0; t < r->graph.n_tasks; t++) { /* device 0 got nothing and waits for nothing */
        const struct task *x = &r->graph.task[t];
        if (x->kind == TASK_EXPERTS && x->device == 0)
            assert_near(x->start, attention(&h100, 2) + gate(&h100, 2, 2) + permute(&h100, 2), 1e-9);
    }
    test_close_run(r);
}

static void plans_that_cannot_be(void **state)
{
    static const struct { struct planner p; const char *says; } bad[] = {
        { { .plan.n_splits = 1, .split = { { 0, 1, 2, 4 } } }, "split 0 sends expert 0 to device 1, which neither" },
        { { .plan.n_splits = 1, .split = { { 0, 0, 2, 5 } } }, "split 0 sends rows 2 to 5 of expert 0" },
        { { .plan.n_splits = 1, .split = { { 2, 0, 0, 0 } } }, "of expert 2" },
        { { .plan.n_splits = 1, .split = { { 0, 2, 0, 1 } } }, "to device 2" },
        { { .plan.n_moves = 1, .move = { { 0, 1, 0 } } }, "expert 0 from device 1, which does not hold it" },
        { { .plan.n_moves = 1, .move = { { 0, 0, 2 } } }, "to 2" },
        { { .plan.n_splits = 5 }, "plans 5 splits and 0 moves, there is room for 4 and 4" },
        { { .plan.n_moves = -1 }, "plans 0 splits and -1 moves" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct err e = { 0 };
        struct run *r = open_planned(*state, &bad[i].p, &e);
        assert_says(&e, run_go(r), "balancer planner, layer 0", bad[i].says, NULL);
        assert_int_equal(e.code, ERR_RUN);
        test_close_run(r);
    }
}

/* ---- a dispatch that asks what a layout would take ---- */

typedef int32_t adder(void *, struct moe_graph *, const struct moe_exchange *);

/* Two exchanges at once share the ways into 2 and 3. Flow by flow, each way has three flows at a third of 50e9 B/s
 * until the second exchange's 0.5e6 B have passed, and 0 sends 33.3e9 B/s only; its other 3e6 B take 60 us more: 90 us.
 * In tier bound every link is on its own, and 0 is done with its 4e6 B after 80 us. */
static int contend(struct moe_graph *g, adder *add, void *p)
{
    const struct moe_part first[] = { { 0, 2, 2e6, 0, NULL, 0 }, { 0, 3, 2e6, 0, NULL, 0 } };
    const struct moe_part second[] = { { 1, 2, 5e5, 0, NULL, 0 }, { 4, 2, 5e5, 0, NULL, 0 },
                                       { 1, 3, 5e5, 0, NULL, 0 }, { 4, 3, 5e5, 0, NULL, 0 } };
    return add(p, g, &(struct moe_exchange){ MOE_PAY_BYTES, 2, first }) < 0 ||
                   add(p, g, &(struct moe_exchange){ MOE_PAY_BYTES, 4, second }) < 0 ? MOE_EFAIL : 0;
}

static int32_t add_as_policy(void *env, struct moe_graph *g, const struct moe_exchange *x)
{
    return ((const struct moe_env *)env)->host->task_exchange(env, g, x);
}

static int32_t add_directly(void *e, struct moe_graph *g, const struct moe_exchange *x)
{
    return graph_exchange(g, x, e);
}

static int asker_lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct moe_env *env = ((const struct test_env *)self)->env;
    struct moe_graph *trial = env->host->graph_try(env);
    double seconds;
    (void)in, (void)g;
    if (contend(trial, add_as_policy, (void *)(uintptr_t)env) < 0 || env->host->estimate(env, trial, &seconds) < 0)
        return MOE_EFAIL;
    return (env->host->fail)(env, MOE_EFAIL, "%.9g s", seconds); /* cmocka has a macro of that name */
}

static const struct moe_plugin asker_plugin = TEST_POLICY(MOE_DISPATCH, "asker", .state_size = sizeof(struct test_env),
                                                          .init = test_keep_env,
                                                          .ops.dispatch = { .lay_out = asker_lay_out });

/* The flow tier's answer, whatever tier the run is on: exchanges share links flow by flow. */
static void estimates_share_links(void **state)
{
    static const uint8_t zero[5] = { 0 };
    struct topology *t = test_build(star(5));
    struct err e = { 0 };
    double took[2];
    char text[64];
    for (int i = 0; i < 2; i++) {
        struct moe_graph g = { .n_devices = 5 };
        test_ok(contend(&g, add_directly, &e), &e);
        took[i] = test_run_graph(t, i ? NET_BOUND : NET_FLOW, &g);
        graph_free(&g);
    }
    assert_near(took[0], nic(4.5e6), 1e-9);
    assert_near(took[1], nic(4e6), 1e-9);
    json_t *spec = test_spec(star(5), test_trace(*state, "five", 1, 5, 1, 5, 1, zero), 1, 5, 1, 1, 1);
    test_set(spec, "machine", "tier", json_string("bound"));
    struct run *r = test_open_run(spec, &e);
    test_swap_policy(r, &r->dispatch, &asker_plugin);
    snprintf(text, sizeof text, "asker: %.9g s", took[0]);
    assert_says(&e, run_go(r), text, NULL);
    test_close_run(r);
    json_decref(spec);
    topology_free(t);
}

struct careful { struct test_env env; int n, code; double seconds; };

static int careful_build(const struct moe_traffic *in, const struct moe_env *env, struct moe_graph *g, int32_t entry)
{
    int64_t rows = in->routes->n;
    int32_t x = env->host->task_experts(env, g, &(struct moe_expert_work){ .layer = in->layer, .n = 1,
                                                                          .expert = in->routes->expert, .rows = &rows,
                                                                          .fraction = 1 });
    return x < 0 || env->host->task_after(env, g, x, entry) < 0 ? MOE_EFAIL : x;
}

/* Tries what it then lays out, and goes on where nobody can say how long that takes. */
static int careful_lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    struct careful *s = self;
    const struct moe_env *env = s->env.env;
    struct moe_graph *trial = env->host->graph_try(env);
    if (careful_build(in, env, trial, 0) < 0)
        return MOE_EFAIL;
    s->n++;
    s->code = env->host->estimate(env, trial, &s->seconds);
    in->exit[0] = careful_build(in, env, g, in->entry[0]);
    return in->exit[0] < 0 ? MOE_EFAIL : 0;
}

static const struct moe_plugin careful_plugin = TEST_POLICY(MOE_DISPATCH, "careful",
                                                            .state_size = sizeof(struct careful), .init = test_keep_env,
                                                            .ops.dispatch = { .lay_out = careful_lay_out });

static void trials_are_laid_out_alike(void **state)
{
    static const uint8_t all_zero[16] = { 0 };
    json_t *spec = test_spec(star(1), test_trace(*state, "zero", 2, 4, 2, 2, 1, all_zero), 2, 2, 1, 1, 1);
    for (int model = 0; model < 2; model++) {
        struct err e = { 0 };
        struct run *r = test_open_run(spec, &e);
        test_swap_policy(r, &r->dispatch, &careful_plugin);
        if (!model)
            r->context.machine = NULL;
        test_ok(run_go(r), &e);
        const struct careful *s = r->dispatch.self;
        assert_int_equal(s->n, 2); /* layers */
        assert_int_equal(s->code, model ? MOE_OK : MOE_EUNSUPPORTED);
        if (model)
            assert_near(s->seconds, experts(&h100, 1, 1), 1e-9);
        test_close_run(r);
    }
    json_decref(spec);
}

/* ---- what policies may not do ---- */

struct rogue { struct test_env env; int what; };

static int rogue_lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct rogue *s = self;
    const struct moe_env *env = s->env.env;
    if (s->what == 0)
        return 0; /* exit[] untouched */
    for (int32_t d = 0; d < env->topology->n_devices; d++)
        in->exit[d] = in->entry[d];
    if (s->what == 1)
        return 0; /* computes nothing */
    int32_t expert = s->what == 2 ? 2 : 0;
    int64_t rows = 2;
    int32_t id = env->host->task_experts(env, g, &(struct moe_expert_work){ .device = s->what == 3, .n = 1,
                                                                           .expert = &expert, .rows = &rows,
                                                                           .fraction = 1 });
    return id < 0 ? id : 0;
}

static const struct moe_plugin rogue_dispatch = TEST_POLICY(MOE_DISPATCH, "rogue", .state_size = sizeof(struct rogue),
                                                            .init = test_keep_env,
                                                            .ops.dispatch = { .lay_out = rogue_lay_out });

static int rogue_route(void *self, const struct moe_batch *b, const struct moe_bias *bias, struct moe_routes *out,
                       struct moe_cost *own)
{
    const struct rogue *s = self;
    (void)bias, (void)own;
    if (s->env.env->host->routes_reserve(s->env.env, out, b->n_tokens) < 0)
        return MOE_ENOMEM;
    out->n = b->n_tokens;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        out->offset[t + 1] = t + 1;
        out->expert[t] = s->what == 1 ? 2 : 0;
        out->weight[t] = 1;
    }
    if (s->what == 0) {
        out->n_tokens--;
        out->n--;
    }
    return 0;
}

static const struct moe_plugin rogue_router = TEST_POLICY(MOE_ROUTER, "rogue", .state_size = sizeof(struct rogue),
                                                          .init = test_keep_env,
                                                          .ops.router = { .route = rogue_route });

/* A router with a gate of its own, here one that costs nothing: the core lays out none beside it. */
static void own_gates(void **state)
{
    static const uint8_t all_zero[8] = { 0 };
    static const struct moe_plugin own_gate =
        TEST_POLICY(MOE_ROUTER, "own", .needs = MOE_OWN_GATE, .state_size = sizeof(struct rogue), .init = test_keep_env,
                    .ops.router = { .route = rogue_route });
    json_t *spec = test_spec(star(2), test_trace(*state, "zero", 2, 4, 1, 2, 1, all_zero), 1, 2, 1, 1, 1);
    for (int own = 0; own < 2; own++) {
        struct err e = { 0 };
        struct run *r = test_open_run(spec, &e);
        test_swap_policy(r, &r->router, own ? &own_gate : &rogue_router);
        ((struct rogue *)r->router.self)->what = 2; /* no fault: all to expert 0 */
        test_ok(run_go(r), &e);
        int n = 0, products = 0;
        for (int32_t t = 0; t < r->graph.n_tasks; t++)
            if (r->graph.task[t].op == MOE_OP_GATE && r->graph.task[t].kind == TASK_COMPUTE) {
                const struct task *x = &r->graph.task[t];
                for (int32_t i = x->first; i < x->first + x->n; i++)
                    products += r->graph.kernel[i].groups;
                n++;
            }
        assert_int_equal(n, 2);
        assert_int_equal(products, own ? 0 : 2);
        test_close_run(r);
    }
    json_decref(spec);
}

static void rogues_are_named(void **state)
{
    static const uint8_t all_zero[8] = { 0 };
    static const char *const dispatch_says[] = { "exit[0] is task -1", "device 0 computes 2 rows of expert 0 too few",
                                                 "device 0 computes expert 2, expected 0 to 1",
                                                 "device 0 computes 2 rows of expert 0 too few" };
    static const char *const router_says[] = { "routes of 1 tokens, expected 2", "token 0: expert 2, expected 0 to 1" };
    json_t *spec = test_spec(star(2), test_trace(*state, "zero", 2, 4, 1, 2, 1, all_zero), 1, 2, 1, 1, 1);
    for (int i = 0; i < 4; i++) {
        struct err e = { 0 };
        struct run *r = test_open_run(spec, &e);
        test_swap_policy(r, &r->dispatch, &rogue_dispatch);
        ((struct rogue *)r->dispatch.self)->what = i;
        assert_says(&e, run_go(r), "dispatch rogue, layer 0", dispatch_says[i], NULL);
        test_close_run(r);
    }
    for (int i = 0; i < 2; i++) {
        struct err e = { 0 };
        struct run *r = test_open_run(spec, &e);
        test_swap_policy(r, &r->router, &rogue_router);
        ((struct rogue *)r->router.self)->what = i;
        assert_says(&e, run_go(r), "router rogue, step 0, layer 0", router_says[i], NULL);
        test_close_run(r);
    }
    json_decref(spec);
}

/* ---- what is wrong with a specification, at every stage of opening it ---- */

static json_t *good_spec(struct scratch *s)
{
    static const uint8_t all_zero[8] = { 0 };
    return test_spec(test_description("rtx4090-pcie4", 1), test_trace(s, "zero", 2, 4, 1, 2, 1, all_zero), 1, 2, 1, 1,
                     2);
}

static void bad_specifications(void **state)
{
    struct err e;
#define REFUSED(change, ...)                                                                                          \
    do {                                                                                                              \
        json_t *spec = good_spec(*state);                                                                             \
        change;                                                                                                       \
        struct run *r = malloc(sizeof *r);                                                                            \
        memset(&e, 0, sizeof e);                                                                                      \
        assert_says(&e, run_open(r, spec, &e), "test:1", __VA_ARGS__, NULL);                                          \
        test_close_run(r);                                                                                            \
        json_decref(spec);                                                                                            \
    } while (0)
    REFUSED(json_object_del(json_object_get(spec, "model"), "layers"), "model.layers", "missing");
    REFUSED(test_set(spec, "model", "d_model", json_real(10.5)), "model.d_model", "whole number");
    REFUSED(test_set(spec, "model", "top_k", json_integer(3)), "model.top_k", "3 is more than the 2 experts");
    REFUSED(test_set(spec, "model", "precision", json_string("fp9")), "model.precision", "fp8");
    REFUSED(json_object_del(json_object_get(json_object_get(spec, "machine"), "description"), "device"), "device");
    REFUSED(test_set(spec, "machine", "tier", json_string("exakt")), "machine.tier", "exakt");
    REFUSED(test_set(spec, "machine", "executor", json_string("flo")), "machine.executor", "flow");
    REFUSED(test_set(spec, "workload", "trace", json_string("/no/such")), "/no/such");
    REFUSED(test_set(spec, "workload", "steps", json_integer(0)), "workload.steps");
    REFUSED(test_policy(spec, "router", "replai"), "did you mean \"replay\"");
    REFUSED(test_policy(spec, "router", "lru"), "\"lru\" is an offload, expected a router");
    REFUSED(test_policy(spec, "router", "softmax-top-k"), "router softmax-top-k", "logits.npy");
    REFUSED(test_policy(spec, "placement", "../eplb"), "not a policy's name");
    REFUSED(test_set(spec, "policies", "placement", json_pack("[{s:s, s:{s:i}}]", "name", "eplb", "params", "replica",
                                                              3)), "placement eplb", "did you mean \"replicas\"");
    REFUSED(json_object_del(json_object_get(spec, "policies"), "dispatch"), "dispatch: expected a policy's name");
    json_t *many = json_array();
    for (int i = 0; i <= MAX_BALANCERS; i++)
        json_array_append_new(many, json_pack("{s:s}", "name", "none"));
    REFUSED(test_set(spec, "policies", "balancer", json_incref(many)), "balancer", "more than 8");
    json_decref(many);
    REFUSED(test_set(spec, NULL, "cache", json_real(1.5)), "cache", "(0, 1]");
    REFUSED(test_set(spec, NULL, "warmup", json_integer(2)), "warmup", "0 to 1");
    REFUSED(test_policy(spec, "offload", "lru"); test_set(spec, "machine", "description", star(1)), "offload lru",
            "star-50GBps", "no way from host memory");
#undef REFUSED
    json_t *spec = good_spec(*state); /* and the one they are all made from is right */
    memset(&e, 0, sizeof e);
    struct run *r = test_open_run(spec, &e);
    test_ok(run_go(r), &e);
    json_t *result = run_result(r);
    assert_int_equal(json_integer_value(json_object_get(result, "tokens")), 1);
    assert_string_equal(json_string_value(json_object_get(result, "machine")), "flow");
    json_t *resolved = run_resolve(r); /* what the run was made of makes the same run */
    assert_int_equal(json_object_size(json_object_get(resolved, "policies")), 4);
    struct run *again = test_open_run(resolved, &e);
    test_ok(run_go(again), &e);
    assert_true(again->decisions == r->decisions && again->machine.now == r->machine.now);
    json_t *resolved_again = run_resolve(again);
    assert_true(json_equal(resolved, resolved_again));
    json_decref(resolved_again);
    test_close_run(again);
    json_decref(resolved);
    json_decref(result);
    test_close_run(r);
    json_decref(spec);
}

#define WITH_SCRATCH(test) cmocka_unit_test_setup_teardown(test, scratch_make, scratch_remove)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SCRATCH(one_layer_two_devices),
        WITH_SCRATCH(layers_and_shared_experts),
        WITH_SCRATCH(every_token_reads_its_context),
        WITH_SCRATCH(warmup_is_left_out),
        WITH_SCRATCH(machines_change_no_decision),
        WITH_SCRATCH(migration_is_counted_and_timed),
        WITH_SCRATCH(transitions_are_counted_on_the_way),
        WITH_SCRATCH(replicas_on_the_node_come_first),
        WITH_SCRATCH(dropped_is_a_share_of_all_layers),
        WITH_SCRATCH(planning_costs),
        WITH_SCRATCH(plans_move_rows_and_weights),
        WITH_SCRATCH(plans_that_cannot_be),
        WITH_SCRATCH(estimates_share_links),
        WITH_SCRATCH(trials_are_laid_out_alike),
        WITH_SCRATCH(own_gates),
        WITH_SCRATCH(rogues_are_named),
        WITH_SCRATCH(bad_specifications),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
