/* SPDX-License-Identifier: Apache-2.0
 * layer.h - the kernels that a transformer launches beside routed experts, as shapes: what each is, not how long it
 * takes. A device's part where a group of `tp` devices splits heads, widths and vocabulary. */
#ifndef LAYER_H
#define LAYER_H

#include "machine.h"

/* GQA: n_heads queries share n_kv_heads keys and values of d_head each.
 * MLA (DeepSeek-V2, arXiv 2405.04434): queries through q_lora (0: directly), keys and values through kv_lora, which is
 * what the cache holds, with one rotary key of `rope` values for all heads. Keys of each head are nope + rope wide, its
 * values v. */
enum attention_kind { ATTENTION_GQA, ATTENTION_MLA, N_ATTENTION_KINDS };
struct attention_shape {
    enum attention_kind kind;
    int32_t n_heads, n_kv_heads, d_head;
    int32_t q_lora, kv_lora, nope, rope, v;
};

/* What one device computes of a layer. */
struct layer_part {
    const struct moe_model *model;
    const struct attention_shape *attention;
    enum precision precision;
    enum moe_phase phase;
    double tokens;  /* whole number; of all devices that share them */
    double context; /* tokens that a decoded token reads; length of prompts and of training sequences */
    int32_t tp;     /* devices that split this layer */
};

enum { MAX_KERNELS = 32 };
struct kernels { struct kernel kernel[MAX_KERNELS]; int32_t n; };

/* Each appends. Nothing for no tokens. */
void layer_attention(struct kernels *, const struct layer_part *);                /* norm to output projection */
void layer_gate(struct kernels *, const struct layer_part *, int32_t n_experts);  /* norm, matrix product, top-k */
void layer_ffn(struct kernels *, const struct layer_part *, double width);        /* gated: dense, shared experts */
void layer_head(struct kernels *, const struct layer_part *, int32_t vocab, double rows);
void layer_norm(struct kernels *, const struct layer_part *);
/* Gradients of what `forward` computed: of a GEMM's input and of its weights, two GEMMs of the same arithmetic. */
void layer_backward(struct kernels *, const struct kernels *forward);

/* Elements, of one layer on one device. */
double layer_attention_weights(const struct moe_model *, const struct attention_shape *, int32_t tp);
double layer_cache(const struct attention_shape *, int32_t tp); /* per token of context */
/* Values that a token's way through attention leaves for the backward pass. */
double layer_attention_kept(const struct moe_model *, const struct attention_shape *, int32_t tp);
/* Bytes of an element between kernels. */
double layer_element_bytes(enum precision);

#endif
