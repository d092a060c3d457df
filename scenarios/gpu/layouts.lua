-- SPDX-License-Identifier: Apache-2.0
--
-- Dispatch layouts and placements on one GPU, eight ranks as streams: moelab run scenarios/gpu/layouts.lua. Times of
-- exchanges are those of copies within the GPU's memory; what is compared is what layouts have to move and permute, and
-- that all of them compute the same.
local moe = require "moelab"

local runs = moe.experiment {
  name          = "layouts",
  model         = { layers = 4, experts = 32, top_k = 4, d_model = 2048, d_expert = 768, n_heads = 16, d_head = 128,
                    precision = "bf16" },
  machine       = moe.machine "h800-ib" { nodes = 2, devices = 4 },
  executor      = "cuda",
  virtual_ranks = true,
  workload      = moe.decode { trace = moe.synth { layers = 4, experts = 32, top_k = 4, requests = 256,
                                                   tokens_per_request = 16, skew = 0.8 },
                               batch_per_device = 32, steps = 4 },
  placement     = moe.each { "contiguous", "eplb" },
  dispatch      = moe.each { "flat", "node-dedup" },
}:run()
runs:table {
  title = "What do layouts cost on one GPU, with eight virtual ranks?",
  rows = { "placement", "dispatch" }, value = { "step_s", "a2a_s", "experts_s", "imbalance" }, file = "layouts.txt",
}
