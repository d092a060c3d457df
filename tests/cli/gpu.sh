#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# What is for a GPU, as far as it goes without one: its scenarios on a simulated machine, and tools/gpu_check.sh and the
# bench with a moelab that only says it measured.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99
gpu=$top_srcdir/scenarios/gpu

# ---- scenarios -------------------------------------------------------------------------------------------------------

for scenario in fp8 gemm kernels layouts offload verify; do
    ok "$scenario, simulated" "$moelab" run "$gpu/$scenario.lua" --machine flow --out "$scenario"
done
# 512 rows for each of 8 experts in 2 layers: 6 x 512 x 2048 x 768 operations each, over the time of the experts.
rate=$(grep '"workload.batch_per_device":"512"' gemm/runs.jsonl |
    sed 's/.*"experts_s":{[^}]*"mean":\([-0-9.e+]*\).*/\1/' |
    awk '{ print 2 * 8 * 6 * 512 * 2048 * 768 / $1 / 1e12 }')
ok "what is drawn is the rate ($rate)" awk -v rate="$rate" '
    $1 == 512 { d = $2 / rate - 1; found = d < 1e-4 && d > -1e-4 } END { exit !found }' gemm/gemm.dat
ok "rates of the three kernels are drawn" test "$(cat kernels/{permute,unpermute,gate}.dat | grep -c '^4096')" = 3
ok "with another machine" "$moelab" run "$gpu/offload.lua" --machine flow --set machine=rtx4090-pcie4 \
    --set machine.devices=1 --out other
ok "... its loads take longer" test "$(for d in offload other; do head -n 1 $d/runs.jsonl |
    sed 's/.*"load_s":{[^}]*"mean":\([-0-9.e+]*\).*/\1/'; done | sort -gr | head -n 1)" = \
    "$(head -n 1 other/runs.jsonl | sed 's/.*"load_s":{[^}]*"mean":\([-0-9.e+]*\).*/\1/')"
sed 's/y = rate/y = rate, ylabel = nil/; s/ylabel = "TFLOP.*included", //' "$gpu/gemm.lua" >no-label.lua
run_expect 2 'no-label.lua:[0-9]*: runs:plot: ylabel is missing: y is a function' \
    "$moelab" run no-label.lua --machine flow --out no-label
if [ -e "$top_builddir/hw/cuda.so" ]; then
    run_expect 2 'offload.lua:[0-9]*: machine cuda: no GPU' env CUDA_VISIBLE_DEVICES= \
        "$moelab" run "$gpu/offload.lua" --machine cuda --against flow --out none
    ok "nothing is written" test ! -e none
fi

# ---- the check and the bench, of a moelab that is made up ------------------------------------------------------------

mkdir -p bin made/tests made/scenarios
cp "$top_srcdir/tests/bench_gpu.sh" made/tests
printf '#!/bin/sh\necho "a compiler"\n' >bin/nvcc
cp bin/nvcc bin/nvidia-smi
chmod +x bin/*
# configure makes the program, which does as FAKE says.
cat >made/configure <<'OUTER'
#!/bin/sh
printf 'all:\n' >Makefile
cat >moelab <<'EOF'
#!/bin/bash
echo "$*" >>"$CALLS"
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=$2 ;;
    calibrate | run) what=$1 file=$2 ;;
    esac
    shift
done
case $FAKE:$what in
none:calibrate) echo "moelab: calibrate: no GPU: there is no driver (an error)" >&2; exit 2 ;;
broken:calibrate) echo "moelab: rank 0, GPU 0: cudaMalloc: an error" >&2; exit 1 ;;
*:calibrate)
    [ $FAKE != old ] || capability=8.0
    echo "return { name = \"made-up\" }" >"$out"
    echo "  measured     sizes"
    echo "  moelab 0.1.0, Made-up GPU (compute capability ${capability:-9.0}, 96 SMs), driver 13.0"
    echo "  300 TFLOP/s in bf16, 30 in fp32; 1800 GB/s of copies, 50 GB/s from the host after 8 us"
    echo "  permute, 65536 tokens x 4096: 1620 GB/s, 90.0 % of copies, spread 0.1 %"
    echo "  unpermute, 65536 tokens x 4096: 1440 GB/s, 79.9 % of copies, spread 0.1 %"
    echo "  top-k, 65536 tokens x 256: 1440 GB/s, 80.0 % of copies, spread 0.1 %"
    echo "  8 products of 512 rows in bf16: 241.6 TFLOP/s, 90.1 % of one with 4096 rows, spread 0.2 %" ;;
slow:run) exit 1 ;;
*:run)
    mkdir -p "$out"
    echo '{"axes":{"cuda_graphs":true,"offload":"lru"},"machine":"cuda","metrics":{'`
        `'"load_s":{"max":2.0,"mean":1.0,"p50":1.0},"loaded_bytes":{"max":1.0,"mean":4.6e10},'`
        `'"queue_s":{"max":1,"mean":0.000256}},"verified":1.5e-07}' \
        >"$out/runs.jsonl"
    echo "  said of $(basename "$file")" ;;
esac
EOF
chmod +x moelab
OUTER
chmod +x made/configure
tar -czf made.tar.gz made
export CALLS=$work/calls
cat >check <<EOF
: >calls
export PATH=$work/bin:\$PATH FAKE=\$1
exec bash "$top_srcdir/tools/gpu_check.sh" made.tar.gz - report
EOF

run_expect 2 'usage: gpu_check.sh' bash "$top_srcdir/tools/gpu_check.sh" made.tar.gz
run_expect 2 'no such tarball' bash "$top_srcdir/tools/gpu_check.sh" nothing.tar.gz - report
ok "everything in turn" bash check well
said=$(sed 's/--out [^ ]*//; s/--samples [^ ]*//; s|[^ =]*/\([a-z0-9]*.lua\)|\1|g; s/  */ /g; s/ $//' calls)
ok "... calibration first, then what is computed, then scenarios against the calibrated machine" test "$said" = \
    "calibrate gpu --gpu
run verify.lua
run fp8.lua
run offload.lua --machine cuda --against flow --set machine=gpu.lua
run gemm.lua --machine cuda --against flow --set machine=gpu.lua
run kernels.lua --machine cuda --against flow --set machine=gpu.lua
run decode.lua
calibrate virtual --gpu --ranks 2x4
run layouts.lua --machine cuda --against flow --set machine=virtual.lua
run empty.lua --quiet"
ok "... the report has what each said" test "$(grep -c '^  said of ' report)" = 7
ok "... and the machine" test "$(tail -n 2 report | head -n 1)" = "$(cat report.lua)"
ok "... and targets: permute" grep -Eq '^permute, 65536 tokens x 4096, of copies +> 80 +% +90 +met$' report
ok "... unpermute" grep -Eq '^unpermute, .* > 80 +% +79.9 +MISSED$' report
ok "... top-k" grep -Eq '^top-k, 65536 tokens x 256, .* > 80 +% +80 +met$' report
ok "... groups" grep -Eq 'groups of 512 rows.* > 85 +% +90.1 +met$' report
ok "... loads, 46 GB in a second of 50" grep -Eq 'loads from pinned memory.* > 90 +% +92 +met$' report
ok "... a layer of 16 in 256 us" grep -Eq 'a layer of a decode step as a graph +< 20 +us +16 +met$' report
ok "... it was well" grep -q '^== all was well after' report
run_expect 1 'THERE IS NO GPU to use here' bash check none
ok "... which is said, and nothing is tried" test "$(wc -l <calls)" = 1
ok "... with what moelab says" grep -q '^moelab: calibrate: no GPU: there is no driver' report
run_expect 1 'SOMETHING FAILED' bash check broken
ok "... what does not need the machine file runs" test "$(grep -c '^run .*/*.lua' calls)" -ge 5
ok "... on the machines that scenarios name" test "$(grep -c 'machine=' calls)" = 0
ok "an older GPU" bash check old
said=$(grep -c fp8 calls):$(grep -c "^== FP8: not tried, .* 8.0 and 8.9 is needed" report)
ok "... does without FP8, which is said" test "$said" = 0:1
run_expect 1 'offload, measured and simulated: FAILED, exit status 1' bash check slow
(mkdir bench && cd made && sh ./configure && FAKE=none MOELAB=./moelab bash tests/bench_gpu.sh "$work/bench") >said
ok "the bench without a GPU" grep -q '^machine cuda: no GPU here, its targets are not measured (moelab: .*no GPU' said
plan
