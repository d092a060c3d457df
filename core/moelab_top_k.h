/* SPDX-License-Identifier: Apache-2.0
 * moelab_top_k.h - for routers that give a token the k experts with the largest scores: all of that but the scores.
 *
 * A convenience for plugins, compiled into them, and no part of the ABI. */
#ifndef MOELAB_TOP_K_H
#define MOELAB_TOP_K_H

#include <moelab.h>

/* How many experts a token gets: parameter top_k, or the model's where that is 0. Negative: what fail() returned. */
static inline int32_t moe_k_of(const struct moe_env *env, const struct moe_batch *batch, int64_t top_k)
{
    const int32_t k = top_k > 0 ? (int32_t)top_k : batch->top_k;
    if (k < 1 || k > batch->n_experts)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, k,
                               batch->n_experts);
    return k;
}

/* choice[0..n): scores p as balancers would have them. Returns how many experts exist: an add of -INFINITY says that
 * one does not. bias: may be NULL. */
static inline int32_t moe_bias_scores(const float *p, const struct moe_bias *bias, int32_t n, float *choice)
{
    int32_t there = 0;
    for (int32_t e = 0; e < n; e++) {
        choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
        there += choice[e] > -INFINITY;
    }
    return there;
}

/* Weights of the k chosen: their scores, which renormalise has add up to 1. A balancer may force choices whose scores
 * are all 0: they share alike. */
static inline void moe_weigh(const float *p, const int32_t *expert, int32_t k, bool renormalise, float *weight)
{
    float sum = 0;
    for (int32_t i = 0; i < k; i++)
        sum += weight[i] = p[expert[i]];
    for (int32_t i = 0; renormalise && i < k; i++)
        weight[i] = sum > 0 ? weight[i] / sum : 1 / (float)k;
}

/* The hook `select` of such a router: of each token the k largest of scale * p + add, as many as exist, with weights by
 * moe_weigh(). */
static inline int moe_select_top_k(const struct moe_env *env, const struct moe_batch *batch, const float *scores,
                                   const struct moe_bias *bias, int64_t top_k, bool renormalise,
                                   struct moe_routes *out)
{
    const int32_t n = batch->n_experts, most = moe_k_of(env, batch, top_k);
    float *biased = env->host->scratch(env, (size_t)n * sizeof *biased);
    if (most < 0 || biased == NULL)
        return most < 0 ? most : MOE_ENOMEM;
    const int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most);
    if (rc < 0)
        return rc;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        const int32_t there = bias != NULL ? moe_bias_scores(p, bias, n, biased) : n;
        const int32_t k = most < there ? most : there;
        if (k > 0)
            moe_top_k(bias != NULL ? biased : p, n, k, out->expert + out->n);
        moe_weigh(p, out->expert + out->n, k, renormalise, out->weight + out->n);
        out->offset[t + 1] = out->n += k;
    }
    return MOE_OK;
}

#endif
