/* SPDX-License-Identifier: Apache-2.0
 * test_offload.c - weights that are not there: loads one after another, experts that start when theirs have come, slots
 * that are free when their last user has ended; and the first pass that knows the next uses. Times by hand. */
#include "core_test.h"

static const struct card rtx4090 = { 330.3e12 * 0.75, 1.008e12 * 0.86 };

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

enum { PADDED = 512 }; /* rows of an eager layout's later experts: long enough to outlast the next layer's gate */

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
    (void)self, (void)device, (void)object, (void)a;
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
    test_ok(pipeline_step(r, 1), &e);
    assert_near(test_metric(r, METRIC_hit_rate, 1), 0.5, 1e-12);
    const double began = nth(r, TASK_COMPUTE, 0, 0)->start;
    assert_near(nth(r, TASK_EXPERTS, 0, 0)->start - began, before, 1e-9);
    assert_near(nth(r, TASK_LOAD, 1, 0)->start - began, before + one + padded, 1e-9);
    assert_near(nth(r, TASK_LOAD, 1, 1)->start - began, before + one + padded + load + one, 1e-9);
    assert_near(test_metric(r, METRIC_step_s, 1), before + one + padded + load + one + load + padded, 1e-9);
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

#define WITH_SCRATCH(test) cmocka_unit_test_setup_teardown(test, scratch_make, scratch_remove)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SCRATCH(loads_in_turn_residents_at_once),
        WITH_SCRATCH(slots_are_free_after_their_last_use),
        WITH_SCRATCH(loads_wait_for_every_gate),
        WITH_SCRATCH(first_pass_decides_alike),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
