#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Installs into a directory of its own, runs installed.sh there, uninstalls, and looks for what was left behind.
. "$(dirname "$0")/../cli/lib.sh"

root=$work/root
ok "make install" "${MAKE:-make}" -C "$top_builddir" install DESTDIR="$root"
pc=$(find "$root" -name moelab.pc)
[ -n "$pc" ] || { echo "# no moelab.pc was installed"; plan; exit 1; }
exec_prefix=$(sed -n 's/^prefix=//p' "$pc")
moelab=$root$exec_prefix/bin/moelab
staged_plugins=$(dirname "$(dirname "$pc")")/moelab
staged_data=$root$exec_prefix/share/moelab
export PKG_CONFIG_SYSROOT_DIR=$root PKG_CONFIG_LIBDIR=${pc%/*}

. "$top_srcdir/tests/install/installed.sh"

ok "make uninstall" "${MAKE:-make}" -C "$top_builddir" uninstall DESTDIR="$root"
ok "nothing is left" test -z "$(cd "$root" && find . -type f -o -name moelab)"
plan
