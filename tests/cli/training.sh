#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# A gate that is trained: that it collapses unless something balances it, that runs repeat, and what is refused.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99

# scenario BALANCER ROUTER WORKLOAD [CALL]: made.lua
scenario()
{
    cat >made.lua <<END
local moe = require "moelab"
local runs = moe.experiment {
  tier = "bound", allow_extrapolation = true, machine = moe.machine "dgx-h100" { nodes = 1 },
  model = { layers = 2, experts = 8, top_k = 2, d_model = 128, d_expert = 16, n_heads = 1, d_head = 16 },
  balancer = $1, router = $2, workload = $3,
}:run()
${4:-}
END
}
small='tokens_per_device = 16, steps = 20, context = 0'

fixture=$top_srcdir/tests/cli/fixtures/training.lua
run_expect 0 'ok: every step has a figure' "$moelab" run "$fixture" --out one --jobs 1
cp out printed
while read -r line; do
    ok "${line#*: }" grep -qxF "ok: ${line#*: }" printed
done < <(grep -E '^(NOT OK|ok): ' printed)
ok "all twelve were checked" test "$(grep -cE '^(NOT OK|ok): ' printed)" = 12
ok "again, with four jobs" "$moelab" run "$fixture" --out four --jobs 4
ok "the same bytes" cmp one/runs.jsonl four/runs.jsonl
ok "one line for each balancer" test "$(grep -c 'with lines' one/max-vio.gp)" = 4
ok "ten steps to a point" test "$(grep -cv '^#' one/loss.dat)" = 50

for gate in linear cosine gru; do
    scenario '{}' '"softmax-top-k"' "moe.gate { $small, gate = '$gate' }" 'print(runs.list[1].curve.task_loss[20])'
    ok "gate $gate runs" "$moelab" run made.lua --out "$gate"
    grep -v '^$' "$work/out" >"$gate.loss"
done
ok "gates differ" test "$(cat ./*.loss | sort -u | wc -l)" = 3
scenario '{}' '"group-limited-top-k"' "moe.gate { $small }"
ok "sigmoid gates are trained" "$moelab" run made.lua --out sigmoid
scenario '{ moe.plugin("capacity", { factor = 1 }) }' '"softmax-top-k"' "moe.gate { $small }"
ok "dropped tokens are" "$moelab" run made.lua --out drops
scenario '"aux-loss-balancer"' '"softmax-top-k"' "moe.gate { $small, trace = 'traces/tiny-moe', noise = 0.1 }"
ok "recorded hidden states are" "$moelab" run made.lua --out trace

scenario '{}' '"softmax-top-k"' "moe.gate { $small, expert_rate = 1e4 }"
run_expect 1 'it diverges: at step [0-9]+ its loss is [0-9.e+]+.*at step 0 its loss was 0\.' \
    "$moelab" run made.lua --out bad
scenario '"aux-loss-balancer"' '"softmax-top-k"' 'moe.prefill { trace = "traces/tiny-moe" }'
sed -i 's/experts = 8, top_k = 2/experts = 32, top_k = 4/; s/layers = 2/layers = 8/' made.lua
run_expect 2 'aux-loss-balancer: has hook loss, which is for a gate that is trained: expected a workload of moe.gate' \
    "$moelab" run made.lua --out bad
scenario '{}' '"replay"' "moe.gate { $small }"
run_expect 2 'router replay: needs recorded choices, which a workload of moe.gate does not have' \
    "$moelab" run made.lua --out bad
scenario '{}' '"random-gate"' "moe.gate { $small }"
run_expect 2 'random-gate, step 0, layer 0: weights are no function of the logits' "$moelab" run made.lua --out bad
scenario '{}' '"softmax-top-k"' "moe.gate { $small, learning_rat = 1 }"
run_expect 2 'learning_rat.*did you mean "learning_rate"' "$moelab" run made.lua --out bad
scenario '{}' '"softmax-top-k"' "moe.gate { $small, outputs = 6 }"
run_expect 2 'workload.outputs: 6, expected a multiple of 4' "$moelab" run made.lua --out bad
scenario '{}' '"softmax-top-k"' "moe.gate { $small }" 'runs:curve { y = "step_s", file = "a.png" }'
run_expect 2 'no curve of "step_s"; there are aux_loss, ' "$moelab" run made.lua --out bad
plan
