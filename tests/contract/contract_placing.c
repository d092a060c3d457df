/* SPDX-License-Identifier: Apache-2.0
 * contract_placing.c - the contract of placements. */
#include "contract.h"

/* Loads, transitions and co-activations of a skewed workload; routed false: nothing was routed yet. */
struct world {
    struct moe_stats stats;
    double *load, *transitions, *coactivation;
};

static void world_make(struct world *w, const struct contract_size *size, bool routed)
{
    const struct moe_env env = {.seed = 5};
    int64_t n_layers = size->n_layers, n = size->n_experts, pairs = n * n;
    w->load = calloc((size_t)(n_layers * n), sizeof *w->load);
    w->transitions = calloc((size_t)(n_layers * pairs), sizeof *w->transitions);
    w->coactivation = calloc((size_t)(n_layers * pairs), sizeof *w->coactivation);
    for (int64_t i = 0; routed && i < n_layers * n; i++)
        w->load[i] = floor(1000 * exp(2 * moe_unit(moe_rand(&env, 0, 0, i / n, i % n))));
    for (int64_t i = 0; routed && i < n_layers * pairs; i++) {
        w->transitions[i] = floor(100 * moe_unit(moe_rand(&env, 1, 0, i / pairs, i % pairs)));
        w->coactivation[i] = floor(100 * moe_unit(moe_rand(&env, 2, 0, i / pairs, i % pairs)));
    }
    w->stats = (struct moe_stats){.step = routed ? 4 : 0, .n_steps = routed ? 4 : 0, .load = w->load,
                                  .transitions = w->transitions, .coactivation = w->coactivation};
}

static void world_free(struct world *w)
{
    free(w->load);
    free(w->transitions);
    free(w->coactivation);
}

/* Every expert of every layer is there once or more, whole or in shards that add up; real devices only (the test host
 * checks those). */
static void check_coverage(const struct policy_placement *p, const struct moe_model *m)
{
    for (int32_t l = 0; l < m->n_layers; l++) {
        for (int32_t e = 0; e < moe_experts_of(m, l); e++) {
            const int32_t *at = &p->expert_first[l * m->n_experts + e];
            double whole = 0;
            for (int32_t i = at[0]; i < at[1]; i++)
                whole += (double)p->replica[p->by_expert[i]].fraction;
            if (whole < 0.999 || fabs(whole - nearbyint(whole)) > 1e-3)
                fail_msg("layer %d expert %d is placed %g times", l, e, whole);
        }
    }
}

static void check_select(struct policy *policy, const struct contract_size *size, const struct policy_placement *p,
                         struct contract_notes *notes)
{
    for (int32_t layer = 0; layer < size->n_layers; layer++) {
        struct contract_batch b;
        contract_batch_make(&b, size, 0, layer, 5, -1);
        int32_t *replica = malloc(((size_t)b.recorded.n + 1) * sizeof *replica);
        memset(replica, 0xff, ((size_t)b.recorded.n + 1) * sizeof *replica);
        assert_int_equal(policy->plugin->ops.placement.select(policy->state, &b.batch, &b.recorded, &p->view, replica),
                         MOE_OK);
        policy_host_end_hook(policy->host);
        for (int64_t i = 0; i < b.recorded.n; i++) {
            assert_true(replica[i] >= p->layer_first[layer] && replica[i] < p->layer_first[layer + 1]);
            assert_int_equal(p->replica[replica[i]].expert, b.recorded.expert[i]);
        }
        contract_note(notes, replica, (size_t)b.recorded.n * sizeof *replica);
        free(replica);
        contract_batch_free(&b);
    }
}

/* Places twice, the second time knowing the first. Returns false when the policy refuses the size, saying why. */
static bool place_run(const struct moe_plugin *plugin, const struct contract_size *size, bool routed, bool uneven,
                      struct contract_notes *notes)
{
    const struct moe_placement_ops *ops = &plugin->ops.placement;
    struct policy_host host;
    struct policy policy;
    struct policy_placement placed[2];
    struct world world;
    bool accepted = true;
    contract_start(&policy, &host, plugin, size, 0);
    int32_t *layer_experts = calloc((size_t)size->n_layers, sizeof *layer_experts);
    for (int32_t l = 0; l < size->n_layers; l++)
        layer_experts[l] = l % 2 == 1 ? (size->n_experts + 1) / 2 : size->n_experts;
    host.model.layer_experts = uneven ? layer_experts : NULL;
    world_make(&world, size, routed);
    policy_placement_init(&placed[0]);
    policy_placement_init(&placed[1]);
    for (int round = 0; accepted && round < 2; round++) {
        struct policy_placement *p = &placed[round];
        bool rebalance = false;
        world.stats.current = round > 0 ? &placed[0].view : NULL;
        int rc = ops->place(policy.state, &world.stats, &p->view);
        policy_host_end_hook(&host);
        accepted = rc == MOE_OK;
        if (!accepted) {
            assert_true(rc < 0 && host.n_failures > 0 && host.failure[0] != '\0');
            break;
        }
        assert_int_equal(host.n_failures, 0);
        policy_placement_seal(p, &host.model);
        check_coverage(p, &host.model);
        contract_note(notes, p->replica, (size_t)p->view.n * sizeof *p->replica);
        if (ops->select != NULL && !uneven)
            check_select(&policy, size, p, notes);
        if (ops->due != NULL)
            assert_int_equal(ops->due(policy.state, &world.stats, &rebalance), MOE_OK);
        policy_host_end_hook(&host);
    }
    policy_placement_free(&placed[0]);
    policy_placement_free(&placed[1]);
    world_free(&world);
    contract_stop(&policy);
    free(layer_experts);
    return accepted;
}

static void placement_covers_every_expert(void **state)
{
    int n_accepted = 0;
    for (int i = 0; i < contract_n_sizes; i++) {
        for (int variant = 0; variant < 4; variant++) { /* routed or not, layers alike or not */
            struct contract_notes a = {0}, b = {0};
            n_accepted += place_run(*state, &contract_sizes[i], variant % 2 == 0, variant / 2 == 1, &a);
            place_run(*state, &contract_sizes[i], variant % 2 == 0, variant / 2 == 1, &b);
            contract_same(&a, &b);
        }
    }
    assert_true(n_accepted > 0);
}

const struct contract_check contract_placement[] = {
    {"covers every expert, repeatably", placement_covers_every_expert},
    {NULL, NULL},
};
