/* SPDX-License-Identifier: Apache-2.0
 * eval_input.c - the input of an evaluation: JSON, with arrays in it or in .npy files beside it, as checked arrays. */
#include "config.h"

#include "eval_job.h"
#include "param.h"
#include "npy.h"

#include <float.h>
#include <inttypes.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What an input may hold, by kind. */
static const char *const known_keys[N_EVAL_KINDS][24] = {
    [MOE_ROUTER] = { "logits", "top_k", "bias", "token_ids", "positions", "requests", "importance", "hidden", "labels",
                     "previous", "previous_logits", "recorded", "tensors", "n_experts", "devices", "device", "nodes",
                     "machine" },
    [MOE_BALANCER] = { "load", "logits", "top_k", "routes", "devices", "device", "nodes", "machine", "phy2dev",
                       "capacity_factor", "bias", "token_ids", "positions", "requests", "importance", "hidden",
                       "labels", "previous", "previous_logits", "tensors", "n_experts" },
    [MOE_PLACEMENT] = { "load", "replicas", "groups", "nodes", "devices", "transitions", "current", "machine",
                        "expert_bytes" },
    [MOE_DISPATCH] = { "tokens_by", "bytes", "routes", "device", "devices", "nodes", "machine", "tier", "expert",
                       "phy2dev", "n_experts", "dispatch_bytes", "combine_bytes" },
};

int job_fail(struct eval_job *j, const char *key, const char *fmt, ...)
{
    char text[600];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return err_set(j->err, ERR_INPUT, "%s: %s: %s", j->file, key, text);
}

static int check_keys(struct eval_job *j)
{
    const char *key;
    json_t *value;
    const char *const *known = known_keys[j->kind];
    int n = 0;
    while (n < (int)(sizeof known_keys[0] / sizeof *known_keys[0]) && known[n])
        n++;
    json_object_foreach(j->input, key, value) {
        int i = 0;
        while (i < n && strcmp(known[i], key) != 0)
            i++;
        if (i < n)
            continue;
        const char *near = err_nearest(key, known, n);
        return job_fail(j, key, "unknown key for a %s%s%s%s", eval_kind_name[j->kind], near ? "; did you mean \"" : "",
                        near ? near : "", near ? "\"?" : "");
    }
    return 0;
}

static int load_json(struct eval_job *j, const char *path)
{
    json_error_t at;
    bool from_stdin = !strcmp(path, "-");
    snprintf(j->file, sizeof j->file, "%s", from_stdin ? "standard input" : path);
    const char *slash = strrchr(path, '/');
    snprintf(j->dir, sizeof j->dir, "%.*s", slash ? (int)(slash - path + 1) : 0, path);
    if (!from_stdin && access(path, R_OK) < 0)
        return err_set(j->err, ERR_INPUT, "%s: %s", path, strerror(errno));
    j->input = from_stdin ? json_loadf(stdin, JSON_REJECT_DUPLICATES, &at)
                          : json_load_file(path, JSON_REJECT_DUPLICATES, &at);
    if (!j->input && at.position == 0 && at.line <= 1)
        return err_set(j->err, ERR_INPUT, "%s: found nothing, expected a JSON object {...}", j->file);
    if (!j->input)
        return err_set(j->err, ERR_INPUT, "%s:%d:%d: %s", j->file, at.line, at.column, err_unquote(at.text));
    if (!json_is_object(j->input))
        return err_set(j->err, ERR_INPUT, "%s: expected an object {...}", j->file);
    return 0;
}

int job_read_input(struct eval_job *j)
{
    static const char *const joined[] = { "logits", "keys", "traffic" };
    json_t *given = json_object_get(j->options, "input");
    snprintf(j->file, sizeof j->file, "input");
    if (json_is_string(given) && load_json(j, json_string_value(given)) < 0)
        return j->err->code;
    if (!j->input)
        j->input = given ? json_copy(given) : json_object();
    if (!j->input)
        return err_set(j->err, ERR_MEMORY, "out of memory");
    if (check_keys(j) < 0)
        return j->err->code;
    for (size_t i = 0; i < sizeof joined / sizeof *joined; i++) {
        json_t *value = json_object_get(j->options, joined[i]);
        if (value && job_has(j, joined[i]))
            return job_fail(j, joined[i], "given twice: in the input and as an option");
        if (value)
            json_object_set(j->input, joined[i], value);
    }
    return 0;
}

bool job_has(const struct eval_job *j, const char *key)
{
    const json_t *v = json_object_get(j->input, key);
    return v && !json_is_null(v);
}

int job_real(struct eval_job *j, const char *key, double def, double min, double max, double *out)
{
    const json_t *v = json_object_get(j->input, key);
    char found[PARAM_FOUND];
    *out = v ? json_number_value(v) : def;
    if (v && !json_is_number(v))
        return job_fail(j, key, "found %s, expected a number", param_found(v, found));
    if (isnan(*out))
        return job_fail(j, key, "is missing");
    if (!(*out >= min && *out <= max))
        return job_fail(j, key, "found %.17g, expected %.16g to %.16g", *out, min, max);
    return 0;
}

int job_whole(struct eval_job *j, const char *key, int32_t def, int32_t min, int32_t max, int32_t *out)
{
    double x;
    if (job_real(j, key, def, min, max, &x) < 0)
        return j->err->code;
    if (x != floor(x))
        return job_fail(j, key, "found %.17g, expected a whole number", x);
    *out = (int32_t)x;
    return 0;
}

const char *job_path(const struct eval_job *j, const char *name, char *path, size_t room)
{
    if (name[0] != '/' && snprintf(path, room, "%s%s", j->dir, name) < (int)room && access(path, F_OK) == 0)
        return path;
    snprintf(path, room, "%s", name);
    return path;
}

/* ---- arrays ---- */

enum element { FLOAT, REAL, WHOLE, ID };
static const size_t element_bytes[] = { sizeof(float), sizeof(double), sizeof(int64_t), sizeof(int32_t) };

struct reader {
    struct eval_job *job;
    const char *key;
    enum element type;
    int n_dims;
    int64_t *shape;
    double min, max;
    void *data;
    int64_t at[NPY_MAX_DIMS], n; /* index of the element being read; elements read */
};

/* "load[3][0]" */
static const char *element_name(const struct reader *r, int depth, char text[160])
{
    int n = snprintf(text, 60, "%s", r->key);
    for (int d = 0; d < depth; d++)
        n += snprintf(text + n, 160 - (size_t)n, "[%" PRId64 "]", r->at[d]);
    return text;
}

static int put(struct reader *r, double x)
{
    char text[160];
    bool whole = r->type == WHOLE || r->type == ID;
    if (!(x >= r->min && x <= r->max) || (whole && x != floor(x)))
        return job_fail(r->job, element_name(r, r->n_dims, text), "found %.17g, expected %s from %.16g to %.16g", x,
                        whole ? "a whole number" : "a number", r->min, r->max);
    switch (r->type) {
    case FLOAT: ((float *)r->data)[r->n++] = (float)x; break;
    case REAL: ((double *)r->data)[r->n++] = x; break;
    case WHOLE: ((int64_t *)r->data)[r->n++] = (int64_t)x; break;
    case ID: ((int32_t *)r->data)[r->n++] = (int32_t)x; break;
    }
    return 0;
}

static void *room_for(struct reader *r)
{
    size_t n = 1;
    for (int d = 0; d < r->n_dims; d++)
        if (__builtin_mul_overflow(n, (size_t)r->shape[d], &n))
            n = SIZE_MAX / 64;
    return r->data = job_alloc(r->job, n, element_bytes[r->type]);
}

static int read_lists(struct reader *r, const json_t *v, int depth)
{
    char text[160], found[PARAM_FOUND];
    if (depth == r->n_dims)
        return json_is_number(v) ? put(r, json_number_value(v))
                                 : job_fail(r->job, element_name(r, depth, text), "found %s, expected a number",
                                            param_found(v, found));
    if (!json_is_array(v))
        return job_fail(r->job, element_name(r, depth, text), "expected a list (%d dimensions in all)", r->n_dims);
    if ((int64_t)json_array_size(v) != r->shape[depth])
        return job_fail(r->job, element_name(r, depth, text), "found %zu elements, expected %" PRId64,
                        json_array_size(v), r->shape[depth]);
    for (int64_t i = 0; i < r->shape[depth]; i++) {
        r->at[depth] = i;
        if (read_lists(r, json_array_get(v, (size_t)i), depth + 1) < 0)
            return r->job->err->code;
    }
    return 0;
}

/* Dimensions left open take the size of the first list there. */
static void shape_of_lists(struct reader *r, const json_t *v)
{
    for (int d = 0; d < r->n_dims; d++) {
        if (r->shape[d] < 0)
            r->shape[d] = (int64_t)json_array_size(v);
        v = json_array_get(v, 0);
    }
}

static int read_npy(struct reader *r, const char *name)
{
    char path[1100];
    struct npy a;
    struct err *e = r->job->err;
    if (npy_open(&a, job_path(r->job, name, path, sizeof path), e) < 0)
        return err_prefix(e, "%s: %s", r->job->file, r->key);
    if (npy_expect(&a, "f2|f4|f8|u1|u2|u4|u8|i1|i2|i4|i8", r->n_dims, r->shape, e) < 0 || npy_expect_finite(&a, e) < 0)
        goto out;
    memcpy(r->shape, a.shape, sizeof *r->shape * (size_t)r->n_dims);
    if (!room_for(r))
        goto out;
    if (r->type == FLOAT && a.kind == 'f' && a.item_bytes <= 4) {
        npy_floats(&a, 0, a.count, r->data); /* finite already; limits of f32 hold by themselves */
        goto out;
    }
    for (int64_t i = 0; i < a.count; i++) {
        char text[96];
        double x = npy_real(&a, i);
        bool whole = r->type == WHOLE || r->type == ID;
        if (!(x >= r->min && x <= r->max) || (whole && x != floor(x))) {
            err_set(e, ERR_INPUT, "%s%s: found %.17g, expected %s from %.16g to %.16g", path, npy_element(&a, i, text),
                    x, whole ? "a whole number" : "a number", r->min, r->max);
            goto out;
        }
        put(r, x);
    }
out:
    npy_close(&a);
    return e->code ? err_prefix(e, "%s: %s", r->job->file, r->key) : 0;
}

static void *read_value(struct eval_job *j, const char *key, const json_t *v, enum element type, int n_dims,
                        int64_t *shape, double min, double max)
{
    struct reader r = { .job = j, .key = key, .type = type, .n_dims = n_dims, .shape = shape, .min = min, .max = max };
    if (!v || json_is_null(v)) {
        job_fail(j, key, "is missing");
    } else if (json_is_string(v)) {
        read_npy(&r, json_string_value(v));
    } else if (!json_is_array(v)) {
        job_fail(j, key, "expected a list or the path of a .npy file");
    } else {
        shape_of_lists(&r, v);
        if (room_for(&r))
            read_lists(&r, v, 0);
    }
    return j->err->code ? NULL : r.data;
}

static void *read_array(struct eval_job *j, const char *key, enum element type, int n_dims, int64_t *shape, double min,
                        double max)
{
    return read_value(j, key, json_object_get(j->input, key), type, n_dims, shape, min, max);
}

double *job_reals(struct eval_job *j, const char *key, int n_dims, int64_t *shape, double min, double max)
{
    return read_array(j, key, REAL, n_dims, shape, min, max);
}

float *job_floats(struct eval_job *j, const char *key, int n_dims, int64_t *shape)
{
    return read_array(j, key, FLOAT, n_dims, shape, -(double)FLT_MAX, (double)FLT_MAX);
}

int64_t *job_wholes(struct eval_job *j, const char *key, int n_dims, int64_t *shape, int64_t min, int64_t max)
{
    return read_array(j, key, WHOLE, n_dims, shape, (double)min, (double)max);
}

int32_t *job_ids(struct eval_job *j, const char *key, int n_dims, int64_t *shape, int64_t min, int64_t max)
{
    return read_array(j, key, ID, n_dims, shape, (double)min, (double)max);
}

int job_n_dims(struct eval_job *j, const char *key)
{
    const json_t *v = json_object_get(j->input, key);
    char path[1100];
    struct npy a;
    int n = 0;
    if (!json_is_string(v)) {
        for (; json_is_array(v); n++)
            v = json_array_get(v, 0);
        return n;
    }
    if (npy_open(&a, job_path(j, json_string_value(v), path, sizeof path), j->err) < 0) {
        err_prefix(j->err, "%s: %s", j->file, key);
        return -1;
    }
    n = a.n_dims;
    npy_close(&a);
    return n;
}

/* ---- routes ---- */

static int check_routes_keys(struct eval_job *j, const char *key, const json_t *o)
{
    static const char *const known[] = { "offsets", "experts", "weights" };
    const char *k;
    json_t *value;
    if (!json_is_object(o))
        return job_fail(j, key, "%s", o ? "expected {offsets, experts, weights}" : "is missing");
    json_object_foreach((json_t *)(uintptr_t)o, k, value) {
        if (!strcmp(k, known[0]) || !strcmp(k, known[1]) || !strcmp(k, known[2]))
            continue;
        const char *near = err_nearest(k, known, 3);
        return job_fail(j, key, "unknown key \"%s\"%s%s", k,
                        near ? "; did you mean " : ", expected offsets, experts and weights", near ? near : "");
    }
    return 0;
}

int job_routes(struct eval_job *j, const char *key, int32_t n_tokens, int32_t max_experts, struct moe_routes *r)
{
    const json_t *o = json_object_get(j->input, key), *weights = json_object_get(o, "weights");
    char name[3][64];
    int64_t n_offsets = n_tokens < 0 ? -1 : n_tokens + 1, n = -1;
    int32_t room = 0;
    if (check_routes_keys(j, key, o) < 0)
        return j->err->code;
    snprintf(name[0], sizeof name[0], "%s.offsets", key);
    snprintf(name[1], sizeof name[1], "%s.experts", key);
    snprintf(name[2], sizeof name[2], "%s.weights", key);
    int32_t *expert = read_value(j, name[1], json_object_get(o, "experts"), ID, 1, &n, 0, max_experts - 1);
    int64_t *offset = expert ? read_value(j, name[0], json_object_get(o, "offsets"), WHOLE, 1, &n_offsets, 0, (double)n)
                             : NULL;
    if (!offset)
        return j->err->code;
    if (n_offsets < 1 || n_offsets > INT32_MAX || offset[0] != 0 || offset[n_offsets - 1] != n)
        return job_fail(j, name[0], "expected to start at 0 and to end at the number of experts, %" PRId64, n);
    for (int64_t t = 1; t < n_offsets; t++)
        if (offset[t] < offset[t - 1])
            return job_fail(j, name[0], "element %" PRId64 " is %" PRId64 ", less than the one before it, %" PRId64, t,
                            offset[t], offset[t - 1]);
    float *weight = weights ? read_value(j, name[2], weights, FLOAT, 1, &n, -(double)FLT_MAX, (double)FLT_MAX) : NULL;
    if (j->err->code || routes_begin(r, (int32_t)(n_offsets - 1), &room, j->err) < 0 ||
        routes_reserve(r, n > 0 ? n : 1, j->err) < 0)
        return j->err->code;
    memcpy(r->offset, offset, sizeof *offset * (size_t)n_offsets);
    memcpy(r->expert, expert, sizeof *expert * (size_t)n);
    r->n = n;
    for (int32_t t = 0; t < r->n_tokens; t++)
        for (int64_t i = offset[t]; i < offset[t + 1]; i++)
            r->weight[i] = weight ? weight[i] : 1 / (float)(offset[t + 1] - offset[t]);
    char who[600];
    snprintf(who, sizeof who, "%s: %s", j->file, key);
    return routes_check(r, max_experts, who, j->err);
}
