#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Tokens that leave out halves of layers: what it takes off the step, and what stays.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99

cat >depth.lua <<'END'
local moe = require "moelab"
local P = moe.plugin
local function depth(set)
  set.every = 1
  return P("mixture-of-depths", set)
end
local runs = moe.experiment {
  name = "depth", tier = "bound", allow_extrapolation = true, machine = moe.machine "dgx-h100" { nodes = 1 },
  model = { layers = 8, experts = 32, top_k = 4, shared = 1, d_model = 1024, d_expert = 512, n_heads = 16,
            d_head = 64 },
  workload = moe.prefill { trace = "traces/tiny-moe", tokens_per_device = 256, steps = 1, context = 128, profile = 0 },
  router = moe.each { "softmax-top-k", depth { share = 1 }, depth { share = 0.25 },
                      depth { share = 0.25, halves = "attention" }, depth { share = 0.25, halves = "experts" },
                      depth { choice = "threshold", threshold = 1e9 }, P("mixture-of-depths", { share = 0.25 }) },
}:run()
local r = {}
for i, run in ipairs(runs.list) do
  r[i] = {}
  for name, value in pairs(run.metrics) do r[i][name] = value.mean end
end
local function ok(holds, what) print((holds and "ok: " or "NOT OK: ") .. what) end
local function near(a, b) return math.abs(a - b) <= 1e-9 * math.abs(b) end
local plain, whole, both, attention, experts, none, second = table.unpack(r)
-- A token's experts: 3 products of 1024 x 512, in 8 layers.
local ffn, per_layer = 6 * 1024 * 512, 8
ok(plain.skipped == nil and whole.skipped == 0, "no share where nobody can leave, none where nobody does")
for _, name in ipairs { "attention_s", "experts_s", "shared_s", "a2a_s" } do
  ok(near(whole[name], plain[name]), "all stay: " .. name .. " as top-k")
end
-- Requests are cut over steps, and each share is rounded up: 0.25 and somewhat more.
ok(both.skipped > 0.6 and both.skipped <= 0.75, "three quarters leave both halves")
ok(near(attention.skipped, both.skipped / 2) and near(experts.skipped, both.skipped / 2), "half of it is a half")
ok(near(second.skipped, both.skipped / 2), "every second layer: half of it")
ok(near(both.experts_per_token, 4 * (1 - both.skipped)), "who leaves has no experts")
ok(attention.experts_per_token == 4, "who leaves attention alone has all")
ok(near(whole.flops_per_token - both.flops_per_token, both.skipped * 5 * ffn * per_layer),
   "FLOPs of four experts and a shared one less")
ok(near(attention.flops_per_token, whole.flops_per_token), "none where they compute")
ok(both.attention_s < 0.9 * plain.attention_s and near(attention.attention_s, both.attention_s), "attention takes less")
ok(near(experts.attention_s, plain.attention_s), "and as long where all attend")
ok(both.shared_s < plain.shared_s and near(experts.shared_s, both.shared_s), "so do shared experts")
ok(near(attention.shared_s, plain.shared_s) and near(attention.experts_s, plain.experts_s), "and not where all compute")
ok(both.intra_node_bytes < 0.3 * plain.intra_node_bytes and
   near(experts.a2a_s, both.a2a_s), "and what travels")
ok(both.step_s < math.min(attention.step_s, experts.step_s), "the step is shorter than with either half")
ok(none.skipped == 1 and none.experts_per_token == 0 and none.attention_s == 0 and not none.shared_s,
   "nobody goes through: nothing is computed")
END
run_expect 0 'ok: ' "$moelab" run depth.lua --out one --jobs 1
cp out printed
while read -r line; do
    ok "${line#*: }" grep -qxF "ok: ${line#*: }" printed
done < <(grep -E '^(NOT OK|ok): ' printed)
ok "all were checked" test "$(grep -cE '^(NOT OK|ok): ' printed)" = 19
ok "again, with four jobs" "$moelab" run depth.lua --out four --jobs 4
ok "the same bytes" cmp one/runs.jsonl four/runs.jsonl

# Training would have to undo what was left out.
sed 's/moe.prefill {/moe.train {/; s/context = 128, //; /^local r =/,$d' depth.lua >train.lua
run_expect 1 'routes with tokens that skip the layer \(skip\), in training, which' "$moelab" run train.lua --out train
plan
