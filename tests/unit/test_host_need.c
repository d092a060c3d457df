/* SPDX-License-Identifier: Apache-2.0
 * test_host_need.c - what ranks of machine host will hold, with the figures of small graphs worked out by hand. */
#include "core_test.h"

#include "host_need.h"
#include "host_order.h"
#include "items_check.h"

/* A row is 40 B, an expert 3 x 10 x 6 floats: 720 B. */
static const struct moe_model small = { .n_layers = 1, .n_experts = 4, .top_k = 2, .d_model = 10, .d_expert = 6 };

static void lay_experts(struct moe_graph *g, int32_t device, int32_t n, const int32_t *expert, const int64_t *rows)
{
    struct err e = { 0 };
    struct moe_expert_work w = { .device = device, .n = n, .expert = expert, .rows = rows, .fraction = 1 };
    test_ok(graph_experts(g, &w, &e), &e);
}

static int32_t lay_exchange(struct moe_graph *g, enum moe_payload payload, int n, const struct moe_part *part)
{
    struct err e = { 0 };
    const int32_t id = graph_exchange(g, &(struct moe_exchange){ payload, n, part }, &e);
    test_ok(id, &e);
    return id;
}

static void keep_routes(struct moe_graph *g)
{
    struct err e = { 0 };
    int64_t offset[] = { 0, 2, 3, 4 };
    int32_t expert[] = { 0, 2, 1, 0 }, device[] = { 0, 0, 1 };
    float weight[] = { 0.5f, 0.5f, 1, 1 };
    struct moe_routes r = { .n_tokens = 3, .n = 4, .capacity = 4, .offset = offset, .expert = expert,
                            .weight = weight };
    test_ok(graph_keep_routes(g, &r, device, &e), &e);
}

/* Tokens 0 and 1 live on device 0, token 2 on device 1. Experts 0 and 1 run on device 0, expert 2 on device 1: routes
 * 1 (token 0, expert 2) and 3 (token 2, expert 0) travel, there and back. */
static void first_step(struct moe_graph *g)
{
    static const int64_t one[] = { 1 }, three[] = { 3 }, stay[] = { 0, 2 };
    static const struct moe_part there[] = { { 0, 0, 80, 2, stay, 0 }, { 0, 1, 40, 1, one, 0 },
                                             { 1, 0, 40, 1, three, 0 } };
    static const struct moe_part back[] = { { 1, 0, 40, 1, one, 0 }, { 0, 1, 40, 1, three, 0 } };
    graph_reset(g);
    keep_routes(g);
    lay_exchange(g, MOE_PAY_HIDDEN, 3, there);
    lay_experts(g, 0, 2, (int32_t[]){ 0, 1 }, (int64_t[]){ 2, 1 });
    lay_experts(g, 1, 1, (int32_t[]){ 2 }, (int64_t[]){ 1 });
    lay_exchange(g, MOE_PAY_OUTPUT, 2, back);
}

static void one_step_of_two_ranks(void **state)
{
    (void)state;
    struct moe_graph g = { .n_devices = 2, .keep_items = true };
    struct host_step c[2];
    struct err e = { 0 };
    first_step(&g);
    test_ok(host_count(&small, &g, 2, c, &e), &e);
    assert_int_equal(c[0].n_own, 2);
    assert_int_equal(c[0].rows, 2 * 2 + 1 + 3 + 1); /* own entering and leaving, received, computed, received back */
    assert_int_equal(c[0].sent, 3); /* what stays is put in order, too */
    assert_int_equal(c[0].gathered, 2);
    assert_int_equal(c[0].hidden, 2 * 6);
    assert_int_equal(c[1].n_own, 1);
    assert_int_equal(c[1].rows, 1 * 2 + 1 + 1 + 1);
    assert_int_equal(c[1].sent, 1);
    assert_int_equal(c[1].gathered, 1);
    assert_int_equal(c[1].hidden, 1 * 6);
    assert_true(c[0].piece == 0 && c[1].piece == 0);
    graph_free(&g);
}

/* Bytes of both ranks, each with `own` bytes of decisions; tables: of one rank. */
static void sum_is(const struct host_need *n, double own, double weights, double rows, double buffers, double tables)
{
    struct host_bytes b;
    double processes = 20e6 + 2 * (8e6 + 0.25e6 + tables + own);
    host_need_bytes(n, own, &b);
    assert_near(b.weights, weights, 1e-12);
    assert_near(b.rows, rows, 1e-12);
    assert_near(b.buffers, buffers, 1e-12);
    assert_near(b.processes, processes, 1e-12);
    assert_near(b.sum, 1.05 * (weights + rows + buffers + processes), 1e-12);
}

static void steps_add_up(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct host_need n;
    struct moe_graph g = { .n_devices = 2, .keep_items = true };
    /* By token 2 layers + 1, and where the layer's and the last entry end; by route; by task; by edge and task; by
     * expert. */
    const double tables = 8 * (3 * 3 + 1 + 3) + 8 * 4 + 50 * 4 + 8 * 3 + 4 * 4 + 8 * 4;
    test_ok(host_need_open(&n, &small, 2, 3, false, &e), &e);
    sum_is(&n, 1000, 0, 3 * 2 * 40, 0, 8 * (3 * 3 + 4));
    first_step(&g);
    test_ok(host_need_step(&n, &g, &e), &e);
    const double buffers = (3 + 2 + 1 + 1) * 40 + 2 * 4 * (12 + 6);
    sum_is(&n, 1000, 3 * 720, (9 + 5) * 40, buffers, tables);
    assert_int_equal(n.n_experts, 3);
    test_ok(host_need_step(&n, &g, &e), &e); /* the same again takes nothing more */
    sum_is(&n, 1000, 3 * 720, (9 + 5) * 40, buffers, tables);
    /* Expert 0 moves to device 1, and its weights stay on device 0 too. Rows and buffers are those of the larger step:
     * 2 x 2 + 1 of device 0 are less than its 9, 1 x 2 + 3 of device 1 as many as its 5, 3 gathered there more. */
    graph_reset(&g);
    keep_routes(&g);
    lay_experts(&g, 0, 1, (int32_t[]){ 1 }, (int64_t[]){ 1 });
    lay_experts(&g, 1, 1, (int32_t[]){ 0 }, (int64_t[]){ 3 });
    test_ok(host_need_step(&n, &g, &e), &e);
    sum_is(&n, 0, 4 * 720, (9 + 5) * 40, (3 + 2 + 1 + 3) * 40 + 2 * 4 * (12 + 18), tables);
    host_need_close(&n);
    graph_free(&g);
}

/* Verifying takes a float and a double for every element of a token, and one expert's weights once more. */
static void verifying_takes_room(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct host_need n;
    struct host_bytes plain, verified;
    struct moe_graph g = { .n_devices = 2, .keep_items = true };
    first_step(&g);
    for (int verify = 0; verify < 2; verify++) {
        test_ok(host_need_open(&n, &small, 2, 3, verify, &e), &e);
        test_ok(host_need_step(&n, &g, &e), &e);
        host_need_bytes(&n, 0, verify ? &verified : &plain);
        host_need_close(&n);
    }
    assert_near(verified.buffers - plain.buffers, 3 * 10 * (4 + 8) + 2 * 720, 1e-12);
    graph_free(&g);
}

/* Weights that move arrive in a piece from each rank at most; what is sent is one piece. */
static void pieces(void **state)
{
    (void)state;
    struct host_step c[2];
    struct err e = { 0 };
    struct moe_graph g = { .n_devices = 2, .keep_items = true };
    keep_routes(&g);
    lay_exchange(&g, MOE_PAY_BYTES, 3, (struct moe_part[]){ { 0, 1, 1e6, 0, NULL, 0 }, { 1, 0, 1e9, 0, NULL, 0 },
                                                            { 0, 0, 1e9, 0, NULL, 0 } });
    test_ok(host_count(&small, &g, 2, c, &e), &e);
    assert_true(c[0].piece == HOST_PIECE && c[1].piece == 1e6);
    for (int i = 0; i < 3; i++)
        lay_exchange(&g, MOE_PAY_BYTES, 1, (struct moe_part[]){ { 1, 0, 1e9, 0, NULL, 0 } });
    test_ok(host_count(&small, &g, 2, c, &e), &e);
    assert_true(c[0].piece == 2.0 * HOST_PIECE && c[1].piece == 1e6);
    struct host_need n;
    struct host_bytes b;
    test_ok(host_need_open(&n, &small, 2, 3, false, &e), &e);
    test_ok(host_need_step(&n, &g, &e), &e);
    host_need_bytes(&n, 0, &b);
    assert_near(b.buffers, 2.0 * HOST_PIECE + 1e6 + 2.0 * HOST_PIECE, 1e-12);
    host_need_close(&n);
    graph_free(&g);
}

/* Rows wait from their permute task on, and those of several exchanges at a time lie behind one another: device 0 has
 * two rows in the first and three in the second, two of which stay; the third has the buffer to itself. */
static void sends(void **state)
{
    (void)state;
    static const int64_t item[] = { 0, 1 };
    static const struct moe_part two[] = { { 0, 1, 80, 2, item, 0 }, { 1, 0, 40, 1, item, 0 } };
    static const struct moe_part one[] = { { 0, 1, 40, 1, item, 0 }, { 0, 0, 40, 2, item, 0 } };
    struct moe_graph g = { .n_devices = 2, .keep_items = true };
    struct graph_order order;
    struct err e = { 0 };
    int32_t sequence[5];
    size_t at[5];
    bool packed[5];
    keep_routes(&g);
    const struct moe_work permute = { .device = 0, .op = MOE_OP_PERMUTE };
    const int32_t task = graph_compute(&g, &permute, &e);
    const int32_t first = lay_exchange(&g, MOE_PAY_HIDDEN, 2, two), second = lay_exchange(&g, MOE_PAY_HIDDEN, 2, one);
    const int32_t third = lay_exchange(&g, MOE_PAY_OUTPUT, 2, two);
    test_ok(graph_after(&g, first, task, &e), &e);
    test_ok(graph_after(&g, second, task, &e), &e);
    test_ok(graph_after(&g, second, first, &e), &e);
    test_ok(graph_after(&g, third, second, &e), &e);
    test_ok(graph_order(&g, &order, &e), &e);
    host_sequence(&g, &order, sequence);
    assert_int_equal(host_place_sends(&g, &order, sequence, 0, NULL, at, packed), 5);
    assert_true(at[first] == 0 && at[second] == 2 && at[third] == 0);
    assert_int_equal(host_place_sends(&g, &order, sequence, 1, NULL, at, packed), 1);
    graph_order_free(&order);
    graph_free(&g);
}

/* Device 0 adds up what it computed for token 0 (routes 0 and 1) before that travels to device 1, and from there on;
 * the combine task at the end makes nothing that travels. Routes 0, 1 and 2 are two rows then, and three without
 * sums. */
static void sums_travel(void **state)
{
    (void)state;
    static const int64_t item[] = { 0, 1, 2 };
    static const struct moe_part hop[] = { { 0, 1, 80, 3, item, 0 } }, on[] = { { 1, 0, 80, 3, item, 0 } };
    struct moe_graph g = { .n_devices = 2, .keep_items = true };
    struct graph_order order;
    struct host_step c[2];
    struct err e = { 0 };
    int32_t sequence[6];
    size_t at[6];
    bool packed[6], sums[6];
    keep_routes(&g);
    const struct moe_work combine = { .device = 0, .op = MOE_OP_COMBINE };
    const int32_t gate = graph_compute(&g, &(struct moe_work){ .device = 0, .op = MOE_OP_GATE }, &e);
    const int32_t there = lay_exchange(&g, MOE_PAY_HIDDEN, 1, hop);
    const int32_t reduce = graph_compute(&g, &combine, &e), back = lay_exchange(&g, MOE_PAY_OUTPUT, 1, hop);
    const int32_t second = lay_exchange(&g, MOE_PAY_OUTPUT, 1, on), last = graph_compute(&g, &combine, &e);
    test_ok(graph_after(&g, there, gate, &e), &e);
    test_ok(graph_after(&g, reduce, there, &e), &e);
    test_ok(graph_after(&g, back, reduce, &e), &e);
    test_ok(graph_after(&g, second, back, &e), &e);
    test_ok(graph_after(&g, last, second, &e), &e);
    test_ok(graph_order(&g, &order, &e), &e);
    host_sequence(&g, &order, sequence);
    host_find_sums(&g, &order, sequence, sums);
    assert_true(sums[reduce] && sums[back] && sums[second]);
    assert_false(sums[gate] || sums[there] || sums[last]);
    const struct task *t = &g.task[back];
    assert_int_equal(host_part_rows(&g, t, t->first, true), 2);
    assert_int_equal(host_part_rows(&g, t, t->first, false), 3);
    assert_int_equal(host_row_items(&g, t, t->first, 0, true), 2);
    assert_int_equal(host_row_items(&g, t, t->first, 2, true), 1);
    assert_int_equal(host_place_sends(&g, &order, sequence, 1, sums, at, packed), 2);
    assert_int_equal(host_place_sends(&g, &order, sequence, 1, NULL, at, packed), 3);
    test_ok(host_count(&small, &g, 2, c, &e), &e);
    assert_int_equal(c[0].rows, 2 * 2 + 2);     /* own, received as sums */
    assert_int_equal(c[1].rows, 1 * 2 + 3 + 2); /* ... hidden states one by one */
    graph_order_free(&order);
    graph_free(&g);
}

/* Loads: three slots for what stays, of which one is taken over, and two for what only passes in layer 0; weights that
 * ran are not held beside them, but for one expert while a file is written. */
static void loads(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct host_need n;
    struct host_bytes b;
    struct moe_graph g = { .n_devices = 2, .keep_items = true };
    test_ok(host_need_open(&n, &small, 2, 3, false, &e), &e);
    first_step(&g);
    static const struct { uint32_t victim; bool passes; int32_t device; } load[] = {
        { NO_OBJECT, false, 0 }, { NO_OBJECT, false, 0 }, { 0, false, 0 }, { NO_OBJECT, true, 0 },
        { NO_OBJECT, true, 0 },  { NO_OBJECT, false, 1 },
    };
    for (size_t i = 0; i < sizeof load / sizeof *load; i++) {
        const int32_t id = graph_load(&g, load[i].device, 2, 0, 720, &e);
        g.task[id].victim = load[i].victim;
        g.task[id].passes = load[i].passes;
    }
    test_ok(host_need_step(&n, &g, &e), &e);
    host_need_bytes(&n, 0, &b);
    assert_near(b.weights, (2 + 2 + 1 + 2) * 720, 1e-12);
    host_need_close(&n);
    graph_free(&g);
}

/* What is computed beside experts takes its operands from two rings, or more if a product is larger. */
static void rings(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct moe_graph g = { .n_devices = 2 };
    struct kernel k = { .groups = 1, .shape = { 10, 20, 30 } };
    assert_int_equal(host_rings_room(&g, 0).in, 0);
    test_ok(graph_kernels(&g, 0, 0, MOE_OP_ATTENTION, 1, &k, &e), &e);
    assert_true(host_rings_room(&g, 0).in == HOST_RING && host_rings_room(&g, 0).out == HOST_RING);
    assert_int_equal(host_rings_room(&g, 1).out, 0);
    assert_true(host_kernel_room(&k).in == 10 * 30 + 30 * 20 && host_kernel_room(&k).out == 10 * 20);
    k.shape = (struct gemm_group){ 3000, 4000, 2000 };
    test_ok(graph_kernels(&g, 1, 0, MOE_OP_ATTENTION, 1, &k, &e), &e);
    assert_true(host_rings_room(&g, 1).in == 3000 * 2000 + 2000 * 4000 && host_rings_room(&g, 1).out == 3000 * 4000);
    graph_free(&g);
}

/* Routes 0 and 3 are expert 0's; what a layout says of rows is refused if a real machine could not follow it. */
static void rows_have_names(void **state)
{
    (void)state;
    static const int64_t right[] = { 0, 3 }, wrong[] = { 0, 1 }, beyond[] = { 9 };
    static const struct { const int64_t *item; float fraction; struct moe_part part; const char *says; } cases[] = {
        { right, 1, { 0, 1, 40, 1, right, 0 }, NULL },
        { wrong, 1, { 0, 1, 40, 1, right, 0 }, "layer 0, device 0: item 1 is not a route to expert 0" },
        { NULL, 1, { 0, 1, 40, 1, right, 0 },
          "names 0 of the 2 routes that its experts compute: machine x needs them" },
        { right, 0.5f, { 0, 1, 40, 1, right, 0 }, "an expert is sharded over devices, which machine x does not run" },
        { right, 1, { 0, 1, 40, 0, NULL, 0 }, "from device 0 to device 1 does not name its routes: machine x needs" },
        { right, 1, { 0, 1, 40, 1, beyond, 0 }, "layer 0: a part carries item 9, expected 0 to 3" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_graph g = { .n_devices = 2, .keep_items = true };
        struct err e = { 0 };
        keep_routes(&g);
        test_ok(graph_experts(&g, &(struct moe_expert_work){ .n = 1, .expert = (int32_t[]){ 0 },
                                                             .rows = (int64_t[]){ 2 }, .items = cases[i].item,
                                                             .fraction = cases[i].fraction }, &e), &e);
        lay_exchange(&g, MOE_PAY_HIDDEN, 1, &cases[i].part);
        assert_int_equal(items_check(&small, &g, "x", &e) < 0, cases[i].says != NULL);
        if (cases[i].says)
            assert_non_null(strstr(e.text, cases[i].says));
        graph_free(&g);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_step_of_two_ranks),
        cmocka_unit_test(steps_add_up),
        cmocka_unit_test(verifying_takes_room),
        cmocka_unit_test(pieces),
        cmocka_unit_test(sends),
        cmocka_unit_test(sums_travel),
        cmocka_unit_test(loads),
        cmocka_unit_test(rings),
        cmocka_unit_test(rows_have_names),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("host_need", tests, NULL, NULL);
}
