/* SPDX-License-Identifier: Apache-2.0
 * hash-router.c - a token's experts are a fixed function of its id (or position, or of the ids before it).
 *
 * Source:  S. Roller et al. 2021, Hash Layers For Large Sparse Models, arXiv 2106.04426; by = table: N. Dryden and T.
 *          Hoefler 2022, Spatial Mixture-of-Experts, arXiv 2211.13491 (from the abstract)
 * Differs: the clustered, dispersed and oracle variants, which need embeddings or the future, are not there; experts
 *          beyond the first are further hashes of the same key that differ from those before
 * Cost:    O(T k); balanced: a table over the vocabulary, made once per layer in O(V log V)
 *
 *   by = token     key = token id
 *        position  key = position
 *        previous  key = id of the token before, -1 at a request's start
 *        bigram    key = both ids
 *        mod       expert = token id mod E, as the Expert Choice paper's baseline; then the next ones
 *        balanced  ids in order of falling frequency (a tensor), each to the expert with the least so far
 *        table     the k largest of table[position], a tensor [P][E]; positions from P on begin again
 *
 * Hashes of keys differ from layer to layer and depend on the run's seed. weight = 1 / k; of a table the softmax over
 * the chosen. */
#include <moelab.h>

#include <stdlib.h>

enum { BY_TOKEN, BY_POSITION, BY_BIGRAM, BY_PREVIOUS, BY_MOD, BY_BALANCED, BY_TABLE };
enum { HOOK_ROUTE };

struct conf {
    int64_t top_k;
    int32_t by;
    struct moe_tensor frequency, table;
};

static const struct moe_param params[] = {
    { "top_k", MOE_INT, offsetof(struct conf, top_k), 1, 0, 1 << 16, NULL, "experts",
      "experts per token; 0: the model's" },
    { "by", MOE_ENUM, offsetof(struct conf, by), BY_TOKEN, 0, 0, "token|position|bigram|previous|mod|balanced|table",
      "", "what is hashed" },
    { "frequency", MOE_TENSOR, offsetof(struct conf, frequency), 0, 0, 0, "V", "",
      "by = balanced: how often each token id occurs" },
    { "table", MOE_TENSOR, offsetof(struct conf, table), 0, 0, 0, "P,E", "", "by = table: what each position prefers" },
    MOE_PARAM_END,
};

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    int32_t **balanced; /* [L] [V] expert of each id; NULL: not made yet */
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    struct state *s = self;
    const struct conf *c = conf;
    s->env = env;
    s->conf = c;
    if (c->by == BY_BALANCED && c->frequency.data == NULL)
        return env->host->fail(env, MOE_EINVAL,
                               "by = balanced: frequency is missing, a .npy of [V] counts of token ids");
    if (c->by == BY_TABLE && c->table.data == NULL)
        return env->host->fail(env, MOE_EINVAL, "by = table: table is missing, a .npy of [P][E] preferences");
    s->balanced = env->host->alloc(env, (size_t)env->model->n_layers, sizeof *s->balanced);
    return s->balanced != NULL ? MOE_OK : MOE_ENOMEM;
}

struct word {
    float count;
    int32_t id;
};

static int by_count(const void *left, const void *right)
{
    const struct word *a = left, *b = right;
    if (a->count != b->count)
        return a->count > b->count ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

/* A heap of experts by (load, id): the root has the least. */
static void sink(int32_t *heap, const double *load, int32_t n, int32_t at)
{
    for (;;) {
        int32_t least = at;
        for (int32_t child = 2 * at + 1; child <= 2 * at + 2 && child < n; child++)
            if (load[heap[child]] < load[heap[least]] ||
                (load[heap[child]] <= load[heap[least]] && heap[child] < heap[least]))
                least = child;
        if (least == at)
            return;
        const int32_t swap = heap[at];
        heap[at] = heap[least];
        heap[least] = swap;
        at = least;
    }
}

/* The same for every layer of as many experts: the rule has no randomness. */
static int balance(struct state *s, int32_t layer, int32_t n_experts)
{
    const struct moe_env *env = s->env;
    const int64_t n = s->conf->frequency.shape[0];
    struct word *word = env->host->scratch(env, (size_t)n * sizeof *word + 1);
    double *load = env->host->scratch(env, (size_t)n_experts * sizeof *load);
    int32_t *heap = env->host->scratch(env, (size_t)n_experts * sizeof *heap);
    int32_t *expert = env->host->alloc(env, (size_t)n + 1, sizeof *expert);
    if (!word || !load || !heap || !expert)
        return MOE_ENOMEM;
    for (int64_t i = 0; i < n; i++)
        word[i] = (struct word){ s->conf->frequency.data[i], (int32_t)i };
    qsort(word, (size_t)n, sizeof *word, by_count);
    for (int32_t e = 0; e < n_experts; e++) {
        load[e] = 0;
        heap[e] = e;
    }
    for (int64_t i = 0; i < n; i++) {
        expert[word[i].id] = heap[0];
        load[heap[0]] += (double)word[i].count;
        sink(heap, load, n_experts, 0);
    }
    s->balanced[layer] = expert;
    return MOE_OK;
}

static int64_t key_of(const struct state *s, const struct moe_batch *b, int32_t t)
{
    const int64_t id = b->token_id != NULL ? b->token_id[t] : 0;
    const int64_t before = b->previous_token_id != NULL ? b->previous_token_id[t] : -1;
    switch (s->conf->by) {
    case BY_POSITION:
        return b->position[t];
    case BY_PREVIOUS:
        return before;
    case BY_BIGRAM:
        return id * (INT64_C(1) << 31) + before + 1;
    default:
        return id;
    }
}

static const char *lacking(const struct state *s, const struct moe_batch *b)
{
    switch (s->conf->by) {
    case BY_POSITION:
    case BY_TABLE:
        return b->position == NULL ? "positions" : NULL;
    case BY_PREVIOUS:
        return b->previous_token_id == NULL ? "the tokens before" : NULL;
    case BY_BIGRAM:
        return b->token_id == NULL || b->previous_token_id == NULL ? "tokens and those before" : NULL;
    default:
        return b->token_id == NULL ? "token ids" : NULL;
    }
}

/* Experts by hashes of the key, each another than those before. */
static void hashed(const struct state *s, const struct moe_batch *b, int64_t key, int32_t k, int32_t *expert)
{
    for (int32_t i = 0, draw = 0; i < k; draw++) {
        const uint64_t bits = moe_rand(s->env, HOOK_ROUTE, draw, b->layer, key);
        bool taken = false;
        expert[i] = (int32_t)(bits % (uint64_t)b->n_experts);
        for (int32_t j = 0; j < i; j++)
            taken |= expert[j] == expert[i];
        i += !taken;
    }
}

static int choose(const struct state *s, const struct moe_batch *b, int32_t t, int32_t k, int32_t *expert,
                  float *weight)
{
    const struct conf *c = s->conf;
    for (int32_t i = 0; i < k; i++)
        weight[i] = 1 / (float)k;
    if (c->by == BY_TABLE) {
        const float *row = c->table.data + b->position[t] % c->table.shape[0] * b->n_experts;
        moe_top_k(row, b->n_experts, k, expert);
        for (int32_t i = 0; i < k; i++)
            weight[i] = row[expert[i]];
        moe_softmax(weight, k, weight);
    } else if (c->by == BY_MOD || c->by == BY_BALANCED) {
        const int64_t id = b->token_id[t];
        if (c->by == BY_BALANCED && (id < 0 || id >= c->frequency.shape[0]))
            return s->env->host->fail(s->env, MOE_EINVAL, "token %d: id %lld, but frequency has %lld ids", t,
                                      (long long)id, (long long)c->frequency.shape[0]);
        const int64_t first = c->by == BY_MOD ? id : s->balanced[b->layer][id];
        for (int32_t i = 0; i < k; i++)
            expert[i] = (int32_t)((first + i) % b->n_experts);
    } else {
        hashed(s, b, key_of(s, b, t), k, expert);
    }
    return MOE_OK;
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    struct state *s = self;
    const struct moe_env *env = s->env;
    const int32_t k = s->conf->top_k > 0 ? (int32_t)s->conf->top_k : batch->top_k;
    const char *lacks = lacking(s, batch);
    (void)bias;
    if (lacks != NULL)
        return env->host->fail(env, MOE_EINVAL, "the workload has no %s", lacks);
    if (k > batch->n_experts)
        return env->host->fail(env, MOE_EINVAL, "layer %d: top_k = %d of %d experts", batch->layer, k,
                               batch->n_experts);
    if (s->conf->by == BY_TABLE && s->conf->table.shape[1] != batch->n_experts)
        return env->host->fail(env, MOE_EINVAL, "layer %d: table has %lld experts, expected %d", batch->layer,
                               (long long)s->conf->table.shape[1], batch->n_experts);
    int rc = s->conf->by == BY_BALANCED && s->balanced[batch->layer] == NULL
                 ? balance(s, batch->layer, batch->n_experts)
                 : MOE_OK;
    if (rc == MOE_OK)
        rc = env->host->routes_reserve(env, out, (int64_t)batch->n_tokens * k);
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens && rc == MOE_OK; t++) {
        rc = choose(s, batch, t, k, out->expert + (int64_t)t * k, out->weight + (int64_t)t * k);
        out->offset[t + 1] = (int64_t)(t + 1) * k;
    }
    out->n = (int64_t)batch->n_tokens * k;
    own->bytes = 8.0 * (double)out->n;
    return rc;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_TOKEN_ID | MOE_OWN_GATE,
    .name = "hash-router",
    .summary = "experts by a fixed function of the token's id, its neighbour's or its position",
    .source = "S. Roller et al. 2021, arXiv 2106.04426",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .route = route },
};
