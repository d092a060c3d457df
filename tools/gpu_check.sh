#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# gpu_check.sh TARBALL SOURCES REPORT - builds moelab from what `make dist` made, checks on the GPU of this machine that
# it computes what it should, calibrates a machine file, runs scenarios/gpu/*.lua against a simulation of that machine,
# and writes what they said into the file REPORT, and the machine into REPORT.lua. Ends within 8 minutes.
#
# Needs a C compiler, make, nvcc and no network. SOURCES is a folder with lua-5.4*.tar.* and jansson-2*.tar.*, or "-"
# where both are installed and pkg-config knows them. Exit status: 0 all was well, 1 something failed, 2 it cannot start.
set -u
export LC_ALL=C
[ $# -eq 3 ] || { echo "usage: gpu_check.sh TARBALL SOURCES|- REPORT" >&2; exit 2; }
tarball=$(readlink -f "$1") || exit 2
[ -r "$tarball" ] || { echo "gpu_check: $1: no such tarball: make dist makes it" >&2; exit 2; }
sources=$2
[ "$sources" = - ] || sources=$(readlink -f "$sources")
[ "$sources" = - ] || [ -d "$sources" ] || { echo "gpu_check: $2: no such folder" >&2; exit 2; }
: >"$3" || exit 2
report=$(readlink -f "$3")
export PATH=$PATH:/usr/local/cuda/bin
for tool in cc make nvcc tar; do
    command -v "$tool" >/dev/null || { echo "gpu_check: no $tool on PATH" >&2; exit 2; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu-check.XXXXXX") || exit 2
trap 'rm -rf --one-file-system "$work"' EXIT
jobs=$(nproc)
failed=0

say() { echo "$*" | tee -a "$report"; }

# part SECONDS TITLE COMMAND...: what it prints goes into the report; of what fails, the end. All parts together have
# 470 s; one for which too little is left is not begun.
part()
{
    local limit=$1 title=$2 began=$SECONDS code left=$((470 - SECONDS))
    shift 2
    if [ $left -lt 5 ]; then
        say "== $title: NOT RUN, no time is left"
        : >"$work/log"
        failed=1
        return 1
    fi
    [ "$limit" -le $left ] || limit=$left
    timeout "$limit" "$@" >"$work/log" 2>&1 </dev/null
    code=$?
    say "== $title: $([ $code = 0 ] && echo done || echo "FAILED, exit status $code$([ $code = 124 ] &&
        echo ", stopped after $limit s")"), $((SECONDS - began)) s"
    [ $code = 0 ] || failed=1
    return $code
}
shown() { part "$@"; local code=$?; tail -n "${lines:-60}" "$work/log" | tee -a "$report"; return $code; }
built() { part "$@" || { tail -n 30 "$work/log" | tee -a "$report"; exit 1; }; }

# unpack PATTERN: the one such archive in SOURCES, into $work
unpack()
{
    local found
    found=$(find "$sources" -maxdepth 1 -name "$1" | sort | tail -n 1)
    [ -n "$found" ] || { echo "gpu_check: no $1 in $sources" >&2; exit 2; }
    tar -C "$work" -xf "$found" || exit 2
}

say "moelab on a GPU: $(basename "$tarball"), $(date -u +%Y-%m-%dT%H:%MZ), $(uname -m), $jobs processors"
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv,noheader 2>&1 | head -n 8
else
    echo "no nvidia-smi on PATH"
fi | tee -a "$report"
nvcc --version | tail -n 2 | tee -a "$report"

if [ "$sources" != - ]; then
    unpack 'lua-5.4*.tar.*'
    unpack 'jansson-2*.tar.*'
    cd "$work"/lua-5.4* || exit 2
    built 120 "Lua" make -C src -j"$jobs" a MYCFLAGS="-fPIC -DLUA_USE_LINUX"
    LUA_CFLAGS="-I$PWD/src" LUA_LIBS="$PWD/src/liblua.a -lm -ldl"
    cd "$work"/jansson-2* || exit 2
    built 120 "jansson, configured" ./configure --disable-shared --with-pic
    built 120 "jansson" make -C src -j"$jobs"
    JANSSON_CFLAGS="-I$PWD/src" JANSSON_LIBS="$PWD/src/.libs/libjansson.a"
    export LUA_CFLAGS LUA_LIBS JANSSON_CFLAGS JANSSON_LIBS
fi

mkdir "$work/moelab" && tar -C "$work/moelab" --strip-components=1 -xf "$tarball" && cd "$work/moelab" || exit 2
built 120 "moelab, configured" ./configure --without-simgrid --without-mpi --without-openblas --with-cuda
built 240 "moelab" make -j"$jobs"

# Whatever comes next needs a GPU: without one, this says why, and nothing else is tried.
machine=()
if shown 100 "calibration" ./moelab calibrate gpu --gpu --out "$work/gpu.lua" --samples "$work/samples.json"; then
    cp "$work/log" "$work/calibration.txt"
    cp "$work/gpu.lua" "$report.lua"
    machine=(--set machine="$work/gpu.lua")
elif grep -Eq 'no GPU|the driver is for CUDA' "$work/log"; then
    say "== THERE IS NO GPU to use here: nothing was computed, and nothing else is tried"
    exit 1
else
    say "== simulations below are of the machine files that scenarios name, not of this GPU"
fi
shown 120 "outputs against the reference" ./moelab run scenarios/gpu/verify.lua --out "$work/verify"
say "largest relative errors: $(grep -Eo '"verified":[0-9.e-]+' "$work/verify/runs.jsonl" 2>/dev/null | sort | uniq |
    tr '\n' ' ')"
capability=$(sed -n 's/.*compute capability \([0-9.]*\).*/\1/p' "$work/calibration.txt" 2>/dev/null | head -n 1)
if awk -v c="${capability:-9.0}" 'BEGIN { exit !(c >= 8.9) }'; then
    shown 80 "FP8 against the reference, and its times" ./moelab run scenarios/gpu/fp8.lua --out "$work/fp8"
else
    say "== FP8: not tried, this GPU has compute capability $capability and 8.9 is needed"
fi
lines=400
for scenario in offload gemm kernels; do
    shown 70 "$scenario, measured and simulated" ./moelab run "scenarios/gpu/$scenario.lua" --machine cuda \
        --against flow "${machine[@]}" --out "$work/$scenario"
done
shown 60 "decode, with and without CUDA graphs" ./moelab run scenarios/gpu/decode.lua --out "$work/decode"
machine=()
shown 60 "calibration of eight virtual ranks" ./moelab calibrate virtual --gpu --ranks 2x4 --out "$work/virtual.lua" &&
    machine=(--set machine="$work/virtual.lua")
shown 70 "layouts on eight virtual ranks, measured and simulated" ./moelab run scenarios/gpu/layouts.lua \
    --machine cuda --against flow "${machine[@]}" --out "$work/layouts"
shown 60 "targets" bash tests/bench_gpu.sh "$work"
[ ! -e "$work/gpu.lua" ] || { echo "== the machine file, $(basename "$report").lua"; cat "$work/gpu.lua"; } >>"$report"
say "== $([ $failed = 0 ] && echo "all was well" || echo "SOMETHING FAILED") after $SECONDS s"
exit $failed
