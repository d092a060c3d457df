/* SPDX-License-Identifier: Apache-2.0
 * activation-norm-router.c - every expert tries the token; those that answer loudest are chosen.
 *
 * Source:  A. Lv et al. 2025, Autonomy-of-Experts Models, arXiv 2501.13074, from the abstract; response = softplus:
 *          CompeteSMoE -- Statistically Guaranteed Mixture of Experts Training via Competition, from the abstract
 * Differs: softmax over norms as weights is a choice made here. CompeteSMoE ranks by the whole expert's output: here by
 *          that of `factor`; the cheap router that it trains to predict the winners is softmax-top-k
 * Cost:    2 T E H R FLOPs, reading all factors of a layer; there is no gate. Every expert has to see every token: the
 *          factors are taken to be on every device, and no traffic is charged
 *
 *   a_e      = factor[e] h                                 R numbers
 *   s_e      = |a_e|                response = norm;       mean of log(1 + exp(a_e))   response = softplus
 *   score    p = softmax(s)
 *   select   the k largest of scale * p + add
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

enum response { NORM, SOFTPLUS };

struct conf {
    struct moe_tensor factor;
    int64_t top_k;
    int32_t response;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"factor", MOE_TENSOR, offsetof(struct conf, factor), 0, 0, 0, "L,E,R,H", "", "first, low-rank factors of experts"},
    {"response", MOE_ENUM, offsetof(struct conf, response), 0, 0, 0, "norm|softplus", "", "how loud an answer is"},
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
    if (c->factor.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "factor: no tensor given, expected a .npy file [L,E,R,H]");
    return MOE_OK;
}

static float dot(const float *a, const float *b, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* Hidden states are as wide as the tensor expects. */
static int check_width(const struct moe_env *env, const struct conf *conf, const struct moe_batch *batch)
{
    if (batch->n_hidden != conf->factor.shape[3])
        return env->host->fail(env, MOE_EINVAL, "layer %d: hidden states are %d wide, factor expects %lld",
                               batch->layer, batch->n_hidden, (long long)conf->factor.shape[3]);
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
    int64_t n = batch->n_experts, width = batch->n_hidden, r = c->factor.shape[2];
    const float *factor = c->factor.data + batch->layer * c->factor.shape[1] * r * c->factor.shape[3];
    int rc = check_width(s->env, c, batch);
    if (rc < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *p = scores + t * n;
        for (int32_t e = 0; e < n; e++) {
            double sum = 0;
            for (int64_t i = 0; i < r; i++) {
                double a = (double)dot(factor + (e * r + i) * width, batch->hidden + t * width, width);
                sum += c->response == NORM ? a * a : fmax(a, 0) + log1p(exp(-fabs(a)));
            }
            p[e] = (float)(c->response == NORM ? sqrt(sum) : sum / (double)r);
            if (!isfinite(p[e]))
                return not_finite(s->env, batch, t, e, (double)p[e]);
        }
        moe_softmax(p, batch->n_experts, p);
    }
    own->flops = (double)batch->n_tokens * (double)n * (double)(2 * r * width + 2 * r + 5); /* products, responses, p */
    own->bytes = sizeof(float) * ((double)(n * r * width) + (double)batch->n_tokens * (double)(width + n));
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
    .name = "activation-norm-router",
    .summary = "every expert tries the token, those that answer loudest are chosen",
    .source = "A. Lv et al. 2025, arXiv 2501.13074",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
