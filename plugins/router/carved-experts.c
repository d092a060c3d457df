/* SPDX-License-Identifier: Apache-2.0
 * carved-experts.c - experts cut out of a dense FFN: one neuron of each says how much it is wanted.
 *
 * Source:  CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference, from the abstract and a one-line
 *          account of the rule
 * Differs: which neurons are shared and how the others are grouped is decided before, elsewhere; shared ones are the
 *          model's `shared` experts. That a neuron is wanted by the magnitude of its SwiGLU activation, and the
 *          softmax, are choices made here; so is that carved experts weigh 1, as the slices of an FFN do. The bias
 *          that the paper keeps even with is a balancer's (loss-free-bias). Claims nothing of quality
 * Cost:    4 T H E FLOPs instead of 2 T H E: two products for each representative neuron
 *
 *   a_e      = silu(gate_neuron[l][e] . h) (up_neuron[l][e] . h)
 *   score    p = softmax(|a|)
 *   select   the k largest of scale * p + add
 *   weight   1; p / sum of the chosen p with weights = softmax */
#include <moelab_top_k.h>

enum weights { ONE, SOFTMAX };

struct conf {
    struct moe_tensor gate, up;
    int64_t top_k;
    int32_t weights;
};

static const struct moe_param params[] = {
    {"gate_neuron", MOE_TENSOR, offsetof(struct conf, gate), 0, 0, 0, "L,E,H", "",
     "gate weights of each group's representative neuron"},
    {"up_neuron", MOE_TENSOR, offsetof(struct conf, up), 0, 0, 0, "L,E,H", "", "its up weights"},
    {"weights", MOE_ENUM, offsetof(struct conf, weights), ONE, 0, 0, "one|softmax", "", "what chosen experts weigh"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
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
        return env->host->fail(env, MOE_EINVAL, "gate_neuron: no tensor given, expected a .npy file [L,E,H]");
    if (c->up.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "up_neuron: no tensor given, expected a .npy file [L,E,H]");
    if (c->gate.shape[2] != c->up.shape[2])
        return env->host->fail(env, MOE_EINVAL, "gate_neuron is %lld wide, up_neuron %lld",
                               (long long)c->gate.shape[2], (long long)c->up.shape[2]);
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
static int check_width(const struct moe_env *env, int64_t width, const struct moe_batch *batch)
{
    if (batch->n_hidden != width)
        return env->host->fail(env, MOE_EINVAL, "layer %d: hidden states are %d wide, gate_neuron expects %lld",
                               batch->layer, batch->n_hidden, (long long)width);
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const struct conf *c = s->conf;
    const int64_t n = batch->n_experts, width = batch->n_hidden;
    const int64_t skip = batch->layer * c->gate.shape[1] * c->gate.shape[2];
    const int rc = check_width(s->env, c->gate.shape[2], batch);
    if (rc < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *h = batch->hidden + t * width;
        float *p = scores + t * n;
        for (int32_t e = 0; e < n; e++) {
            const float g = dot(c->gate.data + skip + e * width, h, width);
            p[e] = fabsf(g / (1 + expf(-g)) * dot(c->up.data + skip + e * width, h, width));
            if (!isfinite(p[e]))
                return s->env->host->fail(s->env, MOE_EINVAL,
                                          "layer %d: token %d, expert %d: activation %g, expected a finite number",
                                          batch->layer, t, e, (double)p[e]);
        }
        moe_softmax(p, batch->n_experts, p);
    }
    own->flops = (double)batch->n_tokens * (double)n * (double)(4 * width + 9);
    own->bytes = sizeof(float) * (2.0 * (double)(n * width) + (double)batch->n_tokens * (double)(width + n));
    return MOE_OK;
}

/* Weights of the k chosen. With softmax a balancer may force choices whose scores are all 0: they share alike. */
static void weigh(const float *p, const int32_t *expert, int32_t k, enum weights weights, float *weight)
{
    float sum = 0;
    for (int32_t i = 0; i < k; i++)
        sum += p[expert[i]];
    for (int32_t i = 0; i < k; i++)
        weight[i] = weights == ONE ? 1 : sum > 0 ? p[expert[i]] / sum : 1 / (float)k;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, most = moe_k_of(env, batch, s->conf->top_k);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    if (most < 0 || choice == NULL)
        return most < 0 ? most : MOE_ENOMEM;
    const int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most);
    if (rc < 0)
        return rc;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        const int32_t there = moe_bias_scores(p, bias, n, choice);
        const int32_t k = most < there ? most : there;
        if (k > 0)
            moe_top_k(choice, n, k, out->expert + out->n);
        weigh(p, out->expert + out->n, k, (enum weights)s->conf->weights, out->weight + out->n);
        out->offset[t + 1] = out->n += k;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_HIDDEN | MOE_NEEDS_TENSORS | MOE_OWN_GATE,
    .name = "carved-experts",
    .summary = "experts cut out of a dense FFN: one neuron of each says how much it is wanted",
    .source = "CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
