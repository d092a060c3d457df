/* SPDX-License-Identifier: Apache-2.0
 * attention-router.c - attention among experts: a score takes the other experts' into account.
 *
 * Source:  S. Wu et al. 2024, Yuan 2.0-M32: Mixture of Experts with Attention Router, arXiv 2405.17976, from the
 *          abstract and a one-line account of the rule
 * Differs: whether rows of the E x E matrix are softmaxed along keys, as here, is not in what was read, nor whether the
 *          scores pass another softmax before selection: they do here, so that they are weights. Claims nothing
 * Cost:    6 T H E FLOPs for three products instead of one, and O(T E^2)
 *
 *   q, k, v  = gate[0] h, gate[1] h, gate[2] h             E numbers each
 *   s_e      = sum over f of softmax over f (q_e k_f) v_f
 *   score    p = softmax(s)
 *   select   the k largest of scale * p + add
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

struct conf {
    struct moe_tensor gate;
    int64_t top_k;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"gate", MOE_TENSOR, offsetof(struct conf, gate), 0, 0, 0, "L,3,E,H", "", "query, key and value of every expert"},
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
    if (c->gate.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "gate: no tensor given, expected a .npy file [L,3,E,H]");
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
    if (batch->n_hidden != conf->gate.shape[3])
        return env->host->fail(env, MOE_EINVAL, "layer %d: hidden states are %d wide, gate expects %lld",
                               batch->layer, batch->n_hidden, (long long)conf->gate.shape[3]);
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
    const struct moe_env *env = s->env;
    int64_t n = batch->n_experts, width = batch->n_hidden, all = c->gate.shape[2];
    const float *gate = c->gate.data + batch->layer * 3 * all * c->gate.shape[3];
    float *q = env->host->scratch(env, (size_t)(4 * n) * sizeof *q), *k = q + n, *v = k + n, *row = v + n;
    int rc = check_width(env, c, batch);
    if (rc < 0 || q == NULL)
        return rc < 0 ? rc : MOE_ENOMEM;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *h = batch->hidden + t * width;
        float *p = scores + t * n;
        for (int64_t e = 0; e < n; e++) {
            q[e] = dot(gate + e * width, h, width);
            k[e] = dot(gate + (all + e) * width, h, width);
            v[e] = dot(gate + (2 * all + e) * width, h, width);
        }
        for (int32_t e = 0; e < n; e++) {
            for (int64_t f = 0; f < n; f++)
                row[f] = q[e] * k[f];
            moe_softmax(row, batch->n_experts, row);
            p[e] = dot(row, v, n);
            if (!isfinite(p[e]))
                return not_finite(env, batch, t, e, (double)p[e]);
        }
        moe_softmax(p, batch->n_experts, p);
    }
    /* three products; of every pair: multiply, softmax (4), multiply and add; p */
    own->flops = (double)batch->n_tokens * (double)n * (double)(6 * width + 7 * n + 4);
    own->bytes = sizeof(float) * ((double)(3 * n * width) + (double)batch->n_tokens * (double)(width + n));
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
    .name = "attention-router",
    .summary = "attention among experts, so that a score takes the others' into account",
    .source = "S. Wu et al. 2024, arXiv 2405.17976",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
