/* SPDX-License-Identifier: Apache-2.0
 * test_param.c - parameter tables: every type filled and refused, tensors against files and the model, the table's own
 * mistakes. */
#include "core_test.h"

struct conf {
    int64_t whole;
    double real;
    bool flag;
    const char *text;
    int32_t choice;
    struct moe_tensor gate;
};

#define FIELD(f) offsetof(struct conf, f)

static const struct moe_param table[] = {
    { "whole", MOE_INT, FIELD(whole), 3, 1, 100, NULL, "rows", "a count" },
    { "real", MOE_REAL, FIELD(real), 0.5, 0, INFINITY, NULL, NULL, NULL },
    { "flag", MOE_BOOL, FIELD(flag), 1, 0, 0, NULL, "", "" },
    { "text", MOE_STRING, FIELD(text), 0, 0, 0, "hello", "", "" },
    { "choice", MOE_ENUM, FIELD(choice), 1, 0, 0, "red|green|blue", "", "" },
    { "gate", MOE_TENSOR, FIELD(gate), 0, 0, 0, "L,E,H", "", "" },
    MOE_PARAM_END,
};

static const struct moe_plugin plugin = TEST_POLICY(MOE_PLACEMENT, "mine", .params = table,
                                                    .conf_size = sizeof(struct conf));

/* Takes `given`. */
static int fill(struct param_set *s, json_t *given, struct err *e)
{
    memset(e, 0, sizeof *e);
    int code = param_fill(s, &plugin, given, "test:1", e);
    json_decref(given);
    return code;
}

static void defaults(void **state)
{
    (void)state;
    struct param_set s;
    struct err e;
    test_ok(fill(&s, NULL, &e), &e);
    const struct conf *c = s.conf;
    assert_int_equal(c->whole, 3);
    assert_true(c->real == 0.5);
    assert_true(c->flag);
    assert_string_equal(c->text, "hello");
    assert_int_equal(c->choice, 1);
    assert_null(c->gate.data);
    json_t *expected = json_pack("{s:i, s:f, s:b, s:s, s:s, s:n}", "whole", 3, "real", 0.5, "flag", 1, "text", "hello",
                                 "choice", "green", "gate");
    assert_true(json_equal(s.values, expected)); /* what the manifest keeps: all of them, filled in */
    json_decref(expected);
    param_free(&s);
}

static void given(void **state)
{
    (void)state;
    struct param_set s;
    struct err e;
    test_ok(fill(&s, json_pack("{s:f, s:i, s:b, s:s, s:s}", "whole", 8.0, "real", 2, "flag", 0, "text", "", "choice",
                               "blue"), &e), &e);
    const struct conf *c = s.conf;
    assert_int_equal(c->whole, 8); /* 8.0 is whole */
    assert_true(c->real == 2);
    assert_false(c->flag);
    assert_string_equal(c->text, "");
    assert_int_equal(c->choice, 2);
    param_free(&s);
}

static void refused(void **state)
{
    (void)state;
    struct param_set s;
    struct err e;
#define REFUSED(value, ...) assert_says(&e, fill(&s, value, &e), "test:1", __VA_ARGS__, NULL)
    REFUSED(json_pack("[]"), "must be a table", "a list");
    REFUSED(json_pack("{s:i}", "hole", 1), "\"hole\"", "did you mean \"whole\"");
    REFUSED(json_pack("{s:i}", "entirely-else", 1), "\"entirely-else\"", "plugins show mine");
    REFUSED(json_pack("{s:f}", "whole", 8.5), "whole: expected a whole number", "a number");
    REFUSED(json_pack("{s:f}", "whole", 1e300), "whole: expected a whole number");
    REFUSED(json_pack("{s:s}", "whole", "8"), "whole", "a string");
    REFUSED(json_pack("{s:i}", "whole", 0), "whole: 0 is out of range", "1 to 100 rows");
    REFUSED(json_pack("{s:i}", "whole", 101), "whole: 101 is out of range");
    REFUSED(json_pack("{s:f}", "real", -0.1), "real: -0.1 is out of range", "0 to inf"); /* its unit is NULL */
    REFUSED(json_pack("{s:b}", "real", 1), "real: expected a number", "true");
    REFUSED(json_pack("{s:i}", "flag", 1), "flag: expected true or false", "a whole number");
    REFUSED(json_pack("{s:i}", "text", 1), "text: expected a string");
    REFUSED(json_pack("{s:s}", "choice", "gree"), "red|green|blue", "\"gree\"");
    REFUSED(json_pack("{s:i}", "choice", 1), "red|green|blue", "a whole number");
    REFUSED(json_pack("{s:i}", "gate", 1), "path of a .npy file");
    REFUSED(json_pack("{s:s}", "gate", "/no/such.npy"), "gate", "/no/such.npy");
    /* JSON has no NaN; a parser that made one would still be stopped. */
    json_t *nan = json_pack("{s:f}", "real", 1.0);
    if (json_real_set(json_object_get(nan, "real"), NAN) == 0)
        REFUSED(nan, "real: nan is out of range");
    else
        json_decref(nan);
#undef REFUSED
}

static const char *tensor(struct scratch *s, const char *name, int n_dims, const int64_t *shape, float at_7)
{
    float data[64];
    struct err e = { 0 };
    for (int i = 0; i < 64; i++)
        data[i] = (float)i / 4;
    data[7] = at_7;
    test_ok(npy_write(scratch_path(s, name), "f4", n_dims, shape, data, &e), &e);
    return scratch_path(s, name);
}

static void tensors(void **state)
{
    struct scratch *dir = *state;
    struct param_set s;
    struct err e;
    const char *path = tensor(dir, "good.npy", 3, (int64_t[]){ 2, 4, 3 }, 1.75f);
    test_ok(fill(&s, json_pack("{s:s}", "gate", path), &e), &e);
    const struct conf *c = s.conf;
    assert_int_equal(c->gate.n_dims, 3);
    assert_int_equal(c->gate.shape[0], 2);
    assert_int_equal(c->gate.shape[2], 3);
    assert_true(c->gate.data[23] == 5.75f);
    param_free(&s);
    path = tensor(dir, "flat.npy", 1, (int64_t[]){ 24 }, 0);
    assert_says(&e, fill(&s, json_pack("{s:s}", "gate", path), &e), "gate", "1 dimensions", "[L,E,H]", NULL);
    struct err written = { 0 };
    test_ok(npy_write(scratch_path(dir, "ids.npy"), "i4", 3, (int64_t[]){ 1, 1, 1 }, &(int32_t){ 1 }, &written),
            &written);
    assert_says(&e, fill(&s, json_pack("{s:s}", "gate", scratch_path(dir, "ids.npy")), &e), "test:1", "gate", "f4",
                NULL);
    path = tensor(dir, "nan.npy", 3, (int64_t[]){ 2, 4, 3 }, NAN);
    assert_says(&e, fill(&s, json_pack("{s:s}", "gate", path), &e), "gate", "element 7", "not finite", NULL);
}

/* The same written out, as scenarios draw them. */
static void tensors_written_out(void **state)
{
    (void)state;
    struct param_set s;
    struct err e;
    test_ok(fill(&s, json_pack("{s:[[[f,i],[i,i],[i,i]]]}", "gate", 0.5, 1, 2, 3, 4, -5), &e), &e);
    const struct conf *c = s.conf;
    assert_int_equal(c->gate.n_dims, 3);
    assert_int_equal(c->gate.shape[0], 1);
    assert_int_equal(c->gate.shape[1], 3);
    assert_int_equal(c->gate.shape[2], 2);
    for (int i = 0; i < 6; i++)
        assert_true(c->gate.data[i] == (i == 0 ? 0.5f : i == 5 ? -5 : (float)i));
    assert_true(json_is_array(json_object_get(s.values, "gate")));
    param_free(&s);
    assert_says(&e, fill(&s, json_pack("{s:[[i,i]]}", "gate", 1, 2), &e), "gate: has 2 dimensions, expected [L,E,H]",
                NULL);
    assert_says(&e, fill(&s, json_pack("{s:[]}", "gate"), &e), "gate: has 0 dimensions", NULL);
    assert_says(&e, fill(&s, json_pack("{s:[[[i],[i,i]]]}", "gate", 1, 2, 3), &e), "rows are not all as long", NULL);
    assert_says(&e, fill(&s, json_pack("{s:[[[[i]]]]}", "gate", 1), &e), "an element is no number", NULL);
    assert_says(&e, fill(&s, json_pack("{s:[[[s]]]}", "gate", "x"), &e), "an element is no number", NULL);
    assert_says(&e, fill(&s, json_pack("{s:[[[f]]]}", "gate", 1e300), &e), "an element is no 32-bit number", NULL);
}

/* What a tensor's letters stand for is known once there is a model. */
static void tensors_fit_the_model(void **state)
{
    struct scratch *dir = *state;
    struct err e = { 0 };
    struct policy_context c;
    struct policy p;
    struct topology *t = test_machine("star-50GBps", 2);
    test_ok(policy_context_init(&c, &test_model, t, PREC_BF16, 0, 1, &e), &e);
    json_t *right = json_pack("{s:s}", "gate", tensor(dir, "right.npy", 3, (int64_t[]){ 2, 4, 3 }, 0));
    json_t *wrong = json_pack("{s:s}", "gate", tensor(dir, "wrong.npy", 3, (int64_t[]){ 2, 5, 3 }, 0));
    test_ok(policy_open(&p, &c, &plugin, right, "test:1", &e), &e);
    policy_close(&p);
    assert_says(&e, policy_open(&p, &c, &plugin, wrong, "test:1", &e), "gate", "dimension 1 is 5", "expected 4", NULL);
    policy_close(&p);
    json_decref(right);
    json_decref(wrong);
    policy_context_free(&c);
    topology_free(t);
}

static void table_mistakes(void **state)
{
    (void)state;
    static const struct { struct moe_param param[3]; const char *says; } bad[] = {
        { { { "a", (enum moe_type)17, 0, 0, 0, 0, NULL, "", "" }, MOE_PARAM_END }, "unknown type 17" },
        { { { "a", MOE_INT, 4, 0, 0, 0, NULL, "", "" }, MOE_PARAM_END }, "outside conf (offset 4" },
        { { { "a", MOE_INT, 0, 5, 0, 4, NULL, "", "" }, MOE_PARAM_END }, "default 5 is not within [0, 4]" },
        { { { "a", MOE_INT, 0, 0.5, 0, 4, NULL, "", "" }, MOE_PARAM_END }, "default 0.5 is not a whole number" },
        { { { "a", MOE_REAL, 0, NAN, 0, 4, NULL, "", "" }, MOE_PARAM_END }, "default nan is not within" },
        { { { "a", MOE_ENUM, 0, 0, 0, 0, NULL, "", "" }, MOE_PARAM_END }, "needs def_text" },
        { { { "a", MOE_ENUM, 0, 2, 0, 0, "x|y", "", "" }, MOE_PARAM_END }, "default 2 is not one of x|y" },
        { { { "a", MOE_ENUM, 0, -1, 0, 0, "x|y", "", "" }, MOE_PARAM_END }, "default -1 is not one of x|y" },
        { { { "a", MOE_BOOL, 0, 0, 0, 0, NULL, "", "" }, { "a", MOE_BOOL, 1, 0, 0, 0, NULL, "", "" },
            MOE_PARAM_END }, "a appears twice" },
    };
    struct err e = { 0 };
    test_ok(param_check_table(&plugin, "p.so", &e), &e);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const struct moe_plugin p = TEST_POLICY(MOE_PLACEMENT, "mine", .params = bad[i].param, .conf_size = 8);
        memset(&e, 0, sizeof e);
        assert_says(&e, param_check_table(&p, "p.so", &e), "p.so: parameter a", bad[i].says, NULL);
    }
}

static void described(void **state)
{
    (void)state;
    json_t *list = param_describe(&plugin);
    assert_int_equal(json_array_size(list), 6);
    const json_t *whole = json_array_get(list, 0), *real = json_array_get(list, 1), *choice = json_array_get(list, 4);
    assert_int_equal(json_integer_value(json_object_get(whole, "max")), 100);
    assert_string_equal(json_string_value(json_object_get(whole, "unit")), "rows");
    assert_null(json_object_get(real, "max")); /* none */
    assert_string_equal(json_string_value(json_object_get(real, "help")), "");
    assert_string_equal(json_string_value(json_object_get(choice, "default")), "green");
    json_decref(list);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults),
        cmocka_unit_test(given),
        cmocka_unit_test(refused),
        cmocka_unit_test_setup_teardown(tensors, scratch_make, scratch_remove),
        cmocka_unit_test(tensors_written_out),
        cmocka_unit_test_setup_teardown(tensors_fit_the_model, scratch_make, scratch_remove),
        cmocka_unit_test(table_mistakes),
        cmocka_unit_test(described),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
