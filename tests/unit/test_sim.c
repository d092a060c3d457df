/* SPDX-License-Identifier: Apache-2.0
 * test_sim.c - the executor under its virtual clock: times worked out by hand, and what holds for any graph.
 *
 * star-50GBps: 50 kB take 1 us over a device's NIC, each way on its own; 0.5 us of latency per transfer. Compute tasks
 * last what test_compute() is asked for. */
#include "core_test.h"

#define KB_PER_US 50e3
#define TIERS(t) for (enum net_tier t = NET_BOUND; t <= NET_EXACT; t++)

static int open_star(void **state)
{
    *state = test_machine("star-50GBps", 8);
    return 0;
}

static int close_topology(void **state)
{
    topology_free(*state);
    return 0;
}

#define assert_task(g, id, start_us, end_us)                                                                          \
    do {                                                                                                              \
        assert_near((g)->task[id].start, (start_us) * US, 1e-9);                                                      \
        assert_near((g)->task[id].end, (end_us) * US, 1e-9);                                                          \
    } while (0)

static void one_stream_serialises(void **state)
{
    struct moe_graph g = { .n_devices = 8 };
    int32_t a = test_compute(&g, 0, 0, 10 * US), b = test_compute(&g, 0, 0, 20 * US);
    assert_near(test_run_graph(*state, NET_EXACT, &g), 30 * US, 1e-9);
    assert_task(&g, a, 0, 10); /* both ready at 0: the lower id goes first */
    assert_task(&g, b, 10, 30);
    graph_free(&g);
}

static void ready_order_beats_id(void **state)
{
    struct moe_graph g = { .n_devices = 8 };
    /* While `busy` holds stream 0 until 20, `late` becomes ready at 8 and `early`, of a higher id, at 5. */
    int32_t busy = test_compute(&g, 0, 0, 20 * US), late = test_compute(&g, 0, 0, 10 * US);
    int32_t early = test_compute(&g, 0, 0, 10 * US);
    int32_t five = test_compute(&g, 1, 0, 5 * US), eight = test_compute(&g, 2, 0, 8 * US);
    test_after(&g, late, eight);
    test_after(&g, early, five);
    test_run_graph(*state, NET_EXACT, &g);
    assert_task(&g, busy, 0, 20);
    assert_task(&g, early, 20, 30);
    assert_task(&g, late, 30, 40);
    graph_free(&g);
}

/* Each kernel alone keeps the memory of its device busy for 7.5 of 10 us: three at once take 2.25 times as long. */
static void streams_share_a_device(void **state)
{
    struct moe_graph g = { .n_devices = 8 };
    for (int d = 0; d < 2; d++)
        for (int s = 0; s < 3; s++)
            test_compute(&g, d, s, 10 * US);
    assert_near(test_run_graph(*state, NET_EXACT, &g), 22.5 * US, 1e-9);
    for (int32_t i = 0; i < g.n_tasks; i++)
        assert_task(&g, i, 0, 22.5);
    graph_free(&g);
}

/* Two senders of unequal length: the exchange leaves at 20. 0 -> 1 takes 10 us, 2 -> 3 20 us, latency on top; device 4
 * gets nothing and passes when the exchange starts; so does device 0, which only keeps what is its own, for nothing. */
static void exchange(void **state)
{
    TIERS(tier) {
        struct moe_graph g = { .n_devices = 8 };
        int32_t a = test_compute(&g, 0, 0, 10 * US), b = test_compute(&g, 2, 0, 20 * US);
        int32_t x = test_parts(&g, 3, (struct moe_part[]){ { 0, 1, 10 * KB_PER_US, 0, NULL, 0 },
                                                           { 2, 3, 20 * KB_PER_US, 0, NULL, 0 },
                                                           { 0, 0, 1e12, 0, NULL, 0 } });
        int32_t first = test_arrival(&g, x, 1), second = test_arrival(&g, x, 3);
        int32_t own = test_arrival(&g, x, 0), none = test_arrival(&g, x, 4), again = test_arrival(&g, x, 1);
        int32_t after_none = test_compute(&g, 4, 0, 10 * US), after_first = test_compute(&g, 1, 0, 10 * US);
        int32_t after_all = test_compute(&g, 5, 0, 10 * US);
        test_after(&g, x, a);
        test_after(&g, x, b);
        test_after(&g, after_none, none);
        test_after(&g, after_first, first);
        test_after(&g, after_all, x);
        assert_near(test_run_graph(*state, tier, &g), 50.5 * US, 1e-9);
        assert_task(&g, x, 20, 40.5);
        assert_task(&g, first, 20, 30.5);
        assert_task(&g, again, 20, 30.5);
        assert_task(&g, second, 20, 40.5);
        assert_task(&g, own, 20, 20);
        assert_task(&g, none, 20, 20);
        assert_task(&g, after_none, 20, 30);
        assert_task(&g, after_first, 30.5, 40.5);
        assert_task(&g, after_all, 40.5, 50.5);
        assert_near(g.task[x].bytes, 30 * KB_PER_US, 1e-12); /* what stays is not carried */
        graph_free(&g);
    }
}

/* 0 -> 2 and 1 -> 2 in two exchanges share the way into 2: 10 us of bytes each take 20 together. */
static void exchanges_share_links(void **state)
{
    TIERS(tier) {
        struct moe_graph g = { .n_devices = 8 };
        int32_t x = test_parts(&g, 1, &(struct moe_part){ 0, 2, 10 * KB_PER_US, 0, NULL, 0 });
        int32_t y = test_parts(&g, 1, &(struct moe_part){ 1, 2, 10 * KB_PER_US, 0, NULL, 0 });
        int32_t z = test_parts(&g, 1, &(struct moe_part){ 3, 4, 10 * KB_PER_US, 0, NULL, 0 });
        test_run_graph(*state, tier, &g);
        assert_task(&g, x, 0, 20.5);
        assert_task(&g, y, 0, 20.5);
        assert_task(&g, z, 0, 10.5); /* nothing in common with the others */
        graph_free(&g);
    }
}

/* The second exchange starts in the middle of the first: it has half the link until the first ends. First: 5 us alone,
 * then 5 us of bytes at half speed, ends at 15. Second: 5 us of its 10 gone by then, the rest alone, ends at 20. */
static void exchange_joins_another(void **state)
{
    for (enum net_tier tier = NET_FLOW; tier <= NET_EXACT; tier++) {
        struct moe_graph g = { .n_devices = 8 };
        int32_t first = test_parts(&g, 1, &(struct moe_part){ 0, 2, 10 * KB_PER_US, 0, NULL, 0 });
        int32_t wait = test_compute(&g, 1, 0, 5 * US);
        int32_t second = test_parts(&g, 1, &(struct moe_part){ 1, 2, 10 * KB_PER_US, 0, NULL, 0 });
        test_after(&g, second, wait);
        test_run_graph(*state, tier, &g);
        assert_task(&g, first, 0, 15.5);
        assert_task(&g, second, 5, 20.5);
        graph_free(&g);
    }
}

static void joins_and_empty_exchanges_end_at_once(void **state)
{
    struct moe_graph g = { .n_devices = 8 };
    struct err e = { 0 };
    /* A root that ends when it starts must not start what follows twice. */
    int32_t root = graph_join(&g, &e), work = test_compute(&g, 0, 0, 10 * US), longer = test_compute(&g, 1, 0, 20 * US);
    int32_t both = graph_join(&g, &e), nothing = test_parts(&g, 0, NULL), there = test_arrival(&g, nothing, 3);
    int32_t last = test_compute(&g, 3, 0, 10 * US);
    test_after(&g, work, root);
    test_after(&g, both, work);
    test_after(&g, both, longer);
    test_after(&g, nothing, both);
    test_after(&g, last, there);
    assert_near(test_run_graph(*state, NET_EXACT, &g), 30 * US, 1e-9);
    assert_task(&g, work, 0, 10);
    assert_task(&g, both, 20, 20);
    assert_task(&g, nothing, 20, 20);
    assert_task(&g, there, 20, 20);
    assert_task(&g, last, 20, 30);
    graph_free(&g);
}

/* PCIe of a DGX H100: 63e9 B/s at 0.85, 2 us. Loads of one device queue; those of two go side by side, because the
 * node's memory (614.4e9 B/s) is wider than two links. Computing overlaps with loading. */
static void loads_queue_on_the_copy_stream(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 1);
    TIERS(tier) {
        struct moe_graph g = { .n_devices = 8 };
        struct err e = { 0 };
        const double bytes = 63e9 * 0.85 * 10 * US;
        int32_t host = topology_host(t, 0);
        int32_t first = graph_load(&g, 0, host, 1, bytes, &e), second = graph_load(&g, 0, host, 2, bytes, &e);
        int32_t other = graph_load(&g, 1, host, 3, bytes, &e), work = test_compute(&g, 0, 0, 10 * US);
        int32_t late = test_compute(&g, 0, 0, 10 * US);
        test_after(&g, late, second);
        test_run_graph(t, tier, &g);
        assert_task(&g, first, 0, 12);
        assert_task(&g, second, 12, 24);
        assert_task(&g, other, 0, 12);
        assert_task(&g, work, 0, 10);
        assert_task(&g, late, 24, 34);
        graph_free(&g);
    }
    topology_free(t);
}

/* 64 and 16 rows of test_model's experts on an H100 in bf16: 64 and 64 rows are added where tiles are not full, 60% of
 * 989.4e12 FLOP/s reached; memory does not bind: 2 x 3e6 B of weights and 80 rows take 2 us. A half-width shard of the
 * same takes half the arithmetic. */
static void experts_take_their_gemms(void **state)
{
    struct moe_graph g = { .n_devices = 8 };
    struct err e = { 0 };
    const int32_t expert[] = { 1, 3 };
    const int64_t rows[] = { 640, 160 };
    struct moe_expert_work w = { .device = 4, .n = 2, .expert = expert, .rows = rows, .fraction = 1 };
    int32_t whole = graph_experts(&g, &w, &e);
    w.fraction = 0.5;
    int32_t half = graph_experts(&g, &w, &e);
    w.n = 0;
    int32_t none = graph_experts(&g, &w, &e);
    test_ok(whole | half | none, &e);
    test_run_graph(*state, NET_BOUND, &g);
    const struct device_spec *d = &((const struct topology *)*state)->device[4];
    const double halves[] = { 0.5, 0.5 };
    double took = compute_experts(d, PREC_BF16, &test_model, 2, rows, NULL);
    assert_task(&g, whole, 0, took / US);
    assert_near(g.task[half].end - g.task[half].start, compute_experts(d, PREC_BF16, &test_model, 2, rows, halves),
                1e-9);
    assert_near(g.task[none].end - g.task[none].start, 0, 1e-9);
    graph_free(&g);
}

/* ---- whatever the graph ---- */

static uint64_t draw(uint64_t *s)
{
    return moe_mix(*s += UINT64_C(0x9E3779B97F4A7C15));
}

/* Edges go from lower ids to higher ones, arrivals follow their exchange: no cycle. */
static void random_graph(struct moe_graph *g, const struct topology *t, uint64_t seed)
{
    struct err e = { 0 };
    graph_reset(g);
    g->n_devices = t->n_devices;
    uint64_t s = seed, n_devices = (uint64_t)t->n_devices;
    for (int i = 0; i < 120; i++) {
        int32_t id;
        switch (draw(&s) % 8) {
        case 0: {
            struct moe_part part[24];
            int n = (int)(draw(&s) % 24);
            for (int p = 0; p < n; p++)
                part[p] = (struct moe_part){ (int32_t)(draw(&s) % n_devices), (int32_t)(draw(&s) % n_devices),
                                             draw(&s) % 4 ? (double)(draw(&s) % 4000000) : 0, 0, NULL, 0 };
            id = test_parts(g, n, part);
            for (uint64_t k = draw(&s) % 6; k > 0; k--)
                test_arrival(g, id, (int32_t)(draw(&s) % n_devices));
            break;
        }
        case 1:
            id = graph_join(g, &e);
            break;
        case 2:
            id = graph_load(g, (int32_t)(draw(&s) % n_devices), topology_host(t, 0), 0, 0, &e);
            g->task[id].source = topology_host(t, t->node[g->task[id].device]);
            g->task[id].bytes = (double)(draw(&s) % 1000000);
            break;
        default:
            id = test_compute(g, (int32_t)(draw(&s) % n_devices), (int32_t)(draw(&s) % 3),
                              (2.5 + (double)(draw(&s) % 20)) * US);
        }
        for (uint64_t k = id > 0 ? draw(&s) % 4 : 0; k > 0; k--)
            test_after(g, id, (int32_t)(draw(&s) % (uint64_t)id));
    }
}

static void check_times(const struct moe_graph *g, double end)
{
    double last = 0;
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const struct task *t = &g->task[i];
        assert_true(t->start >= 0 && t->end >= t->start && t->end <= end);
        last = fmax(last, t->end);
        if (t->kind == TASK_ARRIVAL) {
            assert_true(t->start == g->task[t->exchange].start && t->end <= g->task[t->exchange].end);
            continue;
        }
        for (int32_t j = 0; j < i; j++) { /* one at a time on a stream */
            const struct task *o = &g->task[j];
            bool queued = t->kind == TASK_COMPUTE || t->kind == TASK_LOAD;
            if (queued && o->kind == t->kind && o->device == t->device && o->stream == t->stream)
                assert_true(o->end <= t->start || t->end <= o->start);
        }
    }
    for (int64_t i = 0; i < g->n_edges; i++)
        assert_true(g->task[g->edge[i].task].start >= g->task[g->edge[i].before].end);
    assert_true(last == end);
}

static void any_graph(void **state)
{
    (void)state;
    struct topology *t = test_machine("dgx-h100", 2);
    struct moe_graph g = { 0 };
    TIERS(tier)
    for (uint64_t seed = 0; seed < 60; seed++) {
        random_graph(&g, t, seed);
        double end = test_run_graph(t, tier, &g);
        check_times(&g, end);
        struct task *once = malloc(sizeof *once * (size_t)g.n_tasks);
        memcpy(once, g.task, sizeof *once * (size_t)g.n_tasks);
        for (int32_t i = 0; i < g.n_tasks; i++)
            g.task[i].start = g.task[i].end = -1;
        assert_true(test_run_graph(t, tier, &g) == end);
        for (int32_t i = 0; i < g.n_tasks; i++)
            assert_true(g.task[i].start == once[i].start && g.task[i].end == once[i].end);
        free(once);
    }
    graph_free(&g);
    topology_free(t);
}

/* A machine's clock goes on from graph to graph. */
static void clock_goes_on(void **state)
{
    struct moe_graph g = { .n_devices = 8 };
    struct err e = { 0 };
    struct machine m;
    int32_t x = test_parts(&g, 1, &(struct moe_part){ 0, 1, 10 * KB_PER_US, 0, NULL, 0 });
    int32_t there = test_arrival(&g, x, 1), work = test_compute(&g, 1, 0, 10 * US);
    test_after(&g, work, there);
    test_ok(machine_open_sim(&m, *state, &test_model, PREC_BF16, NET_EXACT, &e), &e);
    for (int i = 0; i < 3; i++) {
        test_ok(machine_run(&m, &g, &e), &e);
        assert_task(&g, work, i * 20.5 + 10.5, i * 20.5 + 20.5);
    }
    machine_close(&m);
    graph_free(&g);
}

/* A kernel of 97.5 us of arithmetic and 2.5 us of launch, beside an exchange of 50.5 us that takes 33 of 132 SMs if it
 * is a collective: three quarters of the arithmetic for a kernel that wants 0.975 of it. */
static void collectives_take_sms(void **state)
{
    (void)state;
    json_t *d = test_description("star-50GBps", 2);
    json_object_set_new(d, "exchange", json_pack("{s:s, s:i, s:s}", "startup", "0 s", "collective_sms", 33, "source",
                                                 "a test"));
    struct topology *t = test_build(d);
    struct err e = { 0 };
    for (int collective = 0; collective < 2; collective++) {
        struct moe_graph g = { .n_devices = 2 };
        test_ok(graph_compute(&g, &(struct moe_work){ .op = MOE_OP_OTHER, .flops = 97.5 * US * 989.4e12 * 0.60 }, &e),
                &e);
        const int32_t x = test_parts(&g, 1, &(struct moe_part){ .src = 0, .dst = 1, .bytes = 2.5e6 });
        g.task[x].collective = collective;
        const double slower = 0.975 / 0.75, expected = collective ? 50.5 + 100 - 50.5 / slower : 100;
        for (int tier = NET_BOUND; tier <= NET_EXACT; tier++)
            assert_near(test_run_graph(t, (enum net_tier)tier, &g), expected * US, 1e-9);
        graph_free(&g);
    }
    topology_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(collectives_take_sms),
        cmocka_unit_test(one_stream_serialises),
        cmocka_unit_test(ready_order_beats_id),
        cmocka_unit_test(streams_share_a_device),
        cmocka_unit_test(exchange),
        cmocka_unit_test(exchanges_share_links),
        cmocka_unit_test(exchange_joins_another),
        cmocka_unit_test(joins_and_empty_exchanges_end_at_once),
        cmocka_unit_test(loads_queue_on_the_copy_stream),
        cmocka_unit_test(experts_take_their_gemms),
        cmocka_unit_test(any_graph),
        cmocka_unit_test(clock_goes_on),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, open_star, close_topology);
}
