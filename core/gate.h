/* SPDX-License-Identifier: Apache-2.0
 * gate.h - a gate that is trained while it routes: the tokens it sees, the teacher it learns from, what it has learnt.
 *
 * Each MoE layer of the student has a gate, which makes router logits of hidden states, and E experts, which are linear
 * maps of hidden states to `outputs` numbers. Whatever router and balancers the run has choose experts by the logits;
 * the layer's output is the sum of the chosen experts' by the router's weights. It should equal the teacher's. The
 * mean square of what is left, over that of the teacher's output, is the task's loss: 1 where nothing is known, 0 where
 * everything is. Gates and experts descend it by plain SGD, gates also what the balancers' loss hooks add.
 *
 * An expert that is chosen more learns faster, and what it has learnt gets it chosen: that, and directions which all
 * tokens share, is what makes gates collapse. Nothing here makes them balance but balancers.
 *
 *   tokens    of a mixture of clusters. A cluster's share is softmax(skew z)_c, z one standard normal number for each
 *             cluster that moves: z <- sqrt(1 - drift^2) z + drift n. A token's hidden state is, in each layer,
 *             sqrt(common) m + sqrt(1 - common - noise) c + sqrt(noise) n: m of the layer, c of the cluster, n its own,
 *             all of length 1 on average. Its target is M_c h, M_c the teacher's map for the cluster
 *   trace     hidden states are recorded ones (scaled to a mean square of 1) of tokens drawn anew, sqrt(1 - noise) h +
 *             sqrt(noise) n. Clusters are the domains that their requests are of, or the requests. The target is what a
 *             layer of fixed experts makes of h by the experts and weights that were recorded
 *
 * Everything follows from the seed. Layers are MoE layers; T tokens, H hidden width, E experts, R width, O outputs. */
#ifndef GATE_H
#define GATE_H

#include "err.h"
#include "moelab.h"
#include "param.h"
#include "trace.h"

enum gate_kind { GATE_LINEAR, GATE_COSINE, GATE_GRU };

struct gate_conf {
    int32_t gate; /* enum gate_kind */
    int64_t width, outputs, clusters, labels;
    double skew, drift, common, noise, spread, learning_rate, expert_rate;
};

/* Which function of a token's logits a router's weights are. */
enum gate_rule { RULE_SOFTMAX, RULE_CHOSEN_SOFTMAX, RULE_SIGMOID, RULE_CHOSEN_SIGMOID, RULE_LOGIT, N_GATE_RULES };

/* What is learnt, and the loss's derivatives by it, added up over a step. */
struct gate_tensor { float *value, *slope; int64_t n; double rate, spread; };

struct gate {
    struct param_set params;
    const struct gate_conf *conf;
    const struct trace *trace;        /* NULL: clusters */
    int32_t n_layers, n_experts, n_hidden, n_tokens, n_clusters, width;
    uint64_t seed;
    int64_t step;                     /* of the tokens at hand; -1 before the first */

    /* gate_tokens.c */
    float *share;                     /* [clusters] z of the mixture */
    double *until;                    /* [clusters] shares added up */
    float *mean, *centre;             /* [L][H], [L][clusters][H]; NULL with a trace */
    float *map;                       /* [L][clusters, or the trace's experts][H][O] of the teacher */
    int64_t *pool, *pool_first;       /* rows of the trace by cluster; [clusters + 1] */
    float *pool_x, *pool_y;           /* [pool][L][H], [pool][L][O] */
    int32_t *cluster;                 /* [T] */
    float *x, *y;                     /* [L][T][H], [L][T][O] */

    /* gate_net.c */
    struct gate_tensor *tensor;       /* [L * 4 + 4]: of each layer the gate's, 3 at most, and the experts'; shared */
    float *logits, *d_logits;         /* [L][T][E] */
    float *kept;                      /* [L][T][kept_width] what the way back needs */
    int32_t kept_width;
    float *work;                      /* scratch of both ways */

    /* gate_learn.c */
    float *outputs;                   /* [E][O] of one token's experts */
    double loss, first_loss;          /* of the step so far, summed over layers; of step 0 */
};

/* The parameters of a workload's gate, as plugins have theirs. */
extern const struct moe_plugin gate_params;

/* `settings`: keys of struct gate_conf. trace: NULL, or one with hidden states, which outlives the gate. */
int gate_open(struct gate *, const json_t *settings, const struct trace *, const struct moe_model *, int32_t n_tokens,
              uint64_t seed, const char *who, struct err *);
void gate_close(struct gate *);
/* As it was after gate_open with this seed. */
void gate_reset(struct gate *, uint64_t seed);
/* The tokens of the next step: cluster, x, y. */
void gate_draw(struct gate *);
/* Logits [T][E] of a layer; layers in order. */
const float *gate_logits(struct gate *, int32_t layer);
/* Adds the task's loss with these routes, and its derivatives by the layer's logits and experts. */
int gate_learn(struct gate *, int32_t layer, const struct moe_routes *, const char *who, struct err *);
/* Carries derivatives by logits, the balancers' with them, to the gate's tensors. After the last layer. */
void gate_back(struct gate *);
/* One step of SGD with what has been added up, which is zero again. */
void gate_descend(struct gate *);
/* Whether every number learnt is finite. */
bool gate_is_finite(const struct gate *);

/* ---- shared by the gate_*.c ---- */

enum { GATE_TENSORS = 4, EXPERT_TENSOR = 3, N_SHARED_TENSORS = 4 }; /* of a layer; its experts'; of all layers */

static inline struct gate_tensor *gate_of(const struct gate *g, int32_t layer, int which)
{
    return &g->tensor[(int64_t)layer * GATE_TENSORS + which];
}

static inline struct gate_tensor *gate_shared(const struct gate *g, int which)
{
    return &g->tensor[(int64_t)g->n_layers * GATE_TENSORS + which];
}

/* Four of 16 bits added up: a mean of 0, a variance of 1, near enough normal. */
static inline float gate_normal(uint64_t bits)
{
    const float sum = (float)((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
    return (sum - 2 * 65535.0f) * (1.7320508f / 65536.0f);
}

/* The bits that stream `what`, `a`, `b` of the seed begins with; the i-th of it are gate_bits(start, i). */
static inline uint64_t gate_stream(uint64_t seed, uint32_t what, int64_t a, int64_t b)
{
    const struct moe_env env = { .seed = seed };
    return moe_rand(&env, what, a, b, 0);
}

static inline uint64_t gate_bits(uint64_t start, int64_t i)
{
    return moe_mix(start + UINT64_C(0x9E3779B97F4A7C15) * (uint64_t)(i + 1));
}

int gate_tokens_open(struct gate *, const char *who, struct err *); /* gate_tokens.c */
void gate_tokens_reset(struct gate *);
void gate_tokens_close(struct gate *);
int gate_net_open(struct gate *, struct err *);                     /* gate_net.c */
void gate_net_close(struct gate *);

/* out[O] = x[H] map[H][O], O a multiple of 4. gate_learn.c */
void gate_apply(const float *map, const float *x, int64_t n_hidden, int64_t n_outputs, float *out);

#endif
