/* SPDX-License-Identifier: Apache-2.0
 * eval_offload.c - moelab eval offload: a sequence of accesses through one cache. There is no time in it, so nothing is
 * ever brought in early. */
#include "config.h"

#include "cache.h"
#include "eval_job.h"
#include "npy.h"
#include "trace.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct work {
    uint32_t *key;
    int64_t *next_use;       /* NULL unless the policy wants it */
    int64_t n, capacity;
    uint32_t per_layer;      /* objects; 0: nothing is known of layers */
    double expert_bytes, seconds;
    struct cache_counts counts;
};

/* Ids are not copied through double arrays: streams are long. */
static int keys_of_npy(struct eval_job *j, struct work *w, const char *name)
{
    struct npy a;
    int64_t shape[1] = { -1 };
    if (npy_open(&a, name, j->err) < 0)
        return j->err->code;
    if (npy_expect(&a, "u1|u2|u4|u8|i1|i2|i4|i8", 1, shape, j->err) == 0 &&
        npy_expect_range(&a, 0, INT32_MAX - 1, j->err) == 0 &&
        (w->key = job_alloc(j, (size_t)a.count, sizeof *w->key))) {
        for (int64_t i = 0; i < a.count; i++)
            w->key[i] = (uint32_t)npy_int(&a, i);
        w->n = a.count;
    }
    npy_close(&a);
    return j->err->code;
}

static int read_keys(struct eval_job *j, struct work *w)
{
    const json_t *v = json_object_get(j->input, "keys");
    int64_t most = 0;
    if (json_is_string(v)) {
        if (keys_of_npy(j, w, json_string_value(v)) < 0)
            return j->err->code;
    } else {
        w->n = -1;
        int32_t *key = job_ids(j, "keys", 1, &w->n, 0, INT32_MAX - 1);
        w->key = key ? job_alloc(j, (size_t)w->n, sizeof *w->key) : NULL;
        for (int64_t i = 0; w->key && i < w->n; i++)
            w->key[i] = (uint32_t)key[i];
    }
    for (int64_t i = 0; w->key && i < w->n; i++)
        most = w->key[i] > most ? w->key[i] : most;
    j->model.n_layers = 1;
    j->model.n_experts = (int32_t)most + 1;
    j->model.top_k = 1;
    return j->err->code;
}

/* Request by request, token by token, through all layers, experts in the recorded order. */
static int read_trace(struct eval_job *j, struct work *w, const char *dir)
{
    struct trace t;
    if (trace_open(&t, dir, j->err) < 0)
        return j->err->code;
    w->n = t.experts.count;
    w->per_layer = (uint32_t)t.n_experts;
    j->model.n_layers = t.n_layers;
    j->model.n_experts = t.n_experts;
    j->model.top_k = t.top_k;
    if ((w->key = job_alloc(j, (size_t)w->n, sizeof *w->key)))
        for (int64_t i = 0; i < w->n; i++) {
            uint32_t layer = (uint32_t)(i / t.top_k % t.n_layers);
            w->key[i] = layer * w->per_layer + (uint32_t)npy_int(&t.experts, i);
        }
    trace_close(&t);
    return j->err->code;
}

static int read_capacity(struct eval_job *j, struct work *w)
{
    double bytes = job_option_real(j, "capacity_bytes", 0);
    w->expert_bytes = job_option_real(j, "expert_bytes", 1);
    w->capacity = job_option_whole(j, "capacity", 0);
    if ((w->capacity > 0) == (bytes > 0))
        return err_set(j->err, ERR_INPUT, "%s: expected either --capacity or --capacity-bytes", j->who);
    if (bytes > 0 && !json_object_get(j->options, "expert_bytes"))
        return err_set(j->err, ERR_INPUT, "%s: --capacity-bytes needs --expert-bytes", j->who);
    if (bytes > 0)
        w->capacity = (int64_t)(bytes / w->expert_bytes);
    if (w->capacity < 1)
        return err_set(j->err, ERR_INPUT, "%s: %g bytes hold no expert of %g bytes", j->who, bytes, w->expert_bytes);
    return 0;
}

static int read_all(struct eval_job *j, struct work *w)
{
    const char *trace = job_option_text(j, "trace"), *prefetch = job_option_text(j, "prefetch");
    if ((trace != NULL) == job_has(j, "keys"))
        return err_set(j->err, ERR_INPUT, "%s: expected either --keys or --trace", j->who);
    if (prefetch && strcmp(prefetch, "none") != 0)
        return err_set(j->err, ERR_INPUT, "%s: prefetch: found \"%s\", expected none: eval replays without time",
                       j->who, prefetch);
    if (j->plugin->ops.offload.prefetch && !prefetch)
        fprintf(stderr, "moelab: warning: %s: nothing is prefetched: eval replays without time (--prefetch none)\n",
                j->who);
    if (j->plugin->needs & MOE_NEEDS_SCORES)
        return err_set(j->err, ERR_INPUT, "%s: needs gate scores, which a sequence of accesses does not have", j->who);
    if (read_capacity(j, w) < 0 || (trace ? read_trace(j, w, trace) : read_keys(j, w)) < 0)
        return j->err->code;
    j->model.d_model = j->model.d_expert = 1;
    j->model.weight_bytes = j->model.act_bytes = j->model.combine_bytes = 2;
    if (job_topology(j, "star-50GBps", 1, 1) < 0 || job_context(j) < 0)
        return j->err->code;
    j->context.cache_objects = w->capacity;
    if (!(j->plugin->needs & MOE_NEEDS_NEXT_USE))
        return 0;
    if (!(w->next_use = job_alloc(j, (size_t)w->n, sizeof *w->next_use)))
        return j->err->code;
    return cache_next_use(w->key, w->n, j->context.n_objects, w->next_use, j->err);
}

static int replay_once(struct eval_job *j, struct work *w)
{
    struct policy p;
    struct cache cache;
    if (job_open_policy(j, &p) == 0 && cache_open(&cache, &p, 0, w->capacity, false, j->err) == 0) {
        double start = job_clock();
        cache_replay(&cache, w->key, w->n, w->next_use, w->per_layer, &w->counts);
        double seconds = job_clock() - start;
        w->seconds = w->seconds == 0 || seconds < w->seconds ? seconds : w->seconds;
        cache_close(&cache);
    }
    policy_close(&p);
    return j->err->code;
}

int eval_offload(struct eval_job *j, json_t *out)
{
    struct work w = { .n = 0 };
    if (read_all(j, &w) < 0)
        return j->err->code;
    for (int32_t i = 0; i < j->n_repeats; i++)
        if (replay_once(j, &w) < 0)
            return j->err->code;
    const struct cache_counts *c = &w.counts;
    json_object_set_new(out, "requests", json_integer(c->requests));
    json_object_set_new(out, "misses", json_integer(c->misses));
    json_object_set_new(out, "hit_rate",
                        c->requests > 0 ? json_real(1 - (double)c->misses / (double)c->requests) : json_null());
    json_object_set_new(out, "prefetched", json_integer(0));
    json_object_set_new(out, "wasted_prefetches", json_integer(0));
    json_object_set_new(out, "bytes_loaded", json_real((double)c->misses * w.expert_bytes));
    json_object_set_new(out, "requests_per_s",
                        w.seconds > 0 ? json_real((double)c->requests / w.seconds) : json_null());
    json_object_set_new(out, "seconds", json_real(w.seconds));
    return 0;
}
