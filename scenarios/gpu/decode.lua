-- SPDX-License-Identifier: Apache-2.0
--
-- Decode steps on one GPU, queued call by call and as CUDA graphs: moelab run scenarios/gpu/decode.lua. A graph has one
-- size for all steps, so that rows of experts are padded; what is launched once must compute the same.
local moe = require "moelab"

local runs = moe.experiment {
  name          = "decode",
  model         = { layers = 16, experts = 64, top_k = 8, d_model = 2048, d_expert = 1024, n_heads = 16, d_head = 128,
                    precision = "bf16" },
  machine       = moe.machine "dgx-h100" { nodes = 1, devices = 1 },
  executor      = "cuda",
  virtual_ranks = true,
  cuda_graphs   = moe.each { false, true },
  workload      = moe.decode { trace = moe.synth { layers = 16, experts = 64, top_k = 8, requests = 64,
                                                   tokens_per_request = 16, skew = 0.8 },
                               batch_per_device = moe.each { 1, 4, 16, 64 }, steps = 8, context = 512 },
}:run()
runs:table {
  title = "What does a decode step of 16 layers cost the host and the GPU, with and without CUDA graphs?",
  rows = { "workload.batch_per_device", "cuda_graphs" }, value = { "queue_s", "step_s", "experts_s", "padding" },
  file = "decode.txt",
}

-- Over several steps with other routes each, on four virtual ranks: outputs are compared with the reference.
moe.experiment {
  name          = "decode-outputs",
  model         = { layers = 3, experts = 16, top_k = 4, d_model = 256, d_expert = 96, n_heads = 4, d_head = 64,
                    precision = moe.each { "bf16", "fp32" } },
  machine       = moe.machine "h800-ib" { nodes = 2, devices = 2 },
  executor      = "cuda",
  virtual_ranks = true, cuda_graphs = true, verify = true, repetitions = 2,
  dispatch      = moe.each { "flat", "node-dedup" },
  workload      = moe.decode { trace = moe.synth { layers = 3, experts = 16, top_k = 4, requests = 64,
                                                   tokens_per_request = 8, skew = 0.8 },
                               batch_per_device = 8, steps = 4 },
}:run()
