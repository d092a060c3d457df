#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# A result depends on the scenario and its seed: not on the day, the number of jobs, the directory or the locale.
. "$(dirname "$0")/lib.sh"
cp "$top_srcdir/tests/cli/fixtures/tiny.lua" "$work"
cd "$work" || exit 99

cat >x.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
local trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 16, tokens_per_request = 16, skew = 1,
                          logits = true, seed = 7 }
local served = tiny.experiment {
  executor  = moe.each { "flow", "simgrid" },
  router    = moe.each { "replay", "softmax-top-k" },
  balancer  = moe.plugin("capacity", { factor = 1.25 }),
  placement = moe.each { "contiguous", "round-robin", "eplb" },
  workload  = moe.decode { trace = trace, batch_per_device = 4, steps = 5 },
  seed      = moe.each { 1, 2, 3 },
}:run()
served:table { rows = { "router", "placement" }, cols = "executor", value = "step_s", best = "min", file = "t.txt" }
served:plot { x = "placement", y = "step_s", group = "router", bound = true, file = "p.png" }
local cached = tiny.experiment {
  machine = "rtx4090-pcie4", placement = "contiguous", offload = moe.each { "lru", "lfu", "belady" },
  workload = moe.decode { trace = tiny.trace, batch_per_device = 1, steps = 20 }, cache = moe.each { 0.25, 0.5 },
}:run()
cached:plot { x = "cache", y = "hit_rate", group = "offload", kind = "lines", file = "c.png" }
moe.write("random.txt", ("%.17g %d"):format(math.random(), math.random(1, 1000000)))
EOF
simgrid=${MOELAB_LIBEXEC:-$top_builddir/hw}
[ -x "$simgrid/moelab-simgrid" ] || sed -i 's/"flow", "simgrid"/"flow"/' x.lua

ok "once" "$moelab" run x.lua --out one --jobs 1
cp out said
ok "and again" "$moelab" run x.lua --out two --jobs 1
cp out said.again
ok "the same files" diff -r one two
ok "the same tables" diff said said.again
ok "four at a time" "$moelab" run x.lua --out four --jobs 4
ok "... the same files" diff -r one four
mkdir elsewhere && cp x.lua tiny.lua elsewhere
ok "from elsewhere, in another locale, without a terminal or TMPDIR" \
    env -C elsewhere -u TERM LC_ALL=C.UTF-8 TMPDIR="$work" COLUMNS=7 TZ=Asia/Tokyo "$moelab" run \
        "$work/elsewhere/x.lua" --jobs 3
ok "... the same files" diff -r one elsewhere/results/x

for file in runs.jsonl manifest.json p.dat p.gp c.dat t.txt random.txt; do
    ok "there is a $file" test -s "one/$file"
done
ok "nothing of this machine in them" test -z \
    "$(grep -l -e "$work" -e "$top_srcdir" -e "$(hostname)" one/*.json* one/*.dat one/*.gp one/*.txt)"

# Another seed starts other requests, and the trace's seed makes another trace.
ok "another seed" "$moelab" run x.lua --out five --set seed=5
ok "... differs" test \
    "$(cut -d'"' -f5-12 one/runs.jsonl | sha256sum)" != "$(cut -d'"' -f5-12 five/runs.jsonl | sha256sum)"
decisions() { sed 's/.*"decisions":"\([0-9a-f]*\)".*/\1/' "$1/runs.jsonl" | sort -u; }
ok "... decides otherwise" test -z "$(comm -12 <(decisions one) <(decisions five))"
sed 's/seed = 7/seed = 8/' x.lua >y.lua
ok "another seed of the trace" "$moelab" run y.lua --out six
sum_of() { grep -o '"sha256": "[0-9a-f]*"' "$1/manifest.json" | sort; }
ok "... another checksum" test "$(sum_of one)" != "$(sum_of six)"
plan
