-- SPDX-License-Identifier: Apache-2.0
--
-- Balancers: how many experts LLEP sends, as published counts of whole tokens have it; what capacity drops, in closed
-- form; that biases and prices balance, over five seeds of a synthetic trace.
local moe = require "moelab"
local paper = require "lib.paper"

-- LLEP: a share f of the slots on h hot experts, 8 GPUs, what is over one each from the first.
local function hot_loads(n, h, f, slots)
  local load, hot = {}, math.floor(f * slots)
  for e = 0, n - 1 do
    local first, count, all = e < h and 0 or h, e < h and h or n - h, e < h and hot or slots - hot
    load[e + 1] = all // count + (e - first < all % count and 1 or 0)
  end
  return load
end
local llep = "Least-Loaded Expert Parallelism: Load Balancing An Imbalanced Mixture-of-Experts"
local models = { { "gpt-oss-120b", 128, 4, { 16, 18, 20, 20 } }, { "DeepSeek-V3", 256, 8, { 18, 20, 20, 20 } },
                 { "Kimi-K2", 384, 8, { 19, 20, 20, 20 } } }
for _, m in ipairs(models) do
  local name, n, k, counts = table.unpack(m)
  for i, f in ipairs { 0.30, 0.50, 0.80, 0.95 } do
    for _, h in ipairs { 1, 16 } do
      local slots = 8 * 32768 * k
      local r = moe.eval("balancer", "llep", { input = { load = hot_loads(n, h, f, slots), devices = 8 } })
      paper.claim { paper = llep, metric = string.format("%s: transfers, %d %% on %d experts", name, math.floor(100 * f + 0.5), h),
                    published = h == 1 and 7 or counts[i], ours = #r.transfers, class = "E", tolerance = 0,
                    basis = "closed form" }
      local most = 0
      for _, rows in ipairs(r.device_load) do most = math.max(most, rows) end
      if f == 0.95 then
        paper.claim { paper = llep, metric = string.format("%s: max / mean of GPUs, 95 %% on %d", name, h), published = 1,
                      ours = most * 8 / slots, class = "E", tolerance = 0, basis = "published" }
      end
    end
  end
end

-- Capacity-Aware Inference: the share dropped is sum of max(0, N_i - C) / sum of N_i, on one device.
local tokens = { 400, 200, 100, 100, 80, 60, 40, 20 }
local logits = {}
for expert, n in ipairs(tokens) do
  for _ = 1, n do
    local row = {}
    for e = 1, #tokens do row[e] = e == expert and 2.0 or 0.1 * e end
    logits[#logits + 1] = row
  end
end
for _, gamma in ipairs { 1.0, 1.5, 2.0 } do
  local dropped = 0
  for _, n in ipairs(tokens) do dropped = dropped + math.max(0, n - math.ceil(gamma * #logits / #tokens)) end
  local r = moe.eval("balancer", "capacity-aware", { input = { logits = logits }, top_k = 1, set = { factor = gamma } })
  paper.claim { paper = "Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts",
                metric = string.format("dropped of 1000 at gamma %g", gamma), published = dropped, ours = r.dropped,
                class = "E", tolerance = 0, basis = "closed form" }
end

-- Rectification: with room for all in sum, nothing is dropped and nothing is padding.
local r = moe.eval("balancer", "rectify-router", { input = { logits = logits }, top_k = 1, set = { factor = 1 } })
paper.claim { paper = "Turn Waste into Worth: Rectifying Top-k Router of MoE",
              metric = "routes of 1000 with both rectifications, factor 1", published = 1000, ours = #r.routes.experts,
              class = "E", tolerance = 0, basis = "closed form" }

-- Biases and prices, on routes that are skewed: five seeds.
local function max_vio(seed, balancer, steps, metric)
  local runs = moe.experiment {
    name = "balance", seed = seed, tier = "bound", allow_extrapolation = true,
    model = { layers = 2, experts = 16, top_k = 2, d_model = 256, d_expert = 128, n_heads = 4, d_head = 64 },
    machine = moe.machine "dgx-h100" { nodes = 1 }, router = "group-limited-top-k", balancer = balancer,
    workload = moe.prefill { trace = moe.synth { layers = 2, experts = 16, top_k = 2, requests = 32,
                                                     tokens_per_request = 400, skew = 0.8, logits = true, seed = seed },
                              tokens_per_device = 64, steps = steps, context = 64 },
  }:run()
  return runs.list[1].metrics[metric].mean
end

local loss_free = "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts"
local bias = moe.plugin("loss-free-bias", { rate = 0.01 })
local globally, at_once = 0, 0
for seed = 1, 5 do
  if max_vio(seed, bias, 40, "max_vio_global") < max_vio(seed, {}, 40, "max_vio_global") / 2 then globally = globally + 1 end
  if max_vio(seed, "bip-balancer", 1, "max_vio") < max_vio(seed, bias, 1, "max_vio") / 2 then at_once = at_once + 1 end
end
paper.claim { paper = loss_free, metric = "of 5 seeds, those whose MaxVio_global falls below a half in 40 steps",
              published = 5, ours = globally, class = "S", tolerance = 0, basis = "expectation" }
paper.claim { paper = "Binary-Integer-Programming Based Algorithm for Expert Load Balancing in Mixture-of-Experts Models",
              metric = "of 5 seeds, those whose first batch has half the MaxVio of biases", published = 5, ours = at_once,
              class = "S", tolerance = 0, basis = "expectation" }
