-- SPDX-License-Identifier: Apache-2.0
--
-- Routers whose result is not k experts per token: mixes of tokens, merged experts, tokens that leave a layer out. 64
-- tokens of 4 requests, 8 experts. What follows from the rules alone; no speed-up and no quality is reproduced.
local moe = require "moelab"
local paper = require "lib.paper"

local T, E, R = 64, 8, 4

local function batch(input)
  local b = { logits = {}, requests = {}, positions = {}, labels = {}, importance = {} }
  for t = 1, T do
    b.logits[t] = {}
    for e = 1, E do b.logits[t][e] = 6 * math.sin(12.9898 * t + 78.233 * e + 3.7 * input) end
    b.requests[t], b.positions[t], b.labels[t] = (t - 1) % R, (t - 1) // R, (t - 1) % R // 2
    b.importance[t] = 0.5 + 0.5 * math.sin(3 * t + input)
  end
  return b
end

local function route(name, set, tensors, input)
  local b = batch(input or 1)
  b.tensors = tensors
  return moe.eval("router", name, { input = b, top_k = 1, set = set or {} })
end

local function claim(title, metric, published, ours, class, basis, tolerance)
  paper.claim { paper = title, metric = metric, published = published, ours = ours, class = class, basis = basis,
                tolerance = tolerance or 0 }
end

-- ---- mixes -----------------------------------------------------------------------------------------------------------

local title = "Mixture of Tokens: Efficient LLMs through Cross-Example Aggregation"
local mixed = route("soft-moe", { group = "position", combine = "same" })
claim(title, "largest / mean rows per expert - 1", 0, mixed.max_vio, "E", "closed form")
claim(title, "rows per expert: one mix for each position of 4 requests", T // R, mixed.load[1], "E", "closed form")
local into = {}
for i, slot in ipairs(mixed.slots) do into[slot + 1] = (into[slot + 1] or 0) + mixed.weights[i] end
local worst = 0
for _, sum in ipairs(into) do worst = math.max(worst, math.abs(sum - 1)) end
claim(title, "shares of a mix that do not add up to 1", 0, worst < 1e-6 and 0 or worst, "E", "definition")

-- Tokens that no expert sees: none where all are mixed, some where experts choose as many rows.
local seen = 0
for input = 1, 5 do
  local soft = route("soft-moe", {}, nil, input)
  local chosen = route("expert-choice", { factor = 1 }, nil, input)
  local missed, left_out = 0, 0
  for t = 1, T do
    left_out = left_out + (chosen.offsets[t + 1] == chosen.offsets[t] and 1 or 0)
    local most = 0
    for i = soft.offsets[t] + 1, soft.offsets[t + 1] do most = math.max(most, soft.weights[i]) end
    missed = missed + (most > 0 and 0 or 1)
  end
  seen = seen + (missed == 0 and left_out > 0 and 1 or 0)
end
claim("Routers in Vision Mixture of Experts: An Empirical Study",
      "soft leaves out no token, expert choice some: inputs of 5", 5, seen, "S", "published")

-- ---- merged experts --------------------------------------------------------------------------------------------------

local merged = route("soft-merge")
title = "Soft Merging of Experts with Adaptive Routing"
claim(title, "experts that compute a token, of 8", 1, merged.experts_per_token, "A", "published")
claim(title, "merged experts for 4 requests", R, merged.n_slots, "A", "closed form")
local table_of_labels = { table = { { 0, 1, 2, 3, 4, 5, 6, 7 }, { 1, 1, 1, 1, 1, 1, 1, 1 } } }
for _, name in ipairs {
  "Multi-Head Adapter Routing for Cross-Task Generalization",
  "Mixture-of-Supernets: Improving Weight-Sharing Supernet Training with Architecture-Routed Mixture-of-Experts" } do
  claim(name, "experts that compute a token, of 8", 1, route("soft-merge", {}, table_of_labels).experts_per_token, "X",
        "published")
end

-- ---- depth -----------------------------------------------------------------------------------------------------------

local function depth(set, tensors)
  set.every = 1
  return route("mixture-of-depths", set, tensors)
end

claim("FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing",
      "share of tokens that go through a block of sparsity 0.25", 0.75,
      1 - depth({}, { shares = { 0.75 } }).skipped_experts, "X", "definition")
local tuned = depth { choice = "threshold", threshold = 0.5, halves = "attention" }
title = "Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth in Transformers"
claim(title, "experts of a token that leaves attention out", 1, tuned.experts_per_token, "X", "published")
local below = 0
for _, x in ipairs(batch(1).importance) do below = below + (x > 0.5 and 0 or 1) end
claim(title, "share of tokens that leave attention out", below / T, tuned.skipped_attention, "X", "definition", 1e-9)
