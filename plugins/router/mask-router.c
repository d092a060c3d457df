/* SPDX-License-Identifier: Apache-2.0
 * mask-router.c - of the experts a token sees what its id lets it: one if it is rare, several if it is frequent.
 *
 * Source:  MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts, from the abstract
 * Differs: the abstract says neither which ids are frequent nor how many experts those see: here the share `frequent`
 *          of all ids, most frequent first, ties to the lower id, and half of the experts. Masks differ from layer to
 *          layer, a choice made here. Claims nothing of quality
 * Cost:    O(T E), with O(visible) draws per token; one byte per id, sorted once in O(V log V)
 *
 *   mask     V different experts drawn from the run's seed, the layer and the id: V = 1 of a rare id, `visible` of a
 *            frequent one; fixed for the whole run
 *   score    p = softmax(logits) over the experts that the token sees, 0 for the others
 *   select   the k largest of scale * p + add among those seen; all of them where they are fewer than k
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

#include <stdlib.h>

enum { HOOK_MASK };

struct conf {
    struct moe_tensor frequency;
    double frequent;
    int64_t visible, top_k;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"frequency", MOE_TENSOR, offsetof(struct conf, frequency), 0, 0, 0, "V", "",
     "how often each token id occurs, on any scale: only the order counts"},
    {"frequent", MOE_REAL, offsetof(struct conf, frequent), 0.1, 0, 1, NULL, "", "share of all ids that are not rare"},
    {"visible", MOE_INT, offsetof(struct conf, visible), 0, 0, 1 << 16, NULL, "experts",
     "that a frequent id sees; 0: half of them"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
     "weights of a token add up to 1; false: probabilities among those seen"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    uint8_t *is_frequent; /* [V] */
};

struct word {
    float count;
    int32_t id;
};

static int by_count(const void *left, const void *right)
{
    const struct word *a = left, *b = right;
    if (a->count != b->count)
        return a->count > b->count ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    const struct conf *c = conf;
    *s = (struct state){.env = env, .conf = c};
    if (c->frequency.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "frequency: no tensor given, expected a .npy file [V]");
    const int64_t n = c->frequency.shape[0];
    struct word *word = env->host->scratch(env, (size_t)n * sizeof *word + 1);
    s->is_frequent = env->host->alloc(env, (size_t)n + 1, 1);
    if (word == NULL || s->is_frequent == NULL)
        return MOE_ENOMEM;
    for (int64_t i = 0; i < n; i++) {
        word[i] = (struct word){c->frequency.data[i], (int32_t)i};
        if (isnan(word[i].count))
            return env->host->fail(env, MOE_EINVAL, "frequency: id %lld has %g, expected a number", (long long)i,
                                   (double)word[i].count);
    }
    qsort(word, (size_t)n, sizeof *word, by_count);
    for (int64_t i = 0; i < llround(c->frequent * (double)n); i++)
        s->is_frequent[word[i].id] = 1;
    return MOE_OK;
}

/* Which experts a token sees, into mask [E]; how many, or an error. Draws as Floyd has it: draw i of [0, E - V + i], or
 * the last of them where that is taken. */
static int32_t see(const struct state *s, const struct moe_batch *b, int32_t t, uint8_t *mask)
{
    const int32_t n = b->n_experts;
    const int64_t id = b->token_id[t], n_ids = s->conf->frequency.shape[0];
    int32_t visible = s->conf->visible > 0 ? (int32_t)s->conf->visible : (n + 1) / 2;
    if (id < 0 || id >= n_ids)
        return s->env->host->fail(s->env, MOE_EINVAL, "token %d: id %lld, but frequency has %lld ids", t,
                                  (long long)id, (long long)n_ids);
    if (visible > n)
        return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: visible = %d of %d experts", b->layer, visible, n);
    visible = s->is_frequent[id] ? visible : 1;
    for (int32_t e = 0; e < n; e++)
        mask[e] = 0;
    for (int32_t i = 0; i < visible; i++) {
        const int32_t last = n - visible + i;
        const int32_t drawn = (int32_t)(moe_rand(s->env, HOOK_MASK, 0, b->layer, id * n + i) % (uint64_t)(last + 1));
        mask[mask[drawn] ? last : drawn] = 1;
    }
    return visible;
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
    const int32_t n = batch->n_experts;
    int64_t n_seen = 0;
    uint8_t *mask = s->env->host->scratch(s->env, (size_t)n);
    const int rc = check_logits(s->env, batch);
    if (rc < 0 || mask == NULL)
        return rc < 0 ? rc : MOE_ENOMEM;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *logits = batch->router_logits + (int64_t)t * n;
        float *p = scores + (int64_t)t * n, top = -INFINITY, sum = 0;
        const int32_t visible = see(s, batch, t, mask);
        if (visible < 0)
            return visible;
        for (int32_t e = 0; e < n; e++)
            top = mask[e] && logits[e] > top ? logits[e] : top;
        for (int32_t e = 0; e < n; e++)
            sum += p[e] = mask[e] ? expf(logits[e] - top) : 0;
        for (int32_t e = 0; e < n; e++)
            p[e] /= sum;
        n_seen += visible;
    }
    own->flops = 4.0 * (double)n_seen; /* subtract, exponential, add, divide */
    own->bytes = sizeof(float) * (double)batch->n_tokens * n + sizeof(float) * (double)n_seen;
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, most = moe_k_of(env, batch, s->conf->top_k);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    uint8_t *mask = env->host->scratch(env, (size_t)n);
    if (most < 0 || choice == NULL || mask == NULL)
        return most < 0 ? most : MOE_ENOMEM;
    const int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most);
    if (rc < 0)
        return rc;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        const int32_t visible = see(s, batch, t, mask);
        int32_t there = 0;
        if (visible < 0)
            return visible;
        for (int32_t e = 0; e < n; e++) {
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
            choice[e] = mask[e] ? choice[e] : -INFINITY;
            there += choice[e] > -INFINITY;
        }
        const int32_t k = most < there ? most : there;
        if (k > 0)
            moe_top_k(choice, n, k, out->expert + out->n);
        moe_weigh(p, out->expert + out->n, k, s->conf->renormalise, out->weight + out->n);
        out->offset[t + 1] = out->n += k;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_NEEDS_TOKEN_ID | MOE_NEEDS_TENSORS,
    .name = "mask-router",
    .summary = "top-k among the experts that a token's id lets it see: one if it is rare",
    .source = "MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
