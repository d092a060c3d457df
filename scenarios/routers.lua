-- SPDX-License-Identifier: Apache-2.0
--
-- Every router on the routing of one small model: moelab run scenarios/routers.lua. The trace has logits, token ids and
-- positions; each router makes of them what it would. 8 H100s, 256 tokens each per step; k = 4 of 32 experts, as the
-- model was trained with, unless the rule has a number of its own. The table of doc/routers.md.
local moe = require "moelab"
local P = moe.plugin

local runs = moe.experiment {
  name      = "routers",
  model     = { layers = 8, experts = 32, top_k = 4, d_model = 1024, d_expert = 512, n_heads = 16, d_head = 64 },
  machine   = moe.machine "dgx-h100" { nodes = 1 },
  tier      = "bound", allow_extrapolation = true,
  workload  = moe.prefill { trace = "traces/tiny-moe", tokens_per_device = 256, steps = 8, context = 128, profile = 0 },
  router    = moe.each {
    "replay", "routing-replay", "softmax-top-k", P("group-limited-top-k", { groups = 8, top_groups = 4 }),
    P("bilevel-router", { groups = 8 }), P("sinkhorn-router", { kernel = "probabilities" }), "base-auction",
    P("expert-choice", { factor = 4 }), P("top-p", { p = 0.4 }), P("relu-router", { shift = 1 }),
    P("zero-compute-experts", { free = 4, free_logit = 1 }), P("hash-router", { top_k = 4 }), "random-router",
    "expert-race", "entropy-hybrid", P("importance-k", { max_k = 8, full = 0.05 }), "dynamic-k", "expert-skipping", P("k-schedule", { steps = 8 }),
    "expert-groups", "segment-router", "prompt-level-router", "test-time-reroute",
    P("mixture-of-depths", { share = 0.5 }),
  },
}:run()
runs:table {
  title = "What do routers make of one trace? 32 experts, 8 layers, 2,048 tokens a step",
  rows = "router",
  value = { "max_vio", "load_cv", "load_entropy", "fluctuation", "experts_per_token", "agreement", "flops_per_token" },
  file = "routers.txt",
}
