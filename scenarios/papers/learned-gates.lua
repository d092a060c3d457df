-- SPDX-License-Identifier: Apache-2.0
--
-- Gates with learned tensors, on drawn ones: what each rule is by definition, and what it does whatever was learned. Of
-- trained gates nothing is claimed.
local moe = require "moelab"
local paper = require "lib.paper"
local drawn = require "lib.drawn"
local dot, experts = drawn.dot, drawn.experts

local T, E, H, K, n_seeds = 64, 16, 12, 2, 5

local function eval(name, given, tensors, top_k, set)
  given.tensors, given.n_experts = tensors, given.n_experts or E
  return moe.eval("router", name, { input = given, top_k = top_k or K, set = set or {} })
end

-- Of 5 seeds, those for which holds(seed).
local function shape(title, metric, class, holds, basis)
  local n = 0
  for seed = 1, n_seeds do n = n + (holds(seed) and 1 or 0) end
  paper.claim { paper = title, metric = metric .. ": seeds of 5", published = n_seeds, ours = n, class = class,
                tolerance = 0, basis = basis or "definition" }
end

-- Every token goes to the K experts with the largest value(h, e).
local function all_largest(r, hidden, value)
  for t = 1, T do
    local values = {}
    for e = 1, E do values[e] = value(hidden[t], e) end
    if drawn.among(experts(r, t), drawn.largest(values, K)) ~= K then return false end
  end
  return true
end

-- ---- activation norms: every expert answers, the loudest are kept ----

local R = 4
local function factors(seed)
  local f = {}
  for e = 1, E do f[e] = drawn.matrix(10 * seed + e, R, H) end
  return f
end
local function norm(f)
  return function(h, e)
    local sum = 0
    for r = 1, R do sum = sum + dot(f[e][r], h) ^ 2 end
    return sum
  end
end
local function softplus(f)
  return function(h, e)
    local sum = 0
    for r = 1, R do sum = sum + math.log(1 + math.exp(dot(f[e][r], h))) end
    return sum
  end
end
local function loudest(title, class, response, value)
  shape(title, "every token at the 2 of 16 experts that answer loudest", class, function(seed)
    local hidden, f = drawn.matrix(seed, T, H), factors(seed)
    local r = eval("activation-norm-router", { hidden = hidden }, { factor = { f } }, K, { response = response })
    return all_largest(r, hidden, value(f))
  end)
end
loudest("Autonomy-of-Experts Models", "A", "norm", norm)
loudest("CompeteSMoE -- Statistically Guaranteed Mixture of Experts Training via Competition", "S", "softplus",
        softplus)
loudest("CompeteSMoE -- Effective Training of Sparse Mixture of Experts via Competition", "S", "norm", norm)

-- ---- carved experts: one neuron speaks for its group ----

shape("CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference",
      "every token at the 2 of 16 groups whose neuron fires strongest", "A", function(seed)
  local hidden, gate, up = drawn.matrix(seed, T, H), drawn.matrix(seed + 50, E, H), drawn.matrix(seed + 90, E, H)
  local r = eval("carved-experts", { hidden = hidden }, { gate_neuron = { gate }, up_neuron = { up } })
  return all_largest(r, hidden, function(h, e)
    local g = dot(gate[e], h)
    return math.abs(g / (1 + math.exp(-g)) * dot(up[e], h))
  end)
end)

-- ---- cosines: how long a token is does not matter ----

shape("On the Representation Collapse of Sparse Mixture of Experts",
      "tokens ten times as long: the same experts with the same weights", "A", function(seed)
  local hidden, long = drawn.matrix(seed, T, H), drawn.matrix(seed, T, H, 10)
  local tensors = { project = { drawn.matrix(seed + 50, E // 2, H) },
                    embedding = { drawn.matrix(seed + 90, E, E // 2) } }
  local a, b = eval("cosine-router", { hidden = hidden }, tensors), eval("cosine-router", { hidden = long }, tensors)
  for i = 1, #a.experts do
    if a.experts[i] ~= b.experts[i] or math.abs(a.weights[i] - b.weights[i]) > 1e-5 then return false end
  end
  return true
end)

-- ---- one gate for all layers: choices resemble each other ----

shape("Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech Recognition",
      "next layer's experts shared, with one gate more than with two", "S", function(seed)
  local hidden, next_hidden = drawn.matrix(seed, T, H), drawn.matrix(seed, T, H)
  for t = 1, T do
    for i = 1, H do next_hidden[t][i] = next_hidden[t][i] + 0.4 * drawn.number(seed + 7, t, i) end
  end
  local gate, other = drawn.matrix(seed + 50, E, H), drawn.matrix(seed + 90, E, H)
  local here, shared, own = eval("shared-router", { hidden = hidden }, { gate = gate }),
    eval("shared-router", { hidden = next_hidden }, { gate = gate }),
    eval("shared-router", { hidden = next_hidden }, { gate = other })
  local n_shared, n_own = 0, 0
  for t = 1, T do
    local set = {}
    for _, e in ipairs(experts(here, t)) do set[e] = true end
    n_shared, n_own = n_shared + drawn.among(experts(shared, t), set), n_own + drawn.among(experts(own, t), set)
  end
  return n_shared > n_own
end, "expectation")

-- ---- prototypes: clustered tokens ----

-- Tokens around E centres of different lengths, as many of each.
local function clustered(seed)
  local centre, hidden = drawn.matrix(seed + 20, E, H), {}
  for e = 1, E do
    for i = 1, H do centre[e][i] = centre[e][i] * (2 + 6 * (e - 1) / E) end
  end
  for t = 1, T do
    hidden[t] = {}
    for i = 1, H do hidden[t][i] = centre[(t - 1) % E + 1][i] + 0.1 * drawn.number(seed, t, i) end
  end
  return hidden, centre
end

shape("Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via Mixture of " ..
      "Experts",
      "tokens of 16 clusters, means at their centres: each cluster has an expert of its own", "S", function(seed)
  local hidden, centre = clustered(seed)
  local r = eval("prototype-router", { hidden = hidden }, { mean = { centre } }, 1)
  for t = 1, T do
    if r.experts[t] ~= (t - 1) % E then return false end
  end
  return true
end)

shape("On the effectiveness of discrete representations in sparse mixture of experts",
      "every token at the expert of the nearest of 16 codes", "S", function(seed)
  local hidden, code = drawn.matrix(seed, T, H), drawn.matrix(seed + 50, E, H)
  local r = eval("prototype-router", { hidden = hidden }, { mean = { code } }, 1)
  for t = 1, T do
    local near = {}
    for e = 1, E do
      near[e] = 0
      for i = 1, H do near[e] = near[e] - (hidden[t][i] - code[e][i]) ^ 2 end
    end
    if drawn.among(experts(r, t), drawn.largest(near, 1)) ~= 1 then return false end
  end
  return true
end)

shape("Input Domain Aware MoE: Decoupling Routing Decisions from Task Optimization in Mixture of Experts",
      "MaxVio of a posterior over equal clusters below that of a similarity gate with the same vectors", "S",
      function(seed)
  local hidden, centre = clustered(seed)
  return eval("prototype-router", { hidden = hidden }, { mean = { centre } }, 1).max_vio <
         eval("shared-router", { hidden = hidden }, { gate = centre }, 1).max_vio
end, "expectation")

-- ---- rows and columns ----

local P = 4
shape("OmniMoE: An Efficient MoE by Orchestrating Atomic Experts at Scale",
      "the 2 largest of 16 sums of a row and a column, found from 8 scores", "S", function(seed)
  local hidden = drawn.matrix(seed, T, H)
  local row, column = drawn.matrix(seed + 50, P, H), drawn.matrix(seed + 90, E // P, H)
  local r = eval("cartesian-router", { hidden = hidden }, { row = { row }, column = { column } })
  return all_largest(r, hidden, function(h, e)
    return dot(row[(e - 1) // (E // P) + 1], h) + dot(column[(e - 1) % (E // P) + 1], h)
  end)
end)

shape("CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing in Mixture-of-Experts",
      "2 of each set: 4 pairs from 2 rows and 2 columns", "S", function(seed)
  local row, column = drawn.matrix(seed + 50, P, H), drawn.matrix(seed + 90, E // P, H)
  local r = eval("cartesian-router", { hidden = drawn.matrix(seed, T, H) }, { row = { row }, column = { column } }, K,
                 { each = 2 })
  for t = 1, T do
    local rows, columns, n = {}, {}, 0
    for _, e in ipairs(experts(r, t)) do
      n = n + (rows[e // (E // P)] and 0 or 1) + (columns[e % (E // P)] and 0 or 1)
      rows[e // (E // P)], columns[e % (E // P)] = true, true
    end
    if n ~= 4 or #experts(r, t) ~= 4 then return false end
  end
  return true
end)

-- ---- a token's neighbours ----

-- Shares of choices that change when logits get other noise; tokens of four kinds, gates see their kind and the noise.
local function changed(name, seed, hidden, set)
  local now = {}
  for noise = 1, 2 do
    local logits = {}
    for t = 1, T do
      logits[t] = {}
      for e = 1, E do
        logits[t][e] = 2 * drawn.number(seed + 30, (t - 1) % 4, e) + drawn.number(seed + 100 * noise, t, e)
      end
    end
    now[noise] = moe.eval("router", name, { input = { logits = logits, hidden = hidden }, top_k = K, set = set })
  end
  local n = 0
  for t = 1, T do
    local set_before = {}
    for _, e in ipairs(experts(now[1], t)) do set_before[e] = true end
    n = n + K - drawn.among(experts(now[2], t), set_before)
  end
  return n
end

shape("Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
      "fewer choices change with the gate's noise than of plain top-k", "S", function(seed)
  local hidden = {}
  for t = 1, T do
    hidden[t] = {}
    for i = 1, H do hidden[t][i] = drawn.number(seed + 60, (t - 1) % 4, i) + 0.1 * drawn.number(seed, t, i) end
  end
  return changed("token-graph-router", seed, hidden, {}) < changed("softmax-top-k", seed, nil, {})
end, "expectation")

-- ---- frozen: the token's id, and a gate that nobody trains ----

shape("StableMoE: Stable Routing Strategy for Mixture of Experts",
      "one expert for each id wherever it stands; a gate's top 1 has more", "S", function(seed)
  local ids, first, fixed, moved = {}, {}, true, false
  for t = 1, T do ids[t] = (7 * t + seed) % 10 end
  local tensors = { embedding = drawn.matrix(seed + 50, 10, 8), centroid = { drawn.matrix(seed + 90, E, 8) } }
  local stage_2 = eval("distilled-router", { token_ids = ids }, tensors, 1)
  local stage_1 = eval("softmax-top-k", { logits = drawn.matrix(seed, T, E) }, nil, 1)
  for t = 1, T do
    local before = first[ids[t]]
    fixed = fixed and (not before or stage_2.experts[before] == stage_2.experts[t])
    moved = moved or (before and stage_1.experts[before] ~= stage_1.experts[t])
    first[ids[t]] = before or t
  end
  return fixed and moved
end)

shape("Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers",
      "experts run scale with k = 1, 2, 8 of a gate that is random, and is skewed", "S", function(seed)
  local hidden, skewed = drawn.matrix(seed, T, H), true
  for _, k in ipairs { 1, 2, 8 } do
    local r = eval("random-gate", { hidden = hidden }, nil, k)
    if #r.experts ~= k * T then return false end
    skewed = skewed and r.max_vio > 0
  end
  return skewed
end)
