#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The tables of doc/routers.md and doc/balancers.md are what their scenarios print. With --update they are written.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99
for page in routers balancers; do
    ok "scenarios/$page.lua" "$moelab" run "$top_srcdir/scenarios/$page.lua" --quiet --out "$page"
    doc=$top_srcdir/doc/$page.md
    if [ "${1-}" = --update ]; then
        awk -v table="$page/$page.txt" '/^```$/ { print; inside = !inside
                while (inside && (getline line <table) > 0) print line; next }
            !inside { print }' "$doc" >new && cp new "$doc"
    fi
    sed -n '/^```$/,/^```$/p' "$doc" | sed '1d;$d' >written
    ok "doc/$page.md has its table" diff "$page/$page.txt" written
done
plan
