/* SPDX-License-Identifier: Apache-2.0
 * cross-layer-router.c - a recurrent gate: what a token's gate saw in earlier layers takes part in the choice.
 *
 * Source:  RMoE, Layerwise Recurrent Router for Mixture-of-Experts; the cell: K. Cho et al. 2014, arXiv 1406.1078
 * Differs: the cell has the biases and the order of gates (reset, update, new) of PyTorch's GRU, which is a choice made
 *          here. A token that did not pass earlier layers of this step starts from a state of zeros
 * Cost:    2 T (H R + 6 R^2 + R E) FLOPs instead of 2 T H E (R is 128 in the paper); R numbers a token between layers
 *
 *   x        = project[l] h
 *   r, z     = sigmoid(input x + in_bias + recurrent s + bias)    of s: the token's state after the layer before
 *   n        = tanh(input x + in_bias + r (recurrent s + bias))
 *   s'       = (1 - z) n + z s                                     one cell, shared by all layers
 *   score    p = softmax(gate[l] s')
 *   select   the k largest of scale * p + add
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

struct conf {
    struct moe_tensor project, input, recurrent, input_bias, bias, gate;
    int64_t top_k;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"project", MOE_TENSOR, offsetof(struct conf, project), 0, 0, 0, "L,R,H", "", "projections to R numbers"},
    {"input", MOE_TENSOR, offsetof(struct conf, input), 0, 0, 0, "3,R,R", "", "the cell's: reset, update, new"},
    {"recurrent", MOE_TENSOR, offsetof(struct conf, recurrent), 0, 0, 0, "3,R,R", "", "the same, of the state"},
    {"input_bias", MOE_TENSOR, offsetof(struct conf, input_bias), 0, 0, 0, "3,R", "", "not given: zeros"},
    {"bias", MOE_TENSOR, offsetof(struct conf, bias), 0, 0, 0, "3,R", "", "of the recurrent part; not given: zeros"},
    {"gate", MOE_TENSOR, offsetof(struct conf, gate), 0, 0, 0, "L,E,R", "", "scores of states"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
     "weights of a token add up to 1; false: probabilities among all experts"},
    MOE_PARAM_END,
};

/* A token of this step. `layers`: how many it has passed; 0: the place is free. */
struct memory {
    int64_t token;
    int32_t layers;
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    int64_t step, n, room; /* tokens known; places, a power of 2, more than half of them free */
    struct memory *memory; /* [room] */
    float *kept;           /* [room][R] their states */
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    const struct conf *c = conf;
    *(struct state *)self = (struct state){.env = env, .conf = c, .step = -1};
    if (c->project.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "project: no tensor given, expected a .npy file [L,R,H]");
    if (c->input.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "input: no tensor given, expected a .npy file [3,R,R]");
    if (c->recurrent.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "recurrent: no tensor given, expected a .npy file [3,R,R]");
    if (c->gate.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "gate: no tensor given, expected a .npy file [L,E,R]");
    const int64_t r = c->project.shape[1];
    if (c->input.shape[1] != r || c->input.shape[2] != r || c->recurrent.shape[1] != r || c->recurrent.shape[2] != r ||
        c->gate.shape[2] != r || (c->input_bias.data != NULL && c->input_bias.shape[1] != r) ||
        (c->bias.data != NULL && c->bias.shape[1] != r))
        return env->host->fail(env, MOE_EINVAL, "project makes R = %lld numbers, expected the same R in input, "
                               "recurrent, input_bias, bias and gate", (long long)r);
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
    if (batch->n_hidden != conf->project.shape[2])
        return env->host->fail(env, MOE_EINVAL, "layer %d: hidden states are %d wide, project expects %lld",
                               batch->layer, batch->n_hidden, (long long)conf->project.shape[2]);
    return MOE_OK;
}

static int not_finite(const struct moe_env *env, const struct moe_batch *batch, int32_t token, int32_t expert, double x)
{
    return env->host->fail(env, MOE_EINVAL, "layer %d: token %d, expert %d: score %g, expected a finite number",
                           batch->layer, token, expert, x);
}

/* What identifies a token, whoever shares its batch. */
static int64_t token_key(const struct moe_batch *batch, int32_t t)
{
    int64_t request = batch->request != NULL ? batch->request[t] : 0;
    int64_t position = batch->position != NULL ? batch->position[t] : t;
    return request * (INT64_C(1) << 32) + position;
}

/* Where a token is, or the free place that is its own. */
static int64_t place_of(const struct state *s, int64_t token)
{
    int64_t at = (int64_t)(moe_mix((uint64_t)token) & (uint64_t)(s->room - 1));
    while (s->memory[at].layers > 0 && s->memory[at].token != token)
        at = (at + 1) & (s->room - 1);
    return at;
}

/* Room for n more tokens. What it outgrows stays allocated until the run ends: less than what it has then. */
static int grow(struct state *s, int64_t n)
{
    const int64_t r = s->conf->project.shape[1];
    struct state old = *s;
    while (s->room <= 2 * (s->n + n))
        s->room = s->room > 0 ? 2 * s->room : 64;
    if (s->room == old.room)
        return MOE_OK;
    s->memory = s->env->host->alloc(s->env, (size_t)s->room, sizeof *s->memory);
    s->kept = s->env->host->alloc(s->env, (size_t)(s->room * r), sizeof *s->kept);
    if (s->memory == NULL || s->kept == NULL)
        return MOE_ENOMEM;
    for (int64_t i = 0; i < old.room; i++) {
        if (old.memory[i].layers == 0)
            continue;
        const int64_t at = place_of(s, old.memory[i].token);
        s->memory[at] = old.memory[i];
        for (int64_t j = 0; j < r; j++)
            s->kept[at * r + j] = old.kept[i * r + j];
    }
    return MOE_OK;
}

static float sigmoid(float x)
{
    return 1 / (1 + expf(-x));
}

/* One step of the cell; `next` is not `was`. */
static void cell(const struct conf *c, int64_t r, const float *x, const float *was, float *next)
{
    for (int64_t i = 0; i < r; i++) {
        float in[3], again[3];
        for (int64_t g = 0; g < 3; g++) {
            in[g] = dot(c->input.data + (g * r + i) * r, x, r);
            in[g] += c->input_bias.data != NULL ? c->input_bias.data[g * r + i] : 0;
            again[g] = dot(c->recurrent.data + (g * r + i) * r, was, r);
            again[g] += c->bias.data != NULL ? c->bias.data[g * r + i] : 0;
        }
        const float reset = sigmoid(in[0] + again[0]), z = sigmoid(in[1] + again[1]);
        next[i] = (1 - z) * tanhf(in[2] + reset * again[2]) + z * was[i];
    }
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    struct state *s = self;
    const struct conf *c = s->conf;
    const struct moe_env *env = s->env;
    const int64_t n = batch->n_experts, width = batch->n_hidden, r = c->project.shape[1], layer = batch->layer;
    float *x = env->host->scratch(env, (size_t)(2 * r) * sizeof *x), *next = x + r;
    int rc = check_width(env, c, batch);
    if (rc < 0 || x == NULL)
        return rc < 0 ? rc : MOE_ENOMEM;
    for (int64_t i = 0; s->step != batch->step && i < s->room; i++)
        s->memory[i].layers = 0;
    s->n = s->step != batch->step ? 0 : s->n;
    s->step = batch->step;
    if ((rc = grow(s, batch->n_tokens)) < 0)
        return rc;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const int64_t token = token_key(batch, t), at = place_of(s, token);
        float *kept = s->kept + at * r, *p = scores + t * n;
        const bool known = s->memory[at].layers > 0;
        for (int64_t i = 0; i < r; i++) {
            x[i] = dot(c->project.data + (layer * r + i) * width, batch->hidden + t * width, width);
            kept[i] = known ? kept[i] : 0;
        }
        s->n += !known;
        cell(c, r, x, kept, next);
        s->memory[at] = (struct memory){token, batch->layer + 1};
        for (int64_t i = 0; i < r; i++)
            kept[i] = next[i];
        for (int32_t e = 0; e < n; e++) {
            p[e] = dot(c->gate.data + (layer * c->gate.shape[1] + e) * r, next, r);
            if (!isfinite(p[e]))
                return not_finite(env, batch, t, e, (double)p[e]);
        }
        moe_softmax(p, batch->n_experts, p);
    }
    own->flops = (double)batch->n_tokens * (double)(2 * r * width + 12 * r * r + 16 * r + 2 * r * n + 4 * n);
    own->bytes = sizeof(float) * ((double)(r * width + 6 * r * r + r * n) +
                                  (double)batch->n_tokens * (double)(width + 2 * r + n));
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
    .name = "cross-layer-router",
    .summary = "a recurrent gate, whose state a token carries from layer to layer",
    .source = "RMoE, Layerwise Recurrent Router for Mixture-of-Experts",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
