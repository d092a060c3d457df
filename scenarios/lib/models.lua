-- SPDX-License-Identifier: Apache-2.0
--
-- Sizes of published models, one entry per model. layers counts MoE layers; dense says which others there are. d_expert is
-- the width of one expert's gated FFN (three matrices of d_model x d_expert). Every entry names where its figures are
-- from. Left out: biases, windows of attention (gpt-oss: 128 tokens in every other layer), layers that leave out rotation.
return {
  ["gpt-oss-20b"] = {
    layers = 24, experts = 32, top_k = 4, shared = 0, d_model = 2880, d_expert = 2880, vocab = 201088,
    n_heads = 64, n_kv_heads = 8, d_head = 64, precision = "bf16",
    source = "config.json of openai/gpt-oss-20b; bf16 here, the release stores experts in MXFP4",
  },
  ["gpt-oss-120b"] = {
    layers = 36, experts = 128, top_k = 4, shared = 0, d_model = 2880, d_expert = 2880, vocab = 201088,
    n_heads = 64, n_kv_heads = 8, d_head = 64, precision = "bf16",
    source = "config.json of openai/gpt-oss-120b; bf16 here, the release stores experts in MXFP4",
  },
  ["deepseek-v3"] = {
    layers = 58, experts = 256, top_k = 8, shared = 1, d_model = 7168, d_expert = 2048, vocab = 129280,
    attention = { kind = "mla", n_heads = 128, q_lora = 1536, kv_lora = 512, nope = 128, rope = 64, v = 128 },
    dense = { layers = 3, d_ff = 18432 }, precision = "fp8", dispatch = "fp8", combine = "bf16",
    source = "DeepSeek-V3 technical report, arXiv 2412.19437, section 4.2, and config.json of deepseek-ai/DeepSeek-V3 "
      .. "(vocabulary); without the layer that predicts a second token",
  },
  ["deepseek-v2-lite"] = {
    layers = 26, experts = 64, top_k = 6, shared = 2, d_model = 2048, d_expert = 1408, vocab = 102400,
    attention = { kind = "mla", n_heads = 16, q_lora = 0, kv_lora = 512, nope = 128, rope = 64, v = 128 },
    dense = { layers = 1, d_ff = 10944 }, precision = "bf16",
    source = "DeepSeek-V2, arXiv 2405.04434, appendix B, and config.json of deepseek-ai/DeepSeek-V2-Lite",
  },
  ["llama-4-maverick"] = {
    layers = 24, experts = 128, top_k = 1, shared = 1, d_model = 5120, d_expert = 8192, vocab = 202048,
    n_heads = 40, n_kv_heads = 8, d_head = 128, dense = { interleave = 2, d_ff = 16384 }, precision = "bf16",
    source = "config.json of meta-llama/Llama-4-Maverick-17B-128E, text_config: every second of 48 layers is MoE",
  },
  ["mixtral-8x7b"] = {
    layers = 32, experts = 8, top_k = 2, shared = 0, d_model = 4096, d_expert = 14336, vocab = 32000,
    n_heads = 32, n_kv_heads = 8, d_head = 128, precision = "bf16",
    source = "Jiang et al., 2024, arXiv 2401.04088, table 1",
  },
  ["olmoe-1b-7b"] = {
    layers = 16, experts = 64, top_k = 8, shared = 0, d_model = 2048, d_expert = 1024, vocab = 50304,
    n_heads = 16, n_kv_heads = 16, d_head = 128, precision = "bf16",
    source = "Muennighoff et al., 2024, arXiv 2409.02060; vocabulary: config.json of allenai/OLMoE-1B-7B-0924",
  },
  ["qwen3-30b-a3b"] = {
    layers = 48, experts = 128, top_k = 8, shared = 0, d_model = 2048, d_expert = 768, vocab = 151936,
    n_heads = 32, n_kv_heads = 4, d_head = 128, precision = "bf16",
    source = "config.json of Qwen/Qwen3-30B-A3B",
  },
  ["tiny-moe"] = {
    layers = 8, experts = 32, top_k = 4, shared = 0, d_model = 128, d_expert = 96, vocab = 2048,
    n_heads = 4, n_kv_heads = 4, d_head = 32, precision = "fp32",
    source = "tools/tiny_moe, doc/tiny-moe.md",
  },
}
