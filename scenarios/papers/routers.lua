-- SPDX-License-Identifier: Apache-2.0
--
-- What routers are by definition, in closed form: balanced assignment and expert choice hold every expert to its share,
-- a balanced hash is as even as its commonest token allows, free experts take their share of the choices.
local moe = require "moelab"
local paper = require "lib.paper"

-- Logits without a generator of our own: sines of incommensurate steps, expert 0 liked by all.
local function logits(n, experts)
  local rows = {}
  for t = 1, n do
    rows[t] = {}
    for e = 1, experts do rows[t][e] = 2 * math.sin(12.9898 * t + 78.233 * e) + (e == 1 and 1.5 or 0) end
  end
  return rows
end

local function eval(name, input, top_k, set)
  return moe.eval("router", name, { input = input, top_k = top_k, set = set or {} })
end

local function extremes(load)
  local least, most = math.huge, 0
  for _, n in ipairs(load) do least, most = math.min(least, n), math.max(most, n) end
  return least, most
end

local given = { logits = logits(256, 16) }

-- BASE: T / E each, whatever the scores.
local least, most = extremes(eval("base-auction", given, 1).load)
paper.claim { paper = "BASE Layers: Simplifying Training of Large, Sparse Models",
              metric = "tokens of the busiest of 16 experts, of 256", published = 16, ours = most, class = "E",
              tolerance = 0, basis = "definition" }
paper.claim { paper = "BASE Layers: Simplifying Training of Large, Sparse Models",
              metric = "tokens of the idlest", published = 16, ours = least, class = "E", tolerance = 0,
              basis = "definition" }

-- Expert Choice: k = n c / e for every expert; what that tells of the future, in bits, for 9 layers with 2 of 16.
least, most = extremes(eval("expert-choice", given, 2, { factor = 2 }).load)
paper.claim { paper = "Mixture-of-Experts with Expert Choice Routing",
              metric = "tokens of the busiest of 16 experts, of 256, c = 2", published = 32, ours = most, class = "E",
              tolerance = 0, basis = "definition" }
paper.claim { paper = "Mixture-of-Experts with Expert Choice Routing", metric = "tokens of the idlest",
              published = 32, ours = least, class = "E", tolerance = 0, basis = "definition" }
local share = most / #given.logits
paper.claim { paper = "Mixture-of-Experts with Expert Choice Routing",
              metric = "bits that 9 layers may leak of a token's future, K log2((1 - R) / R) each", published = 50.53,
              ours = 9 * 2 * math.log((1 - share) / share, 2), class = "E", tolerance = 1e-4, basis = "closed form" }

-- Hash layers: ids by Zipf's law. No hash is more even than its commonest id, E p_max; the balanced one gets there.
local ids, counts = {}, {}
for v = 1, 200 do
  counts[v] = math.floor(1000 / (v ^ 1.2) + 0.5)
  for _ = 1, counts[v] do ids[#ids + 1] = v - 1 end
end
local hash = { token_ids = ids, n_experts = 16 }
local _, at_random = extremes(eval("hash-router", hash, 1).load)
paper.claim { paper = "Hash Layers For Large Sparse Models",
              metric = "a random hash's largest / mean load is at least E p_max of Zipf ids (1: yes)", published = 1,
              ours = at_random >= counts[1] and 1 or 0, class = "E", tolerance = 0, basis = "closed form" }

-- THOR: one draw per layer and batch, all tokens or none.
least, most = extremes(eval("random-router", given, 1, { top_k = 1 }).load)
paper.claim { paper = "Taming Sparsely Activated Transformer with Stochastic Experts",
              metric = "tokens of the one expert that a batch of 256 draws", published = 256, ours = most, class = "E",
              tolerance = 0, basis = "definition" }

-- DeepSeek-V3's gate: experts of a token lie in 2 of 4 groups at most.
local r = eval("group-limited-top-k", given, 4, { groups = 4, top_groups = 2 })
local widest = 0
for t = 1, #given.logits do
  local groups, n = {}, 0
  for i = r.offsets[t] + 1, r.offsets[t + 1] do groups[r.experts[i] // 4] = true end
  for _ in pairs(groups) do n = n + 1 end
  widest = math.max(widest, n)
end
paper.claim { paper = "DeepSeek-V3 gate (field standard)", metric = "most groups of a token, of 4, with top_groups = 2",
              published = 2, ours = widest, class = "E", tolerance = 0, basis = "definition" }

-- SMILE, and the device-wise gate: one group per token.
r, widest = eval("bilevel-router", given, 2, { groups = 4 }), 0
for t = 1, #given.logits do
  local a, b = r.experts[r.offsets[t] + 1], r.experts[r.offsets[t] + 2]
  widest = math.max(widest, a // 4 == b // 4 and 1 or 2)
end
for _, title in ipairs { "SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing",
                         "Towards More Effective and Economic Sparsely-Activated Model" } do
  paper.claim { paper = title, metric = "most nodes that a token of two experts visits", published = 1, ours = widest,
                class = "E", tolerance = 0, basis = "definition" }
end

-- Selective Sinkhorn's worked example.
r = eval("sinkhorn-router", { logits = { { math.log(0.73), math.log(0.27) }, { math.log(0.27), math.log(0.73) } } }, 2,
         { kernel = "probabilities", xi = 0.5, tolerance = 1e-6 })
paper.claim { paper = "Selective Sinkhorn Routing for Improved Sparse Mixture of Experts",
              metric = "plan of .73 .27 / .27 .73 at xi = .5, its first entry", published = 0.715, ours = r.weights[1],
              class = "E", tolerance = 1e-3, basis = "closed form" }

-- Top-p: experts per token rise with p. AdaMoE: true experts per token are k (1 - share of null ones).
local before, rising = 0, 1
for _, p in ipairs { 0.1, 0.3, 0.5, 0.7, 0.9 } do
  local now = #eval("top-p", given, 2, { p = p }).experts / #given.logits
  rising = now > before and rising or 0
  before = now
end
paper.claim { paper = "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
              metric = "experts per token rise with p, at five values (1: yes)", published = 1, ours = rising,
              class = "S", tolerance = 0, basis = "definition" }
given.previous_logits = given.logits
r = eval("zero-compute-experts", given, 4, { free = 8, free_logit = 1.8, free_step = 0.4 })
local null, real = 0, 0
for _, e in ipairs(r.experts) do null, real = null + (e >= 16 and 1 or 0), real + (e < 16 and 1 or 0) end
paper.claim { paper = "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models",
              metric = "true experts per token, against k (1 - share of null ones)",
              published = 4 * (1 - null / #r.experts), ours = real / #given.logits, class = "S", tolerance = 1e-12,
              basis = "definition" }
