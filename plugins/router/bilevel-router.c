/* SPDX-License-Identifier: Apache-2.0
 * bilevel-router.c - first a group of experts (a device or a node), then the k best experts within it.
 *
 * Source:  H. Xu et al. 2021, Towards More Effective and Economic Sparsely-Activated Model, arXiv 2110.07431 (from the
 *          abstract); SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing, 2022, arXiv 2212.05191
 * Differs: both papers train a gate for groups. Without the tensor `gate` a group's logit is log sum exp of those of
 *          its experts, so that its probability is theirs added up, and the product of both gates the softmax over all
 * Cost:    O(T E); with `gate` 2 T groups H besides
 *
 *   group    the largest of softmax(group logits), scaled and shifted as its experts' mean bias; where k experts are
 *            more than a group has, the fewest best groups that have k
 *   select   the k largest of scale * w + add there, w = p_group q, q = softmax of the logits within a group
 *   weight   w, divided by the sum of the chosen w if renormalise
 *
 * Groups are neighbouring experts; as many as the machine has nodes unless told. */
#include <moelab.h>

struct conf {
    int64_t top_k, groups;
    bool renormalise;
    struct moe_tensor gate;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
      "experts per token; 0: the model's" },
    { "groups", MOE_INT, offsetof(struct conf, groups), 0, 0, 1 << 16, NULL, "groups",
      "of neighbouring experts; 0: one for each node" },
    { "renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 0, 0, 1, NULL, "",
      "weights of a token add up to 1; false: products of both gates" },
    { "gate", MOE_TENSOR, offsetof(struct conf, gate), 0, 0, 0, "L,G,H", "",
      "the gate of groups, where it is trained" },
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

static int32_t n_groups(const struct state *s)
{
    return s->conf->groups > 0 ? (int32_t)s->conf->groups : s->env->topology->n_nodes;
}

static int check(const struct state *s, const struct moe_batch *b, int32_t k)
{
    const struct moe_env *env = s->env;
    const int32_t groups = n_groups(s), n = b->n_experts;
    const struct moe_tensor *gate = &s->conf->gate;
    if (n % groups != 0)
        return env->host->fail(env, MOE_EINVAL, "layer %d: groups = %d does not divide %d experts", b->layer, groups,
                               n);
    if (k > n)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", b->layer, k, n);
    if (gate->data != NULL && b->hidden == NULL)
        return env->host->fail(env, MOE_EINVAL, "gate: the workload has no hidden states");
    if (gate->data != NULL && (gate->shape[1] != groups || gate->shape[2] != b->n_hidden))
        return env->host->fail(env, MOE_EINVAL, "gate: %lld groups of %lld, expected %d of %d",
                               (long long)gate->shape[1], (long long)gate->shape[2], groups, b->n_hidden);
    return MOE_OK;
}

/* room: [n] */
static float log_sum(const float *x, int32_t n, float *room)
{
    const float top = moe_largest(x, n);
    return top + logf(moe_exp_sum(x, n, top, room));
}

static float dot(const float *a, const float *b, int32_t n)
{
    float sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static void score_groups(const struct state *s, const struct moe_batch *b, int32_t t, int32_t groups, float *p,
                         float *room)
{
    const struct moe_tensor *gate = &s->conf->gate;
    const int32_t size = b->n_experts / groups;
    const float *logits = b->router_logits + (int64_t)t * b->n_experts;
    for (int32_t g = 0; g < groups; g++)
        p[g] = gate->data != NULL ? dot(gate->data + ((int64_t)b->layer * groups + g) * b->n_hidden,
                                        b->hidden + (int64_t)t * b->n_hidden, b->n_hidden)
                                  : log_sum(logits + (int64_t)g * size, size, room);
    moe_softmax(p, groups, p);
}

/* The best groups, by what a balancer's bias makes of them on average over their experts. */
static void choose_groups(const float *p, int32_t groups, int32_t size, const struct moe_bias *bias, float *choice,
                          int32_t most, int32_t *best)
{
    for (int32_t g = 0; g < groups; g++) {
        float scale = 0, add = 0;
        for (int32_t e = g * size; bias != NULL && e < (g + 1) * size; e++) {
            scale += bias->scale[e] / (float)size;
            add += bias->add[e] / (float)size;
        }
        choice[g] = bias != NULL ? scale * p[g] + add : p[g];
    }
    moe_top_k(choice, groups, most, best);
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t k = s->conf->top_k > 0 ? (int32_t)s->conf->top_k : batch->top_k, groups = n_groups(s);
    int rc = check(s, batch, k);
    if (rc < 0)
        return rc;
    const int32_t n = batch->n_experts, size = n / groups;
    const int32_t most = (k + size - 1) / size; /* groups of a token */
    float *p = env->host->scratch(env, (size_t)groups * sizeof *p), *w = env->host->scratch(env, (size_t)n * sizeof *w);
    float *choice = env->host->scratch(env, (size_t)n * sizeof *choice);
    int32_t *best = env->host->scratch(env, (size_t)groups * sizeof *best);
    rc = p && w && choice && best ? env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k) : MOE_ENOMEM;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens && rc == MOE_OK; t++) {
        int32_t *expert = out->expert + (int64_t)t * k;
        float *weight = out->weight + (int64_t)t * k, sum = 0;
        score_groups(s, batch, t, groups, p, choice);
        choose_groups(p, groups, size, bias, choice, most, best);
        for (int32_t e = 0; e < n; e++)
            choice[e] = -INFINITY;
        for (int32_t i = 0; i < most; i++) {
            const int32_t first = best[i] * size;
            moe_softmax(batch->router_logits + (int64_t)t * n + first, size, w + first);
            for (int32_t e = first; e < first + size; e++) {
                w[e] *= p[best[i]];
                choice[e] = bias != NULL ? bias->scale[e] * w[e] + bias->add[e] : w[e];
            }
        }
        moe_top_k(choice, n, k, expert);
        for (int32_t i = 0; i < k; i++)
            sum += weight[i] = w[expert[i]];
        for (int32_t i = 0; s->conf->renormalise && i < k; i++)
            weight[i] = sum > 0 ? weight[i] / sum : 1 / (float)k;
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    own->flops =
        (double)batch->n_tokens * (8.0 * n + (s->conf->gate.data != NULL ? 2.0 * groups * batch->n_hidden : 0));
    own->bytes = sizeof(float) * 2.0 * (double)batch->n_tokens * n;
    return rc;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_HEEDS_BIAS,
    .name = "bilevel-router",
    .summary = "the best group of experts (a node's), then the k best experts within it",
    .source = "H. Xu et al. 2021, arXiv 2110.07431; SMILE 2022, arXiv 2212.05191",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .route = route },
};
