/* SPDX-License-Identifier: Apache-2.0
 * test_device_memory.c - what does not fit is refused, to the byte. Sizes by hand:
 *   an expert is 3 x 1000 x 1000 bytes; attention with 8 heads of 100 takes 2 x 800,000 + 2 x 800,000 bytes a layer,
 *   the gate 4 x 1000: two layers hold 6.408e6 bytes beside 8 experts of 24e6; nine tenths of the memory are for
 *   weights. */
#include "core_test.h"

static const double fixed = 2 * (3.2e6 + 4e3), expert = 3e6;

static json_t *spec_with(struct scratch *s, double memory, double host)
{
    static const uint8_t zero[8] = { 0, 1, 2, 3, 0, 1, 2, 3 };
    json_t *machine = test_description("rtx4090-pcie4", 1);
    json_object_set_new(json_object_get(machine, "device"), "memory", test_bytes(memory));
    json_object_set_new(json_object_get(machine, "host"), "memory", test_bytes(host));
    return test_spec(machine, test_trace(s, "two", 1, 2, 2, 4, 2, zero), 2, 4, 2, 1, 2);
}

/* Takes the specification. NULL: it runs; else every text is part of the refusal. */
static void expect(json_t *spec, const char *a, const char *b)
{
    struct err e = { 0 };
    struct run *r = malloc(sizeof *r);
    int code = run_open(r, spec, &e);
    if (code == 0)
        code = run_go(r);
    if (!a)
        test_ok(code, &e);
    else
        assert_says(&e, code, "test:1", "rtx4090-pcie4", a, b, NULL);
    if (a)
        assert_int_equal(e.code, ERR_INPUT);
    test_close_run(r);
    json_decref(spec);
}

static void all_resident(void **state)
{
    const double least = (fixed + 8 * expert) / 0.9;
    expect(spec_with(*state, least * (1 + 1e-9), 1e6), NULL, NULL);
    expect(spec_with(*state, least * (1 - 1e-9), 1e6), "its experts take 0.024 GB",
           "fewer replicas, or an offload policy");
}

static void cached(void **state)
{
    const double least = (fixed + 4 * expert) / 0.9;
    const struct { double memory, host; const char *a, *b; } row[] = {
        { least * (1 + 1e-9), 8 * expert, NULL, NULL },
        { least * (1 - 1e-9), 8 * expert, "the cached experts take 0.012 GB", "smaller cache" },
        { least * (1 + 1e-9), 8 * expert - 1, "node 0: its devices' experts take 0.024 GB", "larger host" },
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        json_t *spec = spec_with(*state, row[i].memory, row[i].host);
        test_policy(spec, "offload", "lru");
        test_set(spec, NULL, "cache", json_real(0.5));
        expect(spec, row[i].a, row[i].b);
    }
}

/* Of two nodes each holds what its own devices load: contiguous, half of each layer's experts. */
static void host_of_each_node(void **state)
{
    static const uint8_t zero[8] = { 0, 1, 2, 3, 0, 1, 2, 3 };
    for (int sign = -1; sign <= 1; sign += 2) {
        json_t *machine = test_description("dgx-h100", 2), *spec;
        json_object_set_new(machine, "devices", json_integer(1));
        json_object_set_new(json_object_get(machine, "host"), "memory", test_bytes(4 * expert + sign));
        spec = test_spec(machine, test_trace(*state, "two", 1, 2, 2, 4, 2, zero), 2, 4, 2, 1, 2);
        test_policy(spec, "offload", "lru");
        struct err e = { 0 };
        struct run *r = test_open_run(spec, &e);
        if (sign > 0)
            test_ok(placement_start(r), &e);
        else
            assert_says(&e, placement_start(r), "dgx-h100, node 0: its devices' experts take 0.012 GB", NULL);
        test_close_run(r);
        json_decref(spec);
    }
}

/* Without a share, the cache is what the device holds. */
static void default_cache(void **state)
{
    struct err e = { 0 };
    json_t *spec = spec_with(*state, (fixed + 3 * expert) / 0.9 + 1, 1e9);
    test_policy(spec, "offload", "lru");
    struct run *r = test_open_run(spec, &e);
    assert_int_equal(r->context.cache_objects, 3);
    assert_near(r->offload.env.cache_bytes, 3 * expert, 1e-12);
    assert_near(r->context.view.expert_room[0], 3 * expert, 1e-6);
    test_close_run(r);
    json_decref(spec);

    spec = spec_with(*state, fixed / 0.9, 1e9);
    test_policy(spec, "offload", "lru");
    expect(spec, "a cache of one expert", "smaller cache");
}

/* Shared experts are on every device: two more in each of the two layers. */
static void shared_experts(void **state)
{
    const double least = (fixed + 2 * 2 * expert + 8 * expert) / 0.9;
    for (int sign = -1; sign <= 1; sign += 2) {
        json_t *spec = spec_with(*state, least * (1 + sign * 1e-9), 1e6);
        test_set(spec, "model", "shared", json_integer(2));
        expect(spec, sign < 0 ? "every device holds 0.01841 GB" : NULL, "fewer replicas");
    }
}

/* Three requests, 1000 tokens of context: keys and values of 8 heads of 100, 2 bytes each, in both layers. */
static void keys_and_values(void **state)
{
    const double least = (fixed + 2 * 3 * 1000 * 2 * 800 * 2 + 8 * expert) / 0.9;
    for (int sign = -1; sign <= 1; sign += 2) {
        json_t *spec = spec_with(*state, least * (1 + sign * 1e-9), 1e6);
        test_set(spec, "workload", "batch_per_device", json_integer(3));
        test_set(spec, "workload", "context", json_integer(1000));
        expect(spec, sign < 0 ? "every device holds 0.02561 GB" : NULL, "less context");
    }
}

/* A cache of all experts on each of two devices never holds more than the half that is placed there. */
static void caches_hold_what_is_placed(void **state)
{
    static const uint8_t zero[8] = { 0, 1, 2, 3, 0, 1, 2, 3 };
    for (int sign = -1; sign <= 1; sign += 2) {
        json_t *machine = test_description("dgx-h100", 1), *spec;
        json_object_set_new(machine, "devices", json_integer(2));
        json_object_set_new(json_object_get(machine, "device"), "memory",
                            test_bytes((fixed + 4 * expert) / 0.9 * (1 + sign * 1e-9)));
        spec = test_spec(machine, test_trace(*state, "two", 1, 2, 2, 4, 2, zero), 2, 4, 2, 1, 2);
        test_policy(spec, "offload", "lru");
        test_set(spec, NULL, "cache", json_real(1));
        struct err e = { 0 };
        struct run *r = test_open_run(spec, &e);
        if (sign > 0)
            test_ok(placement_start(r), &e);
        else
            assert_says(&e, placement_start(r), "dgx-h100, device 0: the cached experts take 0.012 GB", NULL);
        test_close_run(r);
        json_decref(spec);
    }
}

/* A shard takes its share of an expert: a device with room for four experts holds eight halves, not nine. */
static void shards(void **state)
{
    struct err e = { 0 };
    json_t *spec = spec_with(*state, (fixed + 4 * expert) / 0.9 + 1, 1e6);
    struct run *r = test_open_run(spec, &e);
    struct moe_replica half[9];
    for (int i = 0; i < 9; i++)
        half[i] = (struct moe_replica){ .layer = 0, .expert = i / 2, .device = 0, .fraction = 0.5f };
    static const int32_t first[] = { 0, 2, 4, 6, 8, 9 };
    struct moe_placement p = { .n = 8, .replica = half, .expert_first = first };
    test_ok(device_memory_check(r, &p), &e);
    p.n = 9;
    assert_says(&e, device_memory_check(r, &p), "its experts take 0.0135 GB", NULL);
    test_close_run(r);
    json_decref(spec);
}

static void none_has_no_cache(void **state)
{
    json_t *spec = spec_with(*state, 24e9, 1e9);
    struct err e = { 0 };
    struct run *r = malloc(sizeof *r);
    test_set(spec, NULL, "cache", json_real(0.5));
    assert_says(&e, run_open(r, spec, &e), "test:1", "cache: offload none keeps every expert resident", NULL);
    test_close_run(r);
    json_decref(spec);
}

/* 2,800,000 bytes too little. Keys and values of 3 requests of 1000 tokens take 19.2e6: what is there suffices for 854
 * tokens, or 2 requests; and 24e6 of experts fit on two devices that have 21.2e6 of room each. */
static void what_would_fit(void **state)
{
    const double least = (fixed + 2 * 3 * 1000 * 2 * 800 * 2 + 8 * expert - 2.8e6) / 0.9;
    json_t *spec = spec_with(*state, least, 1e6);
    test_set(spec, "workload", "batch_per_device", json_integer(3));
    test_set(spec, "workload", "context", json_integer(1000));
    expect(spec, "0.0028 GB too much; context 854 fits, or batch_per_device 2",
           "one copy of every expert fits on 2 such devices");
}

#define WITH_SCRATCH(test) cmocka_unit_test_setup_teardown(test, scratch_make, scratch_remove)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SCRATCH(all_resident), WITH_SCRATCH(cached), WITH_SCRATCH(host_of_each_node),
        WITH_SCRATCH(default_cache), WITH_SCRATCH(shared_experts),
        WITH_SCRATCH(keys_and_values), WITH_SCRATCH(caches_hold_what_is_placed),
        WITH_SCRATCH(none_has_no_cache), WITH_SCRATCH(what_would_fit), WITH_SCRATCH(shards),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
