/* SPDX-License-Identifier: Apache-2.0
 * test_routes.c - routes and placements as the core checks them, and the services that build them. */
#include "core_test.h"

/* Tokens 0 and 1 with two routes each, token 2 with one. */
struct sample {
    int64_t offset[4];
    int32_t expert[5];
    float weight[5];
    struct moe_routes r;
};

static struct moe_routes *sample(struct sample *s)
{
    *s = (struct sample){ { 0, 2, 4, 5 }, { 0, 3, 2, 1, 3 }, { 0.5f, 0.5f, 0.7f, 0.3f, 1 }, { .form = MOE_TOKENS } };
    s->r.n_tokens = 3;
    s->r.n = s->r.capacity = 5;
    s->r.offset = s->offset;
    s->r.expert = s->expert;
    s->r.weight = s->weight;
    return &s->r;
}

static void routes_refused(void **state)
{
    (void)state;
    struct sample s;
    struct err e = { 0 };
    test_ok(routes_check(sample(&s), 4, "router x", &e), &e);
#define REFUSED(change, ...)                                                                                          \
    do {                                                                                                              \
        sample(&s);                                                                                                   \
        memset(&e, 0, sizeof e);                                                                                      \
        change;                                                                                                       \
        assert_says(&e, routes_check(&s.r, 4, "router x", &e), "router x", __VA_ARGS__, NULL);                        \
        assert_int_equal(e.code, ERR_RUN);                                                                            \
    } while (0)
    REFUSED(s.r.n = 6, "6 entries");
    REFUSED(s.r.n = 4, "4 entries", "from 0 to 5");
    REFUSED(s.offset[0] = 1, "from 1 to 5");
    REFUSED(s.offset[1] = 5, "token 1", "decrease from 5 to 4");
    REFUSED(s.expert[2] = 4, "token 1", "expert 4", "0 to 3");
    REFUSED(s.expert[2] = -1, "token 1", "expert -1");
    REFUSED(s.expert[3] = 2, "token 1", "expert 2 twice");
    REFUSED(s.weight[4] = NAN, "token 2", "expert 3", "not finite");
    REFUSED(s.r.n_free = -1, "-1 free experts");
#undef REFUSED
    /* Free experts extend the ids; an expert again in another token is no repeat. */
    sample(&s)->n_free = 1;
    s.expert[2] = 4;
    memset(&e, 0, sizeof e);
    test_ok(routes_check(&s.r, 4, "router x", &e), &e);
}

/* Slots, merged experts and halves of a layer. */
static void forms_refused(void **state)
{
    (void)state;
    struct sample s;
    struct err e = { 0 };
    int32_t slot[5];
    uint8_t skip[3], again[3];
    int64_t rows[4];
#define FORM(wanted, ...)                                                                                             \
    do {                                                                                                              \
        sample(&s)->form = (wanted);                                                                                  \
        memcpy(slot, (int32_t[5]){ __VA_ARGS__ }, sizeof slot);                                                       \
        s.r.slot = slot;                                                                                              \
        s.r.n_slots = 4;                                                                                              \
        memset(&e, 0, sizeof e);                                                                                      \
        memset(rows, 0, sizeof rows);                                                                                 \
    } while (0)
#define SAYS(...) assert_says(&e, routes_check(&s.r, 4, "router x", &e), "router x", __VA_ARGS__, NULL)
    FORM(MOE_SLOTS, 0, 1, 2, 3, 1);
    test_ok(routes_check(&s.r, 4, "router x", &e), &e);
    test_ok(routes_rows(&s.r, 4, rows, &e), &e);
    for (int x = 0; x < 4; x++)
        assert_int_equal(rows[x], 1); /* slot 1 is one row of expert 3, for tokens 0 and 2 */
    FORM(MOE_SLOTS, 0, 1, 2, 3, 2);
    SAYS("slot 2", "experts 2 and 3");
    FORM(MOE_SLOTS, 0, 1, 2, 4, 1);
    SAYS("route 3", "slot 4", "0 to 3");
    FORM(MOE_SLOTS, 0, 1, -1, 3, 1);
    SAYS("route 2", "slot -1");
    FORM(MOE_SLOTS, 0, 1, 2, 3, 1);
    s.expert[3] = 2;
    slot[3] = 2;
    SAYS("token 1", "slot 2 twice");
    FORM(MOE_SLOTS, 0, 1, 2, 3, 1);
    s.r.slot = NULL;
    SAYS("none says which is whose");
    FORM(MOE_TOKENS, 0, 1, 2, 3, 1);
    SAYS("tokens and slots at once");
    FORM((enum moe_form)3, 0, 1, 2, 3, 1);
    SAYS("form 3");
    FORM(MOE_MERGED, 0, 0, 1, 1, 2);
    test_ok(routes_check(&s.r, 4, "router x", &e), &e);
    test_ok(routes_rows(&s.r, 4, rows, &e), &e);
    assert_true(rows[0] == 1 && rows[1] == 1 && rows[2] == 1 && rows[3] == 0);
    FORM(MOE_MERGED, 0, 0, 0, 0, 2);
    SAYS("token 1", "merged expert 0 is not what another token says");
    memcpy(s.expert, (int32_t[4]){ 0, 3, 0, 3 }, 4 * sizeof *s.expert);
    memset(&e, 0, sizeof e);
    SAYS("token 1", "merged expert 0"); /* the same experts, not as heavy */
    memcpy(s.weight + 2, s.weight, 2 * sizeof *s.weight);
    memset(&e, 0, sizeof e);
    memset(rows, 0, sizeof rows);
    test_ok(routes_check(&s.r, 4, "router x", &e), &e);
    test_ok(routes_rows(&s.r, 4, rows, &e), &e);
    assert_int_equal(rows[0], 2);
    s.expert[1] = s.expert[3] = 0;
    SAYS("token 0", "expert 0 twice");
#define HALVES(a, b, c, d)                                                                                            \
    do {                                                                                                              \
        sample(&s);                                                                                                   \
        memset(&e, 0, sizeof e);                                                                                      \
        memcpy(skip, (uint8_t[3]){ 0, a, b }, sizeof skip);                                                           \
        memcpy(again, (uint8_t[3]){ 0, c, d }, sizeof again);                                                         \
        s.r.skip = skip;                                                                                              \
        s.r.again = again;                                                                                            \
    } while (0)
    HALVES(MOE_HALF_ATTENTION, 0, MOE_HALF_EXPERTS, 3);
    test_ok(routes_check(&s.r, 4, "router x", &e), &e);
    HALVES(4, 0, 0, 0);
    SAYS("token 1", "halves 4");
    HALVES(0, 0, 0, 7);
    SAYS("token 2", "halves 7");
    HALVES(MOE_HALF_ATTENTION, 0, MOE_HALF_ATTENTION, 0);
    SAYS("token 1", "leaves out and repeats");
    HALVES(0, MOE_HALF_EXPERTS, 0, 0);
    SAYS("token 2", "leaves experts out, and has 1");
    s.offset[3] = s.r.n = 4;
    memset(&e, 0, sizeof e);
    test_ok(routes_check(&s.r, 4, "router x", &e), &e);
#undef HALVES
#undef SAYS
#undef FORM
}

static void routes_grow(void **state)
{
    (void)state;
    struct moe_routes r = { 0 };
    struct err e = { 0 };
    int32_t room = 0;
    test_ok(routes_begin(&r, 10, &room, &e), &e);
    test_ok(routes_reserve(&r, 1, &e), &e);
    assert_int_equal(r.n, 0);
    r.expert[0] = 7;
    test_ok(routes_reserve(&r, 100000, &e), &e);
    assert_int_equal(r.expert[0], 7);
    assert_true(r.capacity >= 100000);
    test_ok(routes_begin(&r, 0, &room, &e), &e);
    test_ok(routes_check(&r, 4, "router x", &e), &e); /* no tokens, no routes */
    routes_free(&r);
}

/* ---- services ---- */

static int no_place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    (void)self, (void)stats, (void)out;
    return 0;
}

static const struct moe_plugin plugin = TEST_POLICY(MOE_PLACEMENT, "mine", .state_size = sizeof(struct test_env),
                                                    .init = test_keep_env, .ops.placement = { .place = no_place });

struct bench {
    struct topology *topology;
    struct policy_context context;
    struct policy policy;
    struct err e;
    const struct moe_env *env;
};

static int open_bench(void **state)
{
    struct bench *b = calloc(1, sizeof *b);
    b->topology = test_machine("star-50GBps", 4);
    test_ok(policy_context_init(&b->context, &test_model, b->topology, PREC_BF16, 0, 1, &b->e), &b->e);
    test_ok(policy_open(&b->policy, &b->context, &plugin, NULL, "test", &b->e), &b->e);
    b->env = ((struct test_env *)b->policy.self)->env;
    *state = b;
    return 0;
}

static int close_bench(void **state)
{
    struct bench *b = *state;
    policy_close(&b->policy);
    policy_context_free(&b->context);
    topology_free(b->topology);
    free(b);
    return 0;
}

static void transpose(void **state)
{
    struct bench *b = *state;
    struct moe_routes r = { 0 };
    int32_t room = 0;
    /* Expert 0 takes tokens 2 and 0, expert 1 nobody, expert 2 token 2, expert 3 token 1. */
    const int64_t first[] = { 0, 2, 2, 3, 4 };
    int32_t token[] = { 2, 0, 2, 1 };
    const float weight[] = { 1, 2, 3, 4 };
    test_ok(routes_begin(&r, 4, &room, &b->e), &b->e);
    assert_int_equal(b->env->host->routes_transpose(b->env, 4, 4, first, token, weight, &r), 0);
    test_ok(routes_check(&r, 4, "router x", &b->e), &b->e);
    const int64_t offset[] = { 0, 1, 2, 4, 4 };
    const int32_t expert[] = { 0, 3, 0, 2 };
    const float moved[] = { 2, 4, 1, 3 };
    assert_memory_equal(r.offset, offset, sizeof offset);
    assert_memory_equal(r.expert, expert, sizeof expert);
    assert_memory_equal(r.weight, moved, sizeof moved);

    token[3] = 4;
    assert_true(b->env->host->routes_transpose(b->env, 4, 4, first, token, weight, &r) < 0);
    assert_non_null(strstr(b->e.text, "pick 3 is token 4, expected 0 to 3"));
    memset(&b->e, 0, sizeof b->e);
    assert_true(b->env->host->routes_transpose(b->env, 9, 4, first, token, weight, &r) < 0);
    assert_non_null(strstr(b->e.text, "9 tokens, expected 4"));
    memset(&b->e, 0, sizeof b->e);
    routes_free(&r);
}

static int place(struct bench *b, struct placement *p, int32_t layer, int32_t expert, int32_t device, float fraction)
{
    return b->env->host->place(b->env, &p->view, layer, expert, device, fraction);
}

static void placement(void **state)
{
    struct bench *b = *state;
    struct placement p = { 0 };
    /* Layer 1 first, layers interleaved; expert 2 of layer 0 on devices 3, 1 and 1, in that order. */
    static const int32_t order[][3] = { { 1, 3, 0 }, { 0, 2, 3 }, { 1, 2, 1 }, { 0, 0, 2 }, { 0, 2, 1 }, { 1, 1, 1 },
                                        { 0, 1, 0 }, { 0, 3, 0 }, { 1, 0, 3 }, { 0, 2, 1 } };
    for (size_t i = 0; i < sizeof order / sizeof *order; i++)
        assert_int_equal(place(b, &p, order[i][0], order[i][1], order[i][2], 1), 0);
    test_ok(placement_finish(&p, &test_model, "placement mine", &b->e), &b->e);
    const int32_t layer_first[] = { 0, 6, 10 }, expert_first[] = { 0, 1, 2, 5, 6, 7, 8, 9, 10 };
    assert_memory_equal(p.view.layer_first, layer_first, sizeof layer_first);
    assert_memory_equal(p.view.expert_first, expert_first, sizeof expert_first);
    /* Within a layer the order of calls is the physical order. */
    static const int32_t physical[] = { 2, 0, 2, 1, 3, 2, 3, 2, 1, 0 };
    for (int i = 0; i < 10; i++)
        assert_int_equal(p.view.replica[i].expert, physical[i]);
    /* Replicas of one expert: lowest device first, ties in physical order. */
    const int32_t replicas[] = { 2, 5, 0 };
    assert_memory_equal(p.view.by_expert + 2, replicas, sizeof replicas);

    /* Used again for the next placement. */
    placement_reset(&p);
    for (int32_t l = 0; l < 2; l++)
        for (int32_t e = 0; e < 4; e++)
            for (int half = 0; half < 2; half++)
                assert_int_equal(place(b, &p, l, e, half, 0.5f), 0);
    test_ok(placement_finish(&p, &test_model, "placement mine", &b->e), &b->e);
    assert_int_equal(p.view.n, 16);
    placement_free(&p);
}

static void placement_refused(void **state)
{
    struct bench *b = *state;
    struct placement p = { 0 };
#define REFUSED(l, x, d, f, says)                                                                                     \
    do {                                                                                                              \
        assert_true(place(b, &p, l, x, d, f) < 0);                                                                    \
        assert_non_null(strstr(b->e.text, "placement mine: "));                                                       \
        assert_non_null(strstr(b->e.text, says));                                                                     \
        memset(&b->e, 0, sizeof b->e);                                                                                \
    } while (0)
    REFUSED(2, 0, 0, 1, "layer 2, expected 0 to 1");
    REFUSED(0, 4, 0, 1, "layer 0: placed expert 4, expected 0 to 3");
    REFUSED(1, 3, 4, 1, "layer 1, expert 3: placed on device 4, expected 0 to 3");
    REFUSED(0, 0, 0, 0, "fraction 0,");
    REFUSED(0, 0, 0, 1.5f, "fraction 1.5,");
    REFUSED(0, 0, 0, NAN, "fraction");
#undef REFUSED
    assert_int_equal(p.view.n, 0);
    for (int32_t i = 0; i < 7; i++)
        assert_int_equal(place(b, &p, i / 4, i % 4, 0, 1), 0);
    assert_says(&b->e, placement_finish(&p, &test_model, "placement mine", &b->e), "placement mine",
                "layer 1, expert 3: placed by 0", NULL);
    memset(&b->e, 0, sizeof b->e);
    assert_int_equal(place(b, &p, 1, 3, 0, 0.5f), 0);
    assert_says(&b->e, placement_finish(&p, &test_model, "placement mine", &b->e), "placed by 0.5", NULL);
    memset(&b->e, 0, sizeof b->e);
    placement_free(&p);
}

static void memory_of_policies(void **state)
{
    struct bench *b = *state;
    const struct moe_host *host = b->env->host;
    unsigned char *kept = host->alloc(b->env, 100, 3);
    for (int i = 0; i < 300; i++)
        assert_int_equal(kept[i], 0);
    memset(kept, 0xa5, 300);
    for (int round = 0; round < 3; round++) { /* scratch of any sizes, aligned, disjoint, reused by the next hook */
        policy_enter(&b->policy, "place");
        unsigned char *before = NULL;
        for (size_t bytes = 1; bytes < 100000; bytes *= 3) {
            unsigned char *p = host->scratch(b->env, bytes);
            assert_int_equal((uintptr_t)p % 16, 0);
            memset(p, (int)bytes & 0xff, bytes);
            if (before)
                assert_int_equal(before[bytes / 3 - 1], bytes / 3 & 0xff);
            before = p;
        }
        policy_leave(&b->policy, "place", 0);
    }
    assert_int_equal(kept[299], 0xa5);
    assert_null(host->alloc(b->env, SIZE_MAX / 2, 4));
    assert_non_null(strstr(b->e.text, "out of memory"));
    memset(&b->e, 0, sizeof b->e);
    assert_null(host->scratch(b->env, SIZE_MAX - 3));
    memset(&b->e, 0, sizeof b->e);
    assert_true(policy_leave(&b->policy, "place", MOE_EFAIL) < 0);
    assert_string_equal(b->e.text, "placement mine: place returned -4 without saying why");
    memset(&b->e, 0, sizeof b->e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(routes_refused), cmocka_unit_test(forms_refused),
        cmocka_unit_test(routes_grow),
        cmocka_unit_test_setup_teardown(transpose, open_bench, close_bench),
        cmocka_unit_test_setup_teardown(placement, open_bench, close_bench),
        cmocka_unit_test_setup_teardown(placement_refused, open_bench, close_bench),
        cmocka_unit_test_setup_teardown(memory_of_policies, open_bench, close_bench),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
