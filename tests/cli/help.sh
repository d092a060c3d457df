#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The manual says what the program can do: the same commands, the same options, the same policies.
. "$(dirname "$0")/lib.sh"
manual=$top_builddir/doc/moelab.1
cd "$work" || exit 99

run_expect 0 '^usage: moelab COMMAND' "$moelab" --help
run_expect 0 '^moelab [0-9]+\.[0-9]+\.[0-9]+ ' "$moelab" --version
run_expect 2 '^usage: ' "$moelab"
run_expect 2 'unknown command "rum"; did you mean "run"' "$moelab" rum

"$moelab" --help | sed -n 's/^  \([a-z][a-z]*\)  .*/\1/p' | sort >commands
sed -n 's/^\.SS moelab \([a-z]*\).*/\1/p' "$manual" | sort >described
ok "commands" diff commands described

# The options in a text, one per line, but --help.
options() { grep -Eo -- '--[a-z][a-z-]*' | grep -vx -- --help | sort -u; }
# What --help says of a command and its verbs, each "  NAME   Summary" with the verb's help behind it.
helps()
{
    "$moelab" "$@" --help
    case $1 in trace | machine) ;; *) return ;; esac
    "$moelab" "$1" --help | sed -n 's/^  \([a-z][a-z]*\)  .*/\1/p' |
        while read -r verb; do "$moelab" "$1" "$verb" --help; done
}
while read -r command; do
    run_expect 0 '[Ee]xamples?:' "$moelab" "$command" --help
    helps "$command" | grep -E '^(usage|  --)' | options >offered
    sed -n "/^\.SS moelab $command/,/^\.S/p" "$manual" | sed '$d;s/\\-/-/g' | options >described
    ok "options of moelab $command" diff offered described
done <commands

run_expect 0 'hit_rate .*first is a miss and counts' "$moelab" plugins
run_expect 0 '^  expert-choice +\* every expert' "$moelab" plugins
run_expect 0 '^  softmax-top-k +softmax' "$moelab" plugins
"$moelab" plugins --json | tr -d '\n' | grep -Eo '"kind": *"[a-z]*", *"name": *"[^"]*"' | tr -d '" ' >policies
for kind in router balancer placement dispatch offload; do
    sed -n "s/^kind:$kind,name://p" policies | sort >listed
    sed '1,/^\.SH POLICIES/d' "$manual" | grep -A 1 "^\.B $kind\$" | tail -n 1 | tr -s ', ' '\n' | sort >described
    ok "policies of kind $kind" diff listed described
done
plan
