/* SPDX-License-Identifier: Apache-2.0
 * calibrate.c - fits the parameters of the models that a simulated machine uses to what was measured.
 *
 * Each family of samples has a model of few parameters, found by minimising the squares of log(modelled / measured), so
 * that small sizes count as much as large ones. What the models are: hw/gemm.c, hw/compute.c; exchanges and reads take
 * a fixed time and bytes over a bandwidth. Nothing is fitted to a run. */
#include "config.h"

#include "calibrate.h"
#include "layer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- samples ---- */

static const char *const what_name[N_WHATS] = { "gemm", "move", "sum", "attention", "exchange", "read", "probe",
                                                "squares", "copy", "write", "kernel", "launch", "events", "queue" };

static int32_t groups_of(const struct host_sample *s)
{
    return s->groups > 1 ? s->groups : 1;
}

json_t *calibration_sample(const struct host_sample *s)
{
    json_t *o = json_pack("{s:s, s:s, s:f, s:f, s:f, s:i}", "what", what_name[s->what], "precision",
                          precision_name[s->precision], "seconds", s->seconds, "low", s->low, "high", s->high, "n",
                          s->n);
    if (s->what == HOST_GEMM) {
        json_object_set_new(o, "shape", json_pack("[I, I, I]", (json_int_t)s->shape.rows, (json_int_t)s->shape.n,
                                                  (json_int_t)s->shape.k));
        json_object_set_new(o, "groups", json_integer(groups_of(s)));
    } else if (s->what == HOST_ATTENTION || s->what == GPU_KERNEL)
        json_object_set_new(o, "key", json_pack("[i, i, i, I, I, f, f]", s->key.op, s->key.heads, s->key.kv_heads,
                                                (json_int_t)s->key.n, (json_int_t)s->key.k, s->key.rows,
                                                s->key.context));
    if (s->what != HOST_GEMM && s->what != HOST_ATTENTION)
        json_object_set_new(o, "bytes", json_real(s->bytes));
    if (s->what == GPU_SQUARES)
        json_object_set_new(o, "flops", json_real(s->flops));
    return o;
}

static bool read_sample(const json_t *o, struct host_sample *s)
{
    const char *what, *precision = json_string_value(json_object_get(o, "precision"));
    json_int_t rows, n, k;
    int op;
    *s = (struct host_sample){ .what = N_WHATS };
    if (json_unpack((json_t *)(uintptr_t)o, "{s:s, s:F, s:F, s:F, s:i}", "what", &what, "seconds", &s->seconds, "low",
                    &s->low, "high", &s->high, "n", &s->n) < 0)
        return false;
    for (int i = 0; precision && i < N_PRECISIONS; i++)
        s->precision = strcmp(precision, precision_name[i]) ? s->precision : (enum precision)i;
    for (int i = 0; i < N_WHATS; i++)
        s->what = strcmp(what, what_name[i]) ? s->what : (enum host_what)i;
    if (json_unpack(json_object_get(o, "shape"), "[I, I, I]", &rows, &n, &k) == 0)
        s->shape = (struct gemm_group){ rows, n, k };
    if (json_unpack(json_object_get(o, "key"), "[i, i, i, I, I, F, F]", &op, &s->key.heads, &s->key.kv_heads, &n, &k,
                    &s->key.rows, &s->key.context) == 0) {
        s->key.op = (enum latency_op)op;
        s->key.n = n;
        s->key.k = k;
    }
    s->groups = (int32_t)json_integer_value(json_object_get(o, "groups"));
    s->bytes = json_number_value(json_object_get(o, "bytes"));
    s->flops = json_number_value(json_object_get(o, "flops"));
    return s->what < N_WHATS && s->seconds > 0;
}

/* What is no sample, and machine host has not. */
static void read_gpu(struct cuda_calibration *g, const json_t *o)
{
    const char *name = json_string_value(json_object_get(o, "gpu"));
    const char *note = json_string_value(json_object_get(o, "note"));
    snprintf(g->name, sizeof g->name, "%s", name ? name : "");
    snprintf(g->note, sizeof g->note, "%s", note ? note : "");
    g->sms = (int32_t)json_integer_value(json_object_get(o, "sms"));
    g->memory = json_number_value(json_object_get(o, "memory"));
    g->mem_bandwidth = json_number_value(json_object_get(o, "mem_bandwidth"));
}

int calibration_read(struct calibration *c, const json_t *o, struct err *e)
{
    const json_t *list = json_object_get(o, "samples"), *each;
    const char *versions = json_string_value(json_object_get(o, "versions"));
    size_t i;
    memset(c, 0, sizeof *c);
    c->n_ranks = (int)json_integer_value(json_object_get(o, "ranks"));
    c->n_nodes = (int)json_integer_value(json_object_get(o, "nodes"));
    c->n_nodes = c->n_nodes > 1 ? c->n_nodes : 1;
    snprintf(c->versions, sizeof c->versions, "%s", versions ? versions : "");
    read_gpu(&c->gpu, o);
    c->sample = malloc(sizeof *c->sample * (json_array_size(list) + 1));
    if (!c->sample)
        return err_set(e, ERR_MEMORY, "out of memory for samples");
    json_array_foreach(list, i, each)
        if (read_sample(each, &c->sample[c->n]))
            c->n++;
        else
            return err_set(e, ERR_RUN, "calibrate: sample %zu is none", i);
    return 0;
}

void calibration_free(struct calibration *c)
{
    free(c->sample);
    memset(c, 0, sizeof *c);
}

/* ---- models ---- */

/* The kernel that attention's core is, as a layer's list has it. */
static struct kernel attention_kernel(const struct latency_key *key)
{
    const struct moe_model model = { .d_model = key->heads * (int32_t)key->n, .weight_bytes = 4 };
    const struct attention_shape shape = { .kind = ATTENTION_GQA, .n_heads = key->heads, .n_kv_heads = key->kv_heads,
                                           .d_head = (int32_t)key->n };
    const struct layer_part part = { .model = &model, .attention = &shape, .precision = PREC_FP32,
                                     .phase = key->op == LATENCY_DECODE ? MOE_DECODE : MOE_PREFILL,
                                     .tokens = key->rows, .context = key->context, .tp = 1 };
    struct kernels list = { .n = 0 };
    layer_attention(&list, &part);
    for (int32_t i = 0; i < list.n; i++)
        if (list.kernel[i].key.op == key->op)
            return list.kernel[i];
    return (struct kernel){ .precision = PREC_FP32 };
}

static double modelled(const struct calibration *c, const struct host_sample *s)
{
    const double in = compute_element_bytes(s->precision);
    switch (s->what) {
    case HOST_GEMM: {
        const struct kernel k = { .precision = s->precision, .groups = groups_of(s), .shape = s->shape,
                                  .bytes = { in, in, fmax(in, 2) } };
        return cost_kernel(&c->device, &k).seconds;
    }
    case HOST_MOVE:
    case GPU_KERNEL:
    case GPU_SQUARES: return cost_plain(&c->device, s->precision, s->flops, s->flops > 0 ? 0 : s->bytes).seconds;
    case HOST_SUM: {
        const struct latency_key key = { .op = LATENCY_COMBINE, .rows = s->bytes };
        return cost_known(&c->device, PREC_FP32, 0, s->bytes, &key).seconds;
    }
    case HOST_PACE: return c->probe_s;
    case HOST_ATTENTION: {
        const struct kernel k = attention_kernel(&s->key);
        return cost_kernel(&c->device, &k).seconds;
    }
    case HOST_EXCHANGE: return c->exchange_s + s->bytes * (c->n_ranks - 1) / c->link_bandwidth;
    case HOST_READ: return c->read_s + s->bytes / c->read_bandwidth;
    case GPU_WRITE: return c->write_s + s->bytes / c->write_bandwidth;
    case GPU_COPY: return c->copy_s + s->bytes / c->copy_bandwidth;
    case GPU_LAUNCH:
    case GPU_EVENTS:
    case GPU_QUEUE:
    case N_WHATS: break;
    }
    return NAN;
}

/* Squares of what is near, but not of what is far off: a library may have a way of its own for some sizes. */
static double misfit(const struct calibration *c, enum host_what what)
{
    const double near = 0.2;
    double sum = 0;
    for (int i = 0; i < c->n; i++)
        if (c->sample[i].what == what && (c->only == N_PRECISIONS || c->sample[i].precision == c->only)) {
            const double d = log(modelled(c, &c->sample[i]) / c->sample[i].seconds);
            sum += near * near * (sqrt(1 + d * d / (near * near)) - 1);
        }
    return sum;
}

/* ---- fitting ---- */

struct parameter { double *at, low, high; };

/* The least misfit along one parameter, by golden section of its logarithm around where it is. */
static void search(struct calibration *c, enum host_what what, const struct parameter *p, double reach)
{
    const double golden = 0.6180339887498949;
    double low = log(fmax(p->low, *p->at / reach)), high = log(fmin(p->high, *p->at * reach));
    double a = high - golden * (high - low), b = low + golden * (high - low), at_a, at_b;
    const double before = *p->at, was = misfit(c, what);
    *p->at = exp(a);
    at_a = misfit(c, what);
    *p->at = exp(b);
    at_b = misfit(c, what);
    while (high - low > 1e-3) {
        if (at_a < at_b) {
            high = b;
            b = a;
            at_b = at_a;
            *p->at = exp(a = high - golden * (high - low));
            at_a = misfit(c, what);
        } else {
            low = a;
            a = b;
            at_a = at_b;
            *p->at = exp(b = low + golden * (high - low));
            at_b = misfit(c, what);
        }
    }
    *p->at = exp((low + high) / 2);
    if (misfit(c, what) > was)
        *p->at = before;
}

static void fit(struct calibration *c, enum host_what what, const struct parameter *p, int n)
{
    for (int i = 0; i < n; i++)
        *p[i].at = fmin(fmax(*p[i].at, p[i].low), p[i].high);
    for (double reach = 8; reach > 1.02; reach = sqrt(reach))
        for (int pass = 0; pass < 6; pass++)
            for (int i = 0; i < n; i++)
                search(c, what, &p[i], reach);
}

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int judge(struct calibration *c, enum host_what what, struct err *e)
{
    struct fit_quality *q = &c->quality[what];
    double error[c->n + 1], spread[c->n + 1];
    int n = 0;
    for (int i = 0; i < c->n; i++)
        if (c->sample[i].what == what) {
            const struct host_sample *s = &c->sample[i];
            error[n] = fabs(modelled(c, s) / s->seconds - 1);
            spread[n++] = (s->high - s->low) / s->seconds;
        }
    if (n == 0)
        return err_set(e, ERR_RUN, "calibrate: nothing of kind \"%s\" was measured", what_name[what]);
    qsort(error, (size_t)n, sizeof *error, by_size);
    qsort(spread, (size_t)n, sizeof *spread, by_size);
    *q = (struct fit_quality){ n, error[n / 2], error[n - 1], spread[n / 2] };
    return 0;
}

/* Peaks are of products without end, with room for attention's rate. */
static void settle_peak(struct calibration *c, enum precision p)
{
    c->device.peak[p] *= 1.05 * c->device.gemm.mma_efficiency;
    c->device.gemm.mma_efficiency = 1 / 1.05;
}

/* Tiles of several heights and ways to join arithmetic and memory are tried; what fits best stays. */
static void fit_gemm(struct calibration *c)
{
    static const double tile[] = { 1, 2, 4, 8, 16, 32 }, join[] = { 1, 2 };
    struct device_spec *d = &c->device, best = *d;
    const double same = 1e-5 * c->n; /* about 0.5 % of each sample */
    double least = INFINITY;
    for (size_t i = 0; i < sizeof tile / sizeof *tile * (sizeof join / sizeof *join); i++) {
        d->gemm.tile_m = tile[i / 2];
        d->gemm.overlap = join[i % 2];
        d->gemm.mma_efficiency = 0.8;
        d->gemm.mem_efficiency = 0.5;
        d->gemm.vector_efficiency = 0.5;
        d->gemm.launch_s = 1e-7;
        d->gemm.rest = 1;
        fit(c, HOST_GEMM, (const struct parameter[]){ { &d->gemm.mma_efficiency, 0.05, 1 },
                                                      { &d->gemm.mem_efficiency, 0.01, 1 },
                                                      { &d->gemm.vector_efficiency, 0.01, 1 },
                                                      { &d->gemm.launch_s, 1e-9, 1e-3 },
                                                      { &d->gemm.rest, 0.1, 10 } }, 5);
        const double here = misfit(c, HOST_GEMM);
        if (here + same < least) { /* of two ways to say the same the first, whose tiles are lower */
            least = here;
            best = *d;
        }
    }
    *d = best;
    settle_peak(c, PREC_FP32);
}

/* Tiles are those that the model chooses, as DeepGEMM does. What an SM draws and stores, and how far memory hides, is
 * found in bf16; other precisions have a peak of their own with that. */
static void fit_gpu_gemm(struct calibration *c)
{
    struct device_spec *d = &c->device;
    d->gemm.mma_efficiency = 0.5;
    d->gemm.mem_efficiency = 0.8;
    d->gemm.port_bandwidth = d->gemm.store_bandwidth = d->peak[PREC_BF16] / d->gemm.sms / 50;
    d->gemm.launch_s = d->launch_s;
    d->gemm.overlap = 2;
    c->only = PREC_BF16;
    fit(c, HOST_GEMM, (const struct parameter[]){ { &d->gemm.mma_efficiency, 0.02, 1 },
                                                  { &d->gemm.mem_efficiency, 0.05, 1 },
                                                  { &d->gemm.launch_s, 1e-9, 1e-3 },
                                                  { &d->gemm.port_bandwidth, 1e6, 1e16 },
                                                  { &d->gemm.store_bandwidth, 1e6, 1e16 },
                                                  { &d->gemm.overlap, 1, 20 } }, 6);
    settle_peak(c, PREC_BF16);
    for (int p = 0; p < N_PRECISIONS; p++)
        if (p != PREC_BF16 && d->peak[p] > 0) {
            c->only = (enum precision)p;
            fit(c, HOST_GEMM, (const struct parameter[]){ { &d->peak[p], 1e6, 1e18 } }, 1);
        }
    c->only = N_PRECISIONS;
}

/* The fastest of a family in one precision, in what it counts per second. */
static double best_rate(const struct calibration *c, enum host_what what, enum precision p)
{
    double best = 0;
    for (int i = 0; i < c->n; i++) {
        const struct host_sample *s = &c->sample[i];
        const double amount = what == HOST_GEMM ? 2.0 * groups_of(s) * (double)s->shape.rows * (double)s->shape.n *
                                                  (double)s->shape.k
                                                : s->bytes;
        if (s->what == what && (p == N_PRECISIONS || s->precision == p))
            best = fmax(best, amount / s->seconds);
    }
    return best;
}

/* A fixed time, and bytes over a bandwidth. */
static void fit_line(struct calibration *c, enum host_what what, double *fixed, double *bandwidth)
{
    *fixed = 1e-5;
    *bandwidth = best_rate(c, what, N_PRECISIONS);
    fit(c, what, (const struct parameter[]){ { fixed, 1e-9, 1 }, { bandwidth, 1e6, 1e14 } }, 2);
}

int calibration_fit(struct calibration *c, struct err *e)
{
    struct device_spec *d = &c->device;
    *d = (struct device_spec){ .launch_s = 1e-7, .flops_efficiency = 0.5, .mem_efficiency = 0.5,
                                 .read_efficiency = 0.5, .decode_efficiency = 0.5 };
    c->only = N_PRECISIONS;
    c->probe_s = 1e-3;
    d->gemm.sms = 1;
    d->gemm.port_bandwidth = d->gemm.store_bandwidth = 1e16; /* caches are in mma_efficiency */
    /* More than is reached at best: parts of it are efficiencies, which may not exceed 1. */
    d->peak[PREC_FP32] = 2 * best_rate(c, HOST_GEMM, PREC_FP32);
    d->mem_bandwidth = 2 * best_rate(c, HOST_MOVE, N_PRECISIONS);
    fit(c, HOST_MOVE, (const struct parameter[]){ { &d->mem_efficiency, 0.01, 1 }, { &d->launch_s, 1e-9, 1e-3 } }, 2);
    d->combine_efficiency = d->mem_efficiency;
    fit(c, HOST_SUM, (const struct parameter[]){ { &d->combine_efficiency, 0.01, 1 } }, 1);
    fit(c, HOST_PACE, (const struct parameter[]){ { &c->probe_s, 1e-6, 1 } }, 1);
    fit_gemm(c);
    fit(c, HOST_ATTENTION, (const struct parameter[]){ { &d->flops_efficiency, 0.01, 1 },
                                                       { &d->decode_efficiency, 0.01, 1 },
                                                       { &d->read_efficiency, 0.01, 1 } }, 3);
    if (c->n_ranks > 1)
        fit_line(c, HOST_EXCHANGE, &c->exchange_s, &c->link_bandwidth);
    fit_line(c, HOST_READ, &c->read_s, &c->read_bandwidth);
    for (int what = 0; what < N_HOST_WHATS; what++)
        if (judge(c, (enum host_what)what, e) < 0)
            return e->code;
    return 0;
}

int calibration_fit_gpu(struct calibration *c, struct err *e)
{
    static const enum host_what modelled_by[] = { HOST_GEMM, HOST_MOVE, GPU_SQUARES, GPU_KERNEL, GPU_COPY, HOST_READ,
                                                  GPU_WRITE, HOST_EXCHANGE };
    struct device_spec *d = &c->device;
    *d = (struct device_spec){ .launch_s = 2e-6, .flops_efficiency = 0.5, .mem_efficiency = 0.8 };
    c->only = N_PRECISIONS;
    d->gemm.sms = fmax(1, round((double)c->gpu.sms / c->n_ranks));
    snprintf(d->name, sizeof d->name, "%s", c->gpu.name);
    d->memory = c->gpu.memory / c->n_ranks;
    for (int p = 0; p < N_PRECISIONS; p++)
        d->peak[p] = 2 * best_rate(c, HOST_GEMM, (enum precision)p);
    d->mem_bandwidth = fmax(c->gpu.mem_bandwidth / c->n_ranks, 1.05 * best_rate(c, HOST_MOVE, N_PRECISIONS));
    fit(c, HOST_MOVE, (const struct parameter[]){ { &d->mem_efficiency, 0.01, 1 }, { &d->launch_s, 1e-9, 1e-3 } }, 2);
    fit_gpu_gemm(c);
    fit(c, GPU_SQUARES, (const struct parameter[]){ { &d->flops_efficiency, 0.01, 1 } }, 1);
    fit_line(c, GPU_COPY, &c->copy_s, &c->copy_bandwidth);
    fit_line(c, HOST_READ, &c->read_s, &c->read_bandwidth);
    fit_line(c, GPU_WRITE, &c->write_s, &c->write_bandwidth);
    if (c->n_ranks > 1)
        fit_line(c, HOST_EXCHANGE, &c->exchange_s, &c->link_bandwidth);
    for (size_t i = 0; i < sizeof modelled_by / sizeof *modelled_by; i++)
        if (modelled_by[i] != (c->n_ranks > 1 ? GPU_KERNEL : HOST_EXCHANGE) && judge(c, modelled_by[i], e) < 0)
            return e->code;
    return 0;
}
