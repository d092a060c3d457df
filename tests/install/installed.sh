#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# A policy author's day: moelab is installed, nothing else of it is needed. Every kind's skeleton is built with
# nothing but `pkg-config moelab`, exports one symbol, is listed, and runs.
#
# Run by `make installcheck` on what is installed, and by staged.sh on an installation of its own.
# $MOELAB: the program; $staged_plugins, $staged_data: where it finds its own, when not where it was configured to.
[ "$(type -t plan)" = function ] || . "$(dirname "$0")/../cli/lib.sh"

cc=${CC:-cc}
command -v pkg-config >/dev/null || skip_all "no pkg-config"
export MOELAB_PLUGIN_PATH=$work/mine${staged_plugins:+:$staged_plugins}
[ -z "${staged_data-}" ] || export MOELAB_DATA_PATH=$staged_data
cd "$work" && mkdir mine || exit 99

version=$(pkg-config --modversion moelab)
run_expect 0 "${version:-no moelab.pc}" "$moelab" --version
run_expect 0 'softmax-top-k' "$moelab" plugins

# Input for `moelab eval KIND`.
printf '\3\0\1\0\3\0\2\0' | npy keys.npy '<u2' '4,'
cat >router.json <<'J'
{ "logits": [[0.1, 0.9, 0.3, 0.2], [0.8, 0.1, 0.7, 0.6]], "top_k": 2 }
J
cat >balancer.json <<'J'
{ "logits": [[0.1, 0.9, 0.3, 0.2], [0.8, 0.1, 0.7, 0.6]], "load": [3, 1, 0, 0],
  "routes": { "offsets": [0, 2, 4], "experts": [1, 2, 0, 2], "weights": [0.6, 0.4, 0.5, 0.5] },
  "devices": 2 }
J
cat >placement.json <<'J'
{ "load": [[4, 3, 2, 1]], "replicas": 4, "groups": 1, "nodes": 1, "devices": 2 }
J
cat >dispatch.json <<'J'
{ "bytes": [[0, 1000], [2000, 0]], "machine": "star-50GBps", "tier": "bound" }
J

for kind in router balancer placement dispatch offload; do
    # Under a name of its own, so that it cannot be taken for anything that is installed.
    policy=my-$kind
    sed "s/\"skeleton\"/\"$policy\"/" "$top_srcdir/plugins/$kind/skeleton.c" >$policy.c
    # shellcheck disable=SC2046 # several flags
    ok "$kind skeleton builds out of tree" \
        $cc $(pkg-config --cflags moelab) -std=c11 -Wall -Wextra -Wpedantic -Werror -shared -fPIC -Wl,-z,defs \
        -o mine/$policy.so $policy.c -lm
    ok "$kind skeleton exports one symbol" \
        test "$(nm -D --defined-only mine/$policy.so | awk '{ print $3 }')" = moe_plugin
    run_expect 0 "$policy" "$moelab" plugins show $policy
    case $kind in
    router) run_expect 0 '"experts"' "$moelab" eval router $policy --input router.json --top-k 2 ;;
    offload) run_expect 0 '"misses"' "$moelab" eval offload $policy --keys keys.npy --capacity 2 ;;
    *) run_expect 0 '"seconds"|"max_vio' "$moelab" eval $kind $policy --input $kind.json ;;
    esac
done

# The header is C++-clean.
printf '#include <moelab.h>\nint main() { return MOE_ABI == 0; }\n' >cpp.cc
if command -v c++ >/dev/null; then
    # shellcheck disable=SC2046
    ok "the header compiles as C++" c++ $(pkg-config --cflags moelab) -std=c++17 -Wall -Wextra -Werror cpp.cc -o cpp
else
    skip "the header compiles as C++" "no C++ compiler"
fi
[ -n "${staged_plugins-}" ] || plan
