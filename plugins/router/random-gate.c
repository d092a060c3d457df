/* SPDX-License-Identifier: Apache-2.0
 * random-gate.c - a linear gate that was drawn once and is never trained; k is chosen freely.
 *
 * Source:  T. Chen et al. 2023, Sparse MoE as the New Dropout (SMoE-Dropout), arXiv 2303.01610 (from the abstract)
 * Differs: nothing of the routing; with from = 0, as a model is served, k is what it is told
 * Cost:    the gate's product, which the core counts; O(T E) besides; weights of [L][E][H]
 *
 *   logits = W h, W[e][i] normal with variance 1 / H, drawn from the run's seed for each layer
 *   k        from + (top_k - from) min(1, step / steps), rounded, halves up; top_k with from = 0
 *   select   the k largest of scale * p + add, p = softmax(logits);   weight = p / sum of the chosen p */
#include <moelab.h>

enum { HOOK_GATE };

struct conf {
    int64_t top_k, from, steps;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "experts per token; 0: the model's" },
    { "from", MOE_INT, offsetof(struct conf, from), 0, 0, 1 << 16, NULL, "experts",
      "per token at step 0, rising to top_k; 0: top_k at once" },
    { "steps", MOE_INT, offsetof(struct conf, steps), 100, 1, INT32_MAX, NULL, "steps", "until k is top_k" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    float **gate; /* [L] [E][H]; NULL: not drawn yet */
    int32_t *width;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    *s = (struct state){ .env = env, .conf = conf };
    s->gate = env->host->alloc(env, (size_t)env->model->n_layers, sizeof *s->gate);
    s->width = env->host->alloc(env, (size_t)env->model->n_layers, sizeof *s->width);
    return s->gate != NULL && s->width != NULL ? MOE_OK : MOE_ENOMEM;
}

/* Box and Muller's. */
static double normal(const struct moe_env *env, int32_t layer, int64_t i)
{
    const double u = 1 - moe_unit(moe_rand(env, HOOK_GATE, 0, layer, 2 * i));
    const double v = moe_unit(moe_rand(env, HOOK_GATE, 0, layer, 2 * i + 1));
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

static int draw(struct state *s, const struct moe_batch *b)
{
    const size_t n = (size_t)b->n_experts * (size_t)b->n_hidden;
    if (s->gate[b->layer] != NULL && s->width[b->layer] == b->n_hidden)
        return MOE_OK;
    float *gate = s->env->host->alloc(s->env, n, sizeof *gate);
    if (gate == NULL)
        return MOE_ENOMEM;
    for (size_t i = 0; i < n; i++)
        gate[i] = (float)(normal(s->env, b->layer, (int64_t)i) / sqrt(b->n_hidden));
    s->gate[b->layer] = gate;
    s->width[b->layer] = b->n_hidden;
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    struct state *s = self;
    const int32_t n = batch->n_experts, h = batch->n_hidden;
    if (batch->hidden == NULL)
        return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: the workload has no hidden states", batch->layer);
    int rc = draw(s, batch);
    for (int32_t t = 0; t < batch->n_tokens && rc == MOE_OK; t++) {
        float *row = scores + (int64_t)t * n;
        for (int32_t e = 0; e < n; e++) {
            const float *w = s->gate[batch->layer] + (int64_t)e * h, *x = batch->hidden + (int64_t)t * h;
            row[e] = 0;
            for (int32_t i = 0; i < h; i++)
                row[e] += w[i] * x[i];
        }
        moe_softmax(row, n, row);
    }
    own->flops = 4.0 * batch->n_tokens * n;
    own->bytes = sizeof(float) * (double)batch->n_tokens * n;
    return rc;
}

static int32_t k_now(const struct conf *c, int32_t step, int32_t top_k)
{
    const double done = step < c->steps ? (double)step / (double)c->steps : 1;
    return c->from > 0 ? (int32_t)floor((double)c->from + done * (double)(top_k - c->from) + 0.5) : top_k;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, top_k = s->conf->top_k > 0 ? (int32_t)s->conf->top_k : batch->top_k;
    if (top_k > n)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, top_k, n);
    if (s->conf->from > top_k)
        return env->host->fail(env, MOE_EINVAL, "layer %d: from = %lld, expected top_k = %d or less", batch->layer,
                               (long long)s->conf->from, top_k);
    const int32_t k = k_now(s->conf, batch->step, top_k);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    int rc = choice != NULL ? env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k) : MOE_ENOMEM;
    if (rc < 0)
        return rc;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        int32_t *expert = out->expert + (int64_t)t * k;
        float *weight = out->weight + (int64_t)t * k, sum = 0;
        for (int32_t e = 0; e < n; e++)
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
        moe_top_k(choice, n, k, expert);
        for (int32_t i = 0; i < k; i++)
            sum += weight[i] = p[expert[i]];
        for (int32_t i = 0; i < k; i++)
            weight[i] = sum > 0 ? weight[i] / sum : 1 / (float)k;
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_HIDDEN,
    .name = "random-gate",
    .summary = "a linear gate drawn once and never trained; the k largest of its softmax",
    .source = "T. Chen et al. 2023, arXiv 2303.01610",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .score = score, .select = select },
};
