/* SPDX-License-Identifier: Apache-2.0
 * core_test.h - what tests of the core share: policies written in the test, graphs in round figures, whole runs. */
#ifndef CORE_TEST_H
#define CORE_TEST_H

#include "config.h"

#include "machine_test.h"
#include "trace_fixture.h"

#include "registry.h"
#include "run.h"

#define US 1e-6

/* The call went well; the message if it did not. */
#define test_ok(call, e) test_no_error((call) < 0 || (e)->code != 0, (e)->text, __FILE__, __LINE__)
static inline void test_no_error(bool failed, const char *text, const char *file, int line)
{
    if (failed)
        fail_msg("%s:%d: %s", file, line, text);
}

/* ---- policies of the test's own, which need no file ---- */

#define TEST_POLICY(kind_, name_, ...)                                                                                \
    { .abi = MOE_ABI, .size = sizeof(struct moe_plugin), .kind = kind_, .name = name_, .summary = "of a test",        \
      .source = "this test", __VA_ARGS__ }

struct test_env { const struct moe_env *env; }; /* state of policies that call services */

static inline int test_keep_env(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    ((struct test_env *)self)->env = env;
    return 0;
}

/* Sizes that make bytes easy to count: a row is 1000 B on the wire, an expert 3e6 B. */
static const struct moe_model test_model = {
    .n_layers = 2, .n_experts = 4, .top_k = 2, .d_model = 1000, .d_expert = 1000,
    .weight_bytes = 1, .act_bytes = 1, .combine_bytes = 1,
};

/* ---- the model by hand: what test_spec()'s sizes take on a device of hw/machines ----
 *
 * d_model and d_expert 1000, 8 heads of 100 and as many KV heads, fp8, one byte per weight and activation, no context:
 * a row is 1000 B on the wire, an expert 3e6 B. */

struct card { double flops, bandwidth, sms, mma, port, store, gemm_bandwidth, half; /* 16-bit rate / FP8's */ };
static const struct card h100 = { 1978.9e12 * 0.60, 3.35e12 * 0.86, 132, 1978.9e12 / 132 * 0.86, 106e9, 16.5e9,
                                  3.35e12 * 0.88, 989.4 / 1978.9 };

static inline double by_hand(const struct card *c, double flops, double bytes)
{
    return fmax(flops / c->flops, bytes / c->bandwidth) + 2.5 * US;
}

/* One grouped GEMM: n experts of r rows each, k wide in and width wide out; in, out: bytes of an element of what is
 * multiplied and of results; mma: arithmetic of one SM. */
static inline double gemm_of(const struct card *c, double n, double r, double width, double k, double in, double out,
                             double mma)
{
    const double m = r <= 64 ? 64 : 128;
    double waves = INFINITY, last = 0, tile = 0;
    for (double t = 16; t <= 128; t += 8) {
        double tiles = n * ceil(r / m) * ceil(width / t), w = ceil(tiles / c->sms), rest = tiles - (w - 1) * c->sms;
        if (w > waves || (w == waves && rest <= last))
            continue;
        waves = w;
        last = rest;
        double cores = 2 * m * t * k / mma, fetch = (m + t) * in * k / c->port;
        tile = pow(pow(cores, 4) + pow(fetch, 4), 0.25) + m * t * out / c->store;
    }
    double memory = n * (r * k * in + width * k * in + out * r * width) / c->gemm_bandwidth;
    return 1.2 * US + pow(pow(waves * tile, 2.4) + pow(memory, 2.4), 1 / 2.4);
}

static inline double gemm(const struct card *c, double n, double r, double width, double k)
{
    return gemm_of(c, n, r, width, k, 1, 2, c->mma);
}

/* The sum and what is added read, the sum and its norm written, 2 bytes each. */
static inline double norm(const struct card *c, double rows)
{
    return by_hand(c, 0, 4 * rows * 1000 * 2);
}

/* The core in 16 bits, on half the arithmetic: 8 heads; queries and outputs of 100 values each beside the cache. */
static inline double attention_of(const struct card *c, double rows, double context)
{
    const double core = fmax(rows * context * 4 * 800 / (c->flops * c->half),
                             rows * (context * 1600 + 1600) * 2 / c->bandwidth) + 2.5 * US;
    return norm(c, rows) + gemm(c, 1, rows, 2400, 1000) + by_hand(c, 0, 2 * rows * 2400 * 2) + core +
           gemm(c, 1, rows, 1000, 800);
}

static inline double attention(const struct card *c, double rows)
{
    return attention_of(c, rows, 0);
}

/* 2-byte weights, 4-byte scores, read once more by top-k. */
static inline double gate(const struct card *c, double rows, double n_experts)
{
    return norm(c, rows) + gemm_of(c, 1, rows, n_experts, 1000, 2, 4, c->mma * c->half) +
           by_hand(c, 0, rows * n_experts * 4);
}

static inline double permute(const struct card *c, double rows)
{
    return by_hand(c, 0, 2 * rows * 1000);
}

/* n experts of r rows each: gate and up, what comes between (4000 + 1000 bytes a row), down. */
static inline double experts(const struct card *c, double n, double r)
{
    return gemm(c, n, r, 2000, 1000) + by_hand(c, 0, n * r * 5000) + gemm(c, n, r, 1000, 1000);
}

static inline double combine(const struct card *c, double rows, double tokens)
{
    return by_hand(c, 2 * rows * 1000, (rows + tokens) * 1000);
}

/* ---- graphs ---- */

/* Device memory traffic that keeps an H100 of hw/machines busy for `s` seconds, its launch of 2.5 us included. */
static inline double test_h100_bytes(double s)
{
    return (s - 2.5 * US) * 3.35e12 * 0.86;
}

static inline int32_t test_compute(struct moe_graph *g, int32_t device, int32_t stream, double seconds)
{
    struct err e = { 0 };
    int32_t id = graph_compute(g, &(struct moe_work){ .device = device, .stream = stream, .op = MOE_OP_OTHER,
                                                       .bytes = test_h100_bytes(seconds) }, &e);
    test_ok(id, &e);
    return id;
}

static inline int32_t test_parts(struct moe_graph *g, int n, const struct moe_part *part)
{
    struct err e = { 0 };
    int32_t id = graph_exchange(g, &(struct moe_exchange){ MOE_PAY_HIDDEN, n, part }, &e);
    test_ok(id, &e);
    return id;
}

static inline int32_t test_arrival(struct moe_graph *g, int32_t exchange, int32_t device)
{
    struct err e = { 0 };
    int32_t id = graph_arrival(g, exchange, device, &e);
    test_ok(id, &e);
    return id;
}

static inline void test_after(struct moe_graph *g, int32_t task, int32_t before)
{
    struct err e = { 0 };
    test_ok(graph_after(g, task, before, &e), &e);
}

/* Runs a graph on a machine that has just been opened; the time it took. */
static inline double test_run_graph(const struct topology *t, enum net_tier tier, struct moe_graph *g)
{
    struct err e = { 0 };
    struct machine m;
    test_ok(machine_open_sim(&m, t, &test_model, PREC_BF16, tier, &e), &e);
    test_ok(machine_run(&m, g, &e), &e);
    double now = m.now;
    machine_close(&m);
    return now;
}

/* ---- traces and runs ---- */

/* A trace whose experts are given: [requests * per_request][layers][k]. Written to DIR/name, which is returned. */
static inline const char *test_trace(struct scratch *s, const char *name, int n_requests, int per_request, int layers,
                                     int experts, int k, const uint8_t *expert)
{
    struct err e = { 0 };
    struct trace_out out;
    const int64_t n = (int64_t)n_requests * per_request;
    int64_t offset[n_requests + 1];
    for (int r = 0; r <= n_requests; r++)
        offset[r] = (int64_t)r * per_request;
    test_ok(trace_out_begin(&out, scratch_path(s, name), &e), &e);
    test_ok(npy_write(trace_out_path(&out, "experts.npy"), "u1", 3, (int64_t[]){ n, layers, k }, expert, &e), &e);
    test_ok(npy_write(trace_out_path(&out, "offsets.npy"), "i8", 1, (int64_t[]){ n_requests + 1 }, offset, &e), &e);
    json_t *meta = trace_meta(layers, experts, k, n_requests, n);
    test_ok(trace_out_commit(&out, meta, &e), &e);
    json_decref(meta);
    return scratch_path(s, name);
}

/* A run's specification: the policies of the quickstart on `machine`; the caller changes what it wants and drops it. */
static inline json_t *test_spec(json_t *machine, const char *trace, int layers, int experts, int k, int batch,
                                int steps)
{
    json_t *spec = json_pack(
        "{s:s, s:i, s:{s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:i, s:i}, s:{s:s, s:s, s:o},"
        " s:{s:s, s:s, s:i, s:i, s:i, s:i}, s:{s:[{s:s}], s:[{s:s}], s:[{s:s}], s:[{s:s}]}}",
        "where", "test:1", "seed", 1, "model", "layers", layers, "experts", experts, "top_k", k, "d_model", 1000,
        "d_expert", 1000, "n_heads", 8, "d_head", 100, "precision", "fp8", "act_bytes", 1, "combine_bytes", 1,
        "machine", "executor", "flow", "tier", "exact", "description", machine, "workload", "kind", "decode", "trace",
        trace, "batch_per_device", batch, "steps", steps, "profile", 0, "context", 0, "policies", "router", "name",
        "replay", "placement", "name", "contiguous", "dispatch", "name", "flat", "offload", "name", "none");
    assert_non_null(spec);
    return spec;
}

static inline void test_set(json_t *spec, const char *table, const char *key, json_t *value)
{
    json_object_set_new(table ? json_object_get(spec, table) : spec, key, value);
}

static inline void test_policy(json_t *spec, const char *kind, const char *name)
{
    test_set(spec, "policies", kind, json_pack("[{s:s}]", "name", name));
}

static inline struct run *test_open_run(json_t *spec, struct err *e)
{
    struct run *r = malloc(sizeof *r);
    assert_non_null(r);
    test_ok(run_open(r, spec, e), e);
    return r;
}

/* The run's policy of a kind gives way to one of the test's own. */
static inline void test_swap_policy(struct run *r, struct policy *p, const struct moe_plugin *plugin)
{
    struct policy_context *context = p->context;
    policy_close(p);
    test_ok(policy_open(p, context, plugin, NULL, "test", r->err), r->err);
}

static inline void test_close_run(struct run *r)
{
    run_close(r);
    free(r);
}

/* The hash of all decisions of a run; mean_hits (or NULL): its mean hit rate. */
static inline uint64_t test_decisions(json_t *spec, double *mean_hits)
{
    struct err e = { 0 };
    struct run *r = test_open_run(spec, &e);
    test_ok(run_go(r), &e);
    uint64_t h = r->decisions;
    json_t *result = run_result(r), *hits = json_object_get(json_object_get(result, "metrics"), "hit_rate");
    if (mean_hits)
        *mean_hits = json_number_value(json_object_get(hits, "mean"));
    json_decref(result);
    test_close_run(r);
    return h;
}

static inline double test_metric(const struct run *r, enum metric m, int step)
{
    assert_in_range(step, 0, r->metrics.n_steps - 1);
    return r->metrics.value[m][step];
}

#endif
