/* SPDX-License-Identifier: Apache-2.0
 * prompt-level-router.c - one decision per request, on its pooled prompt, kept for every token that follows.
 *
 * Source:  MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning, from the abstract
 * Differs: how the prompt is pooled is not in the abstract: here its mean, and as the gate is linear its logits are
 *          the mean of its tokens'. The prompt is what the first batch with a request has of it: of a prompt in chunks
 *          the first, of a workload that only decodes one token. A balancer's bias counts when the decision is made,
 *          not later. Claims nothing of quality
 * Cost:    2 H E FLOPs per request and layer instead of per token, and n H for the mean of its n tokens; afterwards a
 *          look-up. [L][requests][k] experts are remembered, and no request is forgotten
 *
 *   score    p = softmax(mean of the logits of the request's tokens in its first batch); in later batches, where no
 *            gate runs, the p of the experts that were chosen, 0 for the others
 *   select   at first the k largest of scale * p + add; later the same again
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

struct conf {
    int64_t top_k, requests;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"requests", MOE_INT, offsetof(struct conf, requests), 4096, 1, 1 << 24, NULL, "requests",
     "for which there is room; more in one run are an error"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
     "weights of a token add up to 1; false: probabilities among all experts"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    int64_t n_slots;    /* a power of two */
    int32_t *slot;      /* [n_slots] 1 + place of a request, 0: empty */
    int64_t *request;   /* [requests] by place */
    int32_t n_requests, most;
    int32_t *n_chosen;  /* [L][requests] 1 + how many, 0: not decided yet */
    int32_t *expert;    /* [L][requests][most] */
    float *p;           /* the same */
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    const struct conf *c = conf;
    *s = (struct state){.env = env, .conf = c, .n_slots = 16};
    const size_t n = (size_t)c->requests, n_all = (size_t)env->model->n_layers * n;
    while (s->n_slots < 2 * c->requests)
        s->n_slots *= 2;
    s->most = c->top_k > 0 ? (int32_t)c->top_k : env->model->top_k;
    s->slot = env->host->alloc(env, (size_t)s->n_slots, sizeof *s->slot);
    s->request = env->host->alloc(env, n, sizeof *s->request);
    s->n_chosen = env->host->alloc(env, n_all, sizeof *s->n_chosen);
    s->expert = env->host->alloc(env, n_all * (size_t)s->most, sizeof *s->expert);
    s->p = env->host->alloc(env, n_all * (size_t)s->most, sizeof *s->p);
    return s->slot && s->request && s->n_chosen && s->expert && s->p ? MOE_OK : MOE_ENOMEM;
}

static int64_t key_of(const struct moe_batch *b, int32_t t)
{
    return b->request != NULL ? b->request[t] : 0;
}

/* The place of a token's request, which is made if it is not there; or an error. */
static int32_t find_place(struct state *s, const struct moe_batch *b, int32_t t)
{
    const int64_t key = key_of(b, t);
    int64_t at = (int64_t)(moe_mix((uint64_t)key) & (uint64_t)(s->n_slots - 1));
    while (s->slot[at] > 0 && s->request[s->slot[at] - 1] != key)
        at = (at + 1) & (s->n_slots - 1);
    if (s->slot[at] > 0)
        return s->slot[at] - 1;
    if (s->n_requests == s->conf->requests)
        return s->env->host->fail(s->env, MOE_EINVAL, "step %d: more than requests = %lld in one run", b->step,
                                  (long long)s->conf->requests);
    s->request[s->n_requests] = key;
    s->slot[at] = ++s->n_requests;
    return s->n_requests - 1;
}

/* For every token the first of the batch that is of its request, which may be itself. */
static int group_tokens(const struct moe_env *env, const struct moe_batch *b, int32_t *first)
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
        const int64_t key = key_of(b, t);
        int64_t at = (int64_t)(moe_mix((uint64_t)key) & (uint64_t)(n_slots - 1));
        while (slot[at] >= 0 && key_of(b, slot[at]) != key)
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

/* Scores of a request that is decided: what is remembered of them. */
static void recall(const struct state *s, int64_t decision, int32_t n, float *p)
{
    for (int32_t e = 0; e < n; e++)
        p[e] = 0;
    for (int32_t i = 0; i < s->n_chosen[decision] - 1; i++)
        p[s->expert[decision * s->most + i]] = s->p[decision * s->most + i];
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    struct state *s = self;
    const int32_t n = batch->n_experts;
    const double wide = s->env->model->d_model;
    const size_t room = (size_t)batch->n_tokens + 1;
    int32_t *first = s->env->host->scratch(s->env, room * sizeof *first), n_new = 0, n_pooled = 0;
    int32_t *count = s->env->host->scratch(s->env, room * sizeof *count);
    int rc = first == NULL || count == NULL ? MOE_ENOMEM : check_logits(s->env, batch);
    if (rc < 0 || (rc = group_tokens(s->env, batch, first)) < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) { /* sums, in the row of a request's first token */
        const float *logits = batch->router_logits + (int64_t)t * n;
        float *sum = scores + (int64_t)first[t] * n;
        count[t] = 0;
        count[first[t]]++;
        for (int32_t e = 0; e < n; e++)
            sum[e] = first[t] == t ? logits[e] : sum[e] + logits[e];
    }
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *p = scores + (int64_t)t * n;
        const int32_t place = first[t] == t ? find_place(s, batch, t) : 0;
        const int64_t decision = batch->layer * s->conf->requests + place;
        if (place < 0)
            return place;
        for (int32_t e = 0; e < n; e++)
            p[e] = first[t] == t ? p[e] / (float)count[t] : scores[(int64_t)first[t] * n + e];
        if (first[t] != t)
            continue;
        if (s->n_chosen[decision] > 0) {
            recall(s, decision, n, p);
            continue;
        }
        moe_softmax(p, n, p);
        n_new++;
        n_pooled += count[t];
    }
    own->flops = n_new * (2 * wide * n + 4.0 * n) + n_pooled * wide;
    own->bytes = sizeof(float) * ((n_new > 0 ? (double)n * wide : 0) + n_pooled * wide + (double)n_new * n) +
                 2 * sizeof(float) * (double)batch->n_tokens * s->most;
    return MOE_OK;
}

/* Weights of the k chosen. A balancer may force choices whose scores are all 0: they share alike. */
static void weigh(const float *p, int32_t k, bool renormalise, float *weight)
{
    float sum = 0;
    for (int32_t i = 0; i < k; i++)
        sum += weight[i] = p[i];
    for (int32_t i = 0; renormalise && i < k; i++)
        weight[i] = sum > 0 ? weight[i] / sum : 1 / (float)k;
}

/* The decision for a request, from its scores p. */
static void decide(struct state *s, const struct moe_batch *b, int64_t decision, const float *p,
                   const struct moe_bias *bias, float *choice)
{
    int32_t *expert = s->expert + decision * s->most, there = 0;
    for (int32_t e = 0; e < b->n_experts; e++) {
        choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
        there += choice[e] > -INFINITY;
    }
    const int32_t k = s->most < there ? s->most : there;
    if (k > 0)
        moe_top_k(choice, b->n_experts, k, expert);
    for (int32_t i = 0; i < k; i++)
        s->p[decision * s->most + i] = p[expert[i]];
    s->n_chosen[decision] = k + 1;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, k = moe_k_of(env, batch, s->conf->top_k);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    if (k < 0 || choice == NULL)
        return k < 0 ? k : MOE_ENOMEM;
    const int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * s->most);
    if (rc < 0)
        return rc;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const int32_t place = find_place(s, batch, t);
        if (place < 0)
            return place;
        const int64_t decision = batch->layer * s->conf->requests + place;
        if (s->n_chosen[decision] == 0)
            decide(s, batch, decision, scores + (int64_t)t * n, bias, choice);
        const int32_t n_chosen = s->n_chosen[decision] - 1;
        for (int32_t i = 0; i < n_chosen; i++)
            out->expert[out->n + i] = s->expert[decision * s->most + i];
        weigh(s->p + decision * s->most, n_chosen, s->conf->renormalise, out->weight + out->n);
        out->offset[t + 1] = out->n += n_chosen;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_OWN_GATE,
    .name = "prompt-level-router",
    .summary = "one decision per request, on its pooled prompt, kept for every token that follows",
    .source = "MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
