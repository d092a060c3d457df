-- SPDX-License-Identifier: Apache-2.0
--
-- Sizes of published models: MoE layers only, one entry per model. d_expert is the width of one expert's gated FFN
-- (three matrices of d_model x d_expert). Every entry names where its figures are from.
return {
  ["gpt-oss-20b"] = {
    layers = 24, experts = 32, top_k = 4, shared = 0, d_model = 2880, d_expert = 2880,
    n_heads = 64, n_kv_heads = 8, d_head = 64, precision = "bf16",
    source = "config.json of openai/gpt-oss-20b; bf16 here, the release stores experts in MXFP4",
  },
  ["gpt-oss-120b"] = {
    layers = 36, experts = 128, top_k = 4, shared = 0, d_model = 2880, d_expert = 2880,
    n_heads = 64, n_kv_heads = 8, d_head = 64, precision = "bf16",
    source = "config.json of openai/gpt-oss-120b; bf16 here, the release stores experts in MXFP4",
  },
  ["deepseek-v3"] = {
    layers = 58, experts = 256, top_k = 8, shared = 1, d_model = 7168, d_expert = 2048,
    n_heads = 128, n_kv_heads = 2, d_head = 128, precision = "fp8", act_bytes = 1, combine_bytes = 2,
    source = "DeepSeek-V3 technical report, arXiv 2412.19437; latent attention's 576 cached values per token are "
      .. "counted as two 128-wide KV heads (512 values)",
  },
  ["mixtral-8x7b"] = {
    layers = 32, experts = 8, top_k = 2, shared = 0, d_model = 4096, d_expert = 14336,
    n_heads = 32, n_kv_heads = 8, d_head = 128, precision = "bf16",
    source = "Jiang et al., 2024, arXiv 2401.04088, table 1",
  },
  ["olmoe-1b-7b"] = {
    layers = 16, experts = 64, top_k = 8, shared = 0, d_model = 2048, d_expert = 1024,
    n_heads = 16, n_kv_heads = 16, d_head = 128, precision = "bf16",
    source = "Muennighoff et al., 2024, arXiv 2409.02060",
  },
  ["qwen3-30b-a3b"] = {
    layers = 48, experts = 128, top_k = 8, shared = 0, d_model = 2048, d_expert = 768,
    n_heads = 32, n_kv_heads = 4, d_head = 128, precision = "bf16",
    source = "config.json of Qwen/Qwen3-30B-A3B",
  },
  ["tiny-moe"] = {
    layers = 8, experts = 32, top_k = 4, shared = 0, d_model = 128, d_expert = 96,
    n_heads = 4, n_kv_heads = 4, d_head = 32, precision = "fp32",
    source = "tools/tiny_moe, doc/tiny-moe.md",
  },
}
