/* SPDX-License-Identifier: Apache-2.0
 * importance-k.c - the more important a token, the more experts it gets.
 *
 * Source:  DA-MoE: Towards Dynamic Expert Allocation for Mixture-of-Experts Models (from the abstract; catalogued as
 *          dynamic-k)
 * Differs: the abstract says neither how importance is scaled nor how K follows it: here in proportion, `full` is the
 *          importance of a token that gets max_k; equal scores go to the lower id
 * Cost:    O(T E) and a short insertion; importance itself comes with the workload and is not counted
 *
 *   K_t      ceil(max_k importance_t / full), at least min_k and at most max_k
 *   score    s = softmax(logits)
 *   select   the K_t largest of scale * s + add
 *   weight   s / sum of the chosen s;   renormalise = false: s */
#include <moelab.h>

struct conf {
    int64_t min_k, max_k;
    double full;
    bool renormalise;
};

static const struct moe_param params[] = {
    { "min_k", MOE_INT, offsetof(struct conf, min_k), 1, 0, 1 << 16, NULL, "experts", "fewest per token" },
    { "max_k", MOE_INT, offsetof(struct conf, max_k), 0, 0, 1 << 16, NULL, "experts", "most; 0: the model's" },
    { "full", MOE_REAL, offsetof(struct conf, full), 1, 1e-30, 1e30, NULL, "importance",
      "at which a token gets max_k" },
    { "renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
      "weights of a token add up to 1; false: probabilities among all experts" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){ .env = env, .conf = conf };
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const int64_t n = batch->n_experts, n_scores = batch->n_tokens * n;
    for (int64_t i = 0; i < n_scores; i++)
        if (!isfinite(batch->router_logits[i]))
            return s->env->host->fail(s->env, MOE_EINVAL,
                                      "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                      batch->layer, (int)(i / n), (int)(i % n), (double)batch->router_logits[i]);
    for (int64_t i = 0; i < n_scores; i += n)
        moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    own->flops = 4.0 * (double)n_scores + 2.0 * batch->n_tokens;
    own->bytes = sizeof(float) * (2.0 * (double)n_scores + batch->n_tokens);
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, least = (int32_t)s->conf->min_k;
    const int32_t most = s->conf->max_k > 0 ? (int32_t)s->conf->max_k : batch->top_k;
    if (batch->importance == NULL)
        return env->host->fail(env, MOE_EINVAL, "the workload has no importance of tokens");
    if (most > n || least > most)
        return env->host->fail(env, MOE_EINVAL, "layer %d: min_k = %d, max_k = %d of %d experts", batch->layer, least,
                               most, n);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    if (choice == NULL || env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most) < 0)
        return MOE_ENOMEM;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const double importance = (double)batch->importance[t];
        const float *p = scores + (int64_t)t * n;
        int32_t *expert = out->expert + out->n, there = 0;
        float sum = 0;
        if (!(importance >= 0) || !isfinite(importance))
            return env->host->fail(env, MOE_EINVAL, "layer %d: importance of token %d: found %g, expected 0 or more",
                                   batch->layer, t, importance);
        for (int32_t e = 0; e < n; e++) {
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
            there += choice[e] > -INFINITY;
        }
        const double ideal = ceil(most * (importance / s->conf->full));
        int32_t k = ideal > most ? most : ideal < least ? least : (int32_t)ideal;
        k = k < there ? k : there;
        if (k > 0)
            moe_top_k(choice, n, k, expert);
        for (int32_t i = 0; i < k; i++)
            sum += p[expert[i]];
        for (int32_t i = 0; i < k; i++)
            out->weight[out->n++] = !s->conf->renormalise ? p[expert[i]] : sum > 0 ? p[expert[i]] / sum : 1 / (float)k;
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_NEEDS_IMPORTANCE,
    .name = "importance-k",
    .summary = "the more important a token, the more experts it gets",
    .source = "DA-MoE: Towards Dynamic Expert Allocation for Mixture-of-Experts Models",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
