/* SPDX-License-Identifier: Apache-2.0
 * loss-free-bias.c - a bias per expert that rises while it has too few tokens and falls while it has too many.
 *
 * Source:  L. Wang et al. 2024, Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664;
 *          the rate that falls: A Theoretical Framework for Auxiliary-Loss-Free Load Balancing 2025, arXiv 2512.03915
 * Differs: nothing
 * Cost:    O(E) per layer and step
 *
 *   e = mean load - load of the step, per expert
 *   update = sign   b += u sign(e)                        error  b += u e
 *   form   = add    select on s + b, b = 0 at first       scale  select on s b, b = 1 at first
 *   decay  = none   u = rate                              sqrt   u = rate / sqrt(steps so far)
 *
 * Gate weights keep s. Sign with sigmoid scores is what the paper trains with; with softmax scores it takes error. */
#include <moelab.h>

enum { UPDATE_SIGN, UPDATE_ERROR };
enum { FORM_ADD, FORM_SCALE };
enum { DECAY_NONE, DECAY_SQRT };

struct conf {
    double rate;
    int32_t update, form, decay;
};

static const struct moe_param params[] = {
    { "rate", MOE_REAL, offsetof(struct conf, rate), 0.001, 0, 1e3, NULL, "score",
      "u: how far a bias moves in a step" },
    { "update", MOE_ENUM, offsetof(struct conf, update), UPDATE_SIGN, 0, 0, "sign|error", "",
      "what it is proportional to" },
    { "form", MOE_ENUM, offsetof(struct conf, form), FORM_ADD, 0, 0, "add|scale", "", "what it does to scores" },
    { "decay", MOE_ENUM, offsetof(struct conf, decay), DECAY_NONE, 0, 0, "none|sqrt", "", "how the rate falls" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    float *bias;    /* [L][E] */
    int64_t *steps; /* [L] seen so far */
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    const size_t n_layers = (size_t)env->model->n_layers, n = n_layers * (size_t)env->model->n_experts;
    *s = (struct state){ .env = env, .conf = conf };
    s->bias = env->host->alloc(env, n, sizeof *s->bias);
    s->steps = env->host->alloc(env, n_layers, sizeof *s->steps);
    if (s->bias == NULL || s->steps == NULL)
        return MOE_ENOMEM;
    for (size_t i = 0; i < n; i++)
        s->bias[i] = s->conf->form == FORM_SCALE ? 1 : 0;
    return MOE_OK;
}

static float *bias_of(const struct state *s, int32_t layer)
{
    return s->bias + (size_t)layer * (size_t)s->env->model->n_experts;
}

static int adjust(void *self, const struct moe_batch *batch, const float *scores, struct moe_bias *bias,
                  struct moe_cost *own)
{
    const struct state *s = self;
    const float *b = bias_of(s, batch->layer);
    (void)scores;
    for (int32_t e = 0; e < batch->n_experts; e++) {
        if (s->conf->form == FORM_SCALE)
            bias->scale[e] *= b[e];
        else
            bias->add[e] += b[e];
    }
    own->flops = (double)batch->n_tokens * batch->n_experts;
    return MOE_OK;
}

static int observe(void *self, int32_t layer, const int64_t *load)
{
    const struct state *s = self;
    const int32_t n = moe_experts_of(s->env->model, layer);
    float *b = bias_of(s, layer);
    int64_t total = 0;
    double rate = s->conf->rate;
    for (int32_t e = 0; e < n; e++)
        total += load[e];
    s->steps[layer]++;
    if (s->conf->decay == DECAY_SQRT)
        rate /= sqrt((double)s->steps[layer]);
    for (int32_t e = 0; e < n; e++) {
        const double error = (double)total / n - (double)load[e];
        b[e] += (float)(rate * (s->conf->update == UPDATE_ERROR ? error : (error > 0) - (error < 0)));
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_CROSS_BATCH, /* later steps of one request depend on the loads of all */
    .name = "loss-free-bias",
    .summary = "a bias per expert that follows its load; weights keep the score",
    .source = "L. Wang et al. 2024, arXiv 2408.15664",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.balancer = { .adjust = adjust, .observe = observe },
};
