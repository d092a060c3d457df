/* SPDX-License-Identifier: Apache-2.0
 * test_cache.c - offload policies against published miss counts and hand-made cases. */
#include "policy_test.h"
#include "zipf.h"

/* Policies that evict. The skeleton, a plain first in first out, is covered where it has been built. */
static const char *const evicting[] = {"lru", "lfu", "belady", "layer-distance", "skeleton"};

static size_t n_evicting(void)
{
    size_t n = sizeof evicting / sizeof *evicting;
    return policy_find("offload", "skeleton") != NULL ? n : n - 1;
}

struct stream {
    uint32_t *object;
    int64_t *next_use;
    int64_t n;
    int32_t n_layers, n_experts;
};

static void stream_finish(struct stream *s)
{
    s->next_use = malloc((size_t)s->n * sizeof *s->next_use);
    policy_next_use(s->object, s->n, (uint32_t)(s->n_layers * s->n_experts), s->next_use);
}

static void stream_free(struct stream *s)
{
    free(s->object);
    free(s->next_use);
}

static struct stream stream_zipf(void)
{
    struct stream s = {.n = ZIPF_REQUESTS, .n_layers = 60, .n_experts = ZIPF_OBJECTS / 60};
    s.object = malloc((size_t)s.n * sizeof *s.object);
    assert_int_equal(zipf_fill(s.object, (size_t)s.n, ZIPF_OBJECTS, ZIPF_ALPHA, ZIPF_SEED, ZIPF_SHUFFLE_SEED), 0);
    stream_finish(&s);
    return s;
}

/* The recorded trace: u1 [tokens, 24, 4] after the header, whose length is at byte 8. */
static struct stream stream_recorded(void)
{
    char path[1024];
    uint8_t head[10];
    struct stream s = {.n_layers = 24, .n_experts = 32, .n = (int64_t)7684 * 24 * 4};
    test_shared_path("traces/gpt-oss-20b/experts.npy", path);
    uint8_t *expert = malloc((size_t)s.n);
    s.object = malloc((size_t)s.n * sizeof *s.object);
    FILE *in = fopen(path, "rb");
    assert_int_equal(fread(head, 1, sizeof head, in), sizeof head);
    assert_int_equal(fseek(in, head[8] + 256 * head[9], SEEK_CUR), 0);
    assert_int_equal(fread(expert, 1, (size_t)s.n, in), s.n);
    fclose(in);
    for (int64_t i = 0; i < s.n; i++)
        s.object[i] = (uint32_t)(i / 4 % 24) * 32 + expert[i];
    free(expert);
    stream_finish(&s);
    return s;
}

static int64_t misses_of(const char *name, const struct stream *s, int64_t capacity, int32_t pin)
{
    struct policy_shape shape = {s->n_layers, s->n_experts, 1, 1, 1, capacity, 1};
    struct policy_host host;
    struct policy policy;
    policy_host_open(&host, &shape);
    assert_int_equal(policy_start(&policy, &host, test_plugin("offload", name), NULL), MOE_OK);
    int64_t misses = policy_replay(&policy, s->object, s->n, s->next_use, pin, NULL);
    if (misses < 0)
        fail_msg("%s: %s", name, host.failure);
    policy_stop(&policy);
    policy_host_close(&host);
    return misses;
}

static void check_published(const char *stream, const struct stream *s)
{
    json_t *all = test_golden("cache.json"), *c;
    size_t i, n = 0;
    json_array_foreach(json_object_get(all, "cases"), i, c) {
        const json_t *misses = json_object_get(c, "misses");
        int64_t capacity = test_int(c, "capacity");
        if (strcmp(test_text(c, "stream"), stream) != 0)
            continue;
        assert_int_equal(misses_of("lru", s, capacity, 0), test_int(misses, "lru"));
        assert_int_equal(misses_of("lfu", s, capacity, 0), test_int(misses, "lfu"));
        assert_int_equal(misses_of("belady", s, capacity, 0), test_int(misses, "belady"));
        if (policy_find("offload", "skeleton") != NULL)
            assert_int_equal(misses_of("skeleton", s, capacity, 0), test_int(misses, "fifo"));
        n++;
    }
    assert_int_equal(n, 3);
    json_decref(all);
}

static void published_misses_zipf(void **state)
{
    (void)state;
    struct stream s = stream_zipf();
    check_published("zipf", &s);
    stream_free(&s);
}

static void published_misses_recorded(void **state)
{
    (void)state;
    struct stream s = stream_recorded();
    check_published("gpt-oss-20b", &s);
    stream_free(&s);
}

/* A stream written out by hand, "layer.expert" pairs as layer * n_experts + expert. */
static struct stream stream_of(int32_t n_layers, int32_t n_experts, const uint32_t *object, int64_t n)
{
    struct stream s = {.n = n, .n_layers = n_layers, .n_experts = n_experts};
    s.object = malloc((size_t)n * sizeof *s.object);
    memcpy(s.object, object, (size_t)n * sizeof *s.object);
    stream_finish(&s);
    return s;
}

/* Three layers of two experts, room for three. At (0,1) layer 2 comes up last and goes; then at (2,1) layer 1, just
 * finished, goes: its expert 1 has one use, its expert 0 has two. */
static void layer_distance_order(void **state)
{
    (void)state;
    enum { A0, A1, B0, B1, C0, C1 };
    const uint32_t object[] = {A0, B0, C0, /* full */ A1, /* out: C0 */ B0, B1, /* out: A0, then */ C1, /* B1 */ B0};
    struct stream s = stream_of(3, 2, object, sizeof object / sizeof *object);
    /* misses: A0 B0 C0 A1 B1 C1; hits: B0 and the last B0, kept because it was used more often than B1 */
    assert_int_equal(misses_of("layer-distance", &s, 3, 0), 6);
    stream_free(&s);
}

/* One layer: distance says nothing, popularity decides, and it survives an eviction: when 2 comes back, 0 and 1 have
 * four uses each and the lower id goes, so that the last access hits. */
static void layer_distance_popularity(void **state)
{
    (void)state;
    const uint32_t object[] = {1, 1, 1, 0, 0, 0, 0, 2, /* out: 1 */ 1, /* out: 2 */ 2, /* out: 0 */ 1};
    struct stream s = stream_of(1, 3, object, sizeof object / sizeof *object);
    assert_int_equal(misses_of("layer-distance", &s, 2, 0), 5);
    stream_free(&s);
}

/* Brute force over all choices of victims: Belady is optimal among policies that always insert. */
static int64_t fewest_misses(const struct stream *s, int64_t at, uint32_t resident, int32_t used, int32_t capacity)
{
    if (at == s->n)
        return 0;
    uint32_t bit = 1u << s->object[at];
    if (resident & bit)
        return fewest_misses(s, at + 1, resident, used, capacity);
    if (used < capacity)
        return 1 + fewest_misses(s, at + 1, resident | bit, used + 1, capacity);
    int64_t best = INT64_MAX;
    for (uint32_t victim = 1; victim <= resident; victim <<= 1) {
        if (resident & victim) {
            int64_t misses = fewest_misses(s, at + 1, (resident & ~victim) | bit, used, capacity);
            best = misses < best ? misses : best;
        }
    }
    return best + 1;
}

static void belady_is_optimal(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        uint32_t object[14];
        assert_int_equal(zipf_fill(object, 14, 6, 0.5, seed, seed), 0);
        struct stream s = stream_of(1, 6, object, 14);
        for (int32_t capacity = 1; capacity <= 4; capacity++)
            assert_int_equal(misses_of("belady", &s, capacity, 0), fewest_misses(&s, 0, 0, 0, capacity));
        stream_free(&s);
    }
}

/* Batches of three accesses, up to six objects pinned, as few as six places: nothing may be lost or doubled when
 * pinned objects are passed over. policy_replay checks every victim. */
static void pinned_objects_stay(void **state)
{
    (void)state;
    uint32_t object[3000];
    assert_int_equal(zipf_fill(object, 3000, 40, 0.6, 3, 4), 0);
    struct stream s = stream_of(4, 10, object, 3000);
    for (size_t i = 0; i < n_evicting(); i++)
        for (int32_t capacity = 6; capacity <= 15; capacity += 3)
            assert_true(misses_of(evicting[i], &s, capacity, 3) >= misses_of("belady", &s, capacity, 0));
    stream_free(&s);
}

static void everything_pinned_is_an_error(void **state)
{
    (void)state;
    const uint32_t object[] = {0, 1, 2, 3};
    struct stream s = stream_of(1, 4, object, 4);
    for (size_t i = 0; i < n_evicting(); i++) {
        struct policy_host host;
        struct policy policy;
        policy_host_open(&host, &(struct policy_shape){1, 4, 1, 1, 1, 3, 1});
        assert_int_equal(policy_start(&policy, &host, test_plugin("offload", evicting[i]), NULL), MOE_OK);
        assert_int_equal(policy_replay(&policy, s.object, s.n, s.next_use, 4, NULL), -1);
        assert_non_null(strstr(host.failure, "every resident expert is in use"));
        policy_stop(&policy);
        policy_host_close(&host);
    }
    stream_free(&s);
}

static void belady_needs_the_future(void **state)
{
    (void)state;
    const uint32_t object[] = {0, 1};
    struct policy_host host;
    struct policy policy;
    policy_host_open(&host, &(struct policy_shape){1, 4, 1, 1, 1, 3, 1});
    assert_int_equal(policy_start(&policy, &host, test_plugin("offload", "belady"), NULL), MOE_OK);
    assert_int_equal(policy_replay(&policy, object, 2, NULL, 0, NULL), -1);
    assert_string_equal(host.failure, "access 0 (layer 0, expert 0) has no next use: belady needs a trace that is "
                                      "replayed");
    policy_stop(&policy);
    policy_host_close(&host);
}

static void none_evicts_nothing(void **state)
{
    (void)state;
    const uint32_t object[] = {0, 1, 2, 0, 3};
    struct stream s = stream_of(1, 4, object, 5);
    struct policy_host host;
    struct policy policy;
    assert_int_equal(misses_of("none", &s, 4, 0), 4);
    policy_host_open(&host, &(struct policy_shape){1, 4, 1, 1, 1, 3, 1});
    assert_int_equal(policy_start(&policy, &host, test_plugin("offload", "none"), NULL), MOE_OK);
    assert_int_equal(policy_replay(&policy, s.object, s.n, s.next_use, 0, NULL), -1);
    assert_non_null(strstr(host.failure, "layer 0 expert 3 does not fit beside the 3 experts"));
    policy_stop(&policy);
    policy_host_close(&host);
    stream_free(&s);
}

/* Devices do not see each other, and what the core drops is forgotten. */
static void devices_and_removals(void **state)
{
    (void)state;
    for (size_t i = 0; i < n_evicting(); i++) {
        struct policy_host host;
        struct policy policy;
        policy_host_open(&host, &(struct policy_shape){1, 8, 1, 3, 1, 8, 1});
        const struct moe_plugin *plugin = test_plugin("offload", evicting[i]);
        struct moe_offload_ops ops = plugin->ops.offload;
        struct moe_pinned pinned = {NULL, 0};
        uint32_t victim = 99;
        assert_int_equal(policy_start(&policy, &host, plugin, NULL), MOE_OK);
        for (uint32_t o = 0; o < 8; o++) {
            struct moe_access a = {.index = o, .next_use = 100 + o, .expert = (int32_t)o};
            assert_int_equal(ops.insert(policy.state, (int32_t)(o % 3), o, &a), MOE_OK);
        }
        struct moe_access cause = {.index = 9, .next_use = 200};
        for (uint32_t o = 1; o < 7; o += 3) /* device 1 has 1, 4, 7: leave 7 */
            assert_int_equal(ops.remove(policy.state, 1, o), MOE_OK);
        assert_int_equal(ops.evict(policy.state, 1, &cause, &pinned, &victim), MOE_OK);
        assert_int_equal(victim, 7);
        policy_host_end_hook(&host);
        assert_true(ops.evict(policy.state, 1, &cause, &pinned, &victim) < 0);
        assert_int_equal(ops.evict(policy.state, 2, &cause, &pinned, &victim), MOE_OK);
        assert_int_equal(victim % 3, 2);
        policy_stop(&policy);
        policy_host_close(&host);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_misses_zipf),     cmocka_unit_test(published_misses_recorded),
        cmocka_unit_test(layer_distance_order),      cmocka_unit_test(layer_distance_popularity),
        cmocka_unit_test(belady_is_optimal),         cmocka_unit_test(pinned_objects_stay),
        cmocka_unit_test(everything_pinned_is_an_error), cmocka_unit_test(belady_needs_the_future),
        cmocka_unit_test(none_evicts_nothing),       cmocka_unit_test(devices_and_removals),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
