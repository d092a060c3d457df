#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Relations between figures that hold whatever the machine's figures are: tests/cli/fixtures/relations.lua.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99
run_expect 0 'ok: attention grows' "$moelab" run "$top_srcdir/tests/cli/fixtures/relations.lua" --out results
cp out printed
while read -r line; do
    ok "${line#*: }" grep -qxF "ok: ${line#*: }" printed
done < <(grep -E '^(NOT OK|ok): ' printed)
ok "all twelve were checked" test "$(grep -cE '^(NOT OK|ok): ' printed)" = 12
plan
