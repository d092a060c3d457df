/* SPDX-License-Identifier: Apache-2.0
 * aux-loss-balancer.c - losses beside the task's that a trainable gate descends, with their gradients by logits.
 *
 * Source:  switch      W. Fedus et al. 2021, Switch Transformers, arXiv 2101.03961
 *          z           B. Zoph et al. 2022, ST-MoE, arXiv 2202.08906
 *          importance  N. Shazeer et al. 2017, Outrageously Large Neural Networks, arXiv 1701.06538
 *          entropy, label  B. Mustafa et al. 2022, Multimodal Contrastive Learning with LIMoE, arXiv 2206.02770 (from
 *                      the abstract)
 *          dirichlet   Dirichlet-Prior Shaping: Guiding Expert Specialization in Upcycled MoEs (from the abstract)
 * Differs: gates are softmax. Labels count alike in `label`, experts alike in `dirichlet`, whose prior is symmetric. No
 *          loss on activations of experts (router coupling), since a gate alone has none
 * Cost:    O(T E); dirichlet O(T E log T)
 *
 *   p = softmax(logits), m = mean of p over tokens, n = routes, T tokens, N experts; each loss times `weight`:
 *   switch      N sum_e (routes to e / n) m_e
 *   z           mean over tokens of logsumexp(logits)^2
 *   importance  variance / mean^2 over experts of m
 *   entropy     mean of H(p) + max(0, floor - H(m)), H in nats
 *   label       the same of each label's tokens, mean over the labels present
 *   dirichlet   sum_e mean_r (F(r-th smallest p_e) - r / (T + 1))^2, F of Beta(c, c (N - 1)), c = concentration
 *
 * The gradient treats which experts were chosen as given. */
#include <moelab.h>

#include <stdlib.h>
#include <string.h>

enum { KIND_SWITCH, KIND_Z, KIND_IMPORTANCE, KIND_ENTROPY, KIND_LABEL, KIND_DIRICHLET };

struct conf {
    int32_t kind;
    double weight, floor, concentration;
};

static const struct moe_param params[] = {
    { "kind", MOE_ENUM, offsetof(struct conf, kind), KIND_SWITCH, 0, 0, "switch|z|importance|entropy|label|dirichlet",
      "", "which loss" },
    { "weight", MOE_REAL, offsetof(struct conf, weight), 0.01, 0, 1e6, NULL, "", "what it is multiplied by" },
    { "floor", MOE_REAL, offsetof(struct conf, floor), 1e3, 0, 1e3, NULL, "nats",
      "entropy of the mean gate that is enough (entropy, label)" },
    { "concentration", MOE_REAL, offsetof(struct conf, concentration), 1, 1e-3, 1e3, NULL, "",
      "of the prior: below 1 sharp gates, large ones even (dirichlet)" },
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

struct work {
    const struct conf *conf;
    const struct moe_batch *batch;
    const struct moe_routes *routes;
    int64_t n_tokens, n;
    double *p, *log_p, *slope; /* [T][E] gates, their logarithms, derivatives of the loss by gates */
    double *sum;               /* [E] */
    struct by_gate {
        double p;
        int64_t token;
    } * order; /* [T] */
};

static int read_gates(const struct state *s, struct work *w)
{
    const struct moe_env *env = s->env;
    for (int64_t t = 0; t < w->n_tokens; t++) {
        const float *x = w->batch->router_logits + t * w->n;
        double top = -INFINITY, sum = 0;
        for (int64_t e = 0; e < w->n; e++) {
            if (!isfinite(x[e]))
                return env->host->fail(env, MOE_EINVAL,
                                       "layer %d, token %lld, expert %lld: logit %g, expected a finite number",
                                       w->batch->layer, (long long)t, (long long)e, (double)x[e]);
            top = x[e] > top ? x[e] : top;
        }
        for (int64_t e = 0; e < w->n; e++)
            sum += exp((double)x[e] - top);
        for (int64_t e = 0; e < w->n; e++) {
            w->log_p[t * w->n + e] = (double)x[e] - top - log(sum);
            w->p[t * w->n + e] = exp(w->log_p[t * w->n + e]);
        }
    }
    return MOE_OK;
}

static double loss_switch(struct work *w)
{
    double loss = 0;
    memset(w->sum, 0, (size_t)w->n * sizeof *w->sum);
    for (int64_t i = 0; i < w->routes->n; i++)
        if (w->routes->expert[i] < w->n)
            w->sum[w->routes->expert[i]] += 1;
    for (int64_t i = 0; i < w->n_tokens * w->n && w->routes->n > 0; i++) {
        w->slope[i] = (double)w->n * w->sum[i % w->n] / ((double)w->routes->n * (double)w->n_tokens);
        loss += w->slope[i] * w->p[i];
    }
    return loss;
}

static double loss_importance(struct work *w)
{
    const double mean = (double)w->n_tokens / (double)w->n; /* gates of a token add up to one */
    double loss = 0;
    memset(w->sum, 0, (size_t)w->n * sizeof *w->sum);
    for (int64_t i = 0; i < w->n_tokens * w->n; i++)
        w->sum[i % w->n] += w->p[i];
    for (int64_t i = 0; i < w->n_tokens * w->n; i++)
        w->slope[i] = 2 * (w->sum[i % w->n] - mean) / ((double)w->n * mean * mean);
    for (int64_t e = 0; e < w->n; e++)
        loss += (w->sum[e] - mean) * (w->sum[e] - mean) / ((double)w->n * mean * mean);
    return loss;
}

static bool in_group(const struct work *w, int64_t t, const int32_t *label)
{
    return label == NULL || w->batch->label[t] == *label;
}

/* Of the tokens with this label, or of all; `share` of the whole. */
static double loss_entropy(struct work *w, const int32_t *label, double share)
{
    int64_t n_tokens = 0;
    double loss = 0, even = 0;
    memset(w->sum, 0, (size_t)w->n * sizeof *w->sum);
    for (int64_t t = 0; t < w->n_tokens; t++) {
        for (int64_t e = 0; e < w->n && in_group(w, t, label); e++)
            w->sum[e] += w->p[t * w->n + e];
        n_tokens += in_group(w, t, label);
    }
    for (int64_t e = 0; e < w->n; e++) {
        w->sum[e] = fmax(w->sum[e] / (double)n_tokens, 1e-300);
        even -= w->sum[e] * log(w->sum[e]);
    }
    const bool wanting = even < w->conf->floor;
    for (int64_t t = 0; t < w->n_tokens; t++)
        for (int64_t e = 0; e < w->n && in_group(w, t, label); e++) {
            const int64_t i = t * w->n + e;
            loss -= w->p[i] * w->log_p[i] / (double)n_tokens;
            w->slope[i] = share * ((wanting ? log(w->sum[e]) + 1 : 0) - w->log_p[i] - 1) / (double)n_tokens;
        }
    return share * (loss + (wanting ? w->conf->floor - even : 0));
}

static double loss_label(struct work *w)
{
    const int32_t *label = w->batch->label;
    double loss = 0;
    int64_t n_labels = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t t = 0; t < w->n_tokens; t++) {
            int64_t before = 0;
            while (before < t && label[before] != label[t])
                before++;
            if (before < t) /* not the first of its label */
                continue;
            if (pass == 0)
                n_labels++;
            else
                loss += loss_entropy(w, &label[t], 1 / (double)n_labels);
        }
    return loss;
}

/* The continued fraction of the incomplete beta function by Lentz's method; converges fast for x < (a+1)/(a+b+2). */
static double beta_fraction(double x, double a, double b)
{
    const double tiny = 1e-300;
    double c = 1, d = 1 / (1 - (a + b) * x / (a + 1)), f = d;
    for (int m = 1; m <= 10000; m++) {
        const double k = 2.0 * m, even = m * (b - m) * x / ((a + k - 1) * (a + k));
        const double odd = -(a + m) * (a + b + m) * x / ((a + k) * (a + k + 1));
        const double part[2] = { even, odd };
        double step = 1;
        for (int i = 0; i < 2; i++) {
            d = 1 + part[i] * d;
            d = 1 / (fabs(d) < tiny ? tiny : d);
            c = 1 + part[i] / c;
            c = fabs(c) < tiny ? tiny : c;
            step = c * d;
            f *= step;
        }
        if (fabs(step - 1) < 1e-15)
            break;
    }
    return f;
}

/* Distribution function and density of Beta(a, b). */
static double beta_cdf(double x, double a, double b, double *density)
{
    const double scale = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x));
    *density = scale / (x * (1 - x));
    return x < (a + 1) / (a + b + 2) ? scale * beta_fraction(x, a, b) / a : 1 - scale * beta_fraction(1 - x, b, a) / b;
}

static int compare(const void *left, const void *right)
{
    const struct by_gate *a = left, *b = right;
    if (a->p != b->p)
        return a->p < b->p ? -1 : 1;
    return (a->token > b->token) - (a->token < b->token);
}

static double loss_dirichlet(struct work *w)
{
    const double a = w->conf->concentration, b = a * (double)(w->n - 1), n = (double)w->n_tokens;
    double loss = 0;
    for (int64_t e = 0; e < w->n && w->n > 1; e++) {
        for (int64_t t = 0; t < w->n_tokens; t++)
            w->order[t] = (struct by_gate){ w->p[t * w->n + e], t };
        qsort(w->order, (size_t)w->n_tokens, sizeof *w->order, compare);
        for (int64_t r = 0; r < w->n_tokens; r++) {
            double density;
            const double x = fmin(fmax(w->order[r].p, 1e-300), 1 - 1e-15);
            const double off = beta_cdf(x, a, b, &density) - (double)(r + 1) / (n + 1);
            loss += off * off / n;
            w->slope[w->order[r].token * w->n + e] = 2 * off * density / n;
        }
    }
    return loss;
}

static double loss_z(struct work *w, float *d_logits)
{
    const double n = (double)w->n_tokens;
    double loss = 0;
    for (int64_t t = 0; t < w->n_tokens; t++) {
        const double z = (double)w->batch->router_logits[t * w->n] - w->log_p[t * w->n];
        loss += z * z / n;
        for (int64_t i = t * w->n; i < (t + 1) * w->n; i++)
            d_logits[i] += (float)(w->conf->weight * 2 * z * w->p[i] / n);
    }
    return loss;
}

static void through_softmax(const struct work *w, float *d_logits)
{
    for (int64_t t = 0; t < w->n_tokens; t++) {
        const double *p = w->p + t * w->n, *slope = w->slope + t * w->n;
        double mean = 0;
        for (int64_t e = 0; e < w->n; e++)
            mean += p[e] * slope[e];
        for (int64_t e = 0; e < w->n; e++)
            d_logits[t * w->n + e] += (float)(w->conf->weight * p[e] * (slope[e] - mean));
    }
}

static int check(const struct state *s, const struct moe_batch *batch)
{
    const struct moe_env *env = s->env;
    if (batch->router_logits == NULL)
        return env->host->fail(env, MOE_EINVAL, "layer %d: the workload has no router logits", batch->layer);
    if (batch->n_free > 0)
        return env->host->fail(env, MOE_EUNSUPPORTED,
                               "layer %d: %d experts that cost nothing, expected 0: there are no "
                               "logits of them",
                               batch->layer, batch->n_free);
    if (s->conf->kind == KIND_LABEL && batch->label == NULL)
        return env->host->fail(env, MOE_EINVAL, "layer %d: kind = label: the workload has no labels", batch->layer);
    return MOE_OK;
}

static int loss(void *self, const struct moe_batch *batch, const float *scores, const struct moe_routes *routes,
                double *total, float *d_logits, struct moe_gate_grad *d_gate)
{
    const struct state *s = self;
    const struct moe_host *host = s->env->host;
    struct work w = { s->conf, batch, routes, batch->n_tokens, batch->n_experts, NULL, NULL, NULL, NULL, NULL };
    const size_t bytes = (size_t)(w.n_tokens * w.n) * sizeof *w.p;
    (void)scores;
    (void)d_gate;
    int rc = check(s, batch);
    if (rc < 0 || w.n_tokens == 0)
        return rc;
    w.p = host->scratch(s->env, bytes);
    w.log_p = host->scratch(s->env, bytes);
    w.slope = host->scratch(s->env, bytes);
    w.sum = host->scratch(s->env, (size_t)w.n * sizeof *w.sum);
    w.order = host->scratch(s->env, (size_t)w.n_tokens * sizeof *w.order);
    if (!w.p || !w.log_p || !w.slope || !w.sum || !w.order)
        return MOE_ENOMEM;
    if ((rc = read_gates(s, &w)) < 0)
        return rc;
    memset(w.slope, 0, bytes);
    double value = 0;
    switch (s->conf->kind) {
    case KIND_SWITCH:
        value = loss_switch(&w);
        break;
    case KIND_Z:
        value = loss_z(&w, d_logits);
        break;
    case KIND_IMPORTANCE:
        value = loss_importance(&w);
        break;
    case KIND_ENTROPY:
        value = loss_entropy(&w, NULL, 1);
        break;
    case KIND_LABEL:
        value = loss_label(&w);
        break;
    case KIND_DIRICHLET:
        value = loss_dirichlet(&w);
        break;
    }
    *total += s->conf->weight * value;
    through_softmax(&w, d_logits);
    return MOE_OK;
}

const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI,
    .size = sizeof(struct moe_plugin),
    .kind = MOE_BALANCER,
    .needs = MOE_NEEDS_LOGITS | MOE_CROSS_BATCH, /* a trained gate depends on all tokens it saw */
    .name = "aux-loss-balancer",
    .summary = "losses for balance, small logits, sharp gates or a prior, for a gate that is trained",
    .source = "Switch, arXiv 2101.03961; ST-MoE, arXiv 2202.08906; Shazeer 2017, arXiv 1701.06538",
    .params = params,
    .conf_size = sizeof(struct conf),
    .state_size = sizeof(struct state),
    .init = init,
    .ops.balancer = { .loss = loss },
};
