/* SPDX-License-Identifier: Apache-2.0
 * eval_balancer.c - moelab eval balancer: one layer through the hooks that a balancer has, in the pipeline's order:
 *
 *   observe every step of `load` -> adjust -> routes (given, or from logits by softmax-top-k) -> rewrite -> plan */
#include "config.h"

#include "eval_job.h"
#include "registry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct work {
    struct moe_batch batch;
    struct moe_cost own;                /* not printed */
    int64_t *steps, n_steps;            /* [S][E] loads to observe: given, or those of the routes before */
    bool loads_given;
    float *start, *scores;              /* [E] bias at the start; [T][E] */
    struct moe_bias bias;
    struct moe_routes before, after;    /* before: as without the balancer; after: rewritten */
    int32_t room;
    bool routed, given;                 /* routes exist; came with the input */
    int64_t *load_before, *load;        /* [E] */
    struct placement placed;
    struct moe_plan plan;
    struct policy router;
    double seconds;
};

/* ---- the input ---- */

static int read_loads(struct eval_job *j, struct work *w)
{
    int64_t shape[2] = { -1, j->model.n_experts > 0 ? j->model.n_experts : -1 };
    if (!job_has(j, "load"))
        return 0;
    int n_dims = job_n_dims(j, "load");
    if (n_dims < 0)
        return j->err->code;
    w->n_steps = 1;
    if (n_dims == 2) {
        w->steps = job_wholes(j, "load", 2, shape, 0, INT64_C(1) << 53);
        w->n_steps = shape[0];
    } else {
        w->steps = job_wholes(j, "load", 1, shape + 1, 0, INT64_C(1) << 53);
    }
    if (!w->steps)
        return j->err->code;
    if (shape[1] < 1 || shape[1] > 65535 || w->n_steps < 1)
        return job_fail(j, "load", "found %lld steps of %lld experts, expected at least one of each",
                        (long long)w->n_steps, (long long)shape[1]);
    j->model.n_experts = (int32_t)shape[1];
    w->loads_given = true;
    return 0;
}

/* Logical expert p of P on device phy2dev[p], or contiguous. */
static int read_placement(struct eval_job *j, struct work *w)
{
    int64_t n = j->model.n_experts;
    int32_t *phy2dev = NULL, n_devices = job_n_devices(j);
    if (n_devices < 0)
        return j->err->code;
    if (job_has(j, "phy2dev") && !(phy2dev = job_ids(j, "phy2dev", 1, &n, 0, 65535)))
        return j->err->code;
    if (n_devices == 0 && !job_has(j, "machine") && !job_has(j, "nodes"))
        for (int64_t p = 0; phy2dev && p < n; p++)
            n_devices = phy2dev[p] >= n_devices ? phy2dev[p] + 1 : n_devices;
    if (job_machine(j, n_devices) < 0)
        return j->err->code;
    struct placement *o = &w->placed;
    o->room = j->model.n_experts;
    o->replica = malloc(sizeof *o->replica * (size_t)o->room);
    if (!o->replica)
        return err_set(j->err, ERR_MEMORY, "out of memory");
    for (int32_t e = 0; e < o->room; e++) {
        int32_t d = phy2dev ? phy2dev[e] : (int32_t)((int64_t)e * j->topology->n_devices / o->room);
        if (d >= j->topology->n_devices)
            return job_fail(j, "phy2dev", "element %d is %d, expected 0 to %d", e, d, j->topology->n_devices - 1);
        o->replica[o->view.n++] = (struct moe_replica){ 0, e, d, 1 };
    }
    return placement_finish(o, &j->model, j->who, j->err);
}

/* The plugin's own name for it. */
static int pass_capacity(struct eval_job *j)
{
    const json_t *v = json_object_get(j->input, "capacity_factor");
    if (!v)
        return 0;
    const char *param = job_takes(j, "factor") ? "factor" : job_takes(j, "capacity_factor") ? "capacity_factor" : NULL;
    if (!param) { /* one input serves all balancers, so this is no error */
        fprintf(stderr, "moelab: warning: %s: capacity_factor: %s has no capacity\n", j->file, j->who);
        return 0;
    }
    return job_param(j, param, "capacity_factor", json_deep_copy(v));
}

static int read_routes(struct eval_job *j, struct work *w)
{
    int32_t n_tokens = w->batch.n_tokens > 0 ? w->batch.n_tokens : -1;
    if (!job_has(j, "routes"))
        return 0;
    int32_t most = j->model.n_experts > 0 ? j->model.n_experts : 65535, n_experts = 0;
    if (job_routes(j, "routes", n_tokens, most, &w->before) < 0)
        return j->err->code;
    for (int64_t i = 0; i < w->before.n; i++)
        n_experts = w->before.expert[i] >= n_experts ? w->before.expert[i] + 1 : n_experts;
    const size_t placed = json_array_size(json_object_get(j->input, "phy2dev"));
    if (placed <= 65535 && (int32_t)placed > n_experts) /* experts that no route names */
        n_experts = (int32_t)placed;
    if (j->model.n_experts == 0)
        j->model.n_experts = n_experts > 0 ? n_experts : 1;
    w->batch.n_tokens = w->before.n_tokens;
    for (int32_t t = 0; t < w->before.n_tokens; t++)
        if (w->before.offset[t + 1] - w->before.offset[t] > j->model.top_k)
            j->model.top_k = (int32_t)(w->before.offset[t + 1] - w->before.offset[t]);
    w->routed = w->given = true;
    return 0;
}

static int read_all(struct eval_job *j, struct work *w, struct moe_routes *unused)
{
    const struct moe_balancer_ops *ops = &j->plugin->ops.balancer;
    struct moe_batch *b = &w->batch;
    if (job_batch(j, b, unused, unused) < 0 || read_loads(j, w) < 0 || read_routes(j, w) < 0 || job_tensors(j) < 0 ||
        pass_capacity(j) < 0 || job_check_needs(j, j->plugin, b) < 0)
        return j->err->code;
    if (!b->router_logits && !w->steps && !w->routed)
        return err_set(j->err, ERR_INPUT, "%s: nothing to balance: expected load, logits or routes", j->file);
    if (!b->router_logits && !w->routed && ops->rewrite && !ops->adjust && !ops->plan)
        return err_set(j->err, ERR_INPUT, "%s: %s changes routes: expected routes or logits", j->file, j->who);
    if (b->router_logits && !w->routed && j->model.top_k == 0)
        return job_fail(j, "top_k", "is missing (--top-k K): %s is to see routes, not only logits", j->who);
    j->model.top_k = j->model.top_k > 0 ? j->model.top_k : 1;
    b->n_experts = j->model.n_experts;
    b->top_k = j->model.top_k;
    size_t n = (size_t)j->model.n_experts;
    int64_t n_bias = j->model.n_experts;
    w->start = job_has(j, "bias") ? job_floats(j, "bias", 1, &n_bias) : job_alloc(j, n, sizeof *w->start);
    w->bias.add = job_alloc(j, n, sizeof *w->bias.add);
    w->bias.scale = job_alloc(j, n, sizeof *w->bias.scale);
    w->load_before = job_alloc(j, n, sizeof *w->load_before);
    w->load = job_alloc(j, n, sizeof *w->load);
    w->scores = job_alloc(j, (size_t)b->n_tokens * n, sizeof *w->scores);
    if (!w->start || !w->bias.add || !w->bias.scale || !w->load_before || !w->load || !w->scores ||
        read_placement(j, w) < 0 || !(b->device = job_token_devices(j, b->n_tokens)) || job_context(j) < 0)
        return j->err->code;
    int64_t room = (int64_t)n * j->topology->n_devices;
    if (room > INT32_MAX)
        return err_set(j->err, ERR_INPUT, "%s: %zu experts on %d devices are too many for a plan", j->file, n,
                       j->topology->n_devices);
    w->plan.max_splits = w->plan.max_moves = (int32_t)room;
    if (ops->plan && (!(w->plan.split = job_alloc(j, (size_t)room, sizeof *w->plan.split)) ||
                      !(w->plan.move = job_alloc(j, (size_t)room, sizeof *w->plan.move))))
        return j->err->code;
    return 0;
}

/* ---- hooks ---- */

static void count(const struct moe_routes *r, int32_t n_experts, int64_t *load)
{
    memset(load, 0, sizeof *load * (size_t)n_experts);
    for (int64_t i = 0; i < r->n; i++)
        if (r->expert[i] < n_experts)
            load[r->expert[i]]++;
}

static int copy_routes(struct eval_job *j, const struct moe_routes *from, struct moe_routes *to, int32_t *room)
{
    if (routes_begin(to, from->n_tokens, room, j->err) < 0 || routes_reserve(to, from->n, j->err) < 0)
        return j->err->code;
    memcpy(to->offset, from->offset, sizeof *to->offset * ((size_t)from->n_tokens + 1));
    if (from->n > 0) {
        memcpy(to->expert, from->expert, sizeof *to->expert * (size_t)from->n);
        memcpy(to->weight, from->weight, sizeof *to->weight * (size_t)from->n);
    }
    to->n = from->n;
    to->n_free = from->n_free;
    return 0;
}

/* Scores and, unless they are given, the routes as they are without the balancer. */
static int route_before(struct eval_job *j, struct work *w)
{
    const struct moe_plugin *plugin;
    struct moe_cost own = { 0, 0, 0 };
    int32_t room = 0;
    if (!w->batch.router_logits)
        return 0;
    if (registry_load(MOE_ROUTER, "softmax-top-k", j->who, &plugin, j->err) < 0 ||
        policy_open(&w->router, &j->context, plugin, NULL, j->who, j->err) < 0 ||
        HOOK(&w->router, router, score, &w->batch, w->scores, &own) < 0 || w->given)
        return j->err->code;
    if (routes_begin(&w->before, w->batch.n_tokens, &room, j->err) < 0)
        return j->err->code;
    memcpy(w->bias.add, w->start, sizeof *w->start * (size_t)j->model.n_experts);
    for (int32_t e = 0; e < j->model.n_experts; e++)
        w->bias.scale[e] = 1;
    w->routed = true;
    return HOOK(&w->router, router, select, &w->batch, w->scores, &w->bias, &w->before);
}

/* The time of one hook is added to *seconds. */
#define TIMED(seconds, call)                                                                                          \
    do {                                                                                                              \
        double began_ = job_clock();                                                                                  \
        call;                                                                                                         \
        *(seconds) += job_clock() - began_;                                                                           \
    } while (0)

static int balance_routes(struct eval_job *j, struct work *w, struct policy *p, double *seconds)
{
    const struct moe_balancer_ops *ops = &j->plugin->ops.balancer;
    if (ops->adjust && !w->given && w->routed) {
        if (routes_begin(&w->after, w->batch.n_tokens, &w->room, j->err) < 0 ||
            HOOK(&w->router, router, select, &w->batch, w->scores, &w->bias, &w->after) < 0)
            return j->err->code;
    } else if (copy_routes(j, &w->before, &w->after, &w->room) < 0) {
        return j->err->code;
    }
    if (ops->rewrite)
        TIMED(seconds, HOOK(p, balancer, rewrite, &w->batch, w->batch.router_logits ? w->scores : NULL,
                            &w->placed.view, &w->after, &w->own));
    if (!j->err->code && routes_check(&w->after, j->model.n_experts, j->who, j->err) == 0)
        count(&w->after, j->model.n_experts, w->load);
    return j->err->code;
}

static int check_plan(struct eval_job *j, const struct work *w)
{
    const struct moe_plan *p = &w->plan;
    const int32_t n_experts = j->model.n_experts, n_devices = j->topology->n_devices;
    for (int32_t i = 0; i < p->n_splits; i++) {
        const struct moe_split *s = &p->split[i];
        if (s->expert < 0 || s->expert >= n_experts || s->device < 0 || s->device >= n_devices || s->from < 0 ||
            s->from > s->to || s->to > w->load[s->expert])
            return err_set(j->err, ERR_RUN, "%s: split %d sends rows %lld to %lld of expert %d to device %d", j->who, i,
                           (long long)s->from, (long long)s->to, s->expert, s->device);
    }
    for (int32_t i = 0; i < p->n_moves; i++) {
        const struct moe_weight_move *m = &p->move[i];
        if (m->expert < 0 || m->expert >= n_experts || m->src < 0 || m->src >= n_devices || m->dst < 0 ||
            m->dst >= n_devices)
            return err_set(j->err, ERR_RUN, "%s: transfer %d sends expert %d from device %d to %d", j->who, i,
                           m->expert, m->src, m->dst);
    }
    return 0;
}

static int balance_once(struct eval_job *j, struct work *w)
{
    const struct moe_balancer_ops *ops = &j->plugin->ops.balancer;
    const size_t n_experts = (size_t)j->model.n_experts;
    struct policy p;
    double seconds = 0;
    if (job_open_policy(j, &p) < 0)
        goto out;
    for (int64_t s = 0; s < w->n_steps && ops->observe; s++) {
        w->batch.step = (int32_t)s + 1;
        TIMED(&seconds, HOOK(&p, balancer, observe, 0, w->steps + (size_t)s * n_experts));
        if (j->err->code)
            goto out;
    }
    memcpy(w->bias.add, w->start, sizeof *w->start * n_experts);
    for (size_t e = 0; e < n_experts; e++)
        w->bias.scale[e] = 1;
    if (ops->adjust)
        TIMED(&seconds, HOOK(&p, balancer, adjust, &w->batch, w->batch.router_logits ? w->scores : NULL, &w->bias,
                             &w->own));
    if (j->err->code)
        goto out;
    if (w->routed && balance_routes(j, w, &p, &seconds) < 0)
        goto out;
    if (w->loads_given) /* a plan is for the loads that were given, where they were */
        memcpy(w->load, w->steps + (size_t)(w->n_steps - 1) * n_experts, sizeof *w->load * n_experts);
    if (ops->plan) {
        w->plan.n_splits = w->plan.n_moves = 0;
        TIMED(&seconds, HOOK(&p, balancer, plan, 0, w->load, &w->placed.view, &w->plan, &w->own));
        if (!j->err->code)
            check_plan(j, w);
    }
    w->seconds = w->seconds == 0 || seconds < w->seconds ? seconds : w->seconds;
out:
    policy_close(&p);
    return j->err->code;
}

/* ---- the result ---- */

/* Per token: routes to experts it did not have before are rerouted; what it lost beyond that is dropped. */
static void put_routes(const struct work *w, json_t *out)
{
    int64_t dropped = 0, rerouted = 0;
    for (int32_t t = 0; t < w->before.n_tokens; t++) {
        const int32_t *old = w->before.expert + w->before.offset[t], *now = w->after.expert + w->after.offset[t];
        int64_t n_old = w->before.offset[t + 1] - w->before.offset[t];
        int64_t n_now = w->after.offset[t + 1] - w->after.offset[t], added = 0;
        for (int64_t i = 0; i < n_now; i++) {
            bool had = false;
            for (int64_t k = 0; k < n_old && !had; k++)
                had = old[k] == now[i];
            added += !had;
        }
        rerouted += added;
        dropped += n_old > n_now ? n_old - n_now : 0;
    }
    json_t *routes = json_object();
    job_put_routes(routes, &w->after);
    json_object_set_new(out, "routes", routes);
    json_object_set_new(out, "dropped", json_integer(dropped));
    json_object_set_new(out, "rerouted", json_integer(rerouted));
}

static int by_expert(const void *a, const void *b)
{
    const struct moe_split *x = a, *y = b;
    if (x->expert != y->expert)
        return x->expert < y->expert ? -1 : 1;
    return (x->from > y->from) - (x->from < y->from);
}

static void put_split(json_t *plan, int64_t *device_load, struct moe_split s)
{
    if (s.from >= s.to)
        return;
    device_load[s.device] += s.to - s.from;
    json_array_append_new(plan, json_pack("{s:i, s:i, s:I, s:I}", "expert", s.expert, "device", s.device, "from",
                                          (json_int_t)s.from, "to", (json_int_t)s.to));
}

/* All rows of all experts: those that no split names stay at home. */
static int put_plan(struct eval_job *j, struct work *w, json_t *out, json_t *max_vio)
{
    struct moe_plan *p = &w->plan;
    const int32_t n_devices = j->topology->n_devices;
    int64_t *before = job_alloc(j, (size_t)n_devices, sizeof *before);
    int64_t *after = job_alloc(j, (size_t)n_devices, sizeof *after);
    if (!before || !after)
        return j->err->code;
    json_t *plan = json_array(), *moves = json_array();
    qsort(p->split, (size_t)p->n_splits, sizeof *p->split, by_expert);
    for (int32_t e = 0, s = 0; e < j->model.n_experts; e++) {
        int32_t home = w->placed.replica[w->placed.by_expert[w->placed.expert_first[e]]].device;
        int64_t at = 0;
        before[home] += w->load[e];
        for (; s < p->n_splits && p->split[s].expert == e; s++) {
            put_split(plan, after, (struct moe_split){ e, home, at, p->split[s].from });
            put_split(plan, after, p->split[s]);
            if (p->split[s].from < at && p->split[s].from < p->split[s].to)
                err_set(j->err, ERR_RUN, "%s: expert %d: row %lld is in two splits", j->who, e,
                        (long long)p->split[s].from);
            at = p->split[s].to > at ? p->split[s].to : at;
        }
        put_split(plan, after, (struct moe_split){ e, home, at, w->load[e] });
    }
    for (int32_t i = 0; i < p->n_moves; i++)
        json_array_append_new(moves, json_pack("{s:i, s:i, s:i}", "expert", p->move[i].expert, "src", p->move[i].src,
                                               "dst", p->move[i].dst));
    json_object_set_new(out, "plan", plan);
    json_object_set_new(out, "transfers", moves);
    json_object_set_new(out, "device_load", job_list_wide(after, n_devices));
    json_object_set_new(max_vio, "before", json_real(job_max_vio(before, n_devices)));
    json_object_set_new(max_vio, "after", json_real(job_max_vio(after, n_devices)));
    return j->err->code;
}

static void put_bias(struct eval_job *j, const struct work *w, json_t *out)
{
    bool scaled = false;
    for (int32_t e = 0; e < j->model.n_experts; e++)
        scaled |= w->bias.scale[e] < 1 || w->bias.scale[e] > 1;
    json_object_set_new(out, "bias", job_list_floats(w->bias.add, j->model.n_experts));
    if (scaled)
        json_object_set_new(out, "scale", job_list_floats(w->bias.scale, j->model.n_experts));
}

int eval_balancer(struct eval_job *j, json_t *out)
{
    const struct moe_balancer_ops *ops = &j->plugin->ops.balancer;
    struct work w = { .n_steps = 0 };
    struct moe_routes unused = { 0 };
    if (read_all(j, &w, &unused) < 0 || route_before(j, &w) < 0)
        goto out;
    if (w.routed)
        count(&w.before, j->model.n_experts, w.load_before);
    else
        memcpy(w.load_before, w.steps + (size_t)(w.n_steps - 1) * (size_t)j->model.n_experts,
               sizeof *w.load_before * (size_t)j->model.n_experts);
    if (!w.loads_given) {
        w.steps = w.load_before;
        w.n_steps = 1;
    }
    for (int32_t i = 0; i < j->n_repeats; i++)
        if (balance_once(j, &w) < 0)
            goto out;
    json_t *max_vio = json_object();
    if (ops->adjust)
        put_bias(j, &w, out);
    if (ops->rewrite && w.routed)
        put_routes(&w, out);
    if (ops->plan) {
        put_plan(j, &w, out, max_vio);
    } else { /* of experts; what a bias does to loads alone, without logits, is not known */
        if (w.routed)
            count(&w.after, j->model.n_experts, w.load);
        bool known = w.routed || !ops->adjust;
        json_object_set_new(max_vio, "before", json_real(job_max_vio(w.load_before, j->model.n_experts)));
        json_object_set_new(max_vio, "after", known ? json_real(job_max_vio(w.load, j->model.n_experts)) : json_null());
    }
    json_object_set_new(out, "max_vio", max_vio);
    json_object_set_new(out, "seconds", json_real(w.seconds));
out:
    policy_close(&w.router);
    routes_free(&w.before);
    routes_free(&w.after);
    routes_free(&unused);
    placement_free(&w.placed);
    return j->err->code;
}
