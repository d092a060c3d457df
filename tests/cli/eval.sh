#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# moelab eval: each kind against figures known otherwise, and what it refuses.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99

# check|refuse REGEX INPUT ARGUMENT...: `moelab eval ARGUMENT...` on this input.
check()
{
    local regex=$1 input=$2
    shift 2
    printf '%s' "$input" >input.json
    run_expect 0 "$regex" "$moelab" eval "$@" --input input.json
}
refuse()
{
    local regex=$1 input=$2
    shift 2
    printf '%s' "$input" >input.json
    run_expect 2 "$regex" "$moelab" eval "$@" --input input.json
}

# ---- router ----------------------------------------------------------------------------------------------------------

check '^\{"n_tokens":2,"n_experts":3,"offsets":\[0,2,4\],"experts":\[2,1,0,2\],"weights":\[0.7310585[0-9]*,0.2689414'\
'[0-9]*,0.5,0.5\],"load":\[1,1,2\],"max_vio":0.5,"seconds":[0-9.e-]+\}$' \
    '{ "logits": [[0, 1, 2], [3, 0, 3]], "top_k": 2 }' router softmax-top-k
check '"experts":\[2,2\],' '{ "logits": [[2, 1, 0], [2, 1, 0]], "bias": [0, 0, 5] }' router softmax-top-k --top-k 1
check '"experts":\[1,0\],"weights":\[0.25,1.0\],' \
    '{ "recorded": { "offsets": [0, 1, 2], "experts": [1, 0], "weights": [0.25, 1] } }' router replay
# Slots, merged experts, and tokens that leave a layer out: the arrays say so, and nothing of it where there is none.
two='"logits": [[0, 0], [0, 1]], "requests": [5, 5]'
check '"weights":\[0.5,0.268941[0-9]*,0.5,0.731058[0-9]*\],"load":\[1,1\],"max_vio":0.0,"form":"slots","n_slots":2,'\
'"slots":\[0,1,0,1\],"combine":\[0.5,0.5,0.268941[0-9]*,0.731058[0-9]*\],"experts_per_token":1.0,"seconds"' \
    "{ $two }" router soft-moe --top-k 1
check '"weights":\[0.377540[0-9]*,0.622459[0-9]*,0.377540[0-9]*,0.622459[0-9]*\],"load":\[2\],"max_vio":0.0,'\
'"form":"merged","n_slots":1,"slots":\[0,0,0,0\],"experts_per_token":1.0,"seconds"' "{ $two }" router soft-merge \
    --top-k 1
check '"offsets":\[0,0,1\],"experts":\[1\],.*"form":"tokens","experts_per_token":0.5,"skip":\[3,0\],'\
'"skipped_attention":0.5,"skipped_experts":0.5,"seconds"' "{ $two, \"importance\": [1, 2] }" router \
    mixture-of-depths --top-k 1 --set every=1
check '"n_slots":2,"experts_per_token":1.0,"seconds"' "{ $two }" router soft-moe --top-k 1 --out mixes
ok "with their arrays" test "$(cd mixes && echo *)" = \
    "combine.npy experts.npy load.npy offsets.npy slots.npy weights.npy"
refuse 'no importance of tokens, and there is no gate' "{ $two }" router mixture-of-depths --top-k 1 --set every=1
embedded='"tensors": { "embedding": [[1, 0], [0, 2]], "centroid": [[[1, 0], [0, 1], [-2, -1]]] }'
check '"experts":\[1,0\],"weights":\[0.88079[0-9]*,0.73105' "{ \"token_ids\": [1, 0], \"n_experts\": 3, $embedded }" \
    router distilled-router --top-k 1
refuse 'input.json: router distilled-router: centroid: has 1 dimensions, expected \[L,E,R\]|centroid: has 1 dim' \
    '{ "token_ids": [1], "n_experts": 3, "tensors": { "embedding": [[1]], "centroid": [1] } }' router distilled-router \
    --top-k 1
refuse 'tensors: embedding: expected numbers, or the path of a .npy file' \
    '{ "token_ids": [1], "n_experts": 3, "tensors": { "embedding": 1 } }' router distilled-router --top-k 1
printf '\0\0\200\077\0\0\0\0\0\0\0\0\0\0\200\077' | npy logits.npy '<f4' '2, 2'
run_expect 0 '^\{"n_tokens":2,"n_experts":2,"max_vio":0.0,"seconds":' "$moelab" eval router softmax-top-k \
    --logits logits.npy --top-k 1 --out routes
printf '\0\0\0\0\1\0\0\0' | npy expected.npy '<i4' '2,'
ok "experts.npy holds the experts" cmp <(tail -c 8 routes/experts.npy) <(tail -c 8 expected.npy)
ok "all four arrays are written" test "$(cd routes && echo *)" = "experts.npy load.npy offsets.npy weights.npy"
printf '\0\0\200\077\0\0\0\0\0\0\300\177\0\0\200\077' | npy nan.npy '<f4' '2, 2'
run_expect 2 'nan.npy\[1,0\]: found NaN, expected a finite number' "$moelab" eval router softmax-top-k \
    --logits nan.npy --top-k 1
refuse 'input.json: logits: given twice' '{ "logits": [[1]] }' router softmax-top-k --logits logits.npy --top-k 1
refuse 'input.json: logits\[1\]: found 1 elements, expected 2' '{ "logits": [[1, 2], [3]] }' router softmax-top-k \
    --top-k 1
refuse 'input.json: logits\[0\]\[1\]: found "2", expected a number' \
    '{ "logits": [[1, "2"]] }' router softmax-top-k --top-k 1
refuse 'input.json: logit: unknown key for a router; did you mean "logits"' '{ "logit": [[1]] }' router softmax-top-k
refuse 'input.json: recorded: is missing: router replay needs it' '{ "logits": [[1]] }' router replay --top-k 1
refuse 'input.json: top_k: is missing' '{ "logits": [[1]] }' router softmax-top-k
refuse 'input.json: top_k: 3 is more than the 2 experts' '{ "logits": [[1, 2]], "top_k": 3 }' router softmax-top-k
for name in base-auction hash-router random-router sinkhorn-router; do
    refuse "input.json: bias: router $name decides without scores, and would not heed it" \
        '{ "logits": [[1, 2]], "token_ids": [0], "bias": [0, 0] }' router $name --top-k 1
done
check '"experts":\[3\],' '{ "logits": [[2, 1, 0, 0]], "bias": [0, 0, 5, 9] }' router bilevel-router --top-k 1 \
    --set groups=2
refuse 'input.json: bias: found 1 elements, expected 2' '{ "logits": [[1, 2]], "bias": [0] }' router softmax-top-k \
    --top-k 1
refuse 'unknown parameter "renormalize"; did you mean "renormalise"' '{ "logits": [[1]] }' \
    router softmax-top-k --top-k 1 --set renormalize=true
refuse 'input.json:1:[0-9]+: ' '{ "logits": [[NaN]] }' router softmax-top-k --top-k 1

# ---- balancer --------------------------------------------------------------------------------------------------------

routes='"routes": { "offsets": [0, 1, 2, 3, 4], "experts": [0, 0, 0, 1], "weights": [0.1, 0.3, 0.2, 0.4] }'
check '^\{"routes":\{"offsets":\[0,0,1,2,3\],"experts":\[0,0,1\],"weights":\[[0-9.,]*\]\},'\
'"dropped":1,"rerouted":0,"max_vio":\{"before":0.5,"after":0.33[0-9]*\},"seconds":' \
    "{ $routes, \"capacity_factor\": 1 }" balancer capacity
check '"offsets":\[0,1,2,2,3\].*"dropped":1' "{ $routes, \"capacity_factor\": 1 }" balancer capacity --set drop=position
check '"dropped":2' '{ "logits": [[1, 0], [1, 0], [1, 0], [1, 0]], "capacity_factor": 1 }' balancer capacity --top-k 1
check '"max_vio":\{"before":1.0,"after":1.0\}' '{ "load": [[3, 1], [8, 0]] }' balancer none
refuse 'nothing to balance: expected load, logits or routes' '{}' balancer none
refuse 'balancer capacity changes routes: expected routes or logits' '{ "load": [1, 2] }' balancer capacity
check 'warning: input.json: capacity_factor: balancer none has no capacity' \
    '{ "load": [1, 2], "capacity_factor": 1 }' balancer none
refuse 'capacity_factor: given twice' "{ $routes, \"capacity_factor\": 1 }" balancer capacity --set factor=2
refuse 'load\[1\]: found 2.5, expected a whole number' '{ "load": [1, 2.5] }' balancer none
refuse 'routes: token 0: expert 1 twice' '{ "routes": { "offsets": [0, 2], "experts": [1, 1] } }' balancer capacity
refuse 'routes.offsets: element 2 is 1, less than the one before it, 2' \
    '{ "routes": { "offsets": [0, 2, 1, 2], "experts": [0, 1] } }' balancer capacity
refuse 'routes.offsets: expected to start at 0 and to end at the number of experts, 2' \
    '{ "routes": { "offsets": [0, 1], "experts": [0, 1] } }' balancer capacity

# ---- placement -------------------------------------------------------------------------------------------------------

# The example of the reference's README (github.com/deepseek-ai/EPLB).
eplb='"load": [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
             [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]],
    "replicas": 16, "groups": 4, "nodes": 2, "devices": 8'
phy2log='[[5,6,5,7,8,4,3,4,10,9,10,2,0,1,11,1],[7,10,6,8,6,11,8,9,2,4,5,1,5,0,3,1]]'
check "^\{\"phy2log\":${phy2log//[/\\[},\"phy2dev\":\[\[0,0,1,1,2,2,3,3,4,4,5,5,6,6,7,7\],.*"\
"\"logcnt\":\[\[1,2,1,1,2,2,1,1,1,1,2,1\],.*\"balancedness\":\[0.82772[0-9]*,0.80501[0-9]*\],"\
"\"cross_device\":null,\"cross_node\":null,\"migrated_bytes\":null,\"seconds\":" \
    "{ $eplb }" placement eplb
check '"migrated_bytes":0.0,' "{ $eplb, \"current\": $phy2log }" placement eplb
# Experts 0, 1 on device 0 and 2, 3 on device 1; 0 -> 2 crosses, 3 -> 2 does not; expert 1 comes from device 1.
check '"cross_device":5.0,"cross_node":5.0,"migrated_bytes":20.0,' \
    '{ "load": [[1, 1, 1, 1], [1, 1, 1, 1]], "devices": 2, "nodes": 2, "expert_bytes": 10,
       "transitions": [[[1, 0, 5, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 7, 0]]],
       "current": [[0, 2, 1, 3], [0, 1, 2, 3]] }' placement contiguous
check '"balancedness":\[null\]' '{ "load": [[0, 0]], "devices": 2 }' placement contiguous
printf '\1\0\0\0\3\0\0\0' | npy load.npy '<u4' '1, 2'
mkdir sub && mv load.npy sub && echo '{ "load": "load.npy", "devices": 2 }' >sub/input.json
run_expect 0 '"balancedness":\[0.66[0-9]*\]' "$moelab" eval placement contiguous --input sub/input.json
refuse 'load: no.npy: No such file' '{ "load": "no.npy", "devices": 2 }' placement contiguous
refuse 'load\[0\]\[1\]: found -2, expected a number from 0' '{ "load": [[1, -2]], "devices": 2 }' placement contiguous
refuse 'replicas: found 3, but placement contiguous places one replica' \
    '{ "load": [[1, 2]], "replicas": 3, "devices": 1 }' \
    placement contiguous
refuse 'replicas = 5 is not a multiple of the 2 devices' '{ "load": [[1, 2, 3, 4]], "replicas": 5, "devices": 2 }' \
    placement eplb
refuse 'replicas = 33 is not a multiple of the 8 devices' \
    '{ "load": [[1, 2, 3, 4, 5, 6, 7, 8]], "replicas": 33, "devices": 8 }' placement eplb
echo 'require("moelab").eval("placement", "eplb", { input = { load = { { 1, 2 } }, replicas = 33, devices = 8 } })' \
    >uneven.lua
run_expect 2 'replicas = 33 is not a multiple of the 8 devices' "$moelab" run uneven.lua --out uneven
refuse '3 devices cannot be alike on 2 nodes' '{ "load": [[1, 2, 3]], "nodes": 2, "devices": 3 }' placement contiguous
refuse 'transitions: found 2 elements, expected 1|transitions\[0\]' \
    '{ "load": [[1, 2], [1, 2]], "devices": 1, "transitions": [[[1, 1]], [[1, 1]]] }' placement contiguous
refuse 'devices: is missing' '{ "load": [[1, 2]] }' placement contiguous

# ---- dispatch --------------------------------------------------------------------------------------------------------

# 1 MB and 2 MB there and back: the exchange takes 2e6 / 50e9 s and 500 ns.
check '"phase":"dispatch_a2a","start":[^}]*"seconds":4.04999[0-9]*e-5|'\
'"phase":"dispatch_a2a","start":[^}]*"seconds":4.05[0-9]*e-5' \
    '{ "bytes": [[0, 1e6], [2e6, 0]], "machine": "star-50GBps", "tier": "exact" }' dispatch flat
check '"bytes_intra_node":0.0,"bytes_inter_node":6000000.0,"bound_s":' \
    '{ "bytes": [[0, 1e6], [2e6, 0]], "machine": "star-50GBps", "tier": "bound" }' dispatch flat
# 3 rows of 2 x 100 bytes from device 0 to the experts of device 1, and back; those that stay cost nothing.
check '"bytes_intra_node":1200.0,"bytes_inter_node":0.0,' \
    '{ "tokens_by": [[4, 4, 1, 2], [0, 0, 9, 9]], "machine": "dgx-h100",
       "expert": { "d_model": 100, "d_expert": 64 } }' \
    dispatch flat
check '"bytes_intra_node":0.0,"bytes_inter_node":800.0,' \
    '{ "routes": { "offsets": [0, 2, 4], "experts": [0, 3, 1, 2] }, "device": [0, 1], "devices": 2, "nodes": 2,
       "phy2dev": [0, 0, 1, 1], "expert": { "d_model": 100 } }' dispatch flat
check '"tier":"bound","models":\{"network":"bound","gemm":"tiles and waves","others":"roofline"\}\}$' \
    '{ "bytes": [[0, 1e6], [2e6, 0]], "machine": "star-50GBps", "tier": "bound" }' dispatch flat
# 16 values are a row of 32 bytes, and of a matrix fewer than a tile takes at once.
check '"extrapolated":\["model gemm: rows of a weight matrix: 16 is outside .*","model exchange: bytes of a row: 32 ' \
    '{ "tokens_by": [[0, 3], [2, 0]], "expert": { "d_model": 16, "d_expert": 64 } }' dispatch flat
refuse 'expected tokens_by, bytes or routes' '{}' dispatch flat
refuse 'bytes: given together with tokens_by' '{ "bytes": [[0]], "tokens_by": [[1]] }' dispatch flat
refuse 'device: is missing: where every token is' '{ "routes": { "offsets": [0, 1], "experts": [0] } }' dispatch flat
refuse 'unknown tier "exakt"; did you mean exact' '{ "bytes": [[0]], "tier": "exakt" }' dispatch flat
refuse '12 devices are no whole number of nodes of machine dgx-h100' \
    "{ \"tokens_by\": [$(printf '[1],%.0s' {1..11})[1]], \"machine\": \"dgx-h100\" }" dispatch flat

# ---- offload ---------------------------------------------------------------------------------------------------------

# 0 1 2 0 1 3 0 in two places: LRU misses every time, Belady keeps 0.
printf '\0\0\1\0\2\0\0\0\1\0\3\0\0\0' | npy keys.npy '<u2' '7,'
run_expect 0 '^\{"requests":7,"misses":7,"hit_rate":0.0,"prefetched":0,"wasted_prefetches":0,'\
'"bytes_loaded":70.0,"requests_per_s":[0-9.e+]+,"seconds":[0-9.e-]+\}$' \
    "$moelab" eval offload lru --keys keys.npy --capacity-bytes 25 --expert-bytes 10 --prefetch none
run_expect 0 '"requests":7,"misses":5,' "$moelab" eval offload belady --keys keys.npy --capacity 2 --repeat 3
piped() { cat keys.npy | "$moelab" eval offload belady --keys - --capacity 2 --repeat 3 --seed 4; }
ok "keys through a pipe, as often as asked" test "$(piped | grep -c '"requests":7,"misses":5,')" = 1
run_expect 2 'standard input: empty file, expected a .npy file' \
    "$moelab" eval offload lru --keys - --capacity 2 </dev/null
echo "these are no numbers, and long enough for a header" >text
run_expect 2 'standard input: not a .npy file' sh -c '"$1" eval offload lru --keys - --capacity 2 <text' - "$moelab"
run_expect 2 'expected either --keys or --trace' "$moelab" eval offload lru --capacity 2
run_expect 2 'expected either --capacity or --capacity-bytes' "$moelab" eval offload lru --keys keys.npy
run_expect 2 'logits.npy: .*expected .*u2' "$moelab" eval offload lru --keys logits.npy --capacity 2
run_expect 2 'offload none: .*does not fit' "$moelab" eval offload none --keys keys.npy --capacity 2
run_expect 2 'prefetch: found "all", expected none' "$moelab" eval offload lru --keys keys.npy --capacity 2 \
    --prefetch all
run_expect 0 '"requests":[0-9]+,"misses":[0-9]+' "$moelab" eval offload lru \
    --trace "$top_srcdir/scenarios/traces/tiny-moe" --capacity 64
# libCacheSim's figures on the recorded trace.
if [ -d "$shared/traces/gpt-oss-20b" ]; then
    for row in "lru 77 737664" "lru 192 296811" "lru 384 72454" "lfu 192 450444" "lfu 384 190531" \
        "belady 77 330205" "belady 192 134494" "belady 384 27113"; do
        read -r name capacity misses <<<"$row"
        run_expect 0 "\"requests\":737664,\"misses\":$misses," "$moelab" eval offload "$name" \
            --trace "$shared/traces/gpt-oss-20b" --capacity "$capacity"
    done
else
    skip "misses on the recorded trace" "no $shared/traces"
fi

# ---- machine ---------------------------------------------------------------------------------------------------------

uniform=(--pattern alltoall --bytes-per-rank 16777216)
for tier in bound flow exact; do
    run_expect 0 '^\{"makespan_s":0.0003308014[0-9]*,"bound_s":0.0003303014[0-9]*,'\
'"finish_s":\[(0.0003308014[0-9]*,){63}0.0003308014[0-9]*\],"seconds":[0-9.e-]+,'\
'"tier":"'$tier'","models":\{"network":"'$tier'"\}\}$' \
        "$moelab" eval machine star-50GBps "${uniform[@]}" --n 64 --tier $tier
done
run_expect 0 '"makespan_s":0.004456608[0-9]*,"bound_s":0.004456108[0-9]*,' \
    "$moelab" eval machine star-50GBps "${uniform[@]}" --n 64 --weights zipf1
# 1000 bytes from 0 to 1 alone; what stays on its device is no traffic.
printf '\0\0\0\0\0\x40\x8f\x40\0\0\0\0\0\x40\x8f\x40\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0' | npy traffic.npy '<f8' '2, 2'
run_expect 0 '"makespan_s":5.2[0-9]*e-7,"bound_s":2[0-9.]*e-8,"finish_s":\[0.0,5.2[0-9]*e-7\],'\
'"links":\[\{"name":"gpu0.nic.out","bytes":1000.0,"utilization":0.038[0-9]*\},\{"name":"gpu1.nic.in",[^}]*\}\],' \
    "$moelab" eval machine star-50GBps --traffic traffic.npy --links
run_expect 2 'traffic: .*shape.*3' "$moelab" eval machine star-50GBps --traffic traffic.npy --n 3
run_expect 2 'needs --n and --bytes-per-rank' "$moelab" eval machine star-50GBps --pattern alltoall --n 4
run_expect 2 'no traffic: expected --traffic FILE.npy or --pattern' "$moelab" eval machine star-50GBps
run_expect 2 'no machine named "star"; did you mean "star-50GBps"\?' "$moelab" eval machine star "${uniform[@]}" --n 4
run_expect 2 '12 devices are no whole number of nodes' "$moelab" eval machine dgx-h100 "${uniform[@]}" --n 12

# ---- metric, and the command line itself -----------------------------------------------------------------------------

run_expect 0 '"metric":"srp","value":0.[0-9]*,"floor":0.[0-9]*,' "$moelab" eval metric srp \
    --trace "$top_srcdir/scenarios/traces/tiny-moe" --segment 16
run_expect 2 'unknown metric "spr"; did you mean "srp"\?' "$moelab" eval metric spr \
    --trace "$top_srcdir/scenarios/traces/tiny-moe"
run_expect 2 'no router named "softmax-topk"; did you mean "softmax-top-k"' "$moelab" eval router softmax-topk
run_expect 2 'no placement named "elpb"; did you mean "eplb"\?' "$moelab" eval placement elpb
run_expect 2 'no placement named "round"; did you mean "round-robin"\?' "$moelab" eval placement round
run_expect 2 'unknown metric "affin"; did you mean "affinity"\?' "$moelab" eval metric affin
run_expect 2 'unknown kind "routr", did you mean router' "$moelab" eval routr x
run_expect 2 'unknown option --topk; did you mean --top-k' "$moelab" eval router softmax-top-k --topk 2
run_expect 2 'eval metric: unknown option "tier"' "$moelab" eval metric srp --tier flow
run_expect 2 '--top-k: found "two", expected a whole number' "$moelab" eval router softmax-top-k --top-k two
run_expect 2 'eval router: top_k: found 0, expected 1 to 1024' "$moelab" eval router softmax-top-k --top-k 0
run_expect 2 '--input needs a value' "$moelab" eval router softmax-top-k --input
run_expect 2 '--out: only routers write arrays' "$moelab" eval offload lru --keys keys.npy --capacity 2 --out x
run_expect 2 'no.json: No such file or directory' "$moelab" eval placement eplb --input no.json
run_expect 2 'expected a kind and a name' "$moelab" eval router
for kind in router balancer placement dispatch offload machine metric; do
    run_expect 0 "moelab eval $kind" "$moelab" eval $kind --help
done
ok "input from standard input" bash -c \
    "echo '{\"load\": [[1, 2]], \"devices\": 1}' | '$moelab' eval placement contiguous --input -"
plan
