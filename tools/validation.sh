#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Calibrates this computer, runs scenarios/validation.lua on machine host against tier flow, and writes
# doc/validation.md and doc/validation.png from what came out. From the root of a built tree, with nothing else running:
# 2 minutes a try and 5 tries at most, the longer the more others use the computer.
set -eu
[ -x ./moelab ] && [ -d doc ] || { echo "validation.sh: expected to start in the root of a built tree" >&2; exit 2; }
root=$PWD
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

# Bandwidths of memory and between ranks, as calibrate prints them, and those that differ by more than 15 %.
figures() { sed -n 's/^ *[0-9.]* GFLOP.s, \([0-9.]*\) GB.s of memory, \([0-9.]*\) GB.s between.*/\1 \2/p' "$1"; }
differ() {
    printf '%s %s\n' "$(figures "$1")" "$(figures "$2")" |
        awk '{ for (i = 1; i <= 2; i++) { r = $i / $(i + 2); n += r > 1.15 || r < 1 / 1.15 } exit n == 0 }'
}

# A computer that others share changes its pace by the minute: what is measured counts if it is calibrated alike
# afterwards, for at most TRIES times.
tries=${TRIES:-5}
for try in $(seq "$tries"); do
    "$root/moelab" calibrate cpu-localhost --ranks 2 >calibration.txt
    rm -rf results
    "$root/moelab" run "$root/scenarios/validation.lua" --machine host --against flow --out results --quiet
    "$root/moelab" calibrate afterwards --ranks 2 >afterwards.txt
    differ calibration.txt afterwards.txt || break
    echo "validation.sh: try $try of $tries: $(figures calibration.txt) GB/s before, $(figures afterwards.txt) after" >&2
done
cp results/against.png "$root/doc/validation.png"
others=$(sed -n '/^## Other measurements/,$p' "$root/doc/validation.md") # kept by hand: add what is replaced here
{
    cat <<'EOF'
# How far the simulation is from this computer

Written by `tools/validation.sh`, from runs in this repository: `moelab calibrate`, and then
`scenarios/validation.lua` on machine `host` (two ranks that really compute) against tier `flow` of the machine file
that was just written. Nothing is fitted to a run: the matrices that are measured are others than those that run.

EOF
    sed -n 's/^-- \(Measured.*\)$/\1/p; s/^-- \(moelab .*\)$/\1./p; s/^  summary = "\(.*\)",$/Machine: \1./p' \
        cpu-localhost.lua
    printf '\nIn GB/s of memory and between ranks, it was calibrated to %s before the runs and to %s afterwards (try %s).\n' \
        "$(figures calibration.txt)" "$(figures afterwards.txt)" "$try"
    printf '\nWhat was measured, and how far the models are from that:\n\n```\n'
    cat calibration.txt
    printf '```\n\n![Steps, measured and simulated](validation.png)\n\n'
    printf 'Errors of all runs, by phase (what each run took is below):\n\n```\n'
    sed -n '/error| of /,/Ranks of machine host/p' results/against.txt
    cat <<'EOF'
```

What is behind the larger ones:

- **The computer itself** is not always as fast: its processors are halves of cores whose other halves others use, and
  are taken away now and then. What a probe finds disturbed is set aside (`doc/host.md`); where nothing is undisturbed,
  the simulation takes the computer as slow as the probe does, which is right for arithmetic and rough for the rest.
- **Loads** are read by a thread of each rank, which takes processor time and memory bandwidth of what runs meanwhile.
  The model's copies cost nobody anything, so exchanges next to loads come out too fast.
- **Exchanges** of little take longer after products than after other work, by about as much at every size; calibration
  measures them after products (`doc/host.md`) and still finds less than runs do.

Each run, as printed:

```
EOF
    sed '/error| of /,$d' results/against.txt | sed '/^$/N;/^\n$/D'
    printf '```\n'
    [ -z "$others" ] || printf '\n%s\n' "$others"
} >"$root/doc/validation.md"
