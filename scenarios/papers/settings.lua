-- SPDX-License-Identifier: Apache-2.0
--
-- Papers whose routing is a setting of a router that is there, and of whose results nothing is claimed: that the
-- setting routes, and how many experts a token gets.
local moe = require "moelab"
local paper = require "lib.paper"
local drawn = require "lib.drawn"

local T, E, H, K = 48, 8, 6, 2
local function each(n, value)
  local list = {}
  for t = 1, n do list[t] = value(t) end
  return list
end
local requests = each(T, function(t) return (t - 1) // 12 end)

local function show(title, router, set, expected, more)
  local given = { logits = drawn.matrix(1, T, E, 2), requests = requests }
  for key, value in pairs(more or {}) do given[key] = value end
  local r = moe.eval("router", router, { input = given, top_k = K, set = set })
  paper.claim { paper = title, metric = "experts per token", published = expected, ours = #r.experts / T, class = "X",
                tolerance = 0, basis = "definition" }
end

-- Experts choose tokens; the factor shrinks while it is trained.
show("Nucleus-Image: Sparse MoE for Image Generation", "expert-choice", { factor = 2 }, 2)
-- A frozen generator makes the gate's weights: a linear gate once they are made.
show("HyperRouter: Towards Efficient Training and Inference of Sparse Mixture of Experts", "softmax-top-k", {}, K)
-- Adapters beside experts whose routing stays.
show("Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities", "softmax-top-k", {}, K)
-- Beside shared experts; those of the model are below.
show("On DeepSeekMoE: Statistical Benefits of Shared Experts and Normalized Sigmoid Gating", "group-limited-top-k",
     { groups = 1, score = "sigmoid", renormalise = true }, K)

-- One choice for a whole request.
for _, title in ipairs {
  "$\\text{R}^2\\text{R}$: A Route-to-Rerank Post-Training Framework for Multi-Domain Decoder-Only Rerankers",
  "Dynamic Routing Between Experts: A Data-Efficient Approach to Continual Learning in Vision-Language Models",
  "Metis-HOME: Hybrid Optimized Mixture-of-Experts for Multimodal Reasoning",
  "Scope: Selective Cross-modal Orchestration of Visual Perception Experts",
} do
  show(title, "prompt-level-router", { top_k = 1 }, 1)
end
show("MoVA: Adapting Mixture of Vision Experts to Multimodal Context", "prompt-level-router", {}, K)

-- What a request is about joins what its tokens say.
local about = { labels = requests, tensors = { task = drawn.matrix(2, 4, 5), expert = { drawn.matrix(3, E, 5) } } }
show("Glider: Global and Local Instruction-Driven Expert Router", "global-local-router", {}, K, about)
show("SpeechMoE2: Mixture-of-Experts Model with Improved Routing", "global-local-router",
     { match = "dot", top_k = 1 }, 1, about)
show("Mol-MoE: Training Preference-Guided Routers for Molecule Generation", "global-local-router", { match = "dot" }, K,
     about)
show("Eliciting and Understanding Cross-Task Skills with Task-Level Mixture-of-Experts", "global-local-router",
     { match = "dot", strength = 1e6, top_k = 1 }, 1, about)

-- Logits with a bonus: found for a language, or by gradient steps on the text so far.
local bonus = { tensors = { bonus = drawn.matrix(4, 1, E) } }
show("Multilingual Routing in Mixture-of-Experts", "test-time-reroute", { choose = "best" }, K, bonus)
show("Rewiring Experts on the Fly:Continuous Rerouting for Better Online Adaptation in Mixture-of-Expert models",
     "test-time-reroute", { choose = "best" }, K, bonus)

-- Weights that are not the gate's.
local hidden = drawn.matrix(5, T, H)
show("Expertise need not monopolize: Action-Specialized Mixture of Experts for Vision-Language-Action Learning",
     "decoupled-gate", {}, K, { hidden = hidden, tensors = { adapter = { drawn.matrix(6, E, H) } } })
show("ReMix: Reinforcement routing for mixtures of LoRAs in LLM finetuning", "decoupled-gate", { weights = "equal" }, K,
     { hidden = hidden, tensors = {} })

-- As many experts as the layer has so far.
show("Self-Expansion of Pre-trained Models with Mixture of Adapters for Continual Learning", "expanding-experts",
     { start = 2 }, 2, { hidden = hidden })

-- Gates of their own. In the cascade every gate says "another" to a token of ones.
show("Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", "confidence-cascade", { most = 3 }, 3,
     { hidden = each(T, function() return each(H, function() return 1 end) end),
       tensors = { gate = { each(E, function() return each(H, function() return 1 end) end) } } })
local components = each(E, function(e) return drawn.matrix(6 + e, 1, H) end)
show("Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning",
     "activation-norm-router", {}, K, { hidden = hidden, tensors = { factor = { components } } })
show("Yuan 2.0-M32: Mixture of Experts with Attention Router", "attention-router", {}, K,
     { hidden = hidden,
       tensors = { gate = { { drawn.matrix(20, E, H), drawn.matrix(21, E, H), drawn.matrix(22, E, H) } } } })
local function cell(seed)
  return { drawn.matrix(seed, 4, 4), drawn.matrix(seed + 1, 4, 4), drawn.matrix(seed + 2, 4, 4) }
end
show("Layerwise Recurrent Router for Mixture-of-Experts", "cross-layer-router", {}, K,
     { hidden = hidden, tensors = { project = { drawn.matrix(30, 4, H) }, input = cell(31), recurrent = cell(41),
                                    gate = { drawn.matrix(51, E, 4) } } })

-- Shared experts are the model's: every token computes them beside the 2 that it chose.
local function with_shared(title, shared, top_k, d_expert)
  local d_model, layers = 256, 2
  local r = moe.experiment {
    name = "shared", seed = 1, tier = "bound", allow_extrapolation = true,
    model = { layers = layers, experts = 2 * E, top_k = top_k, shared = shared, d_model = d_model, d_expert = d_expert,
              n_heads = 4, d_head = 64 },
    machine = moe.machine "dgx-h100" { nodes = 1 }, router = "softmax-top-k",
    workload = moe.prefill { trace = moe.synth { layers = layers, experts = 2 * E, top_k = top_k, requests = 8,
                                                 tokens_per_request = 100, logits = true, seed = 1 },
                             tokens_per_device = 16, steps = 2, context = 64, profile = 0 },
  }:run()
  local gate = 2 * d_model * 2 * E
  local flops = r.list[1].metrics.flops_per_token.mean / layers - gate
  paper.claim { paper = title, metric = "experts that a token computes, shared ones included",
                published = shared + top_k, ours = math.floor(flops / (6 * d_model * d_expert) + 0.01), class = "X",
                tolerance = 0, basis = "definition" }
end
with_shared("Scaling Diffusion Transformers to 16 Billion Parameters", 2, 2, 128)
with_shared("Efficient Training of Diffusion Mixture-of-Experts Models: A Practical Recipe", 1, 4, 32)
