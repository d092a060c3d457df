-- SPDX-License-Identifier: Apache-2.0
--
-- moelab.lua - the scenario API: describes experiments, unfolds their axes, hands runs to the core, shows results.
-- Everything a scenario can call is documented at its definition and in doc/scenarios.md.

-- What a scenario passes in may be any value with any metatable, and what it got from here it may change: text that
-- ends up in a gnuplot script goes through quote(), and options of results through options_of().

local native = ...
local moe = {}
local check = native.part("check", native)
local fail, here, text_of, at_key, keys_of, check_keys, check_type =
  check.fail, check.here, check.text_of, check.at_key, check.keys_of, check.check_keys, check.check_type

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
  if n == 0 then
    fail(text_of(where), "moe.policy %s: no hook; expected %s", t.name, table.concat(keys_of(hooks), ", "))
  end
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

local synthesised = {} -- parameters as text -> directory and what it was made of: equal workloads share a trace

-- The directory of a synthetic trace with these (unfolded) parameters, and all of them with defaults filled in.
local function synth_dir(synth, label)
  if not synthesised[label] then
    local options = { where = text_of(synth.where) }
    for k, v in pairs(synth.options) do options[k] = v end
    if options.like then options.like = find_trace(options.like, at_key(synth.where, "like")) end
    synthesised[label] = { native.synth(options) }
  end
  return table.unpack(synthesised[label])
end

local workload_keys = {}

local function workload(kind, batch_key, more, traceless)
  local known = { trace = 1, steps = 1, profile = 1, context = 1, layer_repeat = 1, [batch_key] = 1 }
  for _, k in ipairs(more or {}) do known[k] = 1 end
  workload_keys[kind] = known
  return function(t)
    local where = here()
    check_keys(where, "moe." .. kind, t, known)
    if t.trace == nil and not traceless then
      fail(text_of(where), "moe.%s: trace is missing: a directory, or moe.synth {...}", kind)
    end
    return setmetatable({ kind = kind, options = t, where = where }, Workload)
  end
end

--- Continuous batching: batch_per_device requests per device, one token each per step.
moe.decode = workload("decode", "batch_per_device")
--- Prompts: tokens_per_device tokens per device and step.
moe.prefill = workload("prefill", "tokens_per_device")
--- Training: forward, backward, reduction of gradients, optimiser.
moe.train = workload("train", "tokens_per_device", { "recompute", "shard_optimizer", "gradient_bytes",
                                                     "optimizer_bytes" })
--- A gate that is trained while it routes tokens of a drifting mixture: doc/training.md.
moe.gate = workload("gate", "tokens_per_device", { "gate", "width", "outputs", "clusters", "labels", "skew", "drift",
                                                   "common", "noise", "spread", "learning_rate", "expert_rate" }, true)

local axes_part = native.part("axes", check, {
  Each = Each, Plugin = Plugin, Machine = Machine, Model = Model, Workload = Workload, Synth = Synth, Label = Label,
})
local label_of, unfold, cross = axes_part.label_of, axes_part.unfold, axes_part.cross

-- ---- experiments ---------------------------------------------------------------------------------------------------

local experiment_keys = {
  name = 1, model = 1, machine = 1, executor = 1, tier = 1, workload = 1, router = 1, balancer = 1, placement = 1,
  dispatch = 1, offload = 1, cache = 1, warmup = 1, repetitions = 1, seed = 1, verify = 1, layout = 1,
  virtual_ranks = 1, cuda_graphs = 1, allow_extrapolation = 1,
}
-- The order in which axes unfold: the last varies fastest.
local axis_order = { "model", "machine", "layout", "executor", "tier", "workload", "router", "balancer", "placement",
                     "dispatch", "offload", "cache", "warmup", "repetitions", "seed", "verify",
                     "virtual_ranks", "cuda_graphs", "allow_extrapolation" }
local kinds = { "router", "balancer", "placement", "dispatch", "offload" }
local defaults = { router = "replay", placement = "contiguous", dispatch = "flat", offload = "none", seed = 1,
                   executor = "flow", name = "experiment" }

-- An axis that is overridden stays an axis, of one value, so that tables over it still work.
local function put(t, key, value)
  t[key] = is(t[key], Each) and setmetatable({ values = { value }, where = t[key].where }, Each) or value
end

local model_keys = { name = 1, layers = 1, experts = 1, top_k = 1, shared = 1, d_model = 1, d_expert = 1, n_heads = 1,
                     n_kv_heads = 1, d_head = 1, precision = 1, weight_bytes = 1, act_bytes = 1, combine_bytes = 1,
                     source = 1, attention = 1, vocab = 1, dense = 1, dispatch = 1, combine = 1 }

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
      -- keys of the machine's file; every experiment has a layout
      if v == nil and (parts[1] == "machine" and i > 1 or parts[1] == "layout") then v = {} end
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
  local second = native.option("against")
  if second then
    t.executor = setmetatable({ values = { executor, second }, where = where }, Each)
  elseif executor then
    put(t, "executor", executor)
  end
  if native.option("allow_extrapolation") then put(t, "allow_extrapolation", true) end
end

-- What is given replaces what is there; tables are merged.
local function merge(base, changes)
  for k, v in pairs(changes) do
    if type(v) ~= "table" or getmetatable(v) then base[k] = v
    else base[k] = merge(type(base[k]) == "table" and base[k] or {}, v) end
  end
  return base
end

local function machine_spec(v, run, where)
  if type(v) == "string" then v = setmetatable({ name = v, options = {}, where = where }, Machine) end
  if not is(v, Machine) then
    fail(at_key(where, "machine"), "machine: expected moe.machine \"NAME\", found %s", type(v))
  end
  local options = merge({}, v.options)
  local description, file = native.machine(v.name, options.like)
  options.like = nil
  if not description then fail(text_of(v.where), "%s", file) end
  return { executor = run.executor, tier = run.tier, file = file, description = merge(description, options) }
end

-- Two ways to say one thing: a change in one drops the other of the model that is changed.
local same = { attention = { "n_heads", "n_kv_heads", "d_head" }, dispatch = { "act_bytes" },
               combine = { "combine_bytes" } }

local function drop_others(sizes, changes)
  for new, old in pairs(same) do
    for _, k in ipairs(old) do
      if changes[new] ~= nil and changes[k] == nil then sizes[k] = nil end
      if changes[k] ~= nil and changes[new] == nil then sizes[new] = nil end
    end
  end
end

local function model_spec(v, where)
  if type(v) == "string" then v = setmetatable({ name = v, options = {}, where = where }, Model) end
  if type(v) == "table" and not is(v, Model) then v = setmetatable({ options = v, where = where }, Model) end
  if not is(v, Model) then
    fail(at_key(where, "model"), "model: expected a name or a table of sizes, found %s", type(v))
  end
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
    drop_others(sizes, v.options)
  end
  return merge(sizes, v.options)
end

local function workload_spec(v, where)
  if not is(v, Workload) then
    fail(at_key(where, "workload"), "workload: expected moe.decode, moe.prefill, moe.train or moe.gate {...}, found %s",
         type(v))
  end
  local spec = { kind = v.kind }
  for k, x in pairs(v.options) do spec[k] = x end
  if is(spec.trace, Synth) then
    spec.trace, spec.synth = synth_dir(spec.trace, label_of(spec.trace))
  elseif type(spec.trace) == "string" then
    spec.trace = find_trace(spec.trace, at_key(v.where, "trace") .. ": workload.trace")
  elseif spec.trace ~= nil then
    fail(at_key(v.where, "trace"), "workload.trace: expected a directory or moe.synth {...}, found %s",
         type(spec.trace))
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
  if math.type(run.seed) ~= "integer" then
    fail(at_key(where, "seed"), "seed: expected a whole number, found %s", check.shown(run.seed))
  end
  if run.allow_extrapolation ~= nil then
    check_type(where, "experiment", "allow_extrapolation", run.allow_extrapolation, "boolean")
  end
  if run.virtual_ranks ~= nil then
    check_type(where, "experiment", "virtual_ranks", run.virtual_ranks, "boolean")
  end
  if run.cuda_graphs ~= nil then check_type(where, "experiment", "cuda_graphs", run.cuda_graphs, "boolean") end
  if run.cache ~= nil then check_type(where, "experiment", "cache", run.cache, "number") end
  return {
    where = text_of(where), seed = run.seed, model = model_spec(run.model, where),
    machine = machine_spec(run.machine, run, where), workload = workload_spec(run.workload, where),
    layout = run.layout, policies = policies, cache = run.cache, warmup = run.warmup, verify = run.verify,
    repetitions = run.repetitions, virtual_ranks = run.virtual_ranks, cuda_graphs = run.cuda_graphs,
    allow_extrapolation = run.allow_extrapolation,
  }
end

local figures = native.part("figures", native, check)
local Runs = native.part("tables", native, check, figures, label_of)
local quote = native.part("plot", native, check, figures, Runs)
native.part("curve", native, check, figures, Runs, quote)
local against = native.part("against", native, check, figures, Runs, quote)

local Experiment = {}
Experiment.__index = Experiment

--- One experiment: a value for every key, moe.each where it varies. See doc/scenarios.md for every key.
function moe.experiment(t)
  local where = here()
  check_keys(where, "moe.experiment", t, experiment_keys)
  local given = {}
  for k, v in pairs(defaults) do given[k] = v end
  for k, v in pairs(t) do given[k] = v end
  local has_executors = is(given.executor, Each)
  override(given, where)
  for _, k in ipairs { "model", "machine", "workload" } do
    if given[k] == nil then fail(text_of(where), "moe.experiment: %s is missing", k) end
  end
  check_type(where, "moe.experiment", "name", given.name, "string")
  -- One combination at a time, axis by axis, so that the order of runs is the order of axis_order.
  local all = { { value = {}, axes = {} } }
  for _, key in ipairs(axis_order) do
    if given[key] ~= nil then all = cross(all, key, unfold(given[key], key, where)) end
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
  return setmetatable({ name = given.name, specs = specs, axes = axes, axis_names = order, axis = names,
                        has_executors = has_executors }, Experiment)
end

--- Runs every combination and returns the runs.
function Experiment:run()
  local second = native.option("against")
  if second then against.set_pace(self, native.option("executor"), second) end
  local results = native.run(self.name, self.specs, self.axes)
  local list = {}
  for i, r in ipairs(results) do
    r.axes = self.axes[i]
    list[i] = r
  end
  local runs = setmetatable({ name = self.name, list = list, axis_names = self.axis_names, axis = self.axis }, Runs)
  return second and against.report(runs, native.option("executor"), second, self.has_executors) or runs
end

--- A figure of one run: "step_s" (its mean over steps), "step_s.p99". nil if the run failed or has no such figure.
moe.value = figures.value

--- A file in the results directory.
function moe.write(name, text)
  if type(name) ~= "string" or type(text) ~= "string" then fail(text_of(here()), "moe.write: expected (name, text)") end
  native.write(name, text)
end

--- What `moelab eval KIND NAME` prints, as a table: options as on its command line (doc/eval.md), input as a table.
function moe.eval(kind, name, options)
  local o = {}
  if type(kind) ~= "string" or type(name) ~= "string" then
    fail(text_of(here()), "moe.eval: expected (kind, name, options), found a %s and a %s", type(kind), type(name))
  end
  if type(options) ~= "table" then
    fail(text_of(here()), "moe.eval: options: expected a table, found %s", type(options))
  end
  for k, v in pairs(options) do o[k] = is(v, Synth) and synth_dir(v, label_of(v)) or v end
  if type(o.trace) == "string" and not is(options.trace, Synth) then o.trace = find_trace(o.trace, text_of(here())) end
  return native.eval(kind, name, o)
end

--- Published measurements of hw/published/NAME.csv against the models: rows as `moelab machine validate --json` has.
function moe.validate(name)
  if type(name) ~= "string" then fail(text_of(here()), "moe.validate: expected a table's name") end
  return native.validate(name)
end

--- Whether this build can run on an executor: "flow" (always), "simgrid", "host", "cuda".
function moe.has(executor)
  if type(executor) ~= "string" then fail(text_of(here()), "moe.has: expected a name, found %s", type(executor)) end
  return native.has(executor)
end

--- One row of published against ours, for `moelab reproduce`; use scenarios/lib/paper.lua rather than this.
function moe.claim(row) native.claim(row) end

return moe
