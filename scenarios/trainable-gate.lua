-- SPDX-License-Identifier: Apache-2.0
--
-- What happens to a gate while it learns: thousands of steps of SGD against a teacher, with nothing that balances, with
-- losses beside the task's, with biases, with prices that an integer program sets (doc/training.md). Experts that are
-- chosen more learn faster and are chosen more; tokens' popularity drifts meanwhile.
--   1. Which balancer keeps loads even, from when on, and what does it cost the task?
--   2. The same on hidden states that a small MoE language model learned (scenarios/traces/tiny-moe).
--   3. Do other gates collapse less?
-- Step times are of no interest here: the machine is there because experts have to be somewhere.
local moe = require "moelab"

local function study(t)
  local d_model = t.d_model or 64
  return moe.experiment {
    name = t.name, tier = "bound", allow_extrapolation = true, seed = t.seed or moe.each { 1, 2 },
    model = { layers = t.layers or 1, experts = 32, top_k = 4, d_model = d_model, d_expert = d_model, n_heads = 1,
              d_head = d_model },
    machine = moe.machine "dgx-h100" { nodes = 1 },
    router = "softmax-top-k",
    balancer = t.balancer or {},
    workload = moe.gate { trace = t.trace, gate = t.gate, noise = t.noise, tokens_per_device = t.tokens or 128,
                          steps = t.steps, context = 0 },
  }:run()
end

local balancers = moe.each {
  moe.label("none", {}),
  moe.label("Switch loss, 0.01", { moe.plugin("aux-loss-balancer", { kind = "switch", weight = 0.01 }) }),
  moe.label("Switch loss, 0.1", { moe.plugin("aux-loss-balancer", { kind = "switch", weight = 0.1 }) }),
  moe.label("loss-free, u = 0.001", { moe.plugin("loss-free-bias", { rate = 0.001 }) }),
  moe.label("loss-free, u = 0.01", { moe.plugin("loss-free-bias", { rate = 0.01 }) }),
  moe.label("BIP", { "bip-balancer" }),
}
local figures = { "max_vio", "max_vio_global", "load_entropy", "task_loss", "aux_loss", "task_loss.min" }

local made = study { name = "balancers", balancer = balancers, steps = 3000 }
made:table { title = "1. Drifting clusters, 3000 steps: means over all steps", rows = "balancer", value = figures,
             file = "balancers.txt" }
made:curve { y = "max_vio", group = "balancer", file = "max-vio.png", ylabel = "MaxVio of a batch", logx = true,
             title = "Who balances, and from when on? (32 experts, top 4, 1024 tokens a step)" }
made:curve { y = "task_loss", group = "balancer", file = "learning.png", ylabel = "error / mean square of the target",
             logx = true, logy = true, title = "What does balance cost the task?" }

local learnt = study { name = "trace", balancer = balancers, steps = 1000, trace = "traces/tiny-moe", d_model = 128,
                       noise = 0.1, seed = moe.each { 1 } }
learnt:table { title = "2. Hidden states of tiny-moe's first layer, 1000 steps", rows = "balancer", value = figures,
               file = "trace.txt" }
learnt:curve { y = "max_vio", group = "balancer", file = "trace-max-vio.png", ylabel = "MaxVio of a batch", logx = true,
               title = "On hidden states that a model learned (tiny-moe, layer 0)" }

local gates = study { name = "gates", gate = moe.each { "linear", "cosine", "gru" }, layers = 2, steps = 1000 }
gates:table { title = "3. Gates without a balancer, two layers, 1000 steps", rows = "workload.gate", value = figures,
              file = "gates.txt" }
gates:curve { y = "max_vio", group = "workload.gate", file = "gates-max-vio.png", ylabel = "MaxVio of a batch",
              logx = true, title = "Do other gates collapse less? (no balancer)" }
