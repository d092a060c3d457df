/* SPDX-License-Identifier: Apache-2.0
 * locmoe.c - a gate without weights: expert i scores the mean of the token's i-th slice; top-1.
 *
 * Source:  J. Li et al. 2024, LocMoE: A Low-overhead MoE for Large Language Model Training, arXiv 2401.13920
 * Differs: its losses (balance, and locality as KL(current || local)) belong to training; its capacity is balancer
 *          `capacity`'s
 * Cost:    O(T H): each element is read once; no gate
 *
 *   logit_i = mean of h[i d .. (i + 1) d), d = H / E: weights that are orthogonal and fixed
 *   select   the largest of scale * p + add, p = softmax(logits);   weight = p */
#include <moelab.h>

struct state {
    const struct moe_env *env;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    *(struct state *)self = (struct state){ .env = env };
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const int32_t n = batch->n_experts, h = batch->n_hidden;
    if (batch->hidden == NULL)
        return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: the workload has no hidden states", batch->layer);
    if (h % n != 0)
        return s->env->host->fail(s->env, MOE_EINVAL,
                                  "layer %d: %d experts do not divide a hidden state of %d into "
                                  "slices",
                                  batch->layer, n, h);
    const int32_t d = h / n;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *row = scores + (int64_t)t * n;
        for (int32_t e = 0; e < n; e++) {
            const float *slice = batch->hidden + (int64_t)t * h + (int64_t)e * d;
            row[e] = 0;
            for (int32_t i = 0; i < d; i++)
                row[e] += slice[i];
            row[e] /= (float)d;
        }
        moe_softmax(row, n, row);
    }
    own->flops = (double)batch->n_tokens * (h + 5.0 * n);
    own->bytes = sizeof(float) * (double)batch->n_tokens * (h + n);
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const int32_t n = batch->n_experts;
    float *choice = s->env->host->scratch(s->env, (size_t)n * sizeof *choice);
    int rc = choice != NULL ? s->env->host->routes_reserve(s->env, out, batch->n_tokens) : MOE_ENOMEM;
    if (rc < 0)
        return rc;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        for (int32_t e = 0; e < n; e++)
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
        moe_top_k(choice, n, 1, out->expert + t);
        out->weight[t] = p[out->expert[t]];
        out->offset[t + 1] = t + 1;
    }
    out->n = batch->n_tokens;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_HIDDEN | MOE_OWN_GATE,
    .name = "locmoe",
    .summary = "top-1 of a fixed orthogonal gate: each expert scores its slice of the hidden state",
    .source = "J. Li et al. 2024, arXiv 2401.13920",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
