#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# moelab run --against: the same runs on two executors, phase by phase.
. "$(dirname "$0")/lib.sh"
mkdir "$work/here" && cd "$work/here" || exit 99
cat >two.lua <<'EOF'
local moe = require "moelab"
local r = moe.experiment {
  name = "two", model = { layers = 2, experts = 8, top_k = 2, shared = 1, d_model = 128, d_expert = 64, n_heads = 2,
                          d_head = 64, precision = "fp32" },
  machine = moe.machine "dgx-h100" { devices = 2 }, tier = "flow",
  workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 16,
                                              tokens_per_request = 20 },
                          batch_per_device = moe.each { 8, 64 }, steps = 1, context = 64 },
  offload = moe.each { "none", "lru" }, repetitions = 3,
}:run()
assert(#r.list == 4) -- a scenario's own tables have what was measured
EOF
run_expect 2 'against flow: expected --machine with another executor' "$moelab" run two.lua --against flow
run_expect 2 'against flow: expected --machine with another' "$moelab" run two.lua --against flow --machine flow
run_expect 2 'unknown executor|no executor|expected one of' "$moelab" run two.lua --machine flow --against nowhere
ok "nothing is written" test ! -e results

# pairs A B: what is printed and written is what the runs have
pairs()
{
    ok "$1 against $2" "$moelab" run two.lua --machine "$1" --against "$2" --out "$1"
    cp "$work/out" said
    ok "... eight runs" test "$(grep -c '"step_s"' "$1/runs.jsonl")" = 8
    ok "... four comparisons" test "$(grep -c 'offload .*measured .*simulated .*error' said)" = 4
    command -v python3 >/dev/null || { skip "... of figures that the runs have" "no python3"; return; }
    cat >check.py <<'EOF'
import csv, json, sys
runs = {}
for line in open(sys.argv[1] + "/runs.jsonl"):
    r = json.loads(line)
    a = r["axes"]
    label = "batch_per_device %s, offload %s" % (a["workload.batch_per_device"], a["offload"])
    runs[(a["executor"], label)] = r["metrics"]
metric = {"step": "step_s", "attention": "attention_s", "gate": "gate_s", "permute": "permute_s", "load": "load_s",
          "dispatch": "dispatch_s", "experts": "experts_s", "shared experts": "shared_s", "combine": "combine_s",
          "unpermute": "unpermute_s"}
rows = list(csv.DictReader(open(sys.argv[1] + "/against.csv")))
assert len({r["run"] for r in rows}) == 4 and sum(r["phase"] == "load" for r in rows) == 2, rows
for r in rows:
    m, s = (runs[(x, r["run"])][metric[r["phase"]]] for x in sys.argv[1:3])
    assert abs(float(r["measured_s"]) / m["mean"] - 1) < 1e-8 and abs(float(r["simulated_s"]) / s["mean"] - 1) < 1e-8, r
    assert abs(float(r["error"]) - (s["mean"] / m["mean"] - 1)) < 1e-4, r
    assert (r["spread"] == "") == ("spread" not in m), r
EOF
    ok "... of figures that the runs have" python3 check.py "$1" "$2"
    ok "... orders are counted" grep -Eq "[0-9]+ pairs of runs differ on $1 by more than their spread" said
    ok "... what is printed is kept" diff <(sed '$d' said) "$1/against.txt"
    ok "... and drawn" grep -q 'against.dat' "$1/against.gp"
}

if "$moelab" machine show dgx-h100 >/dev/null && [ -x "$top_builddir/hw/moelab-simgrid" ]; then
    pairs flow simgrid
    ok "two models of one machine agree" grep -Eq '^ *step +4 +0\.[0-9] %' said
fi
if [ -e "$top_builddir/hw/host.so" ] && command -v mpirun >/dev/null; then
    export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0 # MPI's, from code that is no longer loaded
    pairs host flow
    ok "... with what one computer cannot say" grep -q 'nothing here is about a network between hosts' said
    ok "quiet is quiet" "$moelab" run two.lua --machine host --against flow --out q --quiet
    ok "... but for warnings" test ! -s "$work/out"
fi
plan
