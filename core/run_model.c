/* SPDX-License-Identifier: Apache-2.0
 * run_model.c - reads a specification's `model` and `layout`.
 *
 *   model      sizes of MoE layers; attention {kind, ...} or n_heads, n_kv_heads, d_head; vocab; dense {layers,
 *              interleave, d_ff}; precision, weight_bytes; dispatch and combine (precisions on the wire) or act_bytes
 *              and combine_bytes (bytes of a value)
 *   layout     attention {dp, tp}, experts {ep, etp}: expert_groups.c */
#include "config.h"

#include "layer.h"
#include "run.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

int run_number(struct run *r, const json_t *from, const char *table, const char *key, double def, double min,
               double max, double *out)
{
    const json_t *v = json_object_get(from, key);
    char found[PARAM_FOUND];
    *out = def;
    if (v && !json_is_number(v))
        return err_set(r->err, ERR_INPUT, "%s: %s.%s: expected a number, found %s", r->where, table, key,
                       param_found(v, found));
    if (v)
        *out = json_number_value(v);
    if (isnan(*out))
        return err_set(r->err, ERR_INPUT, "%s: %s.%s: is missing", r->where, table, key);
    if (!(*out >= min && *out <= max))
        return err_set(r->err, ERR_INPUT, "%s: %s.%s: %g is out of range, expected %g to %g", r->where, table, key,
                       *out, min, max);
    return 0;
}

int run_whole(struct run *r, const json_t *from, const char *table, const char *key, double def, int32_t min,
              int32_t max, int32_t *out)
{
    double x;
    if (run_number(r, from, table, key, def, min, max, &x) < 0)
        return r->err->code;
    if (x != floor(x))
        return err_set(r->err, ERR_INPUT, "%s: %s.%s: expected a whole number, found %g", r->where, table, key, x);
    *out = (int32_t)x;
    return 0;
}

/* A table: absent (0), or an object with none but these keys. */
static int check_table(struct run *r, const json_t *t, const char *name, const char *const *known)
{
    char found[PARAM_FOUND];
    size_t n = 0;
    const char *k;
    json_t *v;
    if (t && !json_is_object(t))
        return err_set(r->err, ERR_INPUT, "%s: %s: expected a table, found %s", r->where, name, param_found(t, found));
    while (known[n])
        n++;
    json_object_foreach((json_t *)(uintptr_t)t, k, v) {
        size_t i = 0;
        while (i < n && strcmp(known[i], k))
            i++;
        const char *near = i == n ? err_nearest(k, known, (int)n) : NULL;
        if (i == n)
            return err_set(r->err, ERR_INPUT, "%s: %s: unknown key \"%s\"%s%s%s", r->where, name, k,
                           near ? "; did you mean \"" : "", near ? near : "", near ? "\"?" : "");
    }
    return 0;
}

static int get_table(struct run *r, const json_t *from, const char *table, const char *key, const char *const *known,
                     const json_t **out)
{
    char name[64];
    snprintf(name, sizeof name, "%s.%s", table, key);
    return check_table(r, *out = json_object_get(from, key), name, known);
}

static int read_precision(struct run *r, const json_t *m, const char *key, const char *def, enum precision *out)
{
    const json_t *v = json_object_get(m, key);
    char found[PARAM_FOUND];
    if (v && !json_is_string(v))
        return err_set(r->err, ERR_INPUT, "%s: model.%s: expected a precision's name, found %s", r->where, key,
                       param_found(v, found));
    const char *name = v ? json_string_value(v) : def;
    int p = 0;
    while (p < N_PRECISIONS && strcmp(name, precision_name[p]))
        p++;
    if (p == N_PRECISIONS) {
        const char *near = err_nearest(name, precision_name, N_PRECISIONS);
        return err_set(r->err, ERR_INPUT, "%s: model.%s: unknown precision \"%s\"%s%s%s", r->where, key, name,
                       near ? "; did you mean \"" : "", near ? near : "", near ? "\"?" : "");
    }
    *out = (enum precision)p;
    return 0;
}

/* Bytes of one value on the wire, by the name of a precision or as a number. Below 16 bits, every 128 values of a row
 * travel with a scale of 4 bytes. */
static int read_wire(struct run *r, const json_t *m, const char *name, const char *bytes, double *out)
{
    enum precision p;
    if (!json_object_get(m, name))
        return run_number(r, m, "model", bytes, layer_element_bytes(r->precision), 0.5, 8, out);
    if (json_object_get(m, bytes))
        return err_set(r->err, ERR_INPUT, "%s: model.%s: is given beside model.%s, and says the same: expected one of "
                       "them", r->where, bytes, name);
    if (read_precision(r, m, name, "bf16", &p) < 0)
        return r->err->code;
    const double d = r->model.d_model;
    *out = compute_element_bytes(p) + (compute_element_bytes(p) < 2 ? 4 * ceil(d / 128) / d : 0);
    return 0;
}

static int read_attention(struct run *r, const json_t *m)
{
    static const char *const known[] = { "kind", "n_heads", "n_kv_heads", "d_head", "q_lora", "kv_lora", "nope", "rope",
                                         "v", NULL };
    static const char *const kinds[] = { "gqa", "mla" }, *const latent[] = { "q_lora", "kv_lora", "nope", "rope", "v" };
    struct attention_shape *a = &r->attention;
    const json_t *t;
    if (get_table(r, m, "model", "attention", known, &t) < 0)
        return r->err->code;
    const char *where = t ? "model.attention" : "model", *kind = json_string_value(json_object_get(t, "kind"));
    char found[PARAM_FOUND];
    if (t && (!kind || (strcmp(kind, "gqa") && strcmp(kind, "mla"))))
        return err_set(r->err, ERR_INPUT, "%s: model.attention.kind: expected \"gqa\" or \"mla\", found %s", r->where,
                       param_found(json_object_get(t, "kind"), found));
    a->kind = kind && !strcmp(kind, kinds[1]) ? ATTENTION_MLA : ATTENTION_GQA;
    static const char *const plain[] = { "n_heads", "n_kv_heads", "d_head" };
    for (int i = 0; i < 3; i++) {
        if (t && json_object_get(m, plain[i]))
            return err_set(r->err, ERR_INPUT, "%s: model.%s: is given beside model.attention, where it belongs",
                           r->where, plain[i]);
        if (i > 0 && a->kind == ATTENTION_MLA && json_object_get(t, plain[i]))
            return err_set(r->err, ERR_INPUT, "%s: model.attention.%s: kind \"mla\" has none: nope, rope and v are its "
                           "heads' widths", r->where, plain[i]);
    }
    for (int i = 0; i < 5; i++)
        if (a->kind == ATTENTION_GQA && json_object_get(t, latent[i]))
            return err_set(r->err, ERR_INPUT, "%s: model.attention.%s: kind \"gqa\" has none", r->where, latent[i]);
    const json_t *from = t ? t : m;
    if (run_whole(r, from, where, "n_heads", NAN, 1, 1 << 16, &a->n_heads) < 0)
        return r->err->code;
    if (a->kind == ATTENTION_GQA)
        return run_whole(r, from, where, "n_kv_heads", a->n_heads, 1, 1 << 16, &a->n_kv_heads) < 0 ||
               run_whole(r, from, where, "d_head", NAN, 1, 1 << 16, &a->d_head) < 0 ? r->err->code : 0;
    return run_whole(r, from, where, "q_lora", 0, 0, 1 << 20, &a->q_lora) < 0 ||
           run_whole(r, from, where, "kv_lora", NAN, 1, 1 << 20, &a->kv_lora) < 0 ||
           run_whole(r, from, where, "nope", NAN, 1, 1 << 16, &a->nope) < 0 ||
           run_whole(r, from, where, "rope", NAN, 0, 1 << 16, &a->rope) < 0 ||
           run_whole(r, from, where, "v", NAN, 1, 1 << 16, &a->v) < 0 ? r->err->code : 0;
}

static int read_dense(struct run *r, const json_t *m)
{
    static const char *const known[] = { "layers", "interleave", "d_ff", NULL };
    const json_t *t;
    r->dense.interleave = 1;
    if (get_table(r, m, "model", "dense", known, &t) < 0)
        return r->err->code;
    if (!t)
        return 0;
    if (run_whole(r, t, "model.dense", "layers", 0, 0, 1000, &r->dense.n_first) < 0 ||
        run_whole(r, t, "model.dense", "interleave", 1, 1, 1000, &r->dense.interleave) < 0 ||
        run_whole(r, t, "model.dense", "d_ff", NAN, 1, 1 << 24, &r->dense.width) < 0)
        return r->err->code;
    if (r->dense.n_first == 0 && r->dense.interleave == 1)
        return err_set(r->err, ERR_INPUT, "%s: model.dense: neither layers nor interleave says that there are any",
                       r->where);
    return 0;
}

int run_read_model(struct run *r, const json_t *m)
{
    struct moe_model *o = &r->model;
    if (read_precision(r, m, "precision", "bf16", &r->precision) < 0 ||
        run_whole(r, m, "model", "layers", NAN, 1, 1000, &o->n_layers) < 0 ||
        run_whole(r, m, "model", "experts", NAN, 1, 65535, &o->n_experts) < 0 ||
        run_whole(r, m, "model", "top_k", NAN, 1, 1024, &o->top_k) < 0 ||
        run_whole(r, m, "model", "shared", 0, 0, 64, &o->n_shared) < 0 ||
        run_whole(r, m, "model", "d_model", NAN, 1, 1 << 20, &o->d_model) < 0 ||
        run_whole(r, m, "model", "d_expert", NAN, 1, 1 << 20, &o->d_expert) < 0 || read_attention(r, m) < 0 ||
        run_whole(r, m, "model", "vocab", 0, 0, 1 << 24, &r->vocab) < 0 || read_dense(r, m) < 0 ||
        run_number(r, m, "model", "weight_bytes", compute_element_bytes(r->precision), 0.05, 8, &o->weight_bytes) < 0 ||
        read_wire(r, m, "dispatch", "act_bytes", &o->act_bytes) < 0 ||
        read_wire(r, m, "combine", "combine_bytes", &o->combine_bytes) < 0)
        return r->err->code;
    if (o->top_k > o->n_experts)
        return err_set(r->err, ERR_INPUT, "%s: model.top_k: %d is more than the %d experts there are", r->where,
                       o->top_k, o->n_experts);
    return 0;
}

/* Experts in edp groups of ep x etp devices. One group of whole experts is what there always is: placement makes what
 * replicas it likes, and devices may hold none. */
static int read_groups(struct run *r)
{
    const int32_t n = r->topology->n_devices;
    const int64_t group = (int64_t)r->ep * r->etp;
    if (group > n || n % group)
        return err_set(r->err, ERR_INPUT, "%s: layout.experts: ep x etp = %d x %d = %lld, and machine %s has %d "
                       "devices: expected ep x etp x edp = %d, edp being a whole number of groups that hold all "
                       "experts each", r->where, r->ep, r->etp, (long long)group, r->topology->name, n, n);
    r->edp = (int32_t)(n / group);
    if (r->ep > r->model.n_experts && (r->edp > 1 || r->etp > 1))
        return err_set(r->err, ERR_INPUT, "%s: layout.experts.ep: %d is more than the model's %d experts (etp %d, edp "
                       "%d)", r->where, r->ep, r->model.n_experts, r->etp, r->edp);
    if (r->model.d_expert % r->etp)
        return err_set(r->err, ERR_INPUT, "%s: layout.experts.etp: %d does not divide model.d_expert, %d", r->where,
                       r->etp, r->model.d_expert);
    if (r->etp > 1 && r->graph.keep_items)
        return err_set(r->err, ERR_INPUT, "%s: layout.experts.etp: %d, and machine host computes whole experts: "
                       "expected 1", r->where, r->etp);
    return 0;
}

int run_read_layout(struct run *r, const json_t *layout)
{
    static const char *const known[] = { "attention", "experts", NULL };
    static const char *const attention[] = { "dp", "tp", NULL }, *const experts[] = { "ep", "etp", NULL };
    const json_t *a, *x;
    int32_t dp;
    const int32_t n = r->topology->n_devices;
    r->tp = 1;
    if (check_table(r, layout, "layout", known) < 0 ||
        get_table(r, layout, "layout", "attention", attention, &a) < 0 ||
        get_table(r, layout, "layout", "experts", experts, &x) < 0 ||
        run_whole(r, a, "layout.attention", "tp", 1, 1, 1 << 20, &r->tp) < 0 ||
        run_whole(r, a, "layout.attention", "dp", fmax(1, n / r->tp), 1, 1 << 20, &dp) < 0 ||
        run_whole(r, x, "layout.experts", "etp", 1, 1, 1 << 20, &r->etp) < 0 ||
        run_whole(r, x, "layout.experts", "ep", fmax(1, n / r->etp), 1, 1 << 20, &r->ep) < 0)
        return r->err->code;
    if ((int64_t)dp * r->tp != n)
        return err_set(r->err, ERR_INPUT, "%s: layout.attention: dp x tp = %d x %d = %lld, and machine %s has %d "
                       "devices", r->where, dp, r->tp, (long long)dp * r->tp, r->topology->name, n);
    if (read_groups(r) < 0)
        return r->err->code;
    if (r->tp > r->attention.n_heads)
        return err_set(r->err, ERR_INPUT, "%s: layout.attention.tp: %d is more than the model's %d heads", r->where,
                       r->tp, r->attention.n_heads);
    if (r->tp > 1 && r->graph.keep_items)
        return err_set(r->err, ERR_INPUT, "%s: layout.attention.tp: machine host computes no attention: expected 1",
                       r->where);
    return 0;
}
