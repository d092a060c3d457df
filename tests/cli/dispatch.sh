#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Layouts on a network: by hand, and what others have measured without its being put in.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99

number() { sed -n 's/.*"'"$1"'":\([-0-9.e+]*\).*/\1/p' "$2"; }
phase() { grep -o '{"phase":"'"$1"'"[^}]*}' "$2" | sed 's/.*"seconds":\([-0-9.e+]*\).*/\1/'; }
# near NAME FOUND EXPECTED RELATIVE
near() { ok "$1: $2 is $3" awk -v a="$2" -v b="$3" -v r="$4" 'BEGIN { d = a - b; exit !((d < 0 ? -d : d) <= r * b) }'; }
within() { ok "$1: $2 within $3 to $4" awk -v a="$2" -v l="$3" -v h="$4" 'BEGIN { exit !(a >= l && a <= h) }'; }

# One token of device 0 for experts on devices 1, 8 and 9 of two nodes: once over the network to device 8, whose rail
# it is on, and from there to itself and to 9. A row has 14,336 bytes and, as a message, 42 more.
cat >one.json <<'JSON'
{"routes": {"offsets": [0, 3], "experts": [1, 8, 9]}, "device": [0], "devices": 16, "nodes": 2, "n_experts": 16,
 "machine": "h800-ib", "expert": {"d_model": 7168, "d_expert": 2048}}
JSON
run_expect 0 '"seconds_simulated"' "$moelab" eval dispatch node-dedup --input one.json --set chunks=1
cp out one
ok "bytes between nodes" test "$(number bytes_inter_node one)" = 28672.0
ok "bytes within nodes" test "$(number bytes_intra_node one)" = 57344.0
near "dispatch" "$(phase dispatch_a2a one)" \
    "$(awk 'BEGIN { printf "%.12g", 14378 / 50e9 + 2e-6 + 32.05e-6 + 2 * 14378 / 160e9 + 1e-6 }')" 1e-9

# The same routes, flat: three rows, two of them over the network.
run_expect 0 '"seconds_simulated"' "$moelab" eval dispatch flat --input one.json
cp out one
ok "flat: bytes between nodes" test "$(number bytes_inter_node one)" = 57344.0

# Experts that no route names are placed all the same: phy2dev is as long as there are experts.
placed()
{
    echo '{"routes": {"offsets": [0, 1, 2], "experts": [0, 1]}, "device": [0, 1], "devices": 2, "phy2dev": '"$1}"
}
placed '[1, 0, 1, 1]' >more.json
run_expect 0 '"seconds_simulated"' "$moelab" eval dispatch flat --input more.json
cp out more; ok "both tokens travel, and back" test "$(number bytes_inter_node more)" = 57344.0
placed '[1]' >few.json
run_expect 2 'phy2dev' "$moelab" eval dispatch flat --input few.json

# Skew within nodes, balanced across them (DeepEP issue 343, EP 32: about twice as slow). Experts of `active` of the
# 8 devices of each node are chosen alike, the others never: bytes between nodes stay what they were.
skewed()
{
    awk -v active="$1" 'BEGIN {
        srand(5); printf "{\"routes\": {\"offsets\": [0"; n = 32 * 256
        for (t = 1; t <= n; t++) printf ", %d", 8 * t
        printf "], \"experts\": ["
        for (t = 0; t < n; t++) {
            split("", seen)
            for (i = 0; i < 8;) {
                e = int(rand() * 4) * 64 + int(rand() * active) * 8 + int(rand() * 8)
                if (e in seen) continue
                seen[e] = 1; printf "%s%d", t + i ? ", " : "", e; i++
            }
        }
        printf "]}, \"device\": ["
        for (t = 0; t < n; t++) printf "%s%d", t ? ", " : "", int(t / 256)
        print "], \"devices\": 32, \"nodes\": 4, \"n_experts\": 256, \"machine\": \"h800-ib\",",
              "\"expert\": {\"d_model\": 7168, \"d_expert\": 2048}}" }' >skewed.json
    "$moelab" eval dispatch node-dedup --input skewed.json >"skewed$1" || exit 99
}
for active in 8 4 2; do skewed $active; done
near "bytes between nodes, 2 of 8 devices" "$(number bytes_inter_node skewed2)" \
    "$(number bytes_inter_node skewed8)" 0.03
ratio() { awk -v a="$(phase combine_a2a "skewed$1")" -v b="$(phase combine_a2a skewed8)" 'BEGIN { print a / b }'; }
within "slower with 4 of 8 devices" "$(ratio 4)" 1.1 1.8
within "slower with 2 of 8 devices" "$(ratio 2)" 1.7 2.7

# Senders that are busy with every message (tt-metal issue 56304: combine linear in max/mean, dispatch nearly flat).
# 8 devices of 16 experts; device 0's get `share` of all rows. Combine waits for the device with the most rows to send
# back, dispatch for the source with the fewest rows of its own.
sed -e 's/^  nic = {/  exchange = { startup = "0 s", per_message = "1 us", source = "a test" },\n&/' \
    "$top_srcdir/hw/machines/star-50GBps.lua" >slow-senders.lua
for share in 0.125 0.2 0.3 0.4; do
    awk -v p=$share 'BEGIN {
        printf "{\"tokens_by\": ["
        for (s = 0; s < 8; s++) {
            printf "%s[", s ? ", " : ""
            for (e = 0; e < 128; e++) printf "%s%d", e ? ", " : "", (e < 16 ? p : (1 - p) / 7) * 2560 / 16 + 0.5
            printf "]"
        }
        print "], \"machine\": \"./slow-senders.lua\",",
              "\"expert\": {\"d_model\": 4096, \"d_expert\": 2048}}" }' >rows.json
    "$moelab" eval dispatch flat --set messages=row --input rows.json >"rows$share" || exit 99
done
slope() { awk -v a="$(phase combine_a2a "rows$1")" -v b="$(phase combine_a2a rows0.125)" -v p="$1" \
    'BEGIN { print (a / b) / (8 * p) }'; }
for share in 0.2 0.3 0.4; do near "combine over max/mean at share $share" "$(slope $share)" 1 0.02; done
within "dispatch at max/mean 3.2" \
    "$(awk -v a="$(phase dispatch_a2a rows0.4)" -v b="$(phase dispatch_a2a rows0.125)" 'BEGIN { print a / b }')" 1 1.06

sed 's/"devices"/"dispatch_bytes": -1, &/' one.json >less.json
run_expect 2 'less.json: dispatch_bytes: found -1, expected' "$moelab" eval dispatch flat --input less.json
echo '{"bytes": [[0, 1], [1, 0]], "dispatch_bytes": 5}' >both.json
run_expect 2 "both.json: dispatch_bytes: a row's size" "$moelab" eval dispatch flat --input both.json
run_expect 2 'chunks' "$moelab" eval dispatch node-dedup --input one.json --set chunks=0
plan
