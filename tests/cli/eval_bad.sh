#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# moelab eval with a policy that crashes, ends its process, never returns or prints; --out and what is there already.
. "$(dirname "$0")/lib.sh"
fixtures=$top_srcdir/tests/cli/fixtures
cp "$fixtures/tiny.lua" "$work"
cd "$work" || exit 99
mkdir plugins
build() # build SOURCE FLAG...
{
    local source=$1
    shift
    ${CC:-cc} -std=c11 -D_GNU_SOURCE -fPIC -shared -I"$top_srcdir/core" "$@" -o plugins/bad.so \
        "$fixtures/$source" -lm ||
        ok "$source $* builds" false
}
export MOELAB_PLUGIN_PATH=$work/plugins
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}handle_segv=0:handle_abort=0:detect_leaks=0

echo '{ "logits": [[0, 1, 2], [3, 0, 3]], "top_k": 2 }' >input.json
bad=("$moelab" eval router bad --input input.json)
# fails CODE REGEX FLAG...: on standard error alone, and nothing is left.
fails()
{
    local code=$1 regex=$2
    shift 2
    build bad_router.c -DSTEP=0 "$@"
    run_expect "$code" "^moelab: $regex" "${bad[@]}" --run-timeout "${timeout-60}" --out made
    ok "... and nothing else" test ! -s out -a ! -e made -a ! -e made.part
}
fails 1 'router bad, in route: crashed: Segmentation fault$' -DFAULT_CRASH
fails 1 'router bad, in route: crashed: Aborted$' -DFAULT_ABORT
timeout=0.5 fails 1 'router bad, in route: did not end within 0\.5 s \(--run-timeout\)$' -DFAULT_LOOP
fails 1 'router bad, in route: ended with exit code 0 and no result$' -DFAULT_EXIT
fails 1 'router bad, in route: ended with exit code 7 and no result$' -DFAULT__EXIT
fails 1 'router bad, in fini: crashed: Aborted$' -DFAULT_FINI
timeout=0.5 fails 1 'the core, after bad: did not end within 0\.5 s' -DFAULT_LEAVES
timeout=0 fails 2 'router bad: the moon is full$' -DFAULT_FAIL
fails 2 'router bad: route returned 5, expected 0 or a negative error$' -DFAULT_POSITIVE
build bad_others.c -DKIND_offload -DFAULT_INSERT
printf '\0\0\1\0' | npy keys.npy '<u2' '2,'
run_expect 2 'offload bad: insert returned 5, expected 0 or a negative error' "$moelab" eval offload bad \
    --keys keys.npy --capacity 1
build bad_header.c -DCONSTRUCTOR
run_expect 1 'the core: crashed: Aborted' "${bad[@]}"
for s in -1 soon ''; do
    run_expect 2 "--run-timeout: found \"$s\", expected seconds, 0 or more" "${bad[@]}" --run-timeout "$s"
done
run_expect 2 'unknown option --runtimeout; did you mean --run-timeout' "${bad[@]}" --runtimeout 1

# ---- what policies print is no result ----

build bad_router.c -DPRINTS
run_expect 0 '^routing 2 tokens$' "${bad[@]}"
"${bad[@]}" >printed 2>said
ok "a policy prints to standard error" grep -q '^routing 2 tokens$' said
ok "... and leaves the object alone" bash -c 'test $(wc -l <printed) = 1 && grep -q "^{.*}$" printed'
printf 'require "tiny".experiment { router = "bad" }:run():table { value = "step_s" }\n' >x.lua
"$moelab" run x.lua --out results >table 2>said
ok "a policy in a run prints to standard error" grep -q '^routing' said
ok "... and leaves the table alone" bash -c 'test -s table && ! grep -q routing table'

# ---- --out ----

good=("$moelab" eval router softmax-top-k --input input.json --out)
run_expect 0 '"max_vio"' "${good[@]}" made/
ok "arrays are there" test "$(cd made && echo *)" = "experts.npy load.npy offsets.npy weights.npy" -a ! -e made.part
printf 'no array' >made/load.npy
run_expect 0 '"max_vio"' "${good[@]}" made
ok "arrays of an earlier call give way" test "$(wc -c <made/load.npy)" = 152 -a ! -e made.part
run_expect 2 'made.part/[a-z]*.npy.*: File too large' bash -c \
    "(ulimit -f 0; \"\$@\") 2>&1 | cat; exit \${PIPESTATUS[0]}" - "${good[@]}" made
ok "a full disk leaves them" test "$(wc -c <made/load.npy)" = 152 -a ! -e made.part
echo mine >made/notes
run_expect 2 '^moelab: made: exists and is no directory of arrays' "${good[@]}" made
ok "... and leaves it" test "$(cd made && echo *)" = "experts.npy load.npy notes offsets.npy weights.npy"
run_expect 2 '^moelab: input.json: exists and is no directory' "${good[@]}" input.json
mkdir other.part && echo mine >other.part/notes
run_expect 2 '^moelab: other.part: exists and was not left by moelab' "${good[@]}" other
ok "... and leaves it" test -s other.part/notes -a ! -e other
mkdir left.part && echo half >left.part/experts.npy.part
run_expect 0 '"max_vio"' "${good[@]}" left
ok "what an interrupted call left goes" test ! -e left.part -a "$(cd left && echo *)" = \
    "experts.npy load.npy offsets.npy weights.npy"
run_expect 2 'expected the name of a directory' "${good[@]}" ..
plan
