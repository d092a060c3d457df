/* SPDX-License-Identifier: Apache-2.0
 * test_cuda.c - machine cuda without a GPU: the module's own code on stand-ins for CUDA and cuBLAS (standin.h), which
 * run streams as badly ordered as events allow. Whole steps are computed, and every layer is compared with the
 * reference; what is queued is compared with a list written by hand. */
#include "cuda_test.h"

#include "cuda_check.h"
#include "cuda_kernels.h"

/* ---- whole runs ---- */

/* Takes the specification. The largest error of any output, or -1 and what failed. */
static double run_spec(json_t *spec, struct err *e)
{
    struct run *r = cuda_open_run(spec, NULL, e);
    const double error = e->code || run_go(r) < 0 ? -1 : r->machine.max_error;
    test_close_run(r);
    json_decref(spec);
    return error;
}

static double run_well(json_t *spec, uint64_t seed)
{
    struct err e = { 0 };
    standin_open((enum standin_order)(seed % 3), seed, -1);
    const double error = run_spec(spec, &e);
    if (error < 0)
        fail_msg("order %d: %s", (int)(seed % 3), e.text);
    assert_int_equal(standin_left(), 0);
    return error;
}

/* Not 0: the reference computes in double. */
static void assert_single(double error)
{
    assert_true(error > 1e-9 && error < 1e-5);
}

static void layouts_and_placements(void **state)
{
    static const char *const dispatch[] = { "flat", "node-dedup" };
    static const char *const placement[] = { "contiguous", "round-robin", "eplb" };
    static const struct shape shapes[] = { { 2, 1, 1, 4, 2, 3, 2 }, { 3, 1, 2, 6, 2, 4, 2 }, { 2, 2, 3, 8, 3, 4, 2 },
                                           { 2, 4, 2, 16, 4, 3, 2 } };
    uint64_t seed = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int d = 0; d < 2; d++)
            for (int p = 0; p < 3; p++) {
                json_t *spec = cuda_spec(*state, shapes[s]);
                test_policy(spec, "dispatch", dispatch[d]);
                test_policy(spec, "placement", placement[p]);
                assert_single(run_well(spec, seed++));
            }
}

static void offloaded_experts(void **state)
{
    static const char *const offload[] = { "lru", "lfu", "belady" };
    uint64_t seed = 0;
    for (int p = 0; p < 3; p++)
        for (int share = 0; share < 2; share++)
            for (int order = 0; order < 3; order++) {
                json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 2, 8, 2, 4, 4 });
                test_policy(spec, "offload", offload[p]);
                test_set(spec, NULL, "cache", json_real(share ? 0.5 : 0.125));
                assert_single(run_well(spec, seed++));
            }
}

static void in_bf16(void **state)
{
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 2, 2, 8, 2, 6, 2 });
    test_set(spec, "model", "precision", json_string("bf16"));
    const double error = run_well(spec, 1);
    assert_true(error > 1e-4 && error < 1e-2); /* more than single precision's: bf16 it was */
}

/* Logits for a trace of cuda_spec(): halves, many of them equal, so that the order of equals counts. */
static void add_logits(struct scratch *s, const struct shape *x)
{
    char path[600];
    const int64_t tokens = (int64_t)x->nodes * x->devices * x->batch * x->steps, n = tokens * x->layers * x->experts;
    uint16_t *half = malloc((size_t)n * sizeof *half);
    assert_non_null(half);
    for (int64_t i = 0; i < n; i++)
        half[i] = npy_float_to_half((float)(moe_mix((uint64_t)i) % 7) / 4 - 1);
    snprintf(path, sizeof path, "%s/trace/logits.npy", s->dir);
    ok(npy_write(path, "f2", 3, (const int64_t[]){ tokens, x->layers, x->experts }, half, err));
    free(half);
}

/* The GPU chooses the experts that the router has chosen, for every token of every layer, each time. */
static void chosen_experts(void **state)
{
    static const struct shape x = { 2, 2, 3, 12, 4, 3, 2 };
    struct err e = { 0 };
    json_t *spec = cuda_spec(*state, x);
    add_logits(*state, &x);
    test_policy(spec, "router", "softmax-top-k");
    standin_open(STANDIN_ANY, 1, -1);
    struct run *r = cuda_open_run(spec, NULL, &e);
    r->graph.keep_scores = true;
    test_ok(e.code < 0 ? e.code : run_go(r), &e);
    const struct cuda *c = r->machine.priv;
    assert_int_equal(c->decided, 3 * (int64_t)x.steps * x.nodes * x.devices * x.batch * x.layers);
    /* Another choice is noticed. */
    int32_t *ids = c->rank[0].chosen.at;
    int64_t decided = 0;
    ids[1] = ids[0];
    assert_int_equal(cuda_choose_verify(c, &c->rank[0], &r->graph, &decided, &e), ERR_RUN);
    if (strncmp(e.text, "rank 0: top-k on the GPU: layer 0, token ", 41) != 0 || !strstr(e.text, "choice 1: expert "))
        fail_msg("%s", e.text);
    test_close_run(r);
    json_decref(spec);
}

/* ---- a wait that is forgotten is noticed ---- */

/* Each wait in turn is left out. Some are for what was long done, or stand between times and not between data; but of
 * the rest, orders this bad must find most, and the run says so by itself. */
static void lost_waits(void **state)
{
    const struct shape shape = { 2, 1, 1, 4, 2, 4, 1 };
    int found = 0;
    standin_open(STANDIN_LAST, 0, -1);
    struct err e = { 0 };
    json_t *spec = cuda_spec(*state, shape);
    test_set(spec, NULL, "repetitions", json_integer(1));
    assert_true(run_spec(json_incref(spec), &e) >= 0);
    const int64_t n = standin_waits();
    assert_true(n > 10);
    for (int64_t i = 0; i < n; i++) {
        bool noticed = false;
        for (int order = 0; order < 2 && !noticed; order++) {
            e = (struct err){ 0 };
            standin_open((enum standin_order)order, 0, i);
            noticed = run_spec(json_incref(spec), &e) < 0;
            assert_true(!noticed || e.code == ERR_RUN);
        }
        found += noticed;
    }
    json_decref(spec);
    print_message("# %d of %lld lost waits noticed\n", found, (long long)n);
    assert_true(found >= 15);
}

/* ---- what is queued, by hand ---- */

/* Two ranks with a token each, both for expert 0 on rank 0. Streams: 0 and 1 are those that the ranks compute on, 2 and
 * 3 those of their exchanges. A row is 96 bytes, an expert 24 x 16. What comes before is attention and the gate. */
static const char two_ranks[] =
    "s0 gather 1\n"     /* stays, but is put in order */
    "s1 gather 1\n"     /* goes to rank 0 */
    "s2 waits s0\n"     /* the exchange: each rank for its own packing, */
    "s3 waits s1\n"
    "s2 waits s3\n"     /* then the receiver for the sender, */
    "s2 copy d2d 96\n"
    "s3 waits s2\n"     /* and the sender's buffer for the receiver */
    "s0 waits s2\n"
    "s0 gather 2\n"
    "s0 gemms of 2 3072\n" /* gate and up: 2 x 2 x 24 x 16 each */
    "s0 activate 32\n"
    "s0 gemm 1536\n"
    "s0 gather 2\n"     /* one output goes, one stays */
    "s2 waits s0\n"
    "s3 waits s2\n"     /* rank 1 sends nothing: it waits for who sends to it */
    "s3 copy d2d 96\n"
    "s2 waits s3\n"
    "s0 waits s2\n"
    "s0 combine 1\n"
    "s1 waits s3\n"
    "s1 combine 1\n";

static void golden(void **state)
{
    struct err e = { 0 };
    standin_open(STANDIN_LAST, 0, -1);
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 1, 2, 1, 1, 1 });
    test_set(spec, NULL, "repetitions", json_integer(1));
    run_spec(spec, &e);
    test_ok(e.code, &e);
    const char *from = strstr(standin_calls(), "s0 gather"), *again = from ? strstr(from, two_ranks) : NULL;
    assert_non_null(from);
    assert_true(strlen(from) >= strlen(two_ranks));
    if (again != from)
        fail_msg("queued:\n%.*s\nexpected:\n%s", (int)strlen(two_ranks), from, two_ranks);
    assert_non_null(strstr(from + strlen(two_ranks), two_ranks)); /* the run that is timed is the same */
}

/* As many bytes are copied as the graph's parts carry, whatever the ranks and the layout. */
static void conserves(void **state)
{
    static const struct shape shapes[] = { { 2, 1, 2, 16, 2, 5, 1 }, { 3, 1, 2, 12, 3, 5, 1 }, { 2, 2, 2, 16, 4, 5, 1 },
                                           { 3, 2, 2, 24, 4, 5, 1 }, { 2, 4, 2, 16, 4, 5, 1 } };
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++) {
        struct err e = { 0 };
        json_t *spec = cuda_spec(*state, shapes[i / 2]);
        test_policy(spec, "dispatch", i % 2 ? "node-dedup" : "flat");
        test_set(spec, NULL, "repetitions", json_integer(1));
        standin_open(STANDIN_ANY, i, -1);
        struct run *r = cuda_open_run(spec, NULL, &e);
        test_ok(e.code < 0 ? e.code : run_go(r), &e);
        double carried = 0, copied = 0;
        for (int32_t j = 0; j < r->graph.n_parts; j++)
            carried += r->graph.part[j].src == r->graph.part[j].dst ? 0 : 96.0 * (double)r->graph.part[j].n_items;
        for (const char *at = standin_calls(); (at = strstr(at, "copy d2d ")) != NULL; at++)
            copied += strtod(at + strlen("copy d2d "), NULL);
        assert_true(carried > 0);
        assert_near(copied, 2 * carried, 1e-12); /* the step runs twice: once to warm up */
        test_close_run(r);
        json_decref(spec);
    }
}

/* ---- errors ---- */

static void out_of_memory(void **state)
{
    struct err e = { 0 };
    standin_open(STANDIN_LAST, 0, -1);
    struct run *r = cuda_open_run(cuda_spec(*state, (struct shape){ 2, 1, 1, 4, 2, 4, 1 }), NULL, &e);
    test_ok(e.code, &e);
    standin_memory(5000); /* an expert of 24 x 16 takes 4608 */
    assert_int_equal(run_go(r), ERR_MEMORY);
    assert_non_null(strstr(e.text, "out of device memory: 0.000 GB for"));
    assert_non_null(strstr(e.text, "Keep fewer experts"));
    json_t *spec = r->spec;
    test_close_run(r);
    json_decref(spec);
    assert_int_equal(standin_left(), 0);
}

static void devices(void **state)
{
    static const struct { cudaError_t count; int n, driver; const char *text; } cases[] = {
        { cudaErrorInsufficientDriver, 1, 0, "no GPU: there is no driver (an error)" },
        { cudaErrorInsufficientDriver, 1, 12040, "the driver is for CUDA 12.4, expected " },
        { cudaErrorNoDevice, 1, CUDART_VERSION, "no GPU: an error" },
        { cudaSuccess, 0, CUDART_VERSION, "no GPU: the driver knows of none" },
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err e = { 0 };
        standin_device(cases[i].count, cases[i].n, cases[i].driver);
        assert_int_equal(cuda_find_device(&e), ERR_INPUT);
        if (strncmp(e.text, cases[i].text, strlen(cases[i].text)) != 0)
            fail_msg("\"%s\", expected \"%s...\"", e.text, cases[i].text);
    }
    struct err e = { 0 };
    standin_open(STANDIN_LAST, 0, -1);
    test_ok(cuda_find_device(&e), &e);
}

/* A call that fails says which, of which rank and on which device. */
static void failed_calls(void **state)
{
    struct err e = { 0 };
    (void)state;
    assert_int_equal(CUDA_TRY(&e, 3, cudaSetDevice(7)), ERR_RUN);
    assert_string_equal(e.text, "rank 3, GPU 0: cudaSetDevice: an error");
    CUDA_TRY(&e, 4, cudaSetDevice(8)); /* not called any more */
    assert_string_equal(e.text, "rank 3, GPU 0: cudaSetDevice: an error");
    e = (struct err){ 0 };
    assert_int_equal(BLAS_TRY(&e, 2, CUBLAS_STATUS_NOT_SUPPORTED), ERR_RUN);
    assert_string_equal(e.text, "rank 2, GPU 0: CUBLAS_STATUS_NOT_SUPPORTED: an error");
}

/* What one rank sends and the other expects have to agree. */
static void unmatched(void **state)
{
    struct cuda_comm *c;
    cudaStream_t s;
    char buffer[16];
    (void)state;
    standin_open(STANDIN_LAST, 0, -1);
    assert_int_equal(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), cudaSuccess);
    struct err e = { 0 };
    test_ok(cuda_comm_virtual(&c, 2, &e), &e);
    c->ops->group_begin(c, &e);
    c->ops->send(c, 0, buffer, 8, 1, s, &e);
    c->ops->recv(c, 1, buffer, 4, 0, s, &e);
    assert_int_equal(c->ops->group_end(c, &e), ERR_RUN);
    assert_string_equal(e.text, "rank 0 sends 8 bytes to rank 1, which expects 4");
    e = (struct err){ 0 };
    c->ops->group_begin(c, &e);
    c->ops->send(c, 0, buffer, 8, 1, s, &e);
    assert_int_equal(c->ops->group_end(c, &e), ERR_RUN);
    assert_string_equal(e.text, "rank 0 sends 8 bytes to rank 1, which expects none");
    e = (struct err){ 0 };
    c->ops->group_begin(c, &e);
    c->ops->recv(c, 1, buffer, 8, 0, s, &e);
    assert_int_equal(c->ops->group_end(c, &e), ERR_RUN);
    assert_string_equal(e.text, "rank 1 expects 8 bytes from rank 0, which sends none");
    c->ops->close(c);
    cudaStreamDestroy(s);
    assert_int_equal(standin_left(), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(layouts_and_placements, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(offloaded_experts, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(in_bf16, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(chosen_experts, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(lost_waits, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(golden, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(conserves, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(out_of_memory, scratch_make, scratch_remove),
        cmocka_unit_test(devices),
        cmocka_unit_test(failed_calls),
        cmocka_unit_test(unmatched),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
