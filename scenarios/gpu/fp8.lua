-- SPDX-License-Identifier: Apache-2.0
--
-- Experts in FP8 on a GPU of compute capability 8.9 or higher: every layout and a cache policy, each output compared
-- with a computation that rounds likewise; then how long experts take in FP8 and in BF16, measured and simulated:
-- moelab run scenarios/gpu/fp8.lua. Fails if an output is wrong.
local moe = require "moelab"

local function experiment(t)
  t.model = { layers = 2, experts = 16, top_k = 4, d_model = 256, d_expert = 96, n_heads = 4, d_head = 64,
              precision = "fp8" }
  t.executor, t.virtual_ranks, t.verify, t.repetitions = "cuda", true, true, 2
  t.workload = moe.decode { trace = moe.synth { layers = 2, experts = 16, top_k = 4, requests = 128,
                                                tokens_per_request = 8, skew = 0.8 },
                            batch_per_device = 12, steps = 3 }
  return moe.experiment(t):run()
end

experiment {
  name = "fp8-layouts", machine = moe.machine "h800-ib" { nodes = 2, devices = 4 },
  placement = moe.each { "contiguous", "round-robin", "eplb" }, dispatch = moe.each { "flat", "node-dedup" },
}
experiment {
  name = "fp8-offload", machine = moe.machine "dgx-h100" { nodes = 1, devices = 2 },
  offload = moe.each { "lru", "belady" }, cache = moe.each { 0.125, 0.5 },
}

-- In FP8 a task's products are calls of their own, in BF16 one: what that costs is most where rows are few.
local function model(precision)
  return moe.label(precision, { layers = 2, experts = 8, top_k = 8, d_model = 2048, d_expert = 768, n_heads = 2,
                                d_head = 64, precision = precision })
end
moe.experiment {
  name          = "fp8-rate",
  model         = moe.each { model "bf16", model "fp8" },
  machine       = moe.machine "dgx-h100" { nodes = 1, devices = 1 },
  executor      = moe.each { "cuda", "flow" },
  virtual_ranks = true,
  workload      = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 8, requests = 1024,
                                                   tokens_per_request = 4 },
                               batch_per_device = moe.each { 4, 32, 256, 1024 }, steps = 2, context = 16, profile = 0 },
}:run():table {
  title = "How long do eight experts take in FP8 and BF16, over rows of each?",
  rows = { "workload.batch_per_device", "executor" }, cols = "model", value = "experts_s", file = "fp8.txt",
}
