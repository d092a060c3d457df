#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# moelab papers lists only what works; moelab reproduce computes its verdicts, and a wrong figure fails.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99

run_expect 0 '"plugin": "eplb"' "$moelab" papers --json
cp out papers.json
run_expect 0 'DeepSeek EPLB' "$moelab" papers
run_expect 2 'unexpected argument "what"' "$moelab" papers what

# Every row names a policy that loads and takes the row's parameters, and a scenario that is there.
while IFS=$'\t' read -r kind plugin scenario; do
    run_expect 0 "^$kind $plugin" "$moelab" plugins show "$plugin"
    ok "... shown by $scenario" test -f "$top_srcdir/$scenario"
done < <(sed -n 's/.*"kind": "\([^"]*\)", "plugin": "\([^"]*\)".*"scenario": "\([^"]*\)".*/\1\t\2\t\3/p' \
    "$top_srcdir/scenarios/papers/papers.json" | sort -u)

# Its parameters are the policy's.
while IFS=$'\t' read -r plugin params; do
    "$moelab" plugins show "$plugin" >shown
    for name in $(grep -o '"[a-z_]*":' <<<"$params" | tr -d '":'); do
        ok "$plugin has $name" grep -Eq "^  +$name +(int|real|bool|string|enum|tensor) " shown
    done
done < <(sed -n 's/.*"plugin": "\([^"]*\)", "params": {\([^}]*\)}.*/\1\t\2/p' \
    "$top_srcdir/scenarios/papers/papers.json" | grep '"' | sort -u)

run_expect 0 '"verdict": *"holds"' "$moelab" reproduce --all --json
cp out rows
# What a paper's scenario is said to show is there.
shows_all()
{
    local paper scenario missing=0
    while IFS=$'\t' read -r paper scenario; do
        grep -Fq "\"paper\": \"$paper\"" rows || { echo "# $scenario does not show $paper"; missing=1; }
    done < <(sed -n 's/.*"paper": "\(.*\)", "kind": "router".*"scenario": "\(scenarios\/papers\/[^"]*\)".*/\1\t\2/p' \
        "$top_srcdir/scenarios/papers/papers.json")
    return $missing
}
ok "every paper of a router is in its scenario" shows_all
ok "no row of class E or A fails" bash -c '! grep -q "\"verdict\": *\"fails\"" rows'
n_rows=$(grep -c '"verdict":' rows)
for key in paper metric published ours error class tolerance; do
    ok "every row has \"$key\"" test "$(grep -c "\"$key\":" rows)" = "$n_rows"
done
ok "... and says what it is compared with" test "$(grep -Ec \
    '"metric": ".* \[(published|closed form|definition|reference code|expectation)\]"' rows)" = "$n_rows"
ok "no other key" test -z \
    "$(grep -Ev '^ *("(paper|metric|published|ours|error|class|tolerance|verdict)":|[][{}])' rows)"
run_expect 0 '^hold: 2 of 2 published figures; checks: 2 of 2 closed form$' "$moelab" reproduce eplb
cp out table
ok "... row by row" grep -Eq 'layer 0: largest / mean device load +closed form ' table
run_expect 0 '^hold: 0 of 0 published figures; checks: ' "$moelab" reproduce caches
run_expect 2 'no scenario "eplbb" under scenarios/papers; did you mean "eplb"\?' "$moelab" reproduce eplbb
run_expect 2 'found both' "$moelab" reproduce eplb --all

# A figure that does not come out is said to fail; class X is never claimed; shapes do not decide the exit code.
mkdir -p data/scenarios/papers data/scenarios/lib
cp "$top_srcdir/scenarios/lib/paper.lua" data/scenarios/lib
claims() # class ours [basis]
{
    cat >data/scenarios/papers/fake.lua <<LUA
require("lib.paper").claim { paper = "fake", metric = "m", published = 2.0, ours = $2, class = "$1", tolerance = 0.1,
  basis = "${3-published}" }
LUA
}
claims E 2.5
run_expect 1 '\+25 %.*fails' env MOELAB_DATA_PATH="$work/data" "$moelab" reproduce fake
claims A 1.9
run_expect 0 '-5 %.*holds' env MOELAB_DATA_PATH="$work/data" "$moelab" reproduce fake
claims S 2.5
run_expect 0 'fails' env MOELAB_DATA_PATH="$work/data" "$moelab" reproduce fake
claims X 2.5
run_expect 0 '^hold: 0 of 0 published figures \(1 more not claimed\)$' env MOELAB_DATA_PATH="$work/data" "$moelab" \
    reproduce fake
# All of the metric can be read, in 120 columns; what is no figure is a dash.
cat >data/scenarios/papers/fake.lua <<'LUA'
require("moelab").claim { paper = "fake", class = "S", basis = "published", published = -1.23456e-05, tolerance = 0.001,
  metric = "largest of the loads of devices over their mean, after half of all requests, in per cent" }
LUA
run_expect 0 '^  metric +expected is +expected +ours +error  class tolerance  verdict$' \
    env MOELAB_DATA_PATH="$work/data" "$moelab" reproduce fake
cp out table
ok "the metric is there" test "$(sed -n '3,5s/^ *\(.*[^ ]\) *$/\1/p' table | sed 's/  .*//' | tr '\n' ' ')" = \
    "largest of the loads of devices over their mean, after half of all requests, in per cent "
ok "no figure, no error" grep -Eq ' -1.23456e-05 +- +-  S +0.1 %  fails$' table
ok "every figure, in 120 columns" "$moelab" reproduce --all
cp out table
ok "... and no wider" bash -c "! grep -E '.{121}' table"
claims Z 2.5
run_expect 2 'fake.lua:1: paper.claim: class: expected E, A, S or X' env MOELAB_DATA_PATH="$work/data" "$moelab" \
    reproduce fake
claims E 2.0 rumour
run_expect 2 'fake.lua:1: paper.claim: basis: expected published, closed form' env MOELAB_DATA_PATH="$work/data" \
    "$moelab" reproduce fake
plan
