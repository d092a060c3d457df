#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# bench_gpu.sh DIR - machine cuda against its targets, a line each: part of `make bench` and of tools/gpu_check.sh. What
# is in DIR already (calibration.txt: what `moelab calibrate --gpu` said; offload: results of scenarios/gpu/offload.lua)
# is not measured again. Without a GPU it says so.
set -u
moelab=${MOELAB:-./moelab}
dir=$1

line() { # what, target with its sense (< or >), unit, figure
  awk -v what="$1" -v sense="${2:0:1}" -v target="${2:1}" -v unit="$3" -v figure="$4" 'BEGIN {
    met = figure == "" ? "no figure" : (sense == "<" ? figure + 0 < target : figure + 0 >= target) ? "met" : "MISSED"
    printf "%-58s %s %-6g %-10s %10.4g  %s\n", what, sense, target, unit, figure, met }'
}

if [ ! -s "$dir/calibration.txt" ] &&
    ! "$moelab" calibrate gpu --gpu --out "$dir/gpu.lua" >"$dir/calibration.txt" 2>"$dir/calibration.err"; then
  echo "machine cuda: no GPU here, its targets are not measured ($(head -n 1 "$dir/calibration.err"))"
  rm -f "$dir/calibration.txt"
  exit 0
fi

of_copies() { # kernel: its share of the bandwidth of copies, in %
  sed -n "s/^ *$1, .*, \([0-9.]*\) % of copies, spread.*/\1/p" "$dir/calibration.txt"
}
echo "GPU: $(sed -n 's/^ *moelab [^,]*, \(.*\)$/\1/p' "$dir/calibration.txt")"
for kernel in permute unpermute top-k; do
  line "$kernel, $(sed -n "s/^ *$kernel, \(.*\): .*/\1/p" "$dir/calibration.txt"), of copies" ">80" % \
    "$(of_copies "$kernel")"
done
line "experts' products in groups of 512 rows, of one with all" ">85" % \
  "$(sed -n 's/^ *8 products of 512 rows in bf16: .*, \([0-9.]*\) % of one.*/\1/p' "$dir/calibration.txt")"

[ -s "$dir/offload/runs.jsonl" ] ||
  "$moelab" run scenarios/gpu/offload.lua --machine cuda --quiet --out "$dir/offload" >/dev/null 2>&1
pinned=$(sed -n 's/.* \([0-9.]*\) GB\/s from the host after.*/\1/p' "$dir/calibration.txt")
mean() { sed -n "s/.*\"$1\":{[^}]*\"mean\":\([-0-9.e+]*\).*/\1/p"; } # figure: its mean in each line
run=$(grep '"machine":"cuda"' "$dir/offload/runs.jsonl" 2>/dev/null | grep '"offload":"lru"' |
  head -n 1)
line "loads from pinned memory, of its copies' bandwidth" ">90" % "$(awk -v bytes="$(mean loaded_bytes <<<"$run")" \
  -v s="$(mean load_s <<<"$run")" -v rate="$pinned" 'BEGIN { if (s > 0 && rate > 0) print bytes / s / rate / 1e7 }')"

# All that a layer costs when there is next to nothing to compute.
cat >"$dir/empty.lua" <<'LUA'
local moe = require "moelab"
moe.experiment {
  model = { layers = 16, experts = 8, top_k = 2, d_model = 256, d_expert = 64, n_heads = 2, d_head = 64 },
  machine = moe.machine "dgx-h100" { nodes = 1, devices = 1 }, executor = "cuda", virtual_ranks = true,
  cuda_graphs = moe.each { false, true },
  workload = moe.decode { trace = moe.synth { layers = 16, experts = 8, top_k = 2, requests = 16,
                                              tokens_per_request = 20 },
                          batch_per_device = 4, steps = 8, context = 16 },
}:run()
LUA
"$moelab" run "$dir/empty.lua" --quiet --out "$dir/empty" >/dev/null 2>&1
per_layer() { # cuda_graphs, figure
  grep "\"cuda_graphs\":$1" "$dir/empty/runs.jsonl" 2>/dev/null | head -n 1 | mean "$2" | awk '{ print 1e6 * $1 / 16 }'
}
line "host, to queue a layer of a decode step as a graph" "<20" us "$(per_layer true queue_s)"
echo "    call by call $(per_layer false queue_s) us; of the whole step $(per_layer true step_s) and" \
  "$(per_layer false step_s) us"
