/* SPDX-License-Identifier: Apache-2.0
 * gate.c - the settings of a gate that is trained; opening, starting again, closing. */
#include "config.h"

#include "gate.h"

#include <stdlib.h>
#include <string.h>

static const struct moe_param params[] = {
    { "gate", MOE_ENUM, offsetof(struct gate_conf, gate), GATE_LINEAR, 0, 0, "linear|cosine|gru", "",
      "how logits are made of hidden states" },
    { "width", MOE_INT, offsetof(struct gate_conf, width), 0, 0, 1 << 12, NULL, "",
      "numbers that hidden states are projected to (cosine, gru); 0: half the experts, 8 at least" },
    { "outputs", MOE_INT, offsetof(struct gate_conf, outputs), 8, 4, 64, NULL, "",
      "numbers that an expert gives, a multiple of 4" },
    { "clusters", MOE_INT, offsetof(struct gate_conf, clusters), 0, 0, 1 << 16, NULL, "",
      "kinds of tokens; 0: as many as experts. With a trace its domains, or its requests" },
    { "labels", MOE_INT, offsetof(struct gate_conf, labels), 0, 0, 1 << 16, NULL, "",
      "labels (modalities) of tokens: the cluster's id modulo this; 0: as many as clusters" },
    { "skew", MOE_REAL, offsetof(struct gate_conf, skew), 1, 0, 10, NULL, "",
      "standard deviation of the logarithm of clusters' popularity" },
    { "drift", MOE_REAL, offsetof(struct gate_conf, drift), 0.02, 0, 1, NULL, "",
      "how far popularity moves in a step; its correlation is 1/e after 2 / drift^2 steps" },
    { "common", MOE_REAL, offsetof(struct gate_conf, common), 0.4, 0, 1, NULL, "",
      "share of a hidden state's square that all tokens of a layer share (not with a trace)" },
    { "noise", MOE_REAL, offsetof(struct gate_conf, noise), 0.2, 0, 1, NULL, "",
      "share of it that is the token's own" },
    { "spread", MOE_REAL, offsetof(struct gate_conf, spread), 1, 0, 100, NULL, "",
      "standard deviation of logits at the start (linear)" },
    { "learning_rate", MOE_REAL, offsetof(struct gate_conf, learning_rate), 10, 0, 1e9, NULL, "", "of the gate" },
    { "expert_rate", MOE_REAL, offsetof(struct gate_conf, expert_rate), 2, 0, 1e9, NULL, "",
      "learning rate of the experts" },
    MOE_PARAM_END,
};

const struct moe_plugin gate_params = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_ROUTER,
    .name = "gate",
    .params = params,
    .conf_size = sizeof(struct gate_conf),
};

static int check(const struct gate *g, const char *who, struct err *e)
{
    const struct gate_conf *c = g->conf;
    if (c->outputs % 4)
        return err_set(e, ERR_INPUT, "%s: workload.outputs: %lld, expected a multiple of 4", who,
                       (long long)c->outputs);
    if (!g->trace && c->common + c->noise > 1)
        return err_set(e, ERR_INPUT, "%s: workload.common and workload.noise: %g + %g, expected 1 at most: they are "
                       "shares of a hidden state", who, c->common, c->noise);
    if (g->trace && (!g->trace->hidden.data || g->trace->hidden.shape[2] != g->n_hidden))
        return err_set(e, ERR_INPUT, "%s: workload.trace: %s has %s%lld, expected hidden states as wide as the model, "
                       "d_model %d", who, g->trace->dir, g->trace->hidden.data ? "hidden states of width "
                       : "no hidden.npy; widths found: ", g->trace->hidden.data ?
                       (long long)g->trace->hidden.shape[2] : 0LL, g->n_hidden);
    return 0;
}

int gate_open(struct gate *g, const json_t *settings, const struct trace *trace, const struct moe_model *m,
              int32_t n_tokens, uint64_t seed, const char *who, struct err *e)
{
    memset(g, 0, sizeof *g);
    char prefix[300];
    snprintf(prefix, sizeof prefix, "%s: workload", who);
    if (param_fill(&g->params, &gate_params, settings, prefix, e) < 0)
        return e->code;
    g->conf = g->params.conf;
    g->trace = trace;
    g->n_layers = m->n_layers;
    g->n_experts = m->n_experts;
    g->n_hidden = m->d_model;
    g->n_tokens = n_tokens;
    g->n_clusters = (int32_t)(g->conf->clusters > 0 ? g->conf->clusters : m->n_experts);
    g->width = (int32_t)(g->conf->width > 0 ? g->conf->width : m->n_experts < 16 ? 8 : m->n_experts / 2);
    g->seed = seed;
    g->outputs = calloc((size_t)m->n_experts * (size_t)g->conf->outputs, sizeof *g->outputs);
    if (!g->outputs)
        return err_set(e, ERR_MEMORY, "out of memory for %d experts' outputs", m->n_experts);
    if (check(g, who, e) < 0 || gate_tokens_open(g, who, e) < 0 || gate_net_open(g, e) < 0)
        return e->code;
    gate_reset(g, seed);
    return 0;
}

void gate_close(struct gate *g)
{
    gate_tokens_close(g);
    gate_net_close(g);
    free(g->outputs);
    param_free(&g->params);
    memset(g, 0, sizeof *g);
}

void gate_reset(struct gate *g, uint64_t seed)
{
    enum { START = 1 };
    g->seed = seed;
    g->step = -1;
    g->loss = g->first_loss = 0;
    gate_tokens_reset(g);
    const int64_t n = (int64_t)g->n_layers * GATE_TENSORS + N_SHARED_TENSORS;
    for (int64_t i = 0; i < n; i++) {
        struct gate_tensor *t = &g->tensor[i];
        const uint64_t start = gate_stream(seed, START, i, 0);
        for (int64_t j = 0; j < t->n; j++)
            t->value[j] = (float)t->spread * gate_normal(gate_bits(start, j));
        if (t->n > 0)
            memset(t->slope, 0, sizeof *t->slope * (size_t)t->n);
    }
}

void gate_descend(struct gate *g)
{
    const int64_t n = (int64_t)g->n_layers * GATE_TENSORS + N_SHARED_TENSORS;
    for (int64_t i = 0; i < n; i++) {
        const struct gate_tensor *t = &g->tensor[i];
        const float rate = (float)t->rate;
        for (int64_t j = 0; j < t->n; j++) {
            t->value[j] -= rate * t->slope[j];
            t->slope[j] = 0;
        }
    }
}

bool gate_is_finite(const struct gate *g)
{
    const int64_t n = (int64_t)g->n_layers * GATE_TENSORS + N_SHARED_TENSORS;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < g->tensor[i].n; j++)
            if (!isfinite(g->tensor[i].value[j]))
                return false;
    return true;
}
