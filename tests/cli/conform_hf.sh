#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Routers against what the modules of Hugging Face transformers chose (tests/data/hf, by tools/conform_hf.py): the same
# experts and, within 1e-5, the same weights, token by token.
. "$(dirname "$0")/lib.sh"

# field FILE KEY: the value of a key that has a line of its own
field()
{
    sed -n "s/^\"$2\": \(.*[^,]\),\{0,1\}\$/\1/p" "$1"
}

# Expected and found experts, expected and found weights, one list a line; k per token, in any order.
same_routes()
{
    awk -F, -v k="$1" '
        { n[NR] = NF; for (i = 1; i <= NF; i++) v[NR, i] = $i }
        END {
            if (NR != 4 || n[1] != n[2] || n[3] != n[1] || n[4] != n[1] || n[1] % k || n[1] < 48)
                { print "lists differ in length"; exit 1 }
            for (i = 1; i <= n[1]; i++) { t = int((i - 1) / k); want[t, v[1, i] + 0] = v[3, i] }
            for (i = 1; i <= n[1]; i++) {
                t = int((i - 1) / k); e = v[2, i] + 0
                if (!((t, e) in want)) { print "token " t ": expert " e " was not chosen"; exit 1 }
                d = v[4, i] - want[t, e]; d = d < 0 ? -d : d
                if (d > 1e-5 * want[t, e]) { print "token " t ", expert " e ": weight " v[4, i]; exit 1 }
                delete want[t, e]
            }
        }'
}

conforms()
{
    local file=$1 plugin sets=() s
    plugin=$(field "$file" plugin | tr -d '"')
    for s in $(field "$file" settings | tr -d '"'); do
        sets+=(--set "$s")
    done
    field "$file" input >"$work/in.json"
    "$moelab" eval router "$plugin" --input "$work/in.json" "${sets[@]}" >"$work/routes" || return 1
    {
        field "$file" experts | tr -d '[] '
        grep -o '"experts":\[[^]]*' "$work/routes" | sed 's/.*\[//'
        field "$file" weights | tr -d '[] '
        grep -o '"weights":\[[^]]*' "$work/routes" | sed 's/.*\[//'
    } | same_routes "$(field "$file" top_k)"
}

n_files=0
for file in "$top_srcdir"/tests/data/hf/*.json; do
    ok "$(basename "$file" .json): $(field "$file" router | tr -d '"') chooses and weighs the same" conforms "$file"
    n_files=$((n_files + 1))
done
ok "there are golden files of at least 20 routers" test "$n_files" -ge 20

# What is held against them is able to differ.
sed 's/^"settings": .*/"settings": "renormalise=true",/' "$top_srcdir/tests/data/hf/olmoe.json" >"$work/other.json"
ok "other weights are noticed" eval '! conforms "$work/other.json"'
sed 's/groups=4 top_groups=2/groups=4 top_groups=4/' "$top_srcdir/tests/data/hf/deepseek_v3.json" >"$work/other.json"
ok "other experts are noticed" eval '! conforms "$work/other.json"'
plan
