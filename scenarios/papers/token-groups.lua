-- SPDX-License-Identifier: Apache-2.0
--
-- Routers that decide for more than a token, or from less than its content: by id, segment, prompt, label, place,
-- layer, step or rank. What follows from each rule, on drawn logits.
local moe = require "moelab"
local paper = require "lib.paper"
local drawn = require "lib.drawn"
local experts = drawn.experts

local T, E, K, n_seeds = 96, 16, 2, 5

local function eval(name, given, set, top_k, seed)
  return moe.eval("router", name, { input = given, top_k = top_k or K, set = set or {}, seed = seed or 1 })
end

local function shape(title, metric, holds, class)
  local n = 0
  for seed = 1, n_seeds do n = n + (holds(seed, { logits = drawn.matrix(seed, T, E, 2) }) and 1 or 0) end
  paper.claim { paper = title, metric = metric .. ": seeds of 5", published = n_seeds, ours = n, class = class or "S",
                tolerance = 0, basis = "definition" }
end

local function each(n, value)
  local list = {}
  for t = 1, n do list[t] = value(t) end
  return list
end

local function size(set)
  local n = 0
  for _ in pairs(set) do n = n + 1 end
  return n
end

-- Experts that the tokens of one kind go to: kind -> set.
local function seen_by(r, kind)
  local seen = {}
  for t, k in ipairs(kind) do
    seen[k] = seen[k] or {}
    for _, e in ipairs(experts(r, t)) do seen[k][e] = true end
  end
  return seen
end

-- ---- by id ----

shape("MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts",
      "every rare id has one expert, a frequent one several and no more than 4", function(seed, given)
  given.token_ids = each(T, function(t) return t % 3 == 0 and 0 or t % 12 end)
  given.tensors = { frequency = { 1000, 5, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1 } }
  local seen = seen_by(eval("mask-router", given, { frequent = 1 / 12, visible = 4 }, K, seed), given.token_ids)
  for id, set in pairs(seen) do
    if id > 0 and size(set) ~= 1 or id == 0 and (size(set) < 2 or size(set) > 4) then return false end
  end
  return true
end)

-- ---- by place ----

shape("Spatial Mixture-of-Experts", "a place has the same 2 experts whatever the gate says", function(seed, given)
  given.positions = each(T, function(t) return (t - 1) % 12 end)
  given.token_ids = each(T, function(t) return t end)
  given.tensors = { table = drawn.matrix(seed + 50, 12, E) }
  for _, set in pairs(seen_by(eval("hash-router", given, { by = "table", top_k = K }), given.positions)) do
    if size(set) ~= K then return false end
  end
  return true
end)

shape("Seg-MoE: Multi-Resolution Segment-wise Mixture-of-Experts for Time Series Forecasting Transformers",
      "a segment of 2, 4, 8 tokens has one set of experts, and there are a half, a quarter, an eighth as many",
      function(seed, given)
  given.positions = each(T, function(t) return (t - 1) % 32 end)
  given.requests = each(T, function(t) return (t - 1) // 32 end)
  for _, w in ipairs { 1, 2, 4, 8 } do
    local segment = each(T, function(t) return (t - 1) // w end)
    local seen, n = seen_by(eval("segment-router", given, { window = w }), segment), 0
    for _, set in pairs(seen) do
      n = n + 1
      if size(set) ~= K then return false end
    end
    if n ~= T // w then return false end
  end
  return true
end)

-- ---- by request ----

shape("MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning",
      "a request has one set of experts; plain top-k gives its tokens more", function(seed, given)
  given.requests = each(T, function(t) return (t * 5 + seed) % 6 end)
  local once, plain = seen_by(eval("prompt-level-router", given), given.requests),
    seen_by(eval("softmax-top-k", given), given.requests)
  for request, set in pairs(once) do
    if size(set) ~= K or size(plain[request]) <= K then return false end
  end
  return true
end, "A")

-- Decoding: the gate runs when a request is first seen, never again. FLOPs of a token: 6 k d_model d_expert in each
-- layer, and 2 d_model E + 4 E + d_model once for each of the 8 requests.
local layers, steps, d_model, d_expert = 2, 10, 256, 128
local runs = moe.experiment {
  name = "prompt", seed = 1, tier = "bound", allow_extrapolation = true,
  model = { layers = layers, experts = E, top_k = K, d_model = d_model, d_expert = d_expert, n_heads = 4, d_head = 64 },
  machine = moe.machine "dgx-h100" { nodes = 1 }, router = "prompt-level-router",
  workload = moe.decode { trace = moe.synth { layers = layers, experts = E, top_k = K, requests = 8,
                                              tokens_per_request = 400, logits = true, seed = 1 },
                          batch_per_device = 1, steps = steps, context = 64, profile = 0 },
}:run()
paper.claim { paper = "MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning",
              metric = "FLOPs per token of 8 requests that decode 10 tokens each",
              published = layers * (6 * K * d_model * d_expert + (2 * d_model * E + 4 * E + d_model) / steps),
              ours = runs.list[1].metrics.flops_per_token.mean, class = "A", tolerance = 1e-9, basis = "closed form" }

shape("Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural Networks",
      "every expert takes 3 of the 24 patches of each sample", function(_, given)
  given.requests = each(T, function(t) return (t - 1) % 4 end)
  local r, taken = eval("expert-choice", given, { per = "request", factor = E * 3 / 24 }), {}
  for t = 1, T do
    for _, e in ipairs(experts(r, t)) do
      local key = given.requests[t] * E + e
      taken[key] = (taken[key] or 0) + 1
    end
  end
  for _, n in pairs(taken) do
    if n ~= 3 then return false end
  end
  return size(taken) == 4 * E
end)

-- ---- by label ----

local function labelled(n, map)
  local given = { n_experts = E, labels = each(2 * n, function(t) return (t - 1) % n end),
                  tensors = map and { map = map } }
  return eval("label-guided-router", given)
end
shape("Efficiently Democratizing Medical LLMs for 50 Languages via a Mixture of Language Family Experts",
      "50 languages of 7 families use 7 experts, each token one", function(seed)
  local r = labelled(50, each(50, function(t) return (t + seed) % 7 end))
  local used = 0
  for _, n in ipairs(r.load) do used = used + (n > 0 and 1 or 0) end
  return used == 7 and #r.experts == 100
end)
shape("Language-Routing Mixture of Experts for Multilingual and Code-Switching Speech Recognition",
      "one expert per token however many languages, the same for all of a language", function()
  for _, n in ipairs { 2, 5, 16 } do
    local r = labelled(n)
    if #r.experts ~= 2 * n then return false end
    for t = 1, n do
      if r.experts[t] ~= r.experts[t + n] then return false end
    end
  end
  return true
end)

-- ---- by rank ----

shape("Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast",
      "the weak pass computes 2 more experts per token, none of the strong one's", function(_, given)
  local strong, weak = eval("softmax-top-k", given), eval("test-time-reroute", given)
  for t = 1, T do
    local set = {}
    for _, e in ipairs(experts(strong, t)) do set[e] = true end
    for _, e in ipairs(experts(weak, t)) do set[e] = true end
    if size(set) ~= 2 * K then return false end
  end
  return true
end)

shape("M6-T: Exploring Sparse Expert Models and Beyond", "4 experts as top-4 has, one of each group of four",
      function(_, given)
  local r = eval("expert-groups", given, { groups = 4 })
  for t = 1, T do
    local groups = {}
    for _, e in ipairs(experts(r, t)) do groups[e // 4] = true end
    if size(groups) ~= 4 or #experts(r, t) ~= 4 then return false end
  end
  return true
end)

-- ---- by layer, by step ----

shape("LaDiMo: Layer-wise Distillation Inspired MoEfier",
      "one expert where a layer's top gate weights dominate, k elsewhere",
      function(seed)
  local n = {}
  for i, scale in ipairs { 1, 12 } do -- a layer that is unsure, and one that is not
    local given, top = { logits = drawn.matrix(seed, T, E, scale) }, 0
    local r = eval("softmax-top-k", given, { renormalise = false })
    for t = 1, T do top = top + r.weights[r.offsets[t] + 1] / T end
    given.tensors = { layer_k = { top > 0.5 and 1 or K } }
    n[i] = #eval("expert-skipping", given, { threshold = 0 }).experts / T
  end
  return n[1] == K and n[2] == 1
end)

-- Experts per token while k comes down from all 16 to 2, in all layers or in the first of two.
local function falling(set, of_layers)
  local total = 0
  for step = 0, steps - 1 do
    local now = math.floor(E + (K - E) * step / steps + 0.5)
    total = total + (now * of_layers + K * (layers - of_layers)) / layers
  end
  local r = moe.experiment {
    name = "falling", seed = 1, tier = "bound", allow_extrapolation = true,
    model = { layers = layers, experts = E, top_k = K, d_model = d_model, d_expert = d_expert, n_heads = 4,
              d_head = 64 },
    machine = moe.machine "dgx-h100" { nodes = 1 }, router = moe.plugin("k-schedule", set),
    workload = moe.prefill { trace = moe.synth { layers = layers, experts = E, top_k = K, requests = 8,
                                                 tokens_per_request = 400, logits = true, seed = 1 },
                             tokens_per_device = 16, steps = steps, context = 64, profile = 0 },
  }:run()
  return total / steps, r.list[1].metrics.experts_per_token.mean
end
for _, row in ipairs {
  { "VER: Vision Expert Transformer for Robot Learning via Foundation Distillation and Dynamic Routing",
    { steps = steps } },
  { "Sigma-Moe-Tiny Technical Report", { steps = steps, layers = 1 } },
} do
  local expected, ours = falling(row[2], row[2].layers or layers)
  paper.claim { paper = row[1], metric = "experts per token while k falls from 16 to 2 in ten steps",
                published = expected, ours = ours, class = "S", tolerance = 1e-9, basis = "closed form" }
end
