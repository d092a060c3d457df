/* SPDX-License-Identifier: Apache-2.0
 * test_cache_core.c - the core's side of a cache: who may leave, who may stay, and that a replay is its accesses one by
 * one. The policies themselves are tested in test_cache.c. */
#include "core_test.h"

/* First in, first out; misbehaves on request. */
struct fifo {
    const struct moe_env *env;
    uint32_t order[64];
    int32_t n;
    enum { HONEST, EVICTS_STRANGER, EVICTS_NOBODY, KEEPS_NOTHING, FAILS } mood;
    int32_t n_hits, n_inserts;
};

static int hit(void *self, int32_t device, uint32_t object, const struct moe_access *a)
{
    (void)device, (void)object, (void)a;
    ((struct fifo *)self)->n_hits++;
    return 0;
}

static int insert(void *self, int32_t device, uint32_t object, const struct moe_access *a)
{
    struct fifo *f = self;
    (void)device, (void)a;
    if (f->mood == KEEPS_NOTHING)
        return MOE_BYPASS;
    f->order[f->n++] = object;
    f->n_inserts++;
    return 0;
}

static int evict(void *self, int32_t device, const struct moe_access *cause, const struct moe_pinned *pinned,
                 uint32_t *victim)
{
    struct fifo *f = self;
    (void)device, (void)cause;
    if (f->mood == EVICTS_NOBODY)
        return MOE_BYPASS;
    if (f->mood == FAILS)
        return (f->env->host->fail)(f->env, MOE_EFAIL, "no idea");
    if (f->mood == EVICTS_STRANGER) {
        *victim = 7;
        return 0;
    }
    int32_t i = 0;
    while (i < f->n && moe_is_pinned(pinned, f->order[i]))
        i++;
    *victim = f->order[i];
    memmove(f->order + i, f->order + i + 1, sizeof *f->order * (size_t)(--f->n - i));
    return 0;
}

static const struct moe_plugin plugin = TEST_POLICY(MOE_OFFLOAD, "mine", .state_size = sizeof(struct fifo),
                                                    .init = test_keep_env,
                                                    .ops.offload = { .hit = hit, .insert = insert, .evict = evict });

struct bench {
    struct topology *topology;
    struct policy_context context;
    struct policy policy;
    struct cache cache;
    struct err e;
};

static struct bench *open_bench(const struct moe_plugin *p, int64_t capacity, bool pins)
{
    struct bench *b = calloc(1, sizeof *b);
    b->topology = test_machine("star-50GBps", 1);
    test_ok(policy_context_init(&b->context, &test_model, b->topology, PREC_BF16, 0, 1, &b->e), &b->e);
    b->context.cache_objects = capacity;
    test_ok(policy_open(&b->policy, &b->context, p, NULL, "test", &b->e), &b->e);
    test_ok(cache_open(&b->cache, &b->policy, 0, capacity, pins, &b->e), &b->e);
    return b;
}

static void close_bench(struct bench *b)
{
    cache_close(&b->cache);
    policy_close(&b->policy);
    policy_context_free(&b->context);
    topology_free(b->topology);
    free(b);
}

static const struct moe_access none = { .next_use = -1 };

#define assert_access(b, object, result, out)                                                                         \
    do {                                                                                                              \
        uint32_t victim_;                                                                                             \
        assert_int_equal(cache_access(&(b)->cache, object, &none, &victim_), result);                                 \
        assert_int_equal(victim_, out);                                                                               \
    } while (0)
#define NOBODY UINT32_MAX

static void pins_stay(void **state)
{
    (void)state;
    struct bench *b = open_bench(&plugin, 3, true);
    for (uint32_t o = 0; o < 3; o++)
        assert_access(b, o, CACHE_MISS, NOBODY);
    assert_access(b, 1, CACHE_HIT, NOBODY);
    cache_pin(&b->cache, 0);
    cache_pin(&b->cache, 0);
    cache_pin(&b->cache, 3); /* not resident yet: pinned when it comes */
    assert_int_equal(b->cache.n_pinned, 1);
    assert_access(b, 3, CACHE_MISS, 1); /* the first in is pinned, the second goes */
    assert_int_equal(b->cache.n_pinned, 2);
    assert_access(b, 4, CACHE_MISS, 2);
    cache_pin(&b->cache, 4);
    assert_access(b, 5, CACHE_BYPASSED, NOBODY); /* everything is pinned: passes through */
    assert_false(b->cache.resident[5]);
    cache_unpin(&b->cache);
    assert_int_equal(b->cache.n_pinned, 0);
    assert_access(b, 5, CACHE_MISS, 0);
    assert_int_equal(b->cache.n_resident, 3);
    close_bench(b);
}

static void no_room_and_no_interest(void **state)
{
    (void)state;
    struct bench *b = open_bench(&plugin, 0, true);
    assert_access(b, 1, CACHE_BYPASSED, NOBODY);
    assert_access(b, 1, CACHE_BYPASSED, NOBODY);
    close_bench(b);

    b = open_bench(&plugin, 1, true);
    struct fifo *f = b->policy.self;
    f->mood = KEEPS_NOTHING;
    assert_access(b, 1, CACHE_BYPASSED, NOBODY);
    assert_int_equal(b->cache.n_resident, 0);
    f->mood = HONEST;
    assert_access(b, 1, CACHE_MISS, NOBODY);
    f->mood = EVICTS_NOBODY; /* the newcomer is worth less: nothing leaves and insert is not called */
    assert_access(b, 2, CACHE_BYPASSED, NOBODY);
    assert_int_equal(f->n_inserts, 1);
    assert_access(b, 1, CACHE_HIT, NOBODY);
    assert_int_equal(f->n_hits, 1);
    f->mood = HONEST;
    assert_access(b, 2, CACHE_MISS, 1);
    close_bench(b);
}

static void wrong_victims(void **state)
{
    (void)state;
    struct bench *b = open_bench(&plugin, 1, true);
    struct fifo *f = b->policy.self;
    assert_access(b, 1, CACHE_MISS, NOBODY);
    f->mood = EVICTS_STRANGER;
    assert_access(b, 2, CACHE_ERROR, NOBODY);
    assert_int_equal(b->e.code, ERR_RUN);
    assert_string_equal(b->e.text, "offload mine: evict chose object 7, which is not resident");
    memset(&b->e, 0, sizeof b->e);
    f->mood = FAILS;
    assert_access(b, 2, CACHE_ERROR, NOBODY);
    assert_string_equal(b->e.text, "offload mine: no idea");
    close_bench(b);
}

static void next_uses(void **state)
{
    (void)state;
    const uint32_t key[] = { 3, 1, 3, 3, 0, 1 };
    const int64_t expected[] = { 2, 5, 3, INT64_MAX, INT64_MAX, INT64_MAX };
    int64_t next[6];
    struct err e = { 0 };
    test_ok(cache_next_use(key, 6, 8, next, &e), &e);
    assert_memory_equal(next, expected, sizeof expected);
}

/* 8 objects in 2 layers of 4, drawn unevenly. */
static void replay_is_its_accesses(void **state)
{
    (void)state;
    enum { N = 4000 };
    static const char *const policies[] = { "lru", "lfu", "belady", "layer-distance" };
    uint32_t key[N];
    int64_t next[N];
    struct err e = { 0 };
    for (uint64_t i = 0; i < N; i++) {
        uint64_t z = moe_mix(i + 17);
        key[i] = (uint32_t)(i % 2 * 4 + (z % 3 ? z % 2 : z / 8 % 4));
    }
    test_ok(cache_next_use(key, N, 8, next, &e), &e);
    for (size_t k = 0; k < sizeof policies / sizeof *policies; k++) {
        const struct moe_plugin *p;
        test_ok(registry_load(MOE_OFFLOAD, policies[k], "test", &p, &e), &e);
        struct bench *b = open_bench(p, 3, false), *c = open_bench(p, 3, false);
        struct cache_counts counts;
        test_ok(cache_replay(&b->cache, key, N, next, 4, &counts), &b->e);
        int64_t misses = 0, bypassed = 0;
        for (int64_t i = 0; i < N; i++) {
            struct moe_access a = { .index = i, .next_use = next[i], .layer = (int32_t)key[i] / 4,
                                    .expert = (int32_t)key[i] % 4, .n_tokens = 1 };
            uint32_t victim;
            enum cache_result r = cache_access(&c->cache, key[i], &a, &victim);
            assert_int_not_equal(r, CACHE_ERROR);
            misses += r != CACHE_HIT;
            bypassed += r == CACHE_BYPASSED;
        }
        assert_int_equal(counts.requests, N);
        assert_int_equal(counts.misses, misses);
        assert_int_equal(counts.bypassed, bypassed);
        assert_memory_equal(b->cache.resident, c->cache.resident, 8);
        close_bench(b);
        close_bench(c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pins_stay),
        cmocka_unit_test(no_room_and_no_interest),
        cmocka_unit_test(wrong_victims),
        cmocka_unit_test(next_uses),
        cmocka_unit_test(replay_is_its_accesses),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
