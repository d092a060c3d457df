#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Speed and memory against their targets: `make bench`. Not a test: a busy machine may miss a target. One line each:
# what, target, figure, met or missed. Best of three where the work is short.
set -u
moelab=${MOELAB:-./moelab}
tool=${BENCH_TOOL:-tests/bench_tool}
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
"$tool" inputs "$dir" || exit 2

json() { # key: its number in the JSON on standard input
  sed -n "s/.*\"$1\": *\([-0-9.e+]*\).*/\1/p" | head -n 1
}

line() { # what, target with its sense (< or >), unit, figure
  awk -v what="$1" -v sense="${2:0:1}" -v target="${2:1}" -v unit="$3" -v figure="$4" 'BEGIN {
    met = figure == "" ? "no figure" : (sense == "<" ? figure + 0 < target : figure + 0 > target) ? "met" : "MISSED"
    printf "%-58s %s %-6g %-10s %10.4g  %s\n", what, sense, target, unit, figure, met }'
}

seconds() { # command...: best wall time of three
  local best=
  for _ in 1 2 3; do
    local t0=$EPOCHREALTIME
    "$@" >/dev/null 2>&1 || return 1
    best=$(awk -v a="$t0" -v b="$EPOCHREALTIME" -v best="$best" '
        BEGIN { d = b - a; print best == "" || d < best ? d : best }')
  done
  echo "$best"
}

line "quickstart, everything built" "<10" s "$(seconds "$moelab" run scenarios/quickstart.lua --out "$dir/quickstart")"
line "moelab plugins" "<0.05" s "$(seconds "$moelab" plugins)"
line "EPLB, 58 x 256 experts, 288 replicas, 32 devices" "<5" ms \
  "$("$moelab" eval placement eplb --input "$dir/eplb.json" --repeat 5 | json seconds | awk '{ print 1e3 * $1 }')"
for policy in lru:100 belady:20; do
  line "${policy%:*}, standard Zipf stream, 1536 of 15360 objects" ">${policy#*:}" "M req/s" \
    "$("$moelab" eval offload "${policy%:*}" --keys "$dir/zipf.npy" --capacity 1536 --repeat 5 |
        json requests_per_s | awk '{ print $1 / 1e6 }')"
done
w1=(eval machine star-50GBps --pattern alltoall --bytes-per-rank 16777216 --n 1024 --tier bound)
line "W1 (uniform all-to-all, 16 MiB per rank), N = 1024, bound" "<0.05" s \
    "$("$moelab" "${w1[@]}" --repeat 3 | json seconds)"
line "... its memory" "<100" MB \
  "$("$tool" rss "$moelab" "${w1[@]}")"
