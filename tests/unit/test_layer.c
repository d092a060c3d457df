/* SPDX-License-Identifier: Apache-2.0
 * test_layer.c - shapes, arithmetic and traffic of what a layer launches, worked out by hand; and that GEMMs of
 * DeepSeek-V3's attention are those whose rates DeepGEMM publishes. */
#include "machine_test.h"

#include "layer.h"

static const struct moe_model v3 = { .n_layers = 58, .n_experts = 256, .top_k = 8, .d_model = 7168, .d_expert = 2048,
                                     .weight_bytes = 1, .act_bytes = 1, .combine_bytes = 2 };
static const struct attention_shape v3_mla = { .kind = ATTENTION_MLA, .n_heads = 128, .q_lora = 1536, .kv_lora = 512,
                                               .nope = 128, .rope = 64, .v = 128 };
static const struct moe_model small = { .n_layers = 1, .n_experts = 16, .top_k = 2, .d_model = 1000, .d_expert = 500,
                                        .weight_bytes = 2, .act_bytes = 2, .combine_bytes = 2 };
static const struct attention_shape grouped = { .kind = ATTENTION_GQA, .n_heads = 8, .n_kv_heads = 2, .d_head = 100 };

static struct layer_part part(const struct moe_model *m, const struct attention_shape *a, enum precision p,
                              enum moe_phase phase, double tokens, double context, int32_t tp)
{
    return (struct layer_part){ m, a, p, phase, tokens, context, tp };
}

static void is_gemm(const struct kernel *k, enum precision p, int groups, int64_t rows, int64_t n, int64_t depth)
{
    assert_int_equal(k->precision, p);
    assert_int_equal(k->groups, groups);
    assert_int_equal(k->shape.rows, rows);
    assert_int_equal(k->shape.n, n);
    assert_int_equal(k->shape.k, depth);
}

static void is_plain(const struct kernel *k, enum precision p, double flops, double traffic)
{
    assert_int_equal(k->precision, p);
    assert_int_equal(k->groups, 0);
    assert_near(k->flops, flops, 1e-12);
    assert_near(k->traffic, traffic, 1e-12);
}

/* 8 heads on 2 of keys and values, 100 wide: q 800, k and v 200 each. */
static void grouped_queries(void **state)
{
    (void)state;
    struct layer_part p = part(&small, &grouped, PREC_BF16, MOE_PREFILL, 64, 64, 1);
    struct kernels k = { .n = 0 };
    layer_attention(&k, &p);
    assert_int_equal(k.n, 5);
    is_plain(&k.kernel[0], PREC_BF16, 0, 4 * 64 * 1000 * 2);
    is_gemm(&k.kernel[1], PREC_BF16, 1, 64, 1200, 1000);
    is_plain(&k.kernel[2], PREC_BF16, 0, 2 * 64 * 1200 * 2);
    /* One causal prompt: half of 64 x 64 scores per head, and as much for values; all four arrays once. */
    is_plain(&k.kernel[3], PREC_BF16, 4 * (64 * 64 / 2) * 800, 64 * (800 + 400 + 800) * 2);
    is_gemm(&k.kernel[4], PREC_BF16, 1, 64, 1000, 800);
    /* Decoding with 500 tokens of context: every token reads its own keys and values of 2 heads, for all 8. */
    p.phase = MOE_DECODE;
    p.context = 500;
    k.n = 0;
    layer_attention(&k, &p);
    is_plain(&k.kernel[3], PREC_BF16, 4.0 * 64 * 500 * 800, 64 * (500.0 * 400 + 1600) * 2);
    /* Four devices: two heads of queries each; of keys and values one, which two devices share. */
    p.tp = 4;
    k.n = 0;
    layer_attention(&k, &p);
    is_gemm(&k.kernel[1], PREC_BF16, 1, 64, 200 + 200, 1000);
    is_plain(&k.kernel[3], PREC_BF16, 4.0 * 64 * 500 * 200, 64 * (500.0 * 200 + 400) * 2);
    is_gemm(&k.kernel[4], PREC_BF16, 1, 64, 1000, 200);
    assert_near(layer_cache(&grouped, 1), 400, 0);
    assert_near(layer_cache(&grouped, 4), 200, 0);
    assert_near(layer_attention_weights(&small, &grouped, 1), 1000 * 1200 + 800 * 1000, 0);
    p.tokens = 0;
    k.n = 0;
    layer_attention(&k, &p);
    assert_int_equal(k.n, 0);
}

/* DeepSeek-V3, report section 4.2: 187,105,280 weights of attention in a layer (norms' apart), 576 cached values. */
static void latent_decode(void **state)
{
    (void)state;
    struct layer_part p = part(&v3, &v3_mla, PREC_FP8, MOE_DECODE, 128, 4096, 1);
    struct kernels k = { .n = 0 };
    layer_attention(&k, &p);
    assert_int_equal(k.n, 8);
    is_gemm(&k.kernel[1], PREC_FP8, 1, 128, 1536 + 512 + 64, 7168);
    is_gemm(&k.kernel[2], PREC_FP8, 1, 128, 128 * 192, 1536);
    is_plain(&k.kernel[3], PREC_FP8, 0, 2 * 128 * (1536 + 128 * 64 + 576) * 2);
    is_gemm(&k.kernel[4], PREC_BF16, 128, 128, 512, 128);
    /* The latent cache is read once for 128 heads: 576 wide scores, 512 wide sums. */
    is_plain(&k.kernel[5], PREC_BF16, 2.0 * 128 * 4096 * 128 * (576 + 512),
             (128.0 * 4096 * 576 + 128.0 * 128 * (576 + 512)) * 2);
    is_gemm(&k.kernel[6], PREC_BF16, 128, 128, 128, 512);
    is_gemm(&k.kernel[7], PREC_FP8, 1, 128, 7168, 128 * 128);
    assert_near(layer_cache(&v3_mla, 1), 576, 0);
    assert_near(layer_cache(&v3_mla, 8), 576, 0);
    assert_near(layer_attention_weights(&v3, &v3_mla, 1), 187105280, 0);
}

/* Expanded: keys 192 and values 128 wide for each head. The four GEMMs are DeepGEMM's dense shapes of m = 4096. */
static void latent_prefill(void **state)
{
    (void)state;
    struct layer_part p = part(&v3, &v3_mla, PREC_FP8, MOE_PREFILL, 4096, 4096, 1);
    struct kernels k = { .n = 0 };
    layer_attention(&k, &p);
    assert_int_equal(k.n, 7);
    is_gemm(&k.kernel[1], PREC_FP8, 1, 4096, 2112, 7168);
    is_gemm(&k.kernel[2], PREC_FP8, 1, 4096, 24576, 1536);
    is_gemm(&k.kernel[4], PREC_FP8, 1, 4096, 32768, 512);
    is_plain(&k.kernel[5], PREC_BF16, 2.0 * (4096.0 * 4096 / 2) * 128 * (192 + 128),
             4096.0 * 128 * (192 + 128 + 192 + 128) * 2);
    is_gemm(&k.kernel[6], PREC_FP8, 1, 4096, 7168, 16384);
    struct topology *t = test_machine("h800-ib", 1);
    const struct { int kernel; double tflops; } published[] = { { 1, 1058 }, { 2, 990 }, { 6, 1358 } };
    for (int i = 0; i < 3; i++) {
        const struct kernel *x = &k.kernel[published[i].kernel];
        double flops = 2.0 * (double)x->shape.rows * (double)x->shape.n * (double)x->shape.k;
        assert_near(flops / cost_kernel(&t->device[0], x).seconds, published[i].tflops * 1e12, 0.11);
    }
    topology_free(t);
    /* A last chunk of 1024 tokens: the latents before it are expanded again. */
    p.tokens = 1024;
    k.n = 0;
    layer_attention(&k, &p);
    is_gemm(&k.kernel[4], PREC_FP8, 1, 4096, 32768, 512);
    /* Without a latent of queries they come from hidden states, in the same product. */
    struct attention_shape lite = v3_mla;
    lite.q_lora = 0;
    p.attention = &lite;
    k.n = 0;
    layer_attention(&k, &p);
    assert_int_equal(k.n, 6);
    is_gemm(&k.kernel[1], PREC_FP8, 1, 1024, 128 * 192 + 576, 7168);
}

static void gate_ffn_head(void **state)
{
    (void)state;
    struct layer_part p = part(&small, &grouped, PREC_BF16, MOE_DECODE, 32, 0, 2);
    struct kernels k = { .n = 0 };
    layer_gate(&k, &p, 16);
    assert_int_equal(k.n, 3);
    is_gemm(&k.kernel[1], PREC_BF16, 1, 32, 16, 1000);
    assert_near(k.kernel[1].bytes.out, 4, 0);
    is_plain(&k.kernel[2], PREC_BF16, 0, 32 * 16 * 4);
    k.n = 0;
    layer_ffn(&k, &p, 750);
    assert_int_equal(k.n, 3);
    is_gemm(&k.kernel[0], PREC_BF16, 1, 32, 1500, 1000);
    is_plain(&k.kernel[1], PREC_BF16, 0, 32 * 750 * (2 * 2 + 2));
    is_gemm(&k.kernel[2], PREC_BF16, 1, 32, 1000, 750);
    k.n = 0;
    layer_head(&k, &p, 5001, 32);
    is_gemm(&k.kernel[1], PREC_BF16, 1, 32, 2501, 1000); /* half of the vocabulary, rounded up */
}

/* Twice the arithmetic of a product, in two; five products for the core's two. */
static void backward(void **state)
{
    (void)state;
    struct layer_part p = part(&small, &grouped, PREC_BF16, MOE_TRAIN, 64, 64, 1);
    struct kernels k = { .n = 0 }, b = { .n = 0 };
    layer_attention(&k, &p);
    layer_backward(&b, &k);
    assert_int_equal(b.n, 2 * 2 + 3);
    is_gemm(&b.kernel[0], PREC_BF16, 1, 64, 800, 1000);  /* dX = dY W^T of the output's projection */
    is_gemm(&b.kernel[1], PREC_BF16, 1, 1000, 800, 64);  /* dW = X^T dY */
    assert_near(b.kernel[1].bytes.out, 4, 0);
    is_plain(&b.kernel[2], PREC_BF16, 2.5 * k.kernel[3].flops, 2 * k.kernel[3].traffic);
    is_plain(&b.kernel[6], PREC_BF16, 0, 1.5 * 4 * 64 * 1000 * 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(grouped_queries), cmocka_unit_test(latent_decode), cmocka_unit_test(latent_prefill),
        cmocka_unit_test(gate_ffn_head),   cmocka_unit_test(backward),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
