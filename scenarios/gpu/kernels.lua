-- SPDX-License-Identifier: Apache-2.0
--
-- Kernels that move rows against their bytes, over tokens of width 4096: moelab run scenarios/gpu/kernels.lua. A gate is
-- a norm, a small product and top-k; what top-k does alone, these with 65,536 tokens, and what copies reach,
-- `moelab calibrate --gpu` says. The simulation reads a token before unpermute, in the norm.
local moe = require "moelab"

local d_model, top_k, experts = 4096, 4, 64
-- Bytes of a token in bf16. permute: each row read and written. unpermute: outputs and the token read, the token
-- written. gate: the norm's four rows, the product's one; logits written and read.
local bytes = { permute_s = 2 * 2 * d_model * top_k, unpermute_s = 2 * d_model * (top_k + 2),
                gate_s = 5 * 2 * d_model + 2 * 4 * experts }

local runs = moe.experiment {
  name          = "kernels",
  model         = { layers = 1, experts = experts, top_k = top_k, d_model = d_model, d_expert = 64, n_heads = 2,
                    d_head = 64, precision = "bf16" },
  machine       = moe.machine "dgx-h100" { nodes = 1, devices = 1 },
  executor      = moe.each { "cuda", "flow" },
  virtual_ranks = true,
  repetitions   = 3,
  workload      = moe.prefill { trace = moe.synth { layers = 1, experts = experts, top_k = top_k, requests = 256,
                                                    tokens_per_request = 256 },
                                tokens_per_device = moe.each { 512, 1024, 2048, 4096 }, steps = 1, context = 16,
                                profile = 0 },
}:run()
runs:table {
  title = "How long do kernels of rows take?",
  rows = { "workload.tokens_per_device", "executor" }, value = { "permute_s", "unpermute_s", "gate_s" },
  file = "kernels.txt",
}
for _, kernel in ipairs { "permute", "unpermute", "gate" } do
  local figure = kernel .. "_s"
  runs:plot {
    title = kernel .. ": bytes that it has to move, over its time", x = "workload.tokens_per_device",
    y = function(run)
      local seconds = moe.value(run, figure)
      return seconds and tonumber(run.axes["workload.tokens_per_device"]) * bytes[figure] / seconds / 1e9
    end,
    group = "executor", kind = "lines", logx = true, xlabel = "tokens", ylabel = "GB/s", file = kernel .. ".png",
  }
end
