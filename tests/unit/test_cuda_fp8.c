/* SPDX-License-Identifier: Apache-2.0
 * test_cuda_fp8.c - machine cuda in FP8: numbers of 8 bits against their closed form, and whole steps on stand-ins
 * (standin.h), which are verified with a reference that rounds as the GPU does. */
#include "cuda_test.h"

#include "cuda_e4m3.h"
#include "host_model.h"

/* ---- numbers ---- */

/* What a code stands for, from its definition. */
static double value_of(int code)
{
    const int sign = code >> 7, exponent = code >> 3 & 15, mantissa = code & 7;
    const double size = exponent == 0 ? mantissa / 8.0 * pow(2, -6) : (1 + mantissa / 8.0) * pow(2, exponent - 7);
    return (sign ? -1 : 1) * size;
}

static void all_codes(void **state)
{
    (void)state;
    for (int code = 0; code < 256; code++) {
        if ((code & 0x7f) == 0x7f) {
            assert_true(isnan(cuda_e4m3_value((uint8_t)code)));
            continue;
        }
        assert_true((double)cuda_e4m3_value((uint8_t)code) == value_of(code));
        assert_int_equal(cuda_e4m3_of((float)value_of(code)), code);
    }
    assert_true(cuda_e4m3_value(0x7e) == 448 && cuda_e4m3_value(0x08) == 0x1p-6f && cuda_e4m3_value(0x01) == 0x1p-9f);
}

/* Halfway between two neighbours the even code, and the nearer one a step beside that. */
static void rounds_to_nearest(void **state)
{
    (void)state;
    for (int code = 0; code < 0x7e; code++)
        for (int sign = 0; sign <= 0x80; sign += 0x80) {
            const float middle = (float)((value_of(sign | code) + value_of(sign | (code + 1))) / 2);
            assert_int_equal(cuda_e4m3_of(middle), sign | (code % 2 == 0 ? code : code + 1));
            assert_int_equal(cuda_e4m3_of(nextafterf(middle, 0)), sign | code);
            assert_int_equal(cuda_e4m3_of(nextafterf(middle, sign ? -INFINITY : INFINITY)), sign | (code + 1));
        }
    for (uint64_t i = 0; i < 20000; i++) { /* none is nearer than the one that is chosen */
        const float v = ldexpf((float)(2 * moe_unit(moe_mix(i)) - 1), (int)(i % 22) - 12);
        const double off = fabs(value_of(cuda_e4m3_of(v)) - (double)v);
        for (int code = 0; code < 256; code++)
            assert_true((code & 0x7f) == 0x7f || fabs(value_of(code) - (double)v) >= off);
    }
}

static void saturates(void **state)
{
    static const float beyond[] = { 448, 449, 464, 480, 1000, 1e30f, INFINITY };
    (void)state;
    for (size_t i = 0; i < sizeof beyond / sizeof *beyond; i++) {
        assert_int_equal(cuda_e4m3_of(beyond[i]), 0x7e);
        assert_int_equal(cuda_e4m3_of(-beyond[i]), 0xfe);
    }
    assert_int_equal(cuda_e4m3_of(NAN) & 0x7f, 0x7f);
    assert_int_equal(cuda_e4m3_of(0x1p-10f), 0);                  /* half of the least: to even */
    assert_int_equal(cuda_e4m3_of(nextafterf(0x1p-10f, 1)), 1);
    assert_int_equal(cuda_e4m3_of(-0.0f), 0x80);
    assert_int_equal(cuda_e4m3_of(0x1p-140f), 0);
}

/* The least power of two by which what is divided fits. */
static void scales(void **state)
{
    (void)state;
    assert_true(cuda_e4m3_scale(448) == 1 && cuda_e4m3_scale(nextafterf(448, 500)) == 2);
    assert_true(cuda_e4m3_scale(224) == 0.5f && cuda_e4m3_scale(nextafterf(224, 500)) == 1);
    assert_true(cuda_e4m3_scale(0) == 1 && cuda_e4m3_scale(NAN) == 1);
    for (uint64_t i = 0; i < 2000; i++) {
        const float v = ldexpf((float)(0.5 + moe_unit(moe_mix(i)) / 2), (int)(i % 120) - 60), s = cuda_e4m3_scale(v);
        int exponent;
        assert_true(frexpf(s, &exponent) == 0.5f);
        assert_true(v / s <= 448 && v / s > 224);
    }
    assert_true(isfinite(cuda_e4m3_scale(INFINITY)) && cuda_e4m3_scale(0x1p-140f) > 0);
}

static void rounds_as_codes_do(void **state)
{
    enum { N = 64 };
    float v[N], rounded[N];
    uint8_t code[N];
    (void)state;
    for (int i = 0; i < N; i++)
        rounded[i] = v[i] = (float)(20 * moe_unit(moe_mix((uint64_t)i)) - 10);
    const float scale = cuda_e4m3_codes(N, v, code);
    assert_true(scale == 0x1p-5f); /* 10 / 448 < 1 / 32 */
    cuda_e4m3_round(N, rounded);
    for (int i = 0; i < N; i++) {
        assert_true((double)rounded[i] == (double)scale * value_of(code[i]));
        assert_true(fabsf(rounded[i] - v[i]) <= fmaxf(fabsf(v[i]) / 16, scale / 1024));
    }
}

/* ---- whole runs ---- */

static json_t *fp8_spec(struct scratch *s, struct shape x)
{
    json_t *spec = cuda_spec(s, x);
    test_set(spec, "model", "d_model", json_integer(48));
    test_set(spec, "model", "d_expert", json_integer(32));
    test_set(spec, "model", "precision", json_string("fp8"));
    return spec;
}

static int count(const char *calls, const char *what)
{
    int n = 0;
    for (const char *at = calls; (at = strstr(at, what)) != NULL; at++)
        n++;
    return n;
}

/* Takes the specification. */
static void run_well(json_t *spec, uint64_t seed)
{
    struct err e = { 0 };
    standin_open((enum standin_order)(seed % 3), seed, -1);
    struct run *r = cuda_open_run(spec, NULL, &e);
    test_ok(e.code, &e);
    if (run_go(r) < 0)
        fail_msg("order %d: %s", (int)(seed % 3), e.text);
    assert_true(r->machine.max_error > 1e-4 && r->machine.max_error < 1e-2);
    assert_true(count(standin_calls(), " gemm in fp8 ") > 0);
    json_t *result = run_result(r);
    assert_string_equal(json_string_value(json_object_get(result, "products")), "one by one");
    json_decref(result);
    test_close_run(r);
    json_decref(spec);
    assert_int_equal(standin_left(), 0);
}

static void layouts(void **state)
{
    static const struct shape shapes[] = { { 2, 1, 2, 8, 2, 5, 2 }, { 3, 1, 2, 12, 3, 5, 2 }, { 2, 2, 3, 16, 4, 5, 2 },
                                           { 2, 4, 2, 32, 4, 4, 2 } };
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++) {
        json_t *spec = fp8_spec(*state, shapes[i / 2]);
        test_policy(spec, "dispatch", i % 2 ? "node-dedup" : "flat");
        run_well(spec, i);
    }
}

/* An expert in the host's memory has its scales behind its weights. */
static void offloaded(void **state)
{
    for (uint64_t i = 0; i < 3; i++) {
        json_t *spec = fp8_spec(*state, (struct shape){ 2, 1, 2, 8, 2, 4, 4 });
        test_policy(spec, "offload", i == 1 ? "belady" : "lru");
        test_set(spec, NULL, "cache", json_real(i == 2 ? 0.5 : 0.125));
        run_well(spec, i);
        assert_true(count(standin_calls(), "copy h2d 4624\n") > 0); /* 3 x 48 x 32, and 16 for scales */
    }
}

/* Two ranks with a token each, both for expert 0 on rank 0, as in test_cuda.c: what the experts' task queues. */
static const char task[] =
    "s0 gather in fp8 2\n"
    "s0 gemm in fp8 6144\n" /* 2 x 2 x 48 x 32 */
    "s0 gemm in fp8 6144\n"
    "s0 activate in fp8 2\n"
    "s0 gemm in fp8 6144\n"
    "s0 scale 2\n";

static void golden(void **state)
{
    struct err e = { 0 };
    standin_open(STANDIN_LAST, 0, -1);
    json_t *spec = fp8_spec(*state, (struct shape){ 2, 1, 1, 2, 1, 1, 1 });
    test_set(spec, NULL, "repetitions", json_integer(1));
    struct run *r = cuda_open_run(spec, NULL, &e);
    test_ok(e.code < 0 ? e.code : run_go(r), &e);
    if (count(standin_calls(), task) != 2) /* the step runs twice: once to warm up */
        fail_msg("queued:\n%s", standin_calls());
    /* Weights lie column by column, each matrix with its own scale. */
    const struct cuda *c = r->machine.priv;
    const uint8_t *w = NULL;
    for (int i = 0; i < 2 && !w; i++)
        w = c->rank[0].weights[i];
    assert_non_null(w);
    const float *scale = (const float *)(const void *)(w + 3 * cuda_matrix_bytes(c, 32));
    for (int i = 0; i < 3; i++) {
        int exponent;
        assert_true(frexpf(scale[i], &exponent) == 0.5f && scale[i] < 1e-3f); /* weights are below 1 */
    }
    test_close_run(r);
    json_decref(spec);
}

/* What a task of experts left behind is looked at number by number. */
static void looks_closely(void **state)
{
    struct err e = { 0 };
    standin_open(STANDIN_FIRST, 0, -1);
    json_t *spec = fp8_spec(*state, (struct shape){ 2, 1, 2, 4, 2, 4, 1 });
    struct run *r = cuda_open_run(spec, NULL, &e);
    test_ok(e.code < 0 ? e.code : run_go(r), &e);
    const struct cuda *c = r->machine.priv;
    for (int32_t i = 0; i < 2; i++)
        test_ok(cuda_verify_fp8(c, &c->rank[i], &r->graph, &e), &e);
    for (int64_t i = 0; i < c->plan.n_op; i++) {
        const struct cuda_op *op = &c->plan.op[i];
        for (int32_t j = op->first_act; j < op->first_act + op->n_acts; j++) {
            const struct cuda_act *a = &c->plan.act[j];
            if (a->what != CUDA_EXPERTS)
                continue;
            const struct cuda_rank *rank = &c->rank[op->rank];
            uint8_t *hidden = (uint8_t *)c->stream[op->stream].hidden.at + c->plan.experts[a->entry].kept * 32;
            uint16_t *out = (uint16_t *)rank->rows.at + a->row * 48;
            int largest = 0;
            for (int x = 0; x < 32; x++)
                largest = (hidden[x] & 0x7f) > (hidden[largest] & 0x7f) ? x : largest;
            const uint8_t code = hidden[largest];
            hidden[largest] -= 2; /* two steps: one could be rounding */
            assert_int_equal(cuda_verify_fp8(c, rank, &r->graph, &e), ERR_RUN);
            if (!strstr(e.text, "row 0, hidden element "))
                fail_msg("%s", e.text);
            e = (struct err){ 0 };
            hidden[largest] = code;
            out[5] ^= 0x8000; /* its sign */
            assert_int_equal(cuda_verify_fp8(c, rank, &r->graph, &e), ERR_RUN);
            if (!strstr(e.text, "row 0, element 5: "))
                fail_msg("%s", e.text);
            e = (struct err){ 0 };
            out[5] ^= 0x8000;
        }
    }
    test_close_run(r);
    json_decref(spec);
}

/* A reference that rounds otherwise is further away than what is allowed: the GPU did compute in FP8. */
static float as_it_is(float v)
{
    return v;
}

static void nothing(size_t n, float *v)
{
    (void)n;
    (void)v;
}

static void rounding_matters(void **state)
{
    static const struct host_rounding none = { nothing, as_it_is }, rounding = { cuda_e4m3_round, as_it_is };
    static const int32_t place[] = { 0 };
    static const struct graph_route routes[] = { { 0, 1, 0.5f }, { 0, 2, 0.5f } };
    const struct moe_model m = { .n_layers = 1, .n_experts = 4, .top_k = 2, .d_model = 48, .d_expert = 32 };
    struct err e = { 0 };
    float x[48];
    const float *in[] = { x };
    double exact[48], plain[48], rounded[48], largest = 0, most = 0;
    (void)state;
    host_input(&m, 0, 0, x);
    test_ok(host_reference(&m, 0, routes, 2, place, 1, in, NULL, exact, &e), &e);
    test_ok(host_reference(&m, 0, routes, 2, place, 1, in, &none, plain, &e), &e);
    test_ok(host_reference(&m, 0, routes, 2, place, 1, in, &rounding, rounded, &e), &e);
    for (int i = 0; i < 48; i++) {
        assert_true(fabs(plain[i] - exact[i]) < 1e-6);
        largest = fmax(largest, fabs(exact[i]));
        most = fmax(most, fabs(rounded[i] - exact[i]));
    }
    assert_true(most > 1e-2 * largest && most < 0.2 * largest);
}

/* ---- what is refused ---- */

static void refuse(json_t *spec, const char *text)
{
    struct err e = { 0 };
    struct run *r = cuda_open_run(spec, NULL, &e);
    if (!e.code)
        run_go(r);
    assert_int_equal(e.code, ERR_INPUT);
    if (!strstr(e.text, text))
        fail_msg("\"%s\", expected \"%s\"", e.text, text);
    test_close_run(r);
    json_decref(spec);
    assert_int_equal(standin_left(), 0);
}

static void refused(void **state)
{
    static const struct shape small = { 2, 1, 1, 4, 2, 3, 1 };
    static const struct { const char *key; int value; const char *text; } wrong[] = {
        { "d_model", 40, "model.d_model: fp8 needs a multiple of 16, found 40" },
        { "d_expert", 24, "model.d_expert: fp8 needs a multiple of 16, found 24" },
        { "d_head", 12, "rank 0: a product with weights of 48 x 36 in fp8: expected multiples of 16" },
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        json_t *spec = fp8_spec(*state, small);
        test_set(spec, "model", wrong[i].key, json_integer(wrong[i].value));
        standin_open(STANDIN_LAST, 0, -1);
        refuse(spec, wrong[i].text);
    }
    static const struct { int major, minor; const char *text; } old[] = {
        { 8, 0, "rank 0, GPU 0: model.precision: fp8 needs compute capability 8.9 or higher, found 8.0" },
        { 7, 9, "found 7.9" },
    };
    for (size_t i = 0; i < sizeof old / sizeof *old; i++) {
        standin_open(STANDIN_LAST, 0, -1);
        standin_capability(old[i].major, old[i].minor);
        refuse(fp8_spec(*state, small), old[i].text);
    }
    standin_capability(8, 9);
    run_well(fp8_spec(*state, small), 0);
    standin_capability(9, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_codes),
        cmocka_unit_test(rounds_to_nearest),
        cmocka_unit_test(saturates),
        cmocka_unit_test(scales),
        cmocka_unit_test(rounds_as_codes_do),
        cmocka_unit_test_setup_teardown(layouts, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(offloaded, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(golden, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(looks_closely, scratch_make, scratch_remove),
        cmocka_unit_test(rounding_matters),
        cmocka_unit_test_setup_teardown(refused, scratch_make, scratch_remove),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
