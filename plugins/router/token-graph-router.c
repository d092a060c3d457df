/* SPDX-License-Identifier: Apache-2.0
 * token-graph-router.c - scores blended with those of similar tokens of the request, then top-k.
 *
 * Source:  Improving Routing in Sparse Mixture of Experts with Graph of Tokens, from the abstract
 * Differs: the abstract does not say what similarity is, nor whether later tokens count: here the cosine of hidden
 *          states, and with causal = false all tokens of the request, else those up to the token. Only tokens of the
 *          batch take part: when decoding none but the token itself. The form with attention matrices is out of
 *          moelab's scope. Claims nothing of quality
 * Cost:    O(n^2 (H + E)) for n tokens of a request in the batch, beside the gate; [T][H + E] of scratch
 *
 *   A_ij     = exp(cos(h_i, h_j) / tau) / sum over j of the same     j of the request of i
 *   score    p = A softmax(logits)
 *   select   the k largest of scale * p + add
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

struct conf {
    int64_t top_k;
    double tau;
    bool causal, renormalise;
};

static const struct moe_param params[] = {
    {"tau", MOE_REAL, offsetof(struct conf, tau), 0.2, 1e-3, 1e6, NULL, "",
     "temperature of similarities: a small one leaves tokens to themselves"},
    {"causal", MOE_BOOL, offsetof(struct conf, causal), 1, 0, 1, NULL, "", "later tokens do not count"},
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

static int64_t key_of(const struct moe_batch *b, int32_t t)
{
    return b->request != NULL ? b->request[t] : 0;
}

static int64_t position_of(const struct moe_batch *b, int32_t t)
{
    return b->position != NULL ? b->position[t] : t;
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

static float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* Directions of hidden states; one of length 0 has none, and cosine 0 with all others. */
static int direct(const struct moe_env *env, const struct moe_batch *b, float *unit)
{
    const int64_t width = b->n_hidden;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        const float *h = b->hidden + t * width, length = sqrtf(dot(h, h, width));
        if (!isfinite(length))
            return env->host->fail(env, MOE_EINVAL, "layer %d: token %d: its hidden state is %g long, expected a "
                                   "finite number", b->layer, t, (double)length);
        for (int64_t i = 0; i < width; i++)
            unit[t * width + i] = length > 0 ? h[i] / length : 0;
    }
    return MOE_OK;
}

/* What token t makes of the tokens of its request, a list that begins at `at`: its scores, into p. Pairs looked at. */
static int32_t blend(const struct conf *c, const struct moe_batch *b, int32_t t, int32_t at, const int32_t *next,
                     const float *unit, const float *plain, float *p)
{
    const int64_t width = b->n_hidden, n = b->n_experts;
    int32_t n_pairs = 0;
    float sum = 0;
    for (int32_t e = 0; e < n; e++)
        p[e] = 0;
    for (; at >= 0; at = next[at]) {
        if (c->causal && position_of(b, at) > position_of(b, t))
            continue;
        const double same = at == t ? 1 : (double)dot(unit + t * width, unit + at * width, width);
        const float a = (float)exp((same - 1) / c->tau);
        for (int32_t e = 0; e < n; e++)
            p[e] += a * plain[at * n + e];
        sum += a;
        n_pairs++;
    }
    for (int32_t e = 0; e < n; e++) /* the token itself counts 1 */
        p[e] /= sum;
    return n_pairs;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_host *host = s->env->host;
    const int64_t n = batch->n_experts, width = batch->n_hidden;
    const size_t room = (size_t)batch->n_tokens + 1;
    int32_t *first = host->scratch(s->env, room * sizeof *first), *next = host->scratch(s->env, room * sizeof *next);
    int32_t *last = host->scratch(s->env, room * sizeof *last);
    float *unit = host->scratch(s->env, room * (size_t)width * sizeof *unit);
    float *plain = host->scratch(s->env, room * (size_t)n * sizeof *plain);
    double n_pairs = 0;
    int rc = !first || !next || !last || !unit || !plain ? MOE_ENOMEM : check_logits(s->env, batch);
    if (rc < 0 || (rc = group_tokens(s->env, batch, first)) < 0 || (rc = direct(s->env, batch, unit)) < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        moe_softmax(batch->router_logits + t * n, batch->n_experts, plain + t * n);
        next[t] = -1;
        if (first[t] != t)
            next[last[first[t]]] = t;
        last[first[t]] = t;
    }
    for (int32_t t = 0; t < batch->n_tokens; t++)
        n_pairs += blend(s->conf, batch, t, first[t], next, unit, plain, scores + t * n);
    own->flops = n_pairs * (double)(2 * width + 2 * n + 3) + (double)batch->n_tokens * (double)(3 * width + 4 * n);
    own->bytes = sizeof(float) * (double)(width + n) * (n_pairs + 2.0 * batch->n_tokens);
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
    .needs = MOE_NEEDS_LOGITS | MOE_NEEDS_HIDDEN,
    .name = "token-graph-router",
    .summary = "scores blended with those of similar tokens of the request, then top-k",
    .source = "Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
