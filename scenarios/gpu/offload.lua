-- SPDX-License-Identifier: Apache-2.0
--
-- Experts in the host's pinned memory, loaded over PCIe when they are needed, with each cache policy: moelab run
-- scenarios/gpu/offload.lua. load_s is measured; --machine flow has what the description of the machine says.
local moe = require "moelab"

local runs = moe.experiment {
  name          = "offload",
  model         = { layers = 4, experts = 32, top_k = 4, d_model = 2048, d_expert = 512, n_heads = 16, d_head = 128,
                    precision = "bf16" },
  machine       = moe.machine "dgx-h100" { nodes = 1, devices = 1 },
  executor      = "cuda",
  virtual_ranks = true,
  workload      = moe.decode { trace = moe.synth { layers = 4, experts = 32, top_k = 4, requests = 16,
                                                   tokens_per_request = 64, skew = 0.8 },
                               batch_per_device = 4, steps = 16 },
  offload       = moe.each { "lru", "lfu", "layer-distance", "belady" },
  cache         = moe.each { 0.25, 0.5 },
}:run()
runs:table {
  title = "What does loading experts over PCIe cost with each cache?",
  rows = { "offload", "cache" }, value = { "step_s", "load_s", "hit_rate" }, file = "offload.txt",
}
