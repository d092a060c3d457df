/* SPDX-License-Identifier: Apache-2.0
 * dynamic-k.c - experts above a threshold, and no more of them than the layer's place in the model allows.
 *
 * Source:  DynaMoE: Dynamic Token-Level Expert Activation with Layer-Wise Adaptive Capacity for Mixture-of-Experts
 *          Neural Networks (from the abstract)
 * Differs: the abstract names the schedules, their curves are ours; a token always keeps its best expert. (DA-MoE,
 *          which the catalogue lists under this name, is importance-k: it reads another input)
 * Cost:    O(T E), and a top-k of at most max_k
 *
 *   score    s = softmax(logits)
 *   above    share: s > threshold;   percentile: s above the threshold-quantile of the token's own scores, which is the
 *            floor(threshold (E - 1))-th smallest, from 0
 *   select   experts above, by scale * s + add, largest first, at most k_l of them; the first always
 *   k_l      lo + (hi - lo) f(x), rounded, halves up; lo = min_k, hi = max_k, x = l / (L - 1), 0 where L = 1
 *            constant f = 1;  descending 1 - x;  ascending x;  pyramid 1 - |2x - 1|;  wave (1 - cos 4 pi x) / 2
 *   weight   s / sum of the chosen s;   renormalise = false: s */
#include <moelab.h>

#include <string.h>

enum { ABOVE_SHARE, ABOVE_PERCENTILE };
enum { CONSTANT, DESCENDING, ASCENDING, PYRAMID, WAVE };

struct conf {
    double threshold;
    int64_t min_k, max_k;
    int32_t above, schedule;
    bool renormalise;
};

static const struct moe_param params[] = {
    { "above", MOE_ENUM, offsetof(struct conf, above), ABOVE_SHARE, 0, 0, "share|percentile", "",
      "the threshold is a probability, or a rank among the token's scores" },
    { "threshold", MOE_REAL, offsetof(struct conf, threshold), 0.1, 0, 1, NULL, "", "what scores have to exceed" },
    { "schedule", MOE_ENUM, offsetof(struct conf, schedule), CONSTANT, 0, 0,
      "constant|descending|ascending|pyramid|wave", "", "how the most experts per token change with the layer" },
    { "min_k", MOE_INT, offsetof(struct conf, min_k), 1, 1, 1 << 16, NULL, "experts", "lowest of the schedule" },
    { "max_k", MOE_INT, offsetof(struct conf, max_k), 0, 0, 1 << 16, NULL, "experts",
      "highest of the schedule; 0: the model's top_k" },
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
    own->flops = (s->conf->above == ABOVE_PERCENTILE ? 8.0 : 5.0) * (double)n_scores;
    own->bytes = (s->conf->above == ABOVE_PERCENTILE ? 4.0 : 2.0) * sizeof(float) * (double)n_scores;
    return MOE_OK;
}

static int32_t most_of_layer(const struct conf *c, int32_t layer, int32_t n_layers, int32_t hi)
{
    const double x = n_layers > 1 ? layer / (n_layers - 1.0) : 0, pi = 3.14159265358979323846;
    double f = 1;
    switch (c->schedule) {
    case DESCENDING: f = 1 - x; break;
    case ASCENDING: f = x; break;
    case PYRAMID: f = 1 - fabs(2 * x - 1); break;
    case WAVE: f = (1 - cos(4 * pi * x)) / 2; break;
    default: break;
    }
    return (int32_t)floor((double)c->min_k + (hi - (double)c->min_k) * f + 0.5 + 1e-9);
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts, hi = c->max_k > 0 ? (int32_t)c->max_k : batch->top_k;
    if (hi > n || c->min_k > hi)
        return env->host->fail(env, MOE_EINVAL, "layer %d: min_k = %lld, max_k = %d of %d experts", batch->layer,
                               (long long)c->min_k, hi, n);
    const int32_t most = most_of_layer(c, batch->layer, env->model->n_layers, hi);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    float *room = env->host->scratch(env, (size_t)n * sizeof *room);
    if (choice == NULL || room == NULL || env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most) < 0)
        return MOE_ENOMEM;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        int32_t *expert = out->expert + out->n, there = 0, k = 0;
        float threshold = (float)c->threshold, sum = 0;
        for (int32_t e = 0; e < n; e++) {
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
            there += choice[e] > -INFINITY;
        }
        if (c->above == ABOVE_PERCENTILE) {
            memcpy(room, p, (size_t)n * sizeof *room);
            threshold = moe_kth_largest(room, n, n - (int64_t)floor(c->threshold * (n - 1)));
        }
        const int32_t found = most < there ? most : there;
        if (found > 0)
            moe_top_k(choice, n, found, expert);
        for (int32_t i = 0; i < found; i++) /* a bias orders: those that it puts ahead may lie below the threshold */
            if (i == 0 || p[expert[i]] > threshold) {
                expert[k] = expert[i];
                sum += p[expert[k++]];
            }
        for (int32_t i = 0; i < k; i++)
            out->weight[out->n++] = !c->renormalise ? p[expert[i]] : sum > 0 ? p[expert[i]] / sum : 1 / (float)k;
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "dynamic-k",
    .summary = "experts above a threshold, at most as many as the layer's schedule allows",
    .source = "DynaMoE: Dynamic Token-Level Expert Activation with Layer-Wise Adaptive Capacity",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
