/* SPDX-License-Identifier: Apache-2.0
 * segment-router.c - one decision for every segment of w consecutive tokens of a request.
 *
 * Source:  Seg-MoE: Multi-Resolution Segment-wise Mixture-of-Experts for Time Series Forecasting Transformers, from
 *          the abstract
 * Differs: how the tokens of a segment make one gate input is not in the abstract: here their mean, and as the gate is
 *          linear its logits are the mean of theirs. A segment that several batches cut (decoding, chunked prefill) is
 *          decided anew in each, from the tokens that are there. Claims nothing of quality
 * Cost:    2 H E FLOPs per segment instead of per token, and T H for the means; O(T E) besides
 *
 *   segment  floor(position / w) of the request; w = `window`, or one for each layer (`windows`)
 *   score    p = softmax(mean of the logits of the segment's tokens)
 *   select   the k largest of scale * p + add, the same for all tokens of the segment
 *   weight   p / sum of the chosen p; p with renormalise = false
 *
 * A later token of a segment changes the experts of an earlier one: it is not for causal models that generate. w = 1 is
 * softmax-top-k. */
#include <moelab_top_k.h>

struct conf {
    int64_t window, top_k;
    struct moe_tensor windows;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"window", MOE_INT, offsetof(struct conf, window), 4, 1, 1 << 24, NULL, "tokens", "of a segment"},
    {"windows", MOE_TENSOR, offsetof(struct conf, windows), 0, 0, 0, "L", "tokens",
     "of a segment in each layer; not given: window"},
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
    const struct conf *c = conf;
    *(struct state *)self = (struct state){.env = env, .conf = c};
    for (int64_t l = 0; c->windows.data != NULL && l < c->windows.shape[0]; l++) {
        const float w = c->windows.data[l];
        if (!(w >= 1 && w <= 1 << 24 && w == floorf(w)))
            return env->host->fail(env, MOE_EINVAL, "windows: layer %lld has %g, expected a whole number of tokens",
                                   (long long)l, (double)w);
    }
    return MOE_OK;
}

static int64_t key_of(const struct moe_batch *b, int32_t t, int32_t window)
{
    const int64_t request = b->request != NULL ? b->request[t] : 0, position = b->position != NULL ? b->position[t] : t;
    return request * (INT64_C(1) << 32) + position / window;
}

/* For every token the first of the batch that is of its request and segment, which may be itself. */
static int group_tokens(const struct moe_env *env, const struct moe_batch *b, int32_t window, int32_t *first)
{
    int64_t n_slots = 16;
    while (n_slots < 2 * (int64_t)b->n_tokens)
        n_slots *= 2;
    int32_t *slot = env->host->scratch(env, (size_t)n_slots * sizeof *slot);
    if (slot == NULL)
        return MOE_ENOMEM;
    for (int64_t i = 0; i < n_slots; i++)
        slot[i] = -1;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        const int64_t key = key_of(b, t, window);
        int64_t at = (int64_t)(moe_mix((uint64_t)key) & (uint64_t)(n_slots - 1));
        while (slot[at] >= 0 && key_of(b, slot[at], window) != key)
            at = (at + 1) & (n_slots - 1);
        slot[at] = slot[at] >= 0 ? slot[at] : t;
        first[t] = slot[at];
    }
    return MOE_OK;
}

static int check_logits(const struct moe_env *env, const struct moe_batch *batch)
{
    const int64_t n = batch->n_experts;
    for (int64_t i = 0; i < batch->n_tokens * n; i++)
        if (!isfinite(batch->router_logits[i]))
            return env->host->fail(env, MOE_EINVAL,
                                   "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                   batch->layer, (int)(i / n), (int)(i % n), (double)batch->router_logits[i]);
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const struct conf *c = s->conf;
    const int32_t n = batch->n_experts;
    const int32_t window = (int32_t)(c->windows.data != NULL ? (int64_t)c->windows.data[batch->layer] : c->window);
    const double wide = s->env->model->d_model;
    const size_t room = (size_t)batch->n_tokens + 1;
    int32_t *first = s->env->host->scratch(s->env, room * sizeof *first), n_segments = 0;
    int32_t *count = s->env->host->scratch(s->env, room * sizeof *count);
    int rc = first == NULL || count == NULL ? MOE_ENOMEM : check_logits(s->env, batch);
    if (rc < 0 || (rc = group_tokens(s->env, batch, window, first)) < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) { /* sums, in the row of a segment's first token */
        const float *logits = batch->router_logits + (int64_t)t * n;
        float *sum = scores + (int64_t)first[t] * n;
        count[t] = 0;
        count[first[t]]++;
        n_segments += first[t] == t;
        for (int32_t e = 0; e < n; e++)
            sum[e] = first[t] == t ? logits[e] : sum[e] + logits[e];
    }
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *p = scores + (int64_t)t * n;
        const float *of = scores + (int64_t)first[t] * n;
        for (int32_t e = 0; e < n; e++)
            p[e] = first[t] == t ? p[e] / (float)count[t] : of[e];
        if (first[t] == t)
            moe_softmax(p, n, p);
    }
    own->flops = n_segments * (2 * wide * n + 4.0 * n) + (double)batch->n_tokens * wide;
    own->bytes = sizeof(float) * ((double)n * wide + (double)batch->n_tokens * wide + (double)n_segments * n);
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    return moe_select_top_k(s->env, batch, scores, bias, s->conf->top_k, s->conf->renormalise, out);
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_OWN_GATE,
    .name = "segment-router",
    .summary = "one decision for every segment of consecutive tokens of a request",
    .source = "Seg-MoE: Multi-Resolution Segment-wise Mixture-of-Experts for Time Series Forecasting Transformers",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
