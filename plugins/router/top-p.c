/* SPDX-License-Identifier: Apache-2.0
 * top-p.c - as many experts as it takes for their probabilities to add up to more than p.
 *
 * Source:  Q. Huang et al. 2024, Harder Tasks Need More Experts: Dynamic Routing in MoE Models, arXiv 2403.07652
 * Differs: the published code keeps all experts where p >= 1, because its sum never exceeds p; here that is what the
 *          rule says, too. Equal probabilities go to the lower id
 * Cost:    O(T E), and a top-k whose k doubles until the sum is reached
 *
 *   score    s = softmax(logits)
 *   select   experts by scale * s + add, largest first, up to and including the first at which the sum of s exceeds p;
 *            the first always; max_k at most
 *   weight   s, divided by the sum of the chosen s if renormalise */
#include <moelab.h>

struct conf {
    double p;
    int64_t max_k;
    bool renormalise;
};

static const struct moe_param params[] = {
    { "p", MOE_REAL, offsetof(struct conf, p), 0.4, 0, 1, NULL, "", "probability that the chosen experts exceed" },
    { "max_k", MOE_INT, offsetof(struct conf, max_k), 0, 0, 1 << 16, NULL, "experts",
      "most experts per token; 0: all there are" },
    { "renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 0, 0, 1, NULL, "",
      "weights of a token add up to 1; false: probabilities among all experts" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){ .env = env, .conf = conf };
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const int64_t n = batch->n_experts, n_scores = batch->n_tokens * n;
    (void)self;
    for (int64_t i = 0; i < n_scores; i += n)
        moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    own->flops = 4.0 * (double)n_scores;
    own->bytes = 2.0 * sizeof(float) * (double)n_scores;
    return MOE_OK;
}

/* How many of the experts in `expert`, in order, it takes; 0: more than have been looked for. */
static int32_t enough(const float *p, const int32_t *expert, int32_t found, double threshold)
{
    double sum = 0;
    for (int32_t i = 0; i < found; i++)
        if ((sum += (double)p[expert[i]]) > threshold)
            return i + 1;
    return 0;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts;
    const int32_t max_k = s->conf->max_k > 0 && s->conf->max_k < n ? (int32_t)s->conf->max_k : n;
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    int32_t *expert = env->host->scratch(env, (size_t)n * sizeof *expert);
    if (choice == NULL || expert == NULL)
        return MOE_ENOMEM;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        int32_t there = 0, k = 0;
        float sum = 0;
        for (int32_t e = 0; e < n; e++) {
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
            there += choice[e] > -INFINITY;
        }
        const int32_t most = max_k < there ? max_k : there;
        for (int32_t found = most < 8 ? most : 8; most > 0; found = 2 * found < most ? 2 * found : most) {
            moe_top_k(choice, n, found, expert);
            k = enough(p, expert, found, s->conf->p);
            if (k > 0 || found == most)
                break;
        }
        k = k > 0 ? k : most;
        if (env->host->routes_reserve(env, out, out->n + k) < 0)
            return MOE_ENOMEM;
        for (int32_t i = 0; i < k; i++)
            sum += p[expert[i]];
        for (int32_t i = 0; i < k; i++) {
            out->expert[out->n] = expert[i];
            out->weight[out->n++] = !s->conf->renormalise ? p[expert[i]] : sum > 0 ? p[expert[i]] / sum : 1 / (float)k;
        }
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "top-p",
    .summary = "as many experts as it takes for their probabilities to exceed p",
    .source = "Q. Huang et al. 2024, arXiv 2403.07652",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
