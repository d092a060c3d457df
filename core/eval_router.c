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
    struct policy policy; /* open until its routes were read: some of their arrays are its own */
    bool opened;
};

static void close_policy(struct work *w)
{
    if (w->opened)
        policy_close(&w->policy);
    w->opened = false;
}

static int route_once(struct eval_job *j, struct work *w, double *best)
{
    struct policy *p = &w->policy;
    struct moe_cost own = { 0, 0, 0 };
    const struct moe_bias *bias = job_has(j, "bias") ? &w->bias : NULL;
    close_policy(w);
    w->opened = true;
    if (job_open_policy(j, p) < 0 || routes_begin(&w->routes, w->batch.n_tokens, &w->room, j->err) < 0)
        return j->err->code;
    double start = job_clock();
    if (w->scores) {
        if (HOOK(p, router, score, &w->batch, w->scores, &own) == 0)
            HOOK(p, router, select, &w->batch, w->scores, bias, &w->routes);
    } else {
        HOOK(p, router, route, &w->batch, bias, &w->routes, &own);
    }
    double seconds = job_clock() - start;
    *best = *best == 0 || seconds < *best ? seconds : *best;
    if (!j->err->code)
        routes_check(&w->routes, j->model.n_experts, j->who, j->err);
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

static json_t *list_halves(const uint8_t *half, int32_t n)
{
    json_t *list = json_array();
    for (int32_t t = 0; t < n; t++)
        json_array_append_new(list, json_integer(half[t]));
    return list;
}

/* Share of n tokens that have this half. */
static double share_of(const uint8_t *halves, int32_t n, enum moe_half half)
{
    int32_t count = 0;
    for (int32_t t = 0; halves && t < n; t++)
        count += (halves[t] & half) != 0;
    return n > 0 ? (double)count / n : 0;
}

/* What only some routers have, and the rows per token that experts compute. */
static void put_forms(json_t *out, const struct moe_routes *r, const int64_t *load, int32_t n_loads)
{
    const double n = r->n_tokens > 0 ? r->n_tokens : 1;
    int64_t rows = 0;
    for (int32_t i = 0; i < n_loads; i++)
        rows += load[i];
    json_object_set_new(out, "form", json_string(routes_form_name(r->form)));
    if (r->form != MOE_TOKENS) {
        json_object_set_new(out, "n_slots", json_integer(r->n_slots));
        json_object_set_new(out, "slots", job_list(r->slot, r->n));
    }
    if (r->combine)
        json_object_set_new(out, "combine", job_list_floats(r->combine, r->n));
    json_object_set_new(out, "experts_per_token", json_real((double)rows / n));
    if (r->skip) {
        json_object_set_new(out, "skip", list_halves(r->skip, r->n_tokens));
        json_object_set_new(out, "skipped_attention", json_real(share_of(r->skip, r->n_tokens, MOE_HALF_ATTENTION)));
        json_object_set_new(out, "skipped_experts", json_real(share_of(r->skip, r->n_tokens, MOE_HALF_EXPERTS)));
    }
    if (r->again)
        json_object_set_new(out, "again", list_halves(r->again, r->n_tokens));
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
    const struct moe_routes *r = &w.routes;
    const int32_t n_loads = r->form == MOE_MERGED ? r->n_slots : j->model.n_experts;
    int64_t *load = job_alloc(j, (size_t)n_loads + 1, sizeof *load);
    if (!load || routes_rows(r, j->model.n_experts, load, j->err) < 0)
        goto out;
    json_object_set_new(out, "n_tokens", json_integer(r->n_tokens));
    json_object_set_new(out, "n_experts", json_integer(j->model.n_experts));
    job_put_routes(out, r);
    json_object_set_new(out, "load", job_list_wide(load, n_loads));
    json_object_set_new(out, "max_vio", json_real(job_max_vio(load, n_loads)));
    if (r->form != MOE_TOKENS || r->skip || r->again)
        put_forms(out, r, load, n_loads);
    json_object_set_new(out, "seconds", json_real(seconds));
out:
    close_policy(&w);
    routes_free(&w.routes);
    routes_free(&recorded);
    routes_free(&previous);
    return j->err->code;
}
