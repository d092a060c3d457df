-- SPDX-License-Identifier: Apache-2.0
--
-- One row of published against ours. The verdict is computed by `moelab reproduce`, never here.
local moe = require "moelab"

local classes = { E = "exact", A = "analytic", S = "shape", X = "not claimed" }
local bases = { published = 1, ["closed form"] = 1, definition = 1, ["reference code"] = 1, expectation = 1 }
local paper = {}

--- paper.claim {
---   paper      the catalogue's text, verbatim      metric     what is compared, with its unit
---   published  the figure to meet                  ours       what moelab computed
---   class      E, A, S or X                        tolerance  largest |error|, relative (absolute if published is 0)
---   basis      where `published` is from:
---     "published"       printed by the authors, in their paper or their repository's documents
---     "closed form"     a formula worked out here or in the field; no paper prints the figure
---     "definition"      what the mechanism is by definition
---     "reference code"  what the authors' program gives on the same input
---     "expectation"     what we expect and nobody has published
--- }
function paper.claim(row)
  for _, key in ipairs { "paper", "metric", "class", "basis" } do
    if type(row[key]) ~= "string" then error("paper.claim: " .. key .. ": expected a string", 2) end
  end
  for _, key in ipairs { "published", "ours", "tolerance" } do
    if type(row[key]) ~= "number" then error("paper.claim: " .. key .. ": expected a number", 2) end
  end
  if not classes[row.class] then error("paper.claim: class: expected E, A, S or X, found " .. row.class, 2) end
  if not bases[row.basis] then
    error("paper.claim: basis: expected published, closed form, definition, reference code or expectation, found " ..
          row.basis, 2)
  end
  moe.claim { paper = row.paper, metric = row.metric, published = row.published, ours = row.ours, class = row.class,
              tolerance = row.tolerance, basis = row.basis }
end

return paper
