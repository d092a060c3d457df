#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# moelab machine: published tables against the models, and tables that are wrong.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99

run_expect 0 'deepep-h800.csv on h800-ib' "$moelab" machine validate
"$moelab" machine validate --json >rows.json
errors() { grep '"error"' rows.json | sed 's/.*: \([-0-9.e]*\),*/\1/'; }
ok "27 rows" test "$(errors | wc -l)" = 27
ok "every row within 10 %" awk '{ if ($1 > 0.1 || $1 < -0.1) exit 1 }' <(errors)
ok "matrix products: median below 5 %" awk 'NR == 9 { exit !($1 < 0.05) }' \
    <(errors | head -17 | tr -d - | sort -g)
ok "NVLink binds in 6 rows of DeepEP, the NIC in 4" sh -c "test \$(grep -c NVLink\\\" rows.json) = 6 &&
    test \$(grep -c '\"NIC\"' rows.json) = 4"
# A machine that is not the one measured is far off: the figures come from the model.
run_expect 0 "normal combine, EP 8" "$moelab" machine validate "$top_srcdir/hw/published/deepep-h800.csv" \
    --machine dgx-h100
cp out other; ok "dgx-h100 is faster" grep -Eq "EP 16 .RDMA.* -[0-9.]+%" other

head=$(grep '^layout' "$top_srcdir/hw/published/deepgemm-h800.csv")
bad() { printf '%s\n' "$head" "$1" >bad.csv; run_expect 2 "bad.csv:2: $2" "$moelab" machine validate bad.csv; }
bad 'dense,0,64,2112,7168,206' 'found 6 cells, expected 7'
bad 'dense,0,64,2112,7168,-206,1' 'tflops: found "-206", expected a number from'
bad 'dense,0,64,2112,7168,nan,1' 'tflops: found "nan"'
bad 'dense,4,64,2112,7168,206,1' 'groups: found 4, expected 0, as the product is dense'
bad 'masked,0,64,2112,7168,206,1' 'groups: found 0, expected 1 or more'
bad 'sparse,0,64,2112,7168,206,1' 'layout: found "sparse", expected one of: dense, contiguous, masked'
grep '^kernel' "$top_srcdir/hw/published/deepep-h800.csv" >ep.csv
echo 'low_latency,dispatch,12,77,98,as above' >>ep.csv
run_expect 2 'ep.csv:2: ep: found 12, expected 8, 16' "$moelab" machine validate ep.csv
run_expect 2 'deepep-h800.csv: machine rtx3090-pcie3 has 1 devices per node, and these kernels ran with 8' \
    "$moelab" machine validate "$top_srcdir/hw/published/deepep-h800.csv" --machine rtx3090-pcie3
run_expect 2 'deepgemm-h800.csv: machine dgx-a100 has no figure for precision fp8' \
    "$moelab" machine validate "$top_srcdir/hw/published/deepgemm-h800.csv" --machine dgx-a100
# Rates beside what is measured: 2 x 64 x 2112 x 7168 operations at 206 TFLOP/s take 9.407 us, in which operands and
# results of 15.87 MB are 1,687 GB/s.
run_expect 0 '\+0.0%|-' "$moelab" machine validate "$top_srcdir/hw/published/deepgemm-h800.csv"
cp out shown; cp err warned
ok "no rate of the published table is warned of" test ! -s warned
ok "rates are shown" grep -Eq '^  dense 1 x 64, 2112 x 7168 .* 1688, 1[0-9]{3}$' shown
printf '%s\n' "$head" 'dense,0,64,2112,7168,206,1250' >rate.csv
run_expect 0 'dense 1 x 64' "$moelab" machine validate rate.csv
cp err warned
ok "a rate that contradicts is warned of, once" test \
    "$(grep -c 'rate.csv:2: GBps: found 1250, but 9.40664 us and 1.58679e+07 bytes make 1687$' warned)" = 1
printf '%s\n' "$head" 'dense,0,64,2112,7168,206,' >rate.csv
run_expect 0 'dense 1 x 64' "$moelab" machine validate rate.csv
bad 'dense,0,64,2112,7168,206,-1' 'GBps: found "-1"'
# What is wrong is found before anything is computed, in every table.
{ cat "$top_srcdir/hw/published/deepgemm-h800.csv"; echo 'dense,0,64,2112,7168,0,1688'; } >last.csv
run_expect 2 'last.csv:23: tflops: found "0"' \
    "$moelab" machine validate "$top_srcdir/hw/published/deepep-h800.csv" last.csv
cp out printed; ok "nothing was printed" test ! -s printed
echo 'a,b' >other.csv
run_expect 2 'other.csv: found a header alone' "$moelab" machine validate other.csv
echo '1,2' >>other.csv
run_expect 2 'other.csv: the header is that of no table known' "$moelab" machine validate other.csv
run_expect 2 'missing.csv: No such file' "$moelab" machine validate missing.csv
run_expect 2 'no machine named "h900-ib"' "$moelab" machine validate --machine h900-ib
run_expect 2 'unknown option --jsn; did you mean --json' "$moelab" machine validate --jsn
plan
