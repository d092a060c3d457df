/* SPDX-License-Identifier: Apache-2.0
 * items_check.c - see items_check.h. */
#include "config.h"

#include "items_check.h"

static int check_experts(const struct moe_model *m, const struct moe_graph *g, const struct task *t,
                         const char *machine, struct err *e)
{
    int64_t rows = 0;
    const int64_t *item = g->item + t->first_item;
    if (t->fraction < 1)
        return err_set(e, ERR_INPUT, "layer %d: an expert is sharded over devices, which machine %s does not run",
                       t->layer, machine);
    for (int32_t i = 0; i < t->n; i++)
        rows += g->rows[t->first + i];
    if (rows != t->n_items)
        return err_set(e, ERR_INPUT, "layer %d, device %d: the layout names %lld of the %lld routes that its experts "
                       "compute: machine %s needs them", t->layer, t->device, (long long)t->n_items,
                       (long long)rows, machine);
    for (int32_t i = 0; i < t->n; i++)
        for (int64_t j = 0; j < g->rows[t->first + i]; j++, item++) {
            int32_t expert = g->expert[t->first + i];
            int64_t r = g->route_first[t->layer] + *item;
            if (expert >= m->n_experts || *item < 0 || r >= g->route_first[t->layer + 1] ||
                g->route[r].expert != expert)
                return err_set(e, ERR_RUN, "layer %d, device %d: item %lld is not a route to expert %d", t->layer,
                               t->device, (long long)*item, expert);
        }
    return 0;
}

static int check_parts(const struct moe_graph *g, const struct task *t, const char *machine, struct err *e)
{
    if (t->payload == MOE_PAY_BYTES)
        return 0;
    int64_t n_routes = g->route_first[t->layer + 1] - g->route_first[t->layer];
    for (int32_t i = t->first; i < t->first + t->n; i++) {
        const struct moe_part *p = &g->part[i];
        if ((p->n_items == 0 && p->bytes > 0) || g->part_item[i] + p->n_items > g->n_items)
            return err_set(e, ERR_INPUT, "layer %d: a part from device %d to device %d does not name its routes: "
                           "machine %s needs them", t->layer, p->src, p->dst, machine);
        for (int64_t j = g->part_item[i]; j < g->part_item[i] + p->n_items; j++)
            if (g->item[j] < 0 || g->item[j] >= n_routes)
                return err_set(e, ERR_RUN, "layer %d: a part carries item %lld, expected 0 to %lld", t->layer,
                               (long long)g->item[j], (long long)n_routes - 1);
    }
    return 0;
}

int items_check(const struct moe_model *m, const struct moe_graph *g, const char *machine, struct err *e)
{
    for (int32_t i = 0; i < g->n_tasks && !e->code; i++) {
        const struct task *t = &g->task[i];
        if (t->kind == TASK_EXPERTS)
            check_experts(m, g, t, machine, e);
        else if (t->kind == TASK_EXCHANGE)
            check_parts(g, t, machine, e);
    }
    return e->code;
}
