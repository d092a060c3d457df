#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Calibrates this computer, runs scenarios/validation.lua on machine host against tier flow, and writes
# doc/validation.md and doc/validation.png from what came out. From the root of a built tree, with nothing else running:
# 3 to 6 minutes, the longer the more others use the computer.
set -eu
[ -x ./moelab ] && [ -d doc ] || { echo "validation.sh: expected to start in the root of a built tree" >&2; exit 2; }
root=$PWD
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
"$root/moelab" calibrate cpu-localhost --ranks 2 >calibration.txt
"$root/moelab" run "$root/scenarios/validation.lua" --machine host --against flow --out results --quiet
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
