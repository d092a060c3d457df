#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Latency tables measured elsewhere: inside their range a run takes as long as they say, outside as long as the model
# does, with a warning; the result and the manifest say which.
. "$(dirname "$0")/lib.sh"
cp "$top_srcdir/tests/cli/fixtures"/{again,tiny}.lua "$work"
cd "$work" || exit 99

# One device, 8 experts, every one chosen by both tokens: up is 8 groups of 2 rows times 1000 x 3000, down of 2 rows
# times 1500 x 1000, in bf16. $1: tables, or nothing; $2: more of the machine.
scenario()
{
    cat <<LUA
local moe = require "moelab"
local function all(batch)
  local routes = {}
  for t = 0, batch.n_tokens - 1 do routes[t] = { experts = { 0, 1, 2, 3, 4, 5, 6, 7 } } end
  return routes
end
moe.experiment {
  name = "tables", router = moe.policy { kind = "router", name = "all", route = all },
  machine = moe.machine "star-50GBps" { nodes = 1${1:+, tables = $1}${2-} },
  model = { layers = 1, experts = 8, top_k = 8, d_model = 1000, d_expert = 1500, n_heads = 1, d_head = 1000 },
  workload = moe.decode {
    trace = moe.synth { layers = 1, experts = 8, top_k = 8, requests = 8, tokens_per_request = 4, logits = true },
    batch_per_device = 2, steps = 2, context = 0,
  },
}:run()
LUA
}
header='op,precision,groups,rows,n,k,latency_us'
up='grouped_gemm,bf16,8,%s,3000,1000,%s\n'
down='grouped_gemm,bf16,8,%s,1000,1500,%s\n'

# takes NAME TABLES: a run with them, what it warns of in NAME.err, and how long its experts take in $us.
takes()
{
    scenario "$2" >"$1.lua"
    ok "a run with ${2:-no table}" "$moelab" run "$1.lua" --out "$1"
    cp err "$1.err"
    us=$(sed 's/.*"experts_s":{[^}]*"mean":\([^,}]*\).*/\1/' "$1/runs.jsonl" | awk '{ printf "%.17g", 1e6 * $1 }')
}
near() { awk -v a="$1" -v b="$2" 'BEGIN { d = a - b; exit !(b > 0 && d < 1e-9 * b && -d < 1e-9 * b) }'; }
sum() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.17g", a + b }'; }

{ echo '# a test'; echo "$header"; printf "$up" 1 10; printf "$up" 3 50; } >up.csv
{ echo "$header"; printf "$down" 2 25; } >down.csv
takes plain ''
plain=$us
ok "without tables nothing is said of them" bash -c '! grep -q gemm_measured plain/runs.jsonl'

# 2 rows of 1 to 3: 30 us; down is in the table, 25 us. The activation is modelled: a launch of 2.5 us, and 16 x 1500 x
# 6 bytes at 0.86 x 3.35 TB/s.
takes both '{ "up.csv", "down.csv" }'
both=$us
ok "the times of the tables, and the activation" near "$both" \
    "$(awk 'BEGIN { printf "%.17g", 30 + 25 + 2.5 + 16 * 1500 * 6 / (0.86 * 3.35e12) * 1e6 }')"
ok "... without a warning" bash -c '! grep grouped_gemm both.err'
run_expect 0 '"gemm":"table up\.csv, down\.csv \+ tiles and waves","gemm_measured":4,' cat both/runs.jsonl
takes up '{ "up.csv" }'
up_us=$us
run_expect 0 'warning: up\.csv: grouped_gemm of 8 groups, 2 rows times 1500 x 1000 in bf16, is outside \(it has no' \
    cat up.err
ok "... once" test "$(grep -c grouped_gemm up.err)" = 1
run_expect 0 '"gemm_measured":2,"gemm_modelled":[2-9]' cat up/runs.jsonl
takes down '{ "down.csv" }'
ok "where there is no table, the model" near "$(sum "$up_us" "$us")" "$(sum "$both" "$plain")"
{ echo "$header"; printf "$up" 3 10; printf "$up" 4 11; } >far.csv
takes far '{ "far.csv" }'
ok "outside its rows a table changes nothing" test "$us" = "$plain"
run_expect 0 'far\.csv: grouped_gemm of 8 groups, 2 rows .* is outside \(it has 3 to 4 rows\): modelled' cat far.err

# What is no product: 16 rows between gate and up, and down; the core of 1 head over no context, as often as it runs.
{ echo 'op,precision,rows,n,heads,kv_heads,query,value,context,bytes,latency_us'
  echo 'activation,bf16,8,1500,,,,,,,6'
  echo 'activation,bf16,24,1500,,,,,,,8'
  echo 'attention_decode,bf16,2,,1,1,1000,1000,0,,100'
  echo 'attention_decode,bf16,4,,1,1,1000,1000,0,,120'; } >others.csv
figure() { sed "s/.*\"$2\":{[^}]*\"mean\":\([^,}]*\).*/\1/" "$1/runs.jsonl" | awk '{ printf "%.17g", 1e6 * $1 }'; }
takes others '{ "up.csv", "down.csv", "others.csv" }'
ok "activation as measured: 30 + 25 + 7" near "$us" 62
# modelled before: 4 KB read and as much written of one head; a launch
core=$(awk 'BEGIN { printf "%.17g", 2.5 + 2 * 2000 * 2 / (0.86 * 3.35e12) * 1e6 }')
ok "attention's core as well" near "$(sum "$(figure others attention_s)" "$core")" \
    "$(sum "$(figure both attention_s)" 100)"
run_expect 0 '"others":"table up\.csv, down\.csv, others\.csv \+ roofline"' cat others/runs.jsonl
run_expect 0 '"others_measured":[1-9][0-9]*,"others_modelled":0[,}]' cat others/runs.jsonl
ok "... without a warning of them" bash -c '! grep -E "activation|attention" others.err'
sed -i 's/,0,,100$/,1,,100/; s/,0,,120$/,1,,120/' others.csv
takes outside '{ "others.csv" }'
run_expect 0 'attention_decode of 2 rows, context 0, .*is outside \(it has 2 to 4 rows at contexts of 1' cat outside.err
ok "outside its contexts a table changes nothing" \
    test "$(figure outside attention_s)" = "$(figure plain attention_s)"
run_expect 0 '"gemm":"tiles and waves"' cat outside/runs.jsonl
ok "... and no product is counted" bash -c '! grep -q gemm_m outside/runs.jsonl'

# ---- what a run was made of ----

sum=$(sha256sum up.csv | cut -d ' ' -f 1)
ok "the manifest has the tables' checksums" grep -q "\"up.csv\": \"$sum\"" up/manifest.json
ok "... and their names" bash -c 'tr -d " \n" <both/manifest.json | grep -qF "\"tables\":[\"up.csv\",\"down.csv\"]"'

# ---- beside a machine file, and bad ones ----

mkdir there
{ printf 'return '; sed -n '/^return/,$p' "$top_srcdir/hw/machines/star-50GBps.lua" | sed '1s/^return//' |
    sed '0,/{/s//{ tables = { "mine.csv" },/'; } >there/mine.lua
sed 's/,50$/,70/' up.csv >there/mine.csv
sed 's/"star-50GBps"/"there\/mine.lua"/' plain.lua >there.lua
ok "a machine file names a table beside it" "$moelab" run there.lua --out there.out
run_expect 0 '"gemm":"table mine\.csv \+ tiles and waves","gemm_measured":2,' cat there.out/runs.jsonl
bad()
{
    scenario "$2" "${3-}" >bad.lua
    run_expect 2 "$1" "$moelab" run bad.lua --out bad
    ok "nothing is written" test ! -e bad
}
printf '%s\n' "$header" 'gemm,bf16,1,7,8,9,-2' >minus.csv
bad 'minus\.csv:2: latency_us: found "-2", expected microseconds, more than 0' '{ "minus.csv" }'
printf '%s\n' "$header" 'gemm,bf16,1,7,8,9,1000000000' >minus.csv
bad 'latency_us: found "1000000000", expected microseconds, more than 0 and less than 1e9' '{ "minus.csv" }'
printf '%s\n' "$header" 'norm,bf16,,7,8,9,5' >minus.csv
bad 'minus\.csv:2: k: found "9", expected nothing: a norm has no k' '{ "minus.csv" }'
bad 'tables: none\.csv: No such file' '{ "none.csv" }'
bad 'tables: expected a list' '"up.csv"'
bad 'tables: found "/etc/passwd", expected the name of a \.csv file' '{ "/etc/passwd" }'
bad 'table: unknown key, did you mean "tables"' '' ', table = { "up.csv" }'
plan
