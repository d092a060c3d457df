-- SPDX-License-Identifier: Apache-2.0
--
-- DeepEP's published kernels on H800 nodes: low latency (every row a message of its own, dispatch flat) and normal
-- (once per node over the network, passed on over NVLink, dispatch node-dedup). Rates are what its documents count.
local moe = require "moelab"
local paper = require "lib.paper"

for _, row in ipairs(moe.validate "deepep-h800") do
  paper.claim { paper = "DeepEP (field standard)", metric = row.row .. ", " .. row.unit, published = row.measured,
                ours = row.modelled, class = "A", tolerance = 0.1, basis = "published" }
end
