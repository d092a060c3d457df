#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Ranks that would not fit in this machine's memory do not start; what they will hold is told beforehand, and right.
. "$(dirname "$0")/lib.sh"
[ -e "$top_builddir/hw/host.so" ] || skip_all "built without MPI or OpenBLAS"
command -v mpirun >/dev/null || skip_all "no mpirun"
unset MOELAB_HOST_MEMORY
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0 # MPI's, from code that is no longer loaded
cd "$work" || exit 99
mkdir bin tmp
export TMPDIR=$work/tmp # where synthetic traces are kept

# An mpirun that leaves a sign of itself: what is refused must not come so far.
printf '#!/bin/sh\n: >"%s"\nexec "%s" "$@"\n' "$work/started" "$(command -v mpirun)" >bin/mpirun
chmod +x bin/mpirun
export PATH=$work/bin:$PATH

# one FILE MODEL WORKLOAD KEYS: a scenario with one run, whose experiment is on line 2
one()
{
    cat >"$1.lua" <<EOF
local moe = require "moelab"
moe.experiment {
  model = { layers = 2, experts = 8, top_k = 2, n_heads = 1, d_head = 16, $2 },
  machine = moe.machine "star-50GBps" { nodes = 2 }, executor = "host",
  workload = moe.decode {
    trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 8, tokens_per_request = 60 }, $3 },
  $4
}:run()
EOF
}

# refused REGEX FILE: exit code 2 and a message, before a rank starts; nothing is left
refused()
{
    rm -rf started results
    run_expect 2 "$1" "$moelab" run "$2.lua" --out results
    ok "... in one line of its own" test "$(grep -vc 'take turns on' err)" = 1
    ok "... before a rank started" test ! -e started
    ok "... and nothing is written" test ! -e results -a ! -e results.part -a -z "$(find tmp -name 'moelab-??????')"
}

small='d_model = 16, d_expert = 8'
some='batch_per_device = 8, steps = 3'
size='[0-9.]+ [kMGTP]B'

one wide 'd_model = 1048576, d_expert = 1048576' "$some" ''
refused "wide\.lua:2: machine host: after 1 of 3 steps the 2 ranks would hold $size, and $size is available \(.+\): \
$size weights of [0-9]+ experts \(d_model 1048576, d_expert 1048576, .*: make d_model, d_expert, experts or layers \
smaller for the weights, d_model or batch_per_device for rows" wide
one long 'd_model = 1048576, d_expert = 1' 'batch_per_device = 1048576, steps = 3' ''
refused "long\.lua:2: machine host: before the first step the 2 ranks would hold .* $size rows of 2097152 tokens in 2 \
layers" long
sed 's/moe\.decode/moe.prefill/; s/batch_per_device/tokens_per_device/' long.lua >prefill.lua
refused 'prefill\.lua:2: .* d_model or tokens_per_device' prefill
# The second run of a sweep, before the first begins.
one second 'd_model = moe.each { 16, 1048576 }, d_expert = 65536' "$some" ''
refused 'second\.lua:2: .*\(d_model 1048576' second
one crowd "$small" "$some" 'machine = moe.machine "star-50GBps" { nodes = 4096 },'
refused 'crowd\.lua:2: machine host: 4096 devices, expected at most 256: .* there are [0-9]+ processors' crowd

# held DIR KEY: bytes that a run's record names
held() { grep -Eo "\"$2\":[0-9.e+]*" "$1/runs.jsonl" | cut -d: -f2; }
# at_most A B FACTOR: A is no more than B times the factor
at_most() { awk -v a="$1" -v b="$2" -v f="$3" 'BEGIN { exit !(a > 0 && b > 0 && a <= b * f) }'; }

one weights 'd_model = 512, d_expert = 1024' 'batch_per_device = 512, steps = 3' ''
one rows 'd_model = 256, d_expert = 64' 'batch_per_device = 8192, steps = 2' ''
one moving 'd_model = 512, d_expert = 1024' 'batch_per_device = 64, steps = 8' \
    'placement = moe.plugin("eplb", { replicas = 12, interval = 2 }),'
one verified 'd_model = 64, d_expert = 32' 'batch_per_device = 4096, steps = 2' 'verify = true,'
# Sanitizers hold memory of their own for every byte.
factor=1.3
grep -q __asan_init "$moelab" && factor=100
for run in weights rows moving verified; do
    ok "$run" "$moelab" run $run.lua --out $run
    needed=$(held $run memory_needed) peak=$(held $run peak_memory)
    [ $factor = 1.3 ] && ok "... the ranks held $peak bytes, $needed were told beforehand" at_most "$peak" "$needed" 1
    # 40 MB is the start of any two ranks.
    ok "... which is not far above" at_most "$(awk "BEGIN { print $needed - 4e7 }")" "$peak" $factor
done

# The limit itself: what is needed and no more is enough, a tenth less is not.
needed=$(held weights memory_needed)
enough=$(awk "BEGIN { printf \"%.0f\", 1.05 * $needed }")
MOELAB_HOST_MEMORY=$enough ok "what is needed is enough" "$moelab" run weights.lua --out again
export MOELAB_HOST_MEMORY
MOELAB_HOST_MEMORY=$(awk "BEGIN { printf \"%.0f\", 0.9 * $needed }")
refused 'weights\.lua:2: .* is available \(MOELAB_HOST_MEMORY\)' weights
for bytes in plenty 0 -1 1e9x inf nan; do
    MOELAB_HOST_MEMORY=$bytes
    refused "weights\.lua:2: machine host: MOELAB_HOST_MEMORY=$bytes: expected bytes" weights
done
MOELAB_HOST_MEMORY=1 ok "simulated, the same run needs nothing of the sort" \
    "$moelab" run weights.lua --machine flow --allow-extrapolation --out flow
unset MOELAB_HOST_MEMORY
ok "... and its record says nothing of memory" test "$(grep -c '"memory_needed"' flow/runs.jsonl)" = 0

# More ranks than processors: allowed, and said once.
n=$(($(getconf _NPROCESSORS_ONLN) + 1))
if [ $n -le 32 ]; then
    one turns "$small" "$some" "machine = moe.machine \"star-50GBps\" { nodes = $n }, seed = moe.each { 1, 2 },"
    ok "more ranks than processors" "$moelab" run turns.lua --out turns
    ok "... which is told, once" test "$(grep -c "machine host: $n ranks take turns on" err)" = 1
fi
plan
