/* SPDX-License-Identifier: Apache-2.0
 * run.c - opens a run from its specification, repeats the pipeline, collects the result.
 *
 * A specification is plain JSON; scenarios make it, manifests keep it:
 *   where      "FILE:LINE"
 *   seed       whole number
 *   model      sizes, see run_model.c
 *   layout     which devices split what, see run_model.c
 *   machine    executor ("flow", "simgrid", "host", "cuda"), tier, file, description (a machine file, nodes applied)
 *   workload   see workload.c
 *   policies   kind -> list of {name, params}; one each but for balancers
 *   cache      share of all experts that one device holds; absent: what its memory holds
 *   warmup     steps left out of the figures
 *   allow_extrapolation  models may be asked outside of their ranges
 *   verify     machines host and cuda: compare every layer's output with a plain computation of it
 *   virtual_ranks  machine cuda: all ranks on one GPU, in one process
 *   cuda_graphs    machine cuda: repetitions of a step are a CUDA graph, at padded sizes
 * Defaults are filled in here and in workload.c; resolve.c says what they came to. */
#include "config.h"

#include "run.h"
#include "models.h"
#include "registry.h"
#include "script.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int open_machine(struct run *r, const json_t *m, bool verify, bool graphs, struct team *team)
{
    const char *executor = json_string_value(json_object_get(m, "executor"));
    const char *tier = json_string_value(json_object_get(m, "tier"));
    const char *file = json_string_value(json_object_get(m, "file"));
    static const char *const executors[] = { "flow", "simgrid", "host", "cuda" };
    if (topology_build(&r->topology, json_object_get(m, "description"), file ? file : "machine", r->err) < 0)
        return err_prefix(r->err, "%s", r->where);
    executor = executor ? executor : "flow";
    r->tier = N_NET_TIERS;
    if (!strcmp(executor, "host")) {
        /* rank_check.c counts what ranks will hold: decisions alone, in a process that is no rank. */
        r->recording = json_is_true(json_object_get(m, "counting"));
        if (r->recording)
            r->machine = (struct machine){ .topology = r->topology, .model = &r->model, .precision = PREC_FP32 };
        else if (machine_open_host(&r->machine, r->topology, &r->model, verify, team, r->err) < 0)
            return err_prefix(r->err, "%s: machine host", r->where);
        r->graph.keep_items = true;
    } else if (!strcmp(executor, "cuda")) {
        if (machine_open_cuda(&r->machine, r->topology, &r->model, r->precision, verify, graphs, team, r->err) < 0)
            return err_prefix(r->err, "%s: machine cuda", r->where);
        r->graph.keep_items = r->graph.keep_scores = true;
    } else if (!strcmp(executor, "flow") || !strcmp(executor, "simgrid")) {
        int k = !strcmp(executor, "simgrid") ? NET_SIMGRID : NET_FLOW;
        if (tier && k != NET_SIMGRID)
            for (k = 0; k < NET_SIMGRID && strcmp(tier, net_tier_name[k]); k++)
                ;
        if (k == NET_SIMGRID && strcmp(executor, "simgrid"))
            return err_set(r->err, ERR_INPUT, "%s: machine.tier: unknown tier \"%s\", expected bound, flow or exact",
                           r->where, tier);
        if (topology_computes(r->topology, r->precision, r->err) < 0)
            return err_prefix(r->err, "%s", r->where);
        if (machine_open_sim(&r->machine, r->topology, &r->model, r->precision, (enum net_tier)k, r->err) < 0)
            return err_prefix(r->err, "%s: machine %s", r->where, executor);
        r->tier = (enum net_tier)k;
    } else {
        const char *near = err_nearest(executor, executors, 4);
        return err_set(r->err, ERR_INPUT, "%s: machine.executor: no executor named \"%s\"; %s%s", r->where, executor,
                       near ? "did you mean " : "there are flow, simgrid, host and cuda", near ? near : "");
    }
    r->machine_open = true;
    r->graph.n_devices = r->topology->n_devices;
    return 0;
}

/* Hooks of the header that the pipeline does not call: a policy that has one would run as if it had none. */
static const char *undriven_hook(const struct run *r, const struct moe_plugin *p)
{
    const struct moe_offload_ops *o = &p->ops.offload;
    switch (p->kind) {
    case MOE_ROUTER: return p->ops.router.ahead ? "ahead" : NULL;
    case MOE_BALANCER: return p->ops.balancer.loss && !r->workload.gate ? "loss" : NULL;
    case MOE_OFFLOAD:
        return o->prefetch ? "prefetch" : o->assign ? "assign" : o->form ? "form" : o->precision ? "precision" : NULL;
    case MOE_PLACEMENT:
    case MOE_DISPATCH: break;
    }
    return NULL;
}

static int open_policy(struct run *r, struct policy *p, enum moe_kind kind, const json_t *spec)
{
    char who[400];
    const char *name = json_string_value(json_object_get(spec, "name"));
    if (!name)
        return err_set(r->err, ERR_INPUT, "%s: %s: expected a policy's name", r->where, kind_name[kind]);
    snprintf(who, sizeof who, "%s: %s %s", r->where, kind_name[kind], name);
    const struct moe_plugin *plugin = NULL;
    const json_t *lua = json_object_get(spec, "lua"); /* a policy written in the scenario itself */
    if (lua && (!(plugin = script_policy((int)json_integer_value(lua))) || plugin->kind != kind))
        return err_set(r->err, ERR_INPUT, "%s: is written in Lua, and its scenario does not run in this process", who);
    if (!lua && registry_load(kind, name, who, &plugin, r->err) < 0)
        return r->err->code;
    struct policy_context *context = kind == MOE_PLACEMENT && run_grouped(r) ? &r->slots : &r->context;
    if (policy_open(p, context, plugin, json_object_get(spec, "params"), who, r->err) < 0)
        return r->err->code;
    const char *undriven = undriven_hook(r, plugin);
    if (undriven)
        return err_set(r->err, ERR_INPUT, "%s: has hook %s, which %s", who, undriven, kind == MOE_BALANCER
                       ? "is for a gate that is trained: expected a workload of moe.gate"
                       : "this version's pipeline does not call");
    if (plugin->needs & (MOE_NEEDS_SALIENCY | MOE_NEEDS_SIMILARITY))
        return err_set(r->err, ERR_INPUT, "%s: needs %s of experts, which this version's pipeline does not know", who,
                       plugin->needs & MOE_NEEDS_SALIENCY ? "the saliency" : "the similarity");
    if (plugin->needs & MOE_LOCAL)
        return err_set(r->err, ERR_INPUT, "%s: decides from its own device's tokens alone (MOE_LOCAL), which this "
                       "version's pipeline does not offer", who);
    const char *lacks = workload_lacks(&r->workload, plugin->needs);
    if (lacks && r->workload.gate)
        return err_set(r->err, ERR_INPUT, "%s: needs %s, which a workload of moe.gate does not have", who, lacks);
    if (lacks)
        return err_set(r->err, ERR_INPUT, "%s: needs %s, which the trace %s does not have", who, lacks,
                       r->workload.trace.dir);
    r->needs |= plugin->needs;
    return 0;
}

/* What a balancer adds to scores would be lost on a router that decides without them. */
static int check_adjusted(struct run *r)
{
    const struct moe_plugin *router = r->router.plugin;
    for (int i = 0; i < r->n_balancers && !policy_heeds_bias(router); i++)
        if (r->balancer[i].plugin->ops.balancer.adjust)
            return err_set(r->err, ERR_INPUT, "%s: balancer %s adjusts scores, and router %s %s: choose a router that "
                           "scores, such as softmax-top-k", r->where, r->balancer[i].plugin->name, router->name,
                           router->needs & MOE_NEEDS_RECORDED ? "plays recorded choices" : "decides without them");
    return 0;
}

static int open_policies(struct run *r, const json_t *spec)
{
    const json_t *policies = json_object_get(spec, "policies");
    const json_t *cache = json_object_get(spec, "cache");
    char found[PARAM_FOUND];
    if (policy_context_init(&r->context, &r->model, r->topology, r->precision, device_memory_fixed(r), r->seed,
                            r->err) < 0)
        return r->err->code;
    r->context.machine = &r->machine;
    if (cache && !(json_is_number(cache) && json_number_value(cache) > 0 && json_number_value(cache) <= 1))
        return err_set(r->err, ERR_INPUT, "%s: cache: expected a share of all experts within (0, 1], found %s",
                       r->where, param_found(cache, found));
    r->cache_share = json_number_value(cache);
    r->context.cache_objects = cache ? llround(r->cache_share * r->context.n_objects) : device_memory_objects(r);
    if (groups_open(r) < 0)
        return r->err->code;
    struct policy *one[MOE_N_KINDS] = { [MOE_ROUTER] = &r->router, [MOE_PLACEMENT] = &r->placement,
                                        [MOE_DISPATCH] = &r->dispatch, [MOE_OFFLOAD] = &r->offload };
    for (int k = 0; k < MOE_N_KINDS; k++) {
        const json_t *list = json_object_get(policies, kind_name[k]);
        if (k == MOE_BALANCER) {
            for (size_t i = 0; i < json_array_size(list); i++) {
                if (i == MAX_BALANCERS)
                    return err_set(r->err, ERR_INPUT, "%s: balancer: more than %d in one run", r->where,
                                   MAX_BALANCERS);
                r->n_balancers++;
                if (open_policy(r, &r->balancer[i], MOE_BALANCER, json_array_get(list, i)) < 0)
                    return r->err->code;
            }
        } else if (open_policy(r, one[k], (enum moe_kind)k, json_array_get(list, 0)) < 0) {
            return r->err->code;
        }
    }
    return check_adjusted(r);
}

static int allocate(struct run *r)
{
    size_t n_experts = (size_t)r->model.n_experts, n_devices = (size_t)r->topology->n_devices;
    r->n_free = calloc((size_t)r->model.n_layers, sizeof *r->n_free);
    for (int32_t l = 0; r->n_free && l < r->model.n_layers; l++) {
        if (policy_n_free(&r->router, l, &r->n_free[l]) < 0)
            return r->err->code;
        r->max_free = r->n_free[l] > r->max_free ? r->n_free[l] : r->max_free;
    }
    const size_t n_columns = n_experts + (size_t)r->max_free;
    r->scores = malloc(sizeof *r->scores * (size_t)r->workload.n_tokens * n_columns);
    r->bias.add = calloc(n_columns, sizeof *r->bias.add);
    r->bias.scale = calloc(n_columns, sizeof *r->bias.scale);
    r->load = calloc(n_experts, sizeof *r->load);
    r->device_load = calloc(n_devices, sizeof *r->device_load);
    r->device_tokens = calloc(n_devices, sizeof *r->device_tokens);
    r->entry = calloc(n_devices, sizeof *r->entry);
    r->exit = calloc(n_devices, sizeof *r->exit);
    r->leaves = calloc((size_t)r->workload.n_tokens, sizeof *r->leaves);
    r->placed_bytes = calloc(n_devices, sizeof *r->placed_bytes);
    r->placed_updated = calloc(n_devices, sizeof *r->placed_updated);
    r->needs_of = calloc((size_t)r->model.n_layers * N_PASSES * n_devices, sizeof *r->needs_of);
    r->turn = calloc((size_t)r->edp * r->context.n_objects, sizeof *r->turn);
    if (routing_metrics_open(&r->routing, r->model.n_layers, r->model.n_experts, r->err) < 0)
        return r->err->code;
    if (!r->n_free || !r->scores || !r->bias.add || !r->bias.scale || !r->load || !r->device_load ||
        !r->device_tokens || !r->entry || !r->exit || !r->leaves || !r->needs_of || !r->placed_bytes ||
        !r->placed_updated || !r->turn)
        return err_set(r->err, ERR_MEMORY, "out of memory for %d tokens x %d experts", r->workload.n_tokens,
                       r->model.n_experts);
    return 0;
}

int run_open(struct run *r, json_t *spec, struct err *e)
{
    return run_open_rank(r, spec, NULL, e);
}

int run_open_rank(struct run *r, json_t *spec, struct team *team, struct err *e)
{
    memset(r, 0, sizeof *r);
    r->err = e;
    r->spec = json_incref(spec);
    const char *where = json_string_value(json_object_get(spec, "where"));
    snprintf(r->where, sizeof r->where, "%s", where ? where : "run");
    r->seed = (uint64_t)json_integer_value(json_object_get(spec, "seed"));
    r->decisions = UINT64_C(0xcbf29ce484222325);
    if (run_read_model(r, json_object_get(spec, "model")) < 0 ||
        open_machine(r, json_object_get(spec, "machine"), json_is_true(json_object_get(spec, "verify")),
                     json_is_true(json_object_get(spec, "cuda_graphs")), team) < 0 ||
        run_read_layout(r, json_object_get(spec, "layout")) < 0 ||
        workload_open(&r->workload, json_object_get(spec, "workload"), &r->model, r->topology->n_devices, r->seed,
                      r->where, e) < 0 ||
        tally_open(&r->tally, r->topology, e) < 0 || open_policies(r, spec) < 0 || allocate(r) < 0 ||
        offload_open(r) < 0 || groups_check(r) < 0 || train_open(r) < 0)
        return e->code;
    if (!r->graph.keep_items && validity_check(r, json_is_true(json_object_get(spec, "allow_extrapolation"))) < 0)
        return e->code;
    int32_t warmup;
    if (run_whole(r, spec, "run", "warmup", 0, 0, r->workload.n_steps - 1, &warmup) < 0)
        return e->code;
    r->n_warmup = warmup;
    if (run_whole(r, spec, "run", "repetitions", 5, 1, 1000, &r->n_repetitions) < 0)
        return e->code;
    return 0;
}

static void close_policies(struct run *r)
{
    struct policy *const all[] = { &r->router, &r->placement, &r->dispatch, &r->offload };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        policy_close(all[i]);
    for (int i = 0; i < r->n_balancers; i++)
        policy_close(&r->balancer[i]);
    r->n_balancers = 0;
    policy_context_free(&r->context);
    groups_close(r);
}

static void step_done(struct run *r)
{
    if (r->progress)
        r->progress->step++;
}

/* Decisions do not depend on time, so the accesses of a first pass without the machine are those of the run.
 * Policies that learn are opened anew in between. */
static int record_accesses(struct run *r)
{
    r->recording = true;
    if (placement_start(r) < 0)
        return r->err->code;
    for (int32_t step = 0; step < r->workload.n_steps; step++) {
        if (pipeline_step(r, step) < 0)
            return r->err->code;
        step_done(r);
    }
    r->recording = false;
    metrics_free(&r->metrics);
    routing_metrics_forget(&r->routing);
    r->decisions = UINT64_C(0xcbf29ce484222325);
    memset(r->turn, 0, sizeof *r->turn * (size_t)r->edp * r->context.n_objects);
    r->n_migration = 0;
    workload_rewind(&r->workload, r->seed);
    close_policies(r);
    if (open_policies(r, r->spec) < 0)
        return r->err->code;
    return offload_restart(r);
}

int run_go(struct run *r)
{
    bool twice = r->offloading && (r->offload.plugin->needs & MOE_NEEDS_NEXT_USE);
    if (r->progress)
        r->progress->n_steps = twice ? 2 * r->workload.n_steps : r->workload.n_steps;
    if (twice && record_accesses(r) < 0)
        return r->err->code;
    if (placement_start(r) < 0)
        return r->err->code;
    for (int32_t step = 0; step < r->workload.n_steps; step++) {
        if (pipeline_step(r, step) < 0)
            return r->err->code;
        if (step + 1 == r->n_warmup) {
            metrics_free(&r->metrics);
            routing_metrics_forget(&r->routing);
        }
        step_done(r);
    }
    return 0;
}

json_t *run_result(const struct run *r)
{
    char hash[20];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)r->decisions);
    json_t *o = json_pack("{s:o, s:s, s:s, s:i, s:i}", "metrics", metrics_json(&r->metrics), "decisions", hash,
                          "machine", r->machine.ops->name, "devices", r->topology->n_devices, "tokens",
                          r->workload.n_tokens);
    if (r->workload.gate)
        json_object_set_new(o, "curve", gate_stage_curve(r));
    if (!r->graph.keep_items)
        json_object_set_new(o, "memory", device_memory_json(r));
    if (r->tier < N_NET_TIERS)
        json_object_set_new(o, "tier", json_string(net_tier_name[r->tier]));
    if (r->tier < N_NET_TIERS)
        json_object_set_new(o, "models", models_json(r->topology, r->tier, true));
    if (r->tier < N_NET_TIERS && r->topology->energy)
        json_object_set_new(json_object_get(o, "models"), "energy", json_string("watts, joules per byte"));
    if (r->tier < N_NET_TIERS && r->topology->pace != 1)
        json_object_set_new(o, "pace", json_real(r->topology->pace));
    if (r->extrapolated)
        json_object_set(o, "extrapolated", r->extrapolated);
    if (r->machine.virtual_ranks)
        json_object_set_new(o, "virtual_ranks", json_true());
    if (r->machine.graphs)
        json_object_set_new(o, "graphs", json_pack("{s:I, s:I}", "captured", (json_int_t)r->machine.graphs_captured,
                                                   "launched", (json_int_t)r->machine.graphs_launched));
    if (r->machine.products)
        json_object_set_new(o, "products", json_string(r->machine.products));
    if (r->machine.verify)
        json_object_set_new(o, "verified", json_real(r->machine.max_error));
    if (r->machine.probe_s > 0)
        json_object_set_new(o, "probe_s", json_real(r->machine.probe_s));
    if (r->machine.set_aside > 0)
        json_object_set_new(o, "set_aside", json_integer(r->machine.set_aside));
    if (r->machine.disturbed > 0)
        json_object_set_new(o, "disturbed", json_integer(r->machine.disturbed));
    if (r->machine.stolen > 0)
        json_object_set_new(o, "stolen", json_real(r->machine.stolen));
    if (r->machine.peak_memory > 0)
        json_object_set_new(o, "peak_memory", json_integer((json_int_t)r->machine.peak_memory));
    if (r->offloading)
        json_object_set_new(o, "cache_experts", json_integer(r->context.cache_objects));
    return o;
}

void run_close(struct run *r)
{
    json_decref(r->extrapolated);
    offload_close(r);
    train_close(r);
    close_policies(r);
    json_decref(r->spec);
    workload_close(&r->workload);
    if (r->machine_open)
        machine_close(&r->machine);
    if (r->topology)
        topology_free(r->topology);
    graph_free(&r->graph);
    tally_close(&r->tally);
    metrics_free(&r->metrics);
    routes_free(&r->routes);
    routes_free(&r->before);
    placement_free(&r->placed);
    placement_free(&r->chosen);
    free(r->token_slot);
    routing_metrics_close(&r->routing);
    free(r->n_free);
    free(r->scores);
    free(r->bias.add);
    free(r->bias.scale);
    free(r->to);
    free(r->replica);
    free(r->load);
    free(r->device_load);
    free(r->device_tokens);
    free(r->entry);
    free(r->exit);
    free(r->leaves);
    free(r->needs_of);
    free(r->placed_bytes);
    free(r->placed_updated);
    free(r->turn);
    free(r->near_first);
    free(r->near);
    statistics_free(&r->window);
    free(r->migration);
    free(r->moves);
}
