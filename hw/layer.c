/* SPDX-License-Identifier: Apache-2.0
 * layer.c - attention, norms, gates, dense FFNs and the head as lists of kernels. T tokens, C context, H hidden width:
 *
 *   norm        the sum so far and what is added read, the sum and its norm written: 4 T H values
 *   GQA         q, k, v in one GEMM; rotation; the core; the output's GEMM
 *   MLA         down to both latents and the rotary key in one GEMM; up to queries; rotation;
 *               prompts: up to keys and values of all heads; the core on those; the output's GEMM
 *               decode: keys' way up multiplied into queries (one GEMM per head), so that the core reads every token's
 *               latent once for all heads; values' way up likewise after it
 *   the core    prompts see half of C on average, and keys and values come from memory once (tiles of queries find
 *               them in L2); decoding reads the cache, 2 bytes a value (4 in FP32 models), at the 16-bit rate even in
 *               FP8 models
 *
 * Caches, scores' softmax (arithmetic of another unit, behind the matrix products) and dropout cost nothing here. */
#include "config.h"

#include "layer.h"

#include <math.h>

double layer_element_bytes(enum precision p)
{
    return p <= PREC_TF32 ? 4 : 2;
}

static void add(struct kernels *s, struct kernel k)
{
    if (s->n < MAX_KERNELS)
        s->kernel[s->n++] = k;
}

static void gemm(struct kernels *s, const struct layer_part *p, enum precision precision, double groups, double rows,
                 double n, double k, double weight_bytes)
{
    const struct gemm_bytes bytes = { compute_element_bytes(precision), weight_bytes, layer_element_bytes(precision) };
    if (p->tokens > 0)
        add(s, (struct kernel){ precision, (int32_t)groups, { (int64_t)rows, (int64_t)ceil(n), (int64_t)ceil(k) },
                                bytes, 0, 0, { 0 } });
}

static void linear(struct kernels *s, const struct layer_part *p, double rows, double n, double k)
{
    gemm(s, p, p->precision, 1, rows, n, k, p->model->weight_bytes);
}

static void plain(struct kernels *s, const struct layer_part *p, enum precision precision, double flops, double bytes,
                  struct latency_key key)
{
    key.rows = p->tokens;
    if (p->tokens > 0)
        add(s, (struct kernel){ .precision = precision, .flops = flops, .traffic = bytes, .key = key });
}

/* A kernel that moves rows of so many values. */
static struct latency_key rows_of(enum latency_op op, double values)
{
    return (struct latency_key){ .op = op, .n = (int64_t)ceil(values) };
}

static enum precision core_precision(enum precision p)
{
    return compute_element_bytes(p) < 2 ? PREC_BF16 : p;
}

void layer_norm(struct kernels *s, const struct layer_part *p)
{
    plain(s, p, p->precision, 0, 4 * p->tokens * p->model->d_model * layer_element_bytes(p->precision),
          rows_of(LATENCY_NORM, p->model->d_model));
}

static double heads(const struct attention_shape *a, int32_t tp)
{
    return ceil((double)a->n_heads / tp);
}

/* A head of keys and values is not split: beyond that, devices have copies. */
static double kv_heads(const struct attention_shape *a, int32_t tp)
{
    return ceil((double)a->n_kv_heads / tp);
}

/* query, value: their widths, per head; kv: values of one token's keys and values, of this device's n_kv heads. */
static void core(struct kernels *s, const struct layer_part *p, double query, double value, double n_kv, double kv)
{
    const double n_heads = heads(p->attention, p->tp), per_row = n_heads * (query + value);
    const bool decode = p->phase == MOE_DECODE;
    const double pairs = p->tokens * (decode ? p->context : p->context / 2);
    const double read = decode ? p->tokens * p->context : fmax(p->tokens, p->context);
    const struct latency_key key = { .op = decode ? LATENCY_DECODE : LATENCY_PREFILL, .heads = (int32_t)n_heads,
                                     .kv_heads = (int32_t)n_kv, .n = (int64_t)query, .k = (int64_t)value,
                                     .context = p->context };
    plain(s, p, core_precision(p->precision), 2 * pairs * per_row,
          (read * kv + p->tokens * per_row) * layer_element_bytes(p->precision), key);
}

static void gqa(struct kernels *s, const struct layer_part *p)
{
    const struct attention_shape *a = p->attention;
    const double q = heads(a, p->tp) * a->d_head, kv = 2 * kv_heads(a, p->tp) * a->d_head;
    linear(s, p, p->tokens, q + kv, p->model->d_model);
    plain(s, p, p->precision, 0, 2 * p->tokens * (q + kv) * layer_element_bytes(p->precision),
          rows_of(LATENCY_ROTATION, q + kv));
    core(s, p, a->d_head, a->d_head, kv_heads(a, p->tp), kv);
    linear(s, p, p->tokens, p->model->d_model, q);
}

static void mla(struct kernels *s, const struct layer_part *p)
{
    const struct attention_shape *a = p->attention;
    const double n_heads = heads(a, p->tp), key = a->nope + a->rope, latent = a->kv_lora + a->rope, t = p->tokens;
    const enum precision wide = core_precision(p->precision);
    const double direct = a->q_lora > 0 ? a->q_lora : n_heads * key;
    linear(s, p, t, direct + latent, p->model->d_model);
    if (a->q_lora > 0)
        linear(s, p, t, n_heads * key, a->q_lora);
    /* norms of both latents, the rotation of queries and of the one key, and the cache's new rows */
    const double rotated = (a->q_lora > 0 ? a->q_lora : 0) + n_heads * a->rope + latent;
    plain(s, p, p->precision, 0, 2 * t * rotated * layer_element_bytes(p->precision),
          rows_of(LATENCY_ROTATION, rotated));
    if (p->phase == MOE_DECODE) {
        gemm(s, p, wide, n_heads, t, a->kv_lora, a->nope, layer_element_bytes(wide));
        core(s, p, latent, a->kv_lora, 1, latent);
        gemm(s, p, wide, n_heads, t, a->v, a->kv_lora, layer_element_bytes(wide));
    } else {
        linear(s, p, fmax(t, p->context), n_heads * (a->nope + a->v), a->kv_lora);
        core(s, p, key, a->v, n_heads, n_heads * (key + a->v));
    }
    linear(s, p, t, p->model->d_model, n_heads * a->v);
}

void layer_attention(struct kernels *s, const struct layer_part *p)
{
    layer_norm(s, p);
    if (p->attention->kind == ATTENTION_MLA)
        mla(s, p);
    else
        gqa(s, p);
}

/* 16-bit weights, 4-byte scores, which top-k reads. */
void layer_gate(struct kernels *s, const struct layer_part *p, int32_t n_experts)
{
    const enum precision wide = core_precision(p->precision);
    layer_norm(s, p);
    if (n_experts > 0 && p->tokens > 0)
        add(s, (struct kernel){ wide, 1, { (int64_t)p->tokens, n_experts, p->model->d_model },
                                { layer_element_bytes(wide), layer_element_bytes(wide), 4 }, 0, 0, { 0 } });
    struct latency_key top_k = rows_of(n_experts > 0 ? LATENCY_TOP_K : LATENCY_NONE, n_experts);
    top_k.k = p->model->top_k;
    plain(s, p, p->precision, 0, p->tokens * n_experts * 4, top_k);
}

void layer_ffn(struct kernels *s, const struct layer_part *p, double width)
{
    linear(s, p, p->tokens, 2 * width, p->model->d_model);
    /* as between experts' products: gate and up read, their product written */
    plain(s, p, p->precision, 0, p->tokens * width * (2 * layer_element_bytes(p->precision) +
                                                     compute_element_bytes(p->precision)),
          rows_of(LATENCY_ACTIVATION, width));
    linear(s, p, p->tokens, p->model->d_model, width);
}

void layer_head(struct kernels *s, const struct layer_part *p, int32_t vocab, double rows)
{
    const enum precision wide = core_precision(p->precision);
    layer_norm(s, p);
    gemm(s, p, wide, 1, rows, ceil((double)vocab / p->tp), p->model->d_model, layer_element_bytes(wide));
}

/* The gradient of X is dY W^T: n and k change places; that of W is X^T dY: rows become the sum's length, and it adds to
 * 4-byte sums. The core computes its scores once more: 5 matrix products for 2, all it read and wrote read again, and
 * the gradients written. What moved bytes alone reads its input and the gradient, and writes one: 3 for 2. */
void layer_backward(struct kernels *s, const struct kernels *forward)
{
    for (int32_t i = forward->n - 1; i >= 0; i--) {
        const struct kernel *f = &forward->kernel[i];
        if (f->groups == 0) {
            add(s, (struct kernel){ .precision = f->precision, .flops = 2.5 * f->flops,
                                    .traffic = (f->flops > 0 ? 2 : 1.5) * f->traffic });
            continue;
        }
        struct kernel input = *f, weight = *f;
        input.shape = (struct gemm_group){ f->shape.rows, f->shape.k, f->shape.n };
        weight.shape = (struct gemm_group){ f->shape.n, f->shape.k, f->shape.rows };
        weight.bytes = (struct gemm_bytes){ f->bytes.in, f->bytes.in, 4 };
        add(s, input);
        add(s, weight);
    }
}

double layer_attention_weights(const struct moe_model *m, const struct attention_shape *a, int32_t tp)
{
    const double d = m->d_model, n_heads = heads(a, tp);
    if (a->kind == ATTENTION_MLA) {
        const double query = n_heads * (a->nope + a->rope);
        return d * (a->kv_lora + a->rope) + (a->q_lora > 0 ? d * a->q_lora + a->q_lora * query : d * query) +
               a->kv_lora * n_heads * (a->nope + a->v) + n_heads * a->v * d;
    }
    return 2 * d * a->d_head * (n_heads + kv_heads(a, tp));
}

double layer_cache(const struct attention_shape *a, int32_t tp)
{
    return a->kind == ATTENTION_MLA ? a->kv_lora + a->rope : 2 * kv_heads(a, tp) * a->d_head;
}

/* The norm's input and output; latents; queries, keys, values; the core's output. */
double layer_attention_kept(const struct moe_model *m, const struct attention_shape *a, int32_t tp)
{
    const double n_heads = heads(a, tp), d = 2.0 * m->d_model;
    if (a->kind == ATTENTION_MLA)
        return d + a->q_lora + a->kv_lora + a->rope + n_heads * (2.0 * (a->nope + a->rope) + 2.0 * a->v);
    return d + 2 * a->d_head * (n_heads + kv_heads(a, tp));
}
