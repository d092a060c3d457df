/* SPDX-License-Identifier: Apache-2.0
 * test_metrics.c - the bound against what was run, and the summary of a run. */
#include "core_test.h"

static uint64_t draw(uint64_t *s)
{
    return moe_mix(*s += UINT64_C(0x9E3779B97F4A7C15));
}

/* A layer as dispatch "flat" lays it out: attention - permute - exchange - experts - exchange - combine, with the
 * experts in `chunks` tasks one after another. Rows from s to d: rows(s, d); every device has as many tokens. */
static void flat_layer(struct moe_graph *g, int32_t n, int chunks, int64_t (*rows)(uint64_t *, int32_t, int32_t),
                       uint64_t *seed, int32_t *entry)
{
    struct err e = { 0 };
    struct moe_part *there = malloc(sizeof *there * (size_t)(n * n)), *back = malloc(sizeof *back * (size_t)(n * n));
    int64_t *into = calloc((size_t)n, sizeof *into);
    int n_parts = 0;
    for (int32_t s = 0; s < n; s++)
        for (int32_t d = 0; d < n; d++) {
            int64_t r = rows(seed, s, d);
            if (r == 0)
                continue;
            into[d] += r;
            there[n_parts] = (struct moe_part){ s, d, s == d ? 0 : (double)r * 7168, 0, NULL, 0 };
            back[n_parts++] = (struct moe_part){ d, s, s == d ? 0 : (double)r * 7168 * 2, 0, NULL, 0 };
        }
    int32_t out = test_parts(g, n_parts, there), home = test_parts(g, n_parts, back);
    for (int32_t d = 0; d < n; d++) {
        struct moe_work attention = { d, 0, MOE_OP_ATTENTION, 1e9, 1e7, false };
        struct moe_work permute = { d, 0, MOE_OP_PERMUTE, 0, 4e6, false };
        struct moe_work combine = { d, 0, MOE_OP_COMBINE, 1e6, 4e6, false };
        int32_t a = graph_compute(g, &attention, &e), p = graph_compute(g, &permute, &e), c;
        if (entry[d] >= 0)
            test_after(g, a, entry[d]);
        test_after(g, p, a);
        test_after(g, out, p);
        if (into[d] > 0) {
            int32_t last = test_arrival(g, out, d);
            for (int i = 0; i < chunks; i++) {
                int64_t part = into[d] * (i + 1) / chunks - into[d] * i / chunks;
                int32_t x = graph_experts(g, &(struct moe_expert_work){ .device = d, .layer = g->layer, .n = 1,
                                                                        .expert = (int32_t[]){ 0 }, .rows = &part,
                                                                        .fraction = 1 }, &e);
                test_after(g, x, last);
                last = x;
            }
            test_after(g, home, last);
        }
        c = graph_compute(g, &combine, &e);
        test_after(g, c, test_arrival(g, home, d));
        entry[d] = c;
    }
    free(there);
    free(back);
    free(into);
}

static int64_t any_rows(uint64_t *seed, int32_t s, int32_t d)
{
    (void)s;
    uint64_t hot = moe_mix((uint64_t)d) % 5 == 0 ? 40 : 4;
    return draw(seed) % 3 ? (int64_t)(draw(seed) % (hot * 20)) : 0;
}

static int64_t equal_rows(uint64_t *seed, int32_t s, int32_t d)
{
    (void)seed, (void)s, (void)d;
    return 32;
}

static void lay_out(struct moe_graph *g, const struct topology *t, int layers, int chunks,
                    int64_t (*rows)(uint64_t *, int32_t, int32_t), uint64_t seed)
{
    int32_t entry[t->n_devices];
    graph_reset(g);
    g->n_devices = t->n_devices;
    for (int32_t d = 0; d < t->n_devices; d++)
        entry[d] = -1;
    for (g->layer = 0; g->layer < layers; g->layer++)
        flat_layer(g, t->n_devices, chunks, rows, &seed, entry);
}

static void bound_is_below_the_run(void **state)
{
    (void)state;
    static const struct { const char *name; int nodes; } machines[] = {
        { "star-50GBps", 8 }, { "dgx-h100", 1 }, { "dgx-h100", 2 }, { "h800-ib", 2 }, { "dgx-a100", 3 },
    };
    struct moe_graph g = { 0 };
    struct err e = { 0 };
    for (size_t i = 0; i < sizeof machines / sizeof *machines; i++) {
        struct topology *t = test_machine(machines[i].name, machines[i].nodes);
        for (uint64_t seed = 0; seed < 24; seed++) {
            double bound = NAN;
            lay_out(&g, t, 1 + (int)(seed % 3), 1 + (int)(seed / 2 % 4), any_rows, seed);
            double time = test_run_graph(t, seed % 2 ? NET_EXACT : NET_BOUND, &g);
            test_ok(metrics_bound(&g, t, &bound, &e), &e);
            if (!(bound > 0 && bound <= time))
                fail_msg("%s, seed %d: bound %.12g, run %.12g", machines[i].name, (int)seed, bound, time);
        }
        topology_free(t);
    }
    graph_free(&g);
}

/* With nothing uneven, no latency and no start-up there is nothing to gain. */
static void bound_is_reached_by_even_work(void **state)
{
    (void)state;
    json_t *star = test_description("star-50GBps", 8), *dgx = test_description("dgx-h100", 1);
    json_object_set_new(json_object_get(star, "nic"), "latency", json_string("0 s"));
    json_object_set_new(json_object_get(dgx, "nvlink"), "latency", json_string("0 s"));
    json_object_del(dgx, "exchange");
    struct topology *machine[] = { test_build(star), test_build(dgx) };
    struct moe_graph g = { 0 };
    struct err e = { 0 };
    for (int i = 0; i < 2; i++)
        for (enum net_tier tier = NET_BOUND; tier <= NET_EXACT; tier++) {
            double bound = NAN;
            for (int chunks = 1; chunks <= 2; chunks++) {
                lay_out(&g, machine[i], 3, chunks, equal_rows, 0);
                double time = test_run_graph(machine[i], tier, &g);
                test_ok(metrics_bound(&g, machine[i], &bound, &e), &e);
                assert_near(bound, time, 1e-9);
            }
        }
    graph_free(&g);
    topology_free(machine[0]);
    topology_free(machine[1]);
}

/* One step's figures read off a graph of two tasks, one exchange and one load. */
static void step_figures(void **state)
{
    (void)state;
    struct topology *t = test_links_alone("dgx-h100", 2);
    struct moe_graph g = { .n_devices = 16 };
    struct metrics m = { .imbalance_sum = 3, .accesses = 10, .hits = 4,
                         .loaded_bytes = 6e6, .routing = { .max_vio = 1, .cv = 3, .gini = 0.5, .entropy = 1.5,
                             .fluctuation = 0.25, .n_fluctuation = 1, .max_vio_global = 0.125, .n_layers = 2,
                             .tokens = 40, .flops = 2000, .chosen = 100, .dropped = 25, .added = 5, .computed = 80,
                             .compared = 50, .agreed = 45, .left_out = 20, .skips = true } };
    struct err e = { 0 };
    struct moe_work attention = { 3, 0, MOE_OP_ATTENTION, 0, test_h100_bytes(10 * US), false };
    graph_compute(&g, &attention, &e);
    attention.device = 4;
    attention.bytes = test_h100_bytes(30 * US);
    graph_compute(&g, &attention, &e);
    /* 0 -> 8 over NICs: 50 kB, 1 us, 2 us of latency; 0 -> 1 over NVLink is over before. */
    test_parts(&g, 3, (struct moe_part[]){ { 0, 8, 50e3, 0, NULL, 0 }, { 0, 1, 36e3, 0, NULL, 0 },
                                           { 2, 2, 0, 0, NULL, 0 } });
    /* Beside it, elsewhere, half as long: under way at the same time, so it counts once. */
    graph_exchange(&g, &(struct moe_exchange){ MOE_PAY_BYTES, 1, &(struct moe_part){ 1, 9, 25e3, 0, NULL, 0 } }, &e);
    /* Weights have a figure of their own. */
    int32_t moved = graph_exchange(&g, &(struct moe_exchange){ MOE_PAY_BYTES, 1,
                                                               &(struct moe_part){ 4, 12, 100e3, 0, NULL, 0 } }, &e);
    g.task[moved].moves_weights = true;
    graph_load(&g, 5, topology_host(t, 0), 0, 63e9 * 0.85 * 10 * US, &e);
    graph_load(&g, 6, topology_host(t, 0), 0, 63e9 * 0.85 * 5 * US, &e); /* beside it: the longest counts */
    double seconds = test_run_graph(t, NET_EXACT, &g);
    test_ok(metrics_step(&m, &g, t, 300, seconds, 0, &e), &e);
    assert_int_equal(m.n_steps, 1);
#define FIGURE(name, expected) assert_near(m.value[METRIC_##name][0], expected, 1e-9)
    FIGURE(step_s, 30 * US);
    FIGURE(tokens_per_s, 300 / (30 * US));
    FIGURE(attention_s, 30 * US);
    FIGURE(a2a_s, 3 * US);
    FIGURE(dispatch_s, 3 * US);
    FIGURE(combine_s, 0);
    FIGURE(load_s, 12 * US);
    FIGURE(migration_s, 4 * US);
    FIGURE(experts_s, 0);
    FIGURE(imbalance, 1.5);
    FIGURE(max_vio, 0.5);
    FIGURE(max_vio_global, 0.125);
    FIGURE(load_cv, 1.5);
    FIGURE(load_gini, 0.25);
    FIGURE(load_entropy, 0.75);
    FIGURE(fluctuation, 0.25);
    FIGURE(routes, 100);
    FIGURE(dropped, 0.25);
    FIGURE(added, 0.05);
    FIGURE(experts_per_token, 2);
    FIGURE(skipped, 0.25); /* 20 of two halves of 40 tokens */
    FIGURE(agreement, 0.9);
    FIGURE(flops_per_token, 100); /* 2000 of 20 tokens */
    FIGURE(hit_rate, 0.4);
    FIGURE(loaded_bytes, 6e6);
    FIGURE(intra_node_bytes, 36e3);
    FIGURE(inter_node_bytes, 175e3);
    FIGURE(bound_s, 40.0 / 16 * US); /* attention spread over 16 devices takes longest; loads count nothing */
#undef FIGURE
    assert_int_equal(m.accesses, 10);
    test_ok(metrics_end_step(&m, 0, &e), &e);
    assert_int_equal(m.accesses, 0); /* counted anew in the next step */
    test_ok(metrics_step(&m, &g, t, 300, seconds, 6, &e), &e);
    assert_true(isnan(m.value[METRIC_energy_j][0]) && isnan(m.value[METRIC_j_per_token][0]));
    assert_true(isnan(m.value[METRIC_max_vio_global][1]) && isnan(m.value[METRIC_agreement][1]));
    assert_near(m.value[METRIC_energy_j][1], 6, 0);
    assert_near(m.value[METRIC_j_per_token][1], 0.02, 1e-12);
    assert_true(isnan(m.value[METRIC_hit_rate][1]) && isnan(m.value[METRIC_dropped][1]));
    metrics_free(&m);
    graph_free(&g);
    topology_free(t);
}

/* A step that was run four times more: the first does not count, of the others the median stays. 6, 7, 9 and 10 us have
 * it at 8 and quartiles at 6.75 and 9.25. */
static void medians(void **state)
{
    (void)state;
    static const double us[] = { 100, 10, 7, 9, 6 };
    struct topology *t = test_machine("dgx-h100", 1);
    struct moe_graph g = { .n_devices = 8 };
    struct metrics m = { .routing = { .chosen = 4 } };
    struct err e = { 0 };
    test_compute(&g, 0, 0, 5 * US);
    test_run_graph(t, NET_EXACT, &g);
    for (int step = 0; step < 2; step++) {
        for (int i = 0; i < 5; i++)
            test_ok(metrics_step(&m, &g, t, 8, (1 + step) * us[i] * US, 0, &e), &e);
        test_ok(metrics_end_step(&m, 4, &e), &e);
    }
    assert_int_equal(m.n_steps, 2);
    assert_near(m.value[METRIC_step_s][0], 8 * US, 1e-12);
    assert_near(m.value[METRIC_step_s][1], 16 * US, 1e-12);
    assert_near(m.value[METRIC_routes][0], 4, 0);
    assert_true(isnan(m.value[METRIC_routes][1]) && isnan(m.value[METRIC_load_s][0]));
    json_t *all = metrics_json(&m);
    const json_t *figures = json_object_get(all, "step_s");
    assert_near(json_number_value(json_object_get(figures, "spread")), 2.5 / 8, 1e-12);
    assert_near(json_number_value(json_object_get(figures, "mean")), 12 * US, 1e-12);
    assert_near(json_number_value(json_object_get(json_object_get(all, "attention_s"), "spread")), 0, 0);
    json_decref(all);
    metrics_free(&m);
    graph_free(&g);
    topology_free(t);
}

static double summary(const json_t *all, const char *metric, const char *what)
{
    json_t *v = json_object_get(json_object_get(all, metric), what);
    assert_non_null(v);
    return json_number_value(v);
}

static void summary_of_steps(void **state)
{
    (void)state;
    enum { N = 4 };
    struct metrics m = { .n_steps = N, .room = N };
    for (int i = 0; i < N_METRICS; i++) {
        m.value[i] = malloc(sizeof *m.value[i] * N);
        for (int s = 0; s < N; s++)
            m.value[i][s] = NAN;
    }
    const double step[N] = { 4, 1, 3, 2 }, tokens = 60, hit[N] = { 0.5, NAN, 1, 0 }, accesses[N] = { 10, NAN, 4, 1 };
    const double bound[N] = { 1, 1, 3, 2 }, joules[N] = { 3, 5, NAN, 4 }, each[N] = { 1, 0.5, NAN, 2 };
    for (int s = 0; s < N; s++) {
        m.value[METRIC_step_s][s] = step[s];
        m.value[METRIC_tokens_per_s][s] = tokens / step[s];
        m.value[METRIC_hit_rate][s] = hit[s];
        m.value[METRIC_accesses][s] = accesses[s];
        m.value[METRIC_bound_s][s] = bound[s];
        m.value[METRIC_over_bound][s] = step[s] / bound[s];
        m.value[METRIC_energy_j][s] = joules[s];
        m.value[METRIC_j_per_token][s] = each[s];
    }
    json_t *all = metrics_json(&m);
    assert_near(summary(all, "step_s", "mean"), 2.5, 1e-12);
    assert_near(summary(all, "step_s", "p50"), 2.5, 1e-12); /* halfway between 2 and 3 */
    assert_near(summary(all, "step_s", "p99"), 3.97, 1e-12);
    assert_near(summary(all, "step_s", "min"), 1, 0);
    assert_near(summary(all, "step_s", "max"), 4, 0);
    assert_near(summary(all, "tokens_per_s", "mean"), 4 * tokens / 10, 1e-12); /* all tokens / all time */
    assert_near(summary(all, "tokens_per_s", "max"), 60, 1e-12);
    assert_near(summary(all, "hit_rate", "mean"), 9.0 / 15, 1e-12); /* all hits / all accesses */
    assert_near(summary(all, "over_bound", "mean"), 10.0 / 7, 1e-12); /* all time / all bounds */
    assert_near(summary(all, "energy_j", "mean"), 4, 1e-12);
    assert_near(summary(all, "j_per_token", "mean"), 12.0 / 15, 1e-12); /* all joules / 3 + 10 + 2 tokens */
    assert_near(summary(all, "hit_rate", "p50"), 0.5, 1e-12);       /* of the steps that had any */
    assert_null(json_object_get(all, "migration_s"));               /* never applied */
    json_decref(all);
    metrics_free(&m);

    m = (struct metrics){ 0 }; /* a run without steps has no figures */
    all = metrics_json(&m);
    assert_int_equal(json_object_size(all), 0);
    json_decref(all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bound_is_below_the_run),
        cmocka_unit_test(bound_is_reached_by_even_work),
        cmocka_unit_test(step_figures),
        cmocka_unit_test(summary_of_steps),
        cmocka_unit_test(medians),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
