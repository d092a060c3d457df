/* SPDX-License-Identifier: Apache-2.0
 * gate_stage.c - a trained gate in a run: after each layer's routes its losses, after the last one step of SGD. */
#include "config.h"

#include "run.h"

#include <math.h>
#include <stdio.h>

/* Of the first step's loss, beyond which a gate has come off: what learns anything has a loss below that. */
static const double LOST = 1e4;

int gate_stage_layer(struct run *r, const struct moe_batch *b)
{
    struct gate *g = r->workload.gate;
    float *d_logits = g->d_logits + (int64_t)b->layer * g->n_tokens * g->n_experts;
    char who[400];
    snprintf(who, sizeof who, "%s: router %s, step %d, layer %d", r->where, r->router.plugin->name, b->step, b->layer);
    if (b->layer == 0)
        r->metrics.aux_loss = 0;
    if (gate_learn(g, b->layer, &r->routes, who, r->err) < 0)
        return r->err->code;
    for (int i = 0; i < r->n_balancers; i++)
        if (r->balancer[i].plugin->ops.balancer.loss &&
            HOOK(&r->balancer[i], balancer, loss, b, r->gate_scores, &r->routes, &r->metrics.aux_loss, d_logits,
                 NULL) < 0)
            return r->err->code;
    return 0;
}

int gate_stage_step(struct run *r, int32_t step)
{
    struct gate *g = r->workload.gate;
    const double loss = g->loss / g->n_layers, aux = r->metrics.aux_loss / g->n_layers;
    if (g->step == 0)
        g->first_loss = loss;
    gate_back(g);
    gate_descend(g);
    if (!isfinite(loss + aux) || loss > LOST * g->first_loss || !gate_is_finite(g))
        return err_set(r->err, ERR_RUN, "%s: workload.kind: gate: it diverges: at step %d its loss is %g, balancers' "
                       "losses %g; at step 0 its loss was %g. Lower learning_rate (%g), expert_rate (%g) or the "
                       "losses' weights", r->where, step, loss, aux, g->first_loss, g->conf->learning_rate,
                       g->conf->expert_rate);
    r->metrics.learns = true;
    r->metrics.task_loss = loss;
    r->metrics.aux_loss = aux;
    return 0;
}

/* Steps that figures count, from the first after the warm-up: what changes as a gate learns. */
json_t *gate_stage_curve(const struct run *r)
{
    static const enum metric shown[] = { METRIC_task_loss, METRIC_aux_loss, METRIC_max_vio, METRIC_load_cv,
                                         METRIC_load_entropy, METRIC_fluctuation, METRIC_experts_per_token,
                                         METRIC_dropped };
    json_t *curve = json_pack("{s:i}", "first", r->n_warmup);
    for (size_t i = 0; i < sizeof shown / sizeof *shown; i++) {
        json_t *list = json_array();
        for (int32_t s = 0; s < r->metrics.n_steps; s++) {
            const double v = r->metrics.value[shown[i]][s];
            json_array_append_new(list, json_real(isfinite(v) ? v : 0)); /* no step before the first: no change */
        }
        json_object_set_new(curve, metric_info[shown[i]].name, list);
    }
    return curve;
}
