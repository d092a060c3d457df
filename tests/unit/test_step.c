/* SPDX-License-Identifier: Apache-2.0
 * test_step.c - a whole step by hand, beyond MoE layers: dense layers and head, latent attention, devices that split
 * attention, precisions on the wire; training with its way back, reduction and optimiser; and what all that holds in
 * memory. Sizes are core_test.h's. */
#include "core_test.h"

static const uint8_t all_zero[16] = { 0 };

static double nic(double bytes) /* star-50GBps */
{
    return bytes / 50e9 + 0.5 * US;
}

/* n devices, a token each, all for expert 0, which is on device 0. */
static json_t *spec_of(struct scratch *s, int n, int layers)
{
    return test_spec(test_description("star-50GBps", n), test_trace(s, "zero", 2, 4, layers, 2, 1, all_zero), layers, 2,
                     1, 1, 1);
}

static struct run *run_of(json_t *spec)
{
    struct err e = { 0 };
    struct run *r = test_open_run(spec, &e);
    test_ok(run_go(r), &e);
    json_decref(spec);
    return r;
}

static double ffn(const struct card *c, double rows, double width)
{
    return gemm(c, 1, rows, 2 * width, 1000) + by_hand(c, 0, rows * width * 5) + gemm(c, 1, rows, 1000, width);
}

static double moe_layer(const struct card *c) /* of two devices */
{
    return permute(c, 1) + nic(1000) + experts(c, 1, 2) + nic(1000) + combine(c, 1, 1);
}

/* ---- forward ---- */

/* 1000 FP8 values have 8 scales of 4 bytes. */
static void scales_travel(void **state)
{
    json_t *spec = spec_of(*state, 2, 1), *model = json_object_get(spec, "model");
    json_object_del(model, "act_bytes");
    json_object_del(model, "combine_bytes");
    test_set(spec, "model", "dispatch", json_string("fp8"));
    test_set(spec, "model", "combine", json_string("bf16"));
    struct run *r = run_of(spec);
    assert_near(test_metric(r, METRIC_inter_node_bytes, 0), 1000 + 8 * 4 + 2000, 1e-12);
    test_close_run(r);
}

static void dense_layers_and_head(void **state)
{
    json_t *spec = spec_of(*state, 2, 2);
    test_set(spec, "model", "vocab", json_integer(5000));
    test_set(spec, "model", "dense", json_pack("{s:i, s:i, s:i}", "layers", 1, "interleave", 2, "d_ff", 700));
    struct run *r = run_of(spec);
    const double dense = norm(&h100, 1) + ffn(&h100, 1, 700);
    const double ends = by_hand(&h100, 0, 2 * 1000 * 2) + norm(&h100, 1) +
                        gemm_of(&h100, 1, 1, 5000, 1000, 2, 2, h100.mma * h100.half);
    assert_near(test_metric(r, METRIC_attention_s, 0), (2 + 3) * attention(&h100, 1), 1e-9);
    assert_near(test_metric(r, METRIC_other_s, 0), 3 * dense + ends, 1e-9);
    assert_near(test_metric(r, METRIC_step_s, 0),
                5 * attention(&h100, 1) + 3 * dense + ends + 2 * (gate(&h100, 1, 2) + moe_layer(&h100)), 1e-9);
    test_close_run(r);
}

/* The two share both tokens and have half of the heads each; every row goes over once on either way. */
static void split_attention(void **state)
{
    json_t *spec = spec_of(*state, 2, 1);
    test_set(spec, NULL, "layout", json_pack("{s:{s:i}}", "attention", "tp", 2));
    struct run *r = run_of(spec);
    const double half = norm(&h100, 2) + gemm(&h100, 1, 2, 1200, 1000) + by_hand(&h100, 0, 2 * 2 * 1200 * 2) +
                        by_hand(&h100, 0, 2 * 800 * 2) + gemm(&h100, 1, 2, 1000, 400);
    const double sums = by_hand(&h100, 0, 3 * 1000 * 2);
    assert_near(test_metric(r, METRIC_attention_s, 0), half + sums, 1e-9);
    assert_near(test_metric(r, METRIC_collective_s, 0), 2 * nic(2000), 1e-9);
    assert_near(test_metric(r, METRIC_a2a_s, 0), 2 * nic(1000), 1e-9); /* tokens' way alone */
    assert_near(test_metric(r, METRIC_step_s, 0),
                2 * nic(2000) + half + sums + gate(&h100, 1, 2) + moe_layer(&h100), 1e-9);
    test_close_run(r);
}

/* One token of each device reads 100 latents of 160 + 32 values for 4 heads of 64 + 32, 48. */
static void latent_attention(void **state)
{
    json_t *spec = spec_of(*state, 2, 1), *model = json_object_get(spec, "model");
    json_object_del(model, "n_heads");
    json_object_del(model, "d_head");
    test_set(spec, "model", "attention", json_pack("{s:s, s:i, s:i, s:i, s:i, s:i}", "kind", "mla", "n_heads", 4,
                                                   "kv_lora", 160, "nope", 64, "rope", 32, "v", 48));
    test_set(spec, "workload", "context", json_integer(100));
    struct run *r = run_of(spec);
    const double half = h100.mma * h100.half;
    const double core = fmax(2 * 100 * 4 * (192 + 160.0) / (h100.flops * h100.half),
                             (100 * 192 + 4 * (192 + 160)) * 2 / h100.bandwidth) + 2.5 * US;
    assert_near(test_metric(r, METRIC_attention_s, 0),
                norm(&h100, 1) + gemm(&h100, 1, 1, 4 * 96 + 192, 1000) + by_hand(&h100, 0, 2 * (4 * 32 + 192) * 2) +
                    gemm_of(&h100, 4, 1, 160, 64, 2, 2, half) + core + gemm_of(&h100, 4, 1, 48, 160, 2, 2, half) +
                    gemm(&h100, 1, 1, 1000, 4 * 48), 1e-9);
    test_close_run(r);
}

/* ---- training ---- */

static json_t *training(struct scratch *s)
{
    json_t *spec = spec_of(s, 2, 1);
    test_set(spec, "workload", "kind", json_string("train"));
    test_set(spec, "workload", "tokens_per_device", json_integer(1));
    return spec;
}

/* The gradient of a product's weights: rows x k of them, from `tokens` rows. */
static double weights_of(double rows, double k, double tokens)
{
    return gemm_of(&h100, 1, rows, k, tokens, 1, 4, h100.mma);
}

static double backward(void)
{
    const struct card *c = &h100;
    const double attention = weights_of(1000, 800, 1) + gemm(c, 1, 1, 800, 1000) + by_hand(c, 0, 1.5 * 6400) +
                             by_hand(c, 0, 1.5 * 2 * 2400 * 2) + weights_of(2400, 1000, 1) + gemm(c, 1, 1, 1000, 2400) +
                             by_hand(c, 0, 1.5 * 8000);
    const double gate = by_hand(c, 0, 1.5 * 2 * 4) + gemm_of(c, 1, 1, 1000, 2, 2, 4, c->mma * c->half) +
                        gemm_of(c, 1, 2, 1000, 1, 2, 4, c->mma * c->half) + by_hand(c, 0, 1.5 * 8000);
    const double both = gemm(c, 1, 2, 1000, 1000) + weights_of(1000, 1000, 2) + by_hand(c, 0, 2 * 1000 * 9) +
                        gemm(c, 1, 2, 1000, 2000) + weights_of(2000, 1000, 2);
    return moe_layer(c) - experts(c, 1, 2) + both + gate + attention;
}

/* Attention and gate, which both devices hold. */
static const double copied = 2400 * 1000 + 1000 * 800 + 1000 * 2;

static void training_step(void **state)
{
    /* The core reads the token's own key and value, too. */
    const double forward = attention(&h100, 1) + 3200 / h100.bandwidth + gate(&h100, 1, 2) + moe_layer(&h100);
    for (int i = 0; i < 4; i++) {
        const bool recompute = i & 1, shard = i & 2;
        json_t *spec = training(*state);
        test_set(spec, "workload", "recompute", json_boolean(recompute));
        test_set(spec, "workload", "shard_optimizer", json_boolean(shard));
        struct run *r = run_of(spec);
        /* A ring of two: half of the gradients each way; or half of the gradients, later half of the weights. 29 bytes:
         * 4 of the gradient, 2 x 12 of state, 1 of the weight. */
        const double half = copied / 2, update = by_hand(&h100, 0, (shard ? half + 3e6 : copied + 3e6) * 29);
        const double sent = nic(4 * half) + nic((shard ? 1 : 4) * half);
        assert_near(test_metric(r, METRIC_collective_s, 0), sent, 1e-9);
        assert_near(test_metric(r, METRIC_other_s, 0), update, 1e-9);
        assert_near(test_metric(r, METRIC_step_s, 0), (recompute ? 2 : 1) * forward + backward() + sent + update, 1e-9);
        test_close_run(r);
    }
}

/* Both experts on both devices. */
static int place_everywhere(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct moe_env *env = ((struct test_env *)self)->env;
    (void)stats;
    for (int32_t i = 0; i < 4; i++)
        if (env->host->place(env, out, 0, i / 2, i % 2, 1) < 0)
            return MOE_EFAIL;
    return 0;
}

static const struct moe_plugin everywhere =
    TEST_POLICY(MOE_PLACEMENT, "everywhere", .state_size = sizeof(struct test_env), .init = test_keep_env,
                .ops.placement = { .place = place_everywhere });

/* Two experts of 3e6 weights: halves of their gradients, twice, each way; with the optimiser's state in shares once,
 * and halves of their weights at the end, after attention's. */
static void replicas_are_reduced(void **state)
{
    struct err e = { 0 };
    for (int share = 0; share < 2; share++) {
        json_t *spec = training(*state);
        test_set(spec, "workload", "shard_optimizer", json_boolean(share));
        struct run *r = test_open_run(spec, &e);
        test_swap_policy(r, &r->placement, &everywhere);
        test_ok(run_go(r), &e);
        const double by_hand_s = share ? nic(4 * copied / 2) + nic(4 * 3e6) + nic(copied / 2) + nic(3e6)
                                       : 2 * nic(4 * copied / 2) + nic(2 * 4 * 3e6);
        assert_near(test_metric(r, METRIC_collective_s, 0), by_hand_s, 1e-9);
        assert_near(test_metric(r, METRIC_other_s, 0),
                    by_hand(&h100, 0, (share ? copied / 2 + 3e6 : copied + 6e6) * 29), 1e-9);
        test_close_run(r);
        json_decref(spec);
    }
}

/* Two nodes of four: scattered inside, around rings of two for each quarter, and back. */
static void reduction_knows_nodes(void **state)
{
    json_t *machine = test_description("dgx-h100", 2);
    json_object_set_new(machine, "devices", json_integer(4));
    json_t *spec = test_spec(machine, test_trace(*state, "zero", 2, 4, 1, 8, 1, all_zero), 1, 8, 1, 1, 1);
    test_set(spec, "workload", "kind", json_string("train"));
    test_set(spec, "workload", "tokens_per_device", json_integer(1));
    struct run *r = run_of(spec);
    const double bytes = 4 * (copied + 6000); /* a gate of 8 */
    double inside = 0, across = 0;
    int n = 0;
    for (int32_t t = 0; t < r->graph.n_tasks; t++) {
        const struct task *x = &r->graph.task[t];
        n += x->collective;
        for (int32_t i = x->first; x->collective && i < x->first + x->n; i++)
            *(r->graph.part[i].src / 4 == r->graph.part[i].dst / 4 ? &inside : &across) += r->graph.part[i].bytes;
    }
    assert_int_equal(n, 4);
    assert_near(inside, 2 * 8 * 3 * bytes / 4, 1e-12); /* each device sends a quarter to each of three, twice */
    assert_near(across, 2 * 8 * bytes / 4 / 2, 1e-12); /* half of its quarter to the other node, twice */
    test_close_run(r);
}

/* ---- memory ---- */

static double memory_of(const struct run *r, const char *what)
{
    json_t *result = run_result(r);
    double bytes = json_number_value(json_object_get(json_object_get(result, "memory"), what));
    json_decref(result);
    return bytes;
}

static void memory_by_kind(void **state)
{
    json_t *spec = training(*state);
    test_set(spec, "model", "vocab", json_integer(500));
    test_set(spec, "workload", "tokens_per_device", json_integer(7));
    struct run *r = run_of(spec);
    const double vocabulary = 2 * 500 * 1000, all = copied + vocabulary + 3e6;
    assert_near(memory_of(r, "weights"), copied + 2 * vocabulary, 1e-12);
    assert_near(memory_of(r, "experts"), 3e6, 1e-12);
    assert_near(memory_of(r, "gradients"), 4 * all, 1e-12);
    assert_near(memory_of(r, "optimizer"), 12 * all, 1e-12);
    assert_near(memory_of(r, "kv_cache"), 0, 0);
    /* Per token: norm's input and output, q, k, v and the core's output, the second norm's (2 bytes each); 2 scores;
     * one row in 1 byte, gate, up and product in 2; scores of the vocabulary. */
    assert_near(memory_of(r, "activations"), 7 * ((2000 + 3200 + 2000) * 2 + 8 + 1000 + 3000 * 2 + 500 * 4), 1e-12);
    assert_near(memory_of(r, "dispatch_buffers"), 2 * 7 * 2000, 1e-12);
    assert_near(memory_of(r, "capacity"), 80e9, 1e-12);
    test_close_run(r);
}

/* ---- refusals ---- */

static void refused(json_t *spec, const char *a, const char *b)
{
    struct err e = { 0 };
    struct run *r = malloc(sizeof *r);
    int code = run_open(r, spec, &e);
    if (code == 0)
        code = run_go(r);
    assert_says(&e, code, "test:1", a, b, NULL);
    assert_int_equal(e.code, ERR_INPUT);
    test_close_run(r);
    json_decref(spec);
}

static void bad_tables(void **state)
{
    const struct { const char *table, *key, *json, *a, *b; } row[] = {
        { "model", "dispatch", "\"fp8\"", "model.act_bytes", "beside model.dispatch" },
        { "model", "precision", "1", "model.precision", "precision's name" },
        { "model", "attention", "{\"kind\": \"mqa\"}", "model.attention.kind", "\"gqa\" or \"mla\", found \"mqa\"" },
        { "model", "attention", "{\"kind\": \"gqa\"}", "model.n_heads", "beside model.attention" },
        { "model", "attention", "{\"kind\": \"gqa\", \"d_heat\": 1}", "unknown key \"d_heat\"", "\"d_head\"" },
        { "model", "dense", "{\"d_ff\": 10}", "model.dense", "neither layers nor interleave" },
        { "model", "dense", "3", "model.dense", "expected a table" },
        { NULL, "layout", "{\"attention\": {\"tp\": 3}}", "layout.attention", "1 x 3 = 3" },
        { NULL, "layout", "{\"attention\": {\"dp\": 2, \"tp\": 2}}", "2 x 2 = 4", "2 devices" },
        { NULL, "layout", "{\"atention\": {}}", "layout: unknown key", "\"attention\"" },
        { "workload", "recompute", "1", "workload.recompute", "true or false" },
        { "workload", "optimizer_bytes", "-1", "workload.optimizer_bytes", "bytes of one weight" },
        { "workload", "tokens_per_device", "400000", "activations", "tokens per device fit" },
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        json_t *spec = spec_of(*state, 2, 1);
        if (row[i].table && !strcmp(row[i].table, "workload"))
            test_set(spec, "workload", "kind", json_string(i + 1 < sizeof row / sizeof *row ? "train" : "prefill"));
        test_set(spec, row[i].table, row[i].key, json_loads(row[i].json, JSON_DECODE_ANY, NULL));
        refused(spec, row[i].a, row[i].b);
    }
    json_t *spec = test_spec(test_description("rtx4090-pcie4", 1), test_trace(*state, "zero", 2, 4, 1, 2, 1, all_zero),
                             1, 2, 1, 1, 1);
    test_set(spec, "workload", "kind", json_string("train"));
    test_policy(spec, "offload", "lru");
    test_set(spec, NULL, "cache", json_real(0.5));
    refused(spec, "workload.kind: train", "expected offload none");
}

#define WITH_SCRATCH(test) cmocka_unit_test_setup_teardown(test, scratch_make, scratch_remove)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SCRATCH(scales_travel),        WITH_SCRATCH(dense_layers_and_head), WITH_SCRATCH(split_attention),
        WITH_SCRATCH(latent_attention),     WITH_SCRATCH(training_step),         WITH_SCRATCH(replicas_are_reduced),
        WITH_SCRATCH(reduction_knows_nodes), WITH_SCRATCH(memory_by_kind),       WITH_SCRATCH(bad_tables),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
