/* SPDX-License-Identifier: Apache-2.0
 * eval.c - `moelab eval` and moe.eval: checks the options, finds the policy, hands over to the kind's own file. */
#include "config.h"

#include "eval_job.h"
#include "consistency.h"
#include "registry.h"
#include "trace.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const eval_kind_name[N_EVAL_KINDS] = { "router",  "balancer", "placement", "dispatch",
                                                   "offload", "machine",  "metric" };

enum {
    ROUTER = 1 << MOE_ROUTER, BALANCER = 1 << MOE_BALANCER, PLACEMENT = 1 << MOE_PLACEMENT,
    DISPATCH = 1 << MOE_DISPATCH, OFFLOAD = 1 << MOE_OFFLOAD, MACHINE = 1 << EVAL_MACHINE, METRIC = 1 << EVAL_METRIC,
    POLICIES = ROUTER | BALANCER | PLACEMENT | DISPATCH | OFFLOAD
};

static const struct eval_option options[] = {
    { "input", EVAL_INPUT, POLICIES & ~OFFLOAD, 0, 0, "FILE.json", "the input; - is standard input" },
    { "logits", EVAL_ARRAY, ROUTER | BALANCER, 0, 0, "FILE.npy", "router logits [tokens, experts], f4 or f2; or -" },
    { "top_k", EVAL_WHOLE, ROUTER | BALANCER, 1, 1024, "K", "experts per token" },
    { "keys", EVAL_ARRAY, OFFLOAD, 0, 0, "FILE.npy", "object ids in order of use, u2 or u4 [requests]; or -" },
    { "trace", EVAL_TEXT, OFFLOAD | METRIC, 0, 0, "DIR", "recorded routing; objects are layer * experts + expert" },
    { "capacity", EVAL_WHOLE, OFFLOAD | METRIC, 1, INT32_MAX, "N", "objects that the cache holds" },
    { "capacity_bytes", EVAL_REAL, OFFLOAD, 1, 1e18, "B", "bytes that the cache holds; with --expert-bytes" },
    { "expert_bytes", EVAL_REAL, OFFLOAD, 1e-3, 1e15, "B", "bytes of one object (default: 1)" },
    { "prefetch", EVAL_TEXT, OFFLOAD, 0, 0, "none", "a plain cache: nothing is brought in early" },
    { "traffic", EVAL_ARRAY, MACHINE, 0, 0, "FILE.npy", "bytes from source to destination, f8 [N, N]; or -" },
    { "pattern", EVAL_TEXT, MACHINE, 0, 0, "alltoall", "traffic by name; with --bytes-per-rank and --n" },
    { "bytes_per_rank", EVAL_REAL, MACHINE, 0, 1e18, "B", "bytes that every device sends, its own share included" },
    { "n", EVAL_WHOLE, MACHINE, 1, 65536, "N", "devices" },
    { "weights", EVAL_TEXT, MACHINE, 0, 0, "zipf1", "destination i gets a share 1/(i+1) of the sum; without: even" },
    { "tier", EVAL_TEXT, MACHINE | DISPATCH, 0, 0, "T", "bound, flow, exact or simgrid (default: flow)" },
    { "links", EVAL_FLAG, MACHINE, 0, 0, NULL, "list every link that carried something" },
    { "layer", EVAL_WHOLE, METRIC, 0, 1000, "L", "one layer (default: all)" },
    { "segment", EVAL_WHOLE, METRIC, 1, 1 << 20, "M", "consecutive tokens looked at together" },
    { "set", EVAL_TABLE, POLICIES, 0, 0, "KEY=VALUE", "a parameter of the policy; may be repeated" },
    { "seed", EVAL_WHOLE, POLICIES | MACHINE | METRIC, 0, 9007199254740992.0, "N",
      "seed of randomness, where there is any (default: 1)" },
    { "repeat", EVAL_WHOLE, POLICIES | MACHINE, 1, 1 << 20, "N", "run so many times; the best time is reported" },
    { NULL, EVAL_FLAG, 0, 0, 0, NULL, NULL },
};

const struct eval_option *eval_options(void)
{
    return options;
}

/* ---- options ---- */

static int unknown_option(const struct eval_job *j, const char *key)
{
    const char *names[sizeof options / sizeof *options];
    int n = 0;
    for (const struct eval_option *o = options; o->name; o++)
        if (o->kinds & 1u << j->kind)
            names[n++] = o->name;
    const char *near = err_nearest(key, names, n);
    return err_set(j->err, ERR_INPUT, "eval %s: unknown option \"%s\"%s%s%s", eval_kind_name[j->kind], key,
                   near ? "; did you mean \"" : "", near ? near : "", near ? "\"?" : "");
}

static int check_option(const struct eval_job *j, const struct eval_option *o, const json_t *v)
{
    static const char *const expected[] = { "a whole number", "a number", "true or false", "a string",
                                            "a list or the path of a .npy file", "a table or the path of a .json file",
                                            "a table" };
    double x = json_number_value(v);
    bool ok = o->type == EVAL_WHOLE   ? json_is_number(v) && x == floor(x)
              : o->type == EVAL_REAL  ? json_is_number(v)
              : o->type == EVAL_FLAG  ? json_is_boolean(v)
              : o->type == EVAL_TEXT  ? json_is_string(v)
              : o->type == EVAL_ARRAY ? json_is_string(v) || json_is_array(v)
              : o->type == EVAL_INPUT ? json_is_string(v) || json_is_object(v)
                                      : json_is_object(v);
    if (!ok)
        return err_set(j->err, ERR_INPUT, "eval %s: %s: expected %s", eval_kind_name[j->kind], o->name,
                       expected[o->type]);
    if ((o->type == EVAL_WHOLE || o->type == EVAL_REAL) && !(x >= o->min && x <= o->max))
        return err_set(j->err, ERR_INPUT, "eval %s: %s: found %.17g, expected %.16g to %.16g", eval_kind_name[j->kind],
                       o->name, x, o->min, o->max);
    return 0;
}

static int check_options(const struct eval_job *j)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)j->options, key, value) {
        const struct eval_option *o = options;
        while (o->name && strcmp(o->name, key) != 0)
            o++;
        if (!o->name || !(o->kinds & 1u << j->kind))
            return unknown_option(j, key);
        if (check_option(j, o, value) < 0)
            return j->err->code;
    }
    return 0;
}

const char *job_option_text(const struct eval_job *j, const char *name)
{
    return json_string_value(json_object_get(j->options, name));
}

double job_option_real(const struct eval_job *j, const char *name, double def)
{
    const json_t *v = json_object_get(j->options, name);
    return v ? json_number_value(v) : def;
}

int64_t job_option_whole(const struct eval_job *j, const char *name, int64_t def)
{
    const json_t *v = json_object_get(j->options, name);
    return v ? (int64_t)json_number_value(v) : def;
}

/* ---- metrics are computed elsewhere; only their options pass through here ---- */

int eval_metric(struct eval_job *j, json_t *out)
{
    static const char *const passed[] = { "layer", "segment", "capacity" };
    const char *dir = job_option_text(j, "trace");
    struct trace trace;
    if (consistency_check(j->name, j->err) < 0)
        return j->err->code;
    if (!dir)
        return err_set(j->err, ERR_INPUT, "%s: no trace given", j->who);
    if (trace_open(&trace, dir, j->err) < 0)
        return j->err->code;
    json_t *o = json_object();
    for (size_t i = 0; i < sizeof passed / sizeof *passed; i++)
        if (json_object_get(j->options, passed[i]))
            json_object_set_new(o, passed[i], json_integer(job_option_whole(j, passed[i], 0)));
    json_t *result = consistency_eval(j->name, &trace, o, j->err);
    if (result)
        json_object_update(out, result);
    json_decref(result);
    json_decref(o);
    trace_close(&trace);
    return j->err->code;
}

/* ---- one job ---- */

static int (*const evals[N_EVAL_KINDS])(struct eval_job *, json_t *) = {
    eval_router, eval_balancer, eval_placement, eval_dispatch, eval_offload, eval_machine, eval_metric,
};

static void job_close(struct eval_job *j)
{
    if (j->context_open)
        policy_context_free(&j->context);
    topology_free(j->topology);
    json_decref(j->input);
    json_decref(j->params);
    arena_free(&j->memory);
}

json_t *eval(const char *kind, const char *name, const json_t *given, bool quote, struct err *e)
{
    struct eval_job j = { .name = name, .options = given, .err = e };
    int k = 0;
    while (k < N_EVAL_KINDS && strcmp(kind, eval_kind_name[k]) != 0)
        k++;
    if (k == N_EVAL_KINDS) {
        const char *near = err_nearest(kind, eval_kind_name, N_EVAL_KINDS);
        err_set(e, ERR_INPUT, "eval: unknown kind \"%s\", %s%s", kind, near ? "did you mean " : "expected ",
                near ? near : "router, balancer, placement, dispatch, offload, machine or metric");
        return NULL;
    }
    j.kind = k;
    snprintf(j.who, sizeof j.who, "%s %s", kind, name);
    json_t *out = json_object();
    if (!out)
        err_set(e, ERR_MEMORY, "out of memory");
    if (!out || check_options(&j) < 0)
        goto out;
    j.seed = (uint64_t)job_option_whole(&j, "seed", 1);
    j.n_repeats = (int32_t)job_option_whole(&j, "repeat", 1);
    j.params = json_deep_copy(json_object_get(given, "set"));
    if (!j.params)
        j.params = json_object();
    if (k < MOE_N_KINDS && registry_load((enum moe_kind)k, name, "eval", &j.plugin, e) < 0)
        goto out;
    if (job_read_input(&j) == 0)
        evals[k](&j, out);
    if (e->code && j.input && !quote && json_is_string(json_object_get(given, "input"))) {
        memset(e, 0, sizeof *e);
        err_set(e, ERR_INPUT, "%s: is no input of %s; to see why: moelab eval %s --input FILE", j.file, j.who, j.who);
    }
    if (e->code == ERR_RUN) /* a policy that refuses its input has been given bad input */
        e->code = ERR_INPUT;
out:
    job_close(&j);
    if (!e->code)
        return out;
    json_decref(out);
    return NULL;
}
