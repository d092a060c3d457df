#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# What a scenario with a mistake in it gets: the file, the line, what was found, what was expected; exit code 2, and
# nothing half-written.
. "$(dirname "$0")/lib.sh"
cp "$top_srcdir/tests/cli/fixtures/tiny.lua" "$work"
cd "$work" || exit 99
mkdir tmp
export TMPDIR=$work/tmp # where synthetic traces are kept

# refused REGEX FILE [OPTION...]: exit code 2, a message that matches, and no results.
refused()
{
    local regex=$1 file=$2
    shift 2
    run_expect 2 "$regex" "$moelab" run "$file" --out results "$@"
    ok "... and leaves nothing" test ! -e results -a ! -e results.part -a -z "$(ls tmp)"
    rm -rf results results.part tmp/*
}

# A directory above that was made for it goes with it; one that was there stays.
mkdir -p there
printf 'error("stop")\n' >stop.lua
run_expect 2 "stop.lua:1: stop" "$moelab" run stop.lua --out new/deep/results
ok "directories made for results that do not come are removed" test ! -e new
run_expect 2 "stop.lua:1: stop" "$moelab" run stop.lua --out there/deep/results
ok "... and others are not" test -d there -a ! -e there/deep
rm -r there stop.lua

# refused_with REGEX KEYS [OPTION...]: the same for the tiny experiment with these keys, which begin on line 3.
refused_with()
{
    printf 'local moe, tiny = require "moelab", require "tiny"\nlocal x = tiny.experiment {\n%s\n}\nx:run()\n' "$2" \
        >x.lua
    refused "$1" x.lua "${@:3}"
}

# refused_text REGEX TEXT [OPTION...]: the same for a script of one's own, which begins on line 2.
refused_text()
{
    printf 'local moe, tiny = require "moelab", require "tiny"\n%s\n' "$2" >x.lua
    refused "$1" x.lua "${@:3}"
}

# ---- the file ----

refused 'nowhere\.lua: cannot be read' nowhere.lua
refused 'cannot be read' .
refused_text 'x\.lua:3: .* near' $'local y = 1\nlocal z = = 2'
printf '\033Lua' >x.lua
refused 'x\.lua: is Lua bytecode, expected text' x.lua
refused_text 'x\.lua:3: attempt to index a nil value' $'local y\nprint(y.z)'
refused_text '^moelab: x\.lua:2: raised a table, expected a message' 'error({})'
refused_text '^moelab: x\.lua:3: raised a nil, expected a message' $'local y\nerror()'
refused_text '^moelab: x\.lua:2: no place' 'error("no place", 0)'
# What C functions and the prelude say, too.
refused_text '^moelab: x\.lua:3: "\.\./x" is not a file name' $'local y\nmoe.write("../x", "y")'
refused_text '^moelab: x\.lua:2: runs\.jsonl is moelab.s own' 'moe.write("runs.jsonl", "x")'
refused_text '^moelab: x\.lua:2: "a" goes on after a NUL' 'moe.write("a\0b", "x")'
refused_text '^moelab: x\.lua:3: placement eplb: .*replicas = 5 is not a multiple' \
    $'local load = { { 1, 2, 3, 4 } }
moe.eval("placement", "eplb", { input = { load = load, devices = 2, replicas = 5 } })'
refused_text '^moelab: x\.lua:2: moe.eval: expected \(kind, name, options\), found a table and a nil' 'moe.eval({})'
refused_text '^moelab: x\.lua:2: attempt to index a number value' 'local x = moe.value(1, "step_s")'
refused_text '^moelab: x\.lua:3: .*9' \
    $'local w = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 9 } }\n'\
$'tiny.experiment { workload = w }'
refused_text 'x\.lua:2: module "nowhere" not found' 'require "nowhere"'
printf 'return = 1\n' >broken.lua
refused_text 'broken\.lua:1: ' 'require "broken"'
printf 'require "again"\n' >again.lua
refused_text 'again\.lua:1: module "again" requires itself' 'require "again"'
refused_text 'x\.lua:3: attempt to compare' $'pcall(moe.write, "../x", "")\nprint(1 < "x")' # not what was caught before
printf 'local moe = require "moelab"\npcall(moe.write, "../x", "")\npcall(require, "nowhere")\nrequire "tiny"\n' >x.lua
ok "an error that the script catches is none" "$moelab" run x.lua --out caught
ok "... and there are results" test -s caught/manifest.json -a ! -e caught.part

# ---- keys and names ----

# Not through tiny.lua: the line is that of moe.experiment's caller.
model='{ layers = 2, experts = 8, top_k = 2, d_model = 64, d_expert = 64, n_heads = 1, d_head = 64 }'
refused_text 'x\.lua:5: moe.experiment: unknown key "placment"; did you mean "placement"\?' \
    $'moe.experiment {\n  seed = 3,\n\n  placment = "eplb",\n}'
refused_text 'x\.lua:4: moe.experiment: unknown key "zzzzzzzz"; known: allow_extrapolation, balancer, cache' \
    $'moe.experiment {\n  seed = 3,\n  ["zzzzzzzz"] = 1,\n}'
refused_text 'x\.lua:2: moe.experiment: expected only named keys, found \[1\]' 'moe.experiment { "eplb" }'
refused_text 'x\.lua:2: moe.experiment: expected a table, found nil' 'moe.experiment()'
refused_text 'x\.lua:2: moe.experiment: workload is missing' "moe.experiment { model = $model, machine = 'dgx-h100' }"
refused_text 'x\.lua:3: moe.decode: unknown key "step"; did you mean "steps"' \
    $'moe.decode { trace = tiny.trace,\nstep = 1 }'
refused_text 'x\.lua:2: moe.prefill: unknown key "batch_per_device"' 'moe.prefill { trace = "", batch_per_device = 1 }'
refused_text 'x\.lua:2: moe.decode: trace is missing' 'moe.decode {}'
refused_text 'x\.lua:2: moe.synth: unknown key "skews"; did you mean "skew"' 'moe.synth { skews = 1 }'
refused_text 'x\.lua:2: moe.synth: layers is missing' 'moe.synth { }'
refused_text 'x\.lua:2: moe.each: expected a list' 'moe.each {}'
refused_text 'x\.lua:2: moe.label: expected a string, found number' 'moe.label(1, 2)'
refused_text 'x\.lua:2: moe.plugin: expected a name, found table' 'moe.plugin { "eplb" }'
refused_text 'x\.lua:2: moe.plugin eplb: parameters: expected a table, found number' 'moe.plugin("eplb", 288)'
refused_with 'x\.lua:3: placement: expected a name or moe.plugin\(...\), found number' 'placement = 3'
refused_with 'x\.lua:3: placement eplc: no placement named "eplc"; did you mean "eplb"\?' 'placement = "eplc"'
refused_with 'x\.lua:4: placement eplb: unknown parameter "replica"; did you mean "replicas"\?' \
    $'placement = moe.each { "contiguous",\n moe.plugin("eplb", { replica = 1 }) }'
refused_with 'router eplb: "eplb" is a placement, expected a router' 'router = "eplb"'
refused_with 'no placement named "zzzzzzzz" \(see: moelab plugins\)' 'placement = "zzzzzzzz"'
refused_with '"\.\./lru" is not a policy.s name' 'offload = "../lru"'
refused_with 'x\.lua:3: no machine named "dgx-h200"; did you mean "dgx-h100"' 'machine = moe.machine "dgx-h200"'
refused_with 'x\.lua:3: no model named "gpt-oss-20c"; did you mean "gpt-oss-20b"\?' 'model = moe.model "gpt-oss-20c" {}'
refused_with 'model: unknown key "d_modell"; did you mean "d_model"' 'model = { d_modell = 1 }'
refused_with 'unknown precision "bf17"; did you mean "bf16"' 'model = moe.model "tiny-moe" { precision = "bf17" }'
refused_with 'no executor named "flew"; did you mean flow' 'executor = "flew"'
refused_with 'unknown tier "exakt", expected bound, flow or exact' 'tier = "exakt"'
refused_with 'x\.lua:3: placement: two values of moe.each are called "eplb"' 'placement = moe.each { "eplb", "eplb" }'
refused_text 'x\.lua:3: no trace at "nowhere"|x\.lua:3: workload.trace: no trace at "nowhere"' \
    $'local w = moe.decode {\ntrace = "nowhere" }\ntiny.experiment { workload = w }'

# ---- values ----

refused_with 'x\.lua:3: cache: nan is not a finite number' 'cache = 0/0'
refused 'workload.context: 1e\+09 is out of range, expected 0 to 16777216' \
    "$top_srcdir/scenarios/quickstart.lua" --set workload.context=1e9
refused 'workload.context: expected a whole number, found 1.5' \
    "$top_srcdir/scenarios/quickstart.lua" --set workload.context=1.5
refused_with 'x\.lua:3: cache: inf is not a finite number' 'cache = 1/0'
refused_with 'x\.lua:4: placement\.replicas: nan is not a finite number' \
    $'placement = moe.plugin("eplb", {\nreplicas = 0/0 })'
refused_with 'placement eplb: .*replicas.*' 'placement = moe.plugin("eplb", { replicas = 1e12 })'
refused_with 'placement eplb: .*replicas.*expected a whole number' \
    'placement = moe.plugin("eplb", { replicas = "many" })'
refused_with 'placement eplb: .*replicas.*expected a whole number' 'placement = moe.plugin("eplb", { replicas = 1.5 })'
refused_with 'placement: expected a value, found a function' 'placement = print'
refused_with 'x\.lua:3: seed: expected a whole number, found 1\.5' 'seed = 1.5'
refused_with 'x\.lua:3: experiment.cache: expected a number, found string' 'cache = "half"'
refused_with 'x\.lua:2: cache: expected a share of all experts within \(0, 1\], found 1.5' 'cache = 1.5'
refused_with 'warmup: 5 is out of range, expected 0 to 1' 'warmup = 5'
refused_with 'model.layers: 0 is out of range, expected 1 to 1000' 'model = moe.model "tiny-moe" { layers = 0 }'
refused_with 'model.layers: expected a number, found "two"' 'model = moe.model "tiny-moe" { layers = "two" }'
refused_with 'model.layers: expected a whole number, found 1\.5' 'model = moe.model "tiny-moe" { layers = 1.5 }'
refused_with 'model.top_k: 40 is more than the 32 experts' 'model = moe.model "tiny-moe" { top_k = 40 }'
refused_with 'model.d_model: is missing' 'model = { layers = 2, experts = 8, top_k = 2 }'
refused_with 'workload.steps: 0 is out of range' 'workload = moe.decode { trace = tiny.trace, steps = 0 }'
refused_with 'workload.steps: expected a whole number, found "5"' \
    'workload = moe.decode { trace = tiny.trace, steps = "5" }'
refused_with 'workload.profile: expected a share of requests within \[0, 1\), found 1$' \
    'workload = moe.decode { trace = tiny.trace, profile = 1 }'
refused_with 'workload: expected moe.decode' 'workload = "decode"'
refused_with 'moe.synth: top_k: expected a number from 1 to 1024, found 0' \
    'workload = moe.decode { trace = moe.synth { layers = 1, experts = 8, top_k = 0 } }'
refused_with 'moe.synth: skew: expected a number from 0 to 10, found "much"' \
    'workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, skew = "much" } }'
refused_with 'top_k.*9.*8|9 .*8 experts' \
    'workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 9 } }'
refused_with 'machine rtx4090-pcie4, device 0: its experts take 653.9 GB .* fewer replicas' \
    'model = "deepseek-v3", machine = "rtx4090-pcie4",
     workload = moe.decode { trace = moe.synth { layers = 58, experts = 256, top_k = 8, requests = 4 }, steps = 1 }'
refused_with 'node 0: its devices. experts take 653.9 GB and host memory has 128 GB' \
    'model = "deepseek-v3", machine = "rtx4090-pcie4", offload = "lru", workload = moe.decode {
         trace = moe.synth { layers = 58, experts = 256, top_k = 8, requests = 4 }, steps = 1, context = 0 }'
refused_with 'cache: offload none keeps every expert resident and has none' 'cache = 0.5'
refused_with 'the model has 2 layers, 8 experts, top_k 2; the trace .* has 8 layers, 32 experts, top_k 4' \
    'workload = moe.decode { trace = "traces/tiny-moe" }'
refused_text 'nested more than 32 deep' $'local t = {}\nt.t = t\ntiny.experiment { model = t }'
refused_text 'x\.lua:2: ours: nan is not a finite number' 'moe.claim { ours = 0/0 }'
refused_text 'x\.lua:3: .*nested more than 32 deep' $'local t = {}\nt.t = t; moe.claim(t)'
refused_text 'x\.lua:2: .*a string is not UTF-8' 'moe.claim { paper = "\xff" }'
refused_text 'x\.lua:2: .*found a function' 'moe.claim { paper = print }'
refused_text 'x\.lua:2: .*all names or all 1, 2, 3' 'moe.claim { 1, 2, x = 3 }'

# ---- machines ----

# machine 's/A/B/' [OPTIONS]: a copy of dgx-h100 with a change.
machine()
{
    sed "$1" "$top_srcdir/hw/machines/dgx-h100.lua" >m.lua
}
machine '/^  nic = {/,/^  },/d'
refused_with 'm\.lua.*nic' 'machine = moe.machine "./m.lua" { nodes = 2 }'
machine 's/^  nvlink = {/  nvlnk = {/'
refused_with 'm\.lua.*"?nvlnk' 'machine = moe.machine "./m.lua" { nodes = 2 }'
machine '/^  nic = {/,/^  },/s/source /sauce /'
refused_with 'm\.lua.*nic.*(source|sauce)' 'machine = moe.machine "./m.lua" { nodes = 2 }'
machine 's|bandwidth = "50 GB/s"|bandwidth = "-1 GB/s"|'
refused_with 'm\.lua: nic\.bandwidth: found "-1 GB/s", expected' 'machine = moe.machine "./m.lua" { nodes = 2 }'
machine 's/^return {/return 7, {/'
refused_with 'm\.lua: returns a number, expected a table' 'machine = moe.machine "./m.lua"'
machine 's/^return {/return {{/'
refused_with "m\\.lua:[0-9]+: .*expected" 'machine = moe.machine "./m.lua"'
machine 's/^return {/while true do end return {/'
refused_with 'm\.lua:3: the script did not end within 0\.2 s' 'machine = moe.machine "./m.lua"' --run-timeout 0.2
refused_with 'nic\.bandwidth: found "400 Gb/s": bits; write "50 GB/s"' \
    'machine = moe.machine "dgx-h100" { nic = { bandwidth = "400 Gb/s" } }'
refused_with 'nodes' 'machine = moe.machine "dgx-h100" { nodes = "two" }'
refused_with 'm\.lua|noddes' 'machine = moe.machine "dgx-h100" { noddes = 2 }'
refused_with 'has no figure for precision' 'model = moe.model "tiny-moe" { precision = "int4" }'

# ---- traces: one or two of the many mistakes; the others are in tests/unit/test_trace.c ----

cp -r "$top_srcdir/scenarios/traces/tiny-moe" . && chmod -R u+w tiny-moe
workload='model = "tiny-moe", workload = moe.decode { trace = "tiny-moe", steps = 1 }'
head -c 5000 "$top_srcdir/scenarios/traces/tiny-moe/experts.npy" >tiny-moe/experts.npy
refused_with 'tiny-moe/experts\.npy: .*bytes' "$workload"
cp "$top_srcdir/scenarios/traces/tiny-moe/experts.npy" tiny-moe
npy tiny-moe/offsets.npy '<i8' '2,' <<<'0123456789abcde'
refused_with 'tiny-moe/offsets\.npy: ' "$workload"
cp "$top_srcdir/scenarios/traces/tiny-moe/offsets.npy" tiny-moe
printf '\xff\x7f' | dd of=tiny-moe/weights.npy bs=1 seek=128 conv=notrunc status=none # a NaN in f16
refused_with 'tiny-moe/weights\.npy\[0,0,0\]: found NaN, expected a finite number' "$workload"
rm tiny-moe/trace.json
refused_with 'no trace at "tiny-moe"' "$workload"

# ---- loops and memory ----

refused_text 'x\.lua:2: the script did not end within 0\.2 s \(--run-timeout\)' 'while true do end' --run-timeout 0.2
refused_text 'did not end within 0\.2 s' 'while true do pcall(function() while true do end end) end' --run-timeout 0.2
refused_text '^moelab: x\.lua:2: the script did not end within --run-timeout, and is inside one call' \
    'string.find(("a"):rep(1e5), (".-"):rep(20) .. "b")' --run-timeout 0.2
refused_text 'did not end within --run-timeout' \
    'xpcall(function() while true do end end, function() while true do end end)' \
    --run-timeout 0.2
refused_text 'x\.lua: the script holds more than 1024 MiB' 'return ("x"):rep((1 << 31) - 99)'
refused_text 'x\.lua: the script holds more than 1024 MiB' 'local s = "xx" while true do s = s .. s end'
refused_text 'overflow' 'local function f() return 1 + f() end f()'

# An interrupt leaves nothing either.
printf 'local moe, tiny = require "moelab", require "tiny"\ntiny.experiment():run()\nwhile true do end\n' >x.lua
"$moelab" run x.lua --out results 2>err &
for _ in $(seq 100); do [ -s results.part/runs.jsonl ] && break; sleep 0.05; done
kill -TERM $!
wait $! 2>/dev/null
ok "SIGTERM: nothing half-written" test ! -e results -a ! -e results.part -a -z "$(ls tmp)"

# ---- the command line ----

printf 'require "tiny".experiment():run()\n' >x.lua
refused '--set steps: expected KEY=VALUE' x.lua --set steps
refused '--set =5: expected KEY=VALUE' x.lua --set =5
refused '--set placment=eplb|--set placment: unknown key "placment"; did you mean "placement"' x.lua --set placment=eplb
refused '--set workload.step: unknown key "step"; did you mean "steps"' x.lua --set workload.step=5
refused '--set workload.steps.x: "steps" has no keys to set here \(it is a number\)' x.lua --set workload.steps.x=5
refused \
    '--set placement.replicas: "placement" has no keys to set here \(it is an axis\)' x.lua --set placement.replicas=5
refused \
    'model: unknown key|--set model.experst: unknown key "experst"; did you mean "experts"' x.lua --set model.experst=5
refused 'router replay: unknown parameter "bias"|router replay: .*bias' x.lua --set router.bias=5
refused 'no placement named "eplc"' x.lua --set placement=eplc
refused 'workload.steps: expected a whole number, found "nan"' x.lua --set workload.steps=nan
refused 'seed: expected a whole number' x.lua --set seed=1e999
refused 'no executor named "flew"' x.lua --machine flew
refused 'jobs 0: expected a number from 1 to 4096' x.lua --jobs 0
refused 'run-timeout -1: expected seconds' x.lua --run-timeout -1
for command in '' run plugins papers reproduce 'eval placement eplb' trace 'trace info' rank; do
    # shellcheck disable=SC2086 # two words
    run_expect 2 '^moelab.*: unknown option --qqqqqqqqqq($|[ ;]*\(?see)' "$moelab" $command --qqqqqqqqqq
    # shellcheck disable=SC2086
    run_expect 2 '^moelab.*: unknown option -q' "$moelab" $command -q
done
while read -r command given near; do
    # shellcheck disable=SC2086
    run_expect 2 "^moelab.*: unknown option $given; did you mean $near\?" "$moelab" ${command//,/ } "$given"
done <<'END'
--versio=2 --versio=2 --version
run --outt=y --out
run,x.lua --jbos --jobs
run,x.lua --uns=2 --unsafe
plugins --jsno --json
papers --jso --json
reproduce --al --all
eval,router,softmax-top-k --topk=2 --top-k
trace --hepl --help
trace,synth --layer=2 --layers
trace,synth --hepl --help
END
run_expect 2 'run: --out needs a value' "$moelab" run x.lua --out
run_expect 2 'run: --quiet takes no value' "$moelab" run x.lua --quiet=1
run_expect 2 'unknown verb "chekc"; did you mean check' "$moelab" trace chekc
run_expect 2 'expected one scenario, found 0' "$moelab" run
run_expect 2 'expected one scenario, found 2' "$moelab" run x.lua x.lua
run_expect 2 'unknown command "rnu"; did you mean "run"' "$moelab" rnu
run_expect 2 'expected the name of a directory' "$moelab" run x.lua --out ''
run_expect 2 'expected the name of a directory' "$moelab" run x.lua --out .

# ---- SimGrid ----

printf 'require "tiny".experiment { executor = "simgrid" }:run()\n' >x.lua
mkdir empty dies crashes garbles
printf '#!/bin/sh\nexit 3\n' >dies/moelab-simgrid
printf '#!/bin/sh\necho moelab-simgrid 2\nread line\nkill -SEGV $$\n' >crashes/moelab-simgrid
printf '#!/bin/sh\nyes what\n' >garbles/moelab-simgrid
chmod +x ./*/moelab-simgrid
export MOELAB_LIBEXEC=$work/empty
refused 'no moelab-simgrid \(looked for .*empty/moelab-simgrid\)' x.lua
MOELAB_LIBEXEC=$work/dies
refused 'machine simgrid: .*the SimGrid process died \(exit 3\)' x.lua
MOELAB_LIBEXEC=$work/crashes
refused 'the SimGrid process died \(signal 11' x.lua
MOELAB_LIBEXEC=$work/garbles
refused 'simgrid: .*what' x.lua
plan
