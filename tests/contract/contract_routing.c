/* SPDX-License-Identifier: Apache-2.0
 * contract_routing.c - the contract of routers and balancers. */
#include "contract.h"

/* ---- routers ---- */

/* Asks for nothing. */
static struct moe_bias bias_new(int32_t n_experts)
{
    struct moe_bias b = {calloc((size_t)n_experts, sizeof(float)), calloc((size_t)n_experts, sizeof(float))};
    for (int32_t e = 0; e < n_experts; e++)
        b.scale[e] = 1;
    return b;
}

static void bias_free(struct moe_bias b)
{
    free(b.add);
    free(b.scale);
}

/* Routes a batch as the core does: score and select if the router has them, else (or plain) route. `missing`: an expert
 * that does not exist, or -1. */
static void route_without(struct policy *policy, const struct moe_batch *batch, bool plain, int32_t missing,
                          struct moe_routes *out)
{
    const struct moe_router_ops *ops = &policy->plugin->ops.router;
    struct moe_batch with_free = *batch;
    with_free.n_free = ops->n_free != NULL ? ops->n_free(policy->state, batch->layer) : 0;
    assert_true(with_free.n_free >= 0);
    batch = &with_free;
    struct moe_bias bias = bias_new(batch->n_experts + batch->n_free);
    struct moe_cost own = {0, 0, 0};
    int rc;
    if (missing >= 0)
        bias.add[missing] = -INFINITY;
    policy_routes_init(out, batch->n_tokens);
    if (ops->select != NULL && !plain) {
        size_t n = (size_t)batch->n_tokens * (size_t)(batch->n_experts + batch->n_free);
        float *scores = calloc(n + 1, sizeof *scores);
        assert_non_null(ops->score);
        rc = ops->score(policy->state, batch, scores, &own);
        policy_host_end_hook(policy->host);
        for (size_t i = 0; i < n; i++)
            assert_true(isfinite(scores[i]));
        if (rc == MOE_OK)
            rc = ops->select(policy->state, batch, scores, &bias, out);
        free(scores);
    } else {
        assert_non_null(ops->route);
        rc = ops->route(policy->state, batch, &bias, out, &own);
    }
    policy_host_end_hook(policy->host);
    if (rc != MOE_OK)
        fail_msg("%d tokens, %d experts: %s", batch->n_tokens, batch->n_experts, policy->host->failure);
    assert_int_equal(policy->host->n_failures, 0);
    assert_true(own.flops >= 0 && isfinite(own.flops) && own.bytes >= 0 && isfinite(own.bytes));
    bias_free(bias);
}

static void route_either(struct policy *policy, const struct moe_batch *batch, bool plain, struct moe_routes *out)
{
    route_without(policy, batch, plain, -1, out);
}

static void route(struct policy *policy, const struct moe_batch *batch, struct moe_routes *out)
{
    route_either(policy, batch, false, out);
}

/* Two steps of every layer, checked; what was decided goes to `notes`. */
static void route_run(const struct moe_plugin *plugin, const struct contract_size *size, struct contract_notes *notes)
{
    struct policy_host host;
    struct policy policy;
    contract_start(&policy, &host, plugin, size, 0);
    for (int32_t step = 0; step < 2; step++) {
        for (int32_t layer = 0; layer < size->n_layers; layer++) {
            struct contract_batch b;
            struct moe_routes out;
            contract_batch_make(&b, size, step, layer, 5, -1);
            route(&policy, &b.batch, &out);
            contract_check_routes(&out, size->n_tokens, size->n_experts);
            contract_note_routes(notes, &out);
            policy_routes_free(&out);
            contract_batch_free(&b);
        }
    }
    contract_stop(&policy);
}

static void router_decides_validly_and_repeatably(void **state)
{
    for (int i = 0; i < contract_n_sizes; i++) {
        struct contract_notes a = {0}, b = {0};
        route_run(*state, &contract_sizes[i], &a);
        route_run(*state, &contract_sizes[i], &b);
        contract_same(&a, &b);
    }
}

/* The weight of an expert that the token has; NAN if it has not. */
static float weight_of(const struct moe_routes *r, int32_t token, int32_t expert)
{
    for (int64_t i = r->offset[token]; i < r->offset[token + 1]; i++)
        if (r->expert[i] == expert)
            return r->weight[i];
    return NAN;
}

static void same_routes(const struct moe_routes *crowd, int32_t in_crowd, const struct moe_routes *alone, int32_t token)
{
    assert_int_equal(crowd->offset[in_crowd + 1] - crowd->offset[in_crowd],
                     alone->offset[token + 1] - alone->offset[token]);
    for (int64_t i = alone->offset[token]; i < alone->offset[token + 1]; i++) {
        float weight = weight_of(crowd, in_crowd, alone->expert[i]);
        if (!(fabsf(weight - alone->weight[i]) <= 1e-6f))
            fail_msg("expert %d has weight %g alone and %g in company: declare MOE_CROSS_BATCH", alone->expert[i],
                     (double)alone->weight[i], (double)weight);
    }
}

/* Each request gets the same experts alone and in company, unless the router says that it does not. */
static void router_keeps_requests_apart(void **state)
{
    const struct moe_plugin *plugin = *state;
    const struct contract_size size = {40, 2, 16, 2, 4, 2};
    const int32_t n_requests = 5;
    if (plugin->needs & MOE_CROSS_BATCH) {
        print_message("# %s declares MOE_CROSS_BATCH\n", plugin->name);
        skip();
    }
    for (int32_t layer = 0; layer < size.n_layers; layer++) {
        struct contract_batch all;
        struct policy_host host;
        struct policy policy;
        struct moe_routes crowd;
        contract_start(&policy, &host, plugin, &size, 0);
        contract_batch_make(&all, &size, 0, layer, n_requests, -1);
        route(&policy, &all.batch, &crowd);
        contract_stop(&policy);
        for (int32_t request = 0; request < n_requests; request++) {
            struct contract_batch one;
            struct moe_routes alone;
            contract_batch_make(&one, &size, 0, layer, n_requests, request);
            contract_start(&policy, &host, plugin, &size, 0);
            route(&policy, &one.batch, &alone);
            contract_stop(&policy);
            for (int32_t t = 0; t < one.batch.n_tokens; t++)
                same_routes(&crowd, t * n_requests + request, &alone, t);
            policy_routes_free(&alone);
            contract_batch_free(&one);
        }
        policy_routes_free(&crowd);
        contract_batch_free(&all);
    }
}

/* With scores or without them: the same experts in the same order, with the same weights but for rounding. */
static void router_needs_no_scores_to_choose(void **state)
{
    const struct moe_plugin *plugin = *state;
    if (plugin->ops.router.select == NULL || plugin->ops.router.route == NULL)
        return;
    for (int i = 0; i < contract_n_sizes; i++) {
        const struct contract_size *size = &contract_sizes[i];
        struct contract_batch b;
        struct moe_routes out[2];
        contract_batch_make(&b, size, 0, 0, 5, -1);
        for (int plain = 0; plain < 2; plain++) {
            struct policy_host host;
            struct policy policy;
            contract_start(&policy, &host, plugin, size, 0);
            route_either(&policy, &b.batch, plain == 1, &out[plain]);
            contract_stop(&policy);
        }
        assert_int_equal(out[0].n, out[1].n);
        assert_memory_equal(out[0].offset, out[1].offset, ((size_t)size->n_tokens + 1) * sizeof *out->offset);
        assert_memory_equal(out[0].expert, out[1].expert, (size_t)out->n * sizeof *out->expert);
        for (int64_t r = 0; r < out->n; r++)
            assert_true(fabsf(out[0].weight[r] - out[1].weight[r]) <= 1e-6f);
        policy_routes_free(&out[0]);
        policy_routes_free(&out[1]);
        contract_batch_free(&b);
    }
}

/* Every expert in turn gets an add of -INFINITY: nobody goes there. A router that cannot follow a bias is not asked. */
static void router_never_chooses_what_does_not_exist(void **state)
{
    const struct moe_plugin *plugin = *state;
    const struct contract_size size = {40, 1, 8, 2, 4, 2};
    if (plugin->ops.router.select == NULL && !(plugin->needs & MOE_HEEDS_BIAS))
        return;
    for (int32_t missing = 0; missing < size.n_experts; missing++) {
        struct policy_host host;
        struct policy policy;
        struct contract_batch b;
        struct moe_routes out;
        contract_start(&policy, &host, plugin, &size, 0);
        contract_batch_make(&b, &size, 0, 0, 5, -1);
        route_without(&policy, &b.batch, plugin->ops.router.select == NULL, missing, &out);
        contract_check_routes(&out, size.n_tokens, size.n_experts);
        for (int64_t i = 0; i < out.n; i++)
            if (out.expert[i] == missing)
                fail_msg("expert %d does not exist and is chosen", missing);
        policy_routes_free(&out);
        contract_batch_free(&b);
        contract_stop(&policy);
    }
}

const struct contract_check contract_router[] = {
    {"decides validly and repeatably", router_decides_validly_and_repeatably},
    {"keeps requests apart", router_keeps_requests_apart},
    {"needs no scores to choose", router_needs_no_scores_to_choose},
    {"never chooses what does not exist", router_never_chooses_what_does_not_exist},
    {NULL, NULL},
};

/* ---- balancers ---- */

static void count_load(const struct moe_routes *r, int32_t n_experts, int64_t *load)
{
    memset(load, 0, (size_t)n_experts * sizeof *load);
    for (int64_t i = 0; i < r->n; i++)
        if (r->expert[i] < n_experts)
            load[r->expert[i]]++;
}

/* The value of a real parameter at its default, or 0 if there is no such parameter. */
static double real_default(const struct moe_plugin *plugin, const char *name)
{
    for (const struct moe_param *p = plugin->params; p != NULL && p->name != NULL; p++)
        if (p->type == MOE_REAL && strcmp(p->name, name) == 0)
            return p->def;
    return 0;
}

/* Nobody may end with more than both the busiest expert had before and the capacity that the policy speaks of. */
static void check_load(const struct moe_plugin *plugin, const int64_t *before, const int64_t *after, int32_t n_experts)
{
    int64_t most = 0, sum = 0;
    for (int32_t e = 0; e < n_experts; e++) {
        most = before[e] > most ? before[e] : most;
        sum += before[e];
    }
    double capacity = ceil(real_default(plugin, "factor") * (double)sum / n_experts);
    for (int32_t e = 0; e < n_experts; e++)
        if (after[e] > most && (double)after[e] > capacity)
            fail_msg("expert %d has %lld tokens; the busiest had %lld, the capacity is %g", e, (long long)after[e],
                     (long long)most, capacity);
}

static void check_plan(const struct moe_plan *plan, const struct contract_size *size, const int64_t *load)
{
    assert_true(plan->n_splits >= 0 && plan->n_splits <= plan->max_splits);
    assert_true(plan->n_moves >= 0 && plan->n_moves <= plan->max_moves);
    for (int32_t i = 0; i < plan->n_splits; i++) {
        struct moe_split a = plan->split[i];
        assert_true(a.expert >= 0 && a.expert < size->n_experts && a.device >= 0 && a.device < size->n_devices);
        assert_true(a.from >= 0 && a.from <= a.to && a.to <= load[a.expert]);
        for (int32_t j = 0; j < i; j++) {
            struct moe_split b = plan->split[j];
            assert_true(a.expert != b.expert || a.to <= b.from || b.to <= a.from);
        }
    }
    for (int32_t i = 0; i < plan->n_moves; i++) {
        struct moe_weight_move m = plan->move[i];
        assert_true(m.expert >= 0 && m.expert < size->n_experts && m.src != m.dst);
        assert_true(m.src >= 0 && m.src < size->n_devices && m.dst >= 0 && m.dst < size->n_devices);
    }
}

static void run_plan(struct policy *policy, const struct contract_size *size, int32_t layer, const int64_t *load,
                     const struct moe_placement *placement, struct contract_notes *notes)
{
    int32_t room = size->n_experts * size->n_devices;
    struct moe_plan plan = {.max_splits = room, .max_moves = room};
    plan.split = calloc((size_t)room, sizeof *plan.split);
    plan.move = calloc((size_t)room, sizeof *plan.move);
    assert_int_equal(policy->plugin->ops.balancer.plan(policy->state, layer, load, placement, &plan,
                                                                &(struct moe_cost){0, 0, 0}), MOE_OK);
    policy_host_end_hook(policy->host);
    check_plan(&plan, size, load);
    contract_note(notes, plan.split, (size_t)plan.n_splits * sizeof *plan.split);
    contract_note(notes, plan.move, (size_t)plan.n_moves * sizeof *plan.move);
    free(plan.split);
    free(plan.move);
}

static void run_loss(struct policy *policy, const struct contract_batch *b, struct contract_notes *notes)
{
    size_t n = (size_t)b->batch.n_tokens * (size_t)b->batch.n_experts;
    float *gradient = calloc(n + 1, sizeof *gradient);
    double loss = 0;
    assert_int_equal(policy->plugin->ops.balancer.loss(policy->state, &b->batch, b->scores, &b->recorded, &loss,
                                                       gradient, NULL), MOE_OK);
    policy_host_end_hook(policy->host);
    assert_true(isfinite(loss));
    for (size_t i = 0; i < n; i++)
        assert_true(isfinite(gradient[i]));
    contract_note(notes, &loss, sizeof loss);
    contract_note(notes, gradient, n * sizeof *gradient);
    free(gradient);
}

/* All hooks of one layer, in the order of the pipeline. */
static void balance_layer(struct policy *policy, const struct contract_size *size, struct contract_batch *b,
                          const struct moe_placement *placement, struct contract_notes *notes)
{
    const struct moe_balancer_ops *ops = &policy->plugin->ops.balancer;
    int64_t *before = calloc((size_t)size->n_experts, sizeof *before);
    int64_t *after = calloc((size_t)size->n_experts, sizeof *after);
    struct moe_bias bias = bias_new(size->n_experts);
    struct moe_routes routes;
    policy_routes_copy(&routes, &b->recorded);
    count_load(&routes, size->n_experts, before);
    struct moe_cost own = {0, 0, 0};
    if (ops->adjust != NULL) {
        assert_int_equal(ops->adjust(policy->state, &b->batch, b->scores, &bias, &own), MOE_OK);
        policy_host_end_hook(policy->host);
        for (int32_t e = 0; e < size->n_experts; e++)
            assert_true(isfinite(bias.add[e]) && isfinite(bias.scale[e]));
        contract_note(notes, bias.add, (size_t)size->n_experts * sizeof *bias.add);
        contract_note(notes, bias.scale, (size_t)size->n_experts * sizeof *bias.scale);
    }
    if (ops->rewrite != NULL) {
        assert_int_equal(ops->rewrite(policy->state, &b->batch, b->scores, placement, &routes, &own), MOE_OK);
        policy_host_end_hook(policy->host);
        contract_check_routes(&routes, size->n_tokens, size->n_experts);
        contract_note_routes(notes, &routes);
    }
    count_load(&routes, size->n_experts, after);
    check_load(policy->plugin, before, after, size->n_experts);
    if (ops->plan != NULL)
        run_plan(policy, size, b->batch.layer, after, placement, notes);
    if (ops->observe != NULL)
        assert_int_equal(ops->observe(policy->state, b->batch.layer, after), MOE_OK);
    if (ops->loss != NULL)
        run_loss(policy, b, notes);
    assert_int_equal(policy->host->n_failures, 0);
    policy_host_end_hook(policy->host);
    policy_routes_free(&routes);
    bias_free(bias);
    free(before);
    free(after);
}

static void balance_run(const struct moe_plugin *plugin, const struct contract_size *size, struct contract_notes *notes)
{
    struct policy_host host;
    struct policy policy;
    struct policy_placement placement;
    contract_start(&policy, &host, plugin, size, 0);
    policy_placement_init(&placement);
    for (int32_t l = 0; l < size->n_layers; l++)
        for (int32_t e = 0; e < size->n_experts; e++)
            host.host.place(&host.env, &placement.view, l, e, e * size->n_devices / size->n_experts, 1);
    policy_placement_seal(&placement, &host.model);
    for (int32_t step = 0; step < 3; step++) {
        for (int32_t layer = 0; layer < size->n_layers; layer++) {
            struct contract_batch b;
            contract_batch_make(&b, size, step, layer, 5, -1);
            balance_layer(&policy, size, &b, &placement.view, notes);
            contract_batch_free(&b);
        }
    }
    policy_placement_free(&placement);
    contract_stop(&policy);
}

static void balancer_decides_validly_and_repeatably(void **state)
{
    for (int i = 0; i < contract_n_sizes; i++) {
        struct contract_notes a = {0}, b = {0};
        balance_run(*state, &contract_sizes[i], &a);
        balance_run(*state, &contract_sizes[i], &b);
        contract_same(&a, &b);
    }
}

static void balancer_has_a_hook(void **state)
{
    const struct moe_balancer_ops *ops = &((const struct moe_plugin *)*state)->ops.balancer;
    assert_true(ops->adjust || ops->rewrite || ops->plan || ops->observe || ops->loss);
}

const struct contract_check contract_balancer[] = {
    {"has a hook", balancer_has_a_hook},
    {"decides validly and repeatably", balancer_decides_validly_and_repeatably},
    {NULL, NULL},
};
