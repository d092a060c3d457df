/* SPDX-License-Identifier: Apache-2.0
 * contract_dispatch.c - the contract of dispatches: whatever the layout, every route is computed once, where it has to
 * be, on a row that got there, and its output comes home before the token leaves.
 *
 * A row is followed by its token, so that layouts may send one copy for several routes, over several hops. */
#include "contract.h"

struct layer {
    const struct contract_size *size;
    struct contract_batch batch;
    struct policy_placement placement;
    struct moe_traffic traffic;
    struct moe_graph graph;
    int32_t *to, *token; /* [n] of each route */
    int32_t *holders;    /* [n] likewise; NULL: experts are whole */
    int32_t *entry, *exit;
    int32_t *order;      /* tasks in an order that respects every edge */
    uint8_t *before;     /* [n][n] before[a * n + b]: b has to end before a starts */
};

static bool precedes(const struct layer *l, int32_t b, int32_t a)
{
    return l->before[(size_t)a * (size_t)l->graph.n + (size_t)b] != 0;
}

/* Fills order and before; fails on a cycle. */
static void sort_tasks(struct layer *l)
{
    int32_t n = l->graph.n, n_done = 0;
    size_t row = (size_t)n;
    uint8_t *done = calloc(row + 1, 1);
    l->order = calloc(row + 1, sizeof *l->order);
    l->before = calloc(row * row + 1, 1);
    for (int32_t i = 0; i < l->graph.n_edges; i++)
        l->before[(size_t)l->graph.edge[i].task * row + (size_t)l->graph.edge[i].before] = 1;
    for (int32_t i = 0; i < n; i++)
        if (l->graph.task[i].kind == TASK_ARRIVAL)
            l->before[(size_t)i * row + (size_t)l->graph.task[i].of] = 1;
    for (bool more = true; more;) {
        more = false;
        for (int32_t i = 0; i < n; i++) {
            bool ready = !done[i];
            for (int32_t j = 0; ready && j < n; j++)
                ready = !precedes(l, j, i) || done[j];
            if (!ready)
                continue;
            for (int32_t j = 0; j < n; j++) /* what j waits for, i waits for too */
                for (int32_t k = 0; precedes(l, j, i) && k < n; k++)
                    l->before[(size_t)i * row + (size_t)k] |= (uint8_t)precedes(l, k, j);
            done[i] = 1;
            l->order[n_done++] = i;
            more = true;
        }
    }
    if (n_done != n)
        fail_msg("%d of %d tasks wait for each other", n - n_done, n);
    free(done);
}

/* Follows a token's row from `device` (there once `since` has ended; -1: from the start) through the exchanges of one
 * payload that precede `until`. True if it gets to `goal`. */
static bool travels(const struct layer *l, enum moe_payload payload, int32_t token, int32_t device, int32_t since,
                    int32_t goal, int32_t until)
{
    int32_t since_of[64];
    bool here[64] = {false};
    here[device] = true;
    since_of[device] = since;
    for (int32_t o = 0; o < l->graph.n; o++) {
        int32_t x = l->order[o];
        const struct moe_exchange *exchange = &l->graph.task[x].exchange;
        if (l->graph.task[x].kind != TASK_EXCHANGE || exchange->payload != payload || !precedes(l, x, until))
            continue;
        for (int32_t p = 0; p < exchange->n_parts; p++) {
            const struct moe_part *part = &exchange->part[p];
            if (!here[part->src] || here[part->dst] ||
                (since_of[part->src] >= 0 && !precedes(l, since_of[part->src], x)))
                continue;
            for (int64_t i = 0; i < part->n_items && !here[part->dst]; i++) {
                if (l->token[part->items[i]] == token) {
                    here[part->dst] = true;
                    since_of[part->dst] = x;
                }
            }
        }
    }
    return here[goal];
}

static void check_exchange(const struct layer *l, const struct moe_exchange *x)
{
    uint8_t *seen = calloc((size_t)l->size->n_devices * (size_t)l->batch.recorded.n + 1, 1);
    for (int32_t p = 0; p < x->n_parts; p++) {
        const struct moe_part *part = &x->part[p];
        if (x->payload == MOE_PAY_BYTES || part->items == NULL)
            continue;
        assert_true(part->src == part->dst || part->n_items == 0 || part->bytes > 0);
        for (int64_t i = 0; i < part->n_items; i++) {
            int64_t item = part->items[i];
            assert_true(item >= 0 && item < l->batch.recorded.n);
            if (l->to[item] == MOE_NOWHERE)
                fail_msg("route %lld costs nothing and travels all the same", (long long)item);
            const bool parts_of_a_sum = l->holders != NULL && x->payload == MOE_PAY_OUTPUT; /* one from each holder */
            if (seen[part->dst * l->batch.recorded.n + item]++ && !parts_of_a_sum)
                fail_msg("route %lld gets to device %d twice in one exchange", (long long)item, part->dst);
        }
    }
    free(seen);
}

/* One task of experts: right device, right expert, row there in time, output home in time. */
static void check_experts(const struct layer *l, int32_t task, double *computed)
{
    const struct moe_expert_work *work = &l->graph.task[task].experts;
    int64_t at = 0;
    assert_int_equal(work->layer, l->traffic.layer);
    for (int32_t i = 0; i < work->n; i++) {
        assert_true(work->rows[i] >= 0);
        for (int64_t end = at + work->rows[i]; work->items != NULL && at < end; at++) {
            int64_t item = work->items[at];
            assert_true(item >= 0 && item < l->batch.recorded.n);
            int32_t home = l->batch.device[l->token[item]];
            if (l->batch.recorded.expert[item] != work->expert[i])
                fail_msg("route %lld goes to expert %d and is computed by %d", (long long)item,
                         l->batch.recorded.expert[item], work->expert[i]);
            const int32_t first = l->to[item] == MOE_SHARDED ? l->placement.replica[l->holders[item]].device : -1;
            if (first >= 0 ? work->device < first || work->device >= first + l->traffic.n_shards ||
                             fabs((double)work->fraction * l->traffic.n_shards - 1) > 1e-5
                           : work->fraction >= 1 && l->to[item] != work->device)
                fail_msg("route %lld belongs to device %d and is computed on %d (fraction %g)", (long long)item,
                         first >= 0 ? first : l->to[item], work->device, (double)work->fraction);
            if (!precedes(l, l->entry[home], task))
                fail_msg("route %lld is computed before its token is ready", (long long)item);
            if (!travels(l, MOE_PAY_HIDDEN, l->token[item], home, -1, work->device, task))
                fail_msg("the row of route %lld never gets to device %d", (long long)item, work->device);
            if (!precedes(l, task, l->exit[home]) ||
                !travels(l, MOE_PAY_OUTPUT, l->token[item], work->device, task, home, l->exit[home]))
                fail_msg("the output of route %lld is not back on device %d when the token leaves", (long long)item,
                         home);
            computed[item] += (double)work->fraction;
        }
    }
}

/* Contiguous experts, in every group and shard after shard; every seventh route costs nothing. */
static void layer_make(struct layer *l, const struct contract_size *size, struct policy_host *host, int32_t n_groups,
                       int32_t n_shards)
{
    const int32_t slots = size->n_devices / n_groups / n_shards;
    memset(l, 0, sizeof *l);
    l->size = size;
    contract_batch_make(&l->batch, size, 0, size->n_layers - 1, 5, -1);
    policy_placement_init(&l->placement);
    for (int32_t layer = 0; layer < size->n_layers; layer++)
        for (int32_t i = 0; i < n_groups * size->n_experts * n_shards; i++) {
            const int32_t e = i / n_shards % size->n_experts, group = i / n_shards / size->n_experts;
            const int32_t slot = group * slots + e * slots / size->n_experts;
            host->host.place(&host->env, &l->placement.view, layer, e, slot * n_shards + i % n_shards,
                             1.0f / (float)n_shards);
        }
    policy_placement_seal(&l->placement, &host->model);
    const struct moe_routes *r = &l->batch.recorded;
    l->to = calloc((size_t)r->n + 1, sizeof *l->to);
    l->token = calloc((size_t)r->n + 1, sizeof *l->token);
    l->holders = n_shards > 1 ? calloc((size_t)r->n + 1, sizeof *l->holders) : NULL;
    for (int32_t t = 0; t < r->n_tokens; t++) {
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++) {
            l->token[i] = t;
            const int32_t group = l->batch.device[t] / (slots * n_shards);
            const int32_t holder = (size->n_layers - 1) * n_groups * size->n_experts * n_shards +
                                   (group * size->n_experts + r->expert[i]) * n_shards;
            if (l->holders != NULL)
                l->holders[i] = holder;
            l->to[i] = i % 7 == 6 ? MOE_NOWHERE : n_shards > 1 ? MOE_SHARDED : l->placement.replica[holder].device;
        }
    }
    l->entry = calloc((size_t)size->n_devices, sizeof *l->entry);
    l->exit = calloc((size_t)size->n_devices, sizeof *l->exit);
    for (int32_t d = 0; d < size->n_devices; d++) {
        l->entry[d] = host->host.task_compute(&host->env, &l->graph,
                                              &(struct moe_work){.device = d, .op = MOE_OP_GATE, .bytes = 1});
        l->exit[d] = -1;
    }
    l->traffic = (struct moe_traffic){
        .layer = size->n_layers - 1, .n_micro = 1, .routes = r, .device = l->batch.device, .to = l->to,
        .placement = &l->placement.view, .dispatch_bytes = 128, .combine_bytes = 256, .entry = l->entry,
        .exit = l->exit, .holders = l->holders, .n_shards = n_shards, .n_groups = n_groups,
    };
}

static void layer_free(struct layer *l)
{
    contract_batch_free(&l->batch);
    policy_placement_free(&l->placement);
    policy_graph_free(&l->graph);
    free(l->to);
    free(l->token);
    free(l->holders);
    free(l->entry);
    free(l->exit);
    free(l->order);
    free(l->before);
}

static void note_graph(struct contract_notes *notes, const struct moe_graph *g)
{
    for (int32_t i = 0; i < g->n; i++) {
        const struct policy_task *t = &g->task[i];
        contract_note(notes, &t->kind, sizeof t->kind);
        contract_note(notes, &t->device, sizeof t->device);
        contract_note(notes, &t->work.bytes, sizeof t->work.bytes);
        for (int32_t e = 0; t->kind == TASK_EXPERTS && e < t->experts.n; e++) {
            contract_note(notes, &t->experts.expert[e], sizeof *t->experts.expert);
            contract_note(notes, &t->experts.rows[e], sizeof *t->experts.rows);
        }
        for (int32_t p = 0; t->kind == TASK_EXCHANGE && p < t->exchange.n_parts; p++) {
            const struct moe_part *part = &t->exchange.part[p];
            contract_note(notes, &part->src, sizeof part->src);
            contract_note(notes, &part->dst, sizeof part->dst);
            contract_note(notes, &part->bytes, sizeof part->bytes);
            if (part->items != NULL)
                contract_note(notes, part->items, (size_t)part->n_items * sizeof *part->items);
        }
    }
    contract_note(notes, g->edge, (size_t)g->n_edges * sizeof *g->edge);
}

static void check_layer(struct layer *l)
{
    const struct moe_routes *r = &l->batch.recorded;
    double *computed = calloc((size_t)r->n + 1, sizeof *computed);
    bool known = true; /* layouts that know no items are followed by their rows only */
    int64_t n_rows = 0, n_wanted = 0;
    sort_tasks(l);
    for (int32_t d = 0; d < l->size->n_devices; d++)
        if (l->exit[d] < 0 || l->exit[d] >= l->graph.n ||
            (l->exit[d] != l->entry[d] && !precedes(l, l->entry[d], l->exit[d])))
            fail_msg("exit of device %d is task %d, which does not follow its entry", d, l->exit[d]);
    for (int32_t i = 0; i < l->graph.n; i++) {
        const struct policy_task *t = &l->graph.task[i];
        if (t->kind == TASK_EXCHANGE)
            check_exchange(l, &t->exchange);
        if (t->kind != TASK_EXPERTS)
            continue;
        check_experts(l, i, computed);
        known = known && t->experts.items != NULL;
        for (int32_t e = 0; e < t->experts.n && t->experts.fraction >= 1; e++)
            n_rows += t->experts.rows[e];
    }
    for (int64_t i = 0; i < r->n; i++) {
        n_wanted += l->to[i] != MOE_NOWHERE;
        if (known && fabs(computed[i] - (l->to[i] != MOE_NOWHERE)) > 1e-5)
            fail_msg("route %lld to device %d is computed %g times", (long long)i, l->to[i], computed[i]);
    }
    assert_true(known || l->holders != NULL || n_rows == n_wanted);
    free(computed);
}

/* May refuse shards, by name. */
static void lay_out_run(const struct moe_plugin *plugin, const struct contract_size *size, int32_t n_groups,
                        int32_t n_shards, struct contract_notes *notes)
{
    struct policy_host host;
    struct policy policy;
    struct layer l;
    const char *const phase[] = {"dispatch", "combine"};
    const double seconds[] = {1e-3, 2e-3};
    contract_start(&policy, &host, plugin, size, 0);
    for (int32_t step = 0; step < 2; step++) {
        layer_make(&l, size, &host, n_groups, n_shards);
        l.traffic.step = step;
        int rc = plugin->ops.dispatch.lay_out(policy.state, &l.traffic, &l.graph);
        policy_host_end_hook(&host);
        if (n_shards > 1 && rc == MOE_EUNSUPPORTED && strstr(host.failure, "is sharded")) {
            layer_free(&l);
            break;
        }
        if (rc != MOE_OK || host.n_failures > 0)
            fail_msg("%d tokens on %d devices: %s", size->n_tokens, size->n_devices, host.failure);
        check_layer(&l);
        note_graph(notes, &l.graph);
        layer_free(&l);
        if (plugin->ops.dispatch.observe != NULL)
            assert_int_equal(plugin->ops.dispatch.observe(policy.state,
                                                          &(struct moe_timings){.step = step, .n_phases = 2,
                                                                                .phase = phase, .seconds = seconds}),
                             MOE_OK);
        policy_host_end_hook(&host);
    }
    contract_stop(&policy);
}

static void dispatch_computes_every_route_once(void **state)
{
    for (int i = 0; i < contract_n_sizes; i++) {
        struct contract_notes a = {0}, b = {0};
        lay_out_run(*state, &contract_sizes[i], 1, 1, &a);
        lay_out_run(*state, &contract_sizes[i], 1, 1, &b);
        contract_same(&a, &b);
    }
}

static void dispatch_knows_groups_and_shards(void **state)
{
    for (int i = 0; i < contract_n_sizes; i++)
        for (int32_t groups = 1; groups <= 4; groups++)
            for (int32_t shards = 1; shards <= 4; shards++)
                if (groups * shards > 1 && contract_sizes[i].n_devices % (groups * shards) == 0) {
                    struct contract_notes a = {0}, b = {0};
                    lay_out_run(*state, &contract_sizes[i], groups, shards, &a);
                    lay_out_run(*state, &contract_sizes[i], groups, shards, &b);
                    contract_same(&a, &b);
                }
}

const struct contract_check contract_dispatch[] = {
    {"computes every route once, repeatably", dispatch_computes_every_route_once},
    {"knows groups of devices, and shards or refuses them", dispatch_knows_groups_and_shards},
    {NULL, NULL},
};
