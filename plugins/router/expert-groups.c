/* SPDX-License-Identifier: Apache-2.0
 * expert-groups.c - experts in k groups, the best one of each.
 *
 * Source:  A. Yang et al. 2021, M6-T: Exploring Sparse Expert Models and Beyond, arXiv 2105.15082 (expert prototyping),
 *          from the abstract
 * Differs: one softmax for each group, so that a weight is that of a group's own top-1 gate, is a choice made here;
 *          with groups = 0, where the model's top_k does not divide the experts, groups differ by one expert
 * Cost:    O(T E)
 *
 *   group    i: experts i E / k to (i + 1) E / k - 1, rounded down
 *   score    p = softmax of the logits of an expert's group
 *   select   of each group the largest of scale * p + add; experts with an add of -INFINITY do not exist, and a group
 *            of such experts alone has no part in it
 *   weight   p; p / sum of the chosen p with renormalise = true */
#include <moelab.h>

struct conf {
    int64_t groups;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"groups", MOE_INT, offsetof(struct conf, groups), 0, 0, 1 << 16, NULL, "groups",
     "groups, and so experts per token, a divisor of the experts; 0: as many as the model's experts per token"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 0, 0, 1, NULL, "",
     "weights of a token add up to 1; false: probabilities among a group"},
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

static int not_finite(const struct moe_env *env, const struct moe_batch *batch, int32_t token, int32_t expert, double x)
{
    return env->host->fail(env, MOE_EINVAL, "layer %d: token %d, expert %d: score %g, expected a finite number",
                           batch->layer, token, expert, x);
}

static int find_groups(const struct state *s, const struct moe_batch *batch)
{
    const int32_t k = s->conf->groups > 0 ? (int32_t)s->conf->groups : batch->top_k;
    if (k < 1 || k > batch->n_experts || (s->conf->groups > 0 && batch->n_experts % k != 0))
        return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: groups = %d, expected a divisor of %d experts",
                                  batch->layer, k, batch->n_experts);
    return k;
}

/* The first expert of group i. */
static int32_t first_of(int32_t n, int32_t k, int32_t i)
{
    return (int32_t)((int64_t)i * n / k);
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const int32_t n = batch->n_experts, k = find_groups(s, batch);
    if (k < 0)
        return k;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *logits = batch->router_logits + (int64_t)t * n;
        for (int32_t e = 0; e < n; e++)
            if (!isfinite(logits[e]))
                return not_finite(s->env, batch, t, e, (double)logits[e]);
        for (int32_t i = 0; i < k; i++) {
            const int32_t from = first_of(n, k, i);
            moe_softmax(logits + from, first_of(n, k, i + 1) - from, scores + (int64_t)t * n + from);
        }
    }
    own->flops = 4.0 * batch->n_tokens * n; /* subtract, exponential, add, divide */
    own->bytes = 2.0 * sizeof(float) * batch->n_tokens * n;
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const int32_t n = batch->n_experts, k = find_groups(s, batch);
    int rc = k < 0 ? k : s->env->host->routes_reserve(s->env, out, (int64_t)batch->n_tokens * k);
    if (rc < 0)
        return rc;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        const int64_t first = out->n;
        float sum = 0;
        for (int32_t i = 0; i < k; i++) {
            int32_t best = -1;
            float most = -INFINITY;
            for (int32_t e = first_of(n, k, i); e < first_of(n, k, i + 1); e++) {
                const float x = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
                best = x > most ? e : best;
                most = x > most ? x : most;
            }
            if (best < 0)
                continue;
            out->expert[out->n] = best;
            sum += out->weight[out->n++] = p[best];
        }
        for (int64_t i = first; s->conf->renormalise && i < out->n; i++)
            out->weight[i] = sum > 0 ? out->weight[i] / sum : 1 / (float)(out->n - first);
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "expert-groups",
    .summary = "experts in k groups, the best one of each",
    .source = "A. Yang et al. 2021, arXiv 2105.15082",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
