-- SPDX-License-Identifier: Apache-2.0
--
-- moelab.lua - the scenario API: describes experiments, unfolds their axes, hands runs to the core, shows results.
-- Everything a scenario can call is documented at its definition and in doc/scenarios.md.

-- What a scenario passes in may be any value with any metatable, and what it got from here it may change: text that
-- ends up in a gnuplot script goes through quote(), and options of results through options_of().

local native = ...
local moe = {}

-- ---- errors: script, line, key ------------------------------------------------------------------------------------

local function fail(where, ...)
  native.fail(where .. ": " .. string.format(...))
end

local function here()
  local file, line = native.where(1)
  return { file = file, line = line }
end

local function text_of(where)
  return where.file .. ":" .. where.line
end

-- Where `key` is set in the table constructor that begins at `where`.
local function at_key(where, key)
  return where.file .. ":" .. native.key_line(where.file, where.line, key)
end

local function keys_of(t)
  local list = {}
  for k in pairs(t) do list[#list + 1] = k end
  table.sort(list)
  return list
end

local function check_keys(where, what, given, known)
  if type(given) ~= "table" then
    fail(text_of(where), "%s: expected a table, found %s", what, type(given))
  end
  for k in pairs(given) do
    if type(k) ~= "string" then
      fail(text_of(where), "%s: expected only named keys, found [%s]", what, tostring(k))
    end
  end
  for _, k in ipairs(keys_of(given)) do
    if known[k] == nil then
      local near = native.nearest(k, keys_of(known))
      fail(at_key(where, k), "%s: unknown key \"%s\"%s", what, k,
           near and "; did you mean \"" .. near .. "\"?" or "; known: " .. table.concat(keys_of(known), ", "))
    end
  end
end

local function check_type(where, what, key, value, wanted)
  if type(value) ~= wanted then
    fail(at_key(where, key), "%s.%s: expected a %s, found %s", what, key, wanted, type(value))
  end
end

-- A plain copy of the options of a function that shows results. types: key -> type, or types separated by "|".
local function options_of(where, what, given, types, required)
  if type(given) ~= "table" then fail(text_of(where), "%s: expected a table, found %s", what, type(given)) end
  local o = {}
  for k, v in next, given do
    if type(v) == "table" then
      o[k] = {}
      for i, x in next, v do
        if type(x) ~= "string" then
          fail(at_key(where, tostring(k)), "%s.%s: expected strings, found a %s", what, tostring(k), type(x))
        end
        o[k][i] = x
      end
    else
      o[k] = v
    end
  end
  check_keys(where, what, o, types)
  for _, k in ipairs(keys_of(o)) do
    if not ("|" .. types[k] .. "|"):find("|" .. type(o[k]) .. "|", 1, true) then
      fail(at_key(where, k), "%s.%s: expected a %s, found %s", what, k, types[k]:gsub("|", " or "), type(o[k]))
    end
  end
  for _, k in ipairs(required) do
    if o[k] == nil then fail(text_of(where), "%s: %s is missing", what, k) end
  end
  return o
end

-- ---- values with a meaning ----------------------------------------------------------------------------------------

local Each, Plugin, Machine, Model, Workload, Synth, Label =
  { name = "each" }, { name = "plugin" }, { name = "machine" }, { name = "model" }, { name = "workload" },
  { name = "synth" }, { name = "label" }

local function is(value, meta) return getmetatable(value) == meta end

--- An axis: the experiment runs once with each value. Anywhere in an experiment, at any depth.
function moe.each(values)
  local where = here()
  if type(values) ~= "table" or #values == 0 then
    fail(text_of(where), "moe.each: expected a list of values")
  end
  return setmetatable({ values = values, where = where }, Each)
end

--- A value under another name in tables and plots: moe.label("2 nodes", moe.machine "dgx-h100" { nodes = 2 }).
function moe.label(text, value)
  if type(text) ~= "string" then fail(text_of(here()), "moe.label: expected a string, found %s", type(text)) end
  return setmetatable({ text = text, value = value }, Label)
end

--- A policy with parameters: moe.plugin("eplb", { replicas = 288 }). A bare name is the policy with its defaults.
function moe.plugin(name, params)
  local where = here()
  if type(name) ~= "string" then fail(text_of(where), "moe.plugin: expected a name, found %s", type(name)) end
  if params ~= nil and type(params) ~= "table" then
    fail(text_of(where), "moe.plugin %s: parameters: expected a table, found %s", name, type(params))
  end
  return setmetatable({ name = name, params = params or {}, where = where }, Plugin)
end

local policy_hooks = {
  router = { route = true }, balancer = { adjust = true, observe = true },
  placement = { place = true }, offload = { hit = true, insert = true, evict = true },
}

--- A policy written here, as a prototype: moe.policy { kind = "placement", name = "mine", place = function(...) }.
--- Hooks and their arguments: doc/scenarios.md.
function moe.policy(t)
  local where = here()
  local known = { kind = true, name = true }
  if type(t) ~= "table" then fail(text_of(where), "moe.policy: expected a table, found %s", type(t)) end
  for _, k in ipairs { "kind", "name" } do check_type(where, "moe.policy", k, t[k], "string") end
  local hooks = policy_hooks[t.kind]
  if not hooks then
    fail(at_key(where, "kind"), "moe.policy: kind \"%s\" cannot be written in Lua; expected one of %s", t.kind,
         table.concat(keys_of(policy_hooks), ", "))
  end
  for k in pairs(hooks) do known[k] = true end
  check_keys(where, "moe.policy", t, known)
  local n = 0
  for k in pairs(hooks) do
    if t[k] ~= nil then
      check_type(where, "moe.policy", k, t[k], "function")
      n = n + 1
    end
  end
  if n == 0 then fail(text_of(where), "moe.policy %s: no hook; expected %s", t.name, table.concat(keys_of(hooks), ", ")) end
  if t.kind == "offload" and not (t.insert and t.evict) then
    fail(text_of(where), "moe.policy %s: %s is missing", t.name, t.insert and "evict" or "insert")
  end
  return setmetatable({ name = t.name, kind = t.kind, params = {}, lua = native.add_policy(t), where = where }, Plugin)
end

-- Objects made in two steps: moe.machine "name", or moe.machine "name" { key = value }.
local function named(meta, what)
  meta.__call = function(self, options)
    if type(options) ~= "table" then fail(text_of(here()), "%s %s: expected a table of options", what, self.name) end
    return setmetatable({ name = self.name, options = options, where = here() }, meta)
  end
  return function(name)
    local where = here()
    if type(name) ~= "string" then fail(text_of(where), "%s: expected a name, found %s", what, type(name)) end
    return setmetatable({ name = name, options = {}, where = where }, meta)
  end
end

--- Hardware: a file under hw/machines/ (or a path), its figures changed by options: { nodes = 4 }.
moe.machine = named(Machine, "moe.machine")

--- Sizes of a model: a name from scenarios/lib/models.lua, changed by options, or a table of sizes.
local named_model = named(Model, "moe.model")
function moe.model(name_or_sizes)
  if type(name_or_sizes) == "table" then
    return setmetatable({ options = name_or_sizes, where = here() }, Model)
  end
  return named_model(name_or_sizes)
end

local synth_keys = { layers = 1, experts = 1, top_k = 1, requests = 1, tokens_per_request = 1, skew = 1, stickiness = 1,
                     affinity = 1, drift = 1, logits = 1, seed = 1, like = 1 }

--- Routing made up from physical parameters (doc/traces.md): skew, stickiness, affinity, drift; or like = a trace,
--- to resemble it at any size.
function moe.synth(t)
  local where = here()
  check_keys(where, "moe.synth", t, synth_keys)
  for _, k in ipairs(t.like and {} or { "layers", "experts", "top_k" }) do
    if t[k] == nil then fail(text_of(where), "moe.synth: %s is missing (or like = a trace to resemble)", k) end
  end
  return setmetatable({ options = t, where = where }, Synth)
end

local function find_trace(name, where)
  local found = native.trace(name)
  if not found then
    fail(where, "no trace at \"%s\" (looked for trace.json there, beside the scenario and under scenarios/)", name)
  end
  return found
end

local synthesised = {} -- parameters as text -> directory: equal workloads share a trace

-- The directory of a synthetic trace with these (unfolded) parameters.
local function synth_dir(synth, label)
  if not synthesised[label] then
    local options = { where = text_of(synth.where) }
    for k, v in pairs(synth.options) do options[k] = v end
    if options.like then options.like = find_trace(options.like, at_key(synth.where, "like")) end
    synthesised[label] = native.synth(options)
  end
  return synthesised[label]
end

local workload_keys = {}

local function workload(kind, batch_key)
  local known = { trace = 1, steps = 1, profile = 1, context = 1, [batch_key] = 1 }
  workload_keys[kind] = known
  return function(t)
    local where = here()
    check_keys(where, "moe." .. kind, t, known)
    if t.trace == nil then fail(text_of(where), "moe.%s: trace is missing: a directory, or moe.synth {...}", kind) end
    return setmetatable({ kind = kind, options = t, where = where }, Workload)
  end
end

--- Continuous batching: batch_per_device requests per device, one token each per step.
moe.decode = workload("decode", "batch_per_device")
--- Prompts: tokens_per_device tokens per device and step.
moe.prefill = workload("prefill", "tokens_per_device")

-- ---- unfolding axes ------------------------------------------------------------------------------------------------

local label_of

-- { "a=1", "b=2" }; what varies is an axis of its own, and tables would not fit.
local function settings(t)
  local list = {}
  for _, k in ipairs(keys_of(t)) do
    if type(t[k]) ~= "table" or is(t[k], Label) then list[#list + 1] = k .. "=" .. label_of(t[k]) end
  end
  return list
end

function label_of(v)
  if is(v, Label) then return v.text end
  if is(v, Plugin) then
    local list = settings(v.params)
    return #list == 0 and v.name or v.name .. "(" .. table.concat(list, ",") .. ")"
  end
  if is(v, Machine) or is(v, Model) then
    local list = settings(v.options)
    if v.name then table.insert(list, 1, v.name) end
    return table.concat(list, " ")
  end
  if is(v, Workload) then return v.kind end
  if is(v, Synth) then return "synth(" .. table.concat(settings(v.options), ",") .. ")" end
  if type(v) == "table" then
    if type(v.name) == "string" then return v.name end
    local list = {}
    for i, x in ipairs(v) do list[i] = label_of(x) end
    return #list > 0 and table.concat(list, "+") or "table"
  end
  if math.type(v) == "float" then return string.format("%.14g", v) end
  return tostring(v)
end

-- All combinations of `value`: a list of { value = plain, axes = { {name, label}, ... } }.
local function unfold(value, path, where, depth)
  depth = depth or 1
  if depth > 32 then fail(text_of(where), "%s: tables nested more than 32 deep", path:sub(1, 60)) end
  if is(value, Each) then
    local all, seen = {}, {}
    for _, v in ipairs(value.values) do
      local label = label_of(v)
      if seen[label] then
        fail(text_of(value.where), "%s: two values of moe.each are called \"%s\"; tell them apart with moe.label", path,
             label)
      end
      seen[label] = true
      for _, one in ipairs(unfold(is(v, Label) and v.value or v, path, value.where, depth + 1)) do
        local axes = { { path, label } }
        table.move(one.axes, 1, #one.axes, 2, axes)
        all[#all + 1] = { value = one.value, axes = axes }
      end
    end
    return all
  end
  if is(value, Label) then return unfold(value.value, path, where, depth + 1) end
  if type(value) ~= "table" then
    if type(value) == "number" and (value ~= value or value == math.huge or value == -math.huge) then
      fail(at_key(where, path:match("[%w_]+$") or path), "%s: %s is not a finite number", path, tostring(value))
    elseif type(value) == "function" or type(value) == "userdata" or type(value) == "thread" then
      fail(at_key(where, path:match("[%w_]+$") or path), "%s: expected a value, found a %s", path, type(value))
    end
    return { { value = value, axes = {} } }
  end
  if rawget(value, "where") and getmetatable(value) then where = value.where end
  local all = { { value = setmetatable({}, getmetatable(value)), axes = {} } }
  local keys = {}
  for k in pairs(value) do keys[#keys + 1] = k end
  table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
  for _, k in ipairs(keys) do
    -- `options` and `params` are how objects keep what was given; they are not part of an axis's name.
    local sub = (k == "options" or k == "params" or type(k) == "number") and path or path .. "." .. k
    local parts = k == "where" and { { value = value[k], axes = {} } } or unfold(value[k], sub, where, depth + 1)
    local grown = {}
    for _, a in ipairs(all) do
      for _, p in ipairs(parts) do
        local copy = setmetatable({}, getmetatable(value))
        for kk, v in pairs(a.value) do copy[kk] = v end
        copy[k] = p.value
        local axes = table.move(a.axes, 1, #a.axes, 1, {})
        table.move(p.axes, 1, #p.axes, #axes + 1, axes)
        grown[#grown + 1] = { value = copy, axes = axes }
      end
    end
    all = grown
  end
  return all
end

-- ---- experiments ---------------------------------------------------------------------------------------------------

local experiment_keys = {
  name = 1, model = 1, machine = 1, executor = 1, tier = 1, workload = 1, router = 1, balancer = 1, placement = 1,
  dispatch = 1, offload = 1, cache = 1, warmup = 1, seed = 1, verify = 1,
}
-- The order in which axes unfold: the last varies fastest.
local axis_order = { "model", "machine", "executor", "tier", "workload", "router", "balancer", "placement", "dispatch",
                     "offload", "cache", "warmup", "seed", "verify" }
local kinds = { "router", "balancer", "placement", "dispatch", "offload" }
local defaults = { router = "replay", placement = "contiguous", dispatch = "flat", offload = "none", seed = 1,
                   executor = "flow", name = "experiment" }

-- An axis that is overridden stays an axis, of one value, so that tables over it still work.
local function put(t, key, value)
  t[key] = is(t[key], Each) and setmetatable({ values = { value }, where = t[key].where }, Each) or value
end

local model_keys = { name = 1, layers = 1, experts = 1, top_k = 1, shared = 1, d_model = 1, d_expert = 1, n_heads = 1,
                     n_kv_heads = 1, d_head = 1, precision = 1, weight_bytes = 1, act_bytes = 1, combine_bytes = 1,
                     source = 1 }

-- Keys that can be set in a value, if they are known here; parameters and machines are checked in the core.
local function keys_in(v)
  if is(v, Workload) then return workload_keys[v.kind] end
  if is(v, Synth) then return synth_keys end
  if is(v, Model) then return model_keys end
end

-- "machine.nodes=8" on the command line: constants and axes alike give way.
local function override(t, where)
  local set = native.overrides()
  for _, path in ipairs(keys_of(set)) do
    local at, parts = t, {}
    for part in path:gmatch("[^.]+") do parts[#parts + 1] = part end
    local known = experiment_keys
    for i = 1, #parts do
      if known and known[parts[i]] == nil then
        local near = native.nearest(parts[i], keys_of(known))
        fail("--set " .. path, "unknown key \"%s\"%s", parts[i], near and "; did you mean \"" .. near .. "\"?" or
             "; known: " .. table.concat(keys_of(known), ", "))
      end
      if i == #parts then break end
      local v = at[parts[i]]
      if type(v) == "string" and i == 1 then
        if parts[i] == "machine" then v = moe.machine(v)
        elseif parts[i] == "model" then v = moe.model(v)
        elseif policy_hooks[parts[i]] or parts[i] == "dispatch" then v = moe.plugin(v) end
      end
      if v == nil and parts[1] == "machine" and i > 1 then v = {} end -- keys of the machine's file
      if type(v) ~= "table" or is(v, Each) then
        fail("--set " .. path, "\"%s\" has no keys to set here (it is %s)", parts[i],
             is(v, Each) and "an axis" or "a " .. type(v))
      end
      local copy = setmetatable({}, getmetatable(v))
      for k, x in pairs(v) do copy[k] = x end
      at[parts[i]] = copy
      at = copy
      for _, inner in ipairs { "options", "params" } do -- where objects keep what was given
        if getmetatable(copy) and copy[inner] then
          at = {}
          for k, x in pairs(copy[inner]) do at[k] = x end
          copy[inner] = at
        end
      end
      known = keys_in(copy)
    end
    put(at, parts[#parts], set[path])
  end
  local executor = native.option("executor")
  if executor then put(t, "executor", executor) end
end

-- What is given replaces what is there; tables are merged.
local function merge(base, changes)
  for k, v in pairs(changes) do
    if type(v) == "table" and type(base[k]) == "table" then merge(base[k], v) else base[k] = v end
  end
  return base
end

local function machine_spec(v, run, where)
  if type(v) == "string" then v = setmetatable({ name = v, options = {}, where = where }, Machine) end
  if not is(v, Machine) then fail(at_key(where, "machine"), "machine: expected moe.machine \"NAME\", found %s", type(v)) end
  local description, file = native.machine(v.name)
  if not description then fail(text_of(v.where), "%s", file) end
  return { executor = run.executor, tier = run.tier, file = file, description = merge(description, v.options) }
end

local function model_spec(v, where)
  if type(v) == "string" then v = setmetatable({ name = v, options = {}, where = where }, Model) end
  if type(v) == "table" and not is(v, Model) then v = setmetatable({ options = v, where = where }, Model) end
  if not is(v, Model) then fail(at_key(where, "model"), "model: expected a name or a table of sizes, found %s", type(v)) end
  check_keys(v.where, "model", v.options, model_keys)
  local sizes = {}
  if v.name then
    local models = require "lib.models"
    if not models[v.name] then
      local near = native.nearest(v.name, keys_of(models))
      fail(text_of(v.where), "no model named \"%s\"%s", v.name,
           near and "; did you mean \"" .. near .. "\"?" or "; known: " .. table.concat(keys_of(models), ", "))
    end
    merge(sizes, models[v.name])
    sizes.name = v.name
  end
  return merge(sizes, v.options)
end

local function workload_spec(v, where)
  if not is(v, Workload) then
    fail(at_key(where, "workload"), "workload: expected moe.decode {...} or moe.prefill {...}, found %s", type(v))
  end
  local spec = { kind = v.kind }
  for k, x in pairs(v.options) do spec[k] = x end
  if is(spec.trace, Synth) then
    spec.synth, spec.trace = spec.trace.options, synth_dir(spec.trace, label_of(spec.trace))
  elseif type(spec.trace) == "string" then
    spec.trace = find_trace(spec.trace, at_key(v.where, "trace") .. ": workload.trace")
  else
    fail(at_key(v.where, "trace"), "workload.trace: expected a directory or moe.synth {...}, found %s", type(spec.trace))
  end
  return spec
end

local function policy_spec(kind, v, where)
  if type(v) == "string" then v = setmetatable({ name = v, params = {}, where = where }, Plugin) end
  if not is(v, Plugin) then
    fail(at_key(where, kind), "%s: expected a name or moe.plugin(...), found %s", kind, type(v))
  end
  if v.lua then
    if v.kind ~= kind then fail(at_key(where, kind), "%s: \"%s\" is a %s", kind, v.name, v.kind) end
  else
    native.policy(kind, v.name, v.params, v.where == where and at_key(where, kind) or text_of(v.where))
  end
  return { name = v.name, params = v.params, lua = v.lua }
end

local function run_spec(run, where)
  local policies = {}
  for _, kind in ipairs(kinds) do
    local given = run[kind]
    if kind == "balancer" then
      policies.balancer = {}
      if given ~= nil and (type(given) ~= "table" or getmetatable(given)) then given = { given } end
      for i, b in ipairs(given or {}) do policies.balancer[i] = policy_spec(kind, b, where) end
    else
      policies[kind] = { policy_spec(kind, given, where) }
    end
  end
  if math.type(run.seed) ~= "integer" then fail(at_key(where, "seed"), "seed: expected a whole number") end
  if run.cache ~= nil then check_type(where, "experiment", "cache", run.cache, "number") end
  return {
    where = text_of(where), seed = run.seed, model = model_spec(run.model, where),
    machine = machine_spec(run.machine, run, where), workload = workload_spec(run.workload, where),
    policies = policies, cache = run.cache, warmup = run.warmup, verify = run.verify,
  }
end

local Experiment, Runs = {}, {}
Experiment.__index, Runs.__index = Experiment, Runs

--- One experiment: a value for every key, moe.each where it varies. See doc/scenarios.md for every key.
function moe.experiment(t)
  local where = here()
  check_keys(where, "moe.experiment", t, experiment_keys)
  local given = {}
  for k, v in pairs(defaults) do given[k] = v end
  for k, v in pairs(t) do given[k] = v end
  override(given, where)
  for _, k in ipairs { "model", "machine", "workload" } do
    if given[k] == nil then fail(text_of(where), "moe.experiment: %s is missing", k) end
  end
  check_type(where, "moe.experiment", "name", given.name, "string")
  -- One combination at a time, axis by axis, so that the order of runs is the order of axis_order.
  local all = { { value = {}, axes = {} } }
  for _, key in ipairs(axis_order) do
    if given[key] ~= nil then
      local grown, parts = {}, unfold(given[key], key, where)
      for _, a in ipairs(all) do
        for _, p in ipairs(parts) do
          local copy = {}
          for k, v in pairs(a.value) do copy[k] = v end
          copy[key] = p.value
          local axes = table.move(a.axes, 1, #a.axes, 1, {})
          table.move(p.axes, 1, #p.axes, #axes + 1, axes)
          grown[#grown + 1] = { value = copy, axes = axes }
        end
      end
      all = grown
    end
  end
  local specs, axes = {}, {}
  for i, one in ipairs(all) do
    specs[i] = run_spec(one.value, where)
    axes[i] = {}
    for _, a in ipairs(one.axes) do axes[i][a[1]] = a[2] end
  end
  local names, order = {}, {}
  for _, one in ipairs(all) do
    for _, a in ipairs(one.axes) do
      if not names[a[1]] then
        names[a[1]] = { labels = {}, seen = {} }
        order[#order + 1] = a[1]
      end
      local n = names[a[1]]
      if not n.seen[a[2]] then
        n.seen[a[2]] = true
        n.labels[#n.labels + 1] = a[2]
      end
    end
  end
  return setmetatable({ name = given.name, specs = specs, axes = axes, axis_names = order, axis = names }, Experiment)
end

--- Runs every combination and returns the runs.
function Experiment:run()
  local results = native.run(self.name, self.specs, self.axes)
  local list = {}
  for i, r in ipairs(results) do
    r.axes = self.axes[i]
    list[i] = r
  end
  return setmetatable({ name = self.name, list = list, axis_names = self.axis_names, axis = self.axis }, Runs)
end

-- ---- results -------------------------------------------------------------------------------------------------------

local metric_unit = native.metrics() -- name -> unit

--- The runs whose axes have these labels: runs:filter { placement = "eplb" }.
function Runs:filter(wanted)
  local where = here()
  if type(wanted) ~= "table" then fail(text_of(where), "runs:filter: expected a table, found %s", type(wanted)) end
  self:check_axes(where, "runs:filter", keys_of(wanted))
  local list = {}
  for _, r in ipairs(self.list) do
    local ok = true
    for k, v in pairs(wanted) do ok = ok and r.axes[k] == label_of(v) end
    if ok then list[#list + 1] = r end
  end
  return setmetatable({ name = self.name, list = list, axis_names = self.axis_names, axis = self.axis }, Runs)
end

function Runs:check_axes(where, what, names)
  for _, name in ipairs(names) do
    name = tostring(name)
    if not self.axis[name] then
      local near = native.nearest(name, self.axis_names)
      fail(text_of(where), "%s: no axis \"%s\"%s", what, name, near and "; did you mean \"" .. near .. "\"?" or
           "; axes: " .. table.concat(self.axis_names, ", "))
    end
  end
end

--- A figure of one run: "step_s" (its mean over steps), "step_s.p99". nil if the run failed or has no such figure.
function moe.value(run, name)
  if run.status ~= "ok" then return nil end
  local metric, part = name:match("^([%w_]+)%.?([%w_]*)$")
  local m = metric and run.metrics[metric]
  return m and m[part ~= "" and part or "mean"]
end

local function check_metric(where, what, name)
  local metric, part = tostring(name):match("^([%w_]+)%.?([%w_]*)$")
  if not metric or not metric_unit[metric] then
    local near = metric and native.nearest(metric, keys_of(metric_unit))
    fail(text_of(where), "%s: no metric \"%s\"%s", what, tostring(name), near and "; did you mean \"" .. near .. "\"?" or "")
  end
  if part ~= "" and not ({ mean = 1, p50 = 1, p99 = 1, min = 1, max = 1 })[part] then
    fail(text_of(where), "%s: \"%s\": expected mean, p50, p99, min or max after the dot", what, name)
  end
  return metric
end

-- Mean and spread over the runs that share labels on the named axes.
local function aggregate(list, name)
  local n, sum, squares = 0, 0.0, 0.0
  for _, r in ipairs(list) do
    local v = moe.value(r, name)
    if v then n, sum, squares = n + 1, sum + v, squares + v * v end
  end
  if n == 0 then return nil, 0, 0 end
  local mean = sum / n
  return mean, n > 1 and math.sqrt(math.max(0, (squares - n * mean * mean) / (n - 1))) or 0, n
end

local function group(list, axes)
  local groups, order = {}, {}
  for _, r in ipairs(list) do
    local labels = {}
    for i, a in ipairs(axes) do labels[i] = r.axes[a] or "" end
    local key = table.concat(labels, "\0")
    if not groups[key] then
      groups[key] = { labels = labels, runs = {} }
      order[#order + 1] = groups[key]
    end
    table.insert(groups[key].runs, r)
  end
  return order
end

local scales = {
  s = { { 1, "s" }, { 1e-3, "ms" }, { 1e-6, "us" }, { 1e-9, "ns" } },
  B = { { 1e9, "GB" }, { 1e6, "MB" }, { 1e3, "kB" }, { 1, "B" } },
  ["token/s"] = { { 1e6, "M token/s" }, { 1e3, "k token/s" }, { 1, "token/s" } },
}

-- One scale for a column, from its largest value: figures that are compared share a unit.
local function scale_of(unit, largest)
  for _, s in ipairs(scales[unit] or {}) do
    if largest >= s[1] then return s[1], s[2] end
  end
  local list = scales[unit]
  if list then return list[#list][1], list[#list][2] end
  return 1, unit
end

-- "step_s" reads as step, in whatever unit the column says.
local function short(figure)
  return metric_unit[figure] == "s" and figure:gsub("_s$", "") or figure
end

local function number(v)
  if v == nil then return "-" end
  local a = math.abs(v)
  if a >= 1000 then return string.format("%.0f", v) end
  if a >= 100 then return string.format("%.1f", v) end
  if a >= 10 then return string.format("%.2f", v) end
  return string.format("%.3f", v)
end

local function width(s) return utf8.len(s) or #s end

local function lay_out(rows, n_left)
  local widths, lines = {}, {}
  for _, row in ipairs(rows) do
    for c, cell in ipairs(row) do widths[c] = math.max(widths[c] or 0, width(cell)) end
  end
  for i, row in ipairs(rows) do
    local cells = {}
    for c, cell in ipairs(row) do
      local pad = string.rep(" ", widths[c] - width(cell))
      cells[c] = c <= n_left and cell .. pad or pad .. cell
    end
    lines[#lines + 1] = "  " .. (table.concat(cells, "  "):gsub("%s+$", ""))
    if i == 1 then
      local rule = {}
      for c in ipairs(row) do rule[c] = string.rep("-", widths[c]) end
      lines[#lines + 1] = "  " .. table.concat(rule, "  ")
    end
  end
  return table.concat(lines, "\n") .. "\n"
end

local function as_list(v)
  return type(v) == "table" and v or { v }
end

-- Columns of a table: one per label of `cols`, or one per figure of `value`.
local function table_columns(self, o, where)
  local columns = {}
  local figures = as_list(o.value)
  for _, f in ipairs(figures) do check_metric(where, "runs:table", f) end
  if o.cols then
    for _, label in ipairs(self.axis[o.cols].labels) do
      columns[#columns + 1] = { figure = figures[1], label = label, title = label }
    end
  else
    for _, f in ipairs(figures) do columns[#columns + 1] = { figure = f, title = f } end
  end
  return columns
end

local function better(best, a, b)
  if best == "min" then return a < b end
  return a > b
end

-- The last line of a table with a ceiling: how much of it the best of the others reaches, per column.
local function reached(groups, cells, columns, winners, o)
  local row = { "best / " .. o.ceiling }
  for i, g in ipairs(groups) do
    for c = 1, g.labels[1] == o.ceiling and #columns or 0 do
      local w, top = winners[c .. "\0"], cells[i][c].mean
      row[c + 1] = w and top and top ~= 0 and string.format("%.1f %%  ", 100 * w.mean / top) or "-  "
    end
  end
  return row
end

--- Prints a table (and writes it to a file when `file` is given).
---   rows   axis, or list of axes, for the lines           cols   axis for the columns, or none
---   value  figure, or list of figures when there are no cols
---   best   "min" or "max": marks the best of each column's first axis group with *
---   bound  true: adds the bound and how far step_s is from it
---   ceiling  label of the last axis that no real policy can beat: not a candidate for best; with cols, a last line
---            says how much of it the best reaches
---   title  printed above; percent = true for shares
function Runs:table(o)
  local where = here()
  o = options_of(where, "runs:table", o, {
    rows = "string|table", cols = "string", value = "string|table", best = "string", bound = "boolean",
    ceiling = "string", title = "string", file = "string", percent = "boolean" }, { "rows", "value" })
  if o.best ~= nil and o.best ~= "min" and o.best ~= "max" then
    fail(at_key(where, "best"), "runs:table.best: expected \"min\" or \"max\", found \"%s\"", tostring(o.best))
  end
  local axes = as_list(o.rows)
  self:check_axes(where, "runs:table", axes)
  if o.cols then self:check_axes(where, "runs:table", { o.cols }) end
  local columns = table_columns(self, o, where)
  if o.bound and not o.cols then
    columns[#columns + 1] = { figure = "bound_s", title = "bound" }
    columns[#columns + 1] = { figure = "over_bound", title = "over bound" }
  end
  local groups = group(self.list, axes)
  local cells, failed = {}, 0
  for i, g in ipairs(groups) do
    cells[i] = {}
    for c, col in ipairs(columns) do
      local runs = g.runs
      if col.label then
        runs = {}
        for _, r in ipairs(g.runs) do
          if r.axes[o.cols] == col.label then runs[#runs + 1] = r end
        end
      end
      local mean, spread, n = aggregate(runs, col.figure)
      cells[i][c] = { mean = mean, spread = spread, n = n }
      if not mean then failed = failed + 1 end
    end
  end
  local head, caption = {}, nil
  for i, a in ipairs(axes) do head[i] = a end
  for c, col in ipairs(columns) do
    local largest = 0
    for i in ipairs(groups) do largest = math.max(largest, math.abs(cells[i][c].mean or 0)) end
    if o.cols then -- columns of one figure share a scale
      for i in ipairs(groups) do
        for cc in ipairs(columns) do largest = math.max(largest, math.abs(cells[i][cc].mean or 0)) end
      end
    end
    local unit = metric_unit[col.figure:match("^[%w_]+")]
    col.scale, col.unit = scale_of(unit, largest)
    if o.percent and unit == "" and col.figure ~= "over_bound" then col.scale, col.unit = 0.01, "%" end
    local unit_text = col.unit ~= "" and " (" .. col.unit .. ")" or ""
    head[#axes + c] = o.cols and col.title or short(col.title) .. unit_text
    caption = o.cols and string.format("%s%s by %s", short(col.figure), unit_text, o.cols)
  end
  -- The best of a column, within each label of the axes before the last: what is compared is the last axis.
  local winners = {}
  if o.best then
    for i, g in ipairs(groups) do
      local prefix = table.concat(g.labels, "\0", 1, #axes - 1)
      for c = 1, o.cols and #columns or 1 do
        local key, mean = c .. "\0" .. prefix, cells[i][c].mean
        local candidate = mean and g.labels[#axes] ~= o.ceiling
        if candidate and (not winners[key] or better(o.best, mean, winners[key].mean)) then
          winners[key] = { mean = mean, row = i }
        end
      end
    end
  end
  local rows = { head }
  for i, g in ipairs(groups) do
    local row = table.move(g.labels, 1, #g.labels, 1, {})
    local prefix = table.concat(g.labels, "\0", 1, #axes - 1)
    for c, col in ipairs(columns) do
      local x = cells[i][c]
      local text = number(x.mean and x.mean / col.scale)
      if x.n > 1 then text = text .. " ±" .. number(x.spread / col.scale) end
      local w = winners[c .. "\0" .. prefix]
      row[#row + 1] = text .. (w and w.row == i and " *" or o.best and "  " or "")
    end
    rows[#rows + 1] = row
  end
  if o.ceiling and o.best and o.cols and #axes == 1 then rows[#rows + 1] = reached(groups, cells, columns, winners, o) end
  local text = (o.title and o.title .. "\n" or "") .. (caption and "  " .. caption .. "\n" or "") .. lay_out(rows, #axes)
  if o.best then text = text .. "  * best" .. (o.best == "min" and " (least)" or " (most)") .. "\n" end
  if failed > 0 then text = text .. "  - no figure: the run failed or the figure does not apply\n" end
  if not native.option("quiet") then print(text) end
  if o.file then native.write(o.file, text) end
  return text
end

--- The largest relative difference of a figure between the labels of one axis, all else equal.
---   over  axis, for example "executor"        value  figure
--- Returns the difference (relative to the first label) and prints a line.
function Runs:difference(o)
  local where = here()
  o = options_of(where, "runs:difference", o, { over = "string", value = "string", title = "string" },
                 { "over", "value" })
  self:check_axes(where, "runs:difference", { o.over })
  check_metric(where, "runs:difference", o.value)
  local others = {}
  for _, a in ipairs(self.axis_names) do
    if a ~= o.over then others[#others + 1] = a end
  end
  local worst, n, at = 0, 0, ""
  local first = self.axis[o.over].labels[1]
  for _, g in ipairs(group(self.list, others)) do
    local base
    for _, r in ipairs(g.runs) do
      if r.axes[o.over] == first then base = moe.value(r, o.value) end
    end
    for _, r in ipairs(g.runs) do
      local v = moe.value(r, o.value)
      if base and v and r.axes[o.over] ~= first then
        n = n + 1
        local d = base == 0 and math.abs(v) or math.abs(v - base) / math.abs(base)
        if d > worst or at == "" then worst, at = math.max(d, worst), table.concat(g.labels, ", ") end
      end
    end
  end
  local labels = table.concat(self.axis[o.over].labels, " and ")
  if n == 0 then return 0, "" end -- one label alone: nothing to compare
  local text = string.format("%s%s: %s differs by at most %.2g %% over %d pairs of runs (worst: %s)\n",
                             o.title and o.title .. ": " or "", labels, o.value, 100 * worst, n, at)
  if not native.option("quiet") then print(text) end
  return worst, text
end

-- ---- plots ---------------------------------------------------------------------------------------------------------

local function one_line(s) return (tostring(s):gsub("%c", " ")) end

-- A string of gnuplot's. In double quotes it runs what is between backquotes: they must not get there.
local function quote(s)
  s = one_line(s):gsub("`", "'"):gsub("[\\\"]", "\\%0"):gsub("_", "\\\\_")
  return "\"" .. s .. "\""
end

local palette = { "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666" }

local function plot_series(self, o, where)
  local x_labels = self.axis[o.x].labels
  local series = {}
  local names = o.group and self.axis[o.group].labels or { o.y }
  for _, name in ipairs(names) do
    local runs = o.group and self:filter { [o.group] = name } or self
    local points = {}
    for i, x in ipairs(x_labels) do
      local mean, spread = aggregate(runs:filter { [o.x] = x }.list, o.y)
      points[i] = { mean = mean, spread = spread }
    end
    local top = o.group and name == o.ceiling
    series[#series + 1] = { name = top and name .. " (ceiling)" or name, points = points, bound = top }
  end
  if o.bound then
    local points = {}
    for i, x in ipairs(x_labels) do
      local least
      for _, r in ipairs(self:filter { [o.x] = x }.list) do
        local b = moe.value(r, "bound_s")
        if b and (not least or b < least) then least = b end
      end
      points[i] = { mean = least, spread = 0 }
    end
    series[#series + 1] = { name = "bound: perfect balance", points = points, bound = true }
  end
  return x_labels, series
end

--- Draws a figure: writes NAME.dat and NAME.gp, and NAME.png if gnuplot is there.
---   x      axis along the bottom                 y      figure (mean over steps and over other axes)
---   group  axis: one colour per label            kind   "bars" (default) or "lines" (x must be numbers)
---   file   "NAME.png"                            title, xlabel, ylabel; percent = true for shares
---   bound  true: adds the bound; ceiling: label of the group that none can beat, drawn dashed; logx, logy
function Runs:plot(o)
  local where = here()
  o = options_of(where, "runs:plot", o, {
    x = "string", y = "string", group = "string", file = "string", title = "string", xlabel = "string",
    ylabel = "string", kind = "string", bound = "boolean", ceiling = "string", logx = "boolean", logy = "boolean",
    percent = "boolean" }, { "x", "y", "file" })
  local stem = o.file:match("^([%w_][%w_.-]*)%.png$")
  if not stem then fail(at_key(where, "file"), "runs:plot.file: expected \"NAME.png\", found \"%s\"", o.file) end
  self:check_axes(where, "runs:plot", { o.x, o.group })
  local metric = check_metric(where, "runs:plot", o.y)
  local lines = o.kind == "lines"
  if o.kind and not lines and o.kind ~= "bars" then
    fail(at_key(where, "kind"), "runs:plot.kind: expected \"bars\" or \"lines\", found \"%s\"", tostring(o.kind))
  end
  local x_labels, series = plot_series(self, o, where)
  local largest = 0
  for _, s in ipairs(series) do
    for _, p in ipairs(s.points) do
      largest = math.max(largest, p.mean or 0)
      s.drawn = s.drawn or p.mean ~= nil -- gnuplot refuses a series without a point: all its runs failed
    end
  end
  local scale, unit = scale_of(metric_unit[metric], largest)
  if o.percent then scale, unit = 0.01, "%" end
  local function cell(v) return v and string.format("%.9g", v / scale) or "NaN" end

  local dat = { "# " .. one_line(o.title or self.name), "# " .. one_line(o.x) .. "\t" }
  for _, s in ipairs(series) do dat[2] = dat[2] .. quote(s.name) .. "\tspread\t" end
  for i, x in ipairs(x_labels) do
    local row = { lines and x or quote((one_line(x):gsub("\"", "'"))) } -- in data, gnuplot knows no escaped quotes
    for _, s in ipairs(series) do
      row[#row + 1] = cell(s.points[i].mean)
      row[#row + 1] = cell(s.points[i].spread)
    end
    dat[#dat + 1] = table.concat(row, "\t")
  end
  native.write(stem .. ".dat", table.concat(dat, "\n") .. "\n")

  local gp = {
    "# gnuplot " .. stem .. ".gp  redraws " .. o.file,
    "set terminal pngcairo size 1000,620 font \"DejaVu Sans,13\" background \"white\"",
    "set output " .. "\"" .. o.file .. "\"",
    "set title " .. quote(o.title or self.name) .. " font \",15\"",
    "set xlabel " .. quote(o.xlabel or o.x),
    "set ylabel " .. quote((o.ylabel or short(metric)) .. (unit ~= "" and " (" .. unit .. ")" or "")),
    "set key below center horizontal Left reverse samplen 2 spacing 1.3 width 2 height 0.7",
    "set grid ytics lt 1 lw 1 lc rgb \"#dddddd\"", "set border 3", "set tics nomirror out",
  }
  gp[#gp + 1] = o.logy and "set logscale y" or o.percent and "set yrange [0:100]" or "set yrange [0:*]"
  local parts = {}
  if lines then
    if o.logx then gp[#gp + 1] = "set logscale x" end
    local ticks = {}
    for i, x in ipairs(x_labels) do
      if not tonumber(x) then fail(at_key(where, "x"), "runs:plot: kind \"lines\" needs numbers on %s, found \"%s\"", o.x, x) end
      ticks[i] = string.format("\"%s\" %s", o.percent and metric_unit[metric] == "" and o.x == "cache" and
                               string.format("%g %%%%", 100 * tonumber(x)) or x, x)
    end
    gp[#gp + 1] = "set xtics (" .. table.concat(ticks, ", ") .. ")"
    gp[#gp + 1] = "set offsets graph 0.02, graph 0.02, 0, 0"
    for i, s in ipairs(series) do
      local style = s.bound and "lw 2 dt 2 pt 0 lc rgb \"#000000\"" or
                    string.format("lw 2.5 pt %d ps 1.4 lc rgb \"%s\"", 4 + i, palette[(i - 1) % #palette + 1])
      parts[#parts + 1] = s.drawn and string.format("\"%s.dat\" using 1:%d with linespoints %s title %s", stem, 2 * i,
                                                    style, quote(s.name)) or nil
    end
  else
    gp[#gp + 1] = "set style data histograms"
    gp[#gp + 1] = "set style histogram errorbars gap 1.5 lw 1"
    gp[#gp + 1] = "set style fill solid 0.9 border lc rgb \"#333333\""
    gp[#gp + 1] = "set xtics scale 0"
    for i, s in ipairs(series) do
      local colour = s.bound and "#bbbbbb" or palette[(i - 1) % #palette + 1]
      parts[#parts + 1] = s.drawn and string.format("\"%s.dat\" using %d:%d%s lc rgb \"%s\" title %s", stem, 2 * i,
                                                    2 * i + 1, #parts == 0 and ":xtic(1)" or "", colour,
                                                    quote(s.name)) or nil
    end
  end
  gp[#gp + 1] = #parts > 0 and "plot " .. table.concat(parts, ", \\\n     ") or "# nothing to plot: every run failed"
  native.write(stem .. ".gp", table.concat(gp, "\n") .. "\n")
  if #parts > 0 then native.draw(stem .. ".gp") end
end

--- A file in the results directory.
function moe.write(name, text)
  if type(name) ~= "string" or type(text) ~= "string" then fail(text_of(here()), "moe.write: expected (name, text)") end
  native.write(name, text)
end

--- What `moelab eval KIND NAME` prints, as a table: options as on its command line (doc/eval.md), input as a table.
function moe.eval(kind, name, options)
  local o = {}
  if type(options) ~= "table" then
    fail(text_of(here()), "moe.eval: options: expected a table, found %s", type(options))
  end
  for k, v in pairs(options) do o[k] = is(v, Synth) and synth_dir(v, label_of(v)) or v end
  if type(o.trace) == "string" and not is(options.trace, Synth) then o.trace = find_trace(o.trace, text_of(here())) end
  return native.eval(kind, name, o)
end

--- Whether this build can run on an executor: "flow" (always), "simgrid", "host".
function moe.has(executor)
  if type(executor) ~= "string" then fail(text_of(here()), "moe.has: expected a name, found %s", type(executor)) end
  return native.has(executor)
end

--- One row of published against ours, for `moelab reproduce`; use scenarios/lib/paper.lua rather than this.
function moe.claim(row) native.claim(row) end

return moe
