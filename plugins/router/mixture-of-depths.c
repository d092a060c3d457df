/* SPDX-License-Identifier: Apache-2.0
 * mixture-of-depths.c - the most important tokens of a request go through the layer; the others leave it out.
 *
 * Source:  Mixture-of-Depths: Dynamically allocating compute in transformer-based language models (from memory); with
 *          importance FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing, and with
 *          choice = threshold and halves = attention Router-Tuning: A Simple and Effective Approach for Enabling
 *          Dynamic-Depth in Transformers (both from their abstracts, completed from memory)
 * Differs: inside a layer that is gone through, the experts are softmax-top-k's. That a block's output is multiplied by
 *          the token's score is not a route, and left out. FTP's network of four features and its search for a sparsity
 *          per block are training's: here a token's importance is the score, `shares` are the blocks'. Router-Tuning's
 *          score is of a token or of a sequence: here of a token. Equal scores go to the earlier token. Dr.LLM, which
 *          decides once per query whether to skip, run or repeat, is another rule. Claims nothing of quality
 * Cost:    2 H FLOPs per token with `gate`, and O(T log T) to sort; O(T E) for the experts
 *
 *   layers   those with (layer + 1) divisible by `every`; all tokens go through the others
 *   score    gate[layer] . x; without `gate` the token's importance
 *   share    the C = ceil(share n) tokens with the largest scores of the n that a request has in the batch
 *   threshold  those with sigmoid(score) > threshold (importance: as it is)
 *   halves   what the others leave out: both, attention alone or experts alone. Who leaves out the attention alone has
 *            experts
 *
 * `gate` is for moelab eval and for workloads that come with hidden states: with a trace, runs give importance alone.
 * With choice = share a later token of a request can take an earlier one's place; in decoding a request has one token,
 * which is always among the first C: choice = threshold is the causal rule. Requests do not change each other. */
#include <moelab_top_k.h>

#include <stdlib.h>

enum { CHOICE_SHARE, CHOICE_THRESHOLD };
enum { HALVES_BOTH, HALVES_ATTENTION, HALVES_EXPERTS };

struct conf {
    struct moe_tensor gate, shares;
    int32_t choice, halves;
    double share, threshold;
    int64_t every, top_k;
    bool renormalise;
};

static const struct moe_param params[] = {
    {"gate", MOE_TENSOR, offsetof(struct conf, gate), 0, 0, 0, "L,H", "",
     "a score of hidden states for each layer; not given: the importance of tokens"},
    {"choice", MOE_ENUM, offsetof(struct conf, choice), CHOICE_SHARE, 0, 0, "share|threshold", "",
     "a share of each request's tokens, or all above a threshold"},
    {"share", MOE_REAL, offsetof(struct conf, share), 0.125, 1e-9, 1, NULL, "", "of a request's tokens that stay"},
    {"shares", MOE_TENSOR, offsetof(struct conf, shares), 0, 0, 0, "L", "",
     "the same for each layer, more than 0 and at most 1; not given: share"},
    {"threshold", MOE_REAL, offsetof(struct conf, threshold), 0.5, -1e30, 1e30, NULL, "",
     "that sigmoid(score), or importance, has to exceed"},
    {"halves", MOE_ENUM, offsetof(struct conf, halves), HALVES_BOTH, 0, 0, "both|attention|experts", "",
     "of the layer that others leave out"},
    {"every", MOE_INT, offsetof(struct conf, every), 2, 1, 1 << 16, NULL, "layers",
     "one layer in so many has tokens leave it out"},
    {"top_k", MOE_INT, offsetof(struct conf, top_k), 0, 0, 1 << 16, NULL, "experts",
     "experts per token that stays; 0: the model's"},
    {"renormalise", MOE_BOOL, offsetof(struct conf, renormalise), 1, 0, 1, NULL, "",
     "weights of a token add up to 1; false: probabilities among all experts"},
    MOE_PARAM_END,
};

struct ranked { float score; int32_t token, request; };

struct state {
    const struct moe_env *env;
    const struct conf *conf;
    uint8_t *skip; /* [room] of the last call */
    int32_t room;
};

static int init(void *self, const void *conf, const struct moe_env *env)
{
    const struct conf *c = conf;
    *(struct state *)self = (struct state){.env = env, .conf = c};
    for (int64_t l = 0; c->shares.data != NULL && l < c->shares.shape[0]; l++)
        if (!(c->shares.data[l] > 0 && c->shares.data[l] <= 1))
            return env->host->fail(env, MOE_EINVAL, "shares: layer %lld has %g, expected more than 0, at most 1",
                                   (long long)l, (double)c->shares.data[l]);
    return MOE_OK;
}

static int by_request(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    if (x->request != y->request)
        return (x->request > y->request) - (x->request < y->request);
    if (x->score < y->score || x->score > y->score)
        return (x->score < y->score) - (x->score > y->score);
    return (x->token > y->token) - (x->token < y->token);
}

/* Scores of depth, a token each. */
static int rank(const struct state *s, const struct moe_batch *b, struct ranked *r)
{
    const struct moe_host *host = s->env->host;
    const float *gate = s->conf->gate.data;
    const int64_t wide = gate != NULL ? s->conf->gate.shape[1] : 0;
    if (gate == NULL && b->importance == NULL)
        return host->fail(s->env, MOE_EINVAL, "the workload has no importance of tokens, and there is no gate");
    if (gate != NULL && (b->hidden == NULL || b->n_hidden != wide))
        return host->fail(s->env, MOE_EINVAL, "gate: made for %lld numbers per hidden state, this workload gives %d",
                          (long long)wide, b->hidden != NULL ? b->n_hidden : 0);
    for (int32_t t = 0; t < b->n_tokens; t++) {
        double score = gate != NULL ? 0 : (double)b->importance[t];
        for (int64_t i = 0; i < wide; i++)
            score += (double)gate[b->layer * wide + i] * (double)b->hidden[t * wide + i];
        if (!isfinite(score))
            return host->fail(s->env, MOE_EINVAL, "layer %d: token %d: score of depth is %g, expected a finite number",
                              b->layer, t, score);
        r[t] = (struct ranked){(float)score, t, b->request != NULL ? b->request[t] : 0};
    }
    return MOE_OK;
}

/* What of the layer each token leaves out. */
static void leave_out(const struct state *s, const struct moe_batch *b, struct ranked *r)
{
    static const uint8_t halves[] = {MOE_HALF_ATTENTION | MOE_HALF_EXPERTS, MOE_HALF_ATTENTION, MOE_HALF_EXPERTS};
    const struct conf *c = s->conf;
    const double share = c->shares.data != NULL ? (double)c->shares.data[b->layer] : c->share;
    if (c->choice == CHOICE_SHARE)
        qsort(r, (size_t)b->n_tokens, sizeof *r, by_request);
    for (int32_t from = 0, to; from < b->n_tokens; from = to) {
        for (to = from + 1; to < b->n_tokens && r[to].request == r[from].request; to++)
            continue;
        const int32_t stay = (int32_t)ceil(share * (to - from) - 1e-9);
        for (int32_t i = from; i < to; i++) {
            const double x = (double)r[i].score, p = c->gate.data != NULL ? 1 / (1 + exp(-x)) : x;
            const bool stays = c->choice == CHOICE_SHARE ? i - from < stay : p > c->threshold;
            s->skip[r[i].token] = stays ? 0 : halves[c->halves];
        }
    }
}

static int score(void *self, const struct moe_batch *batch, float *scores, struct moe_cost *own)
{
    const struct state *s = self;
    const int64_t n = batch->n_experts, n_scores = batch->n_tokens * n;
    for (int64_t i = 0; i < n_scores; i++)
        if (!isfinite(batch->router_logits[i]))
            return s->env->host->fail(s->env, MOE_EINVAL,
                                      "layer %d: logit of token %d, expert %d: found %g, expected a finite number",
                                      batch->layer, (int)(i / n), (int)(i % n), (double)batch->router_logits[i]);
    for (int64_t i = 0; i < n_scores; i += n)
        moe_softmax(batch->router_logits + i, batch->n_experts, scores + i);
    const double wide = s->conf->gate.data != NULL ? (double)s->conf->gate.shape[1] : 0;
    own->flops = 4.0 * (double)n_scores + 2 * wide * batch->n_tokens;
    own->bytes = sizeof(float) * (2.0 * (double)n_scores + wide * (batch->n_tokens + 1.0));
    return MOE_OK;
}

static int select(void *self, const struct moe_batch *batch, const float *scores, const struct moe_bias *bias,
                  struct moe_routes *out)
{
    struct state *s = self;
    const struct moe_env *env = s->env;
    int rc = moe_select_top_k(env, batch, scores, bias, s->conf->top_k, s->conf->renormalise, out);
    if (rc < 0 || (batch->layer + 1) % s->conf->every != 0)
        return rc;
    if (s->room < batch->n_tokens) {
        s->room = batch->n_tokens > 2 * s->room ? batch->n_tokens : 2 * s->room;
        s->skip = env->host->alloc(env, (size_t)s->room, sizeof *s->skip);
    }
    struct ranked *r = env->host->scratch(env, ((size_t)batch->n_tokens + 1) * sizeof *r);
    if ((batch->n_tokens > 0 && s->skip == NULL) || r == NULL)
        return MOE_ENOMEM;
    if ((rc = rank(s, batch, r)) < 0)
        return rc;
    leave_out(s, batch, r);
    int64_t from = out->n = 0;
    for (int32_t t = 0; t < batch->n_tokens; t++) { /* who has no experts gives up the routes */
        const int64_t to = out->offset[t + 1];
        for (int64_t i = from; !(s->skip[t] & MOE_HALF_EXPERTS) && i < to; i++) {
            out->expert[out->n] = out->expert[i];
            out->weight[out->n++] = out->weight[i];
        }
        out->offset[t + 1] = out->n;
        from = to;
    }
    out->skip = s->skip;
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .needs = MOE_NEEDS_LOGITS,
    .name = "mixture-of-depths",
    .summary = "the most important tokens of a request go through a layer, the others leave it out",
    .source = "Mixture-of-Depths; FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing; "
              "Router-Tuning",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.router = {.score = score, .select = select},
};
