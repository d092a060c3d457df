/* SPDX-License-Identifier: Apache-2.0
 * cuda_choose.c - experts chosen on the GPU: the gate's task takes the top-k of the scores that the host's decision was
 * made from. The decision stands; with `verify` what the GPU chose is compared with it.
 *
 * A router may choose otherwise than by the highest scores (groups, biases, thresholds, capacity). So the processor
 * first takes the top-k by plain loops: the GPU has to agree with that, and where that is the decision, with the
 * decision. A trace without logits and a router without scores leave nothing to compare. */
#include "config.h"

#include "cuda_check.h"
#include "cuda_kernels.h"
#include "cuda_rank.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 32 }; /* that the kernel chooses */

bool cuda_chooses(const struct cuda *c, const struct moe_graph *g)
{
    return g->n_score_layers == g->n_route_layers && c->model->top_k <= MOST && c->model->top_k <= c->model->n_experts;
}

/* Scores of own tokens, layer by layer. */
int cuda_choose_prepare(struct cuda *c, struct cuda_rank *r, const struct moe_graph *g, struct err *e)
{
    const size_t width = (size_t)c->model->n_experts, own = (size_t)r->n_own, layers = (size_t)g->n_route_layers;
    const size_t n = layers * own * width, n_ids = layers * own * (size_t)c->model->top_k;
    if (!cuda_chooses(c, g) || own == 0)
        return e->code;
    float *scores = malloc(n * sizeof *scores);
    if (!scores)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for the scores of %d tokens", r->rank, r->n_own);
    for (size_t l = 0; l < layers; l++)
        for (size_t i = 0; i < own; i++)
            memcpy(scores + (l * own + i) * width, g->score + (l * (size_t)g->n_tokens + (size_t)r->own[i]) * width,
                   width * sizeof *scores);
    cuda_take_more(&r->scores.at, &r->scores.room, n * sizeof *scores, r->rank, "scores of experts", e);
    cuda_take_more(&r->chosen.at, &r->chosen.room, n_ids * sizeof(int32_t), r->rank, "chosen experts", e);
    CUDA_TRY(e, r->rank, cudaMemcpy(r->scores.at, scores, n * sizeof *scores, cudaMemcpyHostToDevice));
    free(scores);
    return e->code;
}

int cuda_choose(struct cuda *c, struct cuda_rank *r, struct cuda_stream *s, int32_t layer, struct err *e)
{
    const size_t at = (size_t)layer * (size_t)r->n_own;
    return CUDA_TRY(e, r->rank, cuda_top_k(s->stream, r->n_own, c->model->n_experts, c->model->top_k,
                                           (const float *)r->scores.at + at * (size_t)c->model->n_experts,
                                           (int32_t *)r->chosen.at + at * (size_t)c->model->top_k));
}

/* The next best after one that has this score and number, as the kernel is specified. */
static int32_t best_after(const float *score, int32_t n, float last, int32_t last_id)
{
    int32_t best = -1;
    for (int32_t i = 0; i < n; i++)
        if ((score[i] < last || (score[i] == last && i > last_id)) && (best < 0 || score[i] > score[best]))
            best = i;
    return best;
}

/* what: of whom, for messages. */
static int compare(const float *score, int32_t n, int32_t k, const int32_t *ids, int32_t rank, const char *what,
                   int32_t layer, int32_t token, struct err *e)
{
    float last = INFINITY;
    int32_t id = -1;
    for (int32_t i = 0; i < k; i++) {
        id = best_after(score, n, last, id);
        last = score[id];
        if (ids[i] != id)
            return err_set(e, ERR_RUN, "rank %d: top-k on the GPU: %s%d, token %d, choice %d: expert %d, expected %d",
                           rank, what, layer, token, i, ids[i], id);
    }
    return 0;
}

/* Whether a token's routes go to these experts, in any order. */
static bool is_decision(const struct moe_graph *g, int64_t first, int64_t end, const int32_t *ids, int32_t k)
{
    int32_t found = 0;
    for (int64_t i = first; i < end; i++)
        for (int32_t j = 0; j < k; j++)
            found += g->route[i].expert == ids[j];
    return end - first == k && found == k;
}

int cuda_choose_verify(const struct cuda *c, const struct cuda_rank *r, const struct moe_graph *g, int64_t *decided,
                       struct err *e)
{
    const int32_t k = c->model->top_k, width = c->model->n_experts;
    const size_t n = (size_t)g->n_route_layers * (size_t)r->n_own * (size_t)k;
    int32_t *ids = cuda_chooses(c, g) && n > 0 ? malloc(n * sizeof *ids) : NULL;
    if (!cuda_chooses(c, g) || n == 0)
        return e->code;
    if (!ids)
        return err_set(e, ERR_MEMORY, "rank %d: out of memory for chosen experts", r->rank);
    CUDA_TRY(e, r->rank, cudaMemcpy(ids, r->chosen.at, n * sizeof *ids, cudaMemcpyDeviceToHost));
    for (int32_t l = 0; l < g->n_route_layers; l++)
        for (int32_t i = 0; i < r->n_own && !e->code; i++) {
            const int32_t t = r->own[i], *own = ids + ((size_t)l * (size_t)r->n_own + (size_t)i) * (size_t)k;
            compare(g->score + ((size_t)l * (size_t)g->n_tokens + (size_t)t) * (size_t)width, width, k, own, r->rank,
                    "layer ", l, t, e);
            *decided += is_decision(g, route_of(c, g, l, t), route_of(c, g, l, t + 1), own, k);
        }
    free(ids);
    return e->code;
}

/* ---- before anything else runs ---- */

enum { CHECK_TOKENS = 64, CHECK_EXPERTS = 96, CHECK_K = 8 };

/* Made-up logits, with equals among them. */
int cuda_top_k_check(int32_t rank, struct err *e)
{
    const size_t n = CHECK_TOKENS * CHECK_EXPERTS, n_ids = CHECK_TOKENS * CHECK_K;
    float *logits = malloc(n * sizeof *logits);
    int32_t *ids = malloc(n_ids * sizeof *ids);
    void *in = NULL, *out = NULL;
    if (!logits || !ids)
        err_set(e, ERR_MEMORY, "out of memory for the check of top-k");
    for (size_t i = 0; !e->code && i < n; i++)
        logits[i] = (float)(moe_mix(i) % 257) / 64 - 2;
    if (cuda_take(&in, n * sizeof *logits, rank, "the check of top-k", e) == 0 &&
        cuda_take(&out, n_ids * sizeof *ids, rank, "the check of top-k", e) == 0) {
        CUDA_TRY(e, rank, cudaMemcpy(in, logits, n * sizeof *logits, cudaMemcpyHostToDevice));
        CUDA_TRY(e, rank, cuda_top_k(NULL, CHECK_TOKENS, CHECK_EXPERTS, CHECK_K, in, out));
        CUDA_TRY(e, rank, cudaMemcpy(ids, out, n_ids * sizeof *ids, cudaMemcpyDeviceToHost));
    }
    for (int32_t t = 0; t < CHECK_TOKENS && !e->code; t++)
        compare(logits + t * CHECK_EXPERTS, CHECK_EXPERTS, CHECK_K, ids + t * CHECK_K, rank, "check ", 0, t, e);
    cudaFree(in);
    cudaFree(out);
    free(logits);
    free(ids);
    return e->code;
}
