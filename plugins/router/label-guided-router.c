/* SPDX-License-Identifier: Apache-2.0
 * label-guided-router.c - a token's label (a language, say) names its expert, the same in every layer.
 *
 * Source:  Language-Routing Mixture of Experts for Multilingual and Code-Switching Speech Recognition; with a map of
 *          several labels to one expert: Efficiently Democratizing Medical LLMs for 50 Languages via a Mixture of
 *          Language Family Experts; each from the abstract
 * Differs: labels come with the workload: the network that tells languages apart is not here, nor is its cost. Experts
 *          that families share are not known well enough. Without a map, labels from E on start again at expert 0
 * Cost:    O(T); no gate
 *
 *   expert   map[label], or label mod E without a map
 *   weight   1 */
#include <moelab.h>

struct conf {
    struct moe_tensor map;
};

static const struct moe_param params[] = {
    {"map", MOE_TENSOR, offsetof(struct conf, map), 0, 0, 0, "N", "",
     "expert of each of N labels; not given: label mod experts"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    *(struct state *)self = (struct state){.env = env, .conf = conf};
    return MOE_OK;
}

static int find_expert(const struct state *s, const struct moe_batch *batch, int32_t t)
{
    const struct moe_tensor *map = &s->conf->map;
    const int32_t label = batch->label[t];
    if (label < 0)
        return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: token %d: label %d, expected 0 or more", batch->layer,
                                  t, label);
    if (map->data == NULL)
        return label % batch->n_experts;
    if (label >= map->shape[0])
        return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: token %d: label %d, map has %lld labels", batch->layer,
                                  t, label, (long long)map->shape[0]);
    const float expert = map->data[label];
    if (!(expert >= 0 && expert < (float)batch->n_experts && expert == floorf(expert)))
        return s->env->host->fail(s->env, MOE_EINVAL, "layer %d: map: label %d has expert %g, expected one of %d",
                                  batch->layer, label, (double)expert, batch->n_experts);
    return (int32_t)expert;
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    (void)bias;
    int rc = s->env->host->routes_reserve(s->env, out, batch->n_tokens);
    if (rc < 0)
        return rc;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const int32_t expert = find_expert(s, batch, t);
        if (expert < 0)
            return expert;
        out->expert[t] = expert;
        out->weight[t] = 1;
        out->offset[t + 1] = t + 1;
    }
    out->n = batch->n_tokens;
    own->bytes = (double)sizeof(int32_t) * batch->n_tokens;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LABEL | MOE_OWN_GATE,
    .name = "label-guided-router",
    .summary = "a token's label names its expert, the same in every layer",
    .source = "Language-Routing Mixture of Experts for Multilingual and Code-Switching Speech Recognition",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.route = route},
};
