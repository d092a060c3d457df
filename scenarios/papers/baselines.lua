-- SPDX-License-Identifier: Apache-2.0
--
-- The field's baselines, each against its definition: contiguous and round-robin placement, recorded routes, and one
-- all-to-all for dispatch and one for combine. No paper's figure is met here.
local moe = require "moelab"
local paper = require "lib.paper"

local E, D = 12, 4
local load = { {}, {} }
for l = 1, 2 do
  for e = 1, E do load[l][e] = 10 * e + l end
end

local function misplaced(policy, device_of)
  local r = moe.eval("placement", policy, { input = { load = load, replicas = E, groups = 1, nodes = 1, devices = D } })
  local n = 0
  for l = 1, 2 do
    for p = 1, E do
      if r.phy2dev[l][p] ~= device_of(r.phy2log[l][p]) then n = n + 1 end
    end
  end
  return n
end

local function claim(basis, metric, expected, found, tolerance, text)
  paper.claim { paper = text or "field baseline", metric = metric, published = expected, ours = found, class = "E",
                tolerance = tolerance, basis = basis }
end

claim("definition", "contiguous: experts not on device e * D / E", 0,
      misplaced("contiguous", function(e) return e * D // E end), 0)
claim("definition", "round-robin: experts not on device e mod D", 0,
      misplaced("round-robin", function(e) return e % D end), 0)

-- Uniform all-to-all: every one of N devices sends b bytes to each other one; a NIC carries (N - 1) b each way.
local N, rows, d_model = 8, 64, 1024
local bytes = {}
for s = 1, N do
  bytes[s] = {}
  for d = 1, N do bytes[s][d] = rows * d_model * 2 end
end
local flat = moe.eval("dispatch", "flat", { input = { bytes = bytes, machine = "star-50GBps", tier = "exact",
                                                      expert = { d_model = d_model, d_expert = 256 } } })
for _, phase in ipairs(flat.phases) do
  if phase.phase == "dispatch_a2a" then
    claim("closed form", "flat: uniform dispatch on 8 x 50 GB/s (us)",
          ((N - 1) * rows * d_model * 2 / 50e9 + 500e-9) * 1e6, phase.seconds * 1e6, 1e-9)
  end
end

-- The shipped trace's experts are the top-k of its logits, so choosing again gives what was recorded.
local runs = moe.experiment {
  name = "replay against top-k", machine = moe.machine "star-50GBps" { nodes = 4 }, tier = "bound",
  model = moe.model "tiny-moe" { precision = "bf16" },
  workload = moe.decode { trace = "traces/tiny-moe", batch_per_device = 16, steps = 8 },
  router = moe.each { "replay", "softmax-top-k" },
}:run()
claim("definition", "replay: decisions that differ from softmax top-k on the logits", 0,
      runs.list[1].decisions == runs.list[2].decisions and 0 or 1, 0, "recorded routes (field; also routing-replay)")

-- Rollout routing replay: the experts of an earlier pass, here none of the best by the later pass's logits, with weights
-- of the later pass.
local text = "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers"
local logits, recorded = {}, { offsets = { 0 }, experts = {}, weights = {} }
for t = 1, 64 do
  logits[t] = {}
  for e = 0, E - 1 do logits[t][e + 1] = math.sin(7 * t + 3 * e) end
  local order = {}
  for e = 0, E - 1 do order[e + 1] = e end
  table.sort(order, function(a, b) return logits[t][a + 1] < logits[t][b + 1] end)
  for i = 1, 2 do
    table.insert(recorded.experts, order[i])
    table.insert(recorded.weights, 0.5)
  end
  recorded.offsets[t + 1] = 2 * t
end
local replayed = moe.eval("router", "routing-replay", { input = { logits = logits, recorded = recorded } })
local others, largest = 0, 0
for t = 1, 64 do
  local sum = 0
  for i = 2 * t - 1, 2 * t do sum = sum + math.exp(logits[t][recorded.experts[i] + 1]) end
  for i = 2 * t - 1, 2 * t do
    local expected = math.exp(logits[t][recorded.experts[i] + 1]) / sum
    others = others + (replayed.experts[i] == recorded.experts[i] and 0 or 1)
    largest = math.max(largest, math.abs(replayed.weights[i] - expected))
  end
end
claim("definition", "routing-replay: experts other than the recorded ones", 0, others, 0, text)
claim("closed form", "routing-replay: largest difference from a softmax over them", 0, largest, 1e-6, text)
