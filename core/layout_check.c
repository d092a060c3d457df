/* SPDX-License-Identifier: Apache-2.0
 * layout_check.c - a layout that does less than the layer needs would only look faster, so every one is checked.
 *
 * Before it runs:
 *   rows    each device computes of each expert at least the rows that placement and plans put there (more is padding)
 *   bytes   between devices, in rows; a token may travel once for several experts, and through others:
 *             hidden states   into each device one per foreign token that it computes, out of each home one per token
 *                             that is computed elsewhere, into each node one per token from other nodes
 *             outputs         out of each device one per foreign token that it computes, into each home one per token
 *                             that was computed elsewhere, out of each node one per token of other nodes
 *   order   no experts task with rows before every entry; no exit of a device whose tokens are computed without an
 *           experts task before it
 * Of a sharded expert every holder computes its share of every row: each needs it, and each sends its part of the sum.
 * After it has run, layout_times.c sees to it that nothing was used before it was there. */
#include "config.h"

#include "run.h"

#include <stdlib.h>
#include <string.h>

struct need {
    double *rows;              /* [D][E] */
    double *moved[2][N_MOVED]; /* hidden states, outputs: [D] into and out of a device; [N] into, out of a node */
    bool *served;              /* [D] has tokens that are computed */
    int32_t *seen[2];          /* [D], [N] scratch: the last token that one of its experts is on, or on whose node */
};

static void count_needs(const struct run *r, const struct moe_batch *b, struct need *n)
{
    const struct moe_routes *routes = &r->routes;
    const int32_t *node = r->context.view.node;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        const int32_t home = b->device[t];
        bool away = false;
        for (int64_t i = routes->offset[t]; i < routes->offset[t + 1]; i++) {
            int32_t d, holders = run_holders(r, i, &d); /* none: costs nothing, goes nowhere */
            n->served[home] |= holders > 0;
            for (; holders > 0; d++, holders--) {
                n->rows[(size_t)d * (size_t)r->model.n_experts + (size_t)routes->expert[i]] += (double)run_shard(r);
                const bool again = d == home || n->seen[0][d] == t;
                const bool same_node = node[d] == node[home] || n->seen[1][node[d]] == t;
                n->seen[0][d] = n->seen[1][node[d]] = t;
                away |= d != home;
                n->moved[MOE_PAY_HIDDEN][MOVED_IN][d] += !again;
                n->moved[MOE_PAY_OUTPUT][MOVED_OUT][d] += !again;
                n->moved[MOE_PAY_HIDDEN][MOVED_NODE][node[d]] += !same_node;
                n->moved[MOE_PAY_OUTPUT][MOVED_NODE][node[d]] += !same_node;
            }
        }
        n->moved[MOE_PAY_HIDDEN][MOVED_OUT][home] += away;
        n->moved[MOE_PAY_OUTPUT][MOVED_IN][home] += away;
    }
}

/* Takes what the layout does off what is needed. */
static int subtract(struct run *r, const struct moe_batch *b, int32_t first_task, struct need *need)
{
    const struct moe_graph *g = &r->graph;
    const int32_t n_experts = moe_experts_of(&r->model, b->layer);
    for (int32_t t = first_task; t < g->n_tasks; t++) {
        const struct task *x = &g->task[t];
        for (int32_t i = x->first; x->kind == TASK_EXPERTS && i < x->first + x->n; i++) {
            if (g->expert[i] >= n_experts)
                return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: device %d computes expert %d, expected 0 to %d",
                               r->dispatch.plugin->name, b->layer, x->device, g->expert[i], n_experts - 1);
            need->rows[(size_t)x->device * (size_t)r->model.n_experts + (size_t)g->expert[i]] -=
                (double)g->rows[i] * (double)x->fraction;
        }
    }
    for (int k = 0; k < 2; k++) {
        const double row = r->model.d_model * (k == MOE_PAY_HIDDEN ? r->model.act_bytes : r->model.combine_bytes);
        for (int way = 0; way < N_MOVED; way++)
            for (int32_t d = 0; d < (way == MOVED_NODE ? r->topology->n_nodes : r->topology->n_devices); d++)
                need->moved[k][way][d] -= r->tally.moved[k][way][d] / row;
    }
    return 0;
}

static int check_amounts(struct run *r, const struct moe_batch *b, int32_t first_task, struct need *need)
{
    static const char *const what[2] = { "hidden states", "outputs" };
    static const char *const of[N_MOVED] = { "device", "device", "node" };
    static const char *const does[2][N_MOVED] = { { "receives", "sends", "receives" },
                                                 { "receives", "sends", "sends" } };
    const char *name = r->dispatch.plugin->name;
    if (subtract(r, b, first_task, need) < 0)
        return r->err->code;
    const int32_t n_experts = r->model.n_experts, n_devices = r->topology->n_devices;
    for (int32_t d = 0; d < n_devices; d++)
        for (int32_t x = 0; x < n_experts; x++) {
            double lacks = need->rows[(size_t)d * (size_t)n_experts + (size_t)x];
            if (lacks > 1e-3)
                return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: device %d computes %g rows of expert %d too "
                               "few", name, b->layer, d, lacks, x);
        }
    for (int k = 0; k < 2; k++)
        for (int way = 0; way < N_MOVED; way++)
            for (int32_t d = 0; d < (way == MOVED_NODE ? r->topology->n_nodes : n_devices); d++)
                if (need->moved[k][way][d] > 1e-3)
                    return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: %s %d %s the %s of %g tokens too few", name,
                                   b->layer, of[way], d, does[k][way], what[k], need->moved[k][way][d]);
    return 0;
}

static bool has_rows(const struct moe_graph *g, const struct task *t)
{
    for (int32_t i = t->first; i < t->first + t->n; i++)
        if (g->rows[i] > 0)
            return true;
    return false;
}

/* Marks what comes after the tasks in `from`; edges in CSR over tasks >= first_task. */
static void reach(const int32_t *first, const int32_t *next, int32_t n_from, int32_t *from, uint8_t *marked)
{
    while (n_from > 0) {
        int32_t t = from[--n_from];
        for (int32_t i = first[t]; i < first[t + 1]; i++)
            if (!marked[next[i]]) {
                marked[next[i]] = 1;
                from[n_from++] = next[i];
            }
    }
}

/* Node 0 stands for all entries, node 1 + (t - first_task) for task t. */
static int check_order(struct run *r, const struct moe_batch *b, int32_t first_task, int64_t first_edge,
                       const struct need *need)
{
    const struct moe_graph *g = &r->graph;
    const size_t n = (size_t)(g->n_tasks - first_task) + 1, n_edges = (size_t)(g->n_edges - first_edge) + n;
    int32_t *first = calloc(n + 2, sizeof *first), *next = malloc(sizeof *next * n_edges);
    int32_t *stack = malloc(sizeof *stack * (n + 1)), n_stack = 0;
    uint8_t *entered = calloc(n, 1), *computed = calloc(n, 1);
    if (!first || !next || !stack || !entered || !computed) {
        err_set(r->err, ERR_MEMORY, "out of memory for %zu tasks", n);
        goto out;
    }
#define NODE(t) ((t) < first_task ? 0 : (t) - first_task + 1)
    for (int pass = 0; pass < 2; pass++) { /* count, then fill */
        for (int64_t i = first_edge; i < g->n_edges; i++) {
            int32_t *at = &first[NODE(g->edge[i].before) + 2 - pass];
            if (pass)
                next[*at] = NODE(g->edge[i].task);
            ++*at;
        }
        for (int32_t t = first_task; t < g->n_tasks; t++)
            if (g->task[t].kind == TASK_ARRIVAL) {
                int32_t *at = &first[NODE(g->task[t].exchange) + 2 - pass];
                if (pass)
                    next[*at] = NODE(t);
                ++*at;
            }
        for (size_t i = 2; !pass && i < n + 2; i++)
            first[i] += first[i - 1];
    }
    stack[n_stack++] = 0;
    reach(first, next, n_stack, stack, entered);
    n_stack = 0;
    for (int32_t t = first_task; t < g->n_tasks && !r->err->code; t++) {
        if (g->task[t].kind != TASK_EXPERTS || !has_rows(g, &g->task[t]))
            continue;
        if (!entered[NODE(t)])
            err_set(r->err, ERR_RUN, "dispatch %s, layer %d: device %d's experts (task %d) wait for no token",
                    r->dispatch.plugin->name, b->layer, g->task[t].device, t);
        computed[NODE(t)] = 1;
        stack[n_stack++] = NODE(t);
    }
    reach(first, next, n_stack, stack, computed);
    for (int32_t d = 0; d < r->topology->n_devices && !r->err->code; d++)
        if (need->served[d] && (r->exit[d] < first_task || !computed[NODE(r->exit[d])]))
            err_set(r->err, ERR_RUN, "dispatch %s, layer %d: exit[%d] (task %d) does not wait for any expert",
                    r->dispatch.plugin->name, b->layer, d, r->exit[d]);
#undef NODE
out:
    free(first);
    free(next);
    free(stack);
    free(entered);
    free(computed);
    return r->err->code;
}

int layout_check(struct run *r, const struct moe_batch *b, int32_t first_task, int64_t first_edge)
{
    const size_t n = (size_t)r->topology->n_devices, n_rows = n * (size_t)r->model.n_experts;
    double *figures = calloc(n_rows + 2 * N_MOVED * n, sizeof *figures);
    int32_t *seen = malloc(sizeof *seen * 2 * n);
    struct need need = { .rows = figures, .served = calloc(n, sizeof *need.served), .seen = { seen, seen + n } };
    for (int k = 0; figures && k < 2; k++)
        for (int way = 0; way < N_MOVED; way++)
            need.moved[k][way] = figures + n_rows + (size_t)(k * N_MOVED + way) * n;
    if (!figures || !seen || !need.served)
        err_set(r->err, ERR_MEMORY, "out of memory for %zu devices", n);
    else {
        for (size_t i = 0; i < 2 * n; i++)
            seen[i] = -1;
        count_needs(r, b, &need);
        if (check_amounts(r, b, first_task, &need) == 0)
            check_order(r, b, first_task, first_edge, &need);
    }
    free(figures);
    free(seen);
    free(need.served);
    return r->err->code;
}
