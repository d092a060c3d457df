/* SPDX-License-Identifier: Apache-2.0
 * workload_gate.c - batches from a gate that is trained: what gate.h makes, as policies see it. */
#include "config.h"

#include "workload.h"

#include <stdlib.h>
#include <string.h>

/* What the workload reads itself; all else is the gate's. */
static const char *const own_keys[] = { "kind", "trace", "steps", "tokens_per_device", "context", "recompute",
                                        "shard_optimizer", "gradient_bytes", "optimizer_bytes", "profile",
                                        "layer_repeat" };

int workload_gate_open(struct workload *w, const json_t *spec, const struct moe_model *m, uint64_t seed,
                       const char *who, struct err *e)
{
    if (w->layer_repeat != 1)
        return err_set(e, ERR_INPUT, "%s: workload.layer_repeat: %d, expected 1: every layer has a gate of its own",
                       who, w->layer_repeat);
    if (m->layer_experts)
        return err_set(e, ERR_INPUT, "%s: workload.kind: gate, and layers with different numbers of experts", who);
    json_t *settings = json_copy((json_t *)(uintptr_t)spec);
    w->gate = calloc(1, sizeof *w->gate);
    for (size_t i = 0; i < sizeof own_keys / sizeof *own_keys; i++)
        json_object_del(settings, own_keys[i]);
    w->top_k = m->top_k;
    if (!w->gate || !settings)
        err_set(e, ERR_MEMORY, "out of memory for a gate");
    else
        gate_open(w->gate, settings, w->trace.n_tokens > 0 ? &w->trace : NULL, m, w->n_tokens, seed, who, e);
    json_decref(settings);
    return e->code;
}

const char *workload_gate_lacks(uint32_t needs)
{
    return needs & MOE_NEEDS_RECORDED ? "recorded choices" : needs & MOE_NEEDS_IMPORTANCE ? "token importance" : NULL;
}

/* Tokens are independent: each is a request of its own. */
void workload_gate_step(struct workload *w)
{
    const struct gate *g = w->gate;
    const int64_t n_labels = g->conf->labels > 0 ? g->conf->labels : g->n_clusters;
    gate_draw(w->gate);
    for (int32_t t = 0; t < w->n_tokens; t++) {
        w->device[t] = (int32_t)((int64_t)t * w->n_devices / w->n_tokens);
        w->request[t] = t;
        w->position[t] = 0;
        w->token_id[t] = g->cluster[t];
        w->previous_token_id[t] = -1;
        w->label[t] = (int32_t)(g->cluster[t] % n_labels);
    }
}

void workload_gate_batch(struct workload *w, int32_t layer, struct moe_batch *b)
{
    struct gate *g = w->gate;
    const int64_t n = (int64_t)g->n_tokens * g->n_experts;
    b->n_experts = g->n_experts;
    b->top_k = w->top_k;
    b->token_id = w->token_id;
    b->previous_token_id = w->previous_token_id;
    b->label = w->label;
    b->router_logits = gate_logits(g, layer);
    b->previous_logits = layer > 0 ? g->logits + (layer - 1) * n : NULL;
    b->n_hidden = g->n_hidden;
    b->hidden = g->x + (int64_t)layer * g->n_tokens * g->n_hidden;
}
