-- SPDX-License-Identifier: Apache-2.0
--
-- Switch Transformers' capacity: each expert keeps (tokens / experts) x capacity factor tokens, the rest is dropped.
-- With top-1 routes of known loads T f_i the dropped share is sum_i max(0, T f_i - C) / T exactly. The loads are ours:
-- the papers print none, so this checks the rule and meets no published figure.
local moe = require "moelab"
local paper = require "lib.paper"

local tokens = { 400, 200, 100, 100, 80, 60, 40, 20 } -- per expert: T = 1000, E = 8

local logits = {}
for expert, n in ipairs(tokens) do
  for _ = 1, n do
    local row = {}
    for e = 1, #tokens do row[e] = e == expert and 2.0 or 0.0 end
    logits[#logits + 1] = row
  end
end

for _, factor in ipairs { 1.0, 1.25, 2.0 } do
  local capacity = math.ceil(factor * #logits / #tokens)
  local dropped = 0
  for _, n in ipairs(tokens) do dropped = dropped + math.max(0, n - capacity) end
  for _, by in ipairs { "score", "position" } do
    local r = moe.eval("balancer", "capacity", {
      input = { logits = logits, capacity_factor = factor }, top_k = 1, set = { drop = by },
    })
    paper.claim {
      paper = by == "score" and "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity"
        or "GShard/Switch capacity (field standard)",
      metric = string.format("dropped tokens of 1000, factor %g, by %s", factor, by),
      published = dropped, ours = r.dropped, class = "E", tolerance = 0, basis = "closed form",
    }
  end
end
