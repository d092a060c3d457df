/* SPDX-License-Identifier: Apache-2.0
 * eval_policy.c - what surrounds a lone policy: a machine of the input's shape, a batch, parameters; and the lists that
 * results are made of. */
#include "config.h"

#include "eval_job.h"
#include "script.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- machines ---- */

int job_topology(struct eval_job *j, const char *machine, int32_t n_devices, int32_t n_nodes)
{
    json_t *d = NULL;
    char file[600];
    if (script_machine(machine, &d, file, sizeof file, j->err) < 0)
        return err_prefix(j->err, "%s", j->who);
    if (json_object_get(d, "groups") || json_object_get(d, "platform")) { /* written down: it is as it is */
        const struct topology *t = topology_build(&j->topology, d, file, j->err) == 0 ? j->topology : NULL;
        if (t && ((n_devices > 0 && n_devices != t->n_devices) || (n_nodes > 0 && n_nodes != t->n_nodes)))
            err_set(j->err, ERR_INPUT, "%s: machine %s is as its file says, %d devices on %d nodes: found %s %d",
                    j->file, machine, t->n_devices, t->n_nodes, n_devices > 0 ? "devices" : "nodes",
                    n_devices > 0 ? n_devices : n_nodes);
        if (t && j->kind != EVAL_MACHINE) /* who asks more than how long transfers take */
            topology_computes(t, PREC_BF16, j->err);
        json_decref(d);
        return j->err->code;
    }
    int32_t own = (int32_t)json_integer_value(json_object_get(d, "devices")); /* 0: topology_build will complain */
    if (n_devices > 0 && n_nodes == 0 && own > 0) {
        if (n_devices % own != 0 && n_devices > own)
            err_set(j->err, ERR_INPUT, "%s: %d devices are no whole number of nodes of machine %s, which have %d each",
                    j->file, n_devices, machine, own);
        n_nodes = n_devices < own ? 1 : n_devices / own;
    }
    if (n_devices > 0 && n_nodes > 0 && n_devices % n_nodes != 0)
        err_set(j->err, ERR_INPUT, "%s: %d devices cannot be alike on %d nodes", j->file, n_devices, n_nodes);
    if (n_nodes > 0)
        json_object_set_new(d, "nodes", json_integer(n_nodes));
    if (n_devices > 0 && n_nodes > 0)
        json_object_set_new(d, "devices", json_integer(n_devices / n_nodes));
    if (!j->err->code)
        topology_build(&j->topology, d, file, j->err);
    json_decref(d);
    return j->err->code;
}

int32_t job_n_devices(struct eval_job *j)
{
    int32_t n = 0;
    if (json_is_number(json_object_get(j->input, "devices")))
        return job_whole(j, "devices", 1, 1, 65536, &n) < 0 ? -1 : n;
    const char *key = job_has(j, "devices") ? "devices" : "device";
    if (!job_has(j, key))
        return 0;
    int64_t n_tokens = -1;
    const int32_t *device = job_ids(j, key, 1, &n_tokens, 0, 65535);
    for (int64_t t = 0; device && t < n_tokens; t++)
        n = device[t] >= n ? device[t] + 1 : n;
    return device ? n : -1;
}

int job_machine(struct eval_job *j, int32_t n_devices)
{
    const json_t *machine = json_object_get(j->input, "machine");
    const char *name = json_string_value(machine);
    int32_t n_nodes = 0;
    if (machine && !name)
        return job_fail(j, "machine", "expected a machine's name or file");
    if (n_devices == 0 && (n_devices = job_n_devices(j)) < 0)
        return j->err->code;
    if (job_has(j, "nodes") && job_whole(j, "nodes", 1, 1, 65536, &n_nodes) < 0)
        return j->err->code;
    if (!name) { /* only its shape matters to most policies: one device per node, or several */
        n_devices = n_devices > 0 ? n_devices : n_nodes > 0 ? n_nodes : 1;
        n_nodes = n_nodes > 0 ? n_nodes : j->kind == MOE_DISPATCH ? n_devices : 1;
        name = n_devices > n_nodes ? "dgx-h100" : "star-50GBps";
    }
    return job_topology(j, name, n_devices, n_nodes);
}

int32_t *job_token_devices(struct eval_job *j, int32_t n_tokens)
{
    const char *key = job_has(j, "devices") && !json_is_number(json_object_get(j->input, "devices")) ? "devices"
                                                                                                    : "device";
    int64_t n = n_tokens;
    if (job_has(j, key))
        return job_ids(j, key, 1, &n, 0, j->topology->n_devices - 1);
    int32_t *device = job_alloc(j, (size_t)n_tokens, sizeof *device);
    for (int32_t t = 0; device && t < n_tokens; t++)
        device[t] = (int32_t)((int64_t)t * j->topology->n_devices / n_tokens);
    return device;
}

/* ---- batches ---- */

static int read_top_k(struct eval_job *j)
{
    if (job_whole(j, "top_k", 0, 0, 1024, &j->model.top_k) < 0)
        return j->err->code;
    j->model.top_k = (int32_t)job_option_whole(j, "top_k", j->model.top_k);
    if (j->model.n_experts > 0 && j->model.top_k > j->model.n_experts)
        return err_set(j->err, ERR_INPUT, "%s: top_k: %d is more than the %d experts there are", j->file,
                       j->model.top_k, j->model.n_experts);
    return 0;
}

int job_batch(struct eval_job *j, struct moe_batch *b, struct moe_routes *recorded, struct moe_routes *previous)
{
    int64_t shape[2] = { -1, -1 }, *tokens = &shape[0]; /* [T, E]; the first array that is there settles T */
    if (job_has(j, "n_experts") && job_whole(j, "n_experts", 0, 1, 65535, &j->model.n_experts) < 0)
        return j->err->code;
    if (j->model.n_experts > 0)
        shape[1] = j->model.n_experts;
    static const char *const with_experts[] = { "logits", "previous_logits" };
    const float **logits[] = { &b->router_logits, &b->previous_logits };
    for (int i = 0; i < 2; i++)
        if (job_has(j, with_experts[i]) && !(*logits[i] = job_floats(j, with_experts[i], 2, shape)))
            return j->err->code;
    if (shape[1] > 65535)
        return job_fail(j, "logits", "found %lld experts, expected at most 65535", (long long)shape[1]);
    j->model.n_experts = shape[1] > 0 ? (int32_t)shape[1] : j->model.n_experts;
    static const struct { const char *key; size_t field; } ids[] = {
        { "token_ids", offsetof(struct moe_batch, token_id) }, { "positions", offsetof(struct moe_batch, position) },
        { "requests", offsetof(struct moe_batch, request) },   { "labels", offsetof(struct moe_batch, label) },
    };
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        const int32_t *read = NULL;
        if (job_has(j, ids[i].key) && !(read = job_ids(j, ids[i].key, 1, tokens, 0, INT32_MAX)))
            return j->err->code;
        memcpy((char *)b + ids[i].field, &read, sizeof read);
    }
    int64_t hidden[2] = { *tokens, -1 };
    if (job_has(j, "importance") && !(b->importance = job_floats(j, "importance", 1, tokens)))
        return j->err->code;
    if (job_has(j, "hidden")) {
        hidden[0] = *tokens;
        if (!(b->hidden = job_floats(j, "hidden", 2, hidden)))
            return j->err->code;
        *tokens = hidden[0];
        b->n_hidden = (int32_t)hidden[1];
    }
    int32_t most = j->model.n_experts > 0 ? j->model.n_experts : 65535;
    struct { const char *key; struct moe_routes *to; const struct moe_routes **field; } routes[] = {
        { "recorded", recorded, &b->recorded }, { "previous", previous, &b->previous },
    };
    for (int i = 0; i < 2; i++) {
        if (!job_has(j, routes[i].key))
            continue;
        if (job_routes(j, routes[i].key, (int32_t)*tokens, most, routes[i].to) < 0)
            return j->err->code;
        *tokens = routes[i].to->n_tokens;
        *routes[i].field = routes[i].to;
    }
    if (*tokens > INT32_MAX)
        return err_set(j->err, ERR_INPUT, "%s: found %lld tokens, expected at most %d", j->file, (long long)*tokens,
                       INT32_MAX);
    if (read_top_k(j) < 0)
        return j->err->code;
    b->phase = MOE_PREFILL;
    b->n_tokens = *tokens > 0 ? (int32_t)*tokens : 0;
    b->n_experts = j->model.n_experts;
    b->top_k = j->model.top_k;
    j->model.n_layers = 1;
    j->model.d_model = b->n_hidden > 0 ? b->n_hidden : 1;
    j->model.d_expert = 1;
    j->model.weight_bytes = j->model.act_bytes = j->model.combine_bytes = 2;
    return 0;
}

int job_check_needs(struct eval_job *j, const struct moe_plugin *p, const struct moe_batch *b)
{
    const struct { uint32_t need; bool there; const char *key; } all[] = {
        { MOE_NEEDS_LOGITS, b->router_logits != NULL, "logits" },
        { MOE_NEEDS_RECORDED, b->recorded != NULL, "recorded" },
        { MOE_NEEDS_HIDDEN, b->hidden != NULL, "hidden" },
        { MOE_NEEDS_IMPORTANCE, b->importance != NULL, "importance" },
        { MOE_NEEDS_TOKEN_ID, b->token_id != NULL, "token_ids" },
        { MOE_NEEDS_PREVIOUS, b->previous != NULL, "previous" },
        { MOE_NEEDS_PREVIOUS_LOGITS, b->previous_logits != NULL, "previous_logits" },
        { MOE_NEEDS_LABEL, b->label != NULL, "labels" },
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if ((p->needs & all[i].need) && !all[i].there)
            return job_fail(j, all[i].key, "is missing: %s needs it", j->who);
    return 0;
}

/* ---- policies ---- */

int job_context(struct eval_job *j)
{
    if (policy_context_init(&j->context, &j->model, j->topology, PREC_BF16, 0, j->seed, j->err) < 0)
        return j->err->code;
    j->context_open = true;
    return 0;
}

bool job_takes(const struct eval_job *j, const char *param)
{
    for (const struct moe_param *p = j->plugin->params; p && p->name; p++)
        if (!strcmp(p->name, param))
            return true;
    return false;
}

int job_param(struct eval_job *j, const char *param, const char *key, json_t *value)
{
    if (!value)
        return err_set(j->err, ERR_MEMORY, "out of memory");
    if (json_object_get(j->params, param)) {
        json_decref(value);
        return job_fail(j, key, "given twice: in the input and as parameter %s", param);
    }
    json_object_set_new(j->params, param, value);
    return 0;
}

int job_tensors(struct eval_job *j)
{
    json_t *tensors = json_object_get(j->input, "tensors"), *value;
    const char *name;
    char path[1100];
    if (tensors && !json_is_object(tensors))
        return job_fail(j, "tensors", "expected {\"name\": \"file.npy\"}");
    json_object_foreach(tensors, name, value) {
        if (!json_is_string(value) && !json_is_array(value))
            return job_fail(j, "tensors", "%s: expected numbers, or the path of a .npy file", name);
        const char *file = json_is_string(value) ? job_path(j, json_string_value(value), path, sizeof path) : NULL;
        if (job_param(j, name, "tensors", file ? json_string(file) : json_incref(value)) < 0)
            return j->err->code;
    }
    return 0;
}

int job_open_policy(struct eval_job *j, struct policy *p)
{
    return policy_open(p, &j->context, j->plugin, j->params, j->who, j->err);
}

/* ---- small things ---- */

double job_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void *job_alloc(struct eval_job *j, size_t n, size_t size)
{
    size_t bytes;
    void *p = __builtin_mul_overflow(n, size, &bytes) || bytes > SIZE_MAX / 4 ? NULL : arena_take(&j->memory, bytes);
    if (p)
        memset(p, 0, bytes);
    else
        err_set(j->err, ERR_MEMORY, "%s: out of memory for %zu elements", j->file, n);
    return p;
}

double job_max_vio(const int64_t *load, int32_t n)
{
    int64_t most = 0, sum = 0;
    for (int32_t i = 0; i < n; i++) {
        most = load[i] > most ? load[i] : most;
        sum += load[i];
    }
    return sum > 0 ? (double)most * n / (double)sum - 1 : 0;
}

json_t *job_list(const int32_t *x, int64_t n)
{
    json_t *list = json_array();
    for (int64_t i = 0; i < n; i++)
        json_array_append_new(list, json_integer(x[i]));
    return list;
}

json_t *job_list_wide(const int64_t *x, int64_t n)
{
    json_t *list = json_array();
    for (int64_t i = 0; i < n; i++)
        json_array_append_new(list, json_integer(x[i]));
    return list;
}

json_t *job_list_floats(const float *x, int64_t n)
{
    json_t *list = json_array();
    for (int64_t i = 0; i < n; i++)
        json_array_append_new(list, json_real((double)x[i]));
    return list;
}

json_t *job_list_reals(const double *x, int64_t n)
{
    json_t *list = json_array();
    for (int64_t i = 0; i < n; i++)
        json_array_append_new(list, json_real(x[i]));
    return list;
}

void job_put_routes(json_t *out, const struct moe_routes *r)
{
    json_object_set_new(out, "offsets", job_list_wide(r->offset, (int64_t)r->n_tokens + 1));
    json_object_set_new(out, "experts", job_list(r->expert, r->n));
    json_object_set_new(out, "weights", job_list_floats(r->weight, r->n));
}
