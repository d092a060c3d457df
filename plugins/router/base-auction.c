/* SPDX-License-Identifier: Apache-2.0
 * base-auction.c - tokens are assigned to experts so that every expert has as many, by an auction.
 *
 * Source:  M. Lewis et al. 2021, BASE Layers, arXiv 2103.16716; the auction as in the authors' fairseq
 * Differs: tokens that the experts do not divide are filled up with tokens that nobody wants more than another, so that
 *          an expert has T / E, rounded up, at most; after max_rounds what is left goes to the best expert with room,
 *          where the authors' code goes on
 * Cost:    O(rounds E T): every expert selects T / E of T tokens each round; two arrays of [E][T]
 *
 *   a = logits. Each round every expert bids on its T / E best tokens by a - price, for each as much as it is better
 *   than the (T / E + 1)-th, plus eps = max((max a - min a) / 50, 1e-4); prices rise by the highest bid on a token, and
 *   who made it holds the token, which it then values without its price and bids eps for. It ends when every token has
 *   a bid: as many bids as tokens, so every expert has T / E.
 *   weight = sigmoid(logit). greedy: the expert of the largest logit instead, as when a trained model is used. */
#include <moelab.h>

#include <string.h>

struct conf {
    int64_t max_rounds;
    bool greedy;
};

static const struct moe_param params[] = {
    { "max_rounds", MOE_INT, offsetof(struct conf, max_rounds), 100, 1, 100000, NULL, "rounds", "of bids, at most" },
    { "greedy", MOE_BOOL, offsetof(struct conf, greedy), 0, 0, 1, NULL, "",
      "no auction: the best expert of each token, as at test time; not balanced" },
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

struct auction {
    int32_t n_experts, n_jobs, share; /* share: jobs of an expert */
    float eps;
    float *score, *value;     /* [E][jobs] */
    float *row;               /* [jobs] */
    float *price, *bid;       /* [jobs] */
    int32_t *holder, *bidder; /* [jobs] */
};

/* One expert's bids; ties at its last place go to the lower job. */
static void bid_one(struct auction *a, int32_t e)
{
    const float *value = a->value + (int64_t)e * a->n_jobs;
    const bool all = a->share == a->n_jobs;
    memcpy(a->row, value, (size_t)a->n_jobs * sizeof *a->row);
    const float next = all ? 0 : moe_kth_largest(a->row, a->n_jobs, a->share + 1);
    int32_t above = 0;
    for (int32_t j = 0; j < a->n_jobs; j++)
        above += value[j] > next;
    for (int32_t j = 0, equal = a->share - above; j < a->n_jobs; j++) {
        if (!all && !(value[j] > next) && !(value[j] >= next && equal-- > 0))
            continue;
        const float bid = a->holder[j] == e ? a->eps : (all ? value[j] : value[j] - next) + a->eps;
        if (bid > a->bid[j]) {
            a->bid[j] = bid;
            a->bidder[j] = e;
        }
    }
    for (int32_t j = 0; j < a->n_jobs; j++) /* who holds a token bids for it, wanted or not */
        if (a->holder[j] == e && a->eps > a->bid[j]) {
            a->bid[j] = a->eps;
            a->bidder[j] = e;
        }
}

/* True: every job has a bid. */
static bool round_of_bids(struct auction *a)
{
    int32_t wanted = 0;
    for (int32_t j = 0; j < a->n_jobs; j++) {
        a->bid[j] = 0;
        a->bidder[j] = -1;
    }
    for (int32_t e = 0; e < a->n_experts; e++)
        bid_one(a, e);
    for (int32_t j = 0; j < a->n_jobs; j++)
        wanted += a->bidder[j] >= 0;
    memcpy(a->holder, a->bidder, (size_t)a->n_jobs * sizeof *a->holder);
    if (wanted == a->n_jobs)
        return true;
    for (int32_t j = 0; j < a->n_jobs; j++)
        a->price[j] += a->bid[j];
    for (int32_t e = 0; e < a->n_experts; e++)
        for (int64_t i = (int64_t)e * a->n_jobs, j = 0; j < a->n_jobs; i++, j++)
            a->value[i] = a->holder[j] == e ? a->score[i] : a->score[i] - a->price[j];
    return false;
}

/* Every job to an expert with room; those that are held stay where they are, as far as there is room. */
static void settle(struct auction *a)
{
    int32_t room[a->n_experts];
    for (int32_t e = 0; e < a->n_experts; e++)
        room[e] = a->share;
    for (int32_t j = 0; j < a->n_jobs; j++) {
        if (a->holder[j] >= 0 && room[a->holder[j]] == 0)
            a->holder[j] = -1;
        if (a->holder[j] >= 0)
            room[a->holder[j]]--;
    }
    for (int32_t j = 0; j < a->n_jobs; j++)
        if (a->holder[j] < 0) {
            int32_t best = -1;
            for (int32_t e = 0; e < a->n_experts; e++)
                if (room[e] > 0 &&
                    (best < 0 || a->score[(int64_t)e * a->n_jobs + j] > a->score[(int64_t)best * a->n_jobs + j]))
                    best = e;
            a->holder[j] = best;
            room[best]--;
        }
}

static int open_auction(const struct state *s, const struct moe_batch *b, struct auction *a)
{
    const struct moe_env *env = s->env;
    const int32_t n = b->n_experts, share = (b->n_tokens + n - 1) / n, jobs = share * n;
    const size_t cells = (size_t)n * (size_t)jobs + 1, wide = (size_t)jobs + 1;
    float low = INFINITY, high = -INFINITY;
    *a = (struct auction){ .n_experts = n, .n_jobs = jobs, .share = share };
    a->score = env->host->scratch(env, cells * sizeof *a->score);
    a->value = env->host->scratch(env, cells * sizeof *a->value);
    a->row = env->host->scratch(env, wide * sizeof *a->row);
    a->price = env->host->scratch(env, wide * sizeof *a->price);
    a->bid = env->host->scratch(env, wide * sizeof *a->bid);
    a->holder = env->host->scratch(env, wide * sizeof *a->holder);
    a->bidder = env->host->scratch(env, wide * sizeof *a->bidder);
    if (!a->score || !a->value || !a->row || !a->price || !a->bid || !a->holder || !a->bidder)
        return MOE_ENOMEM;
    for (int64_t i = 0; i < (int64_t)b->n_tokens * n; i++) {
        low = fminf(low, b->router_logits[i]);
        high = fmaxf(high, b->router_logits[i]);
    }
    a->eps = fmaxf((high - low) / 50, 1e-4f);
    for (int32_t e = 0; e < n; e++)
        for (int32_t j = 0; j < jobs; j++)
            a->score[(int64_t)e * jobs + j] = j < b->n_tokens ? b->router_logits[(int64_t)j * n + e] : low;
    memcpy(a->value, a->score, cells * sizeof *a->value - sizeof *a->value);
    for (int32_t j = 0; j < jobs; j++) {
        a->price[j] = 0;
        a->holder[j] = -1;
    }
    return MOE_OK;
}

static int32_t best_of(const float *logits, int32_t n)
{
    int32_t best = 0;
    moe_top_k(logits, n, 1, &best);
    return best;
}

static int route(void *self, const struct moe_batch *batch, const struct moe_bias *bias, struct moe_routes *out,
                 struct moe_cost *own)
{
    const struct state *s = self;
    struct auction a = { .n_jobs = 0 };
    int64_t rounds = 0;
    (void)bias;
    int rc = s->env->host->routes_reserve(s->env, out, batch->n_tokens);
    if (rc == MOE_OK && !s->conf->greedy && batch->n_tokens > 0) {
        rc = open_auction(s, batch, &a);
        for (bool ended = false; rc == MOE_OK && !ended && rounds < s->conf->max_rounds; rounds++)
            ended = round_of_bids(&a);
        if (rc == MOE_OK)
            settle(&a);
    }
    if (rc < 0)
        return rc;
    out->offset[0] = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) {
        const float *logits = batch->router_logits + (int64_t)t * batch->n_experts;
        out->expert[t] = a.n_jobs > 0 ? a.holder[t] : best_of(logits, batch->n_experts);
        out->weight[t] = 1 / (1 + expf(-logits[out->expert[t]]));
        out->offset[t + 1] = t + 1;
    }
    out->n = batch->n_tokens;
    const double cells = (double)a.n_jobs * batch->n_experts;
    own->flops = (double)rounds * 6 * cells; /* select, compare, bid, price */
    own->bytes = (double)rounds * 4 * sizeof(float) * cells;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS | MOE_CROSS_BATCH, /* who gets an expert depends on who else wants it */
    .name = "base-auction",
    .summary = "one expert per token, the same number of tokens for each expert, by an auction",
    .source = "M. Lewis et al. 2021, arXiv 2103.16716",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = { .route = route },
};
