#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The newcomer's first ten minutes: a fresh clone in a freshly debootstrapped Debian 12 with nothing but the base
# system, and the two commands of the README. Needs root, debootstrap, the network, and about 3 GB in $TMPDIR.
# Part of `make check-long`; by hand: sudo tests/install/chroot.sh. What was printed stays in chroot-*.log.
#
# The packages come from where this machine's apt takes them, with its proxy; nothing is written down here.
if [ "$(id -u)" = 0 ] && [ "${MOELAB_CHROOT_INNER-}" != yes ]; then
    # Mounts made below go away with this process, whatever happens.
    MOELAB_CHROOT_INNER=yes exec unshare --mount --propagation private bash "$0"
fi
. "$(dirname "$0")/../cli/lib.sh"

[ "$(id -u)" = 0 ] || skip_all "needs root"
command -v debootstrap >/dev/null || skip_all "needs debootstrap"
suite=bookworm
# shellcheck disable=SC2016 # apt's variables
targets=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
    grep -E " ${suite}[a-z-]* main\$" | sort -u)
mirror=$(awk -v suite=$suite '$2 == suite { print $1; exit }' <<<"$targets")
[ -n "$mirror" ] || skip_all "apt has no source of Debian $suite"

eval "$(apt-config shell proxy Acquire::http::Proxy)"
[ -z "${proxy-}" ] || export http_proxy=${http_proxy:-$proxy}

root=$work/root
seconds() { date +%s; }
inside() { chroot "$root" env -i HOME=/root TERM=dumb PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} sh -c "cd /home/moelab && $1"; }

ok "debootstrap $suite" debootstrap --variant=minbase "$suite" "$root" "$mirror"
[ -x "$root/bin/sh" ] || { plan; exit 1; }
awk '{ print "deb", $0 }' <<<"$targets" >"$root/etc/apt/sources.list"
apt-config dump Acquire >"$root/etc/apt/apt.conf.d/90host"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
mount -t proc proc "$root/proc" && mount -t tmpfs tmpfs "$root/dev/shm" || exit 99
trap 'umount "$root/dev/shm" "$root/proc" && rm -rf --one-file-system "$work"' EXIT

# What a newcomer has after `git clone`.
if git -C "$top_srcdir" rev-parse -q --verify HEAD >/dev/null 2>&1; then
    ok "git clone" git clone -q --no-hardlinks "$top_srcdir" "$root/home/moelab"
else
    ok "unpack the sources" cp -r "$top_srcdir" "$root/home/moelab"
fi

# run_inside NAME COMMAND: one test, timed, with its output kept in chroot-NAME.log.
run_inside()
{
    local start end code
    start=$(seconds)
    inside "$2" >"$top_builddir/chroot-$1.log" 2>&1 </dev/null
    code=$?
    end=$(seconds)
    echo "# $2: $((end - start)) s"
    [ $code = "${expected-0}" ] && tap_result ok "$2" && return
    tap_result "not ok" "$2"
    tail -n 30 "$top_builddir/chroot-$1.log" | tap_comment
}

inside "chown -R nobody ."
expected=2 run_inside nobody "setpriv --reuid=nobody --clear-groups ./bootstrap"
ok "without root it prints the line to type" grep -q '^apt-get install .*liblua5.4-dev' \
    "$top_builddir/chroot-nobody.log"
inside "chown -R root ."
run_inside run "./bootstrap run"
quickstart=$root/home/moelab/results/quickstart
for pattern in '*.png' '*.gp' '*.dat' runs.jsonl manifest.json; do
    ok "results/quickstart/$pattern" test -n "$(find "$quickstart" -name "$pattern" -size +0)"
done
run_inside check "./bootstrap check"
last=$(tail -n 1 "$top_builddir/chroot-check.log")
echo "# $last"
ok "nothing failed" test -n "$(grep -Ex '[1-9][0-9]* passed, 0 failed, [0-9]+ skipped' <<<"$last")"

# Nothing to do: it has to be at its own work within 5 s.
start=$(seconds)
run_inside again "./bootstrap"
ok "nothing changed: at work within 5 s" test $(($(seconds) - start)) -le 5
plan
