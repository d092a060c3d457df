#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Plugins that must not be loaded, and plugins that go wrong in the middle of a run: the run is reported as failed with
# the plugin's name, the others complete.
. "$(dirname "$0")/lib.sh"
fixtures=$top_srcdir/tests/cli/fixtures
cp "$fixtures/tiny.lua" "$work"
cd "$work" || exit 99
cc=${CC:-cc}
mkdir plugins
# A plugin links with libc and libm alone; -z defs as everywhere else, but where it is the fault.
build() # build SOURCE FLAG...
{
    local source=$1
    shift
    $cc -std=c11 -D_GNU_SOURCE -fPIC -shared -I"$top_srcdir/core" "$@" -o plugins/bad.so "$fixtures/$source" -lm ||
        ok "$source $* builds" false
}
export MOELAB_PLUGIN_PATH=$work/plugins
# A sanitizer would turn crashes into exits, and report what a plugin that exits leaves behind.
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}handle_segv=0:handle_abort=0:detect_leaks=0

# ---- loading ----

printf 'require "tiny".experiment {\nrouter = "bad" }:run()\n' >x.lua
# refused REGEX SOURCE FLAG...
refused()
{
    local regex=$1
    shift
    build "$@"
    run_expect 2 "x\\.lua:2: router bad: $work/plugins/bad\\.so: $regex" "$moelab" run x.lua --out results
    ok "... and leaves nothing" test ! -e results -a ! -e results.part
    rm -rf results results.part
}
refused 'built for ABI 7, this moelab speaks [0-9]+: rebuild it' bad_header.c -DABI=7
refused 'struct moe_plugin has 8 bytes, expected [0-9]+: rebuild it' bad_header.c -DSIZE=8
refused 'has no symbol "moe_plugin"; is it a moelab policy\?' bad_header.c -DSYMBOL=not_moe_plugin
refused 'is a balancer, expected a router' bad_header.c -DKIND=MOE_BALANCER
refused 'is a policy of unknown kind, expected a router' bad_header.c -DKIND=77
refused 'calls itself "worse", expected "bad" \(the file.s stem\)' bad_header.c '-DNAME="worse"'
refused 'calls itself "", expected "bad"' bad_header.c -DNAME=NULL
refused 'has no summary' bad_header.c -DSUMMARY=NULL
refused 'required hook missing: route, or score and select' bad_header.c -DROUTE=NULL
refused 'needs has unknown bits 0x40100000' bad_header.c -DNEEDS='0x40100000|MOE_OWN_GATE'
refused '.*undefined_somewhere' bad_header.c -DUNDEFINED
# name, type, offset, default, min, max, text, unit, help
refused 'parameter n: default 5 is not within \[1, 4\]' bad_header.c \
    '-DPARAM={ "n", MOE_INT, 0, 5, 1, 4, NULL, "", "default out of range" }'
refused 'parameter n lies outside conf \(offset 999, conf_size 16\)' bad_header.c \
    '-DPARAM={ "n", MOE_INT, 999, 1, 1, 4, NULL, "", "outside the struct" }'
refused 'parameter n: default 1 is not within \[4, 1\]' bad_header.c \
    '-DPARAM={ "n", MOE_INT, 0, 1, 4, 1, NULL, "", "minimum above maximum" }'
refused 'parameter n has an unknown type 42' bad_header.c '-DPARAM={ "n", 42, 0, 1, 1, 4, NULL, "", "no such type" }'
refused 'parameter choice: default 2 is not one of a\|b' bad_header.c \
    '-DPARAM={ "choice", MOE_ENUM, 8, 2, 0, 0, "a|b", "", "default beyond the choices" }'
refused '.*choice.*' bad_header.c '-DPARAM={ "choice", MOE_ENUM, 8, 0, 0, 0, NULL, "", "no choices" }'
printf 'not an object file\n' >plugins/bad.so
run_expect 2 'bad\.so: ' "$moelab" run x.lua --out results
run_expect 0 'left out: .*bad\.so' "$moelab" plugins

# ---- in a run: what the other runs and the results say of it ----

printf 'require "tiny".experiment {\n%s, placement = "contiguous" }:run()\n' \
    'router = require "moelab".each { "replay", "bad", "softmax-top-k" }' >x.lua
# fails REGEX SOURCE FLAG...: of three runs, the second.
fails()
{
    local regex=$1
    shift
    build "$@"
    run_expect 1 "run 2 of \"tiny\" failed: $regex" "$moelab" run x.lua --out results --run-timeout "${timeout-60}"
    ok "... the others complete" test "$(grep -c '"status":"ok"' results/runs.jsonl)" = 2
    ok "... it is recorded as failed" grep -Eq \
        "\"error\":\"${regex//\"/\\\\\"}.*\"run\":1.*\"status\":\"failed\"" results/runs.jsonl
    ok "... in finished results" test -s results/manifest.json -a ! -e results.part
    rm -rf results
}
fails 'router bad, in route: crashed: Segmentation fault' bad_router.c -DFAULT_CRASH
fails 'router bad, in route: crashed: Aborted' bad_router.c -DFAULT_ABORT
timeout=1 fails 'router bad, in route: did not end within 1 s \(--run-timeout\)' bad_router.c -DFAULT_LOOP
fails 'router bad, in route: ended with exit code 0 and no result' bad_router.c -DFAULT_EXIT
fails 'router bad, in route: ended with exit code 7 and no result' bad_router.c -DFAULT__EXIT
fails 'router bad, step 1, layer 0: token 0: expert 0 twice' bad_router.c -DFAULT_TWICE
fails 'router bad, step 1, layer 0: token 1: expert 1 has a weight that is not finite' bad_router.c -DFAULT_NAN
fails 'router bad, step 1, layer 0: token 1: expert 8, expected 0 to 7' bad_router.c -DFAULT_RANGE
fails 'router bad, step 1, layer 0: token 1: expert -1, expected 0 to 7' bad_router.c -DFAULT_NEGATIVE
fails 'router bad, step 1, layer 0: token 1: offsets decrease from 1099511627776 to 4' bad_router.c -DFAULT_OFFSETS
fails 'router bad, step 1, layer 0: routes say 31 entries, offsets run from 0 to 32' bad_router.c -DFAULT_COUNT
fails 'router bad, step 1, layer 0: routes with slots or merged experts \(form\)' bad_router.c -DFAULT_FORM
for fault in SLOT N_SLOTS; do
    fails 'router bad, step 1, layer 0: routes with tokens and slots at once \(slot\)' bad_router.c "-DFAULT_$fault"
done
fails 'router bad, step 1, layer 0: token 1: leaves experts out, and has [0-9]+' bad_router.c -DFAULT_SKIP
fails 'router bad, step 1, layer 0: routes with another round in the same layer' bad_router.c -DFAULT_AGAIN
fails 'router bad, step 1, layer 0: routes with experts of other layers' bad_router.c -DFAULT_LAYER
fails 'router bad, step 1, layer 0: token 1: expert 1 has a weight that is not finite' bad_router.c -DFAULT_COMBINE
fails 'router bad: deciding costs 0 FLOPs, 0 bytes and 1 gathered bytes; expected none' bad_router.c -DFAULT_GATHERED
fails 'router bad: deciding costs -1 FLOPs, .* and no negative ones' bad_router.c -DFAULT_COST
fails 'router bad: the moon is full' bad_router.c -DFAULT_FAIL
fails 'router bad: route returned -3 without saying why' bad_router.c -DFAULT_SILENT
fails 'router bad: route returned 5, expected 0 or a negative error' bad_router.c -DFAULT_POSITIVE
fails 'router bad: out of memory for' bad_router.c -DFAULT_MEMORY
fails 'router bad: will not begin with 8 experts' bad_router.c -DFAULT_INIT

printf 'require "tiny".experiment {\n%s }:run()\n' \
    'placement = require "moelab".each { "contiguous", "bad", "round-robin" }' >x.lua
fails 'placement bad: layer 0, expert 7: placed on device 7, expected 0 to 3' bad_others.c -DKIND_placement \
    -DFAULT_DEVICE
fails 'placement bad: layer 0, expert 7: placed by 0 in all, expected 1 or more' bad_others.c -DKIND_placement \
    -DFAULT_MISSING
fails 'placement bad: leaves experts out \(pruned or merged\)' bad_others.c -DKIND_placement -DFAULT_PRUNED
fails 'placement bad: layer 0: left out expert 7 for 7, expected another or -1' bad_others.c -DKIND_placement \
    -DFAULT_MERGED_ITSELF
fails 'placement bad: places 0.5 of layer 0.s expert 7 on device 3' bad_others.c -DKIND_placement -DFAULT_SHARD
printf 'local moe = require "moelab"\nrequire "tiny".experiment { machine = "rtx4090-pcie4", cache = 0.25,
placement = "contiguous",
offload = moe.each { "lru", "bad", "lfu" } }:run()\n' >x.lua
fails 'offload bad' bad_others.c -DKIND_offload -DFAULT_RANGE
fails 'offload bad: insert returned 5, expected 0 or a negative error' bad_others.c -DKIND_offload -DFAULT_INSERT
fails 'offload bad: evict returned 5, expected 0 or a negative error' bad_others.c -DKIND_offload -DFAULT_EVICT
fails 'offload bad: its predictor costs 1e\+09 FLOPs' bad_others.c -DKIND_offload -DFAULT_PREDICTOR
fails 'offload bad' bad_others.c -DKIND_offload -DFAULT_PINNED
printf 'local moe = require "moelab"\nrequire "tiny".experiment { placement = "contiguous",
dispatch = moe.each { "flat", "bad", moe.label("flat again", "flat") } }:run()\n' >x.lua
fails 'dispatch bad, layer 0: exit\[0\] is task 1048576' bad_others.c -DKIND_dispatch -DFAULT_EXIT_ID
fails 'dispatch bad, layer 0: exit\[0\] \(task [0-9]+\) does not wait for any expert' bad_others.c -DKIND_dispatch \
    -DFAULT_EARLY
fails 'dispatch bad, layer 0: device 0.s experts \(task [0-9]+\) wait for no token' bad_others.c -DKIND_dispatch \
    -DFAULT_NO_ENTRY
fails 'dispatch bad, layer 0: device 0 receives the hidden states of [0-9]+ tokens too few' bad_others.c \
    -DKIND_dispatch -DFAULT_NO_HIDDEN
fails 'dispatch bad, layer 0: device 0 receives the outputs of [0-9]+ tokens too few' bad_others.c -DKIND_dispatch \
    -DFAULT_NO_OUTPUT
fails 'dispatch bad, layer 0: token 0 leaves on device 3 instead of 0 \(leaves\)' bad_others.c -DKIND_dispatch \
    -DFAULT_LEAVES
fails 'dispatch bad, layer 0: device 0 sends the outputs of [0-9]+ tokens too few' bad_others.c -DKIND_dispatch \
    -DFAULT_NO_SEND
fails 'dispatch bad, layer 0: device 0 computes [0-9]+ rows of expert 1 too few' bad_others.c -DKIND_dispatch \
    -DFAULT_ONE_EXPERT
fails 'dispatch bad, layer 0: device 0 computes 0 rows after hidden states have come in, expected [0-9]+' bad_others.c \
    -DKIND_dispatch -DFAULT_ORPHAN
fails 'dispatch bad: fused task' bad_others.c -DKIND_dispatch -DFAULT_FUSED
fails 'dispatch bad: exchange from 0 to 0 on path 2, expected 0 to 1' bad_others.c -DKIND_dispatch -DFAULT_PATH
build bad_others.c -DKIND_dispatch
ok "the same layout with nothing left out passes" "$moelab" run x.lua --out honest

# What the header has and the pipeline does not drive is refused before anything runs, by name.
undriven() # kind use message expected
{
    build undriven.c "-DUSE_$2" "-DKIND_$1"
    printf 'local moe = require "moelab"\nrequire "tiny".experiment { placement = "contiguous", %s = "bad" }:run()\n' \
        "$1" >x.lua
    run_expect 2 "x.lua:2: $1 bad: .*$3.*$4" "$moelab" run x.lua --out undriven
    ok "... and nothing is written" test ! -e undriven
}
here=" this version's pipeline"
undriven router ahead 'has hook ahead,' "$here"
undriven balancer loss 'has hook loss,' 'expected a workload of moe.gate'
for use in saliency similarity; do undriven placement $use "needs the $use of experts," "$here"; done
for use in prefetch assign form precision; do undriven offload $use "has hook $use," "$here"; done
undriven offload local 'MOE_LOCAL' "$here"
for use in hit remove observe; do
    build undriven.c "-DUSE_$use" -DKIND_offload -DRESIDENT
    run_expect 2 "x.lua:2: offload bad: .*: hooks without insert and evict, .*: $use" "$moelab" run x.lua --out undriven
done

# A file of another maker under one of our names runs, and the manifest tells.
mkdir -p shadow
$cc -std=c11 -fPIC -shared -I"$top_srcdir/core" -o shadow/lru.so -x c - -lm <<'C'
#include "moelab.h"
static int insert(void *s, int32_t d, uint32_t o, const struct moe_access *a)
{ (void)s, (void)d, (void)o, (void)a; return MOE_BYPASS; }
static int evict(void *s, int32_t d, const struct moe_access *a, const struct moe_pinned *p, uint32_t *v)
{ (void)s, (void)d, (void)a, (void)p, (void)v; return MOE_BYPASS; }
MOE_EXPORT const struct moe_plugin moe_plugin = {
  .abi = MOE_ABI, .size = sizeof(struct moe_plugin), .kind = MOE_OFFLOAD,
  .name = "lru", .summary = "keeps nothing", .source = "a test", .ops.offload = { .insert = insert, .evict = evict } };
C
printf 'require "tiny".experiment { machine = "dgx-h100", offload = "lru", cache = 0.25 }:run()\n' >x.lua
MOELAB_PLUGIN_PATH=$work/shadow ok "a shadowing lru" "$moelab" run x.lua --out shadowed
sum=$(sha256sum <shadow/lru.so | cut -d' ' -f1)
ok "... is told by its checksum" grep -q "\"sha256\": \"$sum\"" shadowed/manifest.json
MOELAB_PLUGIN_PATH= ok "our own" "$moelab" run x.lua --out own
ok "... has none" test "$(grep -c sha256 own/manifest.json)" = "$(($(grep -c sha256 shadowed/manifest.json) - 1))"

# Outside of a run there is no process between a plugin and moelab: it ends, but leaves nothing.
build bad_header.c -DCONSTRUCTOR
printf 'require "tiny".experiment { router = "bad" }:run()\n' >x.lua
run_expect 134 'crashed outside of a run' "$moelab" run x.lua --out results
ok "... and leaves nothing" test ! -e results -a ! -e results.part

# Tables and pictures of what is left.
build bad_router.c -DFAULT_FAIL
printf 'local moe, tiny = require "moelab", require "tiny"
local runs = tiny.experiment { router = moe.each { "bad", "replay" } }:run()
runs:table { rows = { "router", "placement" }, value = "step_s", best = "min" }
runs:plot { x = "placement", y = "step_s", group = "router", file = "p.png" }
runs:filter { router = "bad" }:plot { x = "placement", y = "step_s", file = "none.png" }
runs:difference { over = "router", value = "step_s" }\n' >x.lua
run_expect 1 '^  bad +contiguous +-' "$moelab" run x.lua --out results
ok "data of what is left" grep -q 'replay' results/p.dat
plan
