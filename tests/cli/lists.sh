#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makefile.am lists its files by hand; whatever is in a checkout has to be there, to be built, tested and shipped.
. "$(dirname "$0")/lib.sh"
cd "$top_srcdir" || exit 99
git ls-files >/dev/null 2>&1 && [ -e .git ] || skip_all "not a git checkout"

missing=
while read -r file; do
    case $file in
    Makefile.am | configure.ac | *.pc.in | */.gitkeep | .gitignore | results/*) continue ;; # automake knows, or git only
    plugins/*/skeleton.c) listed=$file ;;
    plugins/*/*.c) listed=${file%.c}.so ;;
    tests/unit/test_*.c | tests/fuzz/fuzz_*.c | tests/bench_tool.c) listed=${file%.c} ;;
    *) listed=$file ;;
    esac
    grep -Eq "(^|[[:space:]])${listed//./\\.}([[:space:]]|\$)" Makefile.am || missing+=" $file"
done < <(git ls-files -co --exclude-standard)
ok "every file of the checkout is in Makefile.am${missing:+; missing:$missing}" test -z "$missing"
plan
