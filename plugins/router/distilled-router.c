/* SPDX-License-Identifier: Apache-2.0
 * distilled-router.c - a token's id alone decides: a frozen word-embedding router.
 *
 * Source:  StableMoE: Stable Routing Strategy for Mixture of Experts, its second stage, as the authors' repository
 *          (Hunter-DDM/stablemoe) was summarised: R = 50 there, k = 1
 * Differs: the first stage, which trains a gate and distils it into these tensors, is training's. That a weight is the
 *          sigmoid of this router's own score, and k above 1, are choices made here. Claims nothing of quality
 * Cost:    2 T R E FLOPs instead of 2 T H E; an implementation may as well keep a table of [L][V] experts
 *
 *   s_e      = centroid[l][e] . embedding[token id]
 *   score    p = sigmoid(s)
 *   select   the k largest of scale * p + add: without a balancer the same in every step, wherever the token stands
 *   weight   p; p / sum of the chosen p with renormalise = true */
#include <moelab_top_k.h>

struct conf {
    struct moe_tensor embedding, centroid;
    int64_t top_k;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"embedding", MOE_TENSOR, offsetof(struct conf, embedding), 0, 0, 0, "V,R", "", "of the token ids"},
    {"centroid", MOE_TENSOR, offsetof(struct conf, centroid), 0, 0, 0, "L,E,R", "", "of the experts"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 1, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 0, 0, 1, NULL, "",
     "weights of a token add up to 1; false: the scores themselves"},
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
    if (c->embedding.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "embedding: no tensor given, expected a .npy file [V,R]");
    if (c->centroid.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "centroid: no tensor given, expected a .npy file [L,E,R]");
    if (c->embedding.shape[1] != c->centroid.shape[2])
        return env->host->fail(env, MOE_EINVAL, "embedding has %lld numbers per id, centroid has %lld per expert",
                               (long long)c->embedding.shape[1], (long long)c->centroid.shape[2]);
    return MOE_OK;
}

static float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const struct conf *c = s->conf;
    const int64_t n = batch->n_experts, r = c->embedding.shape[1];
    const float *centroid = c->centroid.data + batch->layer * c->centroid.shape[1] * r;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const int32_t id = batch->token_id[t];
        float *p = scores + t * n;
        if (id < 0 || id >= c->embedding.shape[0])
            return s->env->host->fail(s->env, MOE_EINVAL, "token %d: id %d, but embedding has %lld ids", t, id,
                                      (long long)c->embedding.shape[0]);
        for (int32_t e = 0; e < n; e++) {
            p[e] = dot(centroid + e * r, c->embedding.data + id * r, r);
            if (!isfinite(p[e]))
                return s->env->host->fail(s->env, MOE_EINVAL,
                                          "layer %d: token id %d, expert %d: score %g, expected a finite number",
                                          batch->layer, id, e, (double)p[e]);
        }
        moe_sigmoid(p, batch->n_experts, p);
    }
    own->flops = (double)batch->n_tokens * (double)(2 * r * n + 4 * n);
    own->bytes = sizeof(float) * ((double)(n * r) + (double)batch->n_tokens * (double)(r + n));
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
    .needs = MOE_NEEDS_TOKEN_ID | MOE_NEEDS_TENSORS | MOE_OWN_GATE,
    .name = "distilled-router",
    .summary = "a token's id alone decides: a frozen word-embedding router",
    .source = "StableMoE: Stable Routing Strategy for Mixture of Experts",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
