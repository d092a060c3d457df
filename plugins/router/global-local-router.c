/* SPDX-License-Identifier: Apache-2.0
 * global-local-router.c - a token's logits and its task's likeness to the experts, added up.
 *
 * Source:  match = cosine: Glider: Global and Local Instruction-Driven Expert Router; match = dot: SpeechMoE2:
 *          Mixture-of-Experts Model with Improved Routing, whose gate reads an utterance's embedding beside the token:
 *          a linear gate of two vectors is the sum of two; each from the abstract
 * Differs: a request's label stands for its task, and embeddings of tasks are a tensor: what writes the instruction or
 *          embeds it is not here, nor is its cost. That the two scores are added before the softmax is a choice made
 *          here, as is the weight of the global one. Claims nothing of quality
 * Cost:    T E additions beside the gate; likenesses of all tasks and experts are computed once, [L][N][E]
 *
 *   g_e      = cos(task[label], expert[l][e]), or their dot product
 *   score    p = softmax(logits + strength g)
 *   select   the k largest of scale * p + add
 *   weight   p / sum of the chosen p; p with renormalise = false */
#include <moelab_top_k.h>

enum match { COSINE, DOT };

struct conf {
    struct moe_tensor task, expert;
    double strength;
    int64_t top_k;
    int32_t match;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"task", MOE_TENSOR, offsetof(struct conf, task), 0, 0, 0, "N,R", "", "embeddings of what N labels stand for"},
    {"expert", MOE_TENSOR, offsetof(struct conf, expert), 0, 0, 0, "L,E,R", "", "embeddings of the experts"},
    {"match", MOE_ENUM, offsetof(struct conf, match), COSINE, 0, 0, "cosine|dot", "", "likeness of two embeddings"},
    {"strength", MOE_REAL, offsetof(struct conf, strength), 1, -1e6, 1e6, NULL, "logit", "of a likeness of 1"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
     "weights of a token add up to 1; false: probabilities among all experts"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    float *global; /* [L][N][E] strength g */
};

static double dot(const float *a, const float *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* A vector of length 0 has cosine 0 with all. */
static double likeness(const struct conf *c, const float *a, const float *b, int64_t n)
{
    const double both = c->match == COSINE ? sqrt(dot(a, a, n) * dot(b, b, n)) : 1;
    return both > 0 ? dot(a, b, n) / both : both;
}

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    const struct conf *c = conf;
    *s = (struct state){.env = env, .conf = c};
    if (c->task.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "task: no tensor given, expected a .npy file [N,R]");
    if (c->expert.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "expert: no tensor given, expected a .npy file [L,E,R]");
    const int64_t r = c->task.shape[1], n_tasks = c->task.shape[0], n = c->expert.shape[1];
    if (r != c->expert.shape[2])
        return env->host->fail(env, MOE_EINVAL, "task has %lld numbers per label, expert has %lld per expert",
                               (long long)r, (long long)c->expert.shape[2]);
    s->global = env->host->alloc(env, (size_t)(c->expert.shape[0] * n_tasks * n), sizeof *s->global);
    if (s->global == NULL)
        return MOE_ENOMEM;
    for (int64_t l = 0; l < c->expert.shape[0]; l++)
        for (int64_t i = 0; i < n_tasks; i++)
            for (int64_t e = 0; e < n; e++) {
                const float *embedding = c->expert.data + (l * n + e) * r;
                const double g = c->strength * likeness(c, c->task.data + i * r, embedding, r);
                if (!isfinite((float)g))
                    return env->host->fail(env, MOE_EINVAL,
                                           "layer %lld: task %lld, expert %lld: %g, expected a finite number",
                                           (long long)l, (long long)i, (long long)e, g);
                s->global[(l * n_tasks + i) * n + e] = (float)g;
            }
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const int32_t n = batch->n_experts;
    const int64_t n_tasks = s->conf->task.shape[0], stride = s->conf->expert.shape[1];
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const int32_t label = batch->label[t];
        float *p = scores + (int64_t)t * n;
        if (label < 0 || label >= n_tasks)
            return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: token %d: label %d, task has %lld labels",
                                      batch->layer, t, label, (long long)n_tasks);
        const float *global = s->global + (batch->layer * n_tasks + label) * stride;
        for (int32_t e = 0; e < n; e++) {
            p[e] = batch->router_logits[(int64_t)t * n + e] + global[e];
            if (!isfinite(p[e]))
                return s->env->host->fail(s->env, MOE_EINVAL,
                                          "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                          batch->layer, t, e, (double)p[e]);
        }
        moe_softmax(p, n, p);
    }
    own->flops = 5.0 * (double)batch->n_tokens * n;
    own->bytes = 3.0 * sizeof(float) * (double)batch->n_tokens * n;
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
    .needs = MOE_NEEDS_LOGITS | MOE_NEEDS_LABEL | MOE_NEEDS_TENSORS,
    .name = "global-local-router",
    .summary = "a token's logits and its task's likeness to the experts, added up",
    .source = "Glider: Global and Local Instruction-Driven Expert Router",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
