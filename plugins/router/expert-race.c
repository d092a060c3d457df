/* SPDX-License-Identifier: Apache-2.0
 * expert-race.c - all pairs of a token and an expert compete: the best k of them per token on average stay.
 *
 * Source:  Expert Race: A Flexible Routing Strategy for Scaling Diffusion Transformer with Mixture of Experts (from the
 *          abstract)
 * Differs: the scores' form is a setting, as the abstract does not say it; the losses (output per layer, similarity of
 *          routers) are training's; equal scores go to the earlier token, then to the lower id
 * Cost:    O(T E) expected: one selection among T E scores, and a copy of them
 *
 *   score    s = softmax(logits) or sigmoid(logit)
 *   select   the T k largest of scale * s + add over the whole batch: the total is fixed, a token's number is not
 *   weight   s */
#include <moelab.h>

enum { SCORE_SOFTMAX, SCORE_SIGMOID };

struct conf {
    int64_t top_k;
    int32_t score;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "experts per token on average; 0: the model's" },
    { "score", MOE_ENUM, offsetof(struct conf, score), SCORE_SOFTMAX, 0, 0, "softmax|sigmoid", "",
      "what competes" },
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
    for (int64_t i = 0; s->conf->score == SCORE_SOFTMAX && i < n_scores; i += n)
        moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    for (int64_t i = 0; s->conf->score == SCORE_SIGMOID && i < n_scores; i++)
        scores[i] = 1 / (1 + expf(-batch->router_logits[i]));
    own->flops = 8.0 * (double)n_scores; /* the score; some four comparisons */
    own->bytes = 5.0 * sizeof(float) * (double)n_scores;
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, k = s->conf->top_k > 0 ? (int32_t)s->conf->top_k : batch->top_k;
    const int64_t n_pairs = (int64_t)batch->n_tokens * n, n_taken = (int64_t)batch->n_tokens * k;
    if (k < 1 || k > n)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, k, n);
    float *choice = env->host->scratch(env, ((size_t)n_pairs + 1) * sizeof *choice);
    float *room = env->host->scratch(env, ((size_t)n_pairs + 1) * sizeof *room);
    if (choice == NULL || room == NULL || env->host->routes_reserve(env, out, n_taken) < 0)
        return MOE_ENOMEM;
    for (int64_t i = 0; i < n_pairs; i++)
        room[i] = choice[i] = bias != NULL ? bias->scale[i % n] * scores[i] + bias->add[i % n] : scores[i];
    const float least = n_pairs > 0 ? moe_kth_largest(room, n_pairs, n_taken) : 0;
    int64_t equal = n_taken; /* of those that are equal to the last one, how many stay */
    for (int64_t i = 0; i < n_pairs; i++)
        equal -= choice[i] > least;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const int64_t row = (int64_t)t * n;
        for (int32_t e = 0; e < n; e++) {
            const float own = choice[row + e];
            if (own <= -INFINITY || own < least || (own <= least && equal-- <= 0))
                continue;
            out->expert[out->n] = e;
            out->weight[out->n++] = scores[row + e];
        }
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_CROSS_BATCH, /* tokens compete with each other */
    .name = "expert-race",
    .summary = "the best pairs of a token and an expert in the whole batch, k per token on average",
    .source = "Expert Race: A Flexible Routing Strategy for Scaling Diffusion Transformer with Mixture of Experts",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
