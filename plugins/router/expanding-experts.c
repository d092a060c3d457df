/* SPDX-License-Identifier: Apache-2.0
 * expanding-experts.c - an expert is added when tokens come that none of those there has seen the like of.
 *
 * Source:  Self-Expansion of Pre-trained Models with Mixture of Adapters for Continual Learning, from the abstract
 * Differs: the density that an expert knows is that of the distance from the mean of the tokens it was made for, where
 *          the abstract speaks of a descriptor that is trained; a batch stands for what arrives, and decides as a
 *          whole. A new expert's column of the gate is the next of the logits, as if it had been trained at once.
 *          Claims nothing of quality
 * Cost:    3 H FLOPs per token and expert there, beside the gate's product, which the core counts for all E columns
 *
 *   d_e(h)   |h - mean_e| / sqrt(H); mean_e, and the mean m_e and standard deviation s_e of d_e, are those of the batch
 *            that expert e was made for: the first `start` for the first batch
 *   shift    of expert e: the batch's mean of d_e is above m_e + threshold s_e
 *   expand   by one expert, where all report a shift and the layer has less than E
 *   score    p = softmax(logits) over the experts there, 0 for the others
 *   select   all that are there, or the top_k largest of scale * p + add
 *   weight   p / sum of the chosen p */
#include <moelab.h>

struct conf {
    int64_t start, top_k;
    double threshold;
};

static const struct moe_param params[] = {
    {"start", MOE_INT, offsetof(struct conf, start), 1, 1, 1 << 16, NULL, "experts", "of a layer at first"},
    {"threshold", MOE_REAL, offsetof(struct conf, threshold), 3, 0, 1e6, NULL, "standard deviations",
     "by which tokens lie further out than those an expert was made for"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token at most; 0: all that are there"},
    MOE_PARAM_END,
};

struct layer {
    int32_t n_experts, width;
    float *mean;          /* [E][width] */
    double *far, *spread; /* [E] mean and standard deviation of distances */
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    struct layer *layer; /* [L] */
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    *s = (struct state){.env = env, .conf = conf};
    s->layer = env->host->alloc(env, (size_t)env->model->n_layers, sizeof *s->layer);
    return s->layer != NULL ? MOE_OK : MOE_ENOMEM;
}

/* Mean and standard deviation of a batch's distances from a point. */
static void measure(const struct moe_batch *b, const float *point, double *far, double *spread)
{
    double sum = 0, squares = 0;
    for (int64_t t = 0; t < b->n_tokens; t++) {
        double square = 0;
        for (int64_t i = 0; i < b->n_hidden; i++) {
            const double d = (double)b->hidden[t * b->n_hidden + i] - (double)point[i];
            square += d * d;
        }
        square /= b->n_hidden;
        sum += sqrt(square);
        squares += square;
    }
    *far = sum / b->n_tokens;
    *spread = sqrt(fmax(squares / b->n_tokens - *far * *far, 0));
}

/* One more expert, made for this batch. */
static void expand(struct layer *l, const struct moe_batch *b)
{
    float *mean = l->mean + (int64_t)l->n_experts * l->width;
    for (int64_t i = 0; i < l->width; i++) {
        double sum = 0;
        for (int64_t t = 0; t < b->n_tokens; t++)
            sum += (double)b->hidden[t * l->width + i];
        mean[i] = (float)(sum / b->n_tokens);
    }
    measure(b, mean, &l->far[l->n_experts], &l->spread[l->n_experts]);
    l->n_experts++;
}

/* All experts there report a shift. */
static bool is_new(const struct conf *c, const struct layer *l, const struct moe_batch *b)
{
    for (int32_t e = 0; e < l->n_experts; e++) {
        double far, spread;
        measure(b, l->mean + (int64_t)e * l->width, &far, &spread);
        if (!(far > l->far[e] + c->threshold * l->spread[e]))
            return false;
    }
    return true;
}

static int check_input(const struct state *s, const struct moe_batch *b)
{
    const struct moe_host *host = s->env->host;
    const struct layer *l = &s->layer[b->layer];
    for (int64_t i = 0; i < (int64_t)b->n_tokens * b->n_hidden; i++)
        if (!isfinite(b->hidden[i]))
            return host->fail(s->env, MOE_EINVAL,
                              "layer %d: token %d: element %d of its hidden state is %g, expected a finite number",
                              b->layer, (int)(i / b->n_hidden), (int)(i % b->n_hidden), (double)b->hidden[i]);
    if (s->conf->start > b->n_experts)
        return host->fail(s->env, MOE_EINVAL, "layer %d: start = %lld of %d experts", b->layer,
                          (long long)s->conf->start, b->n_experts);
    if (l->mean != NULL && l->width != b->n_hidden)
        return host->fail(s->env, MOE_EINVAL, "layer %d: hidden states are %d wide, and were %d", b->layer, b->n_hidden,
                          l->width);
    return MOE_OK;
}

/* Makes experts for the batch, if it needs some. */
static int adapt(struct state *s, const struct moe_batch *b)
{
    const struct moe_host *host = s->env->host;
    struct layer *l = &s->layer[b->layer];
    const size_t n = (size_t)b->n_experts, cells = n * (size_t)b->n_hidden;
    if (l->mean == NULL) {
        l->width = b->n_hidden;
        l->mean = host->alloc(s->env, cells, sizeof *l->mean);
        l->far = host->alloc(s->env, n, sizeof *l->far);
        l->spread = host->alloc(s->env, n, sizeof *l->spread);
        if (!l->mean || !l->far || !l->spread)
            return MOE_ENOMEM;
    }
    if (l->n_experts == 0)
        while (l->n_experts < s->conf->start)
            expand(l, b);
    else if (l->n_experts < b->n_experts && is_new(s->conf, l, b))
        expand(l, b);
    return MOE_OK;
}

static int check_logits(const struct moe_env *env, const struct moe_batch *batch)
{
    const int64_t n = batch->n_experts;
    for (int64_t i = 0; i < batch->n_tokens * n; i++)
        if (!isfinite(batch->router_logits[i]))
            return env->host->fail(env, MOE_EINVAL,
                                   "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                   batch->layer, (int)(i / n), (int)(i % n), (double)batch->router_logits[i]);
    return MOE_OK;
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    struct state *s = self;
    const int32_t n = batch->n_experts;
    int rc = check_logits(s->env, batch);
    if (rc < 0 || (rc = check_input(s, batch)) < 0 || (batch->n_tokens > 0 && (rc = adapt(s, batch)) < 0))
        return rc;
    const int32_t there = s->layer[batch->layer].n_experts;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        float *p = scores + (int64_t)t * n;
        moe_softmax(batch->router_logits + (int64_t)t * n, there, p);
        for (int32_t e = there; e < n; e++)
            p[e] = 0;
    }
    own->flops = (double)batch->n_tokens * there * (3.0 * batch->n_hidden + 4);
    own->bytes = sizeof(float) * (double)(batch->n_tokens + there) * ((double)batch->n_hidden + n);
    return MOE_OK;
}

/* Weights of the k chosen. A balancer may force choices whose scores are all 0: they share alike. */
static void weigh(const float *p, const int32_t *expert, int32_t k, float *weight)
{
    float sum = 0;
    for (int32_t i = 0; i < k; i++)
        sum += weight[i] = p[expert[i]];
    for (int32_t i = 0; i < k; i++)
        weight[i] = sum > 0 ? weight[i] / sum : 1 / (float)k;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t n = batch->n_experts, n_there = s->layer[batch->layer].n_experts;
    const int32_t most = s->conf->top_k > 0 && s->conf->top_k < n_there ? (int32_t)s->conf->top_k : n_there;
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    if (choice == NULL)
        return MOE_ENOMEM;
    const int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * most);
    if (rc < 0)
        return rc;
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *p = scores + (int64_t)t * n;
        int32_t there = 0;
        for (int32_t e = 0; e < n; e++) {
            choice[e] = bias != NULL ? bias->scale[e] * p[e] + bias->add[e] : p[e];
            choice[e] = e < n_there ? choice[e] : -INFINITY;
            there += choice[e] > -INFINITY;
        }
        const int32_t k = most < there ? most : there;
        if (k > 0)
            moe_top_k(choice, n, k, out->expert + out->n);
        weigh(p, out->expert + out->n, k, out->weight + out->n);
        out->offset[t + 1] = out->n += k;
    }
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_NEEDS_HIDDEN | MOE_CROSS_BATCH,
    .name = "expanding-experts",
    .summary = "an expert is added when tokens come that none of those there has seen the like of",
    .source = "Self-Expansion of Pre-trained Models with Mixture of Adapters for Continual Learning",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
