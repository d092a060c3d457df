-- SPDX-License-Identifier: Apache-2.0
--
-- Whether a GPU computes what it should: small layers in both precisions, every layout, placement and cache policy,
-- each output compared with a plain computation: moelab run scenarios/gpu/verify.lua. Fails if one is wrong.
local moe = require "moelab"

local function experiment(t)
  t.model = moe.each {
    moe.label("fp32", { layers = 2, experts = 16, top_k = 4, d_model = 256, d_expert = 96, n_heads = 4, d_head = 64,
                        precision = "fp32" }),
    moe.label("bf16", { layers = 2, experts = 16, top_k = 4, d_model = 250, d_expert = 99, n_heads = 4, d_head = 64,
                        precision = "bf16" }),
  }
  t.executor, t.virtual_ranks, t.verify, t.repetitions = "cuda", true, true, 2
  t.workload = moe.decode { trace = moe.synth { layers = 2, experts = 16, top_k = 4, requests = 128,
                                                tokens_per_request = 8, skew = 0.8 },
                            batch_per_device = 12, steps = 3 }
  return moe.experiment(t):run()
end

experiment {
  name = "layouts", machine = moe.machine "h800-ib" { nodes = 2, devices = 4 },
  placement = moe.each { "contiguous", "round-robin", "eplb" }, dispatch = moe.each { "flat", "node-dedup" },
}
experiment {
  name = "offload", machine = moe.machine "dgx-h100" { nodes = 1, devices = 2 },
  offload = moe.each { "lru", "lfu", "layer-distance", "belady" }, cache = moe.each { 0.125, 0.5 },
}
