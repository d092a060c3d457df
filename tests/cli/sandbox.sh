#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# A scenario gets no process, network, native library, debug access or file but those it writes under --out, whatever
# it does to the libraries that the prelude shares with it.
. "$(dirname "$0")/lib.sh"
cp "$top_srcdir/tests/cli/fixtures/tiny.lua" "$work"
cd "$work" || exit 99
mkdir tmp
export TMPDIR=$work/tmp

# runs NAME TEXT [OPTION...]: a script that runs to its end; gives REGEX TEXT: and prints; refuses REGEX TEXT: ends
# with exit code 2.
runs()
{
    printf '%s\n' "$2" >x.lua
    ok "$1" "$moelab" run x.lua --out results "${@:3}"
}

gives()
{
    printf '%s\n' "$2" >x.lua
    run_expect 0 "$1" "$moelab" run x.lua --out results "${@:3}"
}

refuses()
{
    printf '%s\n' "$2" >x.lua
    run_expect 2 "$1" "$moelab" run x.lua --out results "${@:3}"
}

# ---- what is there ----

gives '^none$' 'local all = {}
for _, k in ipairs { "os", "io", "debug", "package", "coroutine", "load", "loadstring", "loadfile", "dofile",
                     "collectgarbage" } do
  if _G[k] ~= nil then all[#all + 1] = k end
end
if string.dump or ("").dump then all[#all + 1] = "string.dump" end
print(#all == 0 and "none" or table.concat(all, ", "))'
gives '^_G _VERSION assert error getmetatable ipairs math next pairs pcall print rawequal rawget '\
'rawlen rawset require select setmetatable string table tonumber tostring type utf8 warn xpcall$' \
    'local all = {} for k in pairs(_G) do all[#all + 1] = k end table.sort(all) print(table.concat(all, " "))'
gives '^table	function$' 'print(type(os), type(string.dump))' --unsafe

# ---- modules ----

mkdir sub
printf 'return "sub"\n' >sub/inner.lua
printf 'return "outside"\n' >../moelab-outside.$$.lua
gives '^sub$' 'print(require "sub.inner")'
for name in ../moelab-outside.$$ /etc/passwd sub/inner ..sub.inner sub..inner sub. .sub "" 'lfs' 'moelab\0x' \
    "$work/sub/inner"; do
    refuses 'x\.lua:1: module ".*" not found|a string with a NUL in it' "require \"$name\""
done
rm ../moelab-outside.$$.lua
cc=${CC:-cc}
printf 'int luaopen_native(void *L); int luaopen_native(void *L) { (void)L; return 0; }\n' >native.c
$cc -shared -fPIC -o native.so native.c
refuses 'module "native" not found' 'require "native"'

# ---- writing ----

for name in ../x /tmp/x sub/x .hidden -e . .. "" runs.jsonl manifest.json; do
    refuses 'is not a file name|is moelab.s own' "require('moelab').write('$name', 'text')"
done
refuses 'expected \(name, text\)' 'require("moelab").write("x")'
runs "moe.write" 'require("moelab").write("kept.txt", "text")'
ok "a file under --out" grep -q '^text$' results/kept.txt

# A machine file is data: it gets nothing but what describes it.
printf 'local moe = require "moelab" moe.write("etc", "x") return {}\n' >evil.lua
refuses 'x\.lua:2: \./evil\.lua:1: attempt to call a nil value$' 'local moe, tiny = require "moelab", require "tiny"
tiny.experiment { machine = moe.machine "./evil.lua" }'

# ---- reading ----

# secret TEXT: a file of it, named wherever a scenario may name one, is refused with its name and without its words.
secret()
{
    local secret=$1
    printf "$secret" >secret
    cat >x.lua <<'LUA'
local moe, tiny = require "moelab", require "tiny"
for _, try in ipairs {
  function() moe.eval("placement", "eplb", { input = "./secret" }) end,
  function() moe.eval("machine", "./secret", { pattern = "alltoall", n = 2, bytes_per_rank = 1 }) end,
  function() tiny.experiment { machine = moe.machine "./secret" } end,
  function() moe.eval("metric", "srp", { trace = "./traced" }) end,
} do
  local ok, text = pcall(try)
  assert(not ok and (text:find("secret", 1, true) or text:find("trace.json", 1, true)), text)
  assert(not text:lower():find("hunter", 1, true) and not text:find("82", 1, true), text)
  print(text)
end
LUA
    rm -rf traced && mkdir traced && cp secret traced/trace.json
    ok "not told: $secret" "$moelab" run x.lua --out results
}
secret 'hunter2\n'
secret 'token = hunter2 secret\n'
secret '{"key": hunter2}'
secret '{"hunter2": 1}'
secret '{"key": "\\uD82A"}'
secret '{"key": "\x82'
secret 'hunter2()'
secret 'return hunter2.x'
secret 'error "hunter2"'
secret 'goto hunter2'
secret 'error {}'
printf '{"hunter2": 1}' >secret
printf 'require("moelab").eval("placement", "eplb", { input = "./secret" })\n' >x.lua
run_expect 2 'secret: hunter2: unknown key' "$moelab" run x.lua --out results --unsafe
run_expect 2 'secret: hunter2: unknown key' "$moelab" eval placement eplb --input secret

# ---- gnuplot runs what stands between backquotes, and system() ----

runs "labels and titles that mean something to gnuplot" 'local moe, tiny = require "moelab", require "tiny"
local touch = "`touch pwned`\n; system \"touch pwned\" \\\" \" \\"
local placement = moe.each { moe.label(touch, "contiguous"), "round-robin" }
local runs = tiny.experiment { name = touch, placement = placement }:run()
runs:plot { x = "placement", y = "step_s", file = "a.png", title = touch, xlabel = touch, ylabel = touch }
runs:plot { x = "placement", y = "step_s", group = "placement", file = "b.png" }
runs:table { rows = "placement", value = "step_s", title = touch, file = "a.txt" }'
ok "labels run nothing" test ! -e pwned -a ! -e results/pwned
for file in ../a.png -e.png .a.png a.svg a/b.png; do
    refuses 'runs:plot.file: expected "NAME.png"' "local moe, tiny = require 'moelab', require 'tiny'
    tiny.experiment():run():plot { x = 'placement', y = 'step_s', file = '$file' }"
done

# ---- replacing what the prelude uses ----

# Before and after it is loaded, every function of every library, by one that looks for natives and writes gnuplot.
tamper='local select, type, rawget, error, pairs = select, type, rawget, error, pairs
local function evil(name, was)
  return function(...)
    for i = 1, select("#", ...) do
      local x = select(i, ...)
      if type(x) == "table" and rawget(x, "key_line") then error("native functions leaked through " .. name) end
    end
    if name == "concat" or name == "format" then return "system \"touch pwned\"" end
    return was(...)
  end
end
local function tamper()
  for _, library in pairs { string, table, math, utf8 } do
    for k, f in pairs(library) do if type(f) == "function" then library[k] = evil(k, f) end end
  end
  for k, f in pairs(_G) do if type(f) == "function" and k ~= "require" then _G[k] = evil(k, f) end end
end'
plot='local moe, tiny = require "moelab", require "tiny"
local runs = tiny.experiment():run()
runs:table { rows = "placement", value = "step_s", best = "min", bound = true }
runs:plot { x = "placement", y = "step_s", file = "a.png" }'
gives '^  contiguous ' "$tamper
tamper()
$plot"
ok "libraries replaced before: gnuplot got its own script" grep -q '^plot "a.dat"' results/a.gp
ok "... and ran nothing" test ! -e pwned -a ! -e results/pwned
gives '^  contiguous ' "$tamper
require 'moelab'
tamper()
$plot"
ok "libraries replaced afterwards" grep -q '^plot "a.dat"' results/a.gp
refuses 'index a boolean value|cannot change a protected metatable' 'getmetatable("").__index = { format = 1 }'
gives '^false$' 'print(getmetatable(""))'
refuses 'cannot change a protected metatable|table expected' 'setmetatable("", {})'

# Options that are something else each time they are read, and results that scenarios change.
refuses 'runs:plot.title: expected|runs:plot: x is missing|runs:plot.*expected' \
    'local moe, tiny = require "moelab", require "tiny"
local function touch() return "`touch pwned`" end
local title = setmetatable({}, { __tostring = touch, __concat = touch, __index = { gsub = touch } })
tiny.experiment():run():plot { x = "placement", y = "step_s", file = "a.png", title = title }'
refuses 'runs:plot: x is missing' 'local moe, tiny = require "moelab", require "tiny"
local n = 0
tiny.experiment():run():plot(setmetatable({}, { __index = function(_, k) n = n + 1 return "`touch pwned`" end }))'
runs "results changed by the scenario" 'local moe, tiny = require "moelab", require "tiny"
local runs = tiny.experiment():run()
local function touch() return "`touch pwned`" end
local text = setmetatable({}, { __tostring = touch, __index = { gsub = touch } })
runs.name = text
runs.axis.placement.labels[1] = text
runs:plot { x = "placement", y = "step_s", file = "a.png" }'
ok "... run nothing" test ! -e pwned -a ! -e results/pwned

# What goes to the core must not crash it.
for change in 'x.specs[1].policies.placement[1].lua = 9999' 'x.specs[1].policies.placement[1].lua = -1' \
    'x.specs[1].policies.placement = 3' 'x.specs[1].policies = nil' 'x.specs[1].machine = {}' 'x.specs[1] = 7' \
    'x.specs[1].machine.description = { nodes = {} }' 'x.specs[1].model = {}' 'x.specs[1].workload = { kind = 1 }' \
    'x.specs[1].workload.trace = "/etc"' 'x.specs[1].where = {}' 'x.axes = {}' 'x.specs = 3' 'x.name = {}' \
    'x.specs[1].policies.placement[1].lua = 0'; do
    printf '%s\n' "local moe, tiny = require 'moelab', require 'tiny'
    moe.policy { kind = 'router', name = 'mine', route = function() end }
    local x = tiny.experiment()
    $change
    x:run()" >x.lua
    "$moelab" run x.lua --out results >out 2>err
    ok "no crash: $change" test $? -le 2 -a -z "$(grep -i crash err)"
done
refuses 'no axis "zz"' 'local moe, tiny = require "moelab", require "tiny"
local runs = tiny.experiment():run()
runs.axis_names = { 1, {}, "z" }
local moe = pcall
runs:filter { zz = 1 }'

# ---- finalizers escape the clock, so there are none ----

refuses 'x\.lua:1: setmetatable: __gc is not available' 'setmetatable({}, { __gc = function() while true do end end })'
runs "other metamethods" 'setmetatable({}, { __index = {}, __close = print })'
gives '^closed' 'setmetatable({}, { __gc = function() print "closed" end })' --unsafe
plan
