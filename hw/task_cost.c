/* SPDX-License-Identifier: Apache-2.0
 * task_cost.c - what a task that computes takes of its device: kernels one after another, a roofline, or experts. */
#include "config.h"

#include "task_cost.h"

#include <string.h>

static struct kernel_cost list_cost(const struct machine *m, const struct moe_graph *g, const struct task *t,
                                    struct timed_list *timed)
{
    const struct device_spec *spec = &m->topology->device[t->device];
    struct timed_list *known = t->n > 0 ? &timed[t->first] : NULL;
    if (known && known->device >= 0 && !memcmp(spec, &m->topology->device[known->device], sizeof *spec))
        return known->cost;
    struct kernel_cost sum = { 0 };
    for (int32_t i = t->first; i < t->first + t->n; i++)
        cost_add(&sum, cost_kernel(spec, &g->kernel[i]));
    if (known)
        *known = (struct timed_list){ sum, t->device };
    return sum;
}

struct kernel_cost task_cost(const struct machine *m, const struct moe_graph *g, const struct task *t,
                             struct timed_list *timed)
{
    const struct moe_model *model = m->model;
    const struct device_spec *spec = &m->topology->device[t->device];
    if (t->kind == TASK_COMPUTE && t->listed)
        return list_cost(m, g, t, timed);
    if (t->kind == TASK_COMPUTE) {
        const struct latency_key key = { .op = t->op == MOE_OP_PERMUTE ? LATENCY_PERMUTE
                                               : t->op == MOE_OP_COMBINE ? LATENCY_COMBINE : LATENCY_NONE,
                                         .rows = t->bytes };
        return cost_known(spec, m->precision, t->flops, t->bytes, &key);
    }
    double width[t->n + 1];
    for (int32_t i = 0; i < t->n; i++) {
        const size_t expert = (size_t)t->layer * (size_t)model->n_experts + (size_t)g->expert[t->first + i];
        width[i] = (model->expert_width ? model->expert_width[expert] : 1.0) * (double)t->fraction;
    }
    if (t->pass == PASS_BACKWARD)
        return cost_experts_backward(spec, m->precision, model, t->n, g->rows + t->first, width);
    return cost_experts(spec, m->precision, model, t->n, g->rows + t->first, width);
}
