-- SPDX-License-Identifier: Apache-2.0
--
-- How far the simulation is from this computer: sixteen runs of machine host, two ranks, against tier flow of a machine
-- file that `moelab calibrate` has just written. doc/validation.md has what came out.
--
--   moelab calibrate cpu-localhost --ranks 2
--   moelab run scenarios/validation.lua --machine host --against flow
local moe = require "moelab"

moe.experiment {
  name      = "validation",
  model     = { layers = 4, experts = 16, top_k = 2, shared = 0, d_model = 1024, d_expert = 768, vocab = 4096,
                n_heads = 16, n_kv_heads = 4, d_head = 64, precision = "fp32" },
  machine   = "cpu-localhost.lua",
  tier      = "flow",
  workload  = moe.decode {
    trace = moe.synth { layers = 4, experts = 16, top_k = 2, requests = 256, tokens_per_request = 40, skew = 0.8,
                        seed = 1 },
    batch_per_device = moe.each { 48, 192 }, steps = 3, context = 256, profile = 0.125,
  },
  placement = moe.each { "contiguous", "eplb" },
  dispatch  = moe.each { "flat", "node-dedup" },
  offload   = moe.each { "none", "lru" },
}:run()
