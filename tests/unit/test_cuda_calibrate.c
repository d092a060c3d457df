/* SPDX-License-Identifier: Apache-2.0
 * test_cuda_calibrate.c - `moelab calibrate --gpu` without a GPU: the module's measuring on a runtime with made-up
 * times (timed.h). The rates that made the times are found again, and the file is a machine that prices with them. */
#include "core_test.h"

#include "calibrate.h"
#include "script.h"
#include "timed.h"

#include <unistd.h>

/* Round figures: 400 TFLOP/s of which products reach 300, 2 TB/s of which kernels reach 1.6. */
static const struct timed_gpu made_up = {
    .device = { .launch_s = 3e-6, .flops_efficiency = 0.5, .mem_efficiency = 0.8, .mem_bandwidth = 2.048e12,
                .peak = { [PREC_BF16] = 400e12, [PREC_FP32] = 40e12, [PREC_FP8] = 800e12 },
                .gemm = { .sms = 96, .mma_efficiency = 0.75, .port_bandwidth = 200e9, .store_bandwidth = 40e9,
                          .mem_efficiency = 0.7, .launch_s = 4e-6, .overlap = 2 } },
    .copy_s = 2e-6, .copy_bandwidth = 1.8e12, .load_s = 8e-6, .load_bandwidth = 50e9, .store_s = 9e-6,
    .store_bandwidth = 45e9, .permute_bandwidth = 1.62e12, .combine_bandwidth = 1.44e12, .top_k_bandwidth = 0.9e12,
    .memory = 64e9,
};

struct counted { json_t *samples; int done, of; };

static void take(void *self, const struct host_sample *s)
{
    struct counted *c = self;
    json_array_append_new(c->samples, calibration_sample(s));
}

static void step(void *self, int done, int of)
{
    struct counted *c = self;
    assert_true(done > c->done && done <= of && (c->of == 0 || c->of == of));
    c->done = done;
    c->of = of;
}

/* As the command does it, but for the loading. */
static void measure(struct calibration *c, const struct timed_gpu *g, int n_ranks)
{
    struct err e = { 0 };
    struct counted seen = { json_array(), 0, 0 };
    struct cuda_calibration gpu = { .n_ranks = n_ranks, .take = take, .step = step, .taker = &seen };
    timed_open(g);
    test_ok(cuda_calibrate(&gpu, &e), &e);
    assert_int_equal(timed_left(), 0);
    assert_true(seen.done > seen.of - 10); /* what the host does is not shown */
    json_t *o = json_pack("{s:o, s:s, s:i, s:s, s:s, s:i, s:f, s:f}", "samples", seen.samples, "versions", gpu.versions,
                          "ranks", n_ranks, "gpu", gpu.name, "note", gpu.note, "sms", (int)gpu.sms, "memory",
                          gpu.memory, "mem_bandwidth", gpu.mem_bandwidth);
    test_ok(calibration_read(c, o, &e), &e);
    assert_int_equal(c->n, json_array_size(seen.samples));
    json_decref(o);
    test_ok(calibration_fit_gpu(c, &e), &e);
}

static const struct host_sample *kernel(const struct calibration *c, enum latency_op op)
{
    for (int i = 0; i < c->n; i++)
        if (c->sample[i].what == GPU_KERNEL && c->sample[i].key.op == op)
            return &c->sample[i];
    fail_msg("no such kernel");
    return NULL;
}

/* Products of other shapes than were measured. */
static void prices_products(const struct device_spec *fitted, const struct device_spec *truth)
{
    static const struct { enum precision p; int32_t groups; struct gemm_group shape; } list[] = {
        { PREC_BF16, 1, { 1, 2048, 1024 } },   { PREC_BF16, 8, { 6, 1024, 2048 } },
        { PREC_BF16, 1, { 300, 2048, 2048 } }, { PREC_BF16, 32, { 100, 2048, 768 } },
        { PREC_BF16, 1, { 8192, 8192, 4096 } }, { PREC_FP32, 1, { 300, 2048, 2048 } },
        { PREC_FP8, 1, { 300, 2048, 2048 } },   { PREC_FP8, 1, { 8192, 8192, 4096 } },
        { PREC_FP32, 1, { 8192, 8192, 4096 } },
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        const double in = list[i].p == PREC_BF16 ? 2 : list[i].p == PREC_FP8 ? 1 : 4;
        const struct kernel k = { .precision = list[i].p, .groups = list[i].groups, .shape = list[i].shape,
                                  .bytes = { in, in, fmax(in, 2) } };
        assert_near(cost_kernel(fitted, &k).seconds, cost_kernel(truth, &k).seconds, 0.08);
    }
}

static void rates_are_found(void **state)
{
    const struct timed_gpu *g = &made_up;
    struct calibration c;
    (void)state;
    measure(&c, g, 1);
    const struct device_spec *d = &c.device;
    assert_near(d->mem_bandwidth, 2.048e12, 1e-4);
    assert_near(d->mem_bandwidth * d->mem_efficiency, 0.8 * 2.048e12, 0.01);
    assert_near(d->launch_s, 3e-6, 0.01);
    assert_near(d->peak[PREC_BF16] * d->gemm.mma_efficiency, 300e12, 0.03);
    assert_near(d->peak[PREC_FP32] * d->gemm.mma_efficiency, 30e12, 0.03);
    assert_near(d->peak[PREC_FP8] * d->gemm.mma_efficiency, 600e12, 0.05);
    assert_near(d->mem_bandwidth * d->gemm.mem_efficiency, 0.7 * 2.048e12, 0.03);
    assert_near(d->peak[PREC_BF16] * d->flops_efficiency, 200e12, 0.05);
    assert_near(c.copy_bandwidth, 1.8e12, 0.01);
    assert_near(c.copy_s, 2e-6, 0.02);
    assert_near(c.read_bandwidth, 50e9, 0.01);
    assert_near(c.read_s, 8e-6, 0.02);
    assert_near(c.write_bandwidth, 45e9, 0.01);
    assert_near(c.write_s, 9e-6, 0.02);
    assert_true(d->gemm.sms == 96 && d->memory == 64e9);
    prices_products(d, &g->device);
    for (int i = 0; i < c.n; i++)
        if (c.sample[i].what == GPU_LAUNCH || c.sample[i].what == GPU_EVENTS)
            assert_near(c.sample[i].seconds, 3e-6, 1e-3);
    assert_near(kernel(&c, LATENCY_PERMUTE)->bytes / kernel(&c, LATENCY_PERMUTE)->seconds, 1.62e12, 1e-3);
    assert_near(kernel(&c, LATENCY_COMBINE)->bytes / kernel(&c, LATENCY_COMBINE)->seconds, 1.44e12, 1e-3);
    assert_near(kernel(&c, LATENCY_TOP_K)->bytes / kernel(&c, LATENCY_TOP_K)->seconds, 0.9e12, 1e-3);
    assert_true(kernel(&c, LATENCY_PERMUTE)->key.rows == 65536 && kernel(&c, LATENCY_PERMUTE)->key.n == 4096);
    assert_string_equal(c.gpu.note, "");
    calibration_free(&c);
}

static void without_fp8(void **state)
{
    struct timed_gpu older = made_up;
    struct calibration c;
    (void)state;
    older.capability = 8;
    measure(&c, &older, 1);
    assert_true(c.device.peak[PREC_FP8] == 0 && c.device.peak[PREC_BF16] > 0);
    for (int i = 0; i < c.n; i++)
        assert_true(c.sample[i].precision != PREC_FP8);
    calibration_free(&c);
}

/* Four streams at once have a quarter each, and what they send each other is copied. */
static void virtual_ranks(void **state)
{
    struct calibration c;
    (void)state;
    measure(&c, &made_up, 4);
    const struct device_spec *d = &c.device;
    assert_near(d->mem_bandwidth * d->mem_efficiency, 0.8 * 2.048e12 / 4, 0.02);
    assert_near(d->peak[PREC_BF16] * d->gemm.mma_efficiency, 300e12 / 4, 0.03);
    assert_near(c.read_bandwidth, 50e9 / 4, 0.01);
    assert_near(c.link_bandwidth, 1.8e12 / 2 / 4, 0.02); /* a copied byte is read and written */
    assert_near(c.exchange_s, 3 * 2e-6, 0.05);           /* three copies, one after another */
    assert_true(d->gemm.sms == 24 && d->memory == 16e9);
    calibration_free(&c);
}

/* ---- the file ---- */

static char *written(struct scratch *s, const struct calibration *c, const json_t *like, const char *like_name)
{
    char *path = NULL;
    assert_true(asprintf(&path, "%s/made-up.lua", s->dir) > 0);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    calibration_write_gpu(c, "made-up", like, like_name, f);
    fclose(f);
    return path;
}

static struct topology *load(const char *name, json_t **description)
{
    struct err e = { 0 };
    struct topology *t = NULL;
    char file[600];
    test_ok(script_machine(name, description, file, sizeof file, &e), &e);
    json_t *copy = json_deep_copy(*description);
    test_ok(topology_build(&t, copy, file, &e), &e);
    json_decref(copy);
    return t;
}

static void file_says(const char *path, const char *text)
{
    char found[20000];
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    found[fread(found, 1, sizeof found - 1, f)] = '\0';
    fclose(f);
    if (!strstr(found, text))
        fail_msg("\"%s\" is not in\n%s", text, found);
}

/* What an expert takes from the host. */
static void loads_are_found(const struct topology *t)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    double latency, least = INFINITY;
    for (int i = 0, n = topology_route(t, topology_host(t, 0), 0, 0, link, &latency); i < n; i++)
        least = fmin(least, t->link[link[i]].bandwidth);
    assert_near(least, 50e9, 0.01);
    assert_near(latency, 8e-6, 0.05);
}

static void file_is_a_machine(void **state)
{
    struct calibration c;
    json_t *d;
    measure(&c, &made_up, 1);
    char *path = written(*state, &c, NULL, NULL);
    struct topology *t = load(path, &d);
    assert_int_equal(t->n_devices, 1);
    prices_products(&t->device[0], &made_up.device);
    assert_near(compute_plain(&t->device[0], PREC_BF16, 0, 1e9), 3e-6 + 1e9 / (0.8 * 2.048e12), 0.02);
    loads_are_found(t);
    file_says(path, "-- Not measured: links between GPUs: there are none in this machine.");
    file_says(path, "permute, 65536 tokens x 4096: 1620 GB/s, 90.0 % of copies, spread 0.0 %");
    file_says(path, "Made-up GPU (compute capability 9.0, 96 SMs), driver ");
    file_says(path, "cuBLAS 13.1.2");
    topology_free(t);
    json_decref(d);
    free(path);
    calibration_free(&c);
}

/* Everything but the device and its way to the host is the other's. */
static void links_of_another(void **state)
{
    struct calibration c;
    json_t *like, *d;
    struct topology *other = load(MOELAB_SRCDIR "/hw/machines/h800-ib.lua", &like);
    measure(&c, &made_up, 1);
    char *path = written(*state, &c, like, "h800-ib");
    struct topology *t = load(path, &d);
    static const char *const same[] = { "nodes", "devices", "nvlink", "nic", "host", "ssd", "exchange" };
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        assert_non_null(json_object_get(d, same[i]));
        assert_true(json_equal(json_object_get(d, same[i]), json_object_get(like, same[i])));
    }
    prices_products(&t->device[0], &made_up.device);
    loads_are_found(t);
    file_says(path, "-- Not measured, but as machine \"h800-ib\" has it: everything except `device` and `pcie`");
    topology_free(t);
    topology_free(other);
    json_decref(d);
    json_decref(like);
    free(path);
    calibration_free(&c);
}

/* Seconds of an even exchange: the busiest link's. */
static double even_exchange(const struct topology *t, double bytes)
{
    double most = 0, on[t->n_links];
    memset(on, 0, sizeof on);
    for (int32_t i = 0; i < t->n_devices; i++)
        for (int32_t j = 0; j < t->n_devices; j++) {
            int32_t link[TOPOLOGY_MAX_HOPS];
            for (int k = 0, n = i == j ? 0 : topology_route(t, i, j, 0, link, NULL); k < n; k++)
                on[link[k]] += bytes;
        }
    for (int32_t i = 0; i < t->n_links; i++)
        most = fmax(most, on[i] / t->link[i].bandwidth);
    return most;
}

/* However they are spread over nodes, an even exchange takes three copies of a quarter of the bandwidth. */
static void virtual_nodes(void **state)
{
    struct calibration c;
    measure(&c, &made_up, 4);
    for (int nodes = 1; nodes <= 4; nodes *= 2) {
        json_t *d;
        c.n_nodes = nodes;
        char *path = written(*state, &c, NULL, NULL);
        struct topology *t = load(path, &d);
        assert_true(t->n_nodes == nodes && t->n_devices == 4);
        assert_near(even_exchange(t, 1e6), 3 * 1e6 / (1.8e12 / 2 / 4), 0.02);
        topology_free(t);
        json_decref(d);
        free(path);
    }
    calibration_free(&c);
}

static void virtual_machine(void **state)
{
    struct calibration c;
    json_t *d;
    measure(&c, &made_up, 4);
    char *path = written(*state, &c, NULL, NULL);
    struct topology *t = load(path, &d);
    assert_int_equal(t->n_devices, 4);
    assert_near(t->exchange.startup, c.exchange_s, 1e-3);
    file_says(path, "4 virtual ranks of one GPU at once");
    file_says(path, "-- Not measured: links between GPUs, which this machine does not have");
    topology_free(t);
    json_decref(d);
    free(path);
    calibration_free(&c);
}

/* ---- what is missing ---- */

static void little_memory(void **state)
{
    struct timed_gpu small = made_up;
    struct calibration c;
    (void)state;
    small.memory = 4.4e9;
    measure(&c, &small, 1);
    assert_string_equal(c.gpu.note, "kernels of rows with 32768 tokens instead of 65536, for want of memory");
    assert_near(kernel(&c, LATENCY_PERMUTE)->bytes / kernel(&c, LATENCY_PERMUTE)->seconds, 1.62e12, 1e-3);
    calibration_free(&c);
    small.memory = 1e9;
    timed_open(&small);
    struct err e = { 0 };
    struct cuda_calibration gpu = { .n_ranks = 1 };
    assert_int_equal(cuda_calibrate(&gpu, &e), ERR_MEMORY);
    assert_non_null(strstr(e.text, "out of device memory: 1.074 GB for operands"));
    assert_int_equal(timed_left(), 0);
}

static void no_gpu(void **state)
{
    struct timed_gpu none = made_up;
    struct cuda_calibration gpu = { .n_ranks = 1 };
    struct err e = { 0 };
    (void)state;
    none.devices = cudaErrorInsufficientDriver;
    timed_open(&none);
    assert_int_equal(cuda_calibrate(&gpu, &e), ERR_INPUT);
    assert_non_null(strstr(e.text, "no GPU: there is no driver"));
    e = (struct err){ 0 };
    gpu.n_ranks = 65;
    assert_int_equal(cuda_calibrate(&gpu, &e), ERR_INPUT);
    assert_string_equal(e.text, "65 virtual ranks, expected 1 to 64");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rates_are_found),
        cmocka_unit_test(without_fp8),
        cmocka_unit_test(virtual_ranks),
        cmocka_unit_test_setup_teardown(file_is_a_machine, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(links_of_another, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(virtual_machine, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(virtual_nodes, scratch_make, scratch_remove),
        cmocka_unit_test(little_memory),
        cmocka_unit_test(no_gpu),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
