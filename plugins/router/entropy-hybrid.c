/* SPDX-License-Identifier: Apache-2.0
 * entropy-hybrid.c - all experts for a token whose gate is unsure, few for the others.
 *
 * Source:  rule = tsallis: DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism;
 *          rule = broadcast: GW-MoE: Resolving Uncertainty in MoE Router with Global Workspace Theory (both from the
 *          abstract)
 * Differs: entropies are divided by their largest value, that of E equal probabilities, so that a threshold serves any
 *          E; thresholds, p and q are ours, as the abstracts give none; the entropy loss is training's
 * Cost:    O(T E) with a logarithm or a power per score, and a top-k whose k doubles until the sum is reached
 *
 *   score      s = softmax(logits)
 *   entropy    h = (1 - sum s^q) / (q - 1) over (1 - E^(1-q)) / (q - 1); q = 1: -sum s ln s over ln E. broadcast: q = 1
 *   select     h > threshold: every expert. Else by scale * s + add, largest first:
 *              tsallis     until the sum of s exceeds p, at_least experts or more
 *              broadcast   the k largest
 *   weight     s;   renormalise: s / sum of the chosen s
 *
 * GW-MoE broadcasts in fine-tuning and leaves inference as it was: phases = train, which is then softmax-top-k. */
#include <moelab.h>

enum { RULE_TSALLIS, RULE_BROADCAST };
enum { PHASES_ALL, PHASES_TRAIN };

struct conf {
    int64_t top_k, at_least;
    double threshold, q, p;
    int32_t rule, phases;
    bool renormalise;
};

static const struct moe_param params[] = {
    { "rule", MOE_ENUM, offsetof(struct conf, rule), RULE_TSALLIS, 0, 0, "tsallis|broadcast", "",
      "what sure tokens get: top-p, or the k largest" },
    { "threshold", MOE_REAL, offsetof(struct conf, threshold), 0.9, 0, 1, NULL, "",
      "share of the largest entropy above which a token goes to every expert" },
    { "q", MOE_REAL, offsetof(struct conf, q), 1.5, 0.01, 100, NULL, "", "tsallis: index of the entropy" },
    { "p", MOE_REAL, offsetof(struct conf, p), 0.4, 0, 1, NULL, "", "tsallis: probability that sure tokens exceed" },
    { "at_least", MOE_INT, offsetof(struct conf, at_least), 1, 1, 1 << 16, NULL, "experts",
      "tsallis: fewest experts per token" },
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "broadcast: experts of a sure token; 0: the model's" },
    { "phases", MOE_ENUM, offsetof(struct conf, phases), PHASES_ALL, 0, 0, "all|train", "",
      "whose unsure tokens go to every expert: train alone, or those of inference, too" },
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
    own->flops = 6.0 * (double)n_scores; /* the softmax's four; a power and a sum */
    own->bytes = 3.0 * sizeof(float) * (double)n_scores;
    return MOE_OK;
}

/* 0 for one certain expert, 1 for equal probabilities. */
static double entropy(const float *s, int32_t n, double q)
{
    double sum = 0;
    if (n < 2)
        return 0;
    if (fabs(q - 1) < 1e-9) {
        for (int32_t e = 0; e < n; e++)
            sum -= s[e] > 0 ? (double)s[e] * log((double)s[e]) : 0;
        return sum / log(n);
    }
    for (int32_t e = 0; e < n; e++)
        sum += s[e] > 0 ? pow((double)s[e], q) : 0;
    return (1 - sum) / (1 - pow(n, 1 - q));
}

/* How many of the experts in order of choice; choice: [n], in order: [n]. `there`: those that exist. */
static int32_t sure(const struct conf *c, const float *choice, const float *s, int32_t n, int32_t there, int32_t k,
                    int32_t *expert)
{
    if (c->rule == RULE_BROADCAST) {
        k = k < there ? k : there;
        moe_top_k(choice, n, k, expert);
        return k;
    }
    const int32_t least = c->at_least < there ? (int32_t)c->at_least : there;
    for (int32_t found = there < 8 ? there : 8;; found = 2 * found < there ? 2 * found : there) {
        double sum = 0;
        moe_top_k(choice, n, found, expert);
        for (int32_t i = 0; i < found; i++)
            if ((sum += (double)s[expert[i]]) > c->p && i + 1 >= least)
                return i + 1;
        if (found == there)
            return there;
    }
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts, k = c->top_k > 0 ? (int32_t)c->top_k : batch->top_k;
    const bool asks = c->phases == PHASES_ALL || batch->phase == MOE_TRAIN;
    const int64_t fewest = c->rule == RULE_BROADCAST ? k : c->at_least;
    if (fewest < 1 || fewest > n)
        return env->host->fail(env, MOE_EINVAL, "layer %d: %s = %lld of %d experts", batch->layer,
                               c->rule == RULE_BROADCAST ? "top_k" : "at_least", (long long)fewest, n);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    int32_t *expert = env->host->scratch(env, (size_t)n * sizeof *expert);
    if (choice == NULL || expert == NULL)
        return MOE_ENOMEM;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        int32_t there = 0;
        float sum = 0;
        for (int32_t e = 0; e < n; e++) {
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
            if (choice[e] > -INFINITY)
                expert[there++] = e;
        }
        int32_t taken = there;
        if (!asks || entropy(p, n, c->rule == RULE_BROADCAST ? 1 : c->q) <= c->threshold)
            taken = there > 0 ? sure(c, choice, p, n, there, k, expert) : 0;
        if (env->host->routes_reserve(env, out, out->n + taken) < 0)
            return MOE_ENOMEM;
        for (int32_t i = 0; i < taken; i++)
            sum += p[expert[i]];
        for (int32_t i = 0; i < taken; i++) {
            out->expert[out->n] = expert[i];
            out->weight[out->n++] = !c->renormalise ? p[expert[i]] : sum > 0 ? p[expert[i]] / sum : 1 / (float)taken;
        }
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "entropy-hybrid",
    .summary = "all experts for a token whose gate is unsure, few for the others",
    .source = "DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning; GW-MoE: Resolving Uncertainty in MoE Router",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
