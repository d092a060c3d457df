/* SPDX-License-Identifier: Apache-2.0
 * test_compute.c - closed forms of GEMMs and the roofline, and how far they are from published rates. */
#include "machine_test.h"

static const struct device_spec spec = {
    .memory = 80e9,
    .mem_bandwidth = 1e12,
    .peak = { [PREC_BF16] = 1e15, [PREC_FP8] = 2e15 },
    .launch_s = 3e-6,
    .flops_efficiency = 0.5,
    .mem_efficiency = 0.8,
    .gemm = { .sms = 10, .mma_efficiency = 0.8, .port_bandwidth = 100e9, .store_bandwidth = 10e9,
              .mem_efficiency = 0.9, .launch_s = 1e-6, .overlap = 2 },
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

static void plain(void **state)
{
    (void)state;
    assert_near(compute_plain(&spec, PREC_BF16, 1e12, 0), 1e12 / 0.5e15 + 3e-6, 1e-12);
    assert_near(compute_plain(&spec, PREC_FP8, 1e12, 0), 1e12 / 1e15 + 3e-6, 1e-12);
    assert_near(compute_plain(&spec, PREC_BF16, 1e12, 8e9), 8e9 / 0.8e12 + 3e-6, 1e-12);
    assert_near(compute_plain(&spec, PREC_BF16, 0, 0), 3e-6, 1e-12);
    assert_true(isinf(compute_plain(&spec, PREC_INT4, 1, 0))); /* the device has no INT4 */
}

/* Y = X W with 64 x 640 x 1280: the widest tile, 128, would leave 5 of 10 SMs idle in its one wave; 64 fills them. */
static void one_gemm(void **state)
{
    (void)state;
    const struct gemm_group g = { 64, 640, 1280 };
    const struct gemm_bytes b = { 1, 2, 2 };
    const double rate = 1e15 / 10 * 0.8, mma = 2.0 * 64 * 64 * 1280 / rate;
    const double fetch = (64 * 1 + 64 * 2) * 1280 / 100e9, tile = pow(pow(mma, 4) + pow(fetch, 4), 0.25);
    const double memory = (64 * 1280 * 1 + 640 * 1280 * 2 + 64 * 640 * 2) / (1e12 * 0.9);
    assert_near(compute_gemm(&spec, PREC_BF16, 1, &g, &b), 1e-6 + hypot(tile + 64 * 64 * 2 / 10e9, memory), 1e-12);
    /* One row more than a tile has, and the second tile row makes a second wave of the same. */
    const struct gemm_group more = { 129, 1280, 1280 };
    const double wide = 2.0 * 128 * 128 * 1280 / rate, feed = (128 * 1 + 128 * 2) * 1280 / 100e9;
    const double all = 129 * 1280 * 1.0 + 1280 * 1280 * 2.0 + 129 * 1280 * 2.0;
    assert_near(compute_gemm(&spec, PREC_BF16, 1, &more, &b),
                1e-6 + hypot(2 * (pow(pow(wide, 4) + pow(feed, 4), 0.25) + 128 * 128 * 2 / 10e9), all / (1e12 * 0.9)),
                1e-12);
    const struct gemm_group none = { 0, 640, 1280 };
    assert_true(compute_gemm(&spec, PREC_BF16, 1, &none, &b) == 0);
}

/* As `moelab calibrate` writes it: a tile is a row 16 wide, weights are put in order at one rate and rows read at
 * another, attention's arithmetic and reading add up, sums of rows have a bandwidth of their own. */
static void processor(void **state)
{
    (void)state;
    struct device_spec d = spec;
    d.peak[PREC_FP32] = 1e11;
    d.read_efficiency = 0.5;
    d.combine_efficiency = 0.25;
    d.gemm.sms = 1;
    d.gemm.tile_m = 1;
    d.gemm.overlap = 1;
    d.gemm.port_bandwidth = d.gemm.store_bandwidth = 1e18;
    d.gemm.vector_efficiency = 0.6;
    const struct gemm_bytes b = { 4, 4, 4 };
    const struct gemm_group g = { 7, 40, 500 }, one = { 1, 40, 500 };
    assert_near(compute_gemm(&d, PREC_FP32, 1, &g, &b),
                1e-6 + 2.0 * 7 * 48 * 500 / 0.8e11 + 4.0 * 40 * 500 / 0.9e12 + 4.0 * (7 * 500 + 7 * 40) / 0.6e12, 1e-9);
    assert_near(compute_gemm(&d, PREC_FP32, 1, &one, &b), 1e-6 + 4.0 * (500 + 40 * 500 + 40) / 0.6e12, 1e-9);
    d.gemm.tile_m = 4; /* 7 rows: a whole tile, a half of it and a quarter */
    d.gemm.rest = 1.5;
    assert_near(compute_gemm(&d, PREC_FP32, 1, &g, &b),
                1e-6 + 4 * 2.0 * 4 * 48 * 500 / 0.8e11 + 4.0 * 40 * 500 / 0.9e12 + 4.0 * (7 * 500 + 7 * 40) / 0.6e12,
                1e-9);
    const struct latency_key decode = { .op = LATENCY_DECODE, .rows = 1 }, sum = { .op = LATENCY_COMBINE, .rows = 8e9 };
    assert_near(cost_known(&d, PREC_FP32, 1e9, 8e9, &decode).seconds, 1e9 / 0.5e11 + 8e9 / 0.5e12 + 3e-6, 1e-12);
    assert_near(cost_known(&d, PREC_FP32, 0, 8e9, &sum).seconds, 8e9 / 0.25e12 + 3e-6, 1e-12);
    d.decode_efficiency = 0.25;
    assert_near(cost_known(&d, PREC_FP32, 1e9, 8e9, &decode).seconds, 1e9 / 0.25e11 + 8e9 / 0.5e12 + 3e-6, 1e-12);
    d.read_efficiency = d.combine_efficiency = d.decode_efficiency = 0;
    assert_near(cost_known(&d, PREC_FP32, 1e9, 8e9, &decode).seconds, 1e9 / 0.5e11 + 3e-6, 1e-12);
    assert_near(cost_known(&d, PREC_FP32, 0, 8e9, &sum).seconds, 8e9 / 0.8e12 + 3e-6, 1e-12);
}

/* Groups share the waves: ten of one tile each take as long as one of ten, but read ten times the rows' operand. */
static void groups_share_waves(void **state)
{
    (void)state;
    struct device_spec d = spec;
    d.mem_bandwidth = 1e30;
    struct gemm_group one = { 64, 640, 1280 }, ten[10];
    const struct gemm_bytes b = { 1, 2, 2 };
    for (int i = 0; i < 10; i++)
        ten[i] = (struct gemm_group){ 64, 64, 1280 };
    assert_near(compute_gemm(&d, PREC_BF16, 10, ten, &b), compute_gemm(&d, PREC_BF16, 1, &one, &b), 1e-12);
}

static void experts(void **state)
{
    (void)state;
    const int64_t rows[] = { 3, 0, 200, 0 };
    const struct gemm_bytes b = { 2, 2, 2 };
    const struct gemm_group up[] = { { 3, 1000, 1000 }, { 200, 1000, 1000 } };
    const struct gemm_group down[] = { { 3, 1000, 500 }, { 200, 1000, 500 } };
    double between = compute_plain(&spec, PREC_BF16, 0, 203 * 500 * (2 * 2 + 2));
    assert_near(compute_experts(&spec, PREC_BF16, &model, 4, rows, NULL),
                compute_gemm(&spec, PREC_BF16, 2, up, &b) + between + compute_gemm(&spec, PREC_BF16, 2, down, &b),
                1e-12);
    /* Shards: half of the width. */
    const double width[] = { 0.5, 0.5, 0.5, 0.5 };
    struct moe_model half = model;
    half.d_expert /= 2;
    assert_near(compute_experts(&spec, PREC_BF16, &model, 4, rows, width),
                compute_experts(&spec, PREC_BF16, &half, 4, rows, NULL), 1e-12);
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

static int by_size(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* DeepGEMM on H800: what h800-ib's figures were fitted to. Guards the figures that doc/models.md reports. */
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
    double error[32], worst = 0;
    int n_rows = 0;
    while (fgets(line, sizeof line, file)) {
        char layout[32];
        double groups, m, n, k, tflops;
        if (sscanf(line, "%31[a-z],%lf,%lf,%lf,%lf,%lf", layout, &groups, &m, &n, &k, &tflops) != 6)
            continue; /* comments and the heading */
        groups = fmax(groups, 1);
        struct gemm_group group[8];
        for (int g = 0; g < (int)groups; g++)
            group[g] = (struct gemm_group){ (int64_t)m, (int64_t)n, (int64_t)k };
        double ours = compute_gemm(h800, PREC_FP8, (int)groups, group, &(struct gemm_bytes){ 1, 1, 2 });
        error[n_rows] = fabs(ours / (groups * 2 * m * n * k / (tflops * 1e12)) - 1);
        worst = fmax(worst, error[n_rows]);
        n_rows++;
    }
    fclose(file);
    topology_free(t);
    assert_int_equal(n_rows, 17);
    assert_true(worst < 0.10);
    qsort(error, (size_t)n_rows, sizeof *error, by_size);
    assert_true(error[n_rows / 2] < 0.05);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain),
        cmocka_unit_test(one_gemm), cmocka_unit_test(processor),
        cmocka_unit_test(groups_share_waves),
        cmocka_unit_test(experts),
        cmocka_unit_test(more_rows_never_faster),
        cmocka_unit_test(published_rates),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
