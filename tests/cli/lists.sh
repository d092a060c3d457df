#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makefile.am lists its files by hand; whatever is in a checkout has to be there, to be built, tested and shipped. And
# sources keep to the size that HACKING.md names.
. "$(dirname "$0")/lib.sh"
cd "$top_srcdir" || exit 99
git ls-files >/dev/null 2>&1 && [ -e .git ] || skip_all "not a git checkout"

missing=
while read -r file; do
    case $file in
    Makefile.am | configure.ac | *.pc.in | */.gitkeep | .gitignore | \
        results/*) continue ;; # automake knows, or git only
    plugins/*/skeleton.c) listed=$file ;;
    plugins/*/*.c) listed=${file%.c}.so ;;
    tests/unit/test_*.c | tests/fuzz/fuzz_*.c | tests/bench_tool.c | tests/bench_net.c) listed=${file%.c} ;;
    *) listed=$file ;;
    esac
    grep -Eq "(^|[[:space:]])${listed//./\\.}([[:space:]]|\$)" Makefile.am || missing+=" $file"
done < <(git ls-files -co --exclude-standard)
ok "every file of the checkout is in Makefile.am${missing:+; missing:$missing}" test -z "$missing"

unbuilt=$(git ls-files 'plugins/*/*.c' | grep -v '/skeleton\.c$' |
    while read -r file; do [ -e "$top_builddir/${file%.c}.so" ] || echo "$file"; done)
ok "every policy is built${unbuilt:+; not:} ${unbuilt//$'\n'/ }" test -z "$unbuilt"

# core/moelab.h is left as it is: its checksum is the ABI's.
wide=$(git ls-files -co --exclude-standard core hw plugins tests | grep -E '\.(c|h|cpp|lua|sh)$' |
    grep -vx core/moelab.h |
    while read -r file; do LC_ALL=C.UTF-8 grep -HnE '.{121}' "$file" | cut -d: -f 1,2; done)
ok "at most 120 columns${wide:+; wider:} ${wide//$'\n'/ }" test -z "$wide"
tall=$(git ls-files -co --exclude-standard -- 'core/*.c' 'core/*.lua' 'hw/*.c' 'hw/*.cpp' 'plugins/*.c' |
    while read -r file; do [ "$(wc -l <"$file")" -le 500 ] || echo "$file"; done)
ok "at most 500 lines${tall:+; longer:} ${tall//$'\n'/ }" test -z "$tall"
plan
