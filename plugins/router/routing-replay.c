/* SPDX-License-Identifier: Apache-2.0
 * routing-replay.c - the experts that were recorded, with the weights of the gate as it is now.
 *
 * Source:  Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers, from the abstract
 * Differs: replay.c also repeats the weights; where a trace's experts are the best by its own logits, as in the shipped
 *          one, this decides as softmax-top-k does. The logits that a workload brings stand for the gate of the later
 *          pass; that its weights are a softmax over the recorded experts alone is how "recomputed over the recorded
 *          set" is read
 * Cost:    O(T K): 4 FLOPs for each route
 *
 *   select   the recorded experts; balancers cannot bias that
 *   weight   exp(logit) / sum over the token's recorded experts of the same */
#include <moelab.h>

#include <math.h>
#include <string.h>

struct state {
    const struct moe_env *env;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    *(struct state *)self = (struct state){.env = env};
    return MOE_OK;
}

/* Softmax over each token's experts. */
static int weigh(const struct moe_env *env, const struct moe_batch *b, struct moe_routes *out)
{
    const int32_t n = b->n_experts;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        const float *logit = b->router_logits + (int64_t)t * n;
        float top = -INFINITY, sum = 0;
        for (int64_t i = out->offset[t]; i < out->offset[t + 1]; i++) {
            const int32_t e = out->expert[i];
            if (e >= n || !isfinite(logit[e]))
                return env->host->fail(env, MOE_EINVAL, "layer %d: token %d: expert %d was recorded and has no finite "
                                       "logit", b->layer, t, e);
            top = logit[e] > top ? logit[e] : top;
        }
        for (int64_t i = out->offset[t]; i < out->offset[t + 1]; i++)
            sum += out->weight[i] = expf(logit[out->expert[i]] - top);
        for (int64_t i = out->offset[t]; i < out->offset[t + 1]; i++)
            out->weight[i] /= sum;
    }
    return MOE_OK;
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct moe_env *env = ((const struct state *)self)->env;
    const struct moe_routes *in = batch->recorded;
    (void)bias;
    if (in->form != MOE_TOKENS || in->combine != NULL || in->layer != NULL || in->skip != NULL)
        return env->host->fail(env, MOE_EUNSUPPORTED,
                               "layer %d: only plain recorded routes can be replayed, not slots, merged experts, "
                               "combine weights or skipped blocks", batch->layer);
    int rc = env->host->routes_reserve(env, out, in->n);
    if (rc < 0)
        return rc;
    memcpy(out->offset, in->offset, ((size_t)batch->n_tokens + 1) * sizeof *out->offset);
    if (in->n > 0)
        memcpy(out->expert, in->expert, (size_t)in->n * sizeof *out->expert);
    out->n = in->n;
    out->n_free = in->n_free;
    own->flops = 4.0 * (double)in->n;
    own->bytes = 2.0 * sizeof(float) * (double)in->n;
    return weigh(env, batch, out);
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_RECORDED | MOE_NEEDS_LOGITS,
    .name = "routing-replay",
    .summary = "experts as recorded in the trace, with the weights of the gate",
    .source = "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers",
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.route = route},
};
