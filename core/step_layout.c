/* SPDX-License-Identifier: Apache-2.0
 * step_layout.c - what a step computes beside routed experts, which no policy decides on: embedding, attention, gates,
 * shared experts, dense layers and the head. The kernels are hw/layer.c's.
 *
 * A token lives on one device. Where `tp` devices split attention, dense layers and the head, they exchange twice for
 * each: every device gets the others' tokens (all-gather), computes its heads or its width for all of them, and sends
 * the others their partial sums (reduce-scatter), which each adds up for its own. Together that is an all-reduce; each
 * device sends (tp - 1) / tp of the group's rows twice, to all others at once. Norm and gate see own tokens only. */
#include "config.h"

#include "layer.h"
#include "run.h"

#include <stdlib.h>
#include <string.h>

static struct layer_part step_part(const struct run *r, int32_t device, bool split)
{
    struct layer_part p = { .model = &r->model, .attention = &r->attention, .precision = r->precision,
                            .phase = r->workload.phase, .context = r->workload.context, .tp = split ? r->tp : 1 };
    const int32_t first = split ? device - device % r->tp : device, n = split ? r->tp : 1;
    for (int32_t d = first; d < first + n; d++)
        p.tokens += (double)r->device_tokens[d];
    return p;
}

/* On each device, all tokens; `half` not 0: those that do not leave out that half of the layer. */
static void count_tokens(struct run *r, const struct moe_batch *b, int half)
{
    const uint8_t *skip = r->routes.skip;
    memset(r->device_tokens, 0, sizeof *r->device_tokens * (size_t)r->topology->n_devices);
    for (int32_t t = 0; t < b->n_tokens; t++)
        r->device_tokens[b->device[t]] += !(half && skip && (skip[t] & half));
}

/* A device's kernels after what it did last; `entry` moves on. */
int step_after_entry(struct run *r, int32_t device, enum moe_op op, const struct kernels *k)
{
    int32_t t = graph_kernels(&r->graph, device, 0, op, k->n, k->kernel, r->err);
    if (t >= 0 && r->entry[device] >= 0)
        graph_after(&r->graph, t, r->entry[device], r->err);
    if (r->err->code)
        return r->err->code;
    r->entry[device] = t;
    return 0;
}

/* Every group's devices exchange rows: gather: own ones go to all others; else partial sums of the others' rows to
 * each. Entries become what each device has to wait for. */
static int exchange_rows(struct run *r, bool gather)
{
    const double row = r->model.d_model * layer_element_bytes(r->precision);
    struct moe_part part[r->tp * r->tp];
    for (int32_t first = 0; first < r->topology->n_devices && r->tp > 1; first += r->tp) {
        int32_t n = 0;
        for (int32_t src = first; src < first + r->tp; src++)
            for (int32_t dst = first; dst < first + r->tp; dst++)
                if (src != dst)
                    part[n++] = (struct moe_part){ .src = src, .dst = dst,
                                                   .bytes = (double)r->device_tokens[gather ? src : dst] * row };
        int32_t x = graph_exchange(&r->graph, &(struct moe_exchange){ MOE_PAY_BYTES, n, part }, r->err);
        if (x < 0)
            return r->err->code;
        r->graph.task[x].collective = true;
        for (int32_t d = first; d < first + r->tp && !r->err->code; d++)
            if (r->entry[d] >= 0)
                graph_after(&r->graph, x, r->entry[d], r->err);
        for (int32_t d = first; d < first + r->tp && !r->err->code; d++)
            r->entry[d] = graph_arrival(&r->graph, x, d, r->err);
        if (r->err->code)
            return r->err->code;
    }
    return 0;
}

/* tp partial sums of own rows, read; their sum written. */
static void add_sums(const struct run *r, struct kernels *k, int32_t device)
{
    if (r->tp > 1 && r->device_tokens[device] > 0)
        k->kernel[k->n++] = (struct kernel){ .precision = r->precision,
                                             .traffic = (r->tp + 1.0) * (double)r->device_tokens[device] *
                                                        r->model.d_model * layer_element_bytes(r->precision) };
}

typedef void (*lister)(const struct run *, struct kernels *, const struct layer_part *);

static void list_attention(const struct run *r, struct kernels *k, const struct layer_part *p)
{
    (void)r;
    if (p->tokens > 0) /* nobody is left: nothing is read either */
        layer_attention(k, p);
}

static void list_dense(const struct run *r, struct kernels *k, const struct layer_part *p)
{
    layer_norm(k, p);
    layer_ffn(k, p, (double)r->dense.width / p->tp);
}

/* Prompts need the scores of their last tokens alone; at least one per device. */
static double head_rows(const struct layer_part *p)
{
    if (p->phase != MOE_PREFILL || p->tokens <= 1)
        return p->tokens;
    double prompts = p->context > 0 ? p->tokens / p->context : p->tokens;
    return prompts > 1 ? (double)(int64_t)prompts : 1;
}

static void list_head(const struct run *r, struct kernels *k, const struct layer_part *p)
{
    layer_head(k, p, r->vocab, head_rows(p));
}

/* Forward kernels become backward ones. */
static void turn(struct kernels *k)
{
    const struct kernels forward = *k;
    k->n = 0;
    layer_backward(k, &forward);
}

/* One split stage on all devices; `sum`: its results are partial. Backwards, all-gather and reduce-scatter change
 * places: the same bytes. */
static int lay_out_split(struct run *r, enum moe_op op, lister list, bool sum)
{
    const int32_t n_devices = r->topology->n_devices;
    if (exchange_rows(r, true) < 0)
        return r->err->code;
    for (int32_t d = 0; d < n_devices; d++) {
        const struct layer_part p = step_part(r, d, true);
        struct kernels k = { .n = 0 };
        list(r, &k, &p);
        if (r->graph.pass == PASS_BACKWARD)
            turn(&k);
        if (step_after_entry(r, d, op, &k) < 0)
            return r->err->code;
    }
    if (!sum || r->tp == 1)
        return 0;
    if (exchange_rows(r, false) < 0)
        return r->err->code;
    for (int32_t d = 0; d < n_devices; d++) {
        struct kernels k = { .n = 0 };
        add_sums(r, &k, d);
        if (step_after_entry(r, d, op, &k) < 0)
            return r->err->code;
    }
    return 0;
}

static int lay_out_embedding(struct run *r)
{
    for (int32_t d = 0; d < r->topology->n_devices && r->vocab > 0; d++) {
        const double bytes = 2 * (double)r->device_tokens[d] * r->model.d_model * layer_element_bytes(r->precision);
        struct kernels k = { .n = bytes > 0, .kernel = { { .precision = r->precision, .traffic = bytes } } };
        if (step_after_entry(r, d, MOE_OP_OTHER, &k) < 0)
            return r->err->code;
    }
    return 0;
}

int step_dense_before(const struct run *r, int32_t layer)
{
    return (layer == 0 ? r->dense.n_first : 0) + r->dense.interleave - 1;
}

int step_lay_out_attention(struct run *r)
{
    return lay_out_split(r, MOE_OP_ATTENTION, list_attention, true);
}

int step_lay_out_dense_ffn(struct run *r)
{
    return lay_out_split(r, MOE_OP_OTHER, list_dense, true);
}

static int lay_out_dense(struct run *r, int32_t layer)
{
    for (int32_t i = 0; i < step_dense_before(r, layer); i++)
        if (step_lay_out_attention(r) < 0 || step_lay_out_dense_ffn(r) < 0)
            return r->err->code;
    return 0;
}

/* Beside routed ones, on a stream of their own. */
int step_lay_out_shared(struct run *r, int32_t *shared)
{
    for (int32_t d = 0; d < r->topology->n_devices; d++) {
        const struct layer_part p = step_part(r, d, false);
        struct kernels k = { .n = 0 };
        shared[d] = -1;
        if (r->model.n_shared == 0)
            continue;
        layer_ffn(&k, &p, (double)r->model.n_shared * r->model.d_expert);
        if (r->graph.pass == PASS_BACKWARD)
            turn(&k);
        shared[d] = graph_kernels(&r->graph, d, 1, MOE_OP_SHARED, k.n, k.kernel, r->err);
        if (shared[d] < 0 || (r->entry[d] >= 0 && graph_after(&r->graph, shared[d], r->entry[d], r->err) < 0))
            return r->err->code;
    }
    return 0;
}

int step_lay_out_gate_backward(struct run *r, int32_t layer)
{
    for (int32_t d = 0; d < r->topology->n_devices; d++) {
        const struct layer_part p = step_part(r, d, false);
        struct kernels k = { .n = 0 };
        layer_gate(&k, &p, r->router.plugin->needs & MOE_OWN_GATE ? 0 : moe_experts_of(&r->model, layer));
        turn(&k);
        if (step_after_entry(r, d, MOE_OP_GATE, &k) < 0)
            return r->err->code;
    }
    return 0;
}

/* Routing and shared experts, on own tokens. */
static int lay_out_gate(struct run *r, const struct moe_batch *b, const struct moe_cost *own, int32_t *shared)
{
    const struct moe_model *m = &r->model;
    for (int32_t d = 0; d < r->topology->n_devices; d++) {
        const struct layer_part p = step_part(r, d, false);
        struct kernels k = { .n = 0 };
        layer_gate(&k, &p, r->router.plugin->needs & MOE_OWN_GATE ? 0 : moe_experts_of(m, b->layer));
        double share = p.tokens / (b->n_tokens > 0 ? b->n_tokens : 1);
        if (k.n > 0) { /* top-k's kernel decides the rest as well */
            k.kernel[k.n - 1].flops += own->flops * share;
            k.kernel[k.n - 1].traffic += own->bytes * share;
            if (own->flops > 0 || own->bytes > 0) /* more than tables speak of */
                k.kernel[k.n - 1].key.op = LATENCY_NONE;
        }
        if (step_after_entry(r, d, MOE_OP_GATE, &k) < 0)
            return r->err->code;
    }
    if (!r->routes.skip)
        return step_lay_out_shared(r, shared);
    count_tokens(r, b, MOE_HALF_EXPERTS);
    const int rc = step_lay_out_shared(r, shared);
    count_tokens(r, b, 0);
    return rc;
}

/* Tokens that leave attention out are neither multiplied nor sent; those that stay attend to the workload's context, as
 * if the others' keys were there: that of a rule which drops keys as well would be shorter. */
static int lay_out_attention(struct run *r, const struct moe_batch *b)
{
    if (!r->routes.skip)
        return step_lay_out_attention(r);
    count_tokens(r, b, MOE_HALF_ATTENTION);
    const int rc = step_lay_out_attention(r);
    count_tokens(r, b, 0);
    return rc;
}

int step_lay_out_again(struct run *r, const struct moe_batch *b, int32_t *shared)
{
    static const struct moe_cost none = { 0, 0, 0 };
    return step_lay_out_attention(r) < 0 ? r->err->code : lay_out_gate(r, b, &none, shared);
}

int step_lay_out_plain(struct run *r, const struct moe_batch *b, const struct moe_cost *own, int32_t *shared)
{
    if (b->layer == 0) {
        count_tokens(r, b, 0);
        if (lay_out_embedding(r) < 0)
            return r->err->code;
    }
    if (lay_out_dense(r, b->layer) < 0 || lay_out_attention(r, b) < 0)
        return r->err->code;
    return lay_out_gate(r, b, own, shared);
}

int step_lay_out_head(struct run *r)
{
    return r->vocab > 0 ? lay_out_split(r, MOE_OP_OTHER, list_head, false) : 0;
}
