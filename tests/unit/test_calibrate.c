/* SPDX-License-Identifier: Apache-2.0
 * test_calibrate.c - machine files from samples: parameters that made the samples are found again, and what is written
 * is a machine file that means them. */
#include "core_test.h"

#include "calibrate.h"

#include <unistd.h>

/* The models, worked out here: a product's arithmetic and memory add up, its tiles are one row high; weights are put in
 * order, rows and the weights of a single row are read as they lie. */
static double product(double m, double n, double k)
{
    const double rows = 4 * (m * k + m * n), weights = 4 * n * k;
    return 2e-6 + (m == 1 ? (rows + weights) / 15e9 : 2 * m * n * k / 90e9 + weights / 5e9 + rows / 15e9);
}

static double core_of(const struct latency_key *key)
{
    const bool decode = key->op == LATENCY_DECODE;
    const double wide = (double)(key->n + key->k), pairs = key->rows * (decode ? key->context : key->context / 2);
    const double read = (decode ? key->rows * key->context : key->context) * key->kv_heads * wide;
    const double bytes = 4 * (read + key->rows * key->heads * wide);
    return 2 * pairs * key->heads * wide / (decode ? 20e9 : 30e9) + bytes / 12e9 + 0.5e-6;
}

static void add(struct calibration *c, struct host_sample s, double seconds)
{
    s.seconds = seconds;
    s.low = 0.99 * seconds;
    s.high = 1.02 * seconds;
    s.n = 5;
    c->sample[c->n++] = s;
}

static void fill(struct calibration *c)
{
    static const int64_t wide[] = { 320, 896, 1344 };
    c->sample = malloc(300 * sizeof *c->sample);
    c->n_ranks = 3;
    snprintf(c->versions, sizeof c->versions, "made up");
    for (int i = 0; i < 9; i++)
        for (int64_t rows = 1; rows <= 512; rows *= 4) {
            const struct gemm_group g = { rows, wide[i / 3], wide[i % 3] };
            add(c, (struct host_sample){ .what = HOST_GEMM, .shape = g },
                product((double)rows, (double)g.n, (double)g.k));
        }
    for (double bytes = 1e4; bytes < 1e8; bytes *= 10)
        add(c, (struct host_sample){ .what = HOST_MOVE, .bytes = bytes }, 0.5e-6 + bytes / 10e9);
    for (double bytes = 1e5; bytes < 1e8; bytes *= 10)
        add(c, (struct host_sample){ .what = HOST_SUM, .key.n = 896, .bytes = bytes }, 0.5e-6 + bytes / 3e9);
    for (int i = 0; i < 3; i++)
        add(c, (struct host_sample){ .what = HOST_PACE }, 0.6e-3);
    static const struct latency_key key[] = { { LATENCY_DECODE, 0, 8, 8, 64, 64, 32, 512 },
                                              { LATENCY_DECODE, 0, 8, 2, 64, 64, 64, 256 },
                                              { LATENCY_PREFILL, 0, 8, 8, 64, 64, 512, 512 } };
    for (int i = 0; i < 3; i++)
        add(c, (struct host_sample){ .what = HOST_ATTENTION, .key = key[i] }, core_of(&key[i]));
    for (double bytes = 1e3; bytes < 1e8; bytes *= 10) {
        add(c, (struct host_sample){ .what = HOST_EXCHANGE, .bytes = bytes }, 3e-6 + 2 * bytes / 4e9);
        add(c, (struct host_sample){ .what = HOST_READ, .bytes = bytes }, 50e-6 + bytes / 1e9);
    }
}

static void parameters_are_found(void **state)
{
    (void)state;
    struct calibration c = { 0 };
    struct err e = { 0 };
    fill(&c);
    test_ok(calibration_fit(&c, &e), &e);
    const struct device_spec *d = &c.device;
    assert_near(d->mem_bandwidth * d->mem_efficiency, 10e9, 0.01);
    assert_near(d->launch_s, 0.5e-6, 0.02);
    assert_near(d->mem_bandwidth * d->combine_efficiency, 3e9, 0.01);
    assert_near(c.probe_s, 0.6e-3, 0.01);
    assert_near(d->peak[PREC_FP32] * d->gemm.mma_efficiency, 90e9, 0.02);
    assert_near(d->mem_bandwidth * d->gemm.mem_efficiency, 5e9, 0.03);
    assert_near(d->mem_bandwidth * d->gemm.vector_efficiency, 15e9, 0.02);
    assert_true(d->gemm.tile_m == 1 && d->gemm.overlap == 1);
    assert_near(d->peak[PREC_FP32] * d->flops_efficiency, 30e9, 0.02);
    assert_near(d->peak[PREC_FP32] * d->decode_efficiency, 20e9, 0.02);
    assert_near(d->mem_bandwidth * d->read_efficiency, 12e9, 0.02);
    assert_near(c.exchange_s, 3e-6, 0.02);
    assert_near(c.link_bandwidth, 4e9, 0.01);
    assert_near(c.read_s, 50e-6, 0.02);
    assert_near(c.read_bandwidth, 1e9, 0.01);
    for (int what = 0; what < N_HOST_WHATS; what++) {
        assert_true(c.quality[what].largest < 0.05 && c.quality[what].median <= c.quality[what].largest);
        assert_near(c.quality[what].spread, 0.03, 1e-9);
    }
    calibration_free(&c);
}

/* Tiles of four rows; one or two more take 1.7 times as long, and three twice that. */
static void rests_are_found(void **state)
{
    (void)state;
    struct calibration c = { 0 };
    struct err e = { 0 };
    fill(&c);
    int n = 0;
    for (int i = 0; i < c.n; i++) /* in place of the products that are there */
        if (c.sample[i].what != HOST_GEMM)
            c.sample[n++] = c.sample[i];
    c.n = n;
    for (int64_t rows = 2; rows < 400; rows += 1 + rows / 6)
        for (int64_t n_k = 320; n_k <= 1344; n_k += 512) {
            const double rest[] = { 0, 1.7, 1.7, 3.4 }, tiles = (double)(rows / 4) + rest[rows % 4];
            add(&c, (struct host_sample){ .what = HOST_GEMM, .shape = { rows, n_k, n_k } },
                2e-6 + tiles * 8 * (double)(n_k * n_k) / 90e9 + 4.0 * (double)(n_k * n_k) / 5e9 +
                8.0 * (double)(rows * n_k) / 15e9);
        }
    test_ok(calibration_fit(&c, &e), &e);
    assert_true(c.device.gemm.tile_m == 4 && c.device.gemm.overlap == 1);
    assert_near(c.device.gemm.rest, 1.7, 0.05);
    assert_near(c.device.peak[PREC_FP32] * c.device.gemm.mma_efficiency, 90e9, 0.03);
    calibration_free(&c);
}

/* As JSON and back: what ranks measure passes through a file. */
static void samples_survive(void **state)
{
    (void)state;
    struct calibration c = { 0 }, d;
    struct err e = { 0 };
    fill(&c);
    json_t *list = json_array();
    for (int i = 0; i < c.n; i++)
        json_array_append_new(list, calibration_sample(&c.sample[i]));
    json_t *o = json_pack("{s:o, s:s, s:i}", "samples", list, "versions", "made up", "ranks", 3);
    test_ok(calibration_read(&d, o, &e), &e);
    assert_int_equal(d.n, c.n);
    for (int i = 0; i < c.n; i++) {
        const struct host_sample *x = &c.sample[i], *y = &d.sample[i];
        assert_true(x->what == y->what && x->seconds == y->seconds && x->bytes == y->bytes && x->high == y->high);
        assert_true(x->shape.rows == y->shape.rows && x->shape.n == y->shape.n && x->shape.k == y->shape.k);
        assert_true(x->key.op == y->key.op && x->key.rows == y->key.rows && x->key.context == y->key.context &&
                    x->key.heads == y->key.heads && x->key.k == y->key.k);
    }
    json_array_append_new(list, json_pack("{s:s}", "what", "nothing"));
    calibration_free(&d);
    assert_true(calibration_read(&d, o, &e) < 0);
    json_decref(o);
    calibration_free(&c);
    calibration_free(&d);
}

/* A family without samples is an error, not a default. */
static void nothing_is_made_up(void **state)
{
    (void)state;
    struct calibration c = { 0 };
    struct err e = { 0 };
    fill(&c);
    for (int i = 0; i < c.n; i++)
        if (c.sample[i].what == HOST_READ)
            c.sample[i--] = c.sample[--c.n];
    assert_true(calibration_fit(&c, &e) < 0);
    assert_non_null(strstr(e.text, "nothing of kind \"read\" was measured"));
    calibration_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parameters_are_found),
        cmocka_unit_test(rests_are_found),
        cmocka_unit_test(samples_survive),
        cmocka_unit_test(nothing_is_made_up),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
