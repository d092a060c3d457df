-- SPDX-License-Identifier: Apache-2.0
--
-- Routers that give tokens different numbers of experts: what moves the number, and which way, on five inputs each.
-- The abstracts print no figure that follows from routing alone, so orderings are all that is asserted.
local moe = require "moelab"
local paper = require "lib.paper"

local n_tokens, n_experts, n_inputs = 256, 16, 5

-- Sines of incommensurate steps, sharper from token to token: the first gates are unsure, the last are certain.
local function logits(input)
  local rows = {}
  for t = 1, n_tokens do
    rows[t] = {}
    for e = 1, n_experts do
      rows[t][e] = 5 * t / n_tokens * math.sin(12.9898 * t + 78.233 * e + 3.7 * input)
    end
  end
  return rows
end

-- Experts per token from the first to the last token, and overall.
local function count(name, input, set, first, last)
  local r = moe.eval("router", name, { input = input, top_k = 4, set = set })
  first, last = first or 1, last or n_tokens
  return (r.offsets[last + 1] - r.offsets[first]) / (last - first + 1)
end

-- Never rises, and ends lower: thresholds that lie below all gates of an input change nothing.
local function falls(...)
  local values = { ... }
  for i = 2, #values do
    if values[i] > values[i - 1] then return 0 end
  end
  return values[#values] < values[1] and 1 or 0
end

-- holds(given, input): 1 where the ordering is seen
local function shape(title, metric, holds)
  local seen = 0
  for input = 1, n_inputs do seen = seen + holds({ logits = logits(input) }, input) end
  paper.claim { paper = title, metric = metric .. ": inputs of 5", published = n_inputs, ours = seen, class = "S",
                tolerance = 0, basis = "definition" }
end

local half = n_tokens // 2

shape("Expert Race: A Flexible Routing Strategy for Scaling Diffusion Transformer with Mixture of Experts",
      "4 experts per token on average, and not the same for unsure and certain ones", function(given)
  local unsure, certain = count("expert-race", given, {}, 1, half), count("expert-race", given, {}, half + 1)
  return count("expert-race", given, {}) == 4 and unsure ~= certain and 1 or 0
end)

shape("DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism",
      "unsure tokens get more experts than certain ones", function(given)
  return falls(count("entropy-hybrid", given, {}, 1, half), count("entropy-hybrid", given, {}, half + 1))
end)

shape("GW-MoE: Resolving Uncertainty in MoE Router with Global Workspace Theory",
      "load falls as the threshold rises, to top-k at 1", function(given)
  local n = {}
  for i, threshold in ipairs { 0, 0.5, 0.7, 0.9, 1 } do
    n[i] = count("entropy-hybrid", given, { rule = "broadcast", threshold = threshold })
  end
  return n[1] == n_experts and n[5] == 4 and falls(table.unpack(n)) or 0
end)

shape("DA-MoE: Towards Dynamic Expert Allocation for Mixture-of-Experts Models",
      "less important tokens get fewer experts", function(given)
  given.importance = {}
  for t = 1, n_tokens do given.importance[t] = 1 - (t - 1) / n_tokens end
  return falls(count("importance-k", given, {}, 1, half), count("importance-k", given, {}),
               count("importance-k", given, {}, half + 1))
end)

shape("DynaMoE: Dynamic Token-Level Expert Activation with Layer-Wise Adaptive Capacity for Mixture-of-Experts " ..
      "Neural Networks", "experts per token fall as the threshold rises", function(given)
  local n = {}
  for i, threshold in ipairs { 0, 0.05, 0.1, 0.2, 0.4 } do
    n[i] = count("dynamic-k", given, { threshold = threshold })
  end
  return n[1] == 4 and falls(table.unpack(n)) or 0
end)

shape("MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic Expert Skipping",
      "more is skipped at higher thresholds, and in the modality with the higher one", function(given)
  given.labels = {}
  for t = 1, n_tokens do given.labels[t] = t <= half and 0 or 1 end
  local n = {}
  for i, threshold in ipairs { 0, 0.05, 0.1, 0.2 } do
    n[i] = count("expert-skipping", given, { threshold = threshold })
  end
  local same, stricter = { threshold = 0.05 }, { threshold = 0.05, other = 0.2 }
  local other = falls(count("expert-skipping", given, same, half + 1),
                      count("expert-skipping", given, stricter, half + 1))
  local text = count("expert-skipping", given, same, 1, half) == count("expert-skipping", given, stricter, 1, half)
  return falls(table.unpack(n)) == 1 and other == 1 and text and 1 or 0
end)
