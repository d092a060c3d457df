#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# What a scenario leaves: times that can be checked by hand, tables, data and pictures; and where it leaves them.
. "$(dirname "$0")/lib.sh"
fixtures=$top_srcdir/tests/cli/fixtures
cp "$fixtures/tiny.lua" "$work"
cd "$work" || exit 99
has_gnuplot=$(command -v gnuplot)

# ---- exact times ----

ok "exchange.lua" "$moelab" run "$fixtures/exchange.lua" --out exchange
grep -v '^#' "$top_srcdir/tests/golden/exchange.txt" >expected
ok "times as derived in tests/golden/exchange.txt" diff expected exchange/exchange.txt
if [ -x "${MOELAB_LIBEXEC:-$top_builddir/hw}/moelab-simgrid" ]; then
    ok "exchange.lua on SimGrid" "$moelab" run "$fixtures/exchange.lua" --out exchange --machine simgrid
    ok "the same times" diff expected exchange/exchange.txt
else
    skip "exchange.lua on SimGrid" "not built"
fi

# ---- axes, labels, tables, pictures ----

cat >x.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
local runs = tiny.experiment {
  machine   = moe.machine "star-50GBps" { nodes = moe.each { 2, 4 } },
  placement = moe.each { moe.label("in order", "contiguous"), "round-robin",
                         moe.plugin("eplb", { replicas = moe.each { 8, 12 } }) },
  workload  = moe.decode { trace = tiny.trace, batch_per_device = moe.each { 2, 4 }, steps = 2 },
  seed      = moe.each { 1, 2 },
}:run()
assert(#runs.list == 2 * 2 * 4 * 2)
assert(table.concat(runs.axis_names, " ") ==
       "machine.nodes workload.batch_per_device placement seed placement.replicas",
       table.concat(runs.axis_names, " "))
assert(#runs:filter { ["machine.nodes"] = 2 }.list == 16)
assert(#runs:filter { ["machine.nodes"] = 2, placement = "in order", ["workload.batch_per_device"] = "4" }.list == 2)
assert(#runs:filter { placement = "no such" }.list == 0)
assert(#runs:filter {}.list == 32)
for _, r in ipairs(runs.list) do
  assert(r.status == "ok" and r.devices == r.axes["machine.nodes"] + 0)
  assert(moe.value(r, "step_s.min") <= moe.value(r, "step_s") and moe.value(r, "step_s") <= moe.value(r, "step_s.max"))
  assert(moe.value(r, "step_s") >= moe.value(r, "bound_s") and moe.value(r, "step_s.p99"))
  assert(not moe.value(r, "nothing"))
end
local two = runs:filter { ["machine.nodes"] = 2, ["workload.batch_per_device"] = 4 }
two:table { rows = "placement", value = { "step_s", "a2a_s.max", "imbalance" }, best = "min", bound = true,
            title = "A title", file = "t.txt" }
runs:table { rows = { "machine.nodes", "workload.batch_per_device" }, cols = "placement",
             value = "tokens_per_s", best = "max", file = "cols.txt" }
two:plot { x = "placement", y = "step_s", bound = true, file = "bars.png", title = "A \"title\" of two\nlines" }
runs:plot { x = "workload.batch_per_device", y = "step_s", group = "placement", kind = "lines", logx = true,
            file = "lines.png" }
local worst, text = runs:difference { over = "machine.nodes", value = "step_s", title = "Nodes" }
assert(worst > 0 and text:match "^Nodes: 2 and 4: step_s differs by at most")
assert(select(1, two:difference { over = "seed", value = "dropped" }) == 0)
EOF
run_expect 0 '^A title' "$moelab" run x.lua --out results
ok "a spread over seeds" grep -q '^  in order  .* ±' results/t.txt
ok "one line per group, a rule, a head, a legend" test "$(wc -l <results/t.txt)" = 7
ok "one best" test "$(grep -c '\*' results/t.txt)" -ge 2
ok "a column per label" grep -Eq \
    '^  machine.nodes +workload.batch_per_device +in order .* round-robin .* eplb' results/cols.txt
ok "data: 3 bars and the bound" test "$(grep -vc '^#' results/bars.dat)" = 3
ok "a run per line" test "$(wc -l <results/runs.jsonl)" = 32
ok "numbered from 0" test "$(sed 's/.*"run":\([0-9]*\).*/\1/' results/runs.jsonl | tr '\n' ' ')" = "$(seq -s ' ' 0 31) "
ok "--quiet: nothing on standard output" test -z "$("$moelab" run x.lua --out results --quiet)"
if [ "$has_gnuplot" ]; then
    for name in bars lines; do
        ok "$name.png is a picture" cmp -n 8 results/$name.png <(printf '\x89PNG\r\n\x1a\n')
    done
    mkdir redraw && cp results/bars.gp results/bars.dat redraw
    ok "redrawn from .gp and .dat" env -C redraw gnuplot bars.gp
    ok "... the same" cmp redraw/bars.png results/bars.png
else
    skip "pictures" "no gnuplot"
fi

# ---- the bound that runs have in common ----

cat >x.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
local batch = "workload.batch_per_device"
local runs = tiny.experiment {
  placement = moe.each { "contiguous", "round-robin" }, seed = moe.each { 1, 2 },
  workload  = moe.decode { trace = tiny.trace, batch_per_device = moe.each { 2, 512 }, steps = 2 },
}:run()
local least = {}
for _, r in ipairs(runs.list) do
  least[r.axes[batch]] = math.min(least[r.axes[batch]] or math.huge, moe.value(r, "bound_s"))
end
assert(least["512"] > 1.01 * least["2"])
local o = { value = { "step_s", "bound_s", "over_bound" }, bound = true, file = "a.txt" }
o.rows = { batch, "placement" }
runs:table(o)
o.rows, o.file = { "placement", batch }, "b.txt"
runs:table(o)
o.rows, o.value, o.file = "placement", "step_s", "c.txt"
runs:table(o)
o.cols, o.file, o.best = batch, "d.txt", "min"
runs:table(o)
runs:plot { x = "placement", y = "step_s", group = batch, bound = true, file = "e.png" }
runs:plot { x = batch, y = "step_s", group = "placement", kind = "lines", bound = true, file = "f.png" }
runs:plot { x = batch, y = "over_bound", file = "g.png" }
for i, x in ipairs { least["2"], least["512"], (least["2"] + least["512"]) / 2 } do
  moe.write("least" .. i, ("%.3f"):format(x * (i == 3 and 1e6 or 1e3)))
end
EOF
ok "a table of each kind, and plots" "$moelab" run x.lua --out common
small=$(<common/least1) large=$(<common/least2) mean=$(<common/least3)
# column FILE: the bounds in a table, in ms, each once.
column() { sed 1,2d "common/$1" | awk '{ print $(NF - 1) }' | sort -u | paste -sd ' '; }
ok "by batch, whatever the placement" test "$(column a.txt)" = "$small $large"
ok "in any order of axes" test "$(column a.txt)" = "$(column b.txt)"
ok "both batches in one line: their mean" \
    test "$(awk "{ print int(\$(NF - 1)) }" common/c.txt | tail -1)" = "${mean%.*}"
ok "with cols: a last line" grep -Eq "^  bound +$small +$large\$" common/d.txt
ok "a run's own is called so" \
    grep -Eq 'step \(ms\) +own bound \(ms\) +over own bound +bound \(ms\) +over bound$' common/a.txt
bounds() { grep -v '^#' "common/$1" | awk -F'\t' "{ printf \"%.3f\\n\", \$$2 }" | sort -u | paste -sd ' '; }
ok "plots: a bound per group that is no policy" grep -q '"bound: 2".*"bound: 512"' common/e.dat
ok "... of that group" test "$(bounds e.dat 6) $(bounds e.dat 8)" = "$small $large"
ok "... one for all policies" grep -q '"bound: perfect balance"' common/f.dat
ok "... at each x" test "$(bounds f.dat 6)" = "$small $large"
ok "... a run's own is called so" grep -q 'ylabel "over own bound"' common/g.gp

# ---- few axes, and what they are called ----

cat >y.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
local one = tiny.experiment { placement = "eplb" }:run()
one:table { value = { "step_s", "imbalance" }, best = "min", bound = true, file = "one.txt" }
one:table { rows = {}, value = "step_s", file = "none.txt" }
local some = tiny.experiment { machine = moe.machine "dgx-h100" { nodes = moe.each { 1, 2 } },
                               placement = "round-robin",
                               workload = moe.decode { trace = tiny.trace, batch_per_device = 1, steps = 2 },
                               offload = moe.each { "lru", "lfu" }, cache = moe.each { 0.25, 0.5 } }:run()
some:table { value = "step_s", file = "all.txt" }
some:table { cols = "cache", value = "step_s", file = "cols.txt" }
some:table { rows = {}, cols = "cache", value = "step_s" }
some:difference { over = "cache", value = "step_s" }
some:plot { x = "cache", y = "hit_rate", kind = "lines", percent = true, file = "a.png" }
some:plot { x = "cache", y = "step_s", kind = "lines", file = "b.png" }
some:plot { x = "cache", y = "step_s", group = "offload", file = "c.png" }
some:plot { x = "offload", y = "step_s", group = "cache", file = "d.png" }
EOF
run_expect 0 '^0.25 and 0.5: step_s differs by .* \(worst: nodes [12], offload l[rf]u\)$' "$moelab" run y.lua --out few
ok "no axes: one line" grep -Eq '^ +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+$' few/one.txt
ok "... without a best too" test "$(wc -l <few/none.txt)" = 3
ok "rows: all axes" grep -q '^  machine.nodes  offload  cache' few/all.txt
ok "... but the columns'" grep -Eq '^  machine.nodes  offload +0.25 +0.5$' few/cols.txt
for name in a b; do
    ok "$name.gp: a cache in percent" grep -qF 'set xtics ("25 %%" 0.25, "50 %%" 0.5)' few/$name.gp
done
ok "bars too" grep -q '^"25 %"' few/c.dat
ok "and legends" grep -q 'title "25 %"' few/d.gp
printf 'require "tiny".experiment { placement = "eplb" }:run():table { rows = "placement", value = "step_s" }\n' >y.lua
run_expect 2 'no axis "placement"; the experiment has none' "$moelab" run y.lua --out none

# ---- figures that are missing, or 0/0 ----

cat >y.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
local runs = tiny.experiment { placement = moe.each { "contiguous", "round-robin", "eplb" } }:run()
runs.list[1].metrics.step_s.mean = 0/0
runs.list[2].metrics.step_s.mean, runs.list[2].metrics.bound_s.mean = 0.0, 0.0
runs:table { rows = "placement", value = { "step_s", "hit_rate" }, best = "min", bound = true, file = "t.txt" }
runs:table { rows = "placement", cols = "placement", value = "step_s", best = "max", ceiling = "contiguous" }
runs:difference { over = "placement", value = "step_s" }
runs:plot { x = "placement", y = "step_s", file = "p.png" }
assert(not moe.value(runs.list[1], "step_s"))
EOF
run_expect 0 'no figure' "$moelab" run y.lua --out missing
ok "a dash for each" grep -Eq '^  contiguous +-  +-  +-  +-$' missing/t.txt
ok "0 is a figure, 0/0 is none" grep -Eq '^  round-robin +0\.000 \* +-  +0\.000 +-$' missing/t.txt
ok "no nan" bash -c "! grep -i -- '-\?nan' missing/t.txt out"
ok "none but gnuplot's in data" grep -q '^"contiguous"	NaN	0$' missing/p.dat

# ---- runs that take long ----

cat >long.lua <<'EOF2'
local moe, tiny = require "moelab", require "tiny"
tiny.experiment { machine = moe.machine "star-50GBps" { nodes = 96 },
  placement = moe.each { "contiguous", "round-robin" },
  model = moe.model "gpt-oss-20b" { layers = 4, experts = 128, top_k = 8 },
  workload = moe.decode { trace = moe.synth { layers = 4, experts = 128, top_k = 8, requests = 8,
                                                 tokens_per_request = 64 },
                          steps = 200 } }:run()
EOF2
if [ -x "${MOELAB_LIBEXEC:-$top_builddir/hw}/moelab-simgrid" ]; then
    run_expect 1 'long.lua:2: run 1 of 2 takes about [0-9.]+ h on machine simgrid: 200 steps of 4 layers' \
        "$moelab" run long.lua --out long --machine simgrid --run-timeout 1 --jobs 1
    mv err said
    ok "... once" test "$(grep -c 'takes about' said)" = 1
    ok "... and how to do without" grep -q 'ended after 1 s: see --run-timeout.*--machine flow' said
    ok "nothing else of the time on what is no terminal" test -z "$(grep left said)"
    printf 'require "tiny".experiment():run()\n' >short.lua
    run_expect 0 '' "$moelab" run short.lua --out long --machine simgrid
    ok "short runs: not a word" test ! -s err
else
    skip "runs that take long" "SimGrid is not built"
fi
if script -qec true /dev/null </dev/null >/dev/null 2>&1; then # needs a pseudo-terminal, too
    sed -i 's/steps = 200/steps = 4000/' long.lua
    script -qec "'$moelab' run long.lua --out long --run-timeout 4 --jobs 1" said </dev/null >/dev/null 2>&1
    ok "a terminal sees the steps of a long run" \
        grep -q '0 of 2 runs, .* left; run 1: step [0-9]* of 4000, [0-9]* s' said
else
    skip "progress" "no script(1), or no terminal for it"
fi

# ---- --set ----

printf 'require "tiny".experiment { router = "softmax-top-k" }:run()\n' >x.lua
# set TEXT KEY=VALUE...: what the manifest then says.
set_to()
{
    local text=$1 args=() pair
    shift
    for pair in "$@"; do args+=(--set "$pair"); done
    ok "--set $*" "$moelab" run x.lua --out set "${args[@]}"
    ok "... is in the manifest" grep -Eq "$text" set/manifest.json
}
set_to 'star-50GBps.lua, 8 nodes' machine.nodes=8
set_to 'dgx-h100.lua, 1 nodes' machine=dgx-h100
set_to '"memory": "1 GB"' 'machine.device.memory=1 GB'
set_to '"d_model": 512' model.d_model=512
set_to '"steps": 1,' workload.steps=1
set_to '"skew": 2' workload.trace.skew=2
set_to '"renormalise": false' router.renormalise=false
set_to '"seed": 9' seed=9 placement=eplb
set_to '"name": "eplb"' placement=eplb

# ---- mistakes in what is asked of the results; line 3 ----

refused()
{
    printf 'local moe, tiny = require "moelab", require "tiny"\nlocal runs = tiny.experiment():run()\n%s\n' "$2" >x.lua
    run_expect 2 "x\\.lua:$1" "$moelab" run x.lua --out refused
    ok "... and leaves nothing" test ! -e refused -a ! -e refused.part
}
refused '3: runs:table: value is missing' 'runs:table { rows = "placement" }'
refused '3: runs:table: expected a table, found nil' 'runs:table()'
refused '4: runs:table: unknown key "row"; did you mean "rows"' $'runs:table { value = "step_s",\nrow = "placement" }'
refused '3: runs:table: no axis "placemnt"; did you mean "placement"' \
    'runs:table { rows = "placemnt", value = "step_s" }'
refused '3: runs:table: no axis "executor"; axes: placement' 'runs:table { rows = "executor", value = "step_s" }'
refused '3: runs:table: no metric "step"; did you mean "step_s"' 'runs:table { rows = "placement", value = "step" }'
refused '3: runs:table: "step_s.p42": expected mean, p50, p99, min or max' \
    'runs:table { rows = "placement", value = "step_s.p42" }'
refused '3: runs:table.best: expected "min" or "max", found "least"' \
    'runs:table { rows = "placement", value = "step_s", best = "least" }'
refused '3: runs:table.bound: expected a boolean, found number' \
    'runs:table { rows = "placement", value = "step_s", bound = 1 }'
cols='cols = "placement", bound = true'
refused '3: runs:table.bound: with cols, expected value = "step_s", found "a2a_s"' \
    "runs:table { rows = \"placement\", value = \"a2a_s\", $cols }"
refused '3: runs:table.bound: with cols, expected rows, found none' \
    "runs:table { rows = {}, value = \"step_s\", $cols }"
refused '3: runs:table.bound: with cols, expected rows of policies alone \(router, .*, tier\), found "machine.nodes"' \
    "runs = tiny.experiment { machine = moe.machine \"star-50GBps\" { nodes = moe.each { 2, 4 } } }:run() \
runs:table { rows = \"machine.nodes\", value = \"step_s\", $cols }"
refused '3: runs:table.rows: expected strings, found a number' 'runs:table { rows = { 1 }, value = "step_s" }'
refused '3: runs:filter: no axis "executor"' 'runs:filter { executor = "flow" }'
refused '3: runs:plot: y is missing' 'runs:plot { x = "placement", file = "a.png" }'
refused '3: runs:plot.file: expected "NAME.png", found "a.svg"' \
    'runs:plot { x = "placement", y = "step_s", file = "a.svg" }'
refused '3: runs:plot.kind: expected "bars" or "lines", found "pie"' \
    'runs:plot { x = "placement", y = "step_s", kind = "pie", file = "a.png" }'
refused '3: runs:plot: kind "lines" needs numbers on placement, found "contiguous"' \
    'runs:plot { x = "placement", y = "step_s", kind = "lines", file = "a.png" }'
refused '3: runs:difference: over is missing' 'runs:difference { value = "step_s" }'
refused '3: moe.eval: options: expected a table, found nil' 'moe.eval("placement", "eplb")'

# ---- --out ----

printf 'require "tiny".experiment():run()\nrequire "moelab".write("note.txt", "new")\n' >x.lua
mkdir theirs && touch theirs/thesis.txt
rm -rf mine
"$moelab" run x.lua --out mine >/dev/null 2>&1
echo note >mine/notes.txt && mkdir mine/more && echo note >mine/more/notes.txt && echo edited >mine/runs.jsonl
ok "what is not moelab's stays" "$moelab" run x.lua --out mine
ok "... files" grep -q note mine/notes.txt
ok "... and directories" grep -q note mine/more/notes.txt
ok "... what is moelab's is new" bash -c '! grep -q edited mine/runs.jsonl'
ok "... and listed" test "$(grep -A2 '"files"' mine/manifest.json | grep -c runs.jsonl)" = 1
ok "... nothing is left beside" test ! -e mine.part
ln -s mine link
run_expect 2 'link: is a link; name the directory itself as --out' "$moelab" run x.lua --out link
run_expect 2 'theirs: exists and is not a results directory; choose another --out' "$moelab" run x.lua --out theirs
ok "... and is as it was" test "$(ls theirs)" = thesis.txt -a ! -e theirs.part
touch file
run_expect 2 'file: exists and is not a results directory' "$moelab" run x.lua --out file
mkdir new.part && touch new.part/thesis.txt
run_expect 2 'new\.part: exists and was not left by moelab' "$moelab" run x.lua --out new
ok "... and is as it was" test -e new.part/thesis.txt -a ! -e new
mkdir empty
ok "onto an empty directory" "$moelab" run x.lua --out empty/
ok "with parents" "$moelab" run x.lua --out a/b/c
ok "... all of it" test -s a/b/c/runs.jsonl -a -s a/b/c/manifest.json -a ! -e a/b/c.part
ok "onto earlier results" "$moelab" run x.lua --out empty
printf 'require "moelab".write("other.txt", "newer")\n' >y.lua
ok "... which are replaced" "$moelab" run y.lua --out empty
ok "... wholly" test "$(ls empty | tr '\n' ' ')" = "manifest.json other.txt runs.jsonl " -a ! -e empty.part
mkdir left.part && touch left.part/runs.jsonl left.part/rest.txt
ok "what an interrupted run left is replaced" "$moelab" run x.lua --out left
ok "... wholly" test ! -e left/rest.txt -a ! -e left.part
ok "default: results/NAME" "$moelab" run x.lua
ok "... is there" test -s results/x/manifest.json
printf 'error "no"\n' >y.lua
run_expect 2 'y\.lua:1: no' "$moelab" run y.lua --out empty
ok "earlier results survive a scenario that fails" test -s empty/other.txt -a ! -e empty.part
printf 'require "tiny".experiment():run() while true do end\n' >y.lua
"$moelab" run y.lua --out busy --run-timeout 5 2>/dev/null &
first=$!
for _ in $(seq 100); do [ -s busy.part/runs.jsonl ] && break; sleep 0.05; done
run_expect 2 'busy\.part: another moelab is writing there' "$moelab" run x.lua --out busy
kill $first
wait $first 2>/dev/null

# ---- a disk that is full; no gnuplot ----

printf 'require "moelab".write("a.txt", ("x"):rep(1 << 20))\n' >y.lua
run_expect 2 'cannot write small\.part/a\.txt: File too large' bash -c \
    "ulimit -f 16; exec '$moelab' run y.lua --out small"
ok "... and leaves nothing" test ! -e small -a ! -e small.part
printf 'local moe, tiny = require "moelab", require "tiny"\nlocal runs = tiny.experiment():run()\n
for i = 1, 20 do runs:plot { x = "placement", y = "step_s", file = "p" .. i .. ".png" } end\n' >z.lua
mkdir disk
if mount -t tmpfs -o size=64k none disk 2>/dev/null; then
    run_expect 2 'cannot write disk/d\.part/a\.txt: No space left on device' "$moelab" run y.lua --out disk/d
    ok "... and leaves nothing" test -z "$(ls disk)"
    run_expect 2 'cannot write disk/d\.part/.*No space left' "$moelab" run z.lua --out disk/d
    ok "... and leaves nothing" test -z "$(ls disk)"
    umount disk
else
    skip "a full disk" "needs the right to mount"
fi
run_expect 2 'standard output' bash -c "exec '$moelab' plugins >/dev/full"
mkdir locked && chmod 500 locked
if [ -w locked ]; then
    skip "a directory that cannot be written" "root writes everywhere"
else
    run_expect 2 '--out locked/r: cannot make the directory locked/r\.part, .*: Permission denied' \
        "$moelab" run x.lua --out locked/r
fi

# No gnuplot on the PATH: everything but the pictures.
mkdir bin
run_expect 0 'gnuplot is not installed: pictures are left as \.gp and \.dat; .*"gnuplot NAME\.gp" in plots' \
    env PATH="$work/bin" "$moelab" run z.lua --out plots
ok "said once" test "$(grep -c gnuplot err)" = 1
ok "data, commands, no pictures" test -s plots/p1.dat -a -s plots/p20.gp -a ! -e plots/p1.png
# broken_gnuplot NOTE SHELL-COMMANDS: one that does this instead of drawing costs the pictures, not the runs.
broken_gnuplot()
{
    printf '#!/bin/sh\n%s\n' "$2" >bin/gnuplot
    chmod +x bin/gnuplot
    run_expect 0 "^moelab: gnuplot p1\.gp $1: pictures are left as \.gp and \.dat" \
        env PATH="$work/bin:$PATH" "$moelab" run z.lua --out broken --run-timeout 2
    ok "... said once" test "$(grep -c gnuplot err)" = 1
    ok "... runs and data are there" test -s broken/runs.jsonl -a -s broken/manifest.json -a -s broken/p20.dat \
        -a -s broken/p20.gp -a ! -e broken/p1.png -a ! -e broken.part
    rm -rf broken
}
broken_gnuplot 'failed \(exit 7\): it said nothing' 'exit 7'
broken_gnuplot 'failed \(exit 1\): line 0: the pen is dry' 'echo; echo "line 0: the pen is dry" >&2; exit 1'
broken_gnuplot 'failed \(exit 1\): "p1.gp" line 2: unknown terminal type' \
    'echo half >"${1%gp}png"; printf "\nset terminal pngcairo\n  ^\n\"$1\" line 2: unknown terminal type\n" >&2; exit 1'
broken_gnuplot 'failed \(signal 9, Killed\): what' 'echo what; kill -KILL $$'
broken_gnuplot 'failed \(exit 3\): a lot' 'yes a lot | head -c 300000; exit 3'
broken_gnuplot 'did not end within 2 s: it said nothing' 'exec >/dev/null 2>&1; sleep 60'
plan
