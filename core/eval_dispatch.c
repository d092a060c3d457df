/* SPDX-License-Identifier: Apache-2.0
 * eval_dispatch.c - moelab eval dispatch: one layer's traffic laid out and run on a machine.
 *
 * Everything becomes tokens with a device and an expert, because that is what dispatch lays out:
 *   tokens_by [src][expert]  one token per count
 *   bytes [src][dst]         one expert per device; as many rows as the bytes make
 *   routes + device          as they are */
#include "config.h"

#include "eval_job.h"
#include "metrics.h"
#include "models.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* An entry of `bytes` becomes at least so many rows (so that rounding them to whole rows costs at most 1/512 of the
 * smallest entry), unless all of them together would then be more than MAX_ROWS. */
enum { ROWS_PER_ENTRY = 256, MAX_ROWS = 1 << 20, MAX_TOKENS = 1 << 26 };

struct work {
    enum net_tier tier;
    struct moe_routes routes;
    int32_t *device;          /* [T] */
    int32_t *to;              /* [n] */
    double row_bytes[2];      /* of one token's row on the wire: there, back */
    struct placement placed;
    struct machine machine;
    bool machine_open;
    struct moe_graph graph;
    int32_t *entry, *exit;    /* [D] */
    double seconds;
};

/* ---- the input ---- */

/* {d_model, d_expert}; 0: not given. */
static int read_expert_shape(struct eval_job *j, int32_t *d_model, int32_t *d_expert)
{
    static const char *const known[] = { "d_model", "d_expert" };
    json_t *o = json_object_get(j->input, "expert"), *value;
    const char *key;
    *d_model = *d_expert = 0;
    if (o && !json_is_object(o))
        return job_fail(j, "expert", "expected {\"d_model\", \"d_expert\"}");
    json_object_foreach(o, key, value) {
        int i = !strcmp(key, known[0]) ? 0 : !strcmp(key, known[1]) ? 1 : 2;
        if (i == 2) {
            const char *near = err_nearest(key, known, 2);
            return job_fail(j, "expert", "unknown key \"%s\"%s%s", key,
                            near ? "; did you mean " : ", expected d_model and d_expert", near ? near : "");
        }
        double x = json_number_value(value);
        if (!json_is_number(value) || x < 1 || x > 1 << 20 || x != floor(x))
            return job_fail(j, "expert", "%s: expected a whole number from 1 to %d", key, 1 << 20);
        *(i == 0 ? d_model : d_expert) = (int32_t)x;
    }
    return 0;
}

/* rows [D][E] to tokens with one route each, source by source. */
static int tokens_of_rows(struct eval_job *j, struct work *w, const char *key, const int64_t *rows, int32_t n_devices,
                          int32_t n_experts)
{
    int64_t n = 0, at = 0;
    int32_t room = 0;
    for (size_t i = 0; i < (size_t)n_devices * (size_t)n_experts && n <= MAX_TOKENS; i++)
        n += rows[i];
    if (n > MAX_TOKENS)
        return job_fail(j, key, "more than %d tokens in all", MAX_TOKENS);
    if (routes_begin(&w->routes, (int32_t)n, &room, j->err) < 0 || routes_reserve(&w->routes, n, j->err) < 0 ||
        !(w->device = job_alloc(j, (size_t)n, sizeof *w->device)))
        return j->err->code;
    for (int32_t d = 0; d < n_devices; d++)
        for (int32_t e = 0; e < n_experts; e++)
            for (int64_t i = 0; i < rows[(size_t)d * (size_t)n_experts + (size_t)e]; i++, at++) {
                w->device[at] = d;
                w->routes.expert[at] = e;
                w->routes.weight[at] = 1;
                w->routes.offset[at + 1] = at + 1;
            }
    w->routes.n = n;
    return 0;
}

static int read_tokens_by(struct eval_job *j, struct work *w, int32_t *n_devices)
{
    int64_t shape[2] = { -1, j->model.n_experts > 0 ? j->model.n_experts : -1 };
    int64_t *rows = job_wholes(j, "tokens_by", 2, shape, 0, MAX_TOKENS);
    if (!rows)
        return j->err->code;
    if (shape[0] < 1 || shape[0] > 65536 || shape[1] < 1 || shape[1] > 65535)
        return job_fail(j, "tokens_by", "found %lld sources of %lld experts, expected at least one of each",
                        (long long)shape[0], (long long)shape[1]);
    *n_devices = (int32_t)shape[0];
    j->model.n_experts = (int32_t)shape[1];
    return tokens_of_rows(j, w, "tokens_by", rows, *n_devices, j->model.n_experts);
}

/* d_model: 0 when the caller did not say; then rows are as small as it takes to represent the bytes well. The rows'
 * size on the wire is then set so that the sum of all bytes is exact. */
static int read_bytes(struct eval_job *j, struct work *w, int32_t *n_devices)
{
    int64_t shape[2] = { -1, -1 };
    double *bytes = job_reals(j, "bytes", 2, shape, 0, 1e18), least = INFINITY, total = 0;
    if (!bytes)
        return j->err->code;
    if (shape[0] != shape[1] || shape[0] < 1 || shape[0] > 16384)
        return job_fail(j, "bytes", "found [%lld, %lld], expected [D, D] with D from 1 to 16384", (long long)shape[0],
                        (long long)shape[1]);
    if (job_has(j, "phy2dev"))
        return job_fail(j, "phy2dev", "bytes name devices, not experts");
    if (job_has(j, "dispatch_bytes") || job_has(j, "combine_bytes"))
        return job_fail(j, "dispatch_bytes", "a row's size, which bytes do not have");
    const size_t n = (size_t)(shape[0] * shape[0]);
    for (size_t i = 0; i < n; i++) {
        total += bytes[i];
        least = bytes[i] > 0 ? fmin(least, bytes[i]) : least;
    }
    double row = 2.0 * j->model.d_model;
    if (row <= 0)
        row = fmax(fmin(2.0 * 7168, least / ROWS_PER_ENTRY), total / MAX_ROWS);
    int64_t *rows = job_alloc(j, n, sizeof *rows), n_rows = 0;
    if (!rows)
        return j->err->code;
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] > row * MAX_TOKENS)
            return job_fail(j, "bytes", "%.17g bytes are more than %d rows of %g", bytes[i], MAX_TOKENS, row);
        rows[i] = bytes[i] > 0 ? llround(fmax(1, bytes[i] / row)) : 0;
        n_rows += rows[i];
    }
    w->row_bytes[0] = w->row_bytes[1] = n_rows > 0 ? total / (double)n_rows : row;
    if (j->model.d_model == 0)
        j->model.d_model = (int32_t)fmax(1, round(w->row_bytes[0] / 2));
    *n_devices = (int32_t)shape[0];
    j->model.n_experts = *n_devices;
    return tokens_of_rows(j, w, "bytes", rows, *n_devices, *n_devices);
}

static int read_routes(struct eval_job *j, struct work *w, int32_t *n_devices)
{
    int32_t n_experts = 0;
    if (job_routes(j, "routes", -1, j->model.n_experts > 0 ? j->model.n_experts : 65535, &w->routes) < 0)
        return j->err->code;
    if (!job_has(j, "device") && (!job_has(j, "devices") || json_is_number(json_object_get(j->input, "devices"))))
        return job_fail(j, "device", "is missing: where every token is");
    for (int64_t i = 0; i < w->routes.n; i++)
        n_experts = w->routes.expert[i] >= n_experts ? w->routes.expert[i] + 1 : n_experts;
    /* Experts that no route names are there all the same. */
    const size_t placed = json_array_size(json_object_get(j->input, "phy2dev"));
    if (placed <= 65535 && (int32_t)placed > n_experts)
        n_experts = (int32_t)placed;
    if (j->model.n_experts == 0)
        j->model.n_experts = n_experts > 0 ? n_experts : 1;
    *n_devices = 0; /* as `devices`, `nodes`, the machine or the tokens themselves say */
    return 0;
}

/* Experts on devices, and with that where every route goes. */
static int place(struct eval_job *j, struct work *w)
{
    const int32_t n_experts = j->model.n_experts, n_devices = j->topology->n_devices;
    int64_t n = n_experts;
    const int32_t *phy2dev = NULL;
    struct placement *p = &w->placed;
    if (job_has(j, "phy2dev") && !(phy2dev = job_ids(j, "phy2dev", 1, &n, 0, n_devices - 1)))
        return j->err->code;
    p->replica = malloc(sizeof *p->replica * (size_t)n_experts);
    w->to = job_alloc(j, (size_t)w->routes.n, sizeof *w->to);
    if (!p->replica || !w->to)
        return err_set(j->err, ERR_MEMORY, "out of memory");
    p->room = n_experts;
    for (int32_t e = 0; e < n_experts; e++)
        p->replica[p->view.n++] = (struct moe_replica){
            0, e, phy2dev ? phy2dev[e] : (int32_t)((int64_t)e * n_devices / n_experts), 1
        };
    if (placement_finish(p, &j->model, j->who, j->err) < 0)
        return j->err->code;
    for (int64_t i = 0; i < w->routes.n; i++)
        w->to[i] = p->replica[p->by_expert[p->expert_first[w->routes.expert[i]]]].device;
    return 0;
}

static int read_tier(struct eval_job *j, struct work *w)
{
    const json_t *v = json_object_get(j->input, "tier");
    const char *option = job_option_text(j, "tier");
    if (v && !json_is_string(v))
        return job_fail(j, "tier", "expected bound, flow, exact or simgrid");
    return job_tier(j, option ? option : v ? json_string_value(v) : "flow", &w->tier);
}

static int read_all(struct eval_job *j, struct work *w)
{
    static const char *const forms[] = { "tokens_by", "bytes", "routes" };
    static int (*const read[])(struct eval_job *, struct work *, int32_t *) = { read_tokens_by, read_bytes,
                                                                                read_routes };
    int form = -1;
    int32_t n_devices = 0, d_expert;
    struct moe_model *m = &j->model;
    for (int i = 0; i < 3; i++) {
        if (job_has(j, forms[i]) && form >= 0)
            return job_fail(j, forms[i], "given together with %s, expected one of them", forms[form]);
        form = job_has(j, forms[i]) ? i : form;
    }
    if (form < 0)
        return err_set(j->err, ERR_INPUT, "%s: expected tokens_by, bytes or routes", j->file);
    if (job_has(j, "n_experts") && job_whole(j, "n_experts", 0, 1, 65535, &m->n_experts) < 0)
        return j->err->code;
    if (read_expert_shape(j, &m->d_model, &d_expert) < 0 || read_tier(j, w) < 0 || read[form](j, w, &n_devices) < 0)
        return j->err->code;
    m->n_layers = 1;
    m->d_model = m->d_model > 0 ? m->d_model : 7168;
    m->d_expert = d_expert > 0 ? d_expert : 2048;
    m->weight_bytes = m->act_bytes = m->combine_bytes = 2;
    m->top_k = 1;
    for (int32_t t = 0; t < w->routes.n_tokens; t++)
        if (w->routes.offset[t + 1] - w->routes.offset[t] > m->top_k)
            m->top_k = (int32_t)(w->routes.offset[t + 1] - w->routes.offset[t]);
    static const char *const row_key[2] = { "dispatch_bytes", "combine_bytes" };
    for (int i = 0; i < 2 && w->row_bytes[i] <= 0; i++)
        if (job_real(j, row_key[i], m->d_model * m->act_bytes, 1, 1e9, &w->row_bytes[i]) < 0)
            return j->err->code;
    if (job_machine(j, n_devices) < 0 ||
        (!w->device && !(w->device = job_token_devices(j, w->routes.n_tokens))) || place(j, w) < 0)
        return j->err->code;
    w->entry = job_alloc(j, (size_t)j->topology->n_devices, sizeof *w->entry);
    w->exit = job_alloc(j, (size_t)j->topology->n_devices, sizeof *w->exit);
    if (!w->entry || !w->exit || job_context(j) < 0 ||
        topology_computes(j->topology, PREC_BF16, j->err) < 0 ||
        machine_open_sim(&w->machine, j->topology, m, PREC_BF16, w->tier, j->err) < 0)
        return j->err->code;
    w->machine_open = true;
    j->context.machine = &w->machine;
    return 0;
}

/* ---- the layer ---- */

static int lay_out_once(struct eval_job *j, struct work *w)
{
    const int32_t n_devices = j->topology->n_devices;
    struct policy p;
    graph_reset(&w->graph);
    w->graph.n_devices = n_devices;
    for (int32_t d = 0; d < n_devices; d++) { /* tokens are ready at once */
        w->entry[d] = graph_join(&w->graph, j->err);
        w->exit[d] = -1;
    }
    struct moe_traffic traffic = { .n_micro = 1, .n_shards = 1, .n_groups = 1, .routes = &w->routes,
                                   .device = w->device, .to = w->to, .placement = &w->placed.view,
                                   .dispatch_bytes = w->row_bytes[0], .combine_bytes = w->row_bytes[1],
                                   .entry = w->entry, .exit = w->exit };
    if (job_open_policy(j, &p) == 0) {
        double start = job_clock();
        HOOK(&p, dispatch, lay_out, &traffic, &w->graph);
        double seconds = job_clock() - start;
        w->seconds = w->seconds == 0 || seconds < w->seconds ? seconds : w->seconds;
    }
    policy_close(&p);
    for (int32_t d = 0; d < n_devices && !j->err->code; d++)
        if (w->exit[d] < 0 || w->exit[d] >= w->graph.n_tasks)
            err_set(j->err, ERR_RUN, "%s: exit[%d] is task %d, expected 0 to %d", j->who, d, w->exit[d],
                    w->graph.n_tasks - 1);
    return j->err->code;
}

/* ---- the result ---- */

struct phase { const char *name; double start, end; int32_t first; };

static int by_start(const void *a, const void *b)
{
    const struct phase *x = a, *y = b;
    return x->start != y->start ? (x->start < y->start ? -1 : 1) : (x->end > y->end) - (x->end < y->end);
}

/* The link that the bytes of a phase keep busy longest, and how long: no less can it take. */
static void put_busiest(struct eval_job *j, const struct moe_graph *g, enum moe_payload payload, json_t *out)
{
    const struct topology *t = j->topology;
    double *seconds = job_alloc(j, (size_t)t->n_links, sizeof *seconds);
    int32_t link[TOPOLOGY_MAX_HOPS], most = 0;
    for (int32_t i = 0; seconds && i < g->n_tasks; i++)
        for (int32_t p = g->task[i].first;
             g->task[i].kind == TASK_EXCHANGE && g->task[i].payload == payload && p < g->task[i].first + g->task[i].n;
             p++) {
            const struct moe_part *x = &g->part[p];
            int n = x->src == x->dst ? topology_loop(t, x->src, link)
                                     : topology_route(t, x->src, x->dst, x->path, link, NULL);
            for (int h = 0; h < n; h++)
                seconds[link[h]] += x->bytes / t->link[link[h]].bandwidth;
        }
    for (int32_t l = 1; seconds && l < t->n_links; l++)
        most = seconds[l] > seconds[most] ? l : most;
    if (seconds && t->n_links > 0 && seconds[most] > 0) {
        json_object_set_new(out, "busiest_link", json_string(t->link[most].name));
        json_object_set_new(out, "busiest_s", json_real(seconds[most]));
    }
}

/* From the first start to the last end of all tasks of a name. */
static json_t *list_phases(struct eval_job *j, const struct moe_graph *g)
{
    struct phase phase[16];
    int n = 0;
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const struct task *t = &g->task[i];
        if (t->kind == TASK_JOIN || t->kind == TASK_ARRIVAL)
            continue;
        int p = 0;
        while (p < n && strcmp(phase[p].name, task_phase(t)) != 0)
            p++;
        if (p == n)
            phase[n++] = (struct phase){ task_phase(t), t->start, t->end, i };
        phase[p].start = fmin(phase[p].start, t->start);
        phase[p].end = fmax(phase[p].end, t->end);
    }
    qsort(phase, (size_t)n, sizeof *phase, by_start);
    json_t *list = json_array();
    for (int p = 0; p < n; p++) {
        json_t *o = json_pack("{s:s, s:f, s:f, s:f}", "phase", phase[p].name, "start", phase[p].start, "end",
                              phase[p].end, "seconds", phase[p].end - phase[p].start);
        if (g->task[phase[p].first].kind == TASK_EXCHANGE)
            put_busiest(j, g, g->task[phase[p].first].payload, o);
        json_array_append_new(list, o);
    }
    return list;
}

static void put_bytes(const struct eval_job *j, const struct moe_graph *g, json_t *out)
{
    double intra = 0, inter = 0;
    for (int32_t i = 0; i < g->n_tasks; i++) {
        const struct task *t = &g->task[i];
        for (int32_t p = 0; t->kind == TASK_EXCHANGE && p < t->n; p++) {
            const struct moe_part *part = &g->part[t->first + p];
            if (part->src != part->dst)
                *(j->context.view.node[part->src] == j->context.view.node[part->dst] ? &intra : &inter) += part->bytes;
        }
    }
    json_object_set_new(out, "bytes_intra_node", json_real(intra));
    json_object_set_new(out, "bytes_inter_node", json_real(inter));
}

int eval_dispatch(struct eval_job *j, json_t *out)
{
    struct work w = { .seconds = 0 };
    double bound = 0;
    if (read_all(j, &w) < 0)
        goto out;
    for (int32_t i = 0; i < j->n_repeats; i++)
        if (lay_out_once(j, &w) < 0)
            goto out;
    if (machine_run(&w.machine, &w.graph, j->err) < 0 || metrics_bound(&w.graph, j->topology, &bound, j->err) < 0)
        goto out;
    json_object_set_new(out, "seconds_simulated", json_real(w.machine.now));
    json_object_set_new(out, "phases", list_phases(j, &w.graph));
    put_bytes(j, &w.graph, out);
    json_object_set_new(out, "bound_s", json_real(bound));
    json_object_set_new(out, "seconds", json_real(w.seconds));
    json_object_set_new(out, "tier", json_string(net_tier_name[w.tier]));
    json_object_set_new(out, "models", models_json(j->topology, w.tier, true));
    const bool rows = !job_has(j, "bytes"); /* which are cut as finely as needs be */
    json_t *beyond = models_extrapolated(&j->model, (const double[]){ rows ? w.row_bytes[0] : 0,
                                                                      rows ? w.row_bytes[1] : 0 });
    if (beyond)
        json_object_set_new(out, "extrapolated", beyond);
out:
    if (w.machine_open)
        machine_close(&w.machine);
    routes_free(&w.routes);
    placement_free(&w.placed);
    graph_free(&w.graph);
    return j->err->code;
}
