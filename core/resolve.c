/* SPDX-License-Identifier: Apache-2.0
 * resolve.c - what an opened run is made of, with every default filled in: for the manifest.
 *
 * Everything but `derived` is a specification as run.c describes it, and gives the same run when it is opened. What
 * follows from it and cannot be set is in `derived`: counts of devices, tokens and requests, sizes of caches. */
#include "config.h"

#include "latency_table.h"
#include "registry.h"
#include "run.h"
#include "sha256.h"

#include <string.h>

/* In the table if there is one: the same keys beside it are refused. */
static void resolve_attention(const struct attention_shape *a, json_t *m)
{
    json_t *to = json_object_get(m, "attention");
    to = to ? to : m;
    json_object_set_new(to, "n_heads", json_integer(a->n_heads));
    if (a->kind == ATTENTION_MLA) {
        json_object_set_new(to, "q_lora", json_integer(a->q_lora));
        return;
    }
    json_object_set_new(to, "n_kv_heads", json_integer(a->n_kv_heads));
    json_object_set_new(to, "d_head", json_integer(a->d_head));
}

static void resolve_layout(const struct run *r, json_t *spec)
{
    const int32_t n = r->topology->n_devices;
    json_object_set_new(spec, "layout", json_pack("{s:{s:i, s:i}, s:{s:i, s:i}}", "attention", "dp", n / r->tp, "tp",
                                                  r->tp, "experts", "ep", r->ep, "etp", r->etp));
}

static void resolve_model(const struct run *r, json_t *m)
{
    const struct moe_model *o = &r->model;
    json_object_set_new(m, "layers", json_integer(o->n_layers));
    json_object_set_new(m, "experts", json_integer(o->n_experts));
    json_object_set_new(m, "top_k", json_integer(o->top_k));
    json_object_set_new(m, "shared", json_integer(o->n_shared));
    json_object_set_new(m, "d_model", json_integer(o->d_model));
    json_object_set_new(m, "d_expert", json_integer(o->d_expert));
    resolve_attention(&r->attention, m);
    json_object_set_new(m, "vocab", json_integer(r->vocab));
    if (r->dense.width > 0)
        json_object_set_new(m, "dense", json_pack("{s:i, s:i, s:i}", "layers", r->dense.n_first, "interleave",
                                                  r->dense.interleave, "d_ff", r->dense.width));
    json_object_set_new(m, "precision", json_string(precision_name[r->precision]));
    json_object_set_new(m, "weight_bytes", json_real(o->weight_bytes));
    if (!json_object_get(m, "dispatch")) /* which says the same */
        json_object_set_new(m, "act_bytes", json_real(o->act_bytes));
    if (!json_object_get(m, "combine"))
        json_object_set_new(m, "combine_bytes", json_real(o->combine_bytes));
}

static void resolve_machine(const struct run *r, json_t *m)
{
    json_object_set_new(m, "executor", json_string(r->machine.ops->name));
    if (r->tier < N_NET_TIERS)
        json_object_set_new(m, "tier", json_string(net_tier_name[r->tier]));
    else
        json_object_del(m, "tier"); /* machine host has none, whatever was asked for */
    json_object_set_new(m, "description", json_deep_copy(r->topology->description));
}

static void resolve_workload(const struct run *r, json_t *o)
{
    const struct workload *w = &r->workload;
    static const char *const kind[] = { [MOE_PREFILL] = "prefill", [MOE_DECODE] = "decode", [MOE_TRAIN] = "train" };
    const bool prefill = w->phase != MOE_DECODE;
    json_object_set_new(o, "kind", json_string(w->gate ? "gate" : kind[w->phase]));
    if (w->gate)
        json_object_update(o, w->gate->params.values);
    if (w->phase == MOE_TRAIN) {
        json_object_set_new(o, "recompute", json_boolean(w->recompute));
        json_object_set_new(o, "shard_optimizer", json_boolean(w->shard_optimizer));
        json_object_set_new(o, "gradient_bytes", json_real(w->gradient_bytes));
        json_object_set_new(o, "optimizer_bytes", json_real(w->optimizer_bytes));
    }
    json_object_set_new(o, prefill ? "tokens_per_device" : "batch_per_device",
                        json_integer(w->n_tokens / w->n_devices));
    json_object_set_new(o, "steps", json_integer(w->n_steps));
    json_object_set_new(o, "context", json_integer(w->context));
    json_object_set_new(o, "profile", json_real(w->profile));
    json_object_set_new(o, "layer_repeat", json_integer(w->layer_repeat));
}

/* A policy of the scenario itself has no file to load it from again: the scenario's checksum is in the manifest. */
static void add_policy(json_t *to, const struct policy *p, const json_t *given)
{
    const char *kind = kind_name[p->plugin->kind];
    json_t *list = json_object_get(to, kind);
    if (!list)
        json_object_set_new(to, kind, list = json_array());
    json_t *o = json_pack("{s:s, s:O}", "name", p->plugin->name, "params", p->params.values);
    if (json_object_get(json_array_get(json_object_get(given, kind), json_array_size(list)), "lua"))
        json_object_set_new(o, "lua", json_true());
    /* Another program's file may have a name that ours has: its checksum tells results apart. */
    const char *file = registry_foreign(p->plugin);
    char hex[65];
    struct err why = { 0 };
    if (file && sha256_file(file, hex, &why) == 0)
        json_object_set_new(o, "sha256", json_string(hex));
    json_array_append_new(list, o);
}

static json_t *resolve_policies(const struct run *r, const json_t *given)
{
    json_t *to = json_object();
    add_policy(to, &r->router, given);
    for (int i = 0; i < r->n_balancers; i++)
        add_policy(to, &r->balancer[i], given);
    add_policy(to, &r->placement, given);
    add_policy(to, &r->dispatch, given);
    add_policy(to, &r->offload, given);
    return to;
}

/* Measured times by file: its checksum. */
static json_t *sum_tables(const struct latency_table *t)
{
    json_t *sums = json_object();
    const char *name, *path;
    char hex[65];
    struct err why = { 0 };
    for (int32_t i = 0; latency_table_file(t, i, &name, &path); i++)
        if (sha256_file(path, hex, &why) == 0)
            json_object_set_new(sums, name, json_string(hex));
    return sums;
}

static json_t *derive(const struct run *r)
{
    const struct workload *w = &r->workload;
    json_t *o = json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:f}", "nodes", r->topology->n_nodes, "devices",
                          r->topology->n_devices, "expert_groups", r->edp, "tokens_per_step", w->n_tokens,
                          "requests_played", w->n_played, "requests_profiled", w->n_profiled,
                          "expert_bytes", run_expert_bytes(r));
    if (r->offloading) { /* per device */
        json_object_set_new(o, "cache_experts", json_integer(r->context.cache_objects));
        json_object_set_new(o, "cache_bytes", json_real((double)r->context.cache_objects * run_expert_bytes(r)));
    }
    if (r->topology->tables)
        json_object_set_new(o, "tables", sum_tables(r->topology->tables));
    return o;
}

/* A table of the specification, made if it is not there. */
static json_t *table_of(json_t *spec, const char *key)
{
    json_t *t = json_object_get(spec, key);
    if (!t)
        json_object_set_new(spec, key, t = json_object());
    return t;
}

json_t *run_resolve(const struct run *r)
{
    json_t *spec = json_deep_copy(r->spec);
    resolve_model(r, table_of(spec, "model"));
    resolve_machine(r, table_of(spec, "machine"));
    resolve_layout(r, spec);
    resolve_workload(r, table_of(spec, "workload"));
    json_object_set_new(spec, "policies", resolve_policies(r, json_object_get(r->spec, "policies")));
    json_object_set_new(spec, "seed", json_integer((json_int_t)r->seed));
    json_object_set_new(spec, "warmup", json_integer(r->n_warmup));
    if (r->machine.ops->again)
        json_object_set_new(spec, "repetitions", json_integer(r->n_repetitions));
    else
        json_object_del(spec, "repetitions"); /* would be the same to the last digit */
    if (!json_object_get(spec, "allow_extrapolation"))
        json_object_set_new(spec, "allow_extrapolation", json_false());
    if (!json_object_get(spec, "verify"))
        json_object_set_new(spec, "verify", json_false());
    if (!strcmp(r->machine.ops->name, "cuda"))
        json_object_set_new(spec, "virtual_ranks", json_boolean(r->machine.virtual_ranks));
    else
        json_object_del(spec, "virtual_ranks"); /* means nothing there */
    if (!strcmp(r->machine.ops->name, "cuda"))
        json_object_set_new(spec, "cuda_graphs", json_boolean(r->machine.graphs));
    else
        json_object_del(spec, "cuda_graphs");
    if (r->offloading && !json_object_get(spec, "cache") && r->context.cache_objects > 0)
        json_object_set_new(spec, "cache",
                            json_real((double)r->context.cache_objects / (double)r->context.n_objects));
    json_object_set_new(spec, "derived", derive(r));
    return spec;
}
