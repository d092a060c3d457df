/* SPDX-License-Identifier: Apache-2.0
 * test_host_model.c - what machine host computes: weights, inputs, the plain reference, and the comparison that must
 * notice when an output is wrong. */
#include "config.h"

#include "host_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const struct moe_model small = { .n_layers = 2, .n_experts = 4, .top_k = 2, .d_model = 48, .d_expert = 20 };

static void weights_depend_on_layer_and_expert_alone(void **state)
{
    (void)state;
    size_t n = 3 * 48 * 20;
    float *a = host_weights(&small, 1, 2), *again = host_weights(&small, 1, 2), *other = host_weights(&small, 2, 1);
    assert_memory_equal(a, again, n * sizeof *a);
    assert_memory_not_equal(a, other, n * sizeof *a);
    double squares[2] = { 0, 0 };
    for (size_t i = 0; i < n; i++)
        squares[i >= n / 3 * 2] += (double)a[i] * (double)a[i];
    /* Variance 1/48 in the first two matrices, 1/20 in the third. */
    assert_in_range(llround(squares[0] / (2 * 48 * 20) * 48 * 1000), 900, 1100);
    assert_in_range(llround(squares[1] / (48 * 20) * 20 * 1000), 900, 1100);
    free(a);
    free(again);
    free(other);
}

static void inputs_depend_on_step_and_token_alone(void **state)
{
    (void)state;
    float a[48], again[48], other[48];
    host_input(&small, 3, 7, a);
    host_input(&small, 3, 7, again);
    host_input(&small, 7, 3, other);
    assert_memory_equal(a, again, sizeof a);
    assert_memory_not_equal(a, other, sizeof a);
    host_normalise(a, 48);
    double squares = 0;
    for (int i = 0; i < 48; i++)
        squares += (double)a[i] * (double)a[i];
    assert_true(fabs(squares / 48 - 1) < 1e-5);
}

static void a_share_of_the_width(void **state)
{
    (void)state;
    double share[8] = { 1, 0.5, 0.01, 2, 1, 1, 1, 1 };
    struct moe_model m = small;
    assert_int_equal(host_width(&m, 0, 1), 20);
    m.expert_width = share;
    assert_int_equal(host_width(&m, 0, 0), 20);
    assert_int_equal(host_width(&m, 0, 1), 10);
    assert_int_equal(host_width(&m, 0, 2), 1);
    assert_int_equal(host_width(&m, 0, 3), 40);
}

/* One hidden unit and one column: the layer written out by hand. */
static void reference_of_one_number(void **state)
{
    (void)state;
    struct moe_model m = { .n_layers = 1, .n_experts = 2, .top_k = 1, .d_model = 1, .d_expert = 1 };
    struct graph_route routes[] = { { 0, 0, 0.25f }, { 0, 1, 0.75f }, { 1, 1, 1 } };
    int32_t place[] = { 0, -1 };
    float x = 2;
    const float *in[] = { &x };
    double out, expected = 2;
    struct err e = { 0 };
    for (int32_t expert = 0; expert < 2; expert++) {
        float *w = host_weights(&m, 0, expert);
        double gate = 2 * (double)w[0], up = 2 * (double)w[1];
        expected += (double)routes[expert].weight * (gate / (1 + exp(-gate)) * up * (double)w[2]);
        free(w);
    }
    expected /= sqrt(expected * expected + 1e-6);
    assert_int_equal(host_reference(&m, 0, routes, 3, place, 1, in, NULL, &out, &e), 0);
    assert_true(fabs(out - expected) < 1e-12);
}

static void tokens_without_experts_are_normalised(void **state)
{
    (void)state;
    struct graph_route nothing[] = { { 0, 4, 1 } }; /* an expert that costs nothing */
    int32_t place[] = { 0 }, at;
    float x[48];
    const float *in[] = { x };
    double out[48];
    struct err e = { 0 };
    host_input(&small, 0, 0, x);
    assert_int_equal(host_reference(&small, 0, nothing, 1, place, 1, in, NULL, out, &e), 0);
    host_normalise(x, 48);
    assert_true(host_error(x, out, 48, &at) < 1e-6);
}

static void a_wrong_output_is_noticed(void **state)
{
    (void)state;
    double expected[] = { 1, -4, 0.5 };
    float same[] = { 1, -4, 0.5f }, near[] = { 1, -4.00001f, 0.5f }, wrong[] = { 1, -4, 0.5001f },
          broken[] = { 1, NAN, 0.5f }, large[] = { 1, -4, INFINITY };
    int32_t at;
    assert_true(host_error(same, expected, 3, &at) == 0);
    assert_true(host_error(near, expected, 3, &at) < HOST_TOLERANCE);
    assert_int_equal(at, 1);
    assert_true(host_error(wrong, expected, 3, &at) > HOST_TOLERANCE); /* 0.0001 of the largest, 4 */
    assert_int_equal(at, 2);
    assert_true(isinf(host_error(broken, expected, 3, &at)));
    assert_int_equal(at, 1);
    assert_true(isinf(host_error(large, expected, 3, &at)));
    double zero[] = { 0 };
    float not_zero[] = { 1e-9f };
    assert_true(isinf(host_error(not_zero, zero, 1, &at)));
}

/* Two tokens that swapped their outputs, and an output combined with another route's weight. */
static void mistakes_of_a_rank_are_noticed(void **state)
{
    (void)state;
    struct graph_route routes[] = { { 0, 1, 0.6f }, { 0, 3, 0.4f }, { 1, 0, 0.5f }, { 1, 3, 0.5f } };
    struct graph_route swapped[] = { { 0, 1, 0.4f }, { 0, 3, 0.6f }, { 1, 0, 0.5f }, { 1, 3, 0.5f } };
    int32_t place[] = { 0, 1 }, at;
    float x[2][48], got[48];
    const float *in[] = { x[0], x[1] };
    double right[2][48], other[2][48];
    struct err e = { 0 };
    host_input(&small, 0, 0, x[0]);
    host_input(&small, 0, 1, x[1]);
    assert_int_equal(host_reference(&small, 0, routes, 4, place, 2, in, NULL, &right[0][0], &e), 0);
    assert_int_equal(host_reference(&small, 0, swapped, 4, place, 2, in, NULL, &other[0][0], &e), 0);
    for (int i = 0; i < 48; i++)
        got[i] = (float)right[0][i];
    assert_true(host_error(got, right[0], 48, &at) < 1e-6);
    assert_true(host_error(got, right[1], 48, &at) > HOST_TOLERANCE);
    assert_true(host_error(got, other[0], 48, &at) > HOST_TOLERANCE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_depend_on_layer_and_expert_alone),
        cmocka_unit_test(inputs_depend_on_step_and_token_alone),
        cmocka_unit_test(a_share_of_the_width),
        cmocka_unit_test(reference_of_one_number),
        cmocka_unit_test(tokens_without_experts_are_normalised),
        cmocka_unit_test(a_wrong_output_is_noticed),
        cmocka_unit_test(mistakes_of_a_rank_are_noticed),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
