-- SPDX-License-Identifier: Apache-2.0
--
-- What experts' products reach over rows per expert, measured and simulated: moelab run scenarios/gpu/gemm.lua. Every
-- token goes to all eight experts, so that each has as many rows as there are tokens. The simulation's curve is that of
-- the machine file: --set machine=gpu-localhost.lua has the one that `moelab calibrate --gpu` wrote.
local moe = require "moelab"

local layers, experts, d_model, d_expert = 2, 8, 2048, 768
local function rate(run)
  local tokens, seconds = tonumber(run.axes["workload.batch_per_device"]), moe.value(run, "experts_s")
  return seconds and layers * experts * 6 * tokens * d_model * d_expert / seconds / 1e12
end

local runs = moe.experiment {
  name          = "gemm",
  model         = { layers = layers, experts = experts, top_k = experts, d_model = d_model, d_expert = d_expert,
                    n_heads = 2, d_head = 64, precision = "bf16" },
  machine       = moe.machine "dgx-h100" { nodes = 1, devices = 1 },
  executor      = moe.each { "cuda", "flow" },
  virtual_ranks = true,
  workload      = moe.decode { trace = moe.synth { layers = layers, experts = experts, top_k = experts,
                                                   requests = 2048, tokens_per_request = 4 },
                               batch_per_device = moe.each { 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048 },
                               steps = 2, context = 16, profile = 0 },
}:run()
runs:table {
  title = "How long do eight experts take, over rows of each?",
  rows = { "workload.batch_per_device" }, cols = "executor", value = "experts_s", file = "gemm.txt",
}
runs:plot {
  title = "Experts' products in bf16, 2048 x 768", x = "workload.batch_per_device", y = rate, group = "executor",
  kind = "lines", logx = true, xlabel = "rows per expert", ylabel = "TFLOP/s, activation included", file = "gemm.png",
}
