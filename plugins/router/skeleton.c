/* SPDX-License-Identifier: Apache-2.0
 * skeleton.c - a router to start from: k different experts per token, drawn evenly. It works as it stands.
 *
 * Source:  field practice
 * Differs: nothing
 * Cost:    O(T K^2)
 *
 * To make your own: copy this file to NAME.c, rename the plugin below, build it with
 *     cc -std=c11 -shared -fPIC $(pkg-config --cflags moelab) NAME.c -o NAME.so
 * and put it in a directory router/ under $MOELAB_PLUGIN_PATH. Delete the hooks that you do not need: one that is
 * absent costs nothing. Say in `needs` which fields of the batch you read: the others may be NULL. */
#include <moelab.h>

enum hook { HOOK_ROUTE }; /* names a stream of random numbers */

struct conf {
    int64_t top_k; /* set before init from the table below: defaults, the scenario, --set */
};

static const struct moe_param params[] = {
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token; 0: the model's"},
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
};

/* Optional, as is fini. Once per run. `self` is zeroed and state_size long; conf and env stay valid for the run.
 * Memory from env->host->alloc() is freed by the core. */
static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    s->env = env;
    s->conf = conf;
    return MOE_OK;
}

/* What identifies a token, whoever shares its batch. Using the token's index instead would let one request change
 * another one's experts, which has to be declared: MOE_CROSS_BATCH. */
static int64_t token_key(const struct moe_batch *batch, int32_t t)
{
    int64_t request = batch->request != NULL ? batch->request[t] : 0;
    int64_t position = batch->position != NULL ? batch->position[t] : t;
    return request * (INT64_C(1) << 32) + position;
}

/* Draw i of [0, n) that differs from the i draws before it. */
static int32_t draw_another(uint64_t random, int32_t n, const int32_t *drawn, int32_t i)
{
    int32_t pick = (int32_t)(random % (uint64_t)(n - i)); /* among the n - i that are left */
    for (int32_t value = 0;; value++) {
        bool taken = false;
        for (int32_t j = 0; j < i; j++)
            taken |= drawn[j] == value;
        if (!taken && pick-- == 0)
            return value;
    }
}

/* Required, unless there are score and select. Per layer and micro-batch. Token t's experts go to
 * out->expert[out->offset[t] .. out->offset[t + 1]); any number per token, none included. bias is what balancers ask
 * for (NULL: nothing); a router without scores cannot follow it. `own` starts at zero: what the decision itself costs
 * beyond the gate's matrix product. The core has the last word: ids unique per token and in range, weights finite. */
static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    const struct moe_env *env = s->env;
    int32_t k = s->conf->top_k > 0 ? (int32_t)s->conf->top_k : batch->top_k;
    (void)bias, (void)own;
    if (k > batch->n_experts)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, k,
                               batch->n_experts);
    int rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k);
    if (rc < 0)
        return rc; /* routes_reserve has already said why */
    out->n = out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        int32_t *expert = out->expert + out->n;
        for (int32_t i = 0; i < k; i++) {
            uint64_t random = moe_rand(env, HOOK_ROUTE, batch->step, batch->layer, token_key(batch, t) * k + i);
            expert[i] = draw_another(random, batch->n_experts, expert, i);
            out->weight[out->n++] = 1 / (float)k;
        }
        out->offset[t + 1] = out->n;
    }
    return MOE_OK;
}

/* Hooks that this policy does without (signatures in moelab.h):
 *   score    [T][E] scores, so that balancers can bias the choice; required together with select
 *   select   picks experts on scale * score + add, weights come from the scores
 *   ahead    optional: routes of later layers too, decided now */

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = 0,
    .name = "skeleton", /* has to be the file's stem */
    .summary = "a policy to start from: k different experts, drawn evenly",
    .source = "field practice",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .fini = NULL,
    .ops.router = {.route = route},
};
