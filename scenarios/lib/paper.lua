-- SPDX-License-Identifier: Apache-2.0
--
-- One row of published against ours. The verdict is computed by `moelab reproduce`, never here.
local moe = require "moelab"

local classes = { E = "exact", A = "analytic", S = "shape", X = "not claimed" }
local paper = {}

--- paper.claim {
---   paper      the catalogue's text, verbatim      metric     what is compared, with its unit
---   published  the paper's figure (or a closed form of it), ours: what moelab computed
---   class      E, A, S or X                        tolerance  largest |error|, relative (absolute if published is 0)
--- }
function paper.claim(row)
  for _, key in ipairs { "paper", "metric", "class" } do
    if type(row[key]) ~= "string" then error("paper.claim: " .. key .. ": expected a string", 2) end
  end
  for _, key in ipairs { "published", "ours", "tolerance" } do
    if type(row[key]) ~= "number" then error("paper.claim: " .. key .. ": expected a number", 2) end
  end
  if not classes[row.class] then error("paper.claim: class: expected E, A, S or X, found " .. row.class, 2) end
  moe.claim { paper = row.paper, metric = row.metric, published = row.published, ours = row.ours, class = row.class,
              tolerance = row.tolerance }
end

return paper
