/* SPDX-License-Identifier: Apache-2.0
 * eval_router.c - moelab eval router: one batch of one layer through a router. */
#include "config.h"

#include "eval_job.h"

#include <stdlib.h>
#include <string.h>

struct work {
    struct moe_batch batch;
    struct moe_bias bias;
    float *scores; /* [T][E']; NULL for routers that route without */
    struct moe_routes routes;
    int32_t room;
};

static int route_once(struct eval_job *j, struct work *w, double *best)
{
    struct policy p;
    struct moe_cost own = { 0, 0, 0 };
    const struct moe_bias *bias = job_has(j, "bias") ? &w->bias : NULL;
    if (job_open_policy(j, &p) < 0 || routes_begin(&w->routes, w->batch.n_tokens, &w->room, j->err) < 0)
        goto out;
    double start = job_clock();
    if (w->scores) {
        if (HOOK(&p, router, score, &w->batch, w->scores, &own) == 0)
            HOOK(&p, router, select, &w->batch, w->scores, bias, &w->routes);
    } else {
        HOOK(&p, router, route, &w->batch, bias, &w->routes, &own);
    }
    double seconds = job_clock() - start;
    *best = *best == 0 || seconds < *best ? seconds : *best;
    if (!j->err->code)
        routes_check(&w->routes, j->model.n_experts, j->who, j->err);
out:
    policy_close(&p);
    return j->err->code;
}

/* Experts that cost nothing: the policy says, which is opened for that alone. */
static int count_free(struct eval_job *j, struct moe_batch *b)
{
    struct policy p;
    if (j->plugin->ops.router.n_free && job_open_policy(j, &p) == 0) {
        policy_n_free(&p, b->layer, &b->n_free);
        policy_close(&p);
    }
    return j->err->code;
}

static int prepare(struct eval_job *j, struct work *w, struct moe_routes *recorded, struct moe_routes *previous)
{
    const struct moe_router_ops *ops = &j->plugin->ops.router;
    struct moe_batch *b = &w->batch;
    if (job_batch(j, b, recorded, previous) < 0 || job_tensors(j) < 0 || job_check_needs(j, j->plugin, b) < 0)
        return j->err->code;
    for (int64_t i = 0; j->model.n_experts == 0 && b->recorded && i < recorded->n; i++)
        b->n_experts = recorded->expert[i] >= b->n_experts ? recorded->expert[i] + 1 : b->n_experts;
    if (j->model.n_experts == 0)
        j->model.n_experts = b->n_experts;
    if (j->model.n_experts == 0)
        return job_fail(j, b->recorded || b->router_logits ? "n_experts" : "logits", "is missing%s",
                        b->recorded || b->router_logits ? "" : ": no logits, and no n_experts either");
    for (int32_t t = 0; b->top_k == 0 && b->recorded && t < b->n_tokens; t++)
        if (recorded->offset[t + 1] - recorded->offset[t] > j->model.top_k)
            j->model.top_k = (int32_t)(recorded->offset[t + 1] - recorded->offset[t]);
    if (j->model.top_k == 0)
        return job_fail(j, "top_k", "is missing (--top-k K)");
    b->top_k = j->model.top_k;
    if (job_machine(j, 0) < 0 || !(b->device = job_token_devices(j, b->n_tokens)) || job_context(j) < 0 ||
        count_free(j, b) < 0)
        return j->err->code;
    if (job_has(j, "bias") && !policy_heeds_bias(j->plugin))
        return job_fail(j, "bias", "router %s decides without scores, and would not heed it", j->plugin->name);
    int64_t n_columns = j->model.n_experts + b->n_free;
    w->bias.add = job_has(j, "bias") ? job_floats(j, "bias", 1, &n_columns)
                                     : job_alloc(j, (size_t)n_columns, sizeof *w->bias.add);
    w->bias.scale = job_alloc(j, (size_t)n_columns, sizeof *w->bias.scale);
    if (!w->bias.add || !w->bias.scale)
        return j->err->code;
    for (int64_t e = 0; e < n_columns; e++)
        w->bias.scale[e] = 1;
    if (ops->score && ops->select && (!ops->route || job_has(j, "bias"))) /* as in a run */
        w->scores = job_alloc(j, (size_t)b->n_tokens * (size_t)n_columns, sizeof *w->scores);
    return j->err->code;
}

int eval_router(struct eval_job *j, json_t *out)
{
    struct work w = { .scores = NULL };
    struct moe_routes recorded = { 0 }, previous = { 0 };
    double seconds = 0;
    if (prepare(j, &w, &recorded, &previous) < 0)
        goto out;
    for (int32_t i = 0; i < j->n_repeats; i++)
        if (route_once(j, &w, &seconds) < 0)
            goto out;
    int64_t *load = job_alloc(j, (size_t)j->model.n_experts, sizeof *load);
    if (!load)
        goto out;
    for (int64_t i = 0; i < w.routes.n; i++)
        if (w.routes.expert[i] < j->model.n_experts) /* the others cost nothing */
            load[w.routes.expert[i]]++;
    json_object_set_new(out, "n_tokens", json_integer(w.routes.n_tokens));
    json_object_set_new(out, "n_experts", json_integer(j->model.n_experts));
    job_put_routes(out, &w.routes);
    json_object_set_new(out, "load", job_list_wide(load, j->model.n_experts));
    json_object_set_new(out, "max_vio", json_real(job_max_vio(load, j->model.n_experts)));
    json_object_set_new(out, "seconds", json_real(seconds));
out:
    routes_free(&w.routes);
    routes_free(&recorded);
    routes_free(&previous);
    return j->err->code;
}
