/* SPDX-License-Identifier: Apache-2.0
 * group-limited-top-k.c - the best few groups of experts first, then the k best experts within them.
 *
 * Source:  DeepSeek-AI 2024, DeepSeek-V3 Technical Report, arXiv 2412.19437 (sigmoid, groups by the sum of their two
 *          best); DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434 (softmax, groups by their best); as in NVIDIA's
 *          Megatron-LM, whose groups count top_k / top_groups of their best
 * Differs: nothing; equal scores go to the lower id, of groups and of experts
 * Cost:    O(T E) and short insertions; two rows of scratch
 *
 *   score    s = sigmoid(logits), or softmax(logits)
 *   select   c = scale * s + add (a balancer's bias: DeepSeek-V3's correction bias); groups are neighbours, E / groups
 *            experts each; a group counts the sum of its best_of_group largest c; among the experts of the top_groups
 *            best groups the k largest c
 *   weight   s, divided by the sum of the chosen s if renormalise, times weight_scale
 *
 * groups = 1 is plain top-k: with score = sigmoid what Megatron calls that. */
#include <moelab.h>

enum { SCORE_SIGMOID, SCORE_SOFTMAX };

struct conf {
    int64_t top_k, groups, top_groups, best_of_group;
    int32_t score;
    bool renormalise;
    double weight_scale;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "experts per token; 0: the model's" },
    { "groups", MOE_INT, offsetof(struct conf, groups), 1, 1, 1 << 16, NULL, "groups",
      "groups of neighbouring experts (DeepSeek-V3: 8)" },
    { "top_groups", MOE_INT, offsetof(struct conf, top_groups), 1, 1, 1 << 16, NULL, "groups",
      "groups that a token may use (DeepSeek-V3: 4)" },
    { "best_of_group", MOE_INT, offsetof(struct conf, best_of_group), 2, 1, 1 << 16, NULL, "experts",
      "how many of a group's best scores are added up to rank it" },
    { "score", MOE_ENUM, offsetof(struct conf, score), SCORE_SIGMOID, 0, 0, "sigmoid|softmax", "",
      "what logits become" },
    { "renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
      "weights of a token add up to weight_scale" },
    { "weight_scale", MOE_REAL, offsetof(struct conf, weight_scale), 1, 1e-6, 1e6, NULL, "",
      "times each weight (DeepSeek-V3: 2.5)" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    const struct conf *c = conf;
    *(struct state *)self = (struct state){ .env = env, .conf = c };
    if (c->top_groups > c->groups)
        return env->host->fail(env, MOE_EINVAL, "top_groups = %lld of groups = %lld", (long long)c->top_groups,
                               (long long)c->groups);
    return MOE_OK;
}

static int check(const struct state *s, const struct moe_batch *batch, int32_t k)
{
    const struct moe_env *env = s->env;
    const int64_t n = batch->n_experts, groups = s->conf->groups;
    if (n % groups != 0)
        return env->host->fail(env, MOE_EINVAL, "layer %d: groups = %lld does not divide %lld experts", batch->layer,
                               (long long)groups, (long long)n);
    if (k > n / groups * s->conf->top_groups)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d, but top_groups = %lld groups have %lld experts",
                               batch->layer, k, (long long)s->conf->top_groups,
                               (long long)(n / groups * s->conf->top_groups));
    if (s->conf->groups > 1 && s->conf->best_of_group > n / groups)
        return env->host->fail(env, MOE_EINVAL, "layer %d: best_of_group = %lld of %lld experts in a group",
                               batch->layer, (long long)s->conf->best_of_group, (long long)(n / groups));
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const int64_t n = batch->n_experts, n_scores = batch->n_tokens * n;
    if (s->conf->score == SCORE_SOFTMAX)
        for (int64_t i = 0; i < n_scores; i += n)
            moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    else
        for (int64_t i = 0; i < n_scores; i += n)
            moe_sigmoid(batch->router_logits + i, batch->n_experts, scores + i);
    own->flops = 4.0 * (double)n_scores;
    own->bytes = 2.0 * sizeof(float) * (double)n_scores;
    return MOE_OK;
}

/* Sum of the largest and the second of n > 1. */
static float best_two(const float *x, int32_t n)
{
    float first = -INFINITY, second = -INFINITY;
    for (int32_t i = 0; i < n; i++) {
        const float lower = x[i] < first ? x[i] : first;
        first = x[i] > first ? x[i] : first;
        second = lower > second ? lower : second;
    }
    return first + second;
}

static float best_few(const float *x, int32_t n, int32_t few)
{
    int32_t at[few];
    float sum = 0;
    if (few == 2)
        return best_two(x, n);
    moe_top_k(x, n, few, at);
    for (int32_t i = 0; i < few; i++)
        sum += x[at[i]];
    return sum;
}

/* Leaves the choice of the best groups alone and takes that of the others away. group, rank: [groups] */
static void limit(const struct conf *c, int32_t n, float *choice, int32_t *group, float *rank)
{
    const int32_t groups = (int32_t)c->groups, size = n / groups;
    for (int32_t g = 0; g < groups; g++)
        rank[g] = best_few(choice + (int64_t)g * size, size, (int32_t)c->best_of_group);
    moe_top_k(rank, groups, (int32_t)c->top_groups, group);
    for (int32_t i = 0; i < (int32_t)c->top_groups; i++)
        rank[group[i]] = NAN;
    for (int32_t g = 0; g < groups; g++)
        for (int32_t e = g * size; !isnan(rank[g]) && e < (g + 1) * size; e++)
            choice[e] = -INFINITY;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts, k = c->top_k > 0 ? (int32_t)c->top_k : batch->top_k;
    int rc = check(s, batch, k);
    if (rc == MOE_OK)
        rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    float *rank = env->host->scratch(env, (size_t)c->groups * sizeof *rank);
    int32_t *group = env->host->scratch(env, (size_t)c->groups * sizeof *group);
    if (rc < 0 || choice == NULL || rank == NULL || group == NULL)
        return rc < 0 ? rc : MOE_ENOMEM;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        int32_t *expert = out->expert + (int64_t)t * k;
        float *weight = out->weight + (int64_t)t * k, sum = 0;
        for (int32_t e = 0; e < n; e++)
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
        if (c->groups > 1)
            limit(c, n, choice, group, rank);
        moe_top_k(choice, n, k, expert);
        for (int32_t i = 0; i < k; i++)
            sum += weight[i] = p[expert[i]];
        for (int32_t i = 0; i < k; i++)
            weight[i] = (float)c->weight_scale * (!c->renormalise ? weight[i]
                                                  : sum > 0       ? weight[i] / sum
                                                                  : 1 / (float)k);
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "group-limited-top-k",
    .summary = "sigmoid or softmax; the best groups of experts, then the k best within them",
    .source = "DeepSeek-AI 2024, arXiv 2412.19437 and 2405.04434",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
