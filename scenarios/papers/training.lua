-- SPDX-License-Identifier: Apache-2.0
--
-- Balancers of gates that learn (doc/training.md): orderings that papers report of training, over five seeds each. A
-- student of 16 linear experts learns from a teacher on tokens of a drifting mixture; nothing here is a language model,
-- so no figure of a paper is met, only who is evener than whom, and when.
local moe = require "moelab"
local paper = require "lib.paper"

local SEEDS = 5

local function train(t)
  return moe.experiment {
    name = t.name, tier = "bound", allow_extrapolation = true, seed = moe.each { 1, 2, 3, 4, 5 },
    model = { layers = 1, experts = 16, top_k = t.top_k or 2, d_model = 32, d_expert = 32, n_heads = 1, d_head = 32 },
    machine = moe.machine "dgx-h100" { nodes = 1 }, router = t.router, balancer = t.balancer,
    workload = moe.gate { tokens_per_device = 64, steps = t.steps, context = 0, labels = t.labels, spread = t.spread },
  }:run()
end

local function aux(kind, weight, more)
  local params = { kind = kind, weight = weight }
  for k, v in pairs(more or {}) do params[k] = v end
  return { moe.plugin("aux-loss-balancer", params) }
end

-- A run's mean of a figure over some of its steps.
local function mean(run, name, first, last)
  local sum = 0.0
  for i = first, last do sum = sum + run.curve[name][i] end
  return sum / (last - first + 1)
end

-- Seeds of which holds(run of balancer a, run of balancer b).
local function count(runs, a, b, holds)
  local n = 0
  for seed = 1, SEEDS do
    local one = runs:filter { balancer = a, seed = seed }.list[1]
    local other = runs:filter { balancer = b, seed = seed }.list[1]
    if one.status == "ok" and other.status == "ok" and holds(one, other) then n = n + 1 end
  end
  return n
end

local function claim(name, metric, ours, basis)
  paper.claim { paper = name, metric = "of 5 seeds, those " .. metric, published = SEEDS, ours = ours, class = "S",
                tolerance = 0, basis = basis or "expectation" }
end

-- Biases and prices, sigmoid gates. The papers' own settings: u = 0.001, losses of weight 0.001 and 0.1.
local sigmoid = train {
  name = "biases and prices", router = "group-limited-top-k", steps = 600,
  balancer = moe.each {
    moe.label("none", {}), moe.label("loss 0.001", aux("switch", 0.001)), moe.label("loss 0.1", aux("switch", 0.1)),
    moe.label("u 0.0001", { moe.plugin("loss-free-bias", { rate = 1e-4 }) }),
    moe.label("u 0.001", { moe.plugin("loss-free-bias", { rate = 1e-3 }) }),
    moe.label("u 0.1", { moe.plugin("loss-free-bias", { rate = 0.1 }) }),
    moe.label("prices", { "bip-balancer" }),
  },
}
local function globally(a, b) return moe.value(a, "max_vio_global") < moe.value(b, "max_vio_global") end
local function on_average(a, b) return moe.value(a, "max_vio") < moe.value(b, "max_vio") end
local function at_worst(a, b) return moe.value(a, "max_vio.max") < moe.value(b, "max_vio.max") / 2 end

local loss_free = "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts"
claim(loss_free, "whose MaxVio_global is lower with biases than with a loss of weight 0.001",
      count(sigmoid, "u 0.001", "loss 0.001", globally), "published")
claim(loss_free, "whose steps 101 to 300 are evener with u = 0.001 than with 0.0001",
      count(sigmoid, "u 0.001", "u 0.0001", function(a, b)
        return mean(a, "max_vio", 101, 300) < mean(b, "max_vio", 101, 300)
      end), "published")
claim(loss_free, "whose last 200 steps are evener with u = 0.001 than with 0.1",
      count(sigmoid, "u 0.001", "u 0.1", function(a, b)
        return mean(a, "max_vio", 401, 600) < mean(b, "max_vio", 401, 600)
      end))

local bip = "Binary-Integer-Programming Based Algorithm for Expert Load Balancing in Mixture-of-Experts Models"
for _, other in ipairs { "u 0.001", "loss 0.1" } do
  claim(bip, "whose steps are evener on average with prices than with " .. other,
        count(sigmoid, "prices", other, on_average), "published")
  claim(bip, "whose worst step has half the MaxVio of that with " .. other,
        count(sigmoid, "prices", other, at_worst))
end

-- One expert per token, tokens of two modalities: losses for each.
local modal = train {
  name = "modalities", router = moe.plugin("softmax-top-k", { renormalise = false }), top_k = 1, labels = 2,
  spread = 0.5, steps = 500, balancer = moe.each { moe.label("none", {}), moe.label("per label", aux("label", 1)) },
}
claim("Multimodal Contrastive Learning with LIMoE: the Language-Image Mixture of Experts",
      "whose tokens are on more experts (entropy of loads) with losses per modality",
      count(modal, "per label", "none", function(a, b)
        return mean(a, "load_entropy", 401, 500) > 1.5 * mean(b, "load_entropy", 401, 500)
      end))

-- As many experts as it takes to reach a probability: sharp gates take few.
local sharp = train {
  name = "priors", router = moe.plugin("top-p", { p = 0.6 }), steps = 500,
  balancer = moe.each {
    moe.label("none", {}), moe.label("importance", aux("importance", 0.1)),
    moe.label("prior 0.1", aux("dirichlet", 1, { concentration = 0.1 })),
    moe.label("prior 1", aux("dirichlet", 1, { concentration = 1 })),
  },
}
local function last(name, factor)
  return function(a, b) return mean(a, name, 401, 500) < factor * mean(b, name, 401, 500) end
end
local dirichlet = "Dirichlet-Prior Shaping: Guiding Expert Specialization in Upcycled MoEs"
claim(dirichlet, "whose gates are sharper (top-p takes fewer experts) with a prior of 0.1 than of 1",
      count(sharp, "prior 0.1", "prior 1", last("experts_per_token", 0.75)), "published")
claim(dirichlet, "whose loads are evener with a symmetric prior of 1 than without",
      count(sharp, "prior 1", "none", last("load_cv", 0.5)), "published")
claim("Sparsely-gated Mixture-of-Expert Layers for CNN Interpretability",
      "whose loads are evener with the importance loss than without",
      count(sharp, "importance", "none", last("load_cv", 0.5)))
