/* SPDX-License-Identifier: Apache-2.0
 * workload.c - batches from recorded routing. */
#include "config.h"

#include "workload.h"
#include "policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int workload_read_int(const json_t *spec, const char *key, int64_t def, int64_t min, int64_t max, int64_t *out,
                      const char *who, struct err *e)
{
    const json_t *v = json_object_get(spec, key);
    char found[PARAM_FOUND];
    const double x = json_number_value(v);
    const bool whole = json_is_integer(v) || (json_is_real(v) && x == nearbyint(x)); /* 1e6, as people write it */
    if (v && !whole)
        return err_set(e, ERR_INPUT, "%s: workload.%s: expected a whole number, found %s", who, key,
                       param_found(v, found));
    if (json_is_real(v) && !(x >= (double)min && x <= (double)max))
        return err_set(e, ERR_INPUT, "%s: workload.%s: %g is out of range, expected %lld to %lld", who, key, x,
                       (long long)min, (long long)max);
    *out = json_is_real(v) ? (int64_t)x : v ? json_integer_value(v) : def;
    if (*out < min || *out > max)
        return err_set(e, ERR_INPUT, "%s: workload.%s: %lld is out of range, expected %lld to %lld", who, key,
                       (long long)*out, (long long)min, (long long)max);
    return 0;
}

/* Every n-th request is profiled so that both parts hold every domain, whatever the trace's order. */
static int split_requests(struct workload *w, const char *who, struct err *e)
{
    int32_t n = w->trace.n_requests;
    w->played = malloc(sizeof *w->played * (size_t)n);
    w->profiled = malloc(sizeof *w->profiled * (size_t)n);
    if (!w->played || !w->profiled)
        return err_set(e, ERR_MEMORY, "out of memory");
    double owed = 0;
    for (int32_t r = 0; r < n; r++) {
        const int64_t *offset = w->trace.offsets.data;
        if (offset[r] == offset[r + 1])
            continue;
        owed += w->profile;
        if (owed >= 1 - 1e-9) {
            owed -= 1;
            w->profiled[w->n_profiled++] = r;
        } else {
            w->played[w->n_played++] = r;
        }
    }
    if (w->profile == 0) {
        memcpy(w->profiled, w->played, sizeof *w->played * (size_t)w->n_played);
        w->n_profiled = w->n_played;
    }
    if (w->n_played == 0 || w->n_profiled == 0)
        return err_set(e, ERR_INPUT, "%s: workload.profile: %g of %d requests leaves none to %s", who, w->profile, n,
                       w->n_played ? "profile" : "play");
    return 0;
}

static int read_bool(const json_t *spec, const char *key, bool *out, const char *who, struct err *e)
{
    const json_t *v = json_object_get(spec, key);
    char found[PARAM_FOUND];
    if (v && !json_is_boolean(v))
        return err_set(e, ERR_INPUT, "%s: workload.%s: expected true or false, found %s", who, key,
                       param_found(v, found));
    *out = json_is_true(v);
    return 0;
}

static int read_bytes(const json_t *spec, const char *key, double def, double *out, const char *who, struct err *e)
{
    const json_t *v = json_object_get(spec, key);
    char found[PARAM_FOUND];
    *out = v ? json_number_value(v) : def;
    if ((v && !json_is_number(v)) || !(*out >= 0 && *out <= 64))
        return err_set(e, ERR_INPUT, "%s: workload.%s: expected bytes of one weight, 0 to 64, found %s", who, key,
                       param_found(v, found));
    return 0;
}

/* Mixed precision as usual: gradients, master weights and two moments of 4 bytes each. */
static int read_training(struct workload *w, const json_t *spec, const char *who, struct err *e)
{
    return read_bool(spec, "recompute", &w->recompute, who, e) < 0 ||
           read_bool(spec, "shard_optimizer", &w->shard_optimizer, who, e) < 0 ||
           read_bytes(spec, "gradient_bytes", 4, &w->gradient_bytes, who, e) < 0 ||
           read_bytes(spec, "optimizer_bytes", 12, &w->optimizer_bytes, who, e) < 0 ? e->code : 0;
}

int workload_open(struct workload *w, const json_t *spec, const struct moe_model *m, int32_t n_devices, uint64_t seed,
                  const char *who, struct err *e)
{
    memset(w, 0, sizeof *w);
    const char *dir = json_string_value(json_object_get(spec, "trace"));
    const char *kind = json_string_value(json_object_get(spec, "kind"));
    int64_t batch = 0, steps = 0, context = 0;
    const bool gate = kind && !strcmp(kind, "gate");
    if (!dir && !gate)
        return err_set(e, ERR_INPUT, "%s: workload.trace: expected a trace directory", who);
    if (dir && trace_open(&w->trace, dir, e) < 0)
        return err_prefix(e, "%s", who);
    int64_t repeat;
    if (workload_read_int(spec, "layer_repeat", 1, 1, 1000, &repeat, who, e) < 0)
        return e->code;
    w->layer_repeat = (int32_t)repeat;
    if (!gate && (w->trace.n_layers * repeat != m->n_layers || w->trace.n_experts != m->n_experts ||
                  w->trace.top_k != m->top_k))
        return err_set(e, ERR_INPUT,
                       "%s: the model has %d layers, %d experts, top_k %d; the trace %s has %d layers, %d experts, "
                       "top_k %d, with layer_repeat %d", who, m->n_layers, m->n_experts, m->top_k, dir,
                       w->trace.n_layers, w->trace.n_experts, w->trace.top_k, w->layer_repeat);
    if (kind && !gate && strcmp(kind, "decode") && strcmp(kind, "prefill") && strcmp(kind, "train"))
        return err_set(e, ERR_INPUT, "%s: workload.kind: \"%s\", expected decode, prefill, train or gate", who, kind);
    const bool train = gate || (kind && !strcmp(kind, "train")), prefill = train || (kind && !strcmp(kind, "prefill"));
    w->phase = train ? MOE_TRAIN : prefill ? MOE_PREFILL : MOE_DECODE;
    if (train && read_training(w, spec, who, e) < 0)
        return e->code;
    const char *key = prefill ? "tokens_per_device" : "batch_per_device";
    if (workload_read_int(spec, key, prefill ? 4096 : 64, 1, 1 << 20, &batch, who, e) < 0 ||
        workload_read_int(spec, "steps", 20, 1, 1000000, &steps, who, e) < 0 ||
        workload_read_int(spec, "context", 1024, 0, 1 << 24, &context, who, e) < 0)
        return e->code;
    const json_t *profile = json_object_get(spec, "profile");
    char found[PARAM_FOUND];
    w->profile = profile ? json_number_value(profile) : 0.5;
    if ((profile && !json_is_number(profile)) || !(w->profile >= 0 && w->profile < 1))
        return err_set(e, ERR_INPUT, "%s: workload.profile: expected a share of requests within [0, 1), found %s",
                       who, param_found(profile, found));
    if (batch * n_devices > 1 << 24)
        return err_set(e, ERR_INPUT, "%s: workload.%s: %lld tokens on %d devices are more than a step holds (%d)",
                       who, key, (long long)batch, n_devices, 1 << 24);
    w->n_devices = n_devices;
    w->n_steps = (int32_t)steps;
    w->context = (int32_t)context;
    w->n_streams = prefill ? n_devices : (int32_t)batch * n_devices;
    w->per_stream = prefill ? (int32_t)batch : 1;
    w->n_tokens = w->n_streams * w->per_stream;
    if (!gate && split_requests(w, who, e) < 0)
        return e->code;
    size_t n = (size_t)w->n_tokens;
    w->stream = calloc((size_t)w->n_streams, sizeof *w->stream);
    w->row = calloc(n, sizeof *w->row);
    w->device = calloc(n * 6, sizeof *w->device);
    w->importance = calloc(n, sizeof *w->importance);
    if (!w->stream || !w->row || !w->device || !w->importance)
        return err_set(e, ERR_MEMORY, "out of memory for %d tokens per step", w->n_tokens);
    w->token_id = w->device + n;
    w->position = w->device + 2 * n;
    w->request = w->device + 3 * n;
    w->label = w->device + 4 * n;
    w->previous_token_id = w->device + 5 * n;
    if (gate)
        return workload_gate_open(w, spec, m, seed, who, e);
    workload_rewind(w, seed);
    return 0;
}

void workload_close(struct workload *w)
{
    if (w->gate)
        gate_close(w->gate);
    free(w->gate);
    trace_close(&w->trace);
    free(w->played);
    free(w->profiled);
    free(w->stream);
    free(w->row);
    free(w->device);
    free(w->importance);
    free(w->logits);
    free(w->previous_logits);
    free(w->hidden);
    routes_free(&w->recorded);
    memset(w, 0, sizeof *w);
}

const char *workload_lacks(const struct workload *w, uint32_t needs)
{
    const struct trace *t = &w->trace;
    if (w->gate)
        return workload_gate_lacks(needs);
    if ((needs & (MOE_NEEDS_LOGITS | MOE_NEEDS_SCORES | MOE_NEEDS_PREVIOUS_LOGITS)) && !t->logits.data)
        return "router logits (logits.npy)";
    if ((needs & MOE_NEEDS_HIDDEN) && (!t->hidden.data || t->hidden.shape[0] < t->n_tokens))
        return "hidden states of every token (hidden.npy)";
    if ((needs & MOE_NEEDS_IMPORTANCE) && !t->importance.data)
        return "token importance (importance.npy)";
    if ((needs & MOE_NEEDS_TOKEN_ID) && !t->token_ids.data)
        return "token ids (token_ids.npy)";
    if ((needs & MOE_NEEDS_LABEL) && !t->domains.data)
        return "labels (domains.npy)";
    return NULL;
}

static int by_id(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

void workload_rewind(struct workload *w, uint64_t seed)
{
    const int64_t *offset = w->trace.offsets.data;
    uint64_t z = moe_mix(seed + 0x5eed);
    if (w->gate) {
        gate_reset(w->gate, seed);
        return;
    }
    qsort(w->played, (size_t)w->n_played, sizeof *w->played, by_id); /* the recorded order, then shuffled */
    for (int32_t i = w->n_played - 1; i > 0; i--) {
        int32_t j = (int32_t)(moe_mix(z + (uint64_t)i) % (uint64_t)(i + 1));
        int32_t swap = w->played[i];
        w->played[i] = w->played[j];
        w->played[j] = swap;
    }
    for (int32_t s = 0; s < w->n_streams; s++) {
        int32_t at = s % w->n_played, request = w->played[at];
        int64_t length = offset[request + 1] - offset[request];
        /* A single stream plays whole requests; many start anywhere, as in a server that has run for a while. */
        int64_t start = w->n_streams == 1 ? 0 : (int64_t)(moe_mix(z ^ (uint64_t)(s + 1)) % (uint64_t)length);
        w->stream[s] = (struct stream){ at, offset[request] + start };
    }
}

void workload_step(struct workload *w)
{
    const int64_t *offset = w->trace.offsets.data;
    if (w->gate) {
        workload_gate_step(w);
        return;
    }
    for (int32_t s = 0, t = 0; s < w->n_streams; s++)
        for (int32_t i = 0; i < w->per_stream; i++, t++) {
            struct stream *x = &w->stream[s];
            int32_t request = w->played[x->at];
            int64_t row = w->row[t] = x->token;
            w->device[t] = (int32_t)((int64_t)s * w->n_devices / w->n_streams);
            w->request[t] = request;
            w->position[t] = w->trace.positions.data ? (int32_t)npy_int(&w->trace.positions, row)
                                                     : (int32_t)(row - offset[request]);
            w->token_id[t] = w->trace.token_ids.data ? (int32_t)npy_int(&w->trace.token_ids, row) : 0;
            w->previous_token_id[t] = w->trace.token_ids.data && row > offset[request]
                                          ? (int32_t)npy_int(&w->trace.token_ids, row - 1) : -1;
            w->label[t] = w->trace.domains.data ? (int32_t)npy_int(&w->trace.domains, request) : 0;
            w->importance[t] = w->trace.importance.data ? (float)npy_real(&w->trace.importance, row) : 0;
            if (++x->token == offset[request + 1]) {
                x->at = (x->at + 1) % w->n_played;
                x->token = offset[w->played[x->at]];
            }
        }
}

/* The layer of the trace that a layer of the model plays. */
static int32_t recorded_layer(const struct workload *w, int32_t layer)
{
    return layer / w->layer_repeat;
}

/* Gathers rows of a [tokens, layers, width] array into [T][width]. */
static int gather(struct workload *w, const struct npy *a, int32_t layer, int64_t width, float **to, struct err *e)
{
    if (!*to)
        *to = malloc(sizeof **to * (size_t)w->n_tokens * (size_t)width);
    if (!*to)
        return err_set(e, ERR_MEMORY, "out of memory for a batch");
    int64_t layers = w->trace.n_layers;
    for (int32_t t = 0; t < w->n_tokens; t++)
        npy_floats(a, (w->row[t] * layers + recorded_layer(w, layer)) * width, width, *to + (int64_t)t * width);
    return 0;
}

int workload_batch(struct workload *w, int32_t step, int32_t layer, uint32_t needs, struct moe_batch *b,
                   struct err *e)
{
    const struct trace *t = &w->trace;
    memset(b, 0, sizeof *b);
    b->step = step;
    b->layer = layer;
    b->phase = w->phase;
    b->n_tokens = w->n_tokens;
    b->device = w->device;
    b->request = w->request;
    b->position = w->position;
    if (w->gate) {
        workload_gate_batch(w, layer, b);
        return 0;
    }
    b->n_experts = t->n_experts;
    b->top_k = t->top_k;
    b->token_id = t->token_ids.data ? w->token_id : NULL;
    b->previous_token_id = t->token_ids.data ? w->previous_token_id : NULL;
    b->label = t->domains.data ? w->label : NULL;
    b->importance = t->importance.data ? w->importance : NULL;
    if (needs & (MOE_NEEDS_LOGITS | MOE_NEEDS_SCORES | MOE_NEEDS_PREVIOUS_LOGITS)) {
        if (gather(w, &t->logits, layer, t->n_experts, &w->logits, e) < 0)
            return e->code;
        b->router_logits = w->logits;
        if ((needs & MOE_NEEDS_PREVIOUS_LOGITS) && layer > 0) {
            if (gather(w, &t->logits, layer - 1, t->n_experts, &w->previous_logits, e) < 0)
                return e->code;
            b->previous_logits = w->previous_logits;
        }
    }
    if (needs & MOE_NEEDS_HIDDEN) {
        b->n_hidden = (int32_t)t->hidden.shape[2];
        if (gather(w, &t->hidden, layer, b->n_hidden, &w->hidden, e) < 0)
            return e->code;
        b->hidden = w->hidden;
    }
    if (needs & MOE_NEEDS_RECORDED) {
        int64_t n = (int64_t)w->n_tokens * t->top_k;
        if (routes_begin(&w->recorded, w->n_tokens, &w->room_recorded, e) < 0 || routes_reserve(&w->recorded, n, e) < 0)
            return e->code;
        for (int32_t i = 0; i < w->n_tokens; i++) {
            int64_t at = (int64_t)i * t->top_k;
            if (i + 32 < w->n_tokens) /* streams are all over the trace, which is larger than any cache */
                trace_fetch(t, w->row[i + 32], recorded_layer(w, layer));
            trace_experts(t, w->row[i], recorded_layer(w, layer), w->recorded.expert + at);
            trace_weights(t, w->row[i], recorded_layer(w, layer), w->recorded.weight + at);
            w->recorded.offset[i + 1] = at + t->top_k;
        }
        w->recorded.n = n;
        b->recorded = &w->recorded;
    }
    return 0;
}

int64_t workload_profile(const struct workload *w, struct statistics *s)
{
    const struct trace *t = &w->trace;
    const int64_t *offset = t->offsets.data;
    const int32_t n_layers = t->n_layers * w->layer_repeat;
    int64_t n_tokens = 0;
    if (w->gate) {
        for (int32_t l = 0; l < w->gate->n_layers; l++)
            for (int32_t x = 0; x < w->gate->n_experts; x++)
                statistics_add(s, l, &x, 1, NULL, 0);
        return w->gate->n_experts;
    }
    int32_t now[t->top_k], before[t->top_k];
    /* Layer by layer, because the counts of all of them do not fit in a cache. */
    for (int32_t l = 0; l < n_layers; l++)
        for (int32_t i = 0; i < w->n_profiled; i++)
            for (int64_t row = offset[w->profiled[i]]; row < offset[w->profiled[i] + 1]; row++) {
                trace_experts(t, row, recorded_layer(w, l), now);
                const bool between = l > 0 && s->transitions; /* else nobody asks what came before */
                if (between)
                    trace_experts(t, row, recorded_layer(w, l - 1), before);
                statistics_add(s, l, now, t->top_k, between ? before : NULL, t->top_k);
            }
    for (int32_t i = 0; i < w->n_profiled; i++)
        n_tokens += offset[w->profiled[i] + 1] - offset[w->profiled[i]];
    return n_tokens;
}
