#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# gpu_check.sh TARBALL SOURCES REPORT - builds moelab from what `make dist` made, checks on the GPU of this machine that
# it computes what it should, runs scenarios/gpu/*.lua, and writes what they said into the file REPORT.
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

# part SECONDS TITLE COMMAND...: what it prints goes into the report; of what fails, the end.
part()
{
    local limit=$1 title=$2 began=$SECONDS code
    shift 2
    timeout "$limit" "$@" >"$work/log" 2>&1 </dev/null
    code=$?
    say "== $title: $([ $code = 0 ] && echo done || echo "FAILED, exit status $code$([ $code = 124 ] &&
        echo ", stopped after $limit s")"), $((SECONDS - began)) s"
    [ $code = 0 ] || failed=1
    return $code
}
shown() { part "$@"; local code=$?; tail -n 60 "$work/log" | tee -a "$report"; return $code; }
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
nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv,noheader 2>&1 | head -n 8 |
    tee -a "$report"
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
shown 120 "outputs against the reference" ./moelab run scenarios/gpu/verify.lua --out "$work/verify"
say "largest relative errors: $(grep -Eo '"verified":[0-9.e-]+' "$work/verify/runs.jsonl" 2>/dev/null | sort | uniq |
    tr '\n' ' ')"
for scenario in layouts offload; do
    shown 100 "$scenario, measured" ./moelab run "scenarios/gpu/$scenario.lua" --out "$work/$scenario"
    shown 30 "$scenario, simulated (machine file as published, not calibrated)" ./moelab run \
        "scenarios/gpu/$scenario.lua" --machine flow --allow-extrapolation --out "$work/$scenario.flow"
done
say "== $([ $failed = 0 ] && echo "all was well" || echo "SOMETHING FAILED") after $SECONDS s"
exit $failed
