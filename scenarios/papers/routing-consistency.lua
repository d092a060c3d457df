-- SPDX-License-Identifier: Apache-2.0
--
-- Local routing consistency of unrelated routing: with every token's experts drawn independently, SRP follows a
-- binomial law in the segment length m and k/E: with f ~ binomial(m, p), p = k/E, it is the largest over a of
-- 2 E[f; f >= a] / (m P(f >= a) + m p). The paper defines SRP; this floor of it is worked out from the definition, and
-- none of the paper's own figures, which are of models, is met here. Measured on routing made up by moe.synth with
-- nothing but chance in it.
local moe = require "moelab"
local paper = require "lib.paper"

local cases = { -- SRP in percent
  { top_k = 4, experts = 16, floor = { [4] = 56.49, [16] = 45.20, [64] = 40.91, [256] = 40.05 } },
  { top_k = 4, experts = 32, floor = { [4] = 46.40, [16] = 32.14, [64] = 25.26, [256] = 22.94 } },
}

for _, case in ipairs(cases) do
  local trace = moe.synth { layers = 2, experts = case.experts, top_k = case.top_k, requests = 40,
                            tokens_per_request = 512, skew = 0, stickiness = 0, affinity = 0 }
  for _, m in ipairs { 4, 16, 64, 256 } do
    local r = moe.eval("metric", "srp", { trace = trace, segment = m })
    paper.claim {
      paper = "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models",
      metric = string.format("SRP floor, k/E = 1/%d, m = %d (%%)", case.experts // case.top_k, m),
      published = case.floor[m], ours = 100 * r.value, class = "E", basis = "closed form",
      tolerance = 0.3 / case.floor[m], -- 0.3 points: what chance leaves open
    }
  end
end
