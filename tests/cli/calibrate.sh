#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# moelab calibrate measures this computer, and what it writes is a machine.
. "$(dirname "$0")/lib.sh"
mkdir "$work/here" && cd "$work/here" || exit 99
ok "help" "$moelab" calibrate --help
run_expect 2 'calibrate: --ranks 0: expected 1 to 256' "$moelab" calibrate --ranks 0
run_expect 2 'calibrate: --ranks two: expected 1 to 256' "$moelab" calibrate --ranks two
run_expect 2 'calibrate: --ranks: expected a value' "$moelab" calibrate --ranks
run_expect 2 'unknown option "?--rank' "$moelab" calibrate --rank=2
run_expect 2 'a/b: expected a name of letters' "$moelab" calibrate a/b
run_expect 2 'two: expected one name' "$moelab" calibrate one two
run_expect 2 '--ranks 2x0: expected 1 to 256' "$moelab" calibrate --gpu --ranks 2x0
run_expect 2 '--ranks 20x20: expected 1 to 256' "$moelab" calibrate --gpu --ranks 20x20
run_expect 2 '--ranks 2x4: expected nodes with --gpu alone' "$moelab" calibrate --ranks 2x4
run_expect 2 '--like dgx-h100: expected with --gpu' "$moelab" calibrate --like dgx-h100
run_expect 2 '--like dgx-h100, --ranks 2: expected one of them' "$moelab" calibrate --gpu --like dgx-h100 --ranks 2
run_expect 2 'no machine named "dgx-h10"' "$moelab" calibrate --gpu --like dgx-h10
run_expect 2 "/nowhere/x.lua: No such file" "$moelab" calibrate --gpu --out /nowhere/x.lua
if [ ! -e "$top_builddir/hw/cuda.so" ]; then
  run_expect 2 'calibrate: no module cuda.so .*--with-cuda' "$moelab" calibrate --gpu
else
  run_expect 2 'calibrate: no GPU: ' env CUDA_VISIBLE_DEVICES= "$moelab" calibrate --gpu --samples samples.json
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    ok "a GPU is measured" "$moelab" calibrate gpu --gpu --samples "$work/samples.json" --out "$work/gpu.lua"
    ok "... and is a machine" "$moelab" machine show "$work/gpu.lua"
  fi
fi
ok "nothing is written" test -z "$(ls)"
if [ ! -e "$top_builddir/hw/host.so" ] || ! command -v mpirun >/dev/null; then
  run_expect 2 'built without MPI or OpenBLAS|no mpirun on PATH' "$moelab" calibrate
  plan
  exit
fi
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0 # MPI's, from code that is no longer loaded
run_expect 2 'no mpirun on PATH' env PATH=/nowhere "$moelab" calibrate
run_expect 2 'cannot make the directory /nowhere' env TMPDIR=/nowhere "$moelab" calibrate
ok "nothing is written" test -z "$(ls)"

ok "two ranks measure" "$moelab" calibrate two-ranks --ranks 2 --samples samples.json
cp "$work/out" said
ok "... so many sizes as are announced" \
    test "$(grep -c '"what"' samples.json)" = "$(sed -n 's/.*RANK_CALIBRATION_SIZES = 3 . \([0-9]*\).*/\1/p' \
    "$top_srcdir/core/rank.h")"
ok "... what was measured is said" grep -Eq "^ *products +[0-9]+ +[0-9.]+ % " said
ok "... with the date and versions" grep -Eq '^-- Measured by .moelab calibrate. on [0-9-]{10}: 2 ranks' two-ranks.lua
ok "... of the libraries" grep -Eq 'moelab [0-9.]+, OpenBLAS .*, Open MPI' two-ranks.lua
ok "it is a machine" "$moelab" machine show "$PWD/two-ranks.lua"
cat >run.lua <<'EOF'
local moe = require "moelab"
moe.experiment {
  model = { layers = 2, experts = 8, top_k = 2, d_model = 128, d_expert = 64, n_heads = 2, d_head = 64,
            precision = "fp32" },
  machine = moe.machine "two-ranks.lua" {}, executor = moe.each { "flow", "host" }, tier = "flow",
  workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 16,
                                              tokens_per_request = 20 },
                          batch_per_device = 16, steps = 1, context = 64 },
  offload = moe.each { "none", "lru" },
}:run()
EOF
ok "runs are simulated on it, and real" "$moelab" run run.lua --out results
ok "four of them" test "$(grep -c '"step_s"' results/runs.jsonl)" = 4
ok "the simulation takes the computer as fast as the run found it" "$moelab" run run.lua --out paced --machine host \
    --against flow
ok "... which is said of each run" test "$(grep -c '"pace":[0-9.]' paced/runs.jsonl)" = 2 -a \
    "$(grep -c 'the computer took [0-9.]* times as long for a probe' paced/against.txt)" = 2
sed 's/probe_s = \([0-9.e-]*\),/probe_s = \1 \/ 100,/' two-ranks.lua >slow.lua
sed 's/two-ranks.lua/slow.lua/' run.lua >slow-run.lua
run_expect 1 'the probe took .* ms beside the run and .* ms when .* calibrated, expected within ten times' \
    "$moelab" run slow-run.lua --out slow --machine host --against flow
ok "... and kept in the manifest" grep -q '"pace": *[0-9.]' paced/manifest.json
ok "one rank has no exchanges" "$moelab" calibrate alone --ranks 1
ok "... and no links" test "$(grep -c nvlink alone.lua | head -n 1)" -le 1
run_expect 2 "/nowhere/x.lua: No such file" "$moelab" calibrate --ranks 1 --out /nowhere/x.lua
run_expect 2 "/nowhere/x.json: No such file" "$moelab" calibrate --ranks 1 --samples /nowhere/x.json
mkdir -p folder
run_expect 2 "folder: is a directory, expected a file" "$moelab" calibrate --ranks 1 --out folder
run_expect 2 "folder: is a directory, expected a file" "$moelab" calibrate --ranks 1 --samples folder
for other in x.lua ./x.lua "$PWD/x.lua" folder/../x.lua; do
    run_expect 2 "samples $other: is what --out names" "$moelab" calibrate --ranks 1 --samples "$other" --out x.lua
done
run_expect 2 '--out: is empty' "$moelab" calibrate --ranks 1 --out ''
run_expect 2 'calibrate: 2 ranks hold 1.[0-9]* GB, and 50.0 MB is available .MOELAB_HOST_MEMORY.' \
    env MOELAB_HOST_MEMORY=50e6 "$moelab" calibrate --ranks 2
if [ "$(id -u)" = 0 ] && mkdir small && mount -t tmpfs -o size=20m none small 2>/dev/null; then
    run_expect 2 'calibrate: 2 ranks write files of 537 MB, and small has 21.0 MB left' \
        env TMPDIR=small "$moelab" calibrate --ranks 2
    umount small
else
    skip "a disk that is too small" "cannot mount"
fi
ok "nothing more is written" test ! -e x.lua -a ! -e cpu-localhost.lua -a -z "$(ls folder)"
plan
