/* SPDX-License-Identifier: Apache-2.0
 * test_latency_table.c - products timed elsewhere: what is read off them, what is left to the model, bad files. */
#include "latency_table.h"
#include "machine_test.h"

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

static const char small[] = "# a test\n" COLUMNS "grouped_gemm,fp8,4,300,4096,7168,50\n"
                            " grouped_gemm , fp8, 4, 100, 4096, 7168, 20\r\n"
                            "\n"
                            "grouped_gemm,fp8,2,100,4096,7168,12\n"
                            "gemm,bf16,1,64,512,256,4.5\n"
                            "gemm,bf16,1,128,512,256,4\n";

static double ask(const struct latency_table *t, enum latency_op op, enum precision p, int32_t groups, double rows,
                  int64_t n, int64_t k)
{
    double seconds = -1;
    return latency_table_lookup(t, op, p, groups, rows, n, k, &seconds) ? seconds * 1e6 : -1;
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
    int64_t measured, modelled;
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
    latency_table_counts(t, &measured, &modelled);
    assert_int_equal(measured, 3);
    assert_int_equal(modelled, 0);
    assert_near(launch(t, PREC_FP8, 4, too_uneven), 999, 1e-12);
    const struct gemm_group other[] = { { 100, n, k }, { 100, n, k }, { 100, n, k }, { 100, n, k + 1 } };
    assert_near(launch(t, PREC_FP8, 4, other), 999, 1e-12);
    const struct gemm_bytes wide = { 1, 2, 2 };
    assert_near(latency_table_gemm(t, PREC_FP8, 4, even, &wide, 7), 7, 1e-12);
    assert_near(launch(t, PREC_FP8, 3, even), 999, 1e-12);
    latency_table_counts(t, &measured, &modelled);
    assert_int_equal(measured, 3);
    assert_int_equal(modelled, 4);
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
    int64_t measured, modelled;
    latency_table_counts(t->tables, &measured, &modelled);
    assert_int_equal(measured, 3);
    assert_int_equal(modelled, 2);
    topology_free(t);
    topology_free(plain);
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        const char *text, *error;
    } cases[] = {
        { "", "t.csv: no measurement in it, expected a line that names the columns" },
        { COLUMNS "# only words\n", "t.csv: no measurement in it, expected lines below" },
        { "op,precision,rows,n,k,second\n", "t.csv:1: unknown column \"second\"; did you mean \"seconds\"?" },
        { "# x\nop,precision,rows,n,n,k,seconds\n", "t.csv:2: column \"n\" is there twice" },
        { "op,precision,rows,n,seconds\n", "t.csv:1: column \"k\" is missing" },
        { "op,precision,rows,n,k\n", "\"seconds\" and \"latency_us\": found neither, expected one" },
        { "op,precision,rows,n,k,seconds,latency_us\n", "\"seconds\" and \"latency_us\": found both" },
        { COLUMNS "gemm,fp8,1,64,8,8\n", "t.csv:2: found 6 fields, expected 7" },
        { COLUMNS "gemm,fp8,1,64,8,8,3,\n", "t.csv:2: found 8 fields, expected 7" },
        { COLUMNS "attention,fp8,1,64,8,8,3\n", "t.csv:2: op: found \"attention\", expected one of gemm, " },
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
        { COLUMNS "gemm,fp8,1,64,8,8,0\n", "t.csv:2: latency_us: found \"0\", expected microseconds, more than 0" },
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
        cmocka_unit_test(a_device), cmocka_unit_test(refusals),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
