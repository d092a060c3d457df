/* SPDX-License-Identifier: Apache-2.0
 *
 * trace_import.c - what serving engines record, made into traces.
 *
 * vllm: an integer array [tokens, layers, k] of expert ids (vLLM's routed experts are int16). Padded positions hold
 * negative ids in every place; dense layers hold zeros; profiling runs leave long stretches of one repeated row.
 */
#include "config.h"

#include "trace.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A token of the input: is all of it padding? A token that is padding in some places only is an error. */
static int token_is_padding(const struct npy *in, int64_t token, int32_t first_layer, bool *padding, struct err *err)
{
    int64_t n = in->shape[1] * in->shape[2], skip = first_layer * in->shape[2];
    int64_t at = token * n, negative = -1, n_negative = 0;
    for (int64_t i = skip; i < n; i++)
        if (npy_int(in, at + i) < 0) {
            n_negative++;
            negative = negative < 0 ? at + i : negative;
        }
    char text[96];
    if (n_negative && n_negative < n - skip)
        return err_set(err, ERR_INPUT,
                       "%s%s: found %" PRId64 ", expected 0 or more: only %" PRId64 " of this token's %" PRId64
                       " ids are negative, so it is not padding",
                       in->path, npy_element(in, negative, text), npy_int(in, negative), n_negative, n - skip);
    *padding = n_negative > 0;
    return 0;
}

struct source {
    struct npy ids, offsets;
    int64_t *kept; /* [requests + 1] offsets once padding is left out */
    int32_t n_requests;
};

/* Requests as the input counts them; without a file, everything is one request. */
static int open_offsets(struct source *s, const char *path, struct err *err)
{
    int64_t shape[1] = { -1 }, n_tokens = s->ids.shape[0];
    int rc;
    s->n_requests = 1;
    if (path) {
        if ((rc = npy_open(&s->offsets, path, err)) < 0 ||
            (rc = npy_expect(&s->offsets, "i8|i4|u8|u4", 1, shape, err)) < 0)
            return rc;
        if (s->offsets.count < 1 || s->offsets.count > INT32_MAX)
            return err_set(err, ERR_INPUT, "%s: %" PRId64 " offsets, expected requests + 1", path, s->offsets.count);
        for (int64_t r = 0; r < s->offsets.count; r++) {
            int64_t at = npy_int(&s->offsets, r), before = r ? npy_int(&s->offsets, r - 1) : 0;
            bool last = r == s->offsets.count - 1;
            if ((r == 0 && at != 0) || at < before || at > n_tokens || (last && at != n_tokens))
                return err_set(err, ERR_INPUT,
                               "%s[%" PRId64 "]: found %" PRId64 "; offsets go from 0 to %" PRId64
                               ", the number of tokens, and never decrease",
                               path, r, at, n_tokens);
        }
        s->n_requests = (int32_t)(s->offsets.count - 1);
    }
    s->kept = calloc((size_t)s->n_requests + 1, sizeof *s->kept);
    return s->kept ? 0 : err_set(err, ERR_MEMORY, "%s: no memory", s->ids.path);
}

/* First pass: what is kept, the largest id, and how long the same token repeats. */
static int survey(const struct trace_import *how, struct source *s, struct trace_import_report *report, struct err *err)
{
    const struct npy *in = &s->ids;
    int64_t n = in->shape[1] * in->shape[2], run = 1, max = -1;
    size_t item = (size_t)in->item_bytes, row = (size_t)n * item;
    const char *data = in->data;
    int32_t request = 0;
    for (int64_t token = 0; token < in->shape[0]; token++) {
        bool padding = false;
        char text[96];
        int rc = token_is_padding(in, token, how->first_layer, &padding, err);
        if (rc < 0)
            return rc;
        while (s->offsets.data && request < s->n_requests && token >= npy_int(&s->offsets, request + 1))
            s->kept[++request] = report->n_tokens;
        if (padding && !how->drop_padding)
            return err_set(err, ERR_INPUT,
                           "%s%s: found %" PRId64 ", expected an expert id; this whole token is "
                           "padding: leave such tokens out with --drop-padding",
                           in->path, npy_element(in, token * n + how->first_layer * in->shape[2], text),
                           npy_int(in, token * n + how->first_layer * in->shape[2]));
        if (padding) {
            report->n_dropped++;
            run = 0;
            continue;
        }
        for (int64_t i = how->first_layer * in->shape[2]; i < n; i++) {
            int64_t id = npy_int(in, token * n + i);
            max = id > max ? id : max;
            if (how->n_experts && id >= how->n_experts)
                return err_set(err, ERR_INPUT, "%s%s: found expert %" PRId64 ", expected 0..%d", in->path,
                               npy_element(in, token * n + i, text), id, how->n_experts - 1);
        }
        bool repeats =
            run > 0 && token > 0 && !memcmp(data + (size_t)token * row, data + (size_t)(token - 1) * row, row);
        run = repeats ? run + 1 : 1;
        if (run > report->longest_run) {
            report->longest_run = run;
            report->longest_run_at = token - run + 1;
        }
        report->n_tokens++;
    }
    while (request < s->n_requests)
        s->kept[++request] = report->n_tokens;
    report->n_experts = how->n_experts ? how->n_experts : (int32_t)(max < 65535 ? max + 1 : 65537);
    if (report->n_experts < 1 || report->n_experts > 65536)
        return err_set(err, ERR_INPUT, "%s: the largest id is %" PRId64 ", expected 0..65535", in->path, max);
    return 0;
}

/* Second pass: ids of the kept tokens, a token at a time. */
static int copy_ids(const struct trace_import *how, const struct source *s, const struct trace_import_report *report,
                    struct trace_out *out, struct err *err)
{
    const struct npy *in = &s->ids;
    int64_t layers = in->shape[1] - how->first_layer, k = in->shape[2], n = layers * k;
    int64_t shape[3] = { report->n_tokens, layers, k };
    bool narrow = report->n_experts <= 256;
    size_t item = narrow ? 1 : 2;
    struct npy_writer w;
    unsigned char *row = malloc((size_t)n * item + 1);
    if (!row)
        return err_set(err, ERR_MEMORY, "%s: no memory", in->path);
    int rc = npy_create(&w, trace_out_path(out, "experts.npy"), narrow ? "u1" : "u2", 3, shape, err);
    for (int64_t token = 0; token < in->shape[0] && rc == 0; token++) {
        int64_t at = (token * in->shape[1] + how->first_layer) * k;
        if (npy_int(in, at) < 0)
            continue;
        for (int64_t i = 0; i < n; i++) {
            uint16_t id = (uint16_t)npy_int(in, at + i);
            if (narrow)
                row[i] = (unsigned char)id;
            else
                memcpy(row + 2 * i, &id, 2);
        }
        rc = npy_append(&w, row, (size_t)n * item, err);
    }
    if (rc == 0)
        rc = npy_finish(&w, err);
    npy_abandon(&w);
    free(row);
    return rc;
}

/* An expert twice in a row of k, in the input's own coordinates: the check when the trace is opened would name
 * those of the output. */
static int check_repeats(const struct trace_import *how, const struct npy *in, int32_t n_experts, struct err *err)
{
    int64_t k = in->shape[2], n_rows = in->shape[0] * in->shape[1];
    int64_t *seen = calloc((size_t)n_experts, sizeof *seen);
    if (!seen)
        return err_set(err, ERR_MEMORY, "%s: no memory", in->path);
    int rc = 0;
    for (int64_t r = 0; r < n_rows && rc == 0; r++) {
        if (r % in->shape[1] < how->first_layer)
            continue;
        for (int64_t i = r * k; i < (r + 1) * k && rc == 0; i++) {
            int64_t id = npy_int(in, i);
            char text[96];
            if (id >= 0 && seen[id] == r + 1)
                rc = err_set(err, ERR_INPUT,
                             "%s%s: found expert %" PRId64 " a second time, expected %" PRId64 " different ones%s",
                             in->path, npy_element(in, i, text), id, k,
                             id == 0 && r % in->shape[1] == how->first_layer
                                 ? " (dense layers record zeros: leave leading ones out with --first-layer)"
                                 : "");
            else if (id >= 0)
                seen[id] = r + 1;
        }
    }
    free(seen);
    return rc;
}

int trace_import_vllm(const struct trace_import *how, const char *dir, struct trace_import_report *report,
                      struct err *err)
{
    struct source s = { .n_requests = 1 };
    struct trace_import_report own;
    struct trace_out out = { .open = false };
    json_t *meta = NULL;
    int64_t any[3] = { -1, -1, -1 };
    int rc;
    report = report ? report : &own;
    memset(report, 0, sizeof *report);
    if (how->n_experts < 0 || how->n_experts > 65536)
        return err_set(err, ERR_INPUT, "experts: found %d, expected 1..65536", how->n_experts);
    if ((rc = npy_open(&s.ids, how->input, err)) < 0 ||
        (rc = npy_expect(&s.ids, "i2|i4|i8|i1|u1|u2|u4", 3, any, err)) < 0)
        goto out;
    if (s.ids.shape[1] < 1 || s.ids.shape[1] > 65536 || s.ids.shape[2] < 1 || s.ids.shape[2] > 65536) {
        rc = err_set(err, ERR_INPUT, "%s: %" PRId64 " layers of %" PRId64 " ids, expected 1..65536 of each", how->input,
                     s.ids.shape[1], s.ids.shape[2]);
        goto out;
    }
    if (how->first_layer < 0 || how->first_layer >= s.ids.shape[1]) {
        rc = err_set(err, ERR_INPUT, "%s: first layer %d, expected 0..%" PRId64, how->input, how->first_layer,
                     s.ids.shape[1] - 1);
        goto out;
    }
    if ((rc = open_offsets(&s, how->offsets, err)) < 0 || (rc = survey(how, &s, report, err)) < 0 ||
        (rc = check_repeats(how, &s.ids, report->n_experts, err)) < 0 || (rc = trace_out_begin(&out, dir, err)) < 0 ||
        (rc = copy_ids(how, &s, report, &out, err)) < 0)
        goto out;
    int64_t n_offsets[1] = { (int64_t)s.n_requests + 1 };
    if ((rc = npy_write(trace_out_path(&out, "offsets.npy"), "i8", 1, n_offsets, s.kept, err)) < 0)
        goto out;
    meta = trace_meta((int32_t)s.ids.shape[1] - how->first_layer, report->n_experts, (int32_t)s.ids.shape[2],
                      s.n_requests, report->n_tokens);
    if (meta) {
        json_object_set_new(meta, "model", json_string(how->model ? how->model : "unknown"));
        json_object_set_new(meta, "captured", json_string("expert ids recorded by vLLM"));
        json_object_set_new(meta, "source", json_string(how->input));
    }
    rc = trace_out_commit(&out, meta, err);
out:
    json_decref(meta);
    trace_out_abandon(&out);
    npy_close(&s.ids);
    npy_close(&s.offsets);
    free(s.kept);
    return rc;
}
