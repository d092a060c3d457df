#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Machine cuda where it cannot run: each reason has its message, and nothing is written. tests/unit/test_cuda.c runs it.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99

# one FILE KEYS: a scenario with one run
one()
{
    cat >"$1.lua" <<EOF
local moe = require "moelab"
moe.experiment {
  model = { layers = 2, experts = 8, top_k = 2, d_model = 16, d_expert = 8, n_heads = 1, d_head = 16, $3 },
  machine = moe.machine "star-50GBps" { nodes = 2 }, executor = "cuda",
  workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 4,
                                              tokens_per_request = 60 },
                          batch_per_device = 8, steps = 2 },
  $2
}:run()
EOF
}

one several '' ''
if [ ! -e "$top_builddir/hw/cuda.so" ]; then
    run_expect 2 'machine cuda: no module cuda.so' "$moelab" run several.lua --out results
else
    CUDA_VISIBLE_DEVICES= run_expect 2 'several.lua:2: machine cuda: no GPU' "$moelab" run several.lua --out results
    ok "... said once" test "$(wc -l <"$work/err")" = 1
fi
one lua 'placement = moe.policy { kind = "placement", name = "mine", place = function() end },' ''
run_expect 2 'machine cuda: placement mine is written in Lua, which ranks do not load' "$moelab" run lua.lua
one int8 'virtual_ranks = true,' 'precision = "int8"'
run_expect 2 'int8.lua:2: machine cuda: model.precision: computes in bf16, fp32 and fp8, found int8' \
    "$moelab" run int8.lua --out results
if [ -e "$top_builddir/hw/cuda.so" ]; then
    one fp8 'virtual_ranks = true,' 'precision = "fp8"'
    run_expect 2 'fp8.lua:2: machine cuda: model.d_expert: fp8 needs a multiple of 16, found 8' \
        "$moelab" run fp8.lua --out results
fi
if [ -e "$top_builddir/hw/cuda.so" ]; then
    one graphs8 'virtual_ranks = true, cuda_graphs = true,' 'precision = "fp8"'
    run_expect 2 'graphs8.lua:2: machine cuda: cuda_graphs: products in fp8 are queued with the places of experts' \
        "$moelab" run graphs8.lua --out results
fi
one maybe 'virtual_ranks = true, cuda_graphs = 1,' ''
run_expect 2 'cuda_graphs: expected .*boolean' "$moelab" run maybe.lua --out results
one word 'virtual_ranks = "yes",' ''
run_expect 2 'virtual_ranks: expected .*boolean' "$moelab" run word.lua --out results
one right 'virtual_ranks = true, verify = true,' ''
if [ ! -e "$top_builddir/hw/cuda.so" ]; then
    run_expect 2 'machine cuda: no module cuda.so .*--with-cuda' "$moelab" run right.lua --out results
elif CUDA_VISIBLE_DEVICES= "$moelab" run right.lua --out none 2>&1 | grep -q 'there is no driver'; then
    run_expect 2 'right.lua:2: machine cuda: no GPU: there is no driver' "$moelab" run right.lua --out results
else
    CUDA_VISIBLE_DEVICES= run_expect 2 'right.lua:2: machine cuda: no GPU' "$moelab" run right.lua --out results
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        ok "layers that the GPU computes equal the reference" "$moelab" run right.lua --out gpu
        ok "... and the result says that its ranks are virtual" grep -q '"virtual_ranks":true' gpu/runs.jsonl
    fi
fi
ok "nothing is written" test ! -e results
one flow 'virtual_ranks = true, cuda_graphs = true,' ''
ok "on other machines the key means nothing" "$moelab" run flow.lua --machine flow --allow-extrapolation --out flow
ok "... and is not kept" test "$(cat flow/*.json* | grep -c -e virtual_ranks -e graphs)" = 0
ok "the program itself needs no CUDA" test "$(ldd "$moelab" | grep -c -e cudart -e cublas)" = 0
plan
