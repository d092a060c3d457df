#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# A newcomer's first command: the tables say who wins and how far from the bound, pictures and records are there, and
# what they say holds together.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99
run_expect 0 'eplb\(replicas=48\).*\*' "$moelab" run "$top_srcdir/scenarios/quickstart.lua" --out results
cp out printed

ok "two nodes: a best placement is marked" grep -Eq '^  2 +[a-z].*\*' printed
ok "the bound is beside it" grep -q 'over bound' printed
ok "belady is the ceiling" grep -q 'best / belady' printed
if grep -q 'flow and simgrid' printed; then
    ok "flow and simgrid agree to 1e-6 %" bash -c \
        "sed -n 's/.*differs by at most \([^ ]*\) %.*/\1/p' printed | awk '{ if (\$1 > 1e-6) exit 1 }'"
else
    skip "flow and simgrid agree" "built without SimGrid"
fi
for stem in placement offload-hits offload-speed; do
    ok "$stem.dat" test -s "results/$stem.dat"
    ok "$stem.gp" test -s "results/$stem.gp"
    if command -v gnuplot >/dev/null; then
        ok "$stem.png is a picture" bash -c "head -c 8 results/$stem.png | od -An -tx1 | grep -q '89 50 4e 47'"
        ok "... and can be drawn again" bash -c "cd results && rm $stem.png && gnuplot $stem.gp && test -s $stem.png"
    else
        skip "$stem.png" "no gnuplot"
    fi
done
n_runs=$(grep -q 'SimGrid is not built in' printed && echo 32 || echo 88)
ok "one line per run" test "$(wc -l <results/runs.jsonl)" = "$n_runs"
ok "all of them succeeded" test "$(grep -c '"status":"ok"' results/runs.jsonl)" = "$n_runs"
for key in moelab revision scenario sha256 machines traces experiments seed params; do
    ok "the manifest has $key" grep -q "\"$key\"" results/manifest.json
done
ok "no path of this machine in it" bash -c "! grep -q '\"/' results/manifest.json results/runs.jsonl"
ok "nothing is left beside the results" test ! -e results.part -a ! -e results.old

# No step beats its bound, and no policy beats Belady.
ok "no run is below its bound" bash -c \
    "! grep -o '\"over_bound\":{[^}]*}' results/runs.jsonl | grep -Eo '\"min\":[0-9.e+-]+' | cut -d: -f2 |
     awk '{ if (\$1 < 1 - 1e-9) { print; found = 1 } } END { exit !found }'"
ok "no policy is above Belady" awk \
    '!/^#/ { for (i = 2; i < 8; i += 2) if ($i > $8 + 1e-9) exit 1; n++ } END { exit n != 6 }' \
    results/offload-hits.dat
plan
