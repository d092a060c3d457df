#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# moelab machine list, show: every shipped machine is listed, shown and drawn; what is asked wrongly is refused.
. "$(dirname "$0")/lib.sh"
machines=$(cd "$top_srcdir/hw/machines" && ls -- *.lua | sed 's/\.lua$//')
cd "$work" || exit 99

"$moelab" machine list >list
ok "every file is listed" diff <(echo "$machines") <(sed '1d; s/ .*//' list)
run_expect 0 '"name": "dgx-a100"' "$moelab" machine list --json

# What each shows, worked out from its file: the links after their efficiency.
shows() { "$moelab" machine show "${@:2}" >shown && grep -Eq -- "$1" shown; }
ok "NVLink" shows '^  gpu\*\.nvlink +32 +160 GB/s +1 us +each way' h800-ib --set machine.nodes=4
ok "a way over NICs" shows 'devices of two nodes +1 +50 GB/s +2 us +2 links: gpu0.nic.out gpu8.nic.in' \
    h800-ib --set machine.nodes=4
ok "bisection: 16 NICs of 50 GB/s" shows '^bisection: 800 GB/s from the first 16 devices' h800-ib --set machine.nodes=4
ok "... or 4 NVLinks of 160" shows '^bisection: 640 GB/s from the first 4 devices.*gpu0.nvlink.out binds' h800-ib
network='machine.network={"kind":"leaf-spine","nodes_per_leaf":2,"spines":4,"oversubscription":2,"source":"a test"'
ok "paths" shows 'devices of two nodes +4 +12.5 GB/s' star-50GBps --set "$network}"
ok "a split network's bisection: 2 leaves x 4 x 12.5" shows '^bisection: 100 GB/s.*leaf0.spine0.out binds' star-50GBps \
    --set "$network,\"paths\":\"split\"}"
ok "sources" shows 'assumed: line rate' dgx-h100
ok "what is unified" shows "8 GB at 59.7 GB/s, which is the device's" jetson-tx2
ok "stragglers and faults" shows '^slow: device 3 takes 2 times as long from 1 ms on' star-50GBps \
    --set 'machine.slow=[{"device":3,"factor":2,"at":"1 ms"}]' --set 'machine.faults=[{"link":"gpu1.nic","at":"2 ms"}]'
ok "... both" grep -q '^fault: gpu1.nic has 0 of its bandwidth from 2 ms on' shown
energy='{"idle":"75 W","busy":"700 W","nic":"0.3 nJ/B","source":"a test"}'
ok "energy" shows '^energy: idle 75 W, busy 700 W, nic 0.3 nJ/B$' star-50GBps --set "machine.energy=$energy"
ok "... with its source" grep -q '^  energy  *a test$' shown
ok "... only where there is some" bash -c '! "$0" machine show star-50GBps | grep energy' "$moelab"
run_expect 2 'energy.nic: missing: energy is that of all links' \
    "$moelab" machine show star-50GBps --set "machine.energy=${energy/\"nic\"*J\/B\",/}"
ok "the same every time" cmp <("$moelab" machine show h20 --json) <("$moelab" machine show h20 --json)
for m in $machines; do run_expect 0 '"sources"' "$moelab" machine show "$m" --json; done

# A device that fails under a run ends it, by name.
cp "$top_srcdir/tests/cli/fixtures/tiny.lua" .
cat >fails.lua <<'EOF2'
require "tiny".experiment { machine = require "moelab".machine "star-50GBps" { nodes = 4,
                            faults = { { device = 2, at = "30 us" } } } }:run()
EOF2
run_expect 1 'machine star-50GBps: device 2 failed at 3e-05 s: [0-9]+ tasks wait for what never ends' \
    "$moelab" run fails.lua --out fails
sed -i 's/device = 2/link = "gpu2.nic"/' fails.lua
run_expect 1 'link gpu2.nic.(in|out) failed at 3e-05 s, for good' "$moelab" run fails.lua --out fails

run_expect 2 'no machine named "h8000-ib"; did you mean "h800-ib"' "$moelab" machine show h8000-ib
run_expect 2 '--set nodes=4: expected machine.KEY=VALUE' "$moelab" machine show h800-ib --set nodes=4
run_expect 2 'h800-ib.lua: nic.bandwidth: found "400 Gb/s": bits; write "50 GB/s"' \
    "$moelab" machine show h800-ib --set 'machine.nic.bandwidth=400 Gb/s'
run_expect 2 '"name" has no keys to set' "$moelab" machine show h800-ib --set machine.name.x=1
run_expect 2 'no machine named "h\?\[31m20"' "$moelab" machine show $'h\e[31m20'
run_expect 2 'found "shw h\?\[31m20"' "$moelab" machine shw $'h\e[31m20'
run_expect 2 'unknown command "sh\?ow"' "$moelab" $'sh\aow'
run_expect 2 'expected "list", "show NAME" or "validate", found "shw h20"' "$moelab" machine shw h20
run_expect 2 'unknown option --plt; did you mean --plot' "$moelab" machine show h20 --plt
run_expect 2 '--plot needs a value' "$moelab" machine show h20 --plot
run_expect 2 '--plot x.jpg: expected FILE.png' "$moelab" machine show h20 --plot x.jpg
run_expect 2 './no/x.gp: cannot be written' "$moelab" machine show h20 --plot ./no/x.png

# Drawn: every box of the picture is in the script, and gnuplot takes it.
drawn() { command -v gnuplot >/dev/null || { [ -s "$1.gp" ] && return; }; [ -s "$1.png" ] && [ -s "$1.gp" ]; }
for m in $machines; do
    "$moelab" machine show "$m" --plot "$m.png" >/dev/null 2>&1
    ok "$m is drawn" drawn "$m"
done
ok "72 devices: the first and the last" grep -c "'gpu71'" gb200-nvl72.gp
ok "... and how many between" grep -q "'... x 65'" gb200-nvl72.gp
"$moelab" machine show star-50GBps --set machine.nodes=4096 --set "$network}" --plot many.png >/dev/null 2>&1
ok "4096 nodes" grep -q "'... x 4088'" many.gp
ok "... with their last leaf" grep -q "'leaf2047'" many.gp
plan
