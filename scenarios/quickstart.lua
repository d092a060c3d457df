-- SPDX-License-Identifier: Apache-2.0
--
-- Two questions, answered on routing that a small MoE language model learned (scenarios/traces/tiny-moe):
--   1. Which placement of experts is fastest on one and on two 8-GPU H100 nodes, and how far is it from perfect balance?
--   2. gpt-oss-20b's experts take 38 GB in bf16. On one 24 GB card, with all of them in host memory, which offload policy
--      keeps the right ones resident?
-- Both are run on the flow solver and on SimGrid, and the two are compared (question 2 on fewer tokens: SimGrid takes
-- its time over every single load).
--
-- The sizes are gpt-oss-20b's: 24 layers of 32 experts, top-4. The routing is the trace's, a model of 8 such layers: each
-- recorded layer stands for three neighbours. In question 1, 128 tokens per GPU come from half of the trace's 56 requests,
-- each played by many streams that started at different places.
local moe = require "moelab"

local executors = moe.has "simgrid" and { "flow", "simgrid" } or { "flow" }
if #executors == 1 then print("SimGrid is not built in: the flow solver alone.\n") end

local trace = "traces/tiny-moe"
local model = "gpt-oss-20b"

-- 1. Placement. Statistics come from one half of the requests, the other half is served. eplb with 48 places holds half
-- as many weights again as the others; with 32 as many.
local placement = moe.experiment {
  name      = "placement",
  model     = model,
  machine   = moe.machine "dgx-h100" { nodes = moe.each { 1, 2 } },
  executor  = moe.each(executors),
  tier      = "exact",
  workload  = moe.decode { trace = trace, layer_repeat = 3, batch_per_device = 128, steps = 4, profile = 0.5 },
  placement = moe.each {
    "contiguous", "round-robin", moe.plugin("eplb", { replicas = 32 }), moe.plugin("eplb", { replicas = 48 }),
  },
}

-- 2. Offload. One request at a time; a cache that holds a share of all 768 experts. Half of them is what the card has
-- room for beside attention, gates and a tenth for activations and KV cache.
local function offload(name, executor, tokens)
  return moe.experiment {
    name     = name,
    model    = model,
    machine  = "rtx4090-pcie4",
    executor = executor,
    workload = moe.decode { trace = trace, layer_repeat = 3, batch_per_device = 1, steps = tokens, profile = 0 },
    offload  = moe.each { "lru", "lfu", "layer-distance", "belady" },
    cache    = moe.each { 0.05, 0.1, 0.2, 0.3, 0.4, 0.45 },
  }
end

local placed = placement:run()
placed:filter { executor = "flow" }:table {
  title = "Which placement serves a decode batch of 128 tokens per GPU fastest?",
  rows = { "machine.nodes", "placement" }, value = { "step_s", "a2a_s", "experts_s", "imbalance" },
  best = "min", bound = true, file = "placement.txt",
}
placed:difference { over = "executor", value = "step_s" }
placed:filter { executor = "flow" }:plot {
  title = "Which placement is fastest? (gpt-oss-20b shapes, learned routing, 128 tokens per H100)",
  x = "machine.nodes", group = "placement", y = "step_s", bound = true,
  xlabel = "nodes of 8 H100", ylabel = "time of one step", file = "placement.png",
}

local offloaded = offload("offload", "flow", 1024):run()
offloaded:table {
  title = "Which policy keeps the right experts on a 24 GB card? Expert accesses that hit, by the share of experts it holds",
  rows = "offload", cols = "cache", value = "hit_rate", percent = true, best = "max", ceiling = "belady",
  file = "offload-hits.txt",
}
offloaded:table {
  title = "... and what it means for speed (belady knows the future: the ceiling)",
  rows = "offload", cols = "cache", value = "tokens_per_s", best = "max", ceiling = "belady", file = "offload-speed.txt",
}
if #executors == 2 then
  offload("offload on both", moe.each(executors), 64):run():difference { over = "executor", value = "step_s" }
end
offloaded:plot {
  title = "How close do caches come to the best possible? (768 experts of 50 MB, PCIe 4.0)",
  x = "cache", group = "offload", y = "hit_rate", kind = "lines", percent = true, ceiling = "belady",
  xlabel = "cache size (share of all experts)", ylabel = "expert accesses that hit", file = "offload-hits.png",
}
offloaded:plot {
  title = "How fast does one 24 GB card decode with 38 GB of experts in host memory?",
  x = "cache", group = "offload", y = "tokens_per_s", kind = "lines", ceiling = "belady",
  xlabel = "cache size (share of all experts)", ylabel = "decode speed", file = "offload-speed.png",
}
