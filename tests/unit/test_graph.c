/* SPDX-License-Identifier: Apache-2.0
 * test_graph.c - the event queue, and building and ordering task graphs. */
#include "core_test.h"

#include "event.h"

/* ---- events ---- */

static void ties_leave_as_they_came(void **state)
{
    (void)state;
    struct event_queue q = { 0 };
    struct event e;
    for (int32_t i = 0; i < 100; i++)
        assert_true(event_push(&q, i % 2 ? 1.0 : 0.5, i));
    assert_true(event_next(&q) == 0.5);
    for (int32_t i = 0; i < 100; i++) {
        assert_true(event_pop(&q, &e));
        assert_int_equal(e.what, i < 50 ? 2 * i : 2 * (i - 50) + 1);
    }
    assert_false(event_pop(&q, &e));
    assert_true(isinf(event_next(&q)));
    event_free(&q);
}

static int by_time(const void *a, const void *b)
{
    const struct event *x = a, *y = b;
    if (x->time != y->time)
        return x->time < y->time ? -1 : 1;
    return (x->sequence > y->sequence) - (x->sequence < y->sequence);
}

static void any_order_leaves_sorted(void **state)
{
    (void)state;
    enum { N = 5000 };
    struct event_queue q = { 0 };
    static struct event model[N];
    int32_t n = 0, n_popped = 0;
    double last = 0;
    /* Times from a small set, never before what has left, so that pushes and pops can be mixed. */
    for (int32_t i = 0; i < N; i++) {
        double time = last + (double)(moe_mix((uint64_t)i) % 16);
        model[n++] = (struct event){ time, (uint64_t)i, i };
        assert_true(event_push(&q, time, i));
        if (moe_mix((uint64_t)i + N) % 3 == 0) {
            struct event e;
            assert_true(event_pop(&q, &e));
            qsort(model + n_popped, (size_t)(n - n_popped), sizeof *model, by_time);
            assert_int_equal(e.what, model[n_popped].what);
            last = model[n_popped++].time;
        }
    }
    qsort(model + n_popped, (size_t)(n - n_popped), sizeof *model, by_time);
    for (struct event e; event_pop(&q, &e); n_popped++)
        assert_int_equal(e.what, model[n_popped].what);
    assert_int_equal(n_popped, N);
    event_free(&q);
}

/* ---- graphs ---- */

static void refuses(void **state)
{
    (void)state;
    struct moe_graph g = { .n_devices = 2 };
    struct err e;
    const int32_t expert[] = { 0, -1 };
    const int64_t rows[] = { 1, 1 }, negative[] = { -1 };
#define REFUSED(call, ...)                                                                                            \
    do {                                                                                                              \
        memset(&e, 0, sizeof e);                                                                                      \
        assert_says(&e, call, __VA_ARGS__, NULL);                                                                     \
    } while (0)
    REFUSED(graph_compute(&g, &(struct moe_work){ .device = 2 }, &e), "device 2", "0 to 1");
    REFUSED(graph_compute(&g, &(struct moe_work){ .device = -1 }, &e), "device -1");
    REFUSED(graph_compute(&g, &(struct moe_work){ .stream = STREAM_COPY }, &e), "stream 14", "0 to 13");
    REFUSED(graph_compute(&g, &(struct moe_work){ .flops = -1 }, &e), "flops -1");
    REFUSED(graph_compute(&g, &(struct moe_work){ .bytes = NAN }, &e), "bytes nan");
    REFUSED(graph_compute(&g, &(struct moe_work){ .fused = true }, &e), "fused");
    REFUSED(graph_compute(&g, &(struct moe_work){ .op = (enum moe_op)9 }, &e), "compute task with op 9", "0 to 6");
    REFUSED(graph_compute(&g, &(struct moe_work){ .op = (enum moe_op)-3 }, &e), "op -3", "0 to 6");
    REFUSED(graph_exchange(&g, &(struct moe_exchange){ (enum moe_payload)3, 0, NULL }, &e), "exchange with payload 3",
            "0 to 2");
    REFUSED(graph_exchange(&g, &(struct moe_exchange){ (enum moe_payload)-1, 0, NULL }, &e), "payload -1");
    REFUSED(graph_experts(&g, &(struct moe_expert_work){ .layer = 3, .fraction = 1 }, &e), "of layer 3", "expected 0");
    REFUSED(graph_experts(&g, &(struct moe_expert_work){ .n = 0, .fraction = 1, .fused = true }, &e), "fused");
    REFUSED(graph_exchange(&g, &(struct moe_exchange){ MOE_PAY_BYTES, 1, &(struct moe_part){ 0, 1, 1, 0, NULL, -1 } },
                           &e),
            "path -1", "0 or more");
    REFUSED(graph_compute(&g, &(struct moe_work){ .bytes = INFINITY }, &e), "bytes inf");
    REFUSED(graph_experts(&g, &(struct moe_expert_work){ .n = 2, .expert = expert, .rows = rows, .fraction = 1 }, &e),
            "expert -1");
    REFUSED(graph_experts(&g, &(struct moe_expert_work){ .n = 1, .expert = expert, .rows = negative, .fraction = 1 },
                          &e), "-1 rows");
    REFUSED(graph_experts(&g, &(struct moe_expert_work){ .n = 1, .expert = expert, .rows = rows }, &e), "fraction 0");
    REFUSED(graph_experts(&g, &(struct moe_expert_work){ .n = -1, .fraction = 1 }, &e), "-1 experts");
    REFUSED(graph_exchange(&g, &(struct moe_exchange){ MOE_PAY_BYTES, 1, &(struct moe_part){ 0, 2, 1, 0, NULL, 0 } },
                           &e),
            "device 2");
    REFUSED(graph_exchange(&g, &(struct moe_exchange){ MOE_PAY_BYTES, 1, &(struct moe_part){ 0, 1, -1, 0, NULL, 0 } },
                           &e),
            "-1 bytes");
    REFUSED(graph_exchange(&g, &(struct moe_exchange){ MOE_PAY_BYTES, -1, NULL }, &e), "-1 parts");
    assert_int_equal(g.n_tasks, 0);

    int32_t a = test_compute(&g, 0, 0, 10 * US), x = test_parts(&g, 0, NULL), arrival = test_arrival(&g, x, 1);
    REFUSED(graph_arrival(&g, a, 0, &e), "task 0", "not an exchange");
    REFUSED(graph_arrival(&g, 99, 0, &e), "task 99", "not an exchange");
    REFUSED(graph_arrival(&g, x, 2, &e), "device 2");
    REFUSED(graph_after(&g, arrival, a, &e), "arrival", "exchange alone");
    REFUSED(graph_after(&g, a, a, &e), "different ids");
    REFUSED(graph_after(&g, a, 3, &e), "task 3", "0 to 2");
    REFUSED(graph_after(&g, -1, a, &e), "task -1");
#undef REFUSED
    assert_int_equal(g.n_tasks, 3);
    assert_int_equal(g.n_edges, 0);
    graph_free(&g);
}

static void order_counts_edges_and_arrivals(void **state)
{
    (void)state;
    struct moe_graph g = { .n_devices = 2 };
    struct err e = { 0 };
    struct graph_order o;
    int32_t a = test_compute(&g, 0, 0, 10 * US), x = test_parts(&g, 0, NULL);
    int32_t here = test_arrival(&g, x, 0), there = test_arrival(&g, x, 1), b = test_compute(&g, 1, 0, 10 * US);
    test_after(&g, x, a);
    test_after(&g, b, there);
    test_after(&g, b, a);
    test_after(&g, b, a); /* twice is harmless: counted twice, released twice */
    test_ok(graph_order(&g, &o, &e), &e);
    const int32_t n_before[] = { 0, 1, 1, 1, 3 };
    assert_memory_equal(o.n_before, n_before, sizeof n_before);
    const int64_t first[] = { 0, 3, 5, 5, 6, 6 };
    assert_memory_equal(o.first, first, sizeof first);
    const int32_t next[] = { x, b, b, here, there, b };
    assert_memory_equal(o.next, next, sizeof next);
    graph_order_free(&o);
    graph_free(&g);
}

static void cycle_is_named(void **state)
{
    (void)state;
    struct moe_graph g = { .n_devices = 1 };
    struct err e = { 0 };
    struct graph_order o;
    /* 0 is downstream of the cycle 2 -> 3 -> 2, 1 is before it: neither is to blame. */
    for (int i = 0; i < 4; i++)
        test_compute(&g, 0, 0, 10 * US);
    test_after(&g, 2, 1);
    test_after(&g, 3, 2);
    test_after(&g, 2, 3);
    test_after(&g, 0, 3);
    assert_true(graph_order(&g, &o, &e) < 0);
    assert_int_equal(e.code, ERR_RUN);
    assert_true(strstr(e.text, "cycle") && (strstr(e.text, "task 2") || strstr(e.text, "task 3")));
    assert_null(o.first);
    graph_free(&g);

    /* An exchange that waits for something after its own arrival. */
    g = (struct moe_graph){ .n_devices = 2 };
    memset(&e, 0, sizeof e);
    int32_t x = test_parts(&g, 1, &(struct moe_part){ 0, 1, 1, 0, NULL, 0 });
    int32_t there = test_arrival(&g, x, 1), work = test_compute(&g, 1, 0, 10 * US);
    test_after(&g, work, there);
    test_after(&g, x, work);
    assert_says(&e, graph_order(&g, &o, &e), "cycle", NULL);
    graph_free(&g);
}

/* From the second step on a graph costs no allocation: the same arrays, emptied. */
static void reset_keeps_room(void **state)
{
    (void)state;
    struct moe_graph g = { .n_devices = 2 };
    for (int i = 0; i < 200; i++)
        test_compute(&g, i % 2, 0, 10 * US);
    struct task *task = g.task;
    graph_reset(&g);
    assert_int_equal(g.n_tasks, 0);
    assert_int_equal(g.n_devices, 2);
    for (int i = 0; i < 200; i++)
        assert_int_equal(test_compute(&g, i % 2, 0, 10 * US), i);
    assert_ptr_equal(task, g.task);
    graph_free(&g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ties_leave_as_they_came),
        cmocka_unit_test(any_order_leaves_sorted),
        cmocka_unit_test(refuses),
        cmocka_unit_test(order_counts_edges_and_arrivals),
        cmocka_unit_test(cycle_is_named),
        cmocka_unit_test(reset_keeps_room),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
