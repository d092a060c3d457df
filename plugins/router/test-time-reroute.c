/* SPDX-License-Identifier: Apache-2.0
 * test-time-reroute.c - a trained gate told to choose otherwise: other ranks, random experts, a bonus on logits.
 *
 * Source:  choose = rank, random: Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast,
 *          its weak activation, from the abstract; choose = best with a bonus: Multilingual Routing in
 *          Mixture-of-Experts, and Rewiring Experts on the Fly: Continuous Rerouting for Better Online Adaptation in
 *          Mixture-of-Expert models, each from the abstract
 * Differs: one pass: the strong one of Self-Contrast is softmax-top-k, and mixing what both predict is not routing.
 *          How a bonus is found (experts that task data use; gradient steps on the text so far) is not here, and it
 *          does not change while a run goes on. Claims nothing of quality
 * Cost:    O(T E) and a short insertion, as softmax-top-k
 *
 *   score    p = softmax(logits + bonus of the layer)
 *   select   by scale * p + add, largest first
 *            rank     those of rank `rank` to rank + k - 1, counted from 1; rank = 0: the k after the first k, or the
 *                     last k where there are fewer
 *            random   k different ones, drawn for every token, layer and step
 *            best     the first k: softmax-top-k, but for the bonus
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

enum choose { RANK, RANDOM, BEST };
enum { HOOK_CHOOSE };

struct conf {
    int64_t top_k, rank;
    int32_t choose;
    struct moe_tensor bonus;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"choose", MOE_ENUM, offsetof(struct conf, choose), RANK, 0, 0, "rank|random|best", "", "which experts"},
    {"rank", MOE_INT, offsetof(struct conf, rank), 0, 0, 1 << 16, NULL, "rank",
     "choose = rank: of the first expert taken, from 1; 0: after the best k"},
    {"bonus", MOE_TENSOR, offsetof(struct conf, bonus), 0, 0, 0, "L,E", "logit", "added to logits; not given: nothing"},
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
    const struct conf *c = conf;
    *(struct state *)self = (struct state){.env = env, .conf = c};
    if (c->choose != RANK && c->rank > 0)
        return env->host->fail(env, MOE_EINVAL, "rank = %lld is for choose = rank alone", (long long)c->rank);
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_tensor *bonus = &s->conf->bonus;
    const int32_t n = batch->n_experts;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *p = scores + (int64_t)t * n;
        for (int32_t e = 0; e < n; e++) {
            p[e] = batch->router_logits[(int64_t)t * n + e];
            p[e] += bonus->data != NULL ? bonus->data[batch->layer * bonus->shape[1] + e] : 0;
            if (!isfinite(p[e]))
                return s->env->host->fail(s->env, MOE_EINVAL,
                                          "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                          batch->layer, t, e, (double)p[e]);
        }
        moe_softmax(p, n, p);
    }
    own->flops = (bonus->data != NULL ? 5.0 : 4.0) * (double)batch->n_tokens * n;
    own->bytes = 2.0 * sizeof(float) * (double)batch->n_tokens * n;
    return MOE_OK;
}

/* What identifies a token, whoever shares its batch. */
static int64_t token_key(const struct moe_batch *b, int32_t t)
{
    const int64_t request = b->request != NULL ? b->request[t] : 0, position = b->position != NULL ? b->position[t] : t;
    return request * (INT64_C(1) << 32) + position;
}

/* Numbers in place of scores, so that the k largest are k drawn ones. What does not exist stays where it is. */
static void shuffle(const struct moe_env *env, const struct moe_batch *b, int32_t t, float *choice)
{
    for (int32_t e = 0; e < b->n_experts; e++)
        if (choice[e] > -INFINITY)
            choice[e] = (float)moe_unit(moe_rand(env, HOOK_CHOOSE, b->step, b->layer,
                                                 token_key(b, t) * b->n_experts + e));
}

/* How many experts are passed over before the first taken. `there`: how many exist. */
static int32_t find_first(const struct conf *c, int32_t k, int32_t there)
{
    if (c->choose != RANK)
        return 0;
    if (c->rank > 0)
        return (int32_t)c->rank - 1;
    return k <= there - k ? k : k <= there ? there - k : 0;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts, most = moe_k_of(env, batch, c->top_k);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    int32_t *ranked = env->host->scratch(env, (size_t)n * sizeof *ranked);
    if (most < 0 || choice == NULL || ranked == NULL)
        return most < 0 ? most : MOE_ENOMEM;
    if (c->rank > 0 && c->rank + most - 1 > n)
        return env->host->fail(env, MOE_EINVAL, "layer %d: ranks %lld to %lld of %d experts", batch->layer,
                               (long long)c->rank, (long long)c->rank + most - 1, n);
    const int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most);
    if (rc < 0)
        return rc;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        const int32_t there = moe_bias_scores(p, bias, n, choice);
        if (c->choose == RANDOM)
            shuffle(env, batch, t, choice);
        const int32_t first = find_first(c, most, there), last = first + most < there ? first + most : there;
        const int32_t k = last > first ? last - first : 0;
        if (k > 0)
            moe_top_k(choice, n, last, ranked);
        for (int32_t i = 0; i < k; i++)
            out->expert[out->n + i] = ranked[first + i];
        moe_weigh(p, out->expert + out->n, k, c->renormalise, out->weight + out->n);
        out->offset[t + 1] = out->n += k;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "test-time-reroute",
    .summary = "a trained gate told to choose otherwise: other ranks, random experts, a bonus on logits",
    .source = "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
