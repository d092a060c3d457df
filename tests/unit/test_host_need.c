/* SPDX-License-Identifier: Apache-2.0
 * test_host_need.c - what ranks of machine host will hold, with the figures of small graphs worked out by hand. */
#include "core_test.h"

#include "host_need.h"

/* A row is 40 B, an expert 3 x 10 x 6 floats: 720 B. */
static const struct moe_model small = { .n_layers = 1, .n_experts = 4, .top_k = 2, .d_model = 10, .d_expert = 6 };

static void lay_experts(struct moe_graph *g, int32_t device, int32_t n, const int32_t *expert, const int64_t *rows)
{
    struct err e = { 0 };
    struct moe_expert_work w = { .device = device, .n = n, .expert = expert, .rows = rows, .fraction = 1 };
    test_ok(graph_experts(g, &w, &e), &e);
}

static void lay_exchange(struct moe_graph *g, enum moe_payload payload, int n, const struct moe_part *part)
{
    struct err e = { 0 };
    test_ok(graph_exchange(g, &(struct moe_exchange){ payload, n, part }, &e), &e);
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
    first_step(&g);
    host_count(&small, &g, 2, c);
    assert_int_equal(c[0].n_own, 2);
    assert_int_equal(c[0].rows, 2 * 2 + 1 + 3 + 1); /* own entering and leaving, received, computed, received back */
    assert_int_equal(c[0].sent, 1);
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
    const double tables = 8 * (3 * 3 + 1 + 3) + 8 * 4 + 32 * 4 + 4 * 4 + 8 * 4;
    test_ok(host_need_open(&n, &small, 2, 3, false, &e), &e);
    sum_is(&n, 1000, 0, 3 * 2 * 40, 0, 8 * (3 * 3 + 4));
    first_step(&g);
    host_need_step(&n, &g);
    const double buffers = (1 + 2 + 1 + 1) * 40 + 2 * 4 * (12 + 6);
    sum_is(&n, 1000, 3 * 720, (9 + 5) * 40, buffers, tables);
    assert_int_equal(n.n_experts, 3);
    host_need_step(&n, &g); /* the same again takes nothing more */
    sum_is(&n, 1000, 3 * 720, (9 + 5) * 40, buffers, tables);
    /* Expert 0 moves to device 1, and its weights stay on device 0 too. Rows and buffers are those of the larger step:
     * 2 x 2 + 1 of device 0 are less than its 9, 1 x 2 + 3 of device 1 as many as its 5, 3 gathered there more. */
    graph_reset(&g);
    keep_routes(&g);
    lay_experts(&g, 0, 1, (int32_t[]){ 1 }, (int64_t[]){ 1 });
    lay_experts(&g, 1, 1, (int32_t[]){ 0 }, (int64_t[]){ 3 });
    host_need_step(&n, &g);
    sum_is(&n, 0, 4 * 720, (9 + 5) * 40, (1 + 2 + 1 + 3) * 40 + 2 * 4 * (12 + 18), tables);
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
        host_need_step(&n, &g);
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
    struct moe_graph g = { .n_devices = 2, .keep_items = true };
    keep_routes(&g);
    lay_exchange(&g, MOE_PAY_BYTES, 3, (struct moe_part[]){ { 0, 1, 1e6, 0, NULL, 0 }, { 1, 0, 1e9, 0, NULL, 0 },
                                                            { 0, 0, 1e9, 0, NULL, 0 } });
    host_count(&small, &g, 2, c);
    assert_true(c[0].piece == HOST_PIECE && c[1].piece == 1e6);
    for (int i = 0; i < 3; i++)
        lay_exchange(&g, MOE_PAY_BYTES, 1, (struct moe_part[]){ { 1, 0, 1e9, 0, NULL, 0 } });
    host_count(&small, &g, 2, c);
    assert_true(c[0].piece == 2.0 * HOST_PIECE && c[1].piece == 1e6);
    struct err e = { 0 };
    struct host_need n;
    struct host_bytes b;
    test_ok(host_need_open(&n, &small, 2, 3, false, &e), &e);
    host_need_step(&n, &g);
    host_need_bytes(&n, 0, &b);
    assert_near(b.buffers, 2.0 * HOST_PIECE + 1e6 + 2.0 * HOST_PIECE, 1e-12);
    host_need_close(&n);
    graph_free(&g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_step_of_two_ranks),
        cmocka_unit_test(steps_add_up),
        cmocka_unit_test(verifying_takes_room),
        cmocka_unit_test(pieces),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("host_need", tests, NULL, NULL);
}
