-- SPDX-License-Identifier: Apache-2.0
--
-- Balancers on the routing of one small model: moelab run scenarios/balancers.lua. 8 H100s, 256 tokens each per step;
-- sigmoid scores of the trace's logits, k = 4 of 32 experts. The table of doc/balancers.md.
local moe = require "moelab"
local P = moe.plugin

local runs = moe.experiment {
  name      = "balancers",
  model     = { layers = 8, experts = 32, top_k = 4, d_model = 1024, d_expert = 512, n_heads = 16, d_head = 64 },
  machine   = moe.machine "dgx-h100" { nodes = 1 },
  tier      = "flow", allow_extrapolation = true,
  workload  = moe.prefill { trace = "traces/tiny-moe", tokens_per_device = 256, steps = 24, context = 128, profile = 0 },
  router    = "group-limited-top-k",
  balancer  = moe.each {
    moe.label("none", {}), P("loss-free-bias", { rate = 0.01 }), P("loss-free-bias", { rate = 0.01, decay = "sqrt" }),
    "bip-balancer", P("capacity", { factor = 1.25 }), P("capacity-aware", { factor = 1.25 }),
    P("capacity-aware", { factor = 1.25, expand = true }), P("rectify-router", { factor = 1.25 }),
    P("llep", { min_rows = 32, lambda = 1.1 }),
  },
}:run()
runs:table {
  title = "What do balancers make of one trace? 32 experts on 8 GPUs, 8 layers, 2,048 tokens a step",
  rows = "balancer",
  value = { "max_vio", "max_vio_global", "imbalance", "dropped", "added", "experts_per_token", "agreement", "step_s" },
  file = "balancers.txt", best = "min",
}
