/* SPDX-License-Identifier: Apache-2.0
 * test_compute.c - the roofline's closed forms, and how far it is from published rates. */
#include "machine_test.h"

static const struct device_spec spec = {
    .memory = 80e9,
    .mem_bandwidth = 1e12,
    .peak = { [PREC_BF16] = 1e15, [PREC_FP8] = 2e15 },
    .launch_s = 3e-6,
    .flops_efficiency = 0.5,
    .mem_efficiency = 0.8,
    .half_rows = 64,
};

static const struct moe_model model = {
    .n_layers = 1,
    .n_experts = 4,
    .top_k = 1,
    .d_model = 1000,
    .d_expert = 500,
    .weight_bytes = 2,
    .act_bytes = 1,
    .combine_bytes = 2,
};

static const double weights = 3 * 1000 * 500;

static void plain(void **state)
{
    (void)state;
    assert_near(compute_plain(&spec, PREC_BF16, 1e12, 0), 1e12 / 0.5e15 + 3e-6, 1e-12);
    assert_near(compute_plain(&spec, PREC_FP8, 1e12, 0), 1e12 / 1e15 + 3e-6, 1e-12);
    assert_near(compute_plain(&spec, PREC_BF16, 1e12, 8e9), 8e9 / 0.8e12 + 3e-6, 1e-12);
    assert_near(compute_plain(&spec, PREC_BF16, 0, 0), 3e-6, 1e-12);
    assert_true(isinf(compute_plain(&spec, PREC_INT4, 1, 0))); /* the device has no INT4 */
}

static void experts(void **state)
{
    (void)state;
    /* Few rows: the weights of the two experts that have any are read, once each. */
    const int64_t few[] = { 1, 0, 3, 0 };
    double bytes = 2 * weights * 2 + 4 * (1000 * (1 + 2) + 2 * 500 * 2);
    assert_near(compute_experts(&spec, PREC_BF16, &model, 4, few, NULL), bytes / 0.8e12 + 3e-6, 1e-12);
    /* Many rows: arithmetic, at r / (r + 64) of the reachable rate for each expert. */
    const int64_t many[] = { 6400, 640 };
    double flops = 2 * weights * (6400 + 64 + 640 + 64);
    struct device_spec fast = spec;
    fast.mem_bandwidth = 1e16;
    assert_near(compute_experts(&fast, PREC_BF16, &model, 2, many, NULL), flops / 0.5e15 + 3e-6, 1e-12);
    /* At half_rows the rate is half of what it can be. */
    const int64_t half[] = { 64 };
    double seconds = compute_experts(&fast, PREC_BF16, &model, 1, half, NULL) - 3e-6;
    assert_near(2 * weights * 64 / seconds, 0.25e15, 1e-12);
    /* Shards: half of the width, half of the arithmetic. */
    const double width[] = { 0.5, 0.5 };
    assert_near(compute_experts(&fast, PREC_BF16, &model, 2, many, width), flops / 2 / 0.5e15 + 3e-6, 1e-12);
    /* No rows, no launch. */
    const int64_t none[] = { 0, 0 };
    assert_true(compute_experts(&spec, PREC_BF16, &model, 2, none, NULL) == 0);
}

static void more_rows_never_faster(void **state)
{
    (void)state;
    double last = 0;
    for (int64_t rows = 1; rows < 100000; rows += 1 + rows / 8) {
        double seconds = compute_experts(&spec, PREC_BF16, &model, 1, &rows, NULL);
        assert_true(seconds >= last);
        last = seconds;
    }
}

/* DeepGEMM on H800: what h800-ib's figures were fitted to. Guards the figures that doc/machines.md reports. */
static void published_rates(void **state)
{
    (void)state;
    char path[4096], line[256];
    const char *shared = getenv("MOELAB_SHARED"), *top = test_env("top_srcdir", ".");
    if (shared && *shared)
        snprintf(path, sizeof path, "%s/measurements/deepgemm_h800.csv", shared);
    else
        snprintf(path, sizeof path, "%s/../shared/measurements/deepgemm_h800.csv", top);
    FILE *file = fopen(path, "r");
    if (!file)
        skip();
    struct topology *t = test_machine("h800-ib", 1);
    const struct device_spec *h800 = &t->device[0];
    double sum = 0, worst = 0;
    int n_rows = 0;
    while (fgets(line, sizeof line, file)) {
        char layout[32];
        double groups, m, n, k, tflops;
        if (sscanf(line, "%31[a-z],%lf,%lf,%lf,%lf,%lf", layout, &groups, &m, &n, &k, &tflops) != 6)
            continue; /* comments and the heading */
        groups = fmax(groups, 1);
        double flops = groups * 2 * m * n * k, bytes = groups * (m * k + n * k + 2 * m * n); /* FP8 in, BF16 out */
        double ours = compute_plain(h800, PREC_FP8, flops * (m + h800->half_rows) / m, bytes);
        double error = log(ours / (flops / (tflops * 1e12)));
        sum += error * error;
        worst = fmax(worst, fabs(error));
        n_rows++;
    }
    fclose(file);
    topology_free(t);
    assert_int_equal(n_rows, 17);
    assert_true(sqrt(sum / n_rows) < 0.115);
    assert_true(worst < 0.23);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain),
        cmocka_unit_test(experts),
        cmocka_unit_test(more_rows_never_faster),
        cmocka_unit_test(published_rates),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
