/* SPDX-License-Identifier: Apache-2.0
 * gate_learn.c - what the chosen experts give, how far it is from the teacher's output, and who is to blame.
 *
 * The loss of a layer is the mean over tokens of |sum of w_e f_e(h) - y|^2, the target's mean square being 1; a
 * step's is the sum over layers. Derivatives by logits go through the weights w: which function of them a router's
 * weights are is found out from them (rule_of), at every step, and refused if it is none of those known. Which experts
 * were chosen is taken as given. Of experts that a balancer took away after weights were made (capacity), nothing is
 * known: the others' weights are as they came, and their logits' part in them is left out. */
#include "config.h"

#include "gate.h"

#include <string.h>

static const char *const rule_name[N_GATE_RULES] = {
    "softmax over all experts", "softmax over the chosen", "sigmoid", "sigmoid over the sum of the chosen", "the logit"
};

void gate_apply(const float *map, const float *x, int64_t n_hidden, int64_t n_outputs, float *out)
{
    for (int64_t j = 0; j < n_outputs; j += 4) {
#if defined(__GNUC__)
        moe_f4 s0 = { 0, 0, 0, 0 }, s1 = s0, s2 = s0, s3 = s0;
        int64_t i = 0;
        for (const float *m = map + j; i + 4 <= n_hidden; i += 4, m += 4 * n_outputs) {
            s0 += x[i] * *(const moe_f4 *)m;
            s1 += x[i + 1] * *(const moe_f4 *)(m + n_outputs);
            s2 += x[i + 2] * *(const moe_f4 *)(m + 2 * n_outputs);
            s3 += x[i + 3] * *(const moe_f4 *)(m + 3 * n_outputs);
        }
        for (; i < n_hidden; i++)
            s0 += x[i] * *(const moe_f4 *)(map + i * n_outputs + j);
        *(moe_f4 *)(out + j) = (s0 + s1) + (s2 + s3);
#else
        for (int64_t l = j; l < j + 4; l++) {
            out[l] = 0;
            for (int64_t i = 0; i < n_hidden; i++)
                out[l] += x[i] * map[i * n_outputs + l];
        }
#endif
    }
}

/* slope[H][O] += x[H] d_out[O] */
static void blame(float *slope, const float *x, int64_t n_hidden, int64_t n_outputs, const float *d_out)
{
    for (int64_t i = 0; i < n_hidden; i++)
        for (int64_t j = 0; j < n_outputs; j += 4)
#if defined(__GNUC__)
            *(moe_f4 *)(slope + i * n_outputs + j) += x[i] * *(const moe_f4 *)(d_out + j);
#else
            for (int64_t l = j; l < j + 4; l++)
                slope[i * n_outputs + l] += x[i] * d_out[l];
#endif
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

/* Weights of one token's experts by a rule, up to a factor that all tokens share. */
static void weights_by(enum gate_rule rule, const float *logits, int32_t n_experts, const int32_t *expert, int64_t n,
                       double *w)
{
    double sum = 0;
    const bool soft = rule == RULE_SOFTMAX || rule == RULE_CHOSEN_SOFTMAX;
    const float top = moe_largest(logits, n_experts);
    for (int64_t k = 0; k < n; k++) {
        const double x = (double)logits[expert[k]];
        w[k] = soft ? exp(x - (double)top) : rule == RULE_LOGIT ? fmax(x, 0) : sigmoid(x);
        sum += w[k];
    }
    if (rule == RULE_SOFTMAX) {
        sum = 0;
        for (int32_t e = 0; e < n_experts; e++)
            sum += exp((double)logits[e] - (double)top);
    } else if (rule == RULE_SIGMOID || rule == RULE_LOGIT) {
        sum = 1;
    }
    for (int64_t k = 0; k < n; k++)
        w[k] = sum > 0 ? w[k] / sum : 0;
}

/* The first rule that weights of the first tokens follow, a factor apart; N_GATE_RULES: none does. A token that a
 * balancer took experts from says nothing of rules over the chosen, so those with most experts are asked. */
static enum gate_rule rule_of(const struct gate *g, const float *logits, const struct moe_routes *r, double *factor)
{
    enum { ASKED = 32 };
    int64_t most = 0;
    for (int32_t t = 0; t < r->n_tokens; t++) {
        const int64_t n = r->offset[t + 1] - r->offset[t];
        most = n > most ? n : most;
    }
    if (most == 0)
        return RULE_SOFTMAX;
    double w[most];
    for (enum gate_rule rule = 0; rule < N_GATE_RULES; rule++) {
        bool same = true;
        int32_t n_asked = 0;
        *factor = 0;
        for (int32_t t = 0; t < r->n_tokens && n_asked < ASKED && same; t++) {
            const int64_t first = r->offset[t], n = r->offset[t + 1] - first;
            if (n < most)
                continue;
            n_asked++;
            weights_by(rule, logits + (int64_t)t * g->n_experts, g->n_experts, r->expert + first, n, w);
            for (int64_t k = 0; k < n && same; k++) {
                const double is = (double)r->weight[first + k];
                if (*factor == 0 && w[k] > 1e-3)
                    *factor = is / w[k];
                same = *factor != 0 ? fabs(is - *factor * w[k]) <= 1e-4 * fabs(*factor) : fabs(is) < 1e-3;
            }
        }
        if (same && *factor > 0)
            return rule;
    }
    return N_GATE_RULES;
}

/* Adds to a token's d_logits what its weights' derivatives d_w are there. */
static void through_weights(enum gate_rule rule, double factor, const float *logits, int32_t n_experts,
                            const int32_t *expert, const float *weight, int64_t n, const float *d_w, float *d_logits)
{
    float mean = 0; /* of d_w, by weights that add up to 1 */
    for (int64_t k = 0; k < n; k++)
        mean += d_w[k] * weight[k] / (float)factor;
    if (rule == RULE_SOFTMAX && mean != 0) {
        const float top = moe_largest(logits, n_experts);
        float p[n_experts];
        const float scale = mean * (float)factor / moe_exp_sum(logits, n_experts, top, p);
        for (int32_t e = 0; e < n_experts; e++)
            d_logits[e] -= scale * p[e];
    }
    for (int64_t k = 0; k < n; k++) {
        const bool s_shaped = rule == RULE_SIGMOID || rule == RULE_CHOSEN_SIGMOID;
        const float rest = s_shaped ? 1 - (float)sigmoid((double)logits[expert[k]]) : 0;
        float *to = &d_logits[expert[k]];
        switch (rule) {
        case RULE_SOFTMAX: *to += weight[k] * d_w[k]; break;
        case RULE_CHOSEN_SOFTMAX: *to += weight[k] * (d_w[k] - mean); break;
        case RULE_SIGMOID: *to += weight[k] * rest * d_w[k]; break;
        case RULE_CHOSEN_SIGMOID: *to += weight[k] * rest * (d_w[k] - mean); break;
        case RULE_LOGIT: *to += logits[expert[k]] > 0 ? (float)factor * d_w[k] : 0; break;
        case N_GATE_RULES: break;
        }
    }
}

static int check_routes(const struct moe_routes *r, const char *who, struct err *e)
{
    const char *more = r->form != MOE_TOKENS ? "slots or merged experts (form)"
                     : r->combine ? "other weights on the way back (combine)"
                     : r->layer ? "experts of other layers (layer)"
                     : r->skip || r->again ? "tokens that skip or repeat a layer (skip, again)"
                     : r->n_free ? "experts that cost nothing, of which the gate has no logits (n_free)" : NULL;
    return more ? err_set(e, ERR_INPUT, "%s: routes with %s, through which a gate is not trained", who, more) : 0;
}

int gate_learn(struct gate *g, int32_t layer, const struct moe_routes *r, const char *who, struct err *e)
{
    const int64_t d = g->n_hidden, o = g->conf->outputs, n_tokens = g->n_tokens, n_experts = g->n_experts;
    const float *x = g->x + layer * n_tokens * d, *y = g->y + layer * n_tokens * o;
    const float *logits = g->logits + layer * n_tokens * n_experts;
    const struct gate_tensor *maps = gate_of(g, layer, EXPERT_TENSOR);
    float *d_logits = g->d_logits + layer * n_tokens * n_experts, d_w[n_experts], off[o], part[o];
    double factor = 1, loss = 0;
    if (check_routes(r, who, e) < 0)
        return e->code;
    const enum gate_rule rule = rule_of(g, logits, r, &factor);
    if (rule == N_GATE_RULES)
        return err_set(e, ERR_INPUT, "%s: weights are no function of the logits that a gate is trained through: "
                       "expected a multiple of %s, of %s, of %s, of %s, or of %s if it is positive", who, rule_name[0],
                       rule_name[1], rule_name[2], rule_name[3], rule_name[4]);
    const float share = 2.0f / (float)n_tokens;
    for (int64_t t = 0; t < n_tokens; t++) {
        const int64_t first = r->offset[t], n = r->offset[t + 1] - first;
        const int32_t *expert = r->expert + first;
        const float *weight = r->weight + first;
        for (int64_t j = 0; j < o; j++)
            off[j] = -y[t * o + j];
        for (int64_t k = 0; k < n; k++) {
            float *out = g->outputs + k * o;
            gate_apply(maps->value + expert[k] * d * o, x + t * d, d, o, out);
            for (int64_t j = 0; j < o; j++)
                off[j] += weight[k] * out[j];
        }
        for (int64_t j = 0; j < o; j++) {
            loss += (double)off[j] * (double)off[j];
            off[j] *= share;
        }
        for (int64_t k = 0; k < n; k++) {
            const float *out = g->outputs + k * o;
            d_w[k] = 0;
            for (int64_t j = 0; j < o; j++) {
                d_w[k] += off[j] * out[j];
                part[j] = weight[k] * off[j];
            }
            blame(maps->slope + expert[k] * d * o, x + t * d, d, o, part);
        }
        through_weights(rule, factor, logits + t * n_experts, g->n_experts, expert, weight, n, d_w,
                        d_logits + t * n_experts);
    }
    g->loss += loss / (double)n_tokens;
    return 0;
}
