-- SPDX-License-Identifier: Apache-2.0
--
-- One decode step of DeepSeek-V3 on so many nodes of 8 H800, 128 tokens per GPU, made to measure how time and memory of
-- moelab itself grow (make bench). Routes are drawn for 32,768 tokens at most, what a step has on 256 GPUs; on more, many
-- streams start at different places of them. An eighth of the requests is what EPLB knows. Every GPU has `slots` places
-- for experts.
local moe = require "moelab"

return function(nodes, slots)
  local devices = 8 * nodes
  local trace = moe.synth {
    layers = 58, experts = 256, top_k = 8, requests = math.min(devices, 256), tokens_per_request = 128, seed = 1,
  }
  local runs = moe.experiment {
    name      = "one decode step",
    model     = "deepseek-v3",
    machine   = moe.machine "h800-ib" { nodes = moe.each { nodes } },
    tier      = "bound",
    workload  = moe.decode { trace = trace, batch_per_device = 128, steps = 1, profile = 0.125 },
    placement = moe.plugin("eplb", { replicas = slots * devices }),
  }:run()
  runs:table {
    title = string.format("One decode step of DeepSeek-V3 on %d GPUs", devices),
    rows = "machine.nodes", value = { "step_s", "a2a_s", "experts_s", "imbalance", "routes" },
  }
end
