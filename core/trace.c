/* SPDX-License-Identifier: Apache-2.0
 *
 * trace.c - opening and checking a trace directory, and reading it token by token.
 *
 * One table says which files a trace may hold, of which dtype and shape; everything else follows from it. After
 * trace_open has returned 0, no reader has to check anything again.
 */
#include "config.h"

#include "sha256.h"
#include "trace.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum check { CHECK_NONE, CHECK_FINITE, CHECK_NATURAL }; /* NATURAL: 0 or more */

/* dims: T tokens, L layers, K top_k, E experts, R requests, O requests + 1, S at most tokens, D any. In name order. */
static const struct part {
    const char *file, *dtypes, *dims;
    size_t field;
    bool required;
    enum check check;
} parts[] = {
    { "domains.npy", "u1", "R", offsetof(struct trace, domains), false, CHECK_NONE },
    { "experts.npy", "u1|u2", "TLK", offsetof(struct trace, experts), true, CHECK_NONE },
    { "gate.npy", "f4", "LED", offsetof(struct trace, gate), false, CHECK_FINITE },
    { "hidden.npy", "f2|f4", "SLD", offsetof(struct trace, hidden), false, CHECK_FINITE },
    { "importance.npy", "f2|f4", "T", offsetof(struct trace, importance), false, CHECK_FINITE },
    { "logits.npy", "f2|f4", "TLE", offsetof(struct trace, logits), false, CHECK_FINITE },
    { "offsets.npy", "i8", "O", offsetof(struct trace, offsets), true, CHECK_NONE },
    { "positions.npy", "i4", "T", offsetof(struct trace, positions), false, CHECK_NATURAL },
    { "token_ids.npy", "i4", "T", offsetof(struct trace, token_ids), false, CHECK_NATURAL },
    { "trace.json", NULL, NULL, 0, true, CHECK_NONE }, /* not an array: read by read_meta */
    { "weights.npy", "f2|f4", "TLK", offsetof(struct trace, weights), false, CHECK_FINITE },
};
enum { N_PARTS = sizeof parts / sizeof *parts };

/* The field of part i, or NULL if it is not an array. */
static struct npy *part_array(struct trace *t, int i)
{
    return parts[i].dtypes ? (struct npy *)((char *)t + parts[i].field) : NULL;
}

bool trace_has_part(const char *file)
{
    for (int i = 0; i < N_PARTS; i++)
        if (!strcmp(file, parts[i].file))
            return true;
    return false;
}

/* ---- trace.json ---- */

static int read_count(const struct trace *t, const char *key, int64_t min, int64_t max, int64_t *out, struct err *err)
{
    const json_t *v = json_object_get(t->meta, key);
    if (!v)
        return err_set(err, ERR_INPUT, "%s/trace.json: no key \"%s\", expected an integer", t->dir, key);
    if (!json_is_integer(v)) {
        char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT);
        int rc = err_set(err, ERR_INPUT, "%s/trace.json: \"%s\" is %.40s, expected an integer", t->dir, key,
                         text ? text : "not one");
        free(text);
        return rc;
    }
    *out = json_integer_value(v);
    if (*out < min || *out > max)
        return err_set(err, ERR_INPUT, "%s/trace.json: \"%s\" is %" PRId64 ", expected %" PRId64 "..%" PRId64, t->dir,
                       key, *out, min, max);
    return 0;
}

static int read_meta(struct trace *t, struct err *err)
{
    char path[540];
    json_error_t e;
    int64_t layers, experts, top_k, requests, tokens;
    int rc;
    snprintf(path, sizeof path, "%s/trace.json", t->dir);
    if (access(path, R_OK) < 0)
        return err_set(err, ERR_INPUT, "%s: %s", path, strerror(errno));
    t->meta = json_load_file(path, JSON_REJECT_DUPLICATES, &e);
    if (!t->meta)
        return err_set(err, ERR_INPUT, "%s:%d: %s", path, e.line, err_unquote(e.text));
    if (!json_is_object(t->meta))
        return err_set(err, ERR_INPUT, "%s: not an object, expected {\"layers\": ..., ...}", path);
    if ((rc = read_count(t, "layers", 1, 65536, &layers, err)) < 0 ||
        (rc = read_count(t, "experts", 1, 65536, &experts, err)) < 0 ||
        (rc = read_count(t, "top_k", 1, experts, &top_k, err)) < 0 ||
        (rc = read_count(t, "requests", 0, INT32_MAX - 1, &requests, err)) < 0 ||
        (rc = read_count(t, "tokens", 0, INT64_MAX / 65536 / 65536, &tokens, err)) < 0)
        return rc;
    t->n_layers = (int32_t)layers;
    t->n_experts = (int32_t)experts;
    t->top_k = (int32_t)top_k;
    t->n_requests = (int32_t)requests;
    t->n_tokens = tokens;
    return 0;
}

/* ---- checks that are about routing ---- */

/* In range, and no expert twice in a row. seen[e]: the row that had e last, counted from 1. */
#define CHECK_EXPERTS(NAME, TYPE)                                                                    \
    static int64_t NAME(const TYPE *id, int64_t n_rows, int32_t k, int32_t n_experts, int64_t *seen) \
    {                                                                                                \
        for (int64_t row = 1; row <= n_rows; row++, id += k)                                         \
            for (int32_t i = 0; i < k; i++) {                                                        \
                if (id[i] >= n_experts || seen[id[i]] == row)                                        \
                    return (row - 1) * k + i;                                                        \
                seen[id[i]] = row;                                                                   \
            }                                                                                        \
        return -1;                                                                                   \
    }
CHECK_EXPERTS(first_bad_u1, uint8_t)
CHECK_EXPERTS(first_bad_u2, uint16_t)

static int check_experts(const struct trace *t, struct err *err)
{
    const struct npy *a = &t->experts;
    int64_t n_rows = t->n_tokens * t->n_layers;
    int64_t *seen = calloc((size_t)t->n_experts, sizeof *seen);
    char text[96];
    if (!seen)
        return err_set(err, ERR_MEMORY, "%s: no memory", a->path);
    int64_t i = a->item_bytes == 1 ? first_bad_u1(a->data, n_rows, t->top_k, t->n_experts, seen)
                                   : first_bad_u2(a->data, n_rows, t->top_k, t->n_experts, seen);
    free(seen);
    if (i < 0)
        return 0;
    int64_t id = npy_int(a, i);
    if (id >= t->n_experts)
        return err_set(err, ERR_INPUT, "%s%s: found expert %" PRId64 ", expected 0..%d", a->path,
                       npy_element(a, i, text), id, t->n_experts - 1);
    return err_set(err, ERR_INPUT, "%s%s: found expert %" PRId64 " a second time, expected %d different ones", a->path,
                   npy_element(a, i, text), id, t->top_k);
}

static int check_offsets(const struct trace *t, struct err *err)
{
    const int64_t *at = t->offsets.data;
    const char *path = t->offsets.path;
    if (at[0] != 0)
        return err_set(err, ERR_INPUT, "%s[0]: found %" PRId64 ", expected 0", path, at[0]);
    for (int32_t r = 1; r <= t->n_requests; r++)
        if (at[r] < at[r - 1])
            return err_set(err, ERR_INPUT, "%s[%d]: found %" PRId64 ", expected at least %" PRId64 ", the one before",
                           path, r, at[r], at[r - 1]);
    if (at[t->n_requests] != t->n_tokens)
        return err_set(err, ERR_INPUT, "%s[%d]: found %" PRId64 ", expected %" PRId64 ", the number of tokens", path,
                       t->n_requests, at[t->n_requests], t->n_tokens);
    return 0;
}

/* Relations between files that the table cannot say. */
static int check_relations(const struct trace *t, struct err *err)
{
    if (t->hidden.data && t->hidden.shape[0] > t->n_tokens)
        return err_set(err, ERR_INPUT, "%s: %" PRId64 " tokens, expected at most the trace's %" PRId64, t->hidden.path,
                       t->hidden.shape[0], t->n_tokens);
    if (t->hidden.data && t->gate.data && t->hidden.shape[2] != t->gate.shape[2])
        return err_set(err, ERR_INPUT, "%s: width %" PRId64 ", expected %" PRId64 " as in gate.npy", t->hidden.path,
                       t->hidden.shape[2], t->gate.shape[2]);
    const json_t *names = json_object_get(t->meta, "domains");
    if (t->domains.data && json_is_array(names))
        return npy_expect_range(&t->domains, 0, (int64_t)json_array_size(names) - 1, err);
    return 0;
}

/* ---- opening ---- */

static int open_part(struct trace *t, int i, struct err *err)
{
    const struct part *p = &parts[i];
    struct npy *a = part_array(t, i);
    char path[540];
    int64_t shape[NPY_MAX_DIMS];
    int n_dims = 0, rc;
    if (!a)
        return 0;
    snprintf(path, sizeof path, "%s/%s", t->dir, p->file);
    if (!p->required && access(path, F_OK) < 0 && errno == ENOENT)
        return 0;
    if ((rc = npy_open(a, path, err)) < 0)
        return rc;
    for (const char *d = p->dims; *d; d++)
        shape[n_dims++] = *d == 'T'   ? t->n_tokens
                          : *d == 'L' ? t->n_layers
                          : *d == 'K' ? t->top_k
                          : *d == 'E' ? t->n_experts
                          : *d == 'R' ? t->n_requests
                          : *d == 'O' ? (int64_t)t->n_requests + 1
                                      : -1;
    if ((rc = npy_expect(a, p->dtypes, n_dims, shape, err)) < 0)
        return rc;
    return p->check == CHECK_FINITE    ? npy_expect_finite(a, err)
           : p->check == CHECK_NATURAL ? npy_expect_range(a, 0, INT32_MAX, err)
                                       : 0;
}

int trace_open(struct trace *t, const char *dir, struct err *err)
{
    struct stat st;
    size_t n = strlen(dir);
    int rc;
    memset(t, 0, sizeof *t);
    while (n > 1 && dir[n - 1] == '/')
        n--;
    if (n + 32 > sizeof t->dir)
        return err_set(err, ERR_INPUT, "%s: path of %zu bytes, expected fewer than %zu", dir, n, sizeof t->dir - 32);
    memcpy(t->dir, dir, n);
    if (stat(t->dir, &st) < 0)
        return err_set(err, ERR_INPUT, "%s: %s; expected a trace directory", t->dir, strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return err_set(err, ERR_INPUT, "%s: not a directory; expected one with trace.json and experts.npy", t->dir);
    rc = read_meta(t, err);
    for (int i = 0; i < N_PARTS && rc == 0; i++)
        rc = open_part(t, i, err);
    if (rc == 0)
        rc = check_offsets(t, err);
    if (rc == 0)
        rc = check_experts(t, err);
    if (rc == 0)
        rc = check_relations(t, err);
    if (rc < 0)
        trace_close(t);
    return rc;
}

void trace_close(struct trace *t)
{
    for (int i = 0; i < N_PARTS; i++)
        if (part_array(t, i))
            npy_close(part_array(t, i));
    json_decref(t->meta);
    t->meta = NULL;
}

/* ---- reading ---- */

void trace_fetch(const struct trace *t, int64_t token, int32_t layer)
{
    const char *ids = t->experts.data;
    __builtin_prefetch(ids + (token * t->n_layers + layer) * t->top_k * t->experts.item_bytes);
}

void trace_experts(const struct trace *t, int64_t token, int32_t layer, int32_t *out)
{
    int32_t k = t->top_k;
    int64_t at = (token * t->n_layers + layer) * k;
    if (t->experts.item_bytes == 1) {
        const uint8_t *id = (const uint8_t *)t->experts.data + at;
        for (int32_t i = 0; i < k; i++)
            out[i] = id[i];
    } else {
        const uint16_t *id = (const uint16_t *)t->experts.data + at;
        for (int32_t i = 0; i < k; i++)
            out[i] = id[i];
    }
}

void trace_weights(const struct trace *t, int64_t token, int32_t layer, float *out)
{
    int32_t k = t->top_k;
    if (t->weights.data)
        npy_floats(&t->weights, (token * t->n_layers + layer) * k, k, out);
    else
        for (int32_t i = 0; i < k; i++)
            out[i] = 1.0f / (float)k;
}

int32_t trace_request(const struct trace *t, int64_t token)
{
    const int64_t *at = t->offsets.data;
    int32_t low = 0, high = t->n_requests; /* at[low] <= token < at[high] */
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (at[middle] <= token)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* The hash is of the text that `sha256sum FILE...` prints, so that it can be had without moelab. */
int trace_checksum(const struct trace *t, char hex[65], struct err *err)
{
    struct sha256 sum;
    sha256_init(&sum);
    for (int i = 0; i < N_PARTS; i++) {
        char path[540], line[128];
        snprintf(path, sizeof path, "%s/%s", t->dir, parts[i].file);
        if (!parts[i].required && access(path, F_OK) < 0)
            continue;
        int rc = sha256_file(path, hex, err);
        if (rc < 0)
            return rc;
        int n = snprintf(line, sizeof line, "%s  %s\n", hex, parts[i].file);
        sha256_update(&sum, line, (size_t)n);
    }
    sha256_final(&sum, hex);
    return 0;
}
