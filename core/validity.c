/* SPDX-License-Identifier: Apache-2.0
 * validity.c - ranges of the models of a simulated machine. Outside of one a run is refused, or marked if it asks for
 * that (allow_extrapolation).
 *
 * What the models were measured against is narrower (doc/models.md): these are the bounds beyond which their causes no
 * longer hold, so that a figure would mean nothing. */
#include "config.h"

#include "models.h"
#include "run.h"

#include <math.h>
#include <stdio.h>

enum quantity { GEMM_COLUMNS, GEMM_SUM, ATTENTION_WIDTH, ATTENTION_CONTEXT, ROW_BYTES, N_QUANTITIES };

static const struct {
    const char *model, *name;
    double low, high;
    const char *why;
} limit[N_QUANTITIES] = {
    [GEMM_COLUMNS] = { "gemm", "columns of a weight matrix", 1, 1 << 21, "a tile is at most 128 of them" },
    [GEMM_SUM] = { "gemm", "rows of a weight matrix", 64, 1 << 18, "a tile's loop takes steps of 64" },
    [ATTENTION_WIDTH] = { "attention", "values of a head", 16, 1024, "heads are kept on chip" },
    [ATTENTION_CONTEXT] = { "attention", "context", 0, 1 << 21, "the cache is read once, in one pass" },
    [ROW_BYTES] = { "exchange", "bytes of a row", 64, 1 << 22, "rows are copied in packets of 64 bytes or more" },
};

struct extremes { double least[N_QUANTITIES], most[N_QUANTITIES]; };

static void see(struct extremes *x, enum quantity q, double value)
{
    x->least[q] = fmin(x->least[q], value);
    x->most[q] = fmax(x->most[q], value);
}

static void see_matrix(struct extremes *x, double columns, double rows)
{
    see(x, GEMM_COLUMNS, columns);
    see(x, GEMM_SUM, rows);
}

static void see_experts(struct extremes *x, const struct moe_model *m, int32_t n_shards)
{
    see_matrix(x, 2.0 * m->d_expert / n_shards, m->d_model);
    see_matrix(x, m->d_model, (double)m->d_expert / n_shards);
}

static void see_all(struct extremes *x, const struct run *r)
{
    const struct moe_model *m = &r->model;
    const struct attention_shape *a = &r->attention;
    const struct layer_part part = { m, a, r->precision, r->workload.phase, 1, r->workload.context, r->tp };
    struct kernels all = { .n = 0 };
    layer_attention(&all, &part);
    layer_gate(&all, &part, m->n_experts);
    if (r->dense.width > 0)
        layer_ffn(&all, &part, ceil((double)r->dense.width / r->tp));
    if (r->vocab > 0)
        layer_head(&all, &part, r->vocab, 1);
    for (int32_t i = 0; i < all.n; i++)
        if (all.kernel[i].groups > 0)
            see_matrix(x, (double)all.kernel[i].shape.n, (double)all.kernel[i].shape.k);
    see_experts(x, m, r->etp);
    see(x, ATTENTION_WIDTH, a->kind == ATTENTION_MLA ? a->nope + a->rope : a->d_head);
    see(x, ATTENTION_CONTEXT, r->workload.context);
    see(x, ROW_BYTES, m->d_model * m->act_bytes);
    see(x, ROW_BYTES, m->d_model * m->combine_bytes);
}

static void see_nothing(struct extremes *x)
{
    for (int q = 0; q < N_QUANTITIES; q++) {
        x->least[q] = INFINITY;
        x->most[q] = -INFINITY;
    }
}

/* Whether some of a quantity is outside; text: what. */
static bool outside(const struct extremes *x, int q, char text[300])
{
    const bool below = x->least[q] < limit[q].low;
    snprintf(text, 300, "model %s: %s: %g is outside its range, %g to %g (%s)", limit[q].model, limit[q].name,
             below ? x->least[q] : x->most[q], limit[q].low, limit[q].high, limit[q].why);
    return below || x->most[q] > limit[q].high;
}

json_t *models_extrapolated(const struct moe_model *m, const double row_bytes[2])
{
    struct extremes x;
    char text[300];
    json_t *list = NULL;
    see_nothing(&x);
    see_experts(&x, m, 1);
    for (int i = 0; i < 2; i++)
        if (row_bytes[i] > 0)
            see(&x, ROW_BYTES, row_bytes[i]);
    for (int q = 0; q < N_QUANTITIES; q++)
        if (outside(&x, q, text) && (list || (list = json_array())))
            json_array_append_new(list, json_string(text));
    return list;
}

int validity_check(struct run *r, bool allow)
{
    struct extremes x;
    see_nothing(&x);
    see_all(&x, r);
    for (int q = 0; q < N_QUANTITIES; q++) {
        char text[300];
        if (!outside(&x, q, text))
            continue;
        if (!allow)
            return err_set(r->err, ERR_INPUT, "%s: %s; --allow-extrapolation goes on and marks the result", r->where,
                           text);
        if (!r->extrapolated)
            r->extrapolated = json_array();
        if (json_array_append_new(r->extrapolated, json_string(text)))
            return err_set(r->err, ERR_MEMORY, "out of memory");
    }
    return 0;
}
