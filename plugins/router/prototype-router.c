/* SPDX-License-Identifier: Apache-2.0
 * prototype-router.c - experts own places in the space of hidden states; the k nearest, or likeliest, are chosen.
 *
 * Source:  Input Domain Aware MoE: Decoupling Routing Decisions from Task Optimization in Mixture of Experts; with
 *          top_k = 1 nearest means: On the effectiveness of discrete representations in sparse mixture of experts, and
 *          Towards Foundational Models for Dynamical System Reconstruction; each from the abstract
 * Differs: one variance for all components and dimensions, which is a choice made here; means and shares are fitted
 *          elsewhere. Claims nothing of quality
 * Cost:    3 T E H FLOPs instead of 2 T H E
 *
 *   score    p_e = share_e exp(-|h - mean_e|^2 / (2 variance)) / sum over experts of the same: the posterior
 *   select   the k largest of scale * p + add
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

struct conf {
    struct moe_tensor mean, share;
    int64_t top_k;
    double variance;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"mean", MOE_TENSOR, offsetof(struct conf, mean), 0, 0, 0, "L,E,H", "", "where experts are"},
    {"log_share", MOE_TENSOR, offsetof(struct conf, share), 0, 0, 0, "L,E", "",
     "log of the share of tokens that an expert has; not given: equal shares"},
    {"variance", MOE_REAL, offsetof(struct conf, variance), 1, 1e-6, 1e12, NULL, "",
     "of every component and dimension"},
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
    if (c->mean.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "mean: no tensor given, expected a .npy file [L,E,H]");
    return MOE_OK;
}

/* Hidden states are as wide as the tensor expects. */
static int check_width(const struct moe_env *env, const struct conf *conf, const struct moe_batch *batch)
{
    if (batch->n_hidden != conf->mean.shape[2])
        return env->host->fail(env, MOE_EINVAL, "layer %d: hidden states are %d wide, mean expects %lld",
                               batch->layer, batch->n_hidden, (long long)conf->mean.shape[2]);
    return MOE_OK;
}

static int not_finite(const struct moe_env *env, const struct moe_batch *batch, int32_t token, int32_t expert, double x)
{
    return env->host->fail(env, MOE_EINVAL, "layer %d: token %d, expert %d: score %g, expected a finite number",
                           batch->layer, token, expert, x);
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const struct conf *c = s->conf;
    int64_t n = batch->n_experts, width = batch->n_hidden;
    const float *mean = c->mean.data + batch->layer * c->mean.shape[1] * c->mean.shape[2];
    const float *share = c->share.data != NULL ? c->share.data + batch->layer * c->share.shape[1] : NULL;
    int rc = check_width(s->env, c, batch);
    if (rc < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *h = batch->hidden + t * width;
        float *p = scores + t * n;
        for (int32_t e = 0; e < n; e++) {
            double far = 0;
            for (int64_t i = 0; i < width; i++) {
                const double d = (double)h[i] - (double)mean[e * width + i];
                far += d * d;
            }
            p[e] = (float)((share != NULL ? (double)share[e] : 0) - far / (2 * c->variance));
            if (!isfinite(p[e]))
                return not_finite(s->env, batch, t, e, (double)p[e]);
        }
        moe_softmax(p, batch->n_experts, p);
    }
    own->flops = (double)batch->n_tokens * (double)n * (double)(3 * width + 6); /* distances, posterior */
    own->bytes = sizeof(float) * ((double)(n * width) + (double)batch->n_tokens * (double)(width + n));
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
    .needs = MOE_NEEDS_HIDDEN | MOE_NEEDS_TENSORS | MOE_OWN_GATE,
    .name = "prototype-router",
    .summary = "experts own places in the space of hidden states, the k likeliest are chosen",
    .source = "Input Domain Aware MoE: Decoupling Routing Decisions from Task Optimization in Mixture of Experts",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
