-- SPDX-License-Identifier: Apache-2.0
--
-- DeepSeek's Expert Parallelism Load Balancer against the example in its README: 2 layers of 12 experts in 4 groups,
-- 16 replicas on 8 devices of 2 nodes. The physical-to-logical map is the README's, figure by figure.
local moe = require "moelab"
local paper = require "lib.paper"

local load = { { 90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86 }, { 20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27 } }
local published = { { 5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1 }, { 7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1 } }

local ours = moe.eval("placement", "eplb", {
  input = { load = load, replicas = 16, groups = 4, nodes = 2, devices = 8 },
})

local function claim(basis, metric, expected, found, tolerance)
  paper.claim { paper = "DeepSeek EPLB (field standard)", metric = metric, published = expected, ours = found,
                class = "E", tolerance = tolerance, basis = basis }
end

for l = 1, 2 do
  local differ = 0
  for p = 1, 16 do
    if ours.phy2log[l][p] ~= published[l][p] then differ = differ + 1 end
  end
  claim("published", "layer " .. l - 1 .. ": replicas that differ from the README", 0, differ, 0)
end
-- Not printed there, but it follows from the README's map: every replica carries its expert's load divided by the
-- expert's replicas.
claim("closed form", "layer 0: largest / mean device load", 1.2081, 1 / ours.balancedness[1], 1e-4)
claim("closed form", "layer 1: largest / mean device load", 1.2422, 1 / ours.balancedness[2], 1e-4)
