/* SPDX-License-Identifier: Apache-2.0
 * contract_offload.c - the contract of offload policies. policy_replay() refuses victims that are pinned or not
 * resident. */
#include "../unit/zipf.h"
#include "contract.h"

#define N_LAYERS 6
#define N_EXPERTS 16
#define N_OBJECTS (N_LAYERS * N_EXPERTS)
#define N_ACCESSES 6000

/* Sweeps over the layers, three experts in each, popularity as in a Zipf stream. */
static void make_stream(uint32_t *object, int64_t *next_use)
{
    assert_int_equal(zipf_fill(object, N_ACCESSES, N_EXPERTS, 0.8, 11, 3), 0);
    for (int32_t i = 0; i < N_ACCESSES; i++)
        object[i] += (uint32_t)(i / 3 % N_LAYERS) * N_EXPERTS;
    policy_next_use(object, N_ACCESSES, N_OBJECTS, next_use);
}

/* The fewest misses of any policy, one that may decline to keep an object included: of what is resident and what comes
 * in, the one needed last goes. */
static int64_t fewest_misses(const uint32_t *object, const int64_t *next_use, int64_t capacity, bool bypass)
{
    int64_t next[N_OBJECTS], used = 0, misses = 0; /* next use of residents; -1: not resident */
    for (int32_t o = 0; o < N_OBJECTS; o++)
        next[o] = -1;
    for (int32_t i = 0; i < N_ACCESSES; i++) {
        int32_t worst = -1;
        if (next[object[i]] >= 0) {
            next[object[i]] = next_use[i];
            continue;
        }
        misses++;
        if (used < capacity) {
            used++;
        } else {
            for (int32_t o = 0; o < N_OBJECTS; o++)
                if (next[o] >= 0 && (worst < 0 || next[o] > next[worst]))
                    worst = o;
            if (bypass && next_use[i] >= next[worst])
                continue;
            next[worst] = -1;
        }
        next[object[i]] = next_use[i];
    }
    return misses;
}

/* Misses; -1 when the policy refuses the capacity, saying why. */
static int64_t misses_of(const struct moe_plugin *plugin, const uint32_t *object, const int64_t *next_use,
                         int64_t capacity, int32_t pin)
{
    const struct contract_size size = {0, N_LAYERS, N_EXPERTS, 3, 1, 1};
    struct policy_host host;
    struct policy policy;
    contract_start(&policy, &host, plugin, &size, capacity);
    int64_t misses = policy_replay(&policy, object, N_ACCESSES, next_use, pin, NULL);
    if (misses < 0 && (host.failure[0] == '\0' || strstr(host.failure, "evicted object") != NULL))
        fail_msg("capacity %lld: %s", (long long)capacity, host.failure);
    contract_stop(&policy);
    return misses;
}

static void offload_evicts_what_it_may(void **state)
{
    const struct moe_plugin *plugin = *state;
    uint32_t object[N_ACCESSES];
    int64_t next_use[N_ACCESSES];
    make_stream(object, next_use);
    for (int32_t pin = 0; pin <= 6; pin += 3) {
        for (int64_t capacity = pin > 0 ? pin : 1; capacity <= N_OBJECTS; capacity += 19) {
            int64_t first = misses_of(plugin, object, next_use, capacity, pin);
            int64_t optimum = fewest_misses(object, next_use, capacity, true);
            assert_int_equal(first, misses_of(plugin, object, next_use, capacity, pin));
            if (first >= 0 && first < optimum)
                fail_msg("capacity %lld: %lld misses, fewer than the optimum's %lld", (long long)capacity,
                         (long long)first, (long long)optimum);
            if (pin == 0 && strcmp(plugin->name, "belady") == 0)
                assert_int_equal(first, fewest_misses(object, next_use, capacity, false));
        }
    }
}

/* With room for all, every object is missed once, and nothing is evicted. */
static void offload_keeps_what_fits(void **state)
{
    const struct moe_plugin *plugin = *state;
    uint32_t object[N_ACCESSES];
    int64_t next_use[N_ACCESSES], n_different = 0;
    bool seen[N_OBJECTS] = {false};
    make_stream(object, next_use);
    for (int32_t i = 0; i < N_ACCESSES; i++) {
        n_different += !seen[object[i]];
        seen[object[i]] = true;
    }
    int64_t misses = misses_of(plugin, object, next_use, N_OBJECTS, 0);
    assert_true(misses >= n_different); /* more only for policies that bypass */
    assert_true((plugin->ops.offload.insert != NULL) == (plugin->ops.offload.evict != NULL));
}

static void check_prefetch(struct policy *policy, const struct moe_window *window)
{
    uint32_t want[N_OBJECTS];
    bool seen[N_OBJECTS] = {false};
    int32_t n = N_OBJECTS;
    assert_int_equal(policy->plugin->ops.offload.prefetch(policy->state, 0, window, want, &n), MOE_OK);
    policy_host_end_hook(policy->host);
    assert_true(n >= 0 && n <= N_OBJECTS);
    for (int32_t i = 0; i < n; i++) {
        assert_true(want[i] < N_OBJECTS && !seen[want[i]] && !window->resident[want[i]]);
        seen[want[i]] = true;
    }
}

static void check_assign(struct policy *policy, int32_t layer)
{
    int32_t expert[N_EXPERTS], order[N_EXPERTS], n = N_EXPERTS;
    int64_t rows[N_EXPERTS];
    uint8_t there[N_EXPERTS];
    double device_s[N_EXPERTS], host_s[N_EXPERTS], load_s[N_EXPERTS];
    enum moe_where where[N_EXPERTS];
    for (int32_t e = 0; e < n; e++) {
        expert[e] = e;
        rows[e] = 1 + e % 4;
        there[e] = e % 3 == 0;
        device_s[e] = 1e-5;
        host_s[e] = 1e-4 * (double)rows[e];
        load_s[e] = 3e-4;
        order[e] = -1;
    }
    struct moe_layer_work work = {.layer = layer, .n = n, .expert = expert, .rows = rows, .resident = there,
                                  .device_s = device_s, .host_s = host_s, .load_s = load_s};
    assert_int_equal(policy->plugin->ops.offload.assign(policy->state, 0, &work,
                                                        &(struct moe_assignment){where, order}), MOE_OK);
    policy_host_end_hook(policy->host);
    for (int32_t e = 0; e < n; e++) {
        assert_true(where[e] == MOE_ON_DEVICE || where[e] == MOE_ON_HOST);
        for (int32_t f = 0; f < e; f++)
            assert_true(where[e] != where[f] || order[e] != order[f]);
    }
}

static void check_form(struct policy *policy)
{
    const int32_t request[] = {4, 9, 2, 7}, n_tokens[] = {1, 1, 1, 1};
    int32_t batch[4] = {9, 9, 9, 9}, n_tokens_of[4] = {0};
    struct moe_batch_plan plan = {.n_batches = 0, .batch = batch};
    struct moe_queue queue = {.n = 4, .max_tokens = 3, .request = request, .n_tokens = n_tokens};
    assert_int_equal(policy->plugin->ops.offload.form(policy->state, &queue, &plan), MOE_OK);
    policy_host_end_hook(policy->host);
    assert_true(plan.n_batches >= 1 && plan.n_batches <= 4);
    for (int32_t i = 0; i < 4; i++) {
        assert_true(batch[i] >= -1 && batch[i] < plan.n_batches);
        if (batch[i] >= 0)
            n_tokens_of[batch[i]] += n_tokens[i];
    }
    for (int32_t i = 0; i < plan.n_batches; i++)
        assert_true(n_tokens_of[i] >= 1 && n_tokens_of[i] <= queue.max_tokens);
}

/* The hooks that a plain replay does not reach. */
static void offload_optional_hooks(void **state)
{
    const struct moe_plugin *plugin = *state;
    const struct moe_offload_ops *ops = &plugin->ops.offload;
    const struct contract_size size = {32, N_LAYERS, N_EXPERTS, 3, 1, 1};
    uint8_t resident[N_OBJECTS] = {0};
    struct policy_host host;
    struct policy policy;
    contract_start(&policy, &host, plugin, &size, N_OBJECTS / 2);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
        struct contract_batch b;
        struct moe_cost own = {0, 0, 0};
        contract_batch_make(&b, &size, 0, layer, 5, -1);
        if (ops->observe != NULL)
            assert_int_equal(ops->observe(policy.state, &b.batch, b.scores, &b.recorded, &own), MOE_OK);
        policy_host_end_hook(&host);
        if (ops->prefetch != NULL)
            check_prefetch(&policy, &(struct moe_window){0, layer, 1e-3, 1e9, resident, 0, NULL});
        if (ops->assign != NULL)
            check_assign(&policy, layer);
        contract_batch_free(&b);
    }
    if (ops->form != NULL)
        check_form(&policy);
    for (uint32_t o = 0; ops->precision != NULL && o < N_OBJECTS; o++) {
        double bits = 0;
        struct moe_access access = {.next_use = -1, .layer = (int32_t)o / N_EXPERTS, .expert = (int32_t)o % N_EXPERTS};
        assert_int_equal(ops->precision(policy.state, 0, o, &access, &bits), MOE_OK);
        assert_true(bits > 0 && bits <= 32);
    }
    assert_int_equal(host.n_failures, 0);
    contract_stop(&policy);
}

const struct contract_check contract_offload[] = {
    {"evicts what it may, never beats the optimum", offload_evicts_what_it_may},
    {"keeps what fits", offload_keeps_what_fits},
    {"optional hooks", offload_optional_hooks},
    {NULL, NULL},
};
