/* SPDX-License-Identifier: Apache-2.0
 * layout_check.c - a layout that does less than the layer needs would only look faster, so every one is checked:
 *
 *   rows    each device computes at least the rows that placement and plans put there (more is padding)
 *   bytes   each device receives at least one row per token of another device that it computes (a token may travel once
 *           for several experts), and one row back per token of its own that was computed elsewhere
 *   order   no experts task with rows before every entry; no exit of a device whose tokens are computed without an
 *           experts task before it
 *
 * Order is reachability from any entry and from any experts task, not from each that matters: linear in the layout. */
#include "config.h"

#include "run.h"

#include <stdlib.h>
#include <string.h>

struct need { double *rows, *hidden, *output; /* [D] */ bool *served; /* [D] has tokens that are computed */ };

static void count_needs(const struct run *r, const struct moe_batch *b, struct need *n)
{
    const struct moe_routes *routes = &r->routes;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        const int32_t home = b->device[t];
        bool away = false;
        for (int64_t i = routes->offset[t]; i < routes->offset[t + 1]; i++) {
            const int32_t d = r->to[i];
            if (d < 0) /* costs nothing, goes nowhere */
                continue;
            n->served[home] = true;
            n->rows[d]++;
            bool again = d == home;
            away |= !again;
            for (int64_t j = routes->offset[t]; j < i && !again; j++)
                again = r->to[j] == d;
            n->hidden[d] += again ? 0 : 1;
        }
        n->output[home] += away;
    }
}

static int check_amounts(struct run *r, const struct moe_batch *b, int32_t first_task, struct need *need)
{
    const struct moe_graph *g = &r->graph;
    const char *name = r->dispatch.plugin->name;
    const int32_t n_experts = moe_experts_of(&r->model, b->layer);
    const double row[2] = { r->model.d_model * r->model.act_bytes, r->model.d_model * r->model.combine_bytes };
    double *wanted[2] = { need->hidden, need->output };
    static const char *const what[2] = { "hidden states", "outputs" };
    for (int32_t t = first_task; t < g->n_tasks; t++) {
        const struct task *x = &g->task[t];
        for (int32_t i = x->first; x->kind == TASK_EXPERTS && i < x->first + x->n; i++) {
            if (g->expert[i] >= n_experts)
                return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: device %d computes expert %d, expected 0 to %d",
                               name, b->layer, x->device, g->expert[i], n_experts - 1);
            need->rows[x->device] -= (double)g->rows[i] * (double)x->fraction;
        }
        for (int32_t i = x->first; x->kind == TASK_EXCHANGE && x->payload != MOE_PAY_BYTES && i < x->first + x->n; i++)
            if (g->part[i].src != g->part[i].dst)
                wanted[x->payload == MOE_PAY_OUTPUT][g->part[i].dst] -=
                    g->part[i].bytes / row[x->payload == MOE_PAY_OUTPUT];
    }
    for (int32_t d = 0; d < r->topology->n_devices; d++) {
        if (need->rows[d] > 1e-3 * (1 + (double)r->device_load[d]))
            return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: device %d computes %g rows, expected %lld or more",
                           name, b->layer, d, (double)r->device_load[d] - need->rows[d], (long long)r->device_load[d]);
        for (int k = 0; k < 2; k++)
            if (wanted[k][d] > 1e-3)
                return err_set(r->err, ERR_RUN, "dispatch %s, layer %d: device %d receives the %s of %g tokens too few",
                               name, b->layer, d, what[k], wanted[k][d]);
    }
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
    const size_t n = (size_t)r->topology->n_devices;
    double *figures = calloc(3 * n, sizeof *figures);
    struct need need = { figures, figures + n, figures + 2 * n, calloc(n, sizeof *need.served) };
    if (!figures || !need.served)
        err_set(r->err, ERR_MEMORY, "out of memory for %zu devices", n);
    else {
        count_needs(r, b, &need);
        if (check_amounts(r, b, first_task, &need) == 0)
            check_order(r, b, first_task, first_edge, &need);
    }
    free(figures);
    free(need.served);
    return r->err->code;
}
