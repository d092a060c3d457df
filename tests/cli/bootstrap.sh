#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The last line of ./bootstrap check counts tests that failed, each once, and programs that ended without saying which.
. "$(dirname "$0")/lib.sh"
cd "$work" || exit 99

# A checkout that is configured and built, in which nothing is missing; `make check` prints the file `log`.
mkdir config bin
cp "$top_srcdir/bootstrap" .
echo >config/flags
touch Makefile
cat >bin/make <<'SH'
#!/bin/sh
case $* in *check) cat log; exec grep -q '^# FAIL:  0$' log ;; esac
SH
cat >bin/dpkg-query <<'SH'
#!/bin/sh
for word; do echo "installed $word"; done
SH
printf '#!/bin/sh\n' >bin/apt-get
chmod +x bin/*
export PATH="$work/bin:$PATH" MOELAB_CONFIGURE=

# counted CODE LAST-LINE LINES...: `make check` printed these, and a summary of them.
counted()
{
    local code=$1 last=$2
    shift 2
    printf '%s\n' "$@" >log
    for word in PASS SKIP XFAIL FAIL XPASS ERROR; do
        echo "# $word:  $(grep -c "^$word: " log)" >>log
    done
    run_expect "$code" "^$last\$" sh ./bootstrap check
}
counted 0 '2 passed, 0 failed, 1 skipped' 'PASS: tests/a 1 - x' 'PASS: tests/b 1 - x' 'SKIP: tests/b 2 - y'
counted 1 '1 passed, 2 failed, 0 skipped' 'PASS: tests/a 1 - x' 'FAIL: tests/a 2 - y' 'FAIL: tests/a 3 - z' \
    'ERROR: tests/a - exited with status 1'
counted 1 '1 passed, 1 failed, 0 skipped' 'PASS: tests/a 1 - x' \
    'ERROR: tests/a - exited with status 139 (terminated by signal 11?)'
counted 1 '0 passed, 2 failed, 0 skipped' 'FAIL: tests/a 1 - x' 'ERROR: tests/a - exited with status 1' \
    'ERROR: tests/b - exited with status 1'
counted 1 '0 passed, 2 failed, 0 skipped' 'FAIL: tests/a 1 - x' 'ERROR: tests/a - exited with status 1' \
    'ERROR: tests/a - missing test plan'
plan
