/* SPDX-License-Identifier: Apache-2.0
 * test_latency_table.c - kernels timed elsewhere: what is read off them, what is left to the model, bad files. */
#include "core_test.h"
#include "latency_table.h"
#include "layer.h"

#include <unistd.h>

static char folder[] = "/tmp/moelab-test-XXXXXX";

static const char *path_of(const char *name)
{
    static char path[2][64];
    static int turn;
    turn = !turn;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static void write_file(const char *name, const char *text)
{
    FILE *file = fopen(path_of(name), "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

/* The tables of a machine file in that folder. */
static int read_tables(struct latency_table **t, struct err *e, const char *a, const char *b)
{
    json_t *files = json_array();
    json_array_append_new(files, json_string(a));
    if (b)
        json_array_append_new(files, json_string(b));
    *e = (struct err){ 0 };
    const int rc = latency_table_read(t, files, path_of("machine.lua"), e);
    json_decref(files);
    return rc;
}

static struct latency_table *table(const char *text)
{
    struct latency_table *t = NULL;
    struct err e;
    write_file("t.csv", text);
    if (read_tables(&t, &e, "t.csv", NULL) != 0)
        fail_msg("%s", e.text);
    return t;
}

#define COLUMNS "op,precision,groups,rows,n,k,latency_us\n"

#define ATTENTION "op,precision,rows,heads,kv_heads,query,value,context,latency_us\n"

static const char small[] = "# a test\n" COLUMNS "grouped_gemm,fp8,4,300,4096,7168,50\n"
                            " grouped_gemm , fp8, 4, 100, 4096, 7168, 20\r\n"
                            "\n"
                            "grouped_gemm,fp8,2,100,4096,7168,12\n"
                            "gemm,bf16,1,64,512,256,4.5\n"
                            "gemm,bf16,1,128,512,256,4\n";

static double ask(const struct latency_table *t, enum latency_op op, enum precision p, int32_t groups, double rows,
                  int64_t n, int64_t k)
{
    const struct latency_key key = { .op = op, .groups = groups, .n = n, .k = k, .rows = rows };
    double seconds = -1;
    return latency_table_lookup(t, p, &key, &seconds) ? seconds * 1e6 : -1;
}

static void counted(const struct latency_table *t, enum latency_family family, int measured, int modelled)
{
    const struct latency_counts n = latency_table_counts(t, family);
    assert_true(n.any);
    assert_int_equal(n.measured, measured);
    assert_int_equal(n.modelled, modelled);
}

static void lookups(void **state)
{
    (void)state;
    struct latency_table *t = table(small);
    assert_near(ask(t, LATENCY_GROUPED_GEMM, PREC_FP8, 4, 100, 4096, 7168), 20, 1e-12);
    assert_near(ask(t, LATENCY_GROUPED_GEMM, PREC_FP8, 4, 300, 4096, 7168), 50, 1e-12);
    assert_near(ask(t, LATENCY_GROUPED_GEMM, PREC_FP8, 4, 150, 4096, 7168), 27.5, 1e-12); /* a quarter of the way */
    assert_near(ask(t, LATENCY_GROUPED_GEMM, PREC_FP8, 4, 100.5, 4096, 7168), 20.075, 1e-12);
    assert_near(ask(t, LATENCY_GROUPED_GEMM, PREC_FP8, 2, 100, 4096, 7168), 12, 1e-12);
    assert_near(ask(t, LATENCY_GEMM, PREC_BF16, 1, 96, 512, 256), 4.25, 1e-12); /* a line may go down */
    static const struct {
        enum latency_op op;
        enum precision p;
        int32_t groups;
        double rows;
        int64_t n, k;
    } outside[] = {
        { LATENCY_GROUPED_GEMM, PREC_FP8, 4, 99, 4096, 7168 },  { LATENCY_GROUPED_GEMM, PREC_FP8, 4, 301, 4096, 7168 },
        { LATENCY_GROUPED_GEMM, PREC_FP8, 2, 101, 4096, 7168 }, { LATENCY_GROUPED_GEMM, PREC_FP8, 2, 99, 4096, 7168 },
        { LATENCY_GROUPED_GEMM, PREC_FP8, 3, 100, 4096, 7168 }, { LATENCY_GROUPED_GEMM, PREC_BF16, 4, 100, 4096, 7168 },
        { LATENCY_GROUPED_GEMM, PREC_FP8, 4, 100, 4095, 7168 }, { LATENCY_GROUPED_GEMM, PREC_FP8, 4, 100, 4096, 7169 },
        { LATENCY_GEMM, PREC_FP8, 4, 100, 4096, 7168 },         { LATENCY_GEMM, PREC_BF16, 1, 63, 512, 256 },
    };
    for (size_t i = 0; i < sizeof outside / sizeof outside[0]; i++)
        assert_true(ask(t, outside[i].op, outside[i].p, outside[i].groups, outside[i].rows, outside[i].n,
                        outside[i].k) == -1);
    latency_table_free(t);
}

/* ---- as launches: the answer in us, the model's being 999 ---- */

static const struct gemm_bytes fp8 = { 1, 1, 2 };

static double launch(struct latency_table *t, enum precision p, int32_t n, const struct gemm_group *group)
{
    return 1e6 * latency_table_gemm(t, p, n, group, &fp8, 999e-6);
}

static void launches(void **state)
{
    (void)state;
    struct latency_table *t = table(small);
    const int64_t n = 4096, k = 7168;
    const struct gemm_group even[] = { { 100, n, k }, { 100, n, k }, { 100, n, k }, { 100, n, k } };
    assert_near(launch(t, PREC_FP8, 4, even), 20, 1e-12);
    /* Idle groups do not count. */
    const struct gemm_group idle[] = { { 0, n, k }, { 100, n, k }, { 0, 1, 1 }, { 100, n, k } };
    assert_near(launch(t, PREC_FP8, 4, idle), 12, 1e-12);
    const struct gemm_group nothing[] = { { 0, n, k } };
    assert_near(launch(t, PREC_FP8, 1, nothing), 999, 1e-12); /* the model's 0 */
    /* 220 is 1.1 times the mean of 200; one row more is not. */
    const struct gemm_group uneven[] = { { 220, n, k }, { 180, n, k }, { 200, n, k }, { 200, n, k } };
    const struct gemm_group too_uneven[] = { { 221, n, k }, { 179, n, k }, { 200, n, k }, { 200, n, k } };
    assert_near(launch(t, PREC_FP8, 4, uneven), 35, 1e-12);
    counted(t, LATENCY_PRODUCTS, 3, 0);
    assert_near(launch(t, PREC_FP8, 4, too_uneven), 999, 1e-12);
    const struct gemm_group other[] = { { 100, n, k }, { 100, n, k }, { 100, n, k }, { 100, n, k + 1 } };
    assert_near(launch(t, PREC_FP8, 4, other), 999, 1e-12);
    const struct gemm_bytes wide = { 1, 2, 2 };
    assert_near(latency_table_gemm(t, PREC_FP8, 4, even, &wide, 7), 7, 1e-12);
    assert_near(launch(t, PREC_FP8, 3, even), 999, 1e-12);
    counted(t, LATENCY_PRODUCTS, 3, 4);
    latency_table_free(t);
}

/* One group is a gemm, or else a grouped_gemm of one. */
static void one_group(void **state)
{
    (void)state;
    struct latency_table *t = table(COLUMNS "gemm,fp8,1,64,8,8,3\n"
                                            "grouped_gemm,fp8,1,64,8,8,5\n"
                                            "grouped_gemm,fp8,1,32,8,8,2\n");
    const struct gemm_group both = { 64, 8, 8 }, grouped = { 32, 8, 8 };
    assert_near(launch(t, PREC_FP8, 1, &both), 3, 1e-12);
    assert_near(launch(t, PREC_FP8, 1, &grouped), 2, 1e-12);
    latency_table_free(t);
}

/* A device asks its table first: DeepGEMM's own 45 us, where the model says 44.4. */
static void a_device(void **state)
{
    (void)state;
    char file[4096];
    snprintf(file, sizeof file, "%s/tests/cli/fixtures/deepgemm-h800.csv", test_env("top_srcdir", "."));
    json_t *d = test_description("h800-ib", 1);
    struct topology *plain = test_build(json_deep_copy(d));
    json_object_set_new(d, "tables", json_pack("[s]", file));
    struct topology *t = test_build(d);
    const struct gemm_group group[] = { { 256, 4096, 7168 }, { 256, 4096, 7168 }, { 256, 4096, 7168 },
                                        { 256, 4096, 7168 } };
    const struct gemm_group dense = { 64, 7168, 16384 }, outside = { 8192, 7168, 16384 };
    const double flops = 2.0 * 4 * 256 * 4096 * 7168;
    assert_near(compute_gemm(&t->device[7], PREC_FP8, 4, group, &fp8), flops / 932e12, 1e-4);
    assert_near(compute_gemm(&t->device[0], PREC_FP8, 1, &dense, &fp8), 2.0 * 64 * 7168 * 16384 / 336e12, 1e-4);
    assert_true(compute_gemm(&plain->device[0], PREC_FP8, 1, &dense, &fp8) <
                0.999 * compute_gemm(&t->device[0], PREC_FP8, 1, &dense, &fp8));
    assert_true(compute_gemm(&plain->device[0], PREC_FP8, 1, &outside, &fp8) ==
                compute_gemm(&t->device[0], PREC_FP8, 1, &outside, &fp8));
    assert_true(compute_gemm(&plain->device[0], PREC_BF16, 4, group, &fp8) ==
                compute_gemm(&t->device[0], PREC_BF16, 4, group, &fp8));
    counted(t->tables, LATENCY_PRODUCTS, 3, 2);
    topology_free(t);
    topology_free(plain);
}

/* ---- what is no product ---- */

static double kernel(struct latency_table *t, enum precision p, const struct latency_key *key)
{
    return 1e6 * latency_table_kernel(t, p, key, 999e-6);
}

/* DeepSeek's decode core: one latent for 128 heads. Rows 64 and 128 at contexts 1000 and 5000, 32 at 5000 alone. */
static void attention_core(void **state)
{
    (void)state;
    struct latency_table *t = table(ATTENTION "attention_decode,bf16,128,128,1,576,512,1000,40\n"
                                              "attention_decode,bf16,64,128,1,576,512,1000,20\n"
                                              "attention_decode,bf16,64,128,1,576,512,5000,60\n"
                                              "attention_decode,bf16,128,128,1,576,512,5000,100\n"
                                              "attention_decode,bf16,32,128,1,576,512,5000,30\n"
                                              "attention_prefill,bf16,4096,128,128,192,128,4096,700\n");
    struct latency_key key = { .op = LATENCY_DECODE, .heads = 128, .kv_heads = 1, .n = 576, .k = 512 };
    static const struct { double rows, context, us; } cases[] = {
        { 64, 1000, 20 }, { 128, 5000, 100 },
        { 96, 1000, 30 },  /* halfway between 20 and 40 */
        { 64, 2000, 30 },  /* a quarter of the way from 20 to 60 */
        { 96, 2000, 42.5 },/* from 30 to 80 */
        { 32, 5000, 30 }, { 48, 5000, 45 },
        { 48, 4999, 999 }, /* no 48 rows at 1000 */
        { 129, 2000, 999 }, { 64, 999, 999 }, { 64, 5001, 999 }, { 31, 5000, 999 },
    };
    int found = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        key.rows = cases[i].rows;
        key.context = cases[i].context;
        assert_near(kernel(t, PREC_BF16, &key), cases[i].us, 1e-12);
        found += cases[i].us < 999;
    }
    counted(t, LATENCY_OTHERS, found, (int)(sizeof cases / sizeof *cases) - found);
    key.rows = 64;
    key.context = 1000;
    struct latency_key other[] = { key, key, key, key, key };
    other[0].heads = 64;
    other[1].kv_heads = 2;
    other[2].n = 575;
    other[3].k = 511;
    other[4].op = LATENCY_PREFILL;
    for (int i = 0; i < 5; i++)
        assert_near(kernel(t, PREC_BF16, &other[i]), 999, 1e-12);
    assert_near(kernel(t, PREC_FP16, &key), 999, 1e-12);
    key = (struct latency_key){ .op = LATENCY_PREFILL, .heads = 128, .kv_heads = 128, .n = 192, .k = 128, .rows = 4096,
                                .context = 4096 };
    assert_near(kernel(t, PREC_BF16, &key), 700, 1e-12);
    latency_table_free(t);
}

/* What a table does not speak of is neither counted nor warned of, products included. */
static void other_ops(void **state)
{
    (void)state;
    struct latency_table *t = table("op,precision,rows,n,k,bytes,latency_us\n"
                                    "norm,fp8,64,7168,,,2\nnorm,fp8,128,7168,,,3\n"
                                    "top_k,bf16,64,256,8,,4\n"
                                    "permute,fp8,,,,1000000,5\npermute,fp8,,,,3000000,9\n");
    const struct gemm_group group = { 64, 8, 8 };
    struct latency_key norm = { .op = LATENCY_NORM, .n = 7168, .rows = 96 },
                       top_k = { .op = LATENCY_TOP_K, .n = 256, .k = 8, .rows = 64 },
                       permute = { .op = LATENCY_PERMUTE, .rows = 1.5e6 },
                       combine = { .op = LATENCY_COMBINE, .rows = 1.5e6 };
    assert_near(kernel(t, PREC_FP8, &norm), 2.5, 1e-12);
    assert_near(kernel(t, PREC_BF16, &top_k), 4, 1e-12);
    assert_near(kernel(t, PREC_FP8, &permute), 6, 1e-12);
    assert_near(kernel(t, PREC_FP8, &combine), 999, 1e-12);
    assert_near(launch(t, PREC_FP8, 1, &group), 999, 1e-12);
    counted(t, LATENCY_OTHERS, 3, 0);
    assert_false(latency_table_counts(t, LATENCY_PRODUCTS).any);
    assert_int_equal(latency_table_counts(t, LATENCY_PRODUCTS).modelled, 0);
    top_k.k = 6;
    assert_near(kernel(t, PREC_BF16, &top_k), 999, 1e-12);
    counted(t, LATENCY_OTHERS, 3, 1);
    latency_table_free(t);
}

/* Tasks of policies are known by their op and their bytes. */
static void tasks(void **state)
{
    (void)state;
    write_file("t.csv", "op,precision,bytes,latency_us\npermute,bf16,1000,5\npermute,bf16,3000,9\n"
                        "combine,bf16,2000,20\n");
    json_t *d = test_description("star-50GBps", 1);
    json_object_set_new(d, "tables", json_pack("[s]", path_of("t.csv")));
    struct topology *t = test_build(d);
    static const struct { enum moe_op op; double us; } cases[] = {
        { MOE_OP_PERMUTE, 7 }, { MOE_OP_COMBINE, 20 }, { MOE_OP_OTHER, 2.5 + 2000 / (3.35e6 * 0.86) },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_graph g = { .n_devices = 1 };
        struct err e = { 0 };
        test_ok(graph_compute(&g, &(struct moe_work){ .op = cases[i].op, .bytes = 2000 }, &e), &e);
        assert_near(1e6 * test_run_graph(t, NET_FLOW, &g), cases[i].us, 1e-9);
        graph_free(&g);
    }
    topology_free(t);
}

/* A layer's kernels ask under the right names: each measured as one more microsecond, in the order they run. */
static void a_layer(void **state)
{
    (void)state;
    static const struct moe_model model = { .n_experts = 256, .top_k = 8, .d_model = 7168, .d_expert = 2048,
                                            .weight_bytes = 1 };
    static const struct attention_shape mla = { .kind = ATTENTION_MLA, .n_heads = 128, .q_lora = 1536, .kv_lora = 512,
                                                .nope = 128, .rope = 64, .v = 128 },
                                        gqa = { .kind = ATTENTION_GQA, .n_heads = 32, .n_kv_heads = 8,
                                                .d_head = 128 };
    write_file("t.csv", "op,precision,rows,n,k,heads,kv_heads,query,value,context,latency_us\n"
                        "norm,fp8,64,7168,,,,,,,1\n"
                        "rotation,fp8,64,10304,,,,,,,2\n" /* 1536 + 128 x 64 + 576 */
                        "attention_decode,bf16,64,,,128,1,576,512,4096,3\n"
                        "attention_prefill,bf16,64,,,64,64,192,128,4096,4\n"
                        "attention_decode,bf16,64,,,8,2,128,128,4096,5\n"
                        "attention_prefill,bf16,64,,,32,8,128,128,4096,6\n"
                        "rotation,fp8,64,1536,,,,,,,7\n"
                        "activation,fp8,64,18432,,,,,,,8\n"
                        "top_k,fp8,64,256,8,,,,,,9\n"
                        "activation,fp8,64,2048,,,,,,,10\n");
    json_t *d = test_description("h800-ib", 1);
    json_object_set_new(d, "tables", json_pack("[s]", path_of("t.csv")));
    struct topology *t = test_build(d);
    const struct device_spec *spec = &t->device[0];
    static const struct {
        const struct attention_shape *shape;
        enum moe_phase phase;
        int32_t tp;
        int us[2]; /* rotation, core */
    } cases[] = {
        { &mla, MOE_DECODE, 1, { 2, 3 } }, { &mla, MOE_PREFILL, 2, { 0, 4 } }, { &gqa, MOE_DECODE, 4, { 7, 5 } },
        { &gqa, MOE_PREFILL, 1, { 0, 6 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct layer_part part = { &model, cases[i].shape, PREC_FP8, cases[i].phase, 64, 4096, cases[i].tp };
        struct kernels k = { .n = 0 };
        int us[3], n = 0;
        layer_attention(&k, &part);
        for (int32_t j = 0; j < k.n; j++)
            if (k.kernel[j].groups == 0)
                us[n++] = (int)lround(1e6 * cost_kernel(spec, &k.kernel[j]).seconds);
        assert_int_equal(n, 3);
        assert_int_equal(us[0], 1);
        if (cases[i].us[0]) /* else of no width that was measured */
            assert_int_equal(us[1], cases[i].us[0]);
        assert_int_equal(us[2], cases[i].us[1]);
    }
    const struct layer_part part = { &model, &mla, PREC_FP8, MOE_DECODE, 64, 4096, 1 };
    struct kernels k = { .n = 0 };
    layer_ffn(&k, &part, 18432);
    assert_near(1e6 * cost_kernel(spec, &k.kernel[1]).seconds, 8, 1e-12);
    k.n = 0;
    layer_gate(&k, &part, 256);
    assert_near(1e6 * cost_kernel(spec, &k.kernel[2]).seconds, 9, 1e-12);
    /* Backwards nothing was measured. */
    struct kernels back = { .n = 0 };
    layer_backward(&back, &k);
    for (int32_t i = 0; i < back.n; i++)
        assert_int_equal(back.kernel[i].key.op, LATENCY_NONE);
    /* Experts' activation: 40 + 24 rows, whatever the roofline says, where all are of one width. */
    const int64_t rows[] = { 40, 0, 24 };
    const double two = compute_experts(spec, PREC_FP8, &model, 3, rows, NULL);
    const struct device_spec plain = { .mem_bandwidth = spec->mem_bandwidth, .mem_efficiency = spec->mem_efficiency,
                                       .launch_s = spec->launch_s };
    struct device_spec untimed = *spec;
    untimed.tables = NULL;
    assert_near(two, compute_experts(&untimed, PREC_FP8, &model, 3, rows, NULL) + 10e-6 -
                         cost_plain(&plain, PREC_FP8, 0, 64 * 2048 * 5.0).seconds, 1e-12);
    const double widths[] = { 0.5, 1, 1 };
    assert_true(compute_experts(spec, PREC_FP8, &model, 3, rows, widths) ==
                compute_experts(&untimed, PREC_FP8, &model, 3, rows, widths));
    topology_free(t);
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        const char *text, *error;
    } cases[] = {
        { "", "t.csv: found nothing, expected a header and rows" },
        { COLUMNS "# only words\n", "t.csv: found a header alone, expected a header and rows" },
        { "op,precision,rows,n,k,second\ngemm\n", "t.csv:2: found 1 cells, expected 6" },
        { "op,precision,rows,n,k,second\n1,2,3,4,5,6\n",
          "t.csv:1: unknown column \"second\"; did you mean \"seconds\"?" },
        { "# x\nop,precision,rows,n,n,k,seconds\n1,2,3,4,5,6,7\n", "t.csv:2: column \"n\" is there twice" },
        { "op,rows,n,seconds\n1,2,3,4\n", "t.csv:1: column \"precision\" is missing" },
        { "op,precision,rows,n,seconds\ngemm,fp8,1,2,3\n",
          "t.csv:2: op: found \"gemm\", but there is no column \"k\"" },
        { "op,precision,seconds,rows,n,k,groups,heads,kv_heads,query,value,context,bytes,a,b,c,d\n",
          "t.csv:1: found more than 16" },
        { "op,precision,rows,n,k\n1,2,3,4,5\n", "\"seconds\" and \"latency_us\": found neither, expected one" },
        { "op,precision,rows,n,k,seconds,latency_us\n1,2,3,4,5,6,7\n", "\"seconds\" and \"latency_us\": found both" },
        { COLUMNS "gemm,fp8,1,64,8,8\n", "t.csv:2: found 6 cells, expected 7" },
        { COLUMNS "gemm,fp8,1,64,8,8,3,\n", "t.csv:2: found 8 cells, expected 7" },
        { COLUMNS "attention,fp8,1,64,8,8,3\n", "t.csv:2: op: found \"attention\", expected one of gemm, grouped_gemm, "
                                                 "attention_prefill, attention_decode, norm, rotation, activation, "
                                                 "top_k, permute, combine" },
        { COLUMNS ",fp8,1,64,8,8,3\n", "t.csv:2: op: found \"\", expected one of gemm, " },
        { COLUMNS "norm,fp8,,64,8,8,3\n", "t.csv:2: k: found \"8\", expected nothing: a norm has no k" },
        { COLUMNS "norm,fp8,1,64,8,,3\n", "t.csv:2: groups: found \"1\", expected nothing: a norm has no groups" },
        { COLUMNS "norm,fp8,,64,,,3\n", "t.csv:2: n: found \"\", expected a whole number from 1" },
        { COLUMNS "top_k,fp8,,64,256,0,3\n", "t.csv:2: k: found \"0\", expected a whole number from 1" },
        { COLUMNS "permute,fp8,,,,,3\n", "t.csv:2: op: found \"permute\", but there is no column \"bytes\"" },
        { ATTENTION "attention_decode,bf16,64,128,1,576,512,,3\n",
          "t.csv:2: context: found \"\", expected a whole number from 0" },
        { ATTENTION "attention_decode,bf16,64,128,0,576,512,4096,3\n",
          "t.csv:2: kv_heads: found \"0\", expected a whole number from 1 to 1048576" },
        { ATTENTION "attention_decode,bf16,64,128,1,576,512,4096,3\nattention_decode,bf16,64,128,1,576,512,4096,4\n",
          "t.csv:3: found 4e-06 s, but t.csv:2 has 3e-06 s for the same" },
        { COLUMNS "gemm,fp9,1,64,8,8,3\n", "t.csv:2: precision: found \"fp9\", expected one of fp32, " },
        { COLUMNS "gemm,fp8,2,64,8,8,3\n", "t.csv:2: groups: found \"2\", expected 1: a gemm has no groups" },
        { COLUMNS "grouped_gemm,fp8,0,64,8,8,3\n", "t.csv:2: groups: found \"0\", expected a whole number from 1" },
        { "op,precision,rows,n,k,seconds\ngrouped_gemm,fp8,64,8,8,3\n",
          "t.csv:2: op: found \"grouped_gemm\", but there" },
        { COLUMNS "gemm,fp8,1,64.5,8,8,3\n",
          "t.csv:2: rows: found \"64.5\", expected a whole number from 1 to 2147483647" },
        { COLUMNS "gemm,fp8,1,-64,8,8,3\n", "t.csv:2: rows: found \"-64\"" },
        { COLUMNS "gemm,fp8,1,99999999999,8,8,3\n", "t.csv:2: rows: found \"99999999999\"" },
        { COLUMNS "gemm,fp8,1,64,,8,3\n", "t.csv:2: n: found \"\", expected a whole number" },
        { COLUMNS "gemm,fp8,1,64,8,8x,3\n", "t.csv:2: k: found \"8x\"" },
        { COLUMNS "gemm,fp8,1,64,8,8,0\n",
          "t.csv:2: latency_us: found \"0\", expected microseconds, more than 0 and less than 1e9" },
        { COLUMNS "gemm,fp8,1,64,8,8,1e9\n", "t.csv:2: latency_us: found \"1e9\", expected microseconds, more than 0" },
        { "op,precision,rows,n,k,seconds\ngemm,fp8,64,8,8,1000\n",
          "t.csv:2: seconds: found \"1000\", expected seconds, more than 0 and less than 1000" },
        { COLUMNS "gemm,fp8,1,64,8,8,-1\n", "t.csv:2: latency_us: found \"-1\"" },
        { COLUMNS "gemm,fp8,1,64,8,8,nan\n", "t.csv:2: latency_us: found \"nan\"" },
        { COLUMNS "gemm,fp8,1,64,8,8,inf\n", "t.csv:2: latency_us: found \"inf\"" },
        { COLUMNS "gemm,fp8,1,64,8,8,3 us\n", "t.csv:2: latency_us: found \"3 us\"" },
        { COLUMNS "gemm,fp8,1,64,8,8,3\ngemm,fp8,1,65,8,8,3\n\ngemm,fp8,1,64,8,8,4\n",
          "t.csv:5: found 4e-06 s, but t.csv:2 has 3e-06 s for the same" },
    };
    struct latency_table *t = NULL;
    struct err e;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_file("t.csv", cases[i].text);
        const int rc = read_tables(&t, &e, "t.csv", NULL);
        if (rc != ERR_INPUT || !strstr(e.text, cases[i].error) || t)
            fail_msg("%s: found %d \"%s\", expected \"%s\"", cases[i].text, rc, e.text, cases[i].error);
    }
    /* Who says the same twice is believed; across files as well. */
    write_file("t.csv", COLUMNS "gemm,fp8,1,64,8,8,3\ngemm,fp8,1,64,8,8,3\n");
    write_file("u.csv", COLUMNS "gemm,fp8,1,64,8,8,3\ngemm,fp8,1,128,8,8,5\n");
    assert_int_equal(read_tables(&t, &e, "t.csv", "u.csv"), 0);
    assert_near(ask(t, LATENCY_GEMM, PREC_FP8, 1, 96, 8, 8), 4, 1e-12);
    assert_string_equal(latency_table_files(t), "t.csv, u.csv");
    latency_table_free(t);
    write_file("u.csv", COLUMNS "gemm,fp8,1,64,8,8,3.5\n");
    assert_int_equal(read_tables(&t, &e, "t.csv", "u.csv"), ERR_INPUT);
    assert_non_null(strstr(e.text, "u.csv:2: found 3.5e-06 s, but t.csv:2 has 3e-06 s"));

    assert_int_equal(read_tables(&t, &e, "none.csv", NULL), ERR_INPUT);
    assert_non_null(strstr(e.text, "machine.lua: tables: none.csv: No such file"));
    assert_int_equal(read_tables(&t, &e, "/etc/passwd", NULL), ERR_INPUT);
    assert_non_null(strstr(e.text, "tables: found \"/etc/passwd\", expected the name of a .csv file"));
    json_t *none = json_object(), *number = json_pack("[i]", 3);
    e = (struct err){ 0 };
    assert_int_equal(latency_table_read(&t, none, "m.lua", &e), ERR_INPUT);
    e = (struct err){ 0 };
    assert_int_equal(latency_table_read(&t, number, "m.lua", &e), ERR_INPUT);
    assert_string_equal(e.text, "m.lua: tables[1]: expected the name of a .csv file");
    json_decref(none);
    json_decref(number);
}

static int make_folder(void **state)
{
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    unlink(path_of("t.csv"));
    unlink(path_of("u.csv"));
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lookups),  cmocka_unit_test(launches), cmocka_unit_test(one_group),
        cmocka_unit_test(a_device), cmocka_unit_test(attention_core), cmocka_unit_test(other_ops),
        cmocka_unit_test(tasks),    cmocka_unit_test(a_layer),       cmocka_unit_test(refusals),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
