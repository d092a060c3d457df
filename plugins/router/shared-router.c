/* SPDX-License-Identifier: Apache-2.0
 * shared-router.c - one gate for all layers, so that a token's choices resemble each other from layer to layer.
 *
 * Source:  Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech Recognition (the abstract)
 * Differs: softmax and top k are those of softmax-top-k, a choice made here; claims nothing of quality
 * Cost:    2 T H E FLOPs as any linear gate, whose weights are read from one place in all layers
 *
 *   score    p = softmax(gate h)
 *   select   the k largest of scale * p + add
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

struct conf {
    struct moe_tensor gate;
    int64_t top_k;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"gate", MOE_TENSOR, offsetof(struct conf, gate), 0, 0, 0, "E,H", "", "the gate of all layers"},
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
        return env->host->fail(env, MOE_EINVAL, "gate: no tensor given, expected a .npy file [E,H]");
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
    if (batch->n_hidden != conf->gate.shape[1])
        return env->host->fail(env, MOE_EINVAL, "layer %d: hidden states are %d wide, gate expects %lld",
                               batch->layer, batch->n_hidden, (long long)conf->gate.shape[1]);
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
    const int64_t n = batch->n_experts, width = batch->n_hidden;
    int rc = check_width(s->env, s->conf, batch);
    if (rc < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *p = scores + t * n;
        for (int32_t e = 0; e < n; e++) {
            p[e] = dot(s->conf->gate.data + e * width, batch->hidden + t * width, width);
            if (!isfinite(p[e]))
                return not_finite(s->env, batch, t, e, (double)p[e]);
        }
        moe_softmax(p, batch->n_experts, p);
    }
    own->flops = (double)batch->n_tokens * (double)n * (double)(2 * width + 4);
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
    .name = "shared-router",
    .summary = "one gate for all layers, the k largest of its softmax chosen",
    .source = "Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech Recognition",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
