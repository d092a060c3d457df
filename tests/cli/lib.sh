# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# lib.sh - TAP for tests written in bash. A test sources it, checks things, and ends with `plan`.
#
#   run_expect CODE REGEX COMMAND...   one test: exit status, and REGEX (grep -E) in what it printed; see $work/out, err
#   ok NAME COMMAND...                 one test: the command succeeds
#   skip NAME REASON                   one test that cannot run here
#   skip_all REASON                    leaves: nothing here can run
#   npy FILE DTYPE SHAPE               not a test: FILE.npy from raw bytes on stdin; npy a.npy '<u2' '3,' < bytes
#   plan                               last line: how many tests there were, and 1 if one failed; without it the
#                                      test counts as broken
#
# Provides: $moelab (the program), $top_srcdir, $top_builddir, $shared (recorded traces and oracles; may not exist),
# and $work, an empty directory that is removed at the end.

set -u
export LC_ALL=C
top_srcdir=$(cd "${top_srcdir:-$(dirname "${BASH_SOURCE[0]}")/../..}" && pwd)
top_builddir=$(cd "${top_builddir:-.}" && pwd)
moelab=${MOELAB:-$top_builddir/moelab}
# shellcheck disable=SC2034 # for the tests
shared=${MOELAB_SHARED:-$top_srcdir/../shared}
# A test says itself what it wants of these; make's flags would reach the make that a test starts.
unset MOELAB_PLUGIN_PATH MOELAB_DATA_PATH MOELAB_LIBEXEC MAKEFLAGS MAKELEVEL MFLAGS

work=$(mktemp -d "${TMPDIR:-/tmp}/moelab-test.XXXXXX") || exit 99
trap 'rm -rf --one-file-system "$work"' EXIT
n_tests=0
n_failed=0

# The test's verdict; details as TAP comments.
tap_result()
{
    n_tests=$((n_tests + 1))
    [ "$1" = ok ] || n_failed=$((n_failed + 1))
    printf '%s %d - %s\n' "$1" "$n_tests" "${2//#/}"
}

tap_comment()
{
    sed 's/^/# /' "$@" | head -n 40
}

ok()
{
    local name=$1 code
    shift
    "$@" >"$work/out" 2>"$work/err" </dev/null
    code=$?
    if [ $code = 0 ]; then
        tap_result ok "$name"
    else
        tap_result "not ok" "$name"
        echo "# exit status $code: $*"
        tap_comment "$work/out" "$work/err"
    fi
}

run_expect()
{
    local code=$1 regex=$2 name got
    shift 2
    name="$* [exit $code: $regex]"
    name=${name//"$moelab"/moelab}
    name=${name//"$work"\//}
    name=${name//"$top_srcdir"\//}
    timeout "${MOELAB_TEST_TIMEOUT:-120}" "$@" >"$work/out" 2>"$work/err" </dev/null
    got=$?
    if [ "$got" = "$code" ] && { [ -z "$regex" ] || cat "$work/out" "$work/err" | grep -Eq -- "$regex"; }; then
        tap_result ok "$name"
    else
        tap_result "not ok" "$name"
        echo "# exit status $got, expected $code; expected output that matches: $regex"
        tap_comment "$work/out" "$work/err"
    fi
}

npy()
{
    # Magic, version 1.0, a header of 118 bytes (128 in all), then the data.
    printf '\x93NUMPY\x01\x00\x76\x00%-117s\n' "{'descr': '$2', 'fortran_order': ${FORTRAN:-False}, 'shape': ($3), }" \
        >"$1"
    cat >>"$1"
}

skip()
{
    n_tests=$((n_tests + 1))
    echo "ok $n_tests - $1 # SKIP $2"
}

skip_all()
{
    echo "1..0 # SKIP $1"
    exit 0
}

plan()
{
    echo "1..$n_tests"
    [ "$n_failed" = 0 ]
}
