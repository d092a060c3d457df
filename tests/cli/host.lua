-- SPDX-License-Identifier: Apache-2.0
--
-- Two devices with a process each, really computing: a model of one layer, then one of two, on made-up routing.
local moe = require "moelab"

local function sizes(layers, experts)
  return { layers = layers, experts = experts, top_k = 2, d_model = 64, d_expert = 48, n_heads = 4, d_head = 16 }
end

local function trace(layers, experts)
  return moe.synth { layers = layers, experts = experts, top_k = 2, requests = 8, tokens_per_request = 40, skew = 0.8 }
end

for layers = 1, 2 do
  moe.experiment {
    name      = layers .. "-layer",
    model     = sizes(layers, 8),
    machine   = moe.machine "star-50GBps" { nodes = 2 },
    executor  = "host",
    workload  = moe.decode { trace = trace(layers, 8), batch_per_device = 24, steps = 3 },
    placement = moe.each { "contiguous", "round-robin" },
    verify    = true,
  }:run()
end
