#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# How time and memory grow with N, by network tier, next to SimGrid's flows and its parallel task: `make bench-scaling`.
# One exchange with uneven sizes, all pairs, on one switch. Writes results/bench/network-scaling.dat and, where gnuplot
# is, .png. A few minutes: a series ends with the first N that takes longer than its limit.
set -u
tool=${BENCH_NET:-tests/bench_net}
out=${1:-results/bench}
limit=${BENCH_LIMIT:-6} # s
mkdir -p "$out" || exit 2
data=$out/network-scaling.dat
series=(bound flow exact simgrid ptask)
: >"$data.new"
for tier in "${series[@]}"; do
  echo "# $tier: N, wall s, MB, simulated s" >>"$data.new"
  for n in 8 16 32 64 128 256 512 1024 2048; do
    # shellcheck disable=SC2046 # three words
    set -- $(timeout 60 "$tool" "$tier" uneven "$n") || break
    [ $# = 3 ] || break
    echo "$n $1 $2 $3" | tee -a "$data.new"
    awk -v s="$1" -v limit="$limit" 'BEGIN { exit s < limit ? 0 : 1 }' || break
  done
  printf '\n\n' >>"$data.new"
done
mv "$data.new" "$data"
command -v gnuplot >/dev/null || { echo "no gnuplot: no picture"; exit 0; }
gnuplot -e "data='$data'; picture='$out/network-scaling.png'" "${top_srcdir:-.}/tests/bench_scaling.gp" &&
  echo "$out/network-scaling.png"
