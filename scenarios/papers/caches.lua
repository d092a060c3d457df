-- SPDX-License-Identifier: Apache-2.0
--
-- Cache baselines against closed forms. A decode step sweeps through the layers, so the plainest model of it is a cycle
-- over N objects with room for C < N: LRU and LFU keep what came first or last and never hit; Belady's optimum, if it has
-- to insert what it loads, misses all of the first sweep, of which the first C - 1 objects stay, and from then on goes in
-- turns of N - 1 accesses: C - 1 hits, then N - C misses. No paper's figure is met here.
local moe = require "moelab"
local paper = require "lib.paper"

local N, C, sweeps = 97, 25, 400
local cycle = {}
for i = 0, N * sweeps - 1 do cycle[i + 1] = i % N end

local warm = N * (sweeps - 1) -- accesses after the first sweep
local belady_hits = warm // (N - 1) * (C - 1) + math.min(warm % (N - 1), C - 1)

local function hits(policy, capacity)
  return moe.eval("offload", policy, { keys = cycle, capacity = capacity }).hit_rate
end

local function claim(metric, expected, found, tolerance)
  paper.claim { paper = "cache baseline", metric = metric, published = expected, ours = found, class = "E",
                tolerance = tolerance, basis = "closed form" }
end

claim("lru: hit rate on a cycle larger than the cache", 0, hits("lru", C), 0)
claim("belady: hit rate on the same cycle", belady_hits / (N * sweeps), hits("belady", C), 1e-12)
for _, policy in ipairs { "lru", "lfu", "belady" } do
  claim(policy .. ": hit rate once the cycle fits", 1 - 1 / sweeps, hits(policy, N), 1e-12)
end

-- LFU: two objects that were asked for twice outlive any number of objects that are asked for once.
local mixed = { 0, 0, 1, 1 }
for i = 0, 999 do
  mixed[#mixed + 1] = i % 2
  mixed[#mixed + 1] = 2 + i
end
claim("lfu: hit rate of 2 hot objects among 1000 cold ones", 1002 / 2004,
      moe.eval("offload", "lfu", { keys = mixed, capacity = 3 }).hit_rate, 1e-12)

-- Layers in turn with routing that is learned: knowing the order of layers beats recency while one sweep does not fit.
-- Nobody has published this; it is why the policy is there.
local function on_trace(policy)
  return moe.eval("offload", policy, { trace = "traces/tiny-moe", capacity = 26 }).hit_rate
end
paper.claim { paper = "field baseline", metric = "layer-distance above LRU at 10 % of the experts (1 = yes)",
              published = 1, ours = on_trace("layer-distance") > on_trace("lru") and 1 or 0, class = "S", tolerance = 0,
              basis = "expectation" }
