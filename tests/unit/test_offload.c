/* SPDX-License-Identifier: Apache-2.0
 * test_offload.c - weights that are not there: loads one after another, experts that start when theirs have come, slots
 * that are free when their last user has ended; and the first pass that knows the next uses. Times by hand. */
#include "core_test.h"

static const struct card rtx4090 = { 330.3e12 * 0.75, 1.008e12 * 0.86, 128, 330.3e12 / 128 * 0.86, 152e9, 23.7e9,
                                     1.008e12 * 0.88, 165.2 / 330.3 };

/* An expert's way over PCIe 4.0 x16: 31.5e9 B/s at 0.8, 5 us. */
static const double load = 3e6 / (31.5e9 * 0.8) + 5e-6;

/* Two layers of four experts, two per token; token 0: 01 | 23, token 1: 02 | 23. */
static json_t *offload_spec(struct scratch *s, double cache, const uint8_t expert[8])
{
    json_t *spec = test_spec(test_description("rtx4090-pcie4", 1), test_trace(s, "two", 1, 2, 2, 4, 2, expert), 2, 4,
                             2, 1, 2);
    test_policy(spec, "offload", "lru");
    test_set(spec, NULL, "cache", json_real(cache));
    return spec;
}

/* The n-th experts task of a layer that is left after the split, and the n-th load. */
static const struct task *nth(const struct run *r, enum task_kind kind, int32_t layer, int n)
{
    for (int32_t t = 0; t < r->graph.n_tasks; t++)
        if (r->graph.task[t].kind == kind && r->graph.task[t].layer == layer && n-- == 0)
            return &r->graph.task[t];
    fail_msg("no such task");
    return NULL;
}

/* A cache of three of the eight, least recently used first out.
 *   step 0  layer 0: loads 0, 1                         layer 1: loads 2 (room), 3 (instead of layer 0's expert 0)
 *   step 1  layer 0: loads 0 (for 1), 2 (for layer 1's 2)   layer 1: loads 2 (for layer 0's 0), has 3
 * Loads queue on the copy stream from the gate on; each expert starts when its own weights are there. */
static void loads_in_turn_residents_at_once(void **state)
{
    static const uint8_t expert[8] = { 0, 1, 2, 3, 0, 2, 2, 3 };
    struct err e = { 0 };
    const struct card *c = &rtx4090;
    json_t *spec = offload_spec(*state, 3.0 / 8, expert);
    struct run *r = test_open_run(spec, &e);
    const double before = attention(c, 1) + gate(c, 1, 4), one = experts(c, 1, 1), after = combine(c, 2, 1);
    const double both_late = before + 2 * load + one + after, one_late = before + load + one + after;
    test_ok(placement_start(r), &e);
    test_ok(pipeline_step(r, 0), &e);
    assert_near(test_metric(r, METRIC_step_s, 0), 2 * both_late, 1e-9);
    assert_near(test_metric(r, METRIC_hit_rate, 0), 0, 0);
    assert_near(test_metric(r, METRIC_loaded_bytes, 0), 4 * 3e6, 1e-12);
    assert_near(test_metric(r, METRIC_load_s, 0), 4 * load, 1e-9);
    assert_near(nth(r, TASK_LOAD, 0, 0)->start, before, 1e-9);
    assert_near(nth(r, TASK_LOAD, 0, 1)->start, before + load, 1e-9);
    assert_near(nth(r, TASK_EXPERTS, 0, 0)->start, before + load, 1e-9); /* does not wait for the second */
    assert_near(nth(r, TASK_EXPERTS, 0, 1)->start, before + 2 * load, 1e-9);
    const double began = r->machine.now;
    test_ok(pipeline_step(r, 1), &e);
    assert_near(test_metric(r, METRIC_step_s, 1), both_late + one_late, 1e-9);
    assert_near(test_metric(r, METRIC_hit_rate, 1), 0.25, 1e-12);
    const struct task *resident = nth(r, TASK_EXPERTS, 1, 0), *late = nth(r, TASK_EXPERTS, 1, 1);
    assert_int_equal(r->graph.expert[resident->first], 3);
    assert_near(resident->start - began, both_late + before + permute(c, 2), 1e-9); /* while the other loads */
    assert_int_equal(r->graph.expert[late->first], 2);
    assert_near(late->start - began, both_late + before + load, 1e-9);
    assert_int_equal(nth(r, TASK_LOAD, 1, 0)->object, 4 + 2);
    test_close_run(r);
    json_decref(spec);
}

enum { PADDED = 2048 }; /* rows of an eager layout's later experts: long enough to outlast the next layer's gate */

/* A dispatch with a task per expert, the later ones padded, that goes on to the next layer when the first has ended. */
static int eager_lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct moe_env *env = ((const struct test_env *)self)->env;
    in->exit[0] = -1;
    for (int32_t x = 0; x < env->model->n_experts; x++) {
        int64_t count = 0;
        for (int64_t i = 0; i < in->routes->n; i++)
            count += in->routes->expert[i] == x;
        if (count == 0)
            continue;
        if (in->exit[0] >= 0)
            count = PADDED;
        int32_t id = env->host->task_experts(env, g, &(struct moe_expert_work){ .stream = 1, .layer = in->layer, .n = 1,
                                                                               .expert = &x, .rows = &count,
                                                                               .fraction = 1 });
        if (id < 0 || env->host->task_after(env, g, id, in->entry[0]) < 0)
            return MOE_EFAIL;
        if (in->exit[0] < 0)
            in->exit[0] = id;
    }
    return 0;
}

static const struct moe_plugin eager_plugin = TEST_POLICY(MOE_DISPATCH, "eager", .state_size = sizeof(struct test_env),
                                                          .init = test_keep_env,
                                                          .ops.dispatch = { .lay_out = eager_lay_out });

/* Keeps what layer 0 of step 0 brings and lets everything else of that step pass; later layer 1's expert 2 takes the
 * place of layer 0's expert 1, and expert 3 that of expert 2. */
static int miser_insert(void *self, int32_t device, uint32_t object, const struct moe_access *a)
{
    (void)self, (void)device, (void)object;
    assert_near(a->bytes, 3e6, 1e-12);
    assert_int_equal(a->phase, MOE_DECODE);
    return 0;
}

static int miser_evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                       uint32_t *victim)
{
    (void)self, (void)device, (void)pinned;
    *victim = cause->expert == 2 ? 1 : 4 + 2;
    return cause->step == 0 ? MOE_BYPASS : 0;
}

static const struct moe_plugin miser_plugin = TEST_POLICY(MOE_OFFLOAD, "miser",
                                                          .ops.offload = { .insert = miser_insert,
                                                                           .evict = miser_evict });

/* Step 1: layer 0 has both its experts and computes the second while layer 1's attention and gate run, for longer than
 * those take; layer 1's first load wants its slot, and the second the slot of the first. Each waits for the last use,
 * not only for the gate and the copy stream. */
static void slots_are_free_after_their_last_use(void **state)
{
    static const uint8_t expert[8] = { 0, 1, 2, 3, 0, 1, 2, 3 };
    struct err e = { 0 };
    const struct card *c = &rtx4090;
    json_t *spec = offload_spec(*state, 2.0 / 8, expert);
    struct run *r = test_open_run(spec, &e);
    test_swap_policy(r, &r->dispatch, &eager_plugin);
    test_swap_policy(r, &r->offload, &miser_plugin);
    const double before = attention(c, 1) + gate(c, 1, 4), one = experts(c, 1, 1), padded = experts(c, 1, PADDED);
    assert_true(padded > before && load > before + one && load > one);
    test_ok(placement_start(r), &e);
    test_ok(pipeline_step(r, 0), &e);
    /* Nothing to wait for: no victims. */
    assert_near(test_metric(r, METRIC_step_s, 0), before + 4 * load + padded, 1e-9);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(nth(r, TASK_LOAD, i / 2, i % 2)->victim, NO_OBJECT);
        assert_true(nth(r, TASK_LOAD, i / 2, i % 2)->passes == (i >= 2));
    }
    test_ok(pipeline_step(r, 1), &e);
    assert_int_equal(nth(r, TASK_LOAD, 1, 0)->victim, 1);
    assert_int_equal(nth(r, TASK_LOAD, 1, 1)->victim, 6);
    assert_false(nth(r, TASK_LOAD, 1, 0)->passes || nth(r, TASK_LOAD, 1, 1)->passes);
    assert_near(test_metric(r, METRIC_hit_rate, 1), 0.5, 1e-12);
    const double began = nth(r, TASK_COMPUTE, 0, 0)->start;
    assert_near(nth(r, TASK_EXPERTS, 0, 0)->start - began, before, 1e-9);
    const double last_use = nth(r, TASK_EXPERTS, 0, 1)->end - began; /* slower for what runs beside it */
    assert_true(last_use >= (before + one + padded) * (1 - 1e-9));
    assert_near(nth(r, TASK_LOAD, 1, 0)->start - began, last_use, 1e-9);
    assert_near(nth(r, TASK_LOAD, 1, 1)->start - began, last_use + load + one, 1e-9);
    assert_near(test_metric(r, METRIC_step_s, 1), last_use + load + one + load + padded, 1e-9);
    test_close_run(r);
    json_decref(spec);
}

/* With several devices nobody knows what it needs before the slowest gate has spoken. */
static void loads_wait_for_every_gate(void **state)
{
    static const uint8_t all_zero[8] = { 0 };
    struct err e = { 0 };
    json_t *spec = test_spec(test_description("dgx-h100", 1), test_trace(*state, "zero", 2, 4, 1, 8, 1, all_zero), 1, 8,
                             1, 1, 1);
    test_policy(spec, "offload", "lru");
    test_set(spec, NULL, "cache", json_real(0.25));
    struct run *r = test_open_run(spec, &e);
    test_ok(run_go(r), &e);
    const struct task *x = nth(r, TASK_LOAD, 0, 0);
    double gates = 0;
    int n = 0;
    for (int32_t t = 0; t < r->graph.n_tasks; t++)
        if (r->graph.task[t].kind == TASK_COMPUTE && r->graph.task[t].op == MOE_OP_GATE) {
            gates = fmax(gates, r->graph.task[t].end);
            n++;
        }
    assert_int_equal(n, 8);
    assert_near(x->start, gates, 1e-9);
    assert_near(x->end - x->start, 3e6 / (63e9 * 0.85) + 2e-6, 1e-9);
    test_close_run(r);
    json_decref(spec);
}

/* The first pass that tells Belady the next uses decides as the run does, and knowing them pays. */
static void first_pass_decides_alike(void **state)
{
    struct scratch *s = *state;
    struct trace_synth p = { .n_layers = 3, .n_experts = 16, .top_k = 4, .n_requests = 10, .tokens_per_request = 30,
                             .skew = 1, .stickiness = 0.3, .affinity = 0.4, .seed = 5 };
    struct err e = { 0 };
    double lru, belady;
    test_ok(trace_synthesise(&p, scratch_path(s, "synth"), &e), &e);
    json_t *spec = test_spec(test_description("dgx-h100", 1), scratch_path(s, "synth"), 3, 16, 4, 2, 12);
    test_set(spec, NULL, "cache", json_real(0.08));
    test_policy(spec, "offload", "lru");
    uint64_t h = test_decisions(spec, &lru);
    test_policy(spec, "offload", "belady");
    assert_true(test_decisions(spec, &belady) == h);
    assert_true(belady > lru);
    json_decref(spec);
}

/* ---- what an access says of itself ---- */

/* Token t goes to expert 0 and to expert 1 + t: its gate gives the first 1/8 or 5/8, the other what is left. */
static int weigher_route(void *self, const struct moe_batch *b, const struct moe_bias *bias, struct moe_routes *out,
                         struct moe_cost *own)
{
    const struct moe_env *env = ((const struct test_env *)self)->env;
    (void)bias, (void)own;
    if (env->host->routes_reserve(env, out, 2 * b->n_tokens) < 0)
        return MOE_ENOMEM;
    out->n = 2 * b->n_tokens;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        out->offset[t + 1] = 2 * (t + 1);
        out->expert[2 * t] = 0;
        out->expert[2 * t + 1] = 1 + t;
        out->weight[2 * t] = 0.125f + 0.5f * (float)t;
        out->weight[2 * t + 1] = 1 - out->weight[2 * t];
    }
    return 0;
}

static const struct moe_plugin weigher_plugin = TEST_POLICY(MOE_ROUTER, "weigher",
                                                            .state_size = sizeof(struct test_env),
                                                            .init = test_keep_env,
                                                            .ops.router = { .route = weigher_route });

struct listener { int32_t n; struct { int32_t object, n_tokens; float score; } heard[16]; };

static int listener_insert(void *self, int32_t device, uint32_t object, const struct moe_access *a)
{
    struct listener *s = self;
    (void)device;
    assert_in_range(s->n, 0, 15);
    s->heard[s->n].object = (int32_t)object;
    s->heard[s->n].n_tokens = a->n_tokens;
    s->heard[s->n++].score = a->score;
    return MOE_BYPASS;
}

static int listener_evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                          uint32_t *victim)
{
    (void)self, (void)device, (void)cause, (void)pinned, (void)victim;
    return MOE_BYPASS;
}

static const struct moe_plugin listener_plugin = TEST_POLICY(MOE_OFFLOAD, "listener",
                                                             .state_size = sizeof(struct listener),
                                                             .ops.offload = { .insert = listener_insert,
                                                                              .evict = listener_evict });

/* Lays out a task per row, all on one stream. */
static int rows_lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct moe_env *env = ((const struct test_env *)self)->env;
    const int64_t one = 1;
    int32_t end = env->host->task_compute(env, g, &(struct moe_work){ .op = MOE_OP_COMBINE });
    for (int64_t i = 0; i < in->routes->n; i++) {
        int32_t id = env->host->task_experts(env, g, &(struct moe_expert_work){ .layer = in->layer, .n = 1,
                                                                               .expert = &in->routes->expert[i],
                                                                               .rows = &one, .fraction = 1 });
        if (env->host->task_after(env, g, id, in->entry[0]) < 0 || env->host->task_after(env, g, end, id) < 0)
            return MOE_EFAIL;
    }
    in->exit[0] = end;
    return 0;
}

static const struct moe_plugin rows_plugin = TEST_POLICY(MOE_DISPATCH, "rows", .state_size = sizeof(struct test_env),
                                                         .init = test_keep_env,
                                                         .ops.dispatch = { .lay_out = rows_lay_out });

static json_t *pair_spec(struct scratch *s, int layers, int k, const uint8_t *expert)
{
    json_t *spec = test_spec(test_description("rtx4090-pcie4", 1), test_trace(s, "pair", 2, 1, layers, 4, k, expert),
                             layers, 4, k, 2, 1);
    test_policy(spec, "offload", "lru");
    test_set(spec, NULL, "cache", json_real(0.75));
    return spec;
}

/* Sums over the rows that an access serves; a layout that takes an expert's rows one by one names none of them. */
static void scores_are_sums_of_gate_weights(void **state)
{
    static const uint8_t any[8] = { 0, 1, 0, 1, 0, 1, 0, 1 };
    json_t *spec = pair_spec(*state, 2, 2, any);
    for (int cut = 0; cut < 2; cut++) {
        struct err e = { 0 };
        struct run *r = test_open_run(spec, &e);
        test_swap_policy(r, &r->router, &weigher_plugin);
        test_swap_policy(r, &r->offload, &listener_plugin);
        if (cut)
            test_swap_policy(r, &r->dispatch, &rows_plugin);
        test_ok(run_go(r), &e);
        const struct listener *s = r->offload.self;
        double sum[8] = { 0 };
        for (int32_t i = 0; i < s->n; i++) {
            sum[s->heard[i].object] += (double)s->heard[i].score;
            assert_int_equal(s->heard[i].n_tokens, !cut && s->heard[i].object % 4 == 0 ? 2 : 1);
        }
        assert_int_equal(s->n, cut ? 8 : 6);
        for (int layer = 0; layer < 2; layer++) {
            assert_near(sum[4 * layer], 0.125 + 0.625, 1e-6);
            assert_near(sum[4 * layer + 1], 0.875, 1e-6);
            assert_near(sum[4 * layer + 2], 0.375, 1e-6);
            assert_near(sum[4 * layer + 3], 0, 0);
        }
        test_close_run(r);
    }
    json_decref(spec);
}

/* The second row finds the expert in the cache, but its weights are still on their way. */
static void hits_wait_for_weights_on_their_way(void **state)
{
    static const uint8_t zero[2] = { 0 };
    struct err e = { 0 };
    json_t *spec = pair_spec(*state, 1, 1, zero);
    struct run *r = test_open_run(spec, &e);
    test_swap_policy(r, &r->dispatch, &rows_plugin);
    test_ok(run_go(r), &e);
    assert_near(test_metric(r, METRIC_hit_rate, 0), 0.5, 1e-12);
    assert_near(test_metric(r, METRIC_loaded_bytes, 0), 3e6, 1e-12);
    const struct task *x = nth(r, TASK_LOAD, 0, 0);
    assert_true(x->end - x->start > 0.9 * load);
    for (int i = 0; i < 2; i++)
        assert_true(nth(r, TASK_EXPERTS, 0, i)->start >= x->end);
    test_close_run(r);
    json_decref(spec);
}

#define WITH_SCRATCH(test) cmocka_unit_test_setup_teardown(test, scratch_make, scratch_remove)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SCRATCH(loads_in_turn_residents_at_once),
        WITH_SCRATCH(slots_are_free_after_their_last_use),
        WITH_SCRATCH(loads_wait_for_every_gate),
        WITH_SCRATCH(first_pass_decides_alike),
        WITH_SCRATCH(scores_are_sums_of_gate_weights),
        WITH_SCRATCH(hits_wait_for_weights_on_their_way),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
