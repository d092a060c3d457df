#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The manifest says everything that a run was made of, defaults included: runs repeated from it alone decide the same
# and take the same time.
. "$(dirname "$0")/lib.sh"
cp "$top_srcdir"/tests/cli/fixtures/{tiny,again}.lua "$work"
cd "$work" || exit 99

mkdir -p data/hw/machines && export MOELAB_DATA_PATH=$PWD/data
two='{ nodes = 1, devices = 2, nvlink = { bandwidth = "100 GB/s", latency = "1 us", source = "a test" } }'
sed "s/^  nodes   = 8,//; s|^  devices = 1,|  groups = { { nodes = 2, devices = 1 }, $two },|" \
    "$top_srcdir/hw/machines/star-50GBps.lua" >data/hw/machines/unlike.lua
cat >x.lua <<'EOF2'
local moe, tiny = require "moelab", require "tiny"
local executors = moe.has "simgrid" and { "flow", "simgrid" } or { "flow" }
-- Nothing given that need not be.
moe.experiment { model = tiny.model, machine = "star-50GBps", workload = moe.decode { trace = tiny.trace } }:run()
tiny.experiment {
  name = "all-kinds", executor = moe.each(executors), tier = "exact", warmup = 1,
  router = moe.each { "softmax-top-k", moe.plugin("softmax-top-k", { renormalise = false }) },
  balancer = { moe.plugin("capacity", { factor = 1.25 }), "none" },
  placement = moe.each { "round-robin", moe.plugin("eplb", { replicas = 12, interval = 2 }) },
  workload = moe.prefill { trace = tiny.trace, tokens_per_device = 32, steps = 4, profile = 0.25 },
  machine = moe.machine "star-50GBps" { nodes = moe.each { 2, 4 }, nic = { bandwidth = "40 GB/s" } },
  seed = moe.each { 1, 7 },
}:run()
-- Nodes that differ below a network with several paths, one device slower later on.
tiny.experiment {
  name = "unlike", placement = "round-robin",
  machine = moe.machine "unlike" {
    slow = { { device = 1, factor = 2, at = "20 us" } }, faults = { { link = "gpu0.nic", at = "10 us", factor = 0.5 } },
    network = { kind = "leaf-spine", nodes_per_leaf = 1, spines = 2, oversubscription = 1, paths = "split",
                source = "a test" },
  },
}:run()
-- As much as the memory holds; as was said; and a policy that knows the future.
tiny.experiment {
  name = "memory", machine = moe.machine "rtx4090-pcie4" { device = { memory = "100 MB" } }, placement = "contiguous",
  offload = moe.each { "lru", "belady" },
  workload = moe.decode { trace = tiny.trace, batch_per_device = 1, steps = 20 },
}:run()
tiny.experiment {
  name = "cache", machine = "rtx4090-pcie4", placement = "contiguous", offload = "lfu", cache = moe.each { 0.3, 0.5 },
  workload = moe.decode { trace = tiny.trace, batch_per_device = 1, steps = 20, profile = 0 },
}:run()
-- Routing that was fitted to a trace.
moe.experiment {
  name = "like", model = moe.model "gpt-oss-20b" { layers = 3, experts = 16, top_k = 2 }, machine = "dgx-h100",
  workload = moe.decode { trace = moe.synth { like = "traces/tiny-moe", layers = 3, experts = 16, top_k = 2 },
                          steps = 2 },
}:run()
-- The trace that ships.
moe.experiment { name = "trace", model = "tiny-moe", machine = "dgx-h100", placement = "eplb",
                 workload = moe.decode { trace = "traces/tiny-moe", steps = 3 } }:run()
EOF2
ok "runs" "$moelab" run x.lua --out first
cp first/manifest.json .
ok "again, from the manifest" "$moelab" run again.lua --unsafe --out second
same()
{
    grep -o "\"$1\":[^,}]*" first/runs.jsonl >a && grep -o "\"$1\":[^,}]*" second/runs.jsonl >b && [ -s a ] && cmp a b
}
ok "the same decisions" same decisions
ok "... of every run" test "$(grep -c . a)" = "$(grep -c . first/runs.jsonl)"
lines() { sed 's/"axes":{[^}]*},//; s/"experiment":"[^"]*",//' "$1/runs.jsonl"; }
ok "... and all figures" cmp <(lines first) <(lines second)
ok "runs that differ decide otherwise" test "$(sort -u a | wc -l)" -ge 10
sums() { grep -o '"sha256": "[0-9a-f]*"' "$1/manifest.json" | sort -u; }
ok "on the same traces" test -z "$(comm -13 <(sums first) <(sums second) | sed 1d)" # the scenario is another

# ---- what has no place in the scenario is in the manifest ----

head -n 4 x.lua >y.lua
ok "nothing given" "$moelab" run y.lua --out bare
for text in '"weight_bytes": 2' '"act_bytes": 2' '"combine_bytes": 2' '"precision": "bf16"' '"n_kv_heads": 8' \
    '"shared": 0' \
    '"kind": "decode"' '"batch_per_device": 64' '"steps": 20' '"context": 1024' '"profile": 0.5' '"executor": "flow"' \
    '"tier": "flow"' '"skew": 0.5' '"stickiness": 0.25' '"affinity": 0.25' '"drift": 0' '"tokens_per_request": 16' \
    '"name": "replay"' '"name": "contiguous"' '"name": "flat"' '"name": "none"' '"seed": 1' '"warmup": 0' \
    '"verify": false' '"nodes": 8' '"devices": 8' '"tokens_per_step": 512' '"requests_played": 8' \
    '"requests_profiled": 8' '"expert_bytes": 3145728' '"efficiency": 1'; do
    ok "manifest: $text" grep -q "$text" bare/manifest.json
done
ok "no cache where nothing is offloaded" bash -c '! grep -q cache bare/manifest.json'
ok "a cache as the memory has it" grep -q '"cache_experts": [1-9]' first/manifest.json
ok "... in bytes" grep -q '"cache_bytes": [1-9]' first/manifest.json
ok "the tier that was used is in each line" test \
    "$(grep -c '"tier":"' first/runs.jsonl)" = "$(grep -c . first/runs.jsonl)"
if [ -x "${MOELAB_LIBEXEC:-$top_builddir/hw}/moelab-simgrid" ]; then
    ok "... not the one that SimGrid has no use for" grep -q '"machine":"simgrid".*"tier":"simgrid"' first/runs.jsonl
else
    skip "... not the one that SimGrid has no use for" "not built"
fi

# A run that fails in the middle was made of something, too.
cat >z.lua <<'EOF2'
local moe, tiny = require "moelab", require "tiny"
tiny.experiment { placement = moe.each { "contiguous", moe.policy { kind = "placement", name = "mine",
                                                                   place = function() error "no" end } } }:run()
EOF2
run_expect 1 'run 2 of "tiny" failed' "$moelab" run z.lua --out failed
ok "what is common is once there" test "$(grep -c '"context": 1024' failed/manifest.json)" = 1
ok "a policy of the scenario is known as one" test "$(grep -c '"lua": true' failed/manifest.json)" = 1
plan
