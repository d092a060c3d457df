/* SPDX-License-Identifier: Apache-2.0
 *
 * trace_synth.c - synthetic routing with physical parameters.
 *
 * Behind the experts stand E lines: line h passes through one expert of each layer, by a random permutation per
 * layer. A line's popularity is that of its experts, so every layer has the same uneven popularity on different ids,
 * and following a line from layer to layer leaves every expert its share. Not quite: slots that are drawn again must
 * avoid those that were kept, which flattens popularity a little (by up to 15% of its squared variation).
 *
 *   for each request: popularity moves a step (drift); for each token, for each layer:
 *     1. each slot keeps the line of the token before with probability `stickiness`
 *     2. each other slot takes the line of its slot in the layer before with probability `affinity`, if still free
 *     3. the rest is drawn by popularity, without replacement
 *
 * Popularity has the quantiles of a log-normal distribution rather than draws from one: `skew` means the same for
 * every seed. Drift moves lines within the order of popularity and leaves its shape alone.
 */
#include "config.h"

#include "moelab.h"
#include "trace.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What entropy is for: streams are independent, so that asking for logits does not change the routes. */
enum purpose { FOR_LAYERS, FOR_DRIFT, FOR_ROUTES, FOR_LOGITS };

struct stream {
    uint64_t at;
};

static struct stream stream_of(uint64_t seed, enum purpose purpose, int64_t i)
{
    const uint64_t golden = UINT64_C(0x9E3779B97F4A7C15);
    uint64_t z = moe_mix(seed + golden);
    z = moe_mix(z + golden * ((uint64_t)purpose + 1));
    return (struct stream){ moe_mix(z + golden * ((uint64_t)i + 1)) };
}

static double draw_unit(struct stream *s)
{
    s->at += UINT64_C(0x9E3779B97F4A7C15);
    return moe_unit(moe_mix(s->at));
}

static double draw_normal(struct stream *s)
{
    double radius = sqrt(-2 * log(1 - draw_unit(s)));
    return radius * cos(6.283185307179586 * draw_unit(s));
}

struct line {
    double z;
    int32_t id;
};

enum { GUIDES = 4 }; /* per expert: then a search looks at little more than one rank */

struct generator {
    const struct trace_synth *p;
    double *quantile;   /* [E] of the standard normal, falling */
    struct line *line;  /* [E] by falling popularity; quantile[rank] is the popularity of line[rank].id */
    double *cumulative; /* [E] sum of the weights up to a rank */
    int32_t *guide;     /* [GUIDES * E] the rank at which the search for a share of all weight begins */
    double per_guide;   /* guides per weight */
    uint16_t *rank_of;  /* [E] */
    uint16_t *expert;   /* [L][E] id of the line's expert */
    uint16_t *lines;    /* [L][K] of this token */
    uint16_t *before;   /* [L][K] of the token before */
    int64_t *used;      /* [E] stamp of the last row that took the line */
    int64_t stamp;
    struct stream routes, drift;
};

/* The normal quantile: bisection on erfc. Called E times per trace. */
static double normal_quantile(double p)
{
    double low = -9, high = 9;
    for (int i = 0; i < 60; i++) {
        double middle = (low + high) / 2;
        if (0.5 * erfc(-middle / sqrt(2)) < p)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static int by_falling_z(const void *a, const void *b)
{
    const struct line *x = a, *y = b;
    return x->z > y->z ? -1 : x->z < y->z ? 1 : x->id - y->id;
}

static int check(const struct trace_synth *p, struct err *err)
{
    const struct {
        const char *name;
        int64_t value, min, max;
    } whole[] = {
        { "layers", p->n_layers, 1, 65536 },
        { "experts", p->n_experts, 1, 65536 },
        { "top_k", p->top_k, 1, p->n_experts },
        { "requests", p->n_requests, 0, INT32_MAX - 1 },
        { "tokens per request", p->tokens_per_request, 0, INT32_MAX },
    };
    const struct {
        const char *name;
        double value, max;
        const char *range;
    } real[] = {
        { "skew", p->skew, 10, "0 to 10" },
        { "stickiness", p->stickiness, 0x1.fffffffffffffp-1, "0 to below 1" },
        { "affinity", p->affinity, 0x1.fffffffffffffp-1, "0 to below 1" },
        { "drift", p->drift, 1, "0 to 1" },
    };
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
        if (whole[i].value < whole[i].min || whole[i].value > whole[i].max)
            return err_set(err, ERR_INPUT, "synth: %s is %" PRId64 ", expected %" PRId64 "..%" PRId64, whole[i].name,
                           whole[i].value, whole[i].min, whole[i].max);
    for (size_t i = 0; i < sizeof real / sizeof *real; i++)
        if (!(real[i].value >= 0 && real[i].value <= real[i].max))
            return err_set(err, ERR_INPUT, "synth: %s is %g, expected %s", real[i].name, real[i].value, real[i].range);
    return 0;
}

/* ---- generating ---- */

static void close_generator(struct generator *g)
{
    free(g->quantile);
    free(g->line);
    free(g->cumulative);
    free(g->guide);
    free(g->rank_of);
    free(g->expert);
    free(g->lines);
    free(g->before);
    free(g->used);
}

/* On failure too, what there is goes away by close_generator. */
static int open_generator(struct generator *g, const struct trace_synth *p, struct err *err)
{
    int rc = check(p, err);
    memset(g, 0, sizeof *g);
    if (rc < 0)
        return rc;
    size_t n = (size_t)p->n_experts, layers = (size_t)p->n_layers, k = (size_t)p->top_k;
    g->p = p;
    g->quantile = malloc(n * sizeof *g->quantile);
    g->line = malloc(n * sizeof *g->line);
    g->cumulative = malloc(n * sizeof *g->cumulative);
    g->guide = malloc(GUIDES * n * sizeof *g->guide);
    g->rank_of = malloc(n * sizeof *g->rank_of);
    g->expert = malloc(layers * n * sizeof *g->expert);
    g->lines = malloc(layers * k * sizeof *g->lines);
    g->before = malloc(layers * k * sizeof *g->before);
    g->used = calloc(n, sizeof *g->used);
    if (!g->quantile || !g->line || !g->cumulative || !g->guide || !g->rank_of || !g->expert || !g->lines ||
        !g->before || !g->used)
        return err_set(err, ERR_MEMORY, "synth: no memory for %d layers of %d experts", p->n_layers, p->n_experts);
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        g->quantile[i] = normal_quantile(1 - ((double)i + 0.5) / (double)n);
        g->line[i] = (struct line){ g->quantile[i], (int32_t)i };
        g->rank_of[i] = (uint16_t)i;
        sum += exp(p->skew * g->quantile[i]);
        g->cumulative[i] = sum;
    }
    g->per_guide = GUIDES * (double)n / sum;
    for (size_t i = 0, rank = 0; i < GUIDES * n; i++) {
        while (rank + 1 < n && g->cumulative[rank] * g->per_guide <= (double)i)
            rank++;
        g->guide[i] = (int32_t)rank;
    }
    for (size_t l = 0; l < layers; l++) {
        struct stream s = stream_of(p->seed, FOR_LAYERS, (int64_t)l);
        uint16_t *expert = g->expert + l * n;
        for (size_t i = 0; i < n; i++) { /* shuffle, inside out */
            size_t j = (size_t)(draw_unit(&s) * (double)(i + 1));
            expert[i] = expert[j];
            expert[j] = (uint16_t)i;
        }
    }
    g->drift = stream_of(p->seed, FOR_DRIFT, 0);
    return 0;
}

/* Popularity moves: z is a first-order autoregressive process with unit variance, of which only the order counts. */
static void begin_request(struct generator *g, int32_t request)
{
    g->routes = stream_of(g->p->seed, FOR_ROUTES, request);
    if (request == 0 || g->p->drift <= 0)
        return;
    double keep = 1 - g->p->drift, move = sqrt(1 - keep * keep);
    int32_t n = g->p->n_experts;
    for (int32_t h = 0; h < n; h++) { /* by id: entropy must not depend on the order */
        struct line *line = &g->line[g->rank_of[h]];
        line->z = keep * line->z + move * draw_normal(&g->drift);
    }
    qsort(g->line, (size_t)n, sizeof *g->line, by_falling_z);
    for (int32_t rank = 0; rank < n; rank++)
        g->rank_of[g->line[rank].id] = (uint16_t)rank;
}

/* The first rank whose sum is above u: what bisection finds, from a guide that rounding may have put a rank too far. */
static int32_t rank_at(const struct generator *g, double u)
{
    const int32_t last = g->p->n_experts - 1;
    int32_t guide = (int32_t)(u * g->per_guide);
    int32_t rank = g->guide[guide <= GUIDES * last ? guide : GUIDES * last];
    while (rank > 0 && g->cumulative[rank - 1] > u)
        rank--;
    while (rank < last && g->cumulative[rank] <= u)
        rank++;
    return rank;
}

/* A line by popularity among those that the row has not used. */
static uint16_t draw_line(struct generator *g)
{
    int32_t n = g->p->n_experts;
    for (int tries = 0; tries < 16; tries++) {
        int32_t id = g->line[rank_at(g, draw_unit(&g->routes) * g->cumulative[n - 1])].id;
        if (g->used[id] != g->stamp)
            return (uint16_t)id;
    }
    /* Those in use have nearly all of the weight: draw among the others alone. */
    double left = 0;
    int32_t last = -1;
    for (int32_t rank = 0; rank < n; rank++)
        if (g->used[g->line[rank].id] != g->stamp)
            left += exp(g->p->skew * g->quantile[rank]);
    double u = draw_unit(&g->routes) * left;
    for (int32_t rank = 0; rank < n && u >= 0; rank++)
        if (g->used[g->line[rank].id] != g->stamp) {
            u -= exp(g->p->skew * g->quantile[rank]);
            last = g->line[rank].id;
        }
    return (uint16_t)last; /* top_k <= experts: there is one */
}

/* Sets lines [L][K]; a token's number counts within its request. */
static void next_token(struct generator *g, int64_t token)
{
    int32_t k = g->p->top_k;
    enum { NONE = 0xffff }; /* 65536 experts: line 65535 in place of NONE only costs it its stickiness */
    uint16_t *swap = g->before;
    g->before = g->lines;
    g->lines = swap;
    for (int32_t l = 0; l < g->p->n_layers; l++) {
        uint16_t *line = g->lines + (int64_t)l * k;
        g->stamp++;
        for (int32_t i = 0; i < k; i++) {
            bool sticks = token > 0 && draw_unit(&g->routes) < g->p->stickiness;
            line[i] = sticks ? g->before[(int64_t)l * k + i] : (uint16_t)NONE;
            if (line[i] != NONE)
                g->used[line[i]] = g->stamp;
        }
        for (int32_t i = 0; i < k; i++)
            if (line[i] == NONE && l > 0 && draw_unit(&g->routes) < g->p->affinity &&
                g->used[line[i - k]] != g->stamp) {
                line[i] = line[i - k];
                g->used[line[i]] = g->stamp;
            }
        for (int32_t i = 0; i < k; i++)
            if (line[i] == NONE) {
                line[i] = draw_line(g);
                g->used[line[i]] = g->stamp;
            }
    }
}

static uint16_t expert_at(const struct generator *g, int32_t layer, int32_t slot)
{
    return g->expert[(int64_t)layer * g->p->n_experts + g->lines[(int64_t)layer * g->p->top_k + slot]];
}

int trace_synth_routes(const struct trace_synth *p, uint16_t *experts, struct err *err)
{
    struct generator g;
    int rc = open_generator(&g, p, err);
    for (int32_t r = 0; rc == 0 && r < p->n_requests; r++) {
        begin_request(&g, r);
        for (int64_t t = 0; t < p->tokens_per_request; t++) {
            next_token(&g, t);
            for (int32_t l = 0; l < p->n_layers; l++)
                for (int32_t i = 0; i < p->top_k; i++)
                    *experts++ = expert_at(&g, l, i);
        }
    }
    close_generator(&g);
    return rc;
}

/* ---- logits ---- */

/* The least half above x, which is finite. */
static uint16_t half_above(uint16_t x)
{
    return x & 0x8000 ? (uint16_t)(x == 0x8000 ? 1 : x - 1) : (uint16_t)(x + 1);
}

/* Logits whose top k are the row's experts, slot 0 the largest, strictly: log-popularity plus Gumbel noise, as if
 * the router had drawn by popularity; values that the experts chosen for other reasons would have needed are
 * exchanged with theirs. value, top: scratch [E], [K]. weight: softmax over the chosen. */
static void make_logits(const struct generator *g, struct stream *s, int32_t layer, float *value, int32_t *top,
                        float *chosen, uint16_t *logit, uint16_t *weight)
{
    int32_t n = g->p->n_experts, k = g->p->top_k;
    const uint16_t *expert = g->expert + (int64_t)layer * n;
    for (int32_t h = 0; h < n; h++)
        value[expert[h]] = (float)(g->p->skew * g->quantile[g->rank_of[h]] - log(-log1p(-draw_unit(s) - 0x1p-54)));
    moe_top_k(value, n, k, top);
    for (int32_t i = 0; i < k; i++)
        chosen[i] = value[top[i]];
    /* Each intruder (in the top, not chosen) takes the value of an expert that was chosen but is not in the top. */
    int32_t outsider = 0;
    for (int32_t i = 0; i < k; i++) {
        bool intruder = true;
        for (int32_t j = 0; j < k && intruder; j++)
            intruder = expert_at(g, layer, j) != top[i];
        while (intruder) {
            int32_t e = expert_at(g, layer, outsider++);
            bool in_top = false;
            for (int32_t j = 0; j < k && !in_top; j++)
                in_top = top[j] == e;
            if (!in_top) {
                value[top[i]] = value[e];
                intruder = false;
            }
        }
    }
    for (int32_t i = 0; i < k; i++)
        value[expert_at(g, layer, i)] = -INFINITY;
    uint16_t limit = 0xfc00; /* the largest of the others: -infinity if there are none */
    for (int32_t e = 0; e < n; e++) {
        logit[e] = npy_float_to_half(value[e]);
        if (value[e] > -INFINITY && npy_half_to_float(logit[e]) > npy_half_to_float(limit))
            limit = logit[e];
    }
    for (int32_t i = k - 1; i >= 0; i--) { /* rounding may have made ties: step over them */
        uint16_t x = npy_float_to_half(chosen[i]);
        if (limit != 0xfc00 && npy_half_to_float(x) <= npy_half_to_float(limit))
            x = half_above(limit);
        logit[expert_at(g, layer, i)] = limit = x;
        chosen[i] = npy_half_to_float(x);
    }
    moe_softmax(chosen, k, chosen);
    for (int32_t i = 0; i < k; i++)
        weight[i] = npy_float_to_half(chosen[i]);
}

/* ---- writing ---- */

struct files {
    struct trace_out out;
    struct npy_writer experts, logits, weights;
    float *value, *chosen;
    int32_t *top;
    uint16_t *logit, *weight;
    unsigned char *ids;
};

static void close_files(struct files *f)
{
    npy_abandon(&f->experts);
    npy_abandon(&f->logits);
    npy_abandon(&f->weights);
    trace_out_abandon(&f->out);
    free(f->value);
    free(f->chosen);
    free(f->top);
    free(f->logit);
    free(f->weight);
    free(f->ids);
}

static int open_files(struct files *f, const struct trace_synth *p, const char *dir, struct err *err)
{
    int64_t n_tokens = (int64_t)p->n_requests * p->tokens_per_request;
    int64_t n = (int64_t)p->n_layers * p->n_experts, k = (int64_t)p->n_layers * p->top_k;
    int64_t ids[3] = { n_tokens, p->n_layers, p->top_k }, scores[3] = { n_tokens, p->n_layers, p->n_experts };
    int rc = trace_out_begin(&f->out, dir, err);
    if (rc < 0)
        return rc;
    f->ids = malloc((size_t)k * 2);
    f->value = malloc((size_t)p->n_experts * sizeof *f->value);
    f->chosen = malloc((size_t)p->top_k * sizeof *f->chosen);
    f->top = malloc((size_t)p->top_k * sizeof *f->top);
    f->logit = malloc((size_t)n * sizeof *f->logit);
    f->weight = malloc((size_t)k * sizeof *f->weight);
    if (!f->ids || !f->value || !f->chosen || !f->top || !f->logit || !f->weight)
        return err_set(err, ERR_MEMORY, "%s: no memory for one token's routes", dir);
    rc =
        npy_create(&f->experts, trace_out_path(&f->out, "experts.npy"), p->n_experts <= 256 ? "u1" : "u2", 3, ids, err);
    if (rc == 0 && p->logits)
        rc = npy_create(&f->logits, trace_out_path(&f->out, "logits.npy"), "f2", 3, scores, err);
    if (rc == 0 && p->logits)
        rc = npy_create(&f->weights, trace_out_path(&f->out, "weights.npy"), "f2", 3, ids, err);
    return rc;
}

static int append_token(struct files *f, const struct generator *g, struct stream *s, struct err *err)
{
    const struct trace_synth *p = g->p;
    int64_t k = (int64_t)p->n_layers * p->top_k;
    bool narrow = p->n_experts <= 256;
    for (int64_t i = 0; i < k; i++) {
        uint16_t id = expert_at(g, (int32_t)(i / p->top_k), (int32_t)(i % p->top_k));
        if (narrow)
            f->ids[i] = (unsigned char)id;
        else
            memcpy(f->ids + 2 * i, &id, 2);
    }
    int rc = npy_append(&f->experts, f->ids, (size_t)k * (narrow ? 1 : 2), err);
    if (rc < 0 || !p->logits)
        return rc;
    for (int32_t l = 0; l < p->n_layers; l++)
        make_logits(g, s, l, f->value, f->top, f->chosen, f->logit + (int64_t)l * p->n_experts,
                    f->weight + (int64_t)l * p->top_k);
    rc = npy_append(&f->logits, f->logit, (size_t)p->n_layers * (size_t)p->n_experts * sizeof *f->logit, err);
    return rc < 0 ? rc : npy_append(&f->weights, f->weight, (size_t)k * sizeof *f->weight, err);
}

static int write_offsets(struct files *f, const struct trace_synth *p, struct err *err)
{
    int64_t shape[1] = { (int64_t)p->n_requests + 1 }, *offsets = malloc((size_t)shape[0] * sizeof *offsets);
    if (!offsets)
        return err_set(err, ERR_MEMORY, "%s: no memory for %d offsets", f->out.dir, p->n_requests);
    for (int64_t r = 0; r < shape[0]; r++)
        offsets[r] = r * p->tokens_per_request;
    int rc = npy_write(trace_out_path(&f->out, "offsets.npy"), "i8", 1, shape, offsets, err);
    free(offsets);
    return rc;
}

int trace_synthesise(const struct trace_synth *p, const char *dir, struct err *err)
{
    struct generator g;
    struct files f = { .ids = NULL };
    json_t *meta = NULL;
    int rc = open_generator(&g, p, err);
    if (rc == 0)
        rc = open_files(&f, p, dir, err);
    for (int32_t r = 0; r < p->n_requests && rc == 0; r++) {
        struct stream s = stream_of(p->seed, FOR_LOGITS, r);
        begin_request(&g, r);
        for (int64_t t = 0; t < p->tokens_per_request && rc == 0; t++) {
            next_token(&g, t);
            rc = append_token(&f, &g, &s, err);
        }
    }
    if (rc == 0)
        rc = npy_finish(&f.experts, err);
    if (rc == 0 && p->logits && (rc = npy_finish(&f.logits, err)) == 0)
        rc = npy_finish(&f.weights, err);
    if (rc == 0)
        rc = write_offsets(&f, p, err);
    if (rc == 0) {
        meta = trace_meta(p->n_layers, p->n_experts, p->top_k, p->n_requests,
                          (int64_t)p->n_requests * p->tokens_per_request);
        if (meta) {
            json_object_set_new(meta, "model", json_string("synthetic"));
            json_object_set_new(meta, "synth",
                                json_pack("{s:f, s:f, s:f, s:f, s:I}", "skew", p->skew, "stickiness", p->stickiness,
                                          "affinity", p->affinity, "drift", p->drift, "seed", (json_int_t)p->seed));
        }
        rc = trace_out_commit(&f.out, meta, err);
    }
    json_decref(meta);
    close_files(&f);
    close_generator(&g);
    return rc;
}
