/* SPDX-License-Identifier: Apache-2.0
 * compute.c - how long a piece of work takes on one device: grouped GEMMs by gemm.c, the rest by a roofline.
 * A precision that the device lacks takes for ever (INFINITY); who opens a machine checks peak[] first. */
#include "config.h"

#include "latency_table.h"

#include <math.h>

/* Bytes of one activation element as a kernel of this precision reads it. */
static const double element_bytes[N_PRECISIONS] = { [PREC_FP32] = 4, [PREC_TF32] = 4, [PREC_BF16] = 2, [PREC_FP16] = 2,
                                                    [PREC_FP8] = 1, [PREC_INT8] = 1, [PREC_INT4] = 0.5 };

/* Results of matrix products leave in 16 bits, as in DeepGEMM, or in what they were computed in. */
static double result_bytes(enum precision p)
{
    return fmax(element_bytes[p], 2);
}

double compute_element_bytes(enum precision p)
{
    return element_bytes[p];
}

/* Efficiencies: of peak, of memory's bandwidth. adds_up: neither hides behind the other, as on a processor. */
static struct kernel_cost roofline(const struct device_spec *d, double flops, double bytes, double rate,
                                   double efficiency, bool adds_up)
{
    double arithmetic = flops > 0 ? flops / rate : 0;
    double memory = bytes / (d->mem_bandwidth * efficiency);
    const double both = adds_up ? arithmetic + memory : fmax(arithmetic, memory);
    return (struct kernel_cost){ both + d->launch_s, arithmetic, memory, bytes };
}

struct kernel_cost cost_plain(const struct device_spec *d, enum precision p, double flops, double bytes)
{
    return roofline(d, flops, bytes, d->peak[p] * d->flops_efficiency, d->mem_efficiency, false);
}

struct kernel_cost cost_known(const struct device_spec *d, enum precision p, double flops, double bytes,
                              const struct latency_key *key)
{
    const bool reads = key->op == LATENCY_DECODE || key->op == LATENCY_PREFILL;
    const double own = reads ? d->read_efficiency : key->op == LATENCY_COMBINE ? d->combine_efficiency : 0;
    const double rate = key->op == LATENCY_DECODE && d->decode_efficiency > 0 ? d->decode_efficiency
                                                                              : d->flops_efficiency;
    struct kernel_cost c = roofline(d, flops, bytes, d->peak[p] * rate, own > 0 ? own : d->mem_efficiency,
                                    reads && own > 0);
    if (!d->tables || key->op == LATENCY_NONE || key->rows <= 0)
        return c;
    /* What was measured keeps arithmetic and memory as busy as the model says. */
    const double measured = latency_table_kernel(d->tables, p, key, c.seconds), share = measured / c.seconds;
    return (struct kernel_cost){ measured, c.arithmetic * share, c.memory * share, bytes };
}

struct kernel_cost cost_kernel(const struct device_spec *d, const struct kernel *k)
{
    if (k->groups == 0)
        return cost_known(d, k->precision, k->flops, k->traffic, &k->key);
    struct gemm_group group[k->groups];
    for (int32_t g = 0; g < k->groups; g++)
        group[g] = k->shape;
    return cost_gemm(d, k->precision, k->groups, group, &k->bytes);
}

/* A share is a float: a third of 999 is 333, not 334. */
static int64_t whole_width(double hidden)
{
    return (int64_t)ceil(hidden * (1 - 1e-7));
}

struct kernel_cost cost_experts(const struct device_spec *d, enum precision p, const struct moe_model *m, int32_t n,
                                const int64_t *rows, const double *width)
{
    struct gemm_group up[n > 0 ? n : 1], down[n > 0 ? n : 1];
    const struct gemm_bytes b = { element_bytes[p], m->weight_bytes, result_bytes(p) };
    struct latency_key between = { .op = LATENCY_ACTIVATION };
    double activation = 0, any = 0;
    for (int32_t i = 0; i < n; i++) {
        const double hidden = (double)m->d_expert * (width ? width[i] : 1);
        const int64_t h = whole_width(hidden);
        if (rows[i] > 0 && any > 0 && between.n != h) /* of several widths */
            between.op = LATENCY_NONE;
        between.n = rows[i] > 0 ? h : between.n;
        between.rows += rows[i] > 0 ? (double)rows[i] : 0;
        up[i] = (struct gemm_group){ rows[i], 2 * h, m->d_model };
        down[i] = (struct gemm_group){ rows[i], m->d_model, h };
        /* gate and up read, their product written */
        activation += rows[i] > 0 ? (double)rows[i] * hidden * (2 * result_bytes(p) + element_bytes[p]) : 0;
        any += rows[i] > 0;
    }
    if (any == 0)
        return (struct kernel_cost){ 0 };
    struct kernel_cost sum = cost_gemm(d, p, n, up, &b);
    cost_add(&sum, cost_known(d, p, 0, activation, &between));
    cost_add(&sum, cost_gemm(d, p, n, down, &b));
    return sum;
}

struct kernel_cost cost_experts_backward(const struct device_spec *d, enum precision p, const struct moe_model *m,
                                         int32_t n, const int64_t *rows, const double *width)
{
    enum { DOWN_INPUT, DOWN_WEIGHT, UP_INPUT, UP_WEIGHT, N_PRODUCTS };
    struct gemm_group group[N_PRODUCTS][n > 0 ? n : 1];
    /* Gradients of weights add to 4-byte sums; both their operands are rows. */
    const struct gemm_bytes input = { element_bytes[p], m->weight_bytes, result_bytes(p) },
                            weight = { element_bytes[p], element_bytes[p], 4 };
    struct kernel_cost sum = { 0 };
    double activation = 0;
    for (int32_t i = 0; i < n; i++) {
        const double hidden = (double)m->d_expert * (width ? width[i] : 1);
        const int64_t h = whole_width(hidden), t = rows[i], some = t > 0;
        group[DOWN_INPUT][i] = (struct gemm_group){ t, h, m->d_model };
        group[DOWN_WEIGHT][i] = (struct gemm_group){ some * m->d_model, h, t };
        group[UP_INPUT][i] = (struct gemm_group){ t, m->d_model, 2 * h };
        group[UP_WEIGHT][i] = (struct gemm_group){ some * 2 * h, m->d_model, t };
        /* gate, up and the product's gradient read; gradients of both written, and the product once more */
        activation += some ? (double)t * hidden * (3 * result_bytes(p) + 3 * element_bytes[p]) : 0;
    }
    if (activation == 0)
        return sum;
    for (int k = 0; k < N_PRODUCTS; k++)
        cost_add(&sum, cost_gemm(d, p, n, group[k], k == DOWN_INPUT || k == UP_INPUT ? &input : &weight));
    cost_add(&sum, cost_plain(d, p, 0, activation));
    return sum;
}
