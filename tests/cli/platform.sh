#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Platforms in SimGrid's XML: asked for times, run on, repeated from the manifest; and what a bad one is told. Without
# moelab-simgrid there is only the message that says so.
. "$(dirname "$0")/lib.sh"
fixtures=$top_srcdir/tests/cli/fixtures
cp "$fixtures"/{star,ring}.xml "$fixtures"/{again,tiny}.lua "$work"
cd "$work" || exit 99

mkdir nothing
run_expect 2 'star\.xml: SimGrid reads platforms, and there is no moelab-simgrid \(looked for nothing/' \
    env MOELAB_LIBEXEC=nothing "$moelab" eval machine star.xml --pattern alltoall --bytes-per-rank 1e6 --n 8
if [ ! -x "$top_builddir/hw/moelab-simgrid" ]; then
    skip "platforms in XML" "built without SimGrid"
    plan
    exit
fi

# ---- times ----

times()
{
    "$moelab" eval machine "$1" --pattern alltoall --bytes-per-rank 16777216 --n 8 "${@:2}" | sed 's/,"seconds".*//'
}
for tier in bound flow exact; do
    ok "the same switch takes the same time: $tier" \
        test "$(times star.xml --tier $tier)" = "$(times star-50GBps --tier $tier)"
done
run_expect 0 '"name":"star_link_7_DOWN","bytes":875000' \
    "$moelab" eval machine star.xml --pattern alltoall --bytes-per-rank 1e6 --n 8 --links
run_expect 2 'star\.xml is as its file says, 8 devices on 8 nodes: found devices 4' \
    "$moelab" eval machine star.xml --pattern alltoall --bytes-per-rank 1e6 --n 4
echo '{"bytes": [[0, 1e6], [2e6, 0]], "machine": "star.xml"}' >two.json
run_expect 2 'star\.xml is as its file says, 8 devices' "$moelab" eval dispatch flat --input two.json
sed 's/.*/{"load": [[1, 2, 3, 4, 5, 6, 7, 8]], "devices": 8, "machine": "star.xml"}/' two.json >place.json
run_expect 2 'machine star: a platform alone says nothing of devices.*like = "dgx-h100"' \
    "$moelab" eval placement eplb --input place.json

# ---- shown ----

run_expect 0 'l\*_UP +6 +10 GB/s +1 us' "$moelab" machine show ring.xml
run_expect 0 'devices of two nodes .* 3 links: l0_UP l1_UP l2_UP' "$moelab" machine show ring.xml
run_expect 0 "platform +imported from SimGrid's XML" "$moelab" machine show ring.xml
if command -v gnuplot >/dev/null; then
    ok "drawn" "$moelab" machine show ring.xml --plot ring.png
    # 0 to 3 takes three links of 1 us, each of 10 GB/s.
    row() { sed -n "/^\$$1 /,/^EOD/p" ring.gp | sed -n 2p; }
    ok "... every pair's narrowest link" test "$(row bandwidth)" = "NaN 10 10 10 10 10"
    ok "... and latency" test "$(row latency)" = "NaN 1 2 3 2 1"
    ok "... as a picture" test -s ring.png
else
    skip "drawn" "no gnuplot"
fi

# ---- runs ----

experiment()
{
    printf 'local moe, tiny = require "moelab", require "tiny"\n'
    printf 'tiny.experiment { machine = %s, placement = "round-robin" }:run()\n' "$1"
}
experiment 'moe.machine "star.xml"' >bare.lua
experiment 'moe.machine "star.xml" { like = "dgx-h100", devices = 2 }' >like.lua
experiment 'moe.machine "star-50GBps" { nodes = 8 }' >own.lua
experiment 'moe.machine "star.xml" { like = "dgx-h100", device = { memory = "1 GB" } }' >less.lua
run_expect 2 'bare\.lua.*machine star: a platform alone says nothing of devices' "$moelab" run bare.lua --out bare
ok "nothing is written then" test ! -e bare
ok "with the devices of another machine it runs" "$moelab" run like.lua --out like
run_expect 0 '"devices": 2' grep '"devices": 2' like/manifest.json
cp like/manifest.json .
ok "... and again from the manifest" "$moelab" run again.lua --unsafe --out again
lines() { sed 's/"axes":{[^}]*},//; s/"experiment":"[^"]*",//' "$1/runs.jsonl"; }
ok "... with all figures" cmp <(lines like) <(lines again)
ok "set from outside" "$moelab" run bare.lua --set machine.like=dgx-h100 --out set
ok "the shipped star" "$moelab" run own.lua --out own
figure() { grep -o "\"$2\":[^,}]*" "$1/runs.jsonl" | head -n 1; }
ok "... takes as long as with 8 nodes of 1" test "$(figure set a2a_s)" = "$(figure own a2a_s)"
ok "... which is some time" test -n "$(figure own a2a_s)"
ok "what is changed of a device is changed" "$moelab" run less.lua --out less
ok "..." grep -q '"memory": "1 GB"' less/manifest.json
run_expect 2 'like: no machine named "dgx-h10".*did you mean "dgx-h100"' \
    "$moelab" run bare.lua --set machine.like=dgx-h10 --out no
run_expect 2 'like: the machine has devices of its own' "$moelab" run own.lua --set machine.like=dgx-h100 --out no
run_expect 2 'like: machine "ring\.xml" has no table .device.' \
    "$moelab" run bare.lua --set machine.like=ring.xml --out no
printf 'return { name = "pair", summary = "two", like = "dgx-h100", platform = { hosts = { "a", "b" },
  links = { { name = "ab", bandwidth = "1 GB/s", latency = "1 us" },
            { name = "ba", bandwidth = "1 GB/s", latency = "1 us" } },
  routes = { { "a", "b", "ab" }, { "b", "a", "ba" } }, source = "a test" } }\n' >pair.lua
sed 's/star\.xml/pair.lua/; s/\[\[0/[[0/' two.json >pair.json
run_expect 0 '"dispatch_a2a",[^}]*"seconds":0\.00200100' "$moelab" eval dispatch flat --input pair.json --tier exact

# A machine file that names the XML beside it: what is asked of devices has an answer then.
mkdir there
cp star.xml there/switch.xml
printf 'return { name = "switch", summary = "8 of them", like = "dgx-h100", platform = "switch.xml" }\n' \
    >there/switch.lua
sed 's/"star.xml"/"there\/switch.lua"/' place.json >named.json
run_expect 0 '"phy2dev"' "$moelab" eval placement eplb --input named.json
printf 'return { name = "switch", summary = "8 of them", platform = "there" }\n' >there/not.lua
run_expect 2 'not\.lua: platform: found "there", expected a table or the name of a \.xml file' \
    "$moelab" eval machine there/not.lua --pattern alltoall --bytes-per-rank 1e6 --n 8
printf 'return { name = "switch", summary = "8 of them", platform = "none.xml" }\n' >there/none.lua
run_expect 2 'none\.lua: platform: there/none\.xml: No such file' \
    "$moelab" eval machine there/none.lua --pattern alltoall --bytes-per-rank 1e6 --n 8

# The example in the manual, with 1/3 MB for every pair: each link carries four of them, both ways together, so bc's
# 25 GB/s need 53.33 us, and from a to c it is 2 us more.
sed -n '/^```lua/,/^```/{/^```/d;p}' "$top_srcdir/doc/machines.md" | sed -n '/triangle/,$p' |
    sed '1i return {' >triangle.lua
run_expect 0 '"makespan_s":5\.5333333333' \
    "$moelab" eval machine ./triangle.lua --pattern alltoall --bytes-per-rank 1e6 --n 3

# ---- bad platforms ----

# bad REGEX: standard input within <platform>, as bad.xml.
bad()
{
    { printf '<?xml version="1.0"?>\n<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">\n'
      printf '<platform version="4.1">\n<zone id="z" routing="%s">\n' "${routing:-Full}"
      cat; printf '</zone>\n</platform>\n'; } >bad.xml
    run_expect 2 "bad\\.xml$1" "$moelab" eval machine bad.xml --pattern alltoall --bytes-per-rank 1e6 --n 2
}
two='<host id="a" speed="1Gf"/><host id="b" speed="1Gf"/>'
link='<link id="l" bandwidth="1GBps" latency="1us"/>'
route='<route src="a" dst="b"><link_ctn id="l"/></route>'
bad ': Link not found: m' <<<"$two $link ${route/\"l\"/\"m\"}"
bad ': .*link "l": bandwidth: found "0 B/s"' <<<"$two ${link/1GBps/0Bps} $route"
bad ': .*link "l": bandwidth: found "-1000000000 B/s"' <<<"$two ${link/1GBps/-1GBps} $route"
bad ':5: unknown unit: GB' <<<"$two ${link/GBps/GB} $route"
bad ': no route from host "a" to host "b"' <<<"$two $link"
for routing in Floyd Dijkstra; do
    bad ': no route from host "a" to host "c"' <<<"$two <host id=\"c\" speed=\"1Gf\"/> $link $route"
done
routing=
bad ': .*"a" to "b": a cycle: link "l" is crossed twice' <<<"$two $link ${route/><\/route/><link_ctn id=\"l\"/></route}"
bad ': .*Link .l. declared several times' <<<"$two $link $link $route"
bad ': .*second host named .a.' <<<"$two $two $link $route"
bad ': .*second NetZone called .z.' <<<"<zone id=\"z\" routing=\"Full\">$two $link $route</zone>"
bad ': .*between a and b already exists' <<<"$two $link $route $route"
bad ': link "l": FATPIPE is not modelled' <<<"$two ${link/\/>/ sharing_policy=\"FATPIPE\"/>} $route"
bad ': at line 5: bandwidth_file: what changes over time is not imported' \
    <<<"$two ${link/\/>/ bandwidth_file=\"x\"/>} $route"
bad ':5: Route dst=.c. ' <<<"$two $link ${route/\"b\"/\"c\"}"
bad ':5: Invalid XML .*colour' <<<"$two ${link/\/>/ colour=\"red\"/>} $route"
bad ':5: Invalid XML .*Required attribute .dst. not set' <<<"$two $link <route src=\"a\">"
bad ':7: Invalid XML .*Unexpected end-tag' <<<'<zone id="y" routing="Full">'
bad ': no host in it' <<<"$link"
routing=Vivaldi
bad ': host "a" to "b": the route has a latency of its own' \
    <<<"$(printf '<peer id="%s" coordinates="%s" speed="1Gf" bw_in="2GBps" bw_out="1GBps"/>' a '0 0 0' b '3 4 1')"
run_expect 2 'none\.xml: No such file' "$moelab" eval machine none.xml --pattern alltoall --bytes-per-rank 1e6 --n 2
: >empty.xml
run_expect 2 'empty\.xml:1: Invalid XML' "$moelab" eval machine empty.xml --pattern alltoall --bytes-per-rank 1e6 --n 2
plan
