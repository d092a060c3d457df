/* SPDX-License-Identifier: Apache-2.0
 * cosine-router.c - cosines between a projected token and expert embeddings, the k largest chosen.
 *
 * Source:  Z. Chi et al. 2022, On the Representation Collapse of Sparse Mixture of Experts, arXiv 2204.09179 (X-MoE)
 * Differs: k is the run's (the paper: 1); tau is given, not learned here; a vector of length 0 has cosine 0 with all
 * Cost:    2 T (H R + R E) FLOPs instead of 2 T H E, with R = E / 2 in the paper; one projected token of scratch
 *
 *   z_r      = project[r] . h
 *   s_e      = cos(z, embedding[e]) / tau                 so |s_e| <= 1 / tau
 *   score    p = softmax(s)   gate = softmax;   sigmoid(s)   gate = sigmoid
 *   select   the k largest of scale * p + add
 *   weight   p, or p / sum of the chosen p with renormalise = true */
#include <moelab_top_k.h>

enum gate { SOFTMAX, SIGMOID };

struct conf {
    struct moe_tensor project, embedding;
    int64_t top_k;
    int32_t gate;
    double tau;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"project", MOE_TENSOR, offsetof(struct conf, project), 0, 0, 0, "L,R,H", "", "projections to R numbers"},
    {"embedding", MOE_TENSOR, offsetof(struct conf, embedding), 0, 0, 0, "L,E,R", "", "expert embeddings"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    {"gate", MOE_ENUM, offsetof(struct conf, gate), 0, 0, 0, "softmax|sigmoid", "", "what makes scores of cosines"},
    {"tau", MOE_REAL, offsetof(struct conf, tau), 0, 0, 100, NULL, "",
     "temperature; 0: where the paper starts, 0.3 with softmax and 0.07 with sigmoid"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 0, 0, 1, NULL, "",
     "weights of a token add up to 1; false: the scores themselves"},
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
    if (c->project.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "project: no tensor given, expected a .npy file [L,R,H]");
    if (c->embedding.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "embedding: no tensor given, expected a .npy file [L,E,R]");
    if (c->project.shape[1] != c->embedding.shape[2])
        return env->host->fail(env, MOE_EINVAL, "project makes %lld numbers, embedding has %lld",
                               (long long)c->project.shape[1], (long long)c->embedding.shape[2]);
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

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const struct conf *c = s->conf;
    const struct moe_env *env = s->env;
    int64_t n = batch->n_experts, width = batch->n_hidden, r = c->project.shape[1];
    const float *project = c->project.data + batch->layer * r * c->project.shape[2];
    const float *embedding = c->embedding.data + batch->layer * c->embedding.shape[1] * r;
    const double tau = c->tau > 0 ? c->tau : c->gate == SOFTMAX ? 0.3 : 0.07;
    float *z = env->host->scratch(env, (size_t)r * sizeof *z);
    int rc = check_width(env, c, batch);
    if (rc < 0 || z == NULL)
        return rc < 0 ? rc : MOE_ENOMEM;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *p = scores + t * n;
        for (int64_t i = 0; i < r; i++)
            z[i] = dot(project + i * width, batch->hidden + t * width, width);
        const float length = sqrtf(dot(z, z, r));
        for (int32_t e = 0; e < n; e++) {
            const float *m = embedding + e * r, both = length * sqrtf(dot(m, m, r));
            p[e] = both > 0 ? (float)(dot(z, m, r) / both / tau) : both;
            if (!isfinite(p[e]))
                return not_finite(env, batch, t, e, (double)p[e]);
            p[e] = c->gate == SIGMOID ? 1 / (1 + expf(-p[e])) : p[e];
        }
        if (c->gate == SOFTMAX)
            moe_softmax(p, batch->n_experts, p);
    }
    /* projection and cosines; lengths; divisions and the gate. Embeddings' lengths are the gate's to keep. */
    own->flops = (double)batch->n_tokens * (double)(2 * r * width + 2 * r * n + 2 * r + 6 * n);
    own->bytes = sizeof(float) * ((double)(r * width + r * n) + (double)batch->n_tokens * (double)(width + n));
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
    .name = "cosine-router",
    .summary = "cosines of a projected token and expert embeddings, the k largest chosen",
    .source = "Z. Chi et al. 2022, arXiv 2204.09179",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
