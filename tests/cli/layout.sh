#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Layouts of experts from the command line: groups of devices and shards, what results say of them, and what is refused.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99
cat >a.lua <<'EOF'
local moe = require "moelab"
moe.experiment {
  name     = "layouts",
  model    = { layers = 2, experts = 8, top_k = 2, d_model = 512, d_expert = 256, n_heads = 4, d_head = 128 },
  machine  = moe.machine "star-50GBps" { nodes = 4 },
  workload = moe.decode {
    trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 8, tokens_per_request = 40, skew = 0.8 },
    batch_per_device = 8, steps = 2,
  },
  placement = moe.each { "contiguous", "round-robin", "eplb" },
}:run()
EOF
# field FILE NAME: the value of the first such field of every line
field() { grep -Eo "\"$2\":(\{\"mean\":)?[^,}]*" "$1" | sed 's/.*://'; }

for layout in "4 1 1" "2 1 2" "2 2 1" "1 2 2" "1 4 1"; do
    read -r ep etp edp <<<"$layout"
    run_expect 0 '' "$moelab" run a.lua --quiet --out "r$ep$etp" --set layout.experts.ep="$ep" \
        --set layout.experts.etp="$etp"
    ok "ep $ep, etp $etp: three runs" test "$(grep -c '"status":"ok"' "r$ep$etp/runs.jsonl")" = 3
    for key in "ep\": $ep" "etp\": $etp" "expert_groups\": $edp"; do
        ok "... \"$key in the manifest" grep -q "\"$key\b" "r$ep$etp/manifest.json"
    done
    ok "... above their bound" bash -c \
        "! grep -o '\"over_bound\":{[^}]*}' r$ep$etp/runs.jsonl | grep -Eo '\"min\":[0-9.e+-]+' | cut -d: -f2 |
         awk '\$1 < 1 { bad = 1 } END { exit !bad }'"
done
"$moelab" run a.lua --quiet --out again --set layout.experts.ep=2 --set layout.experts.etp=2 2>/dev/null
ok "the same decisions when it runs again" test "$(field r22/runs.jsonl decisions)" = \
    "$(field again/runs.jsonl decisions)"
# Two groups hold two copies of everything; a shard is half of an expert.
ok "experts on a device: twice as many in half as many places" awk -v a="$(field r41/runs.jsonl experts | head -1)" \
    -v b="$(field r21/runs.jsonl experts | head -1)" -v c="$(field r22/runs.jsonl experts | head -1)" \
    'BEGIN { exit !(a > 0 && b == 2 * a && c == a) }'

refused() # REGEX KEY=VALUE...
{
    local regex=$1
    shift
    # shellcheck disable=SC2046
    run_expect 2 "$regex" "$moelab" run a.lua --out no $(printf -- '--set %s ' "$@")
    ok "... and nothing is left" test ! -e no -a ! -e no.part
}
refused 'layout.experts: ep x etp = 3 x 1 = 3, .* 4 devices: expected ep x etp x edp = 4' layout.experts.ep=3
refused 'layout.experts: ep x etp = 4 x 2 = 8' layout.experts.ep=4 layout.experts.etp=2
refused 'layout.experts.ep: 2 is more than the model.s 1 experts' layout.experts.ep=2 model.experts=1 model.top_k=1
refused 'layout.experts.etp: 2 does not divide model.d_expert, 255' layout.experts.etp=2 model.d_expert=255
refused 'layout: unknown key "expert"; did you mean "experts"' layout.expert.ep=2
refused 'layout.experts: unknown key "edp"' layout.experts.edp=2
run_expect 1 'node-dedup: layer 0: expert [0-9]+ is sharded' "$moelab" run a.lua --out bad --set layout.experts.etp=2 \
    --set dispatch=node-dedup

if [ -e "$top_builddir/hw/host.so" ] && command -v mpirun >/dev/null; then
    export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0 # MPI's, from code that is no longer loaded
    run_expect 0 '' "$moelab" run a.lua --machine host --quiet --out real --set layout.experts.ep=2 --set verify=true
    ok "groups really compute, and what they compute is right" test "$(grep -c '"verified"' real/runs.jsonl)" = 3
    ok "... by the same decisions" test "$(field r21/runs.jsonl decisions)" = "$(field real/runs.jsonl decisions)"
    refused 'layout.experts.etp: 2, and machine host computes whole experts' executor=host layout.experts.etp=2
else
    skip "groups really compute" "built without MPI or OpenBLAS"
fi
plan
