/* SPDX-License-Identifier: Apache-2.0
 * confidence-cascade.c - experts one after another, until a gate says that it is enough.
 *
 * Source:  Long-tailed Recognition by Routing Diverse Distribution-Aware Experts, from the abstract
 * Differs: the small gate after each expert reads the token's hidden state alone, not what the experts before have
 *          answered, so that the whole cascade is known beforehand. That experts share alike is a choice made here.
 *          Claims nothing of quality
 * Cost:    2 H FLOPs per gate asked: experts of a token, or one less where all run. Balancers cannot bias it: the
 *          order is part of the rule
 *
 *   n        the first n with sigmoid(gate[l][n - 1] . h) <= enough; `most` (0: all) if there is none
 *   experts  0 to n - 1, at least the first
 *   weight   1 / n */
#include <moelab.h>

struct conf {
    struct moe_tensor gate;
    double enough;
    int64_t most;
};

static const struct moe_param params[] = {
    {"gate", MOE_TENSOR, offsetof(struct conf, gate), 0, 0, 0, "L,E,H", "",
     "after each expert; the last is never asked"},
    {"enough", MOE_REAL, offsetof(struct conf, enough), 0.5, 0, 1, NULL, "",
     "another expert runs where a gate's sigmoid is above it"},
    {"most", MOE_INT, offsetof(struct conf, most), 0, 0, 1 << 16, NULL, "experts", "per token at most; 0: all"},
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
        return env->host->fail(env, MOE_EINVAL, "gate: no tensor given, expected a .npy file [L,E,H]");
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
        return env->host->fail(env, MOE_EINVAL, "layer %d: hidden states are %d wide, gate expects %lld",
                               batch->layer, batch->n_hidden, (long long)width);
    return MOE_OK;
}

/* How many experts a token runs, or an error. */
static int32_t cascade(const struct state *s, const struct moe_batch *b, int32_t t, int32_t most)
{
    const struct moe_tensor *gate = &s->conf->gate;
    const int64_t width = b->n_hidden;
    for (int32_t n = 1; n < most; n++) {
        const float *w = gate->data + (b->layer * gate->shape[1] + n - 1) * width;
        const float x = dot(w, b->hidden + t * width, width);
        if (!isfinite(x))
            return s->env->host->fail(s->env, MOE_EINVAL,
                                      "layer %d: token %d, expert %d: gate %g, expected a finite number", b->layer, t,
                                      n - 1, (double)x);
        if (!(1 / (1 + exp(-(double)x)) > s->conf->enough))
            return n;
    }
    return most;
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, most = s->conf->most > 0 ? (int32_t)s->conf->most : n;
    (void)bias;
    int rc = check_width(env, s->conf->gate.shape[2], batch);
    if (rc == MOE_OK && most > n)
        rc = env->host->fail(env, MOE_EINVAL, "layer %d: most = %d of %d experts", batch->layer, most, n);
    if (rc < 0 || (rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most)) < 0)
        return rc;
    double n_asked = 0;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const int32_t runs = cascade(s, batch, t, most);
        if (runs < 0)
            return runs;
        n_asked += runs < most ? runs : most - 1;
        for (int32_t e = 0; e < runs; e++) {
            out->expert[out->n] = e;
            out->weight[out->n++] = 1 / (float)runs;
        }
        out->offset[t + 1] = out->n;
    }
    own->flops = n_asked * (2.0 * batch->n_hidden + 4);
    own->bytes = sizeof(float) * (double)batch->n_hidden * (double)(batch->n_tokens + most - 1);
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_HIDDEN | MOE_NEEDS_TENSORS | MOE_OWN_GATE,
    .name = "confidence-cascade",
    .summary = "experts one after another, until a gate says that it is enough",
    .source = "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.route = route},
};
