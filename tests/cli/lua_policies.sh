#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Policies written in a scenario: the same decisions as their twins in C, and errors with the script's line that fail
# one run alone.
. "$(dirname "$0")/lib.sh"
cp "$top_srcdir/tests/cli/fixtures/tiny.lua" "$work"
cd "$work" || exit 99

# same FIGURE: every run of results/ has the same one.
same()
{
    ok "$1: the same in all runs" test \
        "$(grep -Eo "\"$1\":(\"[^\"]*\"|\{[^}]*\})" results/runs.jsonl | sort -u | wc -l)" = 1
}

# ---- twins ----

cat >x.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
local mine = moe.policy {
  kind = "placement", name = "mine",
  place = function(load, topology)
    assert(#load == 1 and #load[0] == 7 and topology.n_nodes == 4 and topology.node[3] == 3)
    local out = {}
    for l = 0, #load do
      out[l] = {}
      for e = 0, #load[l] do out[l][e] = e * topology.n_devices // (#load[l] + 1) end
    end
    return out
  end,
}
local twice = moe.policy {
  kind = "placement", name = "twice",
  place = function(load, topology)
    local all = {}
    for d = 0, topology.n_devices - 1 do all[#all + 1] = d end
    local out = {}
    for l = 0, #load do
      out[l] = {}
      for e = 0, #load[l] do out[l][e] = all end
    end
    return out
  end,
}
local x = tiny.experiment { placement = moe.each { "contiguous", mine } }
local runs = x:run()
assert(moe.value(tiny.experiment { placement = twice }:run().list[1], "a2a_s") == 0,
       "everything everywhere still travels")
EOF
ok "a placement, and one with replicas" "$moelab" run x.lua --out results
sed -i '$d' results/runs.jsonl
same decisions
same step_s

cat >x.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
local mine = moe.policy {
  kind = "router", name = "mine",
  route = function(batch)
    local routes = {}
    for t = 0, batch.n_tokens - 1 do
      local x, order = batch.logits[t], {}
      for e = 0, batch.n_experts - 1 do order[e + 1] = e end
      table.sort(order, function(a, b) return x[a] > x[b] or x[a] == x[b] and a < b end)
      routes[t] = { experts = table.move(order, 1, batch.top_k, 1, {}), weights = { 0.75, 0.25 } }
    end
    return routes
  end,
}
tiny.experiment { placement = "contiguous", router = moe.each { "softmax-top-k", mine } }:run()
EOF
ok "a router" "$moelab" run x.lua --out results
same decisions

cat >x.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
local seen = 0
local all_to_one = moe.policy {
  kind = "balancer", name = "mine",
  adjust = function(batch) return { [5] = 1000, [6] = 999 } end,
  observe = function(layer, load)
    for e = 0, 7 do assert(load[e] == ((e == 5 or e == 6) and 16 or 0), "load of expert " .. e) end
    seen = seen + 1
    assert(seen <= 4 and layer == (seen - 1) % 2) -- 2 steps of 2 layers, in a process of its own
  end,
}
tiny.experiment { router = "softmax-top-k", balancer = all_to_one, seed = moe.each { 1, 2 } }:run()
EOF
ok "a balancer, with state of its own per run" "$moelab" run x.lua --out results
sed -i 's/softmax-top-k/replay/' x.lua
run_expect 2 'balancer mine adjusts scores, and router replay plays recorded choices' "$moelab" run x.lua --out replayed
ok "... and nothing is written" test ! -e replayed
# Nor on a router that decides without scores; one that heeds the bias in route() may be adjusted.
for router in base-auction sinkhorn-router random-router; do
    sed -i "s/router = \"[a-z-]*\"/router = \"$router\"/" x.lua
    run_expect 2 "balancer mine adjusts scores, and router $router decides without them: choose a router that scores" \
        "$moelab" run x.lua --out replayed
    ok "... and nothing is written" test ! -e replayed
done
sed -i 's/router = "[a-z-]*"/router = moe.plugin("bilevel-router", { groups = 2 })/' x.lua
ok "a router that heeds the bias in route()" "$moelab" run x.lua --out adjusted

cat >x.lua <<'EOF'
local moe, tiny = require "moelab", require "tiny"
-- An object's time of last use, and a search for the oldest: slow and plainly right.
local last, now = {}, 0
local function use(device, object)
  now = now + 1
  last[object] = now
end
local mine = moe.policy {
  kind = "offload", name = "mine",
  hit = function(device, object, access) use(device, object) end,
  insert = function(device, object, access)
    assert(object == access.layer * 8 + access.expert and not last[object])
    use(device, object)
  end,
  evict = function(device, access, is_pinned)
    local oldest
    for object, at in pairs(last) do
      if not is_pinned(object) and (not oldest or at < last[oldest]) then oldest = object end
    end
    last[oldest] = nil
    return oldest
  end,
}
local never = moe.policy {
  kind = "offload", name = "never", insert = function() return false end,
  evict = function() error "nothing to evict" end,
}
local function cached(offload)
  return tiny.experiment {
    machine = "rtx4090-pcie4", placement = "contiguous", offload = offload, cache = 0.5,
    workload = moe.decode { trace = tiny.trace, batch_per_device = 1, steps = 100 },
  }:run()
end
cached(moe.each { "lru", mine })
assert(moe.value(cached(never).list[1], "hit_rate") == 0)
EOF
ok "an offload policy, and one that keeps nothing" "$moelab" run x.lua --out results
sed -i '$d' results/runs.jsonl
same hit_rate
same step_s
ok "some hits, some misses" grep -Eq '"hit_rate":\{"max":1\.0,"mean":0\.[1-9]' results/runs.jsonl

# ---- errors in hooks: line 3 of the script ----

# fails REGEX KIND KEYS: the run with this policy fails, the one without completes.
fails()
{
    local other=contiguous more=
    [ "$2" = router ] && other=replay
    [ "$2" = balancer ] && other=none more='router = "softmax-top-k",'
    [ "$2" = offload ] && other=lru more='machine = "rtx4090-pcie4", cache = 0.25,'
    printf 'local moe, tiny = require "moelab", require "tiny"
local mine = moe.policy { kind = "%s", name = "mine",\n%s }\n
local one = { placement = "contiguous", %s }\none["%s"] = moe.each { mine, "%s" }\ntiny.experiment(one):run()\n' \
        "$2" "$3" "$more" "$2" "$other" >x.lua
    run_expect 1 "run 1 of \"tiny\" failed: $1" "$moelab" run x.lua --out results --run-timeout "${timeout-60}"
    ok "... the other completes" test "$(grep -c '"status":"ok"' results/runs.jsonl)" = 1
}
fails 'placement mine: x\.lua:3: attempt to index a nil value' placement 'place = function(load) return load.x.y end'
fails 'placement mine: x\.lua:3: too hot' placement 'place = function() error "too hot" end'
fails 'placement mine: error without a message' placement 'place = function() error {} end'
fails 'placement mine: place: layer 0: expected a table of devices by expert' placement 'place = function() end'
fails 'placement mine: place: layer 0, expert 0: expected a device or a list of devices, found nil' placement \
    'place = function() return { [0] = {} } end'
fails 'placement mine: layer 0, expert 0: placed on device 9, expected 0 to 3' placement \
    'place = function() return { [0] = { [0] = 9 } } end'
fails 'placement mine: place: layer 0, expert 0: a device is not a whole number' placement \
    'place = function() return { [0] = { [0] = { 0.5 } } } end'
fails 'placement mine: layer 0, expert 0: placed on device 2147483647, expected 0 to 3' placement \
    'place = function() return { [0] = { [0] = 1 << 32 | 9 } } end'
fails 'router mine: route: token 0: expected' router 'route = function() return 7 end'
fails 'router mine: route: token 0: expected' router \
    'route = function() return setmetatable({}, { __index = function() error "a metamethod" end }) end'
fails 'router mine: route: token 0: expert 1 of its list is not a whole number' router \
    'route = function(b) return { [0] = { experts = { "x" } } } end'
fails 'router mine, step 0, layer 0: token 0: expert 3 twice' router \
    'route = function(b) local r = {} for t = 0, b.n_tokens - 1 do r[t] = { experts = { 3, 3 } } end return r end'
fails 'router mine, step 0, layer 0: token 0: expert 9, expected 0 to 7' router \
    'route = function(b) local r = {} for t = 0, b.n_tokens - 1 do r[t] = { experts = { 9 } } end return r end'
fails 'router mine, step 0, layer 0: token 0: expert 3 has a weight that is not finite' router \
    'route = function(b)
         local r = {}
         for t = 0, b.n_tokens - 1 do r[t] = { experts = { 3 }, weights = { 0/0 } } end
         return r
     end'
fails 'router mine: route: token 0: weight 1 of its list is not a number' router \
    'route = function(b)
         local r = {}
         for t = 0, b.n_tokens - 1 do r[t] = { experts = { 3 }, weights = {} } end
         return r
     end'
fails 'balancer mine: adjust: expected a table of numbers' balancer 'adjust = function() end'
fails 'balancer mine: adjust: expert 2: expected a number, found string' balancer \
    'adjust = function() return { [2] = "x" } end'
fails 'offload mine: evict: expected an object' offload 'insert = function() end, evict = function() return 99 end'
fails 'offload mine: x\.lua:3: attempt to perform arithmetic' offload \
    'insert = function() return nil + 1 end, evict = function() end'
timeout=0.3 fails 'router mine, in route: did not end within 0\.3 s' router 'route = function() while true do end end'

# ---- what moe.policy refuses ----

refused()
{
    printf 'local moe, tiny = require "moelab", require "tiny"\n%s\n' "$2" >x.lua
    run_expect 2 "$1" "$moelab" run x.lua --out refused
    ok "... and leaves nothing" test ! -e refused -a ! -e refused.part
}
refused 'x\.lua:2: moe.policy: expected a table, found string' 'moe.policy "mine"'
refused 'x\.lua:2: moe.policy.kind: expected a string, found nil' 'moe.policy { name = "mine" }'
refused 'x\.lua:2: moe.policy: kind "dispatch" cannot be written in Lua; expected one of' \
    'moe.policy { kind = "dispatch", name = "mine" }'
refused 'x\.lua:3: moe.policy: unknown key "places"; did you mean "place"' \
    $'moe.policy { kind = "placement", name = "mine",\nplaces = print }'
refused 'x\.lua:2: moe.policy.place: expected a function, found number' \
    'moe.policy { kind = "placement", name = "mine", place = 1 }'
refused 'x\.lua:2: moe.policy mine: no hook; expected place' 'moe.policy { kind = "placement", name = "mine" }'
refused 'x\.lua:2: moe.policy mine: evict is missing' 'moe.policy { kind = "offload", name = "mine", insert = print }'
refused 'x\.lua:3: router: "mine" is a placement' \
    $'local mine = moe.policy { kind = "placement", name = "mine", place = print }\ntiny.experiment { router = mine }'
refused 'more than 64 policies' 'for i = 1, 65 do moe.policy { kind = "placement", name = "mine", place = print } end'
plan
