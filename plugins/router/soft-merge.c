/* SPDX-License-Identifier: Apache-2.0
 * soft-merge.c - one expert for all tokens of a request, whose weights are an average of all experts' weights.
 *
 * Source:  Soft Merging of Experts with Adaptive Routing (from the abstract); with `table` the shape of Multi-Head
 *          Adapter Routing for Cross-Task Generalization and Mixture-of-Supernets (from their abstracts, completed from
 *          memory)
 * Differs: whether gate and input are normalised before they are multiplied is not in the abstract: logits come as the
 *          model makes them. The gate is linear, so the logits of the mean activation are the mean of the logits.
 *          Multi-head routing mixes every head of an adapter by weights of its own: here all heads share one mixture.
 *          The supernets' gate reads an encoding of the architecture: here its result, one row of `table` per label.
 *          Claims nothing of quality
 * Cost:    H additions per token and 2 H E FLOPs per request, and no other gate; with `table` a look-up. Merging
 *          is work of the layer, not of deciding: 2 FLOPs per weight of each expert that is added to a merged one
 *
 *   request  p = softmax(mean over the tokens of the request that are in the batch of their logits)
 *   table    p = softmax(table[label of the token])
 *   merged   sum over experts e of p_e times the weights of e, one for each request (or label)
 *
 * A later token of a request changes what earlier ones go through, so without a table it is not for causal models that
 * generate; requests do not change each other. */
#include <moelab.h>

struct conf {
    struct moe_tensor table;
};

static const struct moe_param params[] = {
    {"table", MOE_TENSOR, offsetof(struct conf, table), 0, 0, 0, "C,E", "",
     "logits of the mixture that each label has; not given: mixtures follow the tokens of a request"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    int32_t *slot; /* [room] of the last call's routes */
    int64_t room;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    const struct moe_tensor *table = &((const struct conf *)conf)->table;
    *(struct state *)self = (struct state){.env = env, .conf = conf};
    for (int64_t i = 0; table->data != NULL && i < table->shape[0] * table->shape[1]; i++)
        if (!isfinite(table->data[i]))
            return env->host->fail(env, MOE_EINVAL, "table: label %lld, expert %lld: found %g, expected a finite "
                                   "number", (long long)(i / table->shape[1]), (long long)(i % table->shape[1]),
                                   (double)table->data[i]);
    return MOE_OK;
}

static int reserve(struct state *s, int64_t n)
{
    const int64_t room = n > 2 * s->room ? n : 2 * s->room;
    if (n <= s->room)
        return MOE_OK;
    s->slot = s->env->host->alloc(s->env, (size_t)room, sizeof *s->slot);
    s->room = room;
    return s->slot == NULL ? MOE_ENOMEM : MOE_OK;
}

/* Whose expert a token goes through. */
static int32_t owner(const struct state *s, const struct moe_batch *b, int32_t t)
{
    return s->conf->table.data != NULL ? b->label[t] : b->request != NULL ? b->request[t] : 0;
}

/* merged[t]: the merged expert of token t, numbered as they first come up; first[i]: the first token of merged expert
 * i. Returns how many there are. */
static int32_t number(const struct state *s, const struct moe_batch *b, int32_t *merged, int32_t *first)
{
    int64_t n_places = 16;
    while (n_places < 2 * (int64_t)b->n_tokens)
        n_places *= 2;
    int32_t *place = s->env->host->scratch(s->env, (size_t)n_places * sizeof *place), n = 0;
    if (place == NULL)
        return MOE_ENOMEM;
    for (int64_t i = 0; i < n_places; i++)
        place[i] = -1;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        const int32_t key = owner(s, b, t);
        int64_t at = (int64_t)(moe_mix((uint64_t)(uint32_t)key) & (uint64_t)(n_places - 1));
        while (place[at] >= 0 && owner(s, b, first[place[at]]) != key)
            at = (at + 1) & (n_places - 1);
        if (place[at] < 0) {
            first[n] = t;
            place[at] = n++;
        }
        merged[t] = place[at];
    }
    return n;
}

static int check(const struct state *s, const struct moe_batch *b)
{
    const struct moe_host *host = s->env->host;
    const struct moe_tensor *table = &s->conf->table;
    const int64_t n = b->n_experts;
    for (int64_t i = 0; table->data == NULL && i < b->n_tokens * n; i++)
        if (!isfinite(b->router_logits[i]))
            return host->fail(s->env, MOE_EINVAL,
                              "layer %d: logit of token %d, expert %d: found %g, expected a finite number", b->layer,
                              (int)(i / n), (int)(i % n), (double)b->router_logits[i]);
    if (table->data != NULL && b->label == NULL)
        return host->fail(s->env, MOE_EINVAL, "table: the workload has no labels of tokens");
    for (int32_t t = 0; table->data != NULL && t < b->n_tokens; t++)
        if (b->label[t] < 0 || b->label[t] >= table->shape[0])
            return host->fail(s->env, MOE_EINVAL, "token %d: label %d, but table has %lld labels", t, b->label[t],
                              (long long)table->shape[0]);
    return MOE_OK;
}

/* p: [merged experts][E] */
static void mixtures(const struct state *s, const struct moe_batch *b, const int32_t *merged, const int32_t *first,
                     int32_t n_merged, double *sum, float *p)
{
    const int64_t n = b->n_experts;
    const float *table = s->conf->table.data;
    for (int64_t i = 0; i < n_merged * (n + 1); i++)
        sum[i] = 0; /* of each merged expert its logits, then how many tokens they are of */
    for (int32_t t = 0; table == NULL && t < b->n_tokens; t++) {
        double *of = sum + merged[t] * (n + 1);
        for (int64_t e = 0; e < n; e++)
            of[e] += (double)b->router_logits[t * n + e];
        of[n]++;
    }
    for (int64_t i = 0; i < n_merged; i++) {
        for (int64_t e = 0; e < n; e++)
            p[i * n + e] = table != NULL ? table[b->label[first[i]] * n + e]
                                         : (float)(sum[i * (n + 1) + e] / sum[i * (n + 1) + n]);
        moe_softmax(p + i * n, (int32_t)n, p + i * n);
    }
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    struct state *s = self;
    const struct moe_env *env = s->env;
    const int64_t n = batch->n_experts, n_routes = batch->n_tokens * n;
    const size_t room = (size_t)batch->n_tokens + 1;
    int32_t *merged = env->host->scratch(env, room * sizeof *merged), n_merged = 0;
    int32_t *first = env->host->scratch(env, room * sizeof *first);
    int rc = merged == NULL || first == NULL ? MOE_ENOMEM : check(s, batch);
    (void)bias; /* nothing is chosen */
    if (rc < 0 || (rc = n_merged = number(s, batch, merged, first)) < 0 || (rc = reserve(s, n_routes + 1)) < 0 ||
        (rc = env->host->routes_reserve(env, out, n_routes)) < 0)
        return rc;
    const size_t n_sums = (size_t)n_merged * ((size_t)n + 1) + 1;
    double *sum = env->host->scratch(env, n_sums * sizeof *sum);
    float *p = env->host->scratch(env, n_sums * sizeof *p);
    if (sum == NULL || p == NULL)
        return MOE_ENOMEM;
    mixtures(s, batch, merged, first, n_merged, sum, p);
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        for (int64_t e = 0; e < n; e++) {
            const int64_t i = t * n + e;
            out->expert[i] = (int32_t)e;
            out->weight[i] = p[merged[t] * n + e];
            s->slot[i] = merged[t];
        }
        out->offset[t + 1] = (t + 1) * n;
    }
    out->offset[0] = 0;
    out->n = n_routes;
    out->form = MOE_MERGED;
    out->n_slots = n_merged;
    out->slot = s->slot;
    const double wide = env->model->d_model, tokens = batch->n_tokens, gates = s->conf->table.data == NULL;
    own->flops = gates * (tokens * wide + n_merged * 2 * wide * (double)n) + 4.0 * n_merged * (double)n;
    own->bytes = sizeof(float) * (gates * (tokens * wide + wide * (double)n) + 2.0 * n_merged * (double)n);
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_OWN_GATE,
    .name = "soft-merge",
    .summary = "one expert per request, whose weights are an average of all experts' weights",
    .source = "Soft Merging of Experts with Adaptive Routing; Multi-Head Adapter Routing for Cross-Task "
              "Generalization; Mixture-of-Supernets",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.route = route},
};
