/* SPDX-License-Identifier: Apache-2.0
 * softmax-top-k.c - softmax over all experts, the k largest chosen.
 *
 * Source:  N. Shazeer et al. 2017, Outrageously Large Neural Networks, arXiv 1701.06538 (without its noise); with
 *          top_k = 1 and renormalise = false: W. Fedus et al. 2021, Switch Transformers, arXiv 2101.03961
 * Differs: nothing; equal scores go to the lower expert id
 * Cost:    O(T E) and a short insertion for the few scores that enter the top k; one row of scratch
 *
 *   score    p = softmax(logits)
 *   select   the k largest of scale * p + add (a balancer's bias; p itself without one)
 *   weight   p / sum of the chosen p   renormalise = true: equal to a softmax over the chosen logits alone
 *            p                         renormalise = false */
#include <moelab_top_k.h>

struct conf {
    int64_t top_k;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
     "weights of a token add up to 1; false: probabilities among all experts"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){.env = env, .conf = conf};
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    int64_t n = batch->n_experts, n_scores = batch->n_tokens * n;
    (void)self;
    for (int64_t i = 0; i < n_scores; i += n)
        moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    own->flops = 4.0 * (double)n_scores; /* subtract, exponential, add, divide */
    own->bytes = 2.0 * sizeof(float) * (double)n_scores;
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    return moe_select_top_k(s->env, batch, scores, bias, s->conf->top_k, s->conf->renormalise, out);
}

/* The same where nobody asks for all scores: the largest logits are the largest probabilities. (Two logits so near that
 * their probabilities are one number: here the larger, above the lower id.) */
static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, k = moe_k_of(env, batch, s->conf->top_k);
    (void)bias;
    const int rc = k > 0 ? env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k) : k;
    float *p = env->host->scratch(env, (size_t)n * sizeof *p);
    if (rc < 0 || p == NULL)
        return rc < 0 ? rc : MOE_ENOMEM;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *logits = batch->router_logits + (int64_t)t * n;
        int32_t *expert = out->expert + (int64_t)t * k;
        float *weight = out->weight + (int64_t)t * k;
        moe_top_k(logits, n, k, expert);
        for (int32_t i = 0; i < k; i++)
            weight[i] = logits[expert[i]];
        const float top = weight[0], chosen = moe_exp_sum(weight, k, top, weight);
        const float scale = 1 / (s->conf->renormalise ? chosen : moe_exp_sum(logits, n, top, p));
        for (int32_t i = 0; i < k; i++)
            weight[i] *= scale;
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    own->flops = (double)batch->n_tokens * (n + 4.0 * (s->conf->renormalise ? k : n)); /* compare; the four above */
    own->bytes = sizeof(float) * (double)batch->n_tokens * n;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "softmax-top-k",
    .summary = "softmax over all experts, the k largest chosen",
    .source = "N. Shazeer et al. 2017, arXiv 1701.06538; W. Fedus et al. 2021, arXiv 2101.03961",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select, .route = route},
};
