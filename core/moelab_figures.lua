-- SPDX-License-Identifier: Apache-2.0
--
-- moelab_figures.lua - figures of runs: reading them off, averaging, choosing a unit. Part of moelab.lua.
local native, check = ...
local fail, text_of, keys_of = check.fail, check.text_of, check.keys_of

local metric_unit = native.metrics() -- name -> unit

local function is_finite(v) return math.type(v) ~= nil and v == v and math.abs(v) ~= math.huge end

--- A figure of one run: "step_s" (its mean over steps), "step_s.p99". nil if the run failed or has no such figure.
local function value(run, name)
  if run.status ~= "ok" then return nil end
  local metric, part = name:match("^([%w_]+)%.?([%w_]*)$")
  local m = metric and run.metrics[metric]
  local v = m and m[part ~= "" and part or "mean"]
  return is_finite(v) and v or nil
end

local function check_metric(where, what, name)
  local metric, part = tostring(name):match("^([%w_]+)%.?([%w_]*)$")
  if not metric or not metric_unit[metric] then
    local near = metric and native.nearest(metric, keys_of(metric_unit))
    fail(text_of(where), "%s: no metric \"%s\"%s", what, tostring(name),
         near and "; did you mean \"" .. near .. "\"?" or "")
  end
  if part ~= "" and not ({ mean = 1, p50 = 1, p99 = 1, min = 1, max = 1 })[part] then
    fail(text_of(where), "%s: \"%s\": expected mean, p50, p99, min or max after the dot", what, name)
  end
  return metric
end

-- Mean and spread over the runs that share labels on the named axes, of a figure or of what a function says of a run.
local function aggregate(list, name)
  local n, sum, squares = 0, 0.0, 0.0
  for _, r in ipairs(list) do
    local v
    if type(name) == "function" then
      v = r.status == "ok" and name(r) or nil
      v = is_finite(v) and v or nil
    else
      v = value(r, name)
    end
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

-- Axes along which the same work is done by other means: those runs have a bound in common. Over axes of the model, the
-- machine or the workload they do not.
local policy_axes = { "router", "balancer", "placement", "dispatch", "offload", "cache", "seed", "executor", "tier" }
local is_policy_axis = {}
for _, name in ipairs(policy_axes) do is_policy_axis[name] = true end

local function is_policy(axis) return is_policy_axis[axis:match("^[^.]+")] == true end

-- What runs have in common: the least bound_s of all in `list` that differ from one in policies alone. Its own would
-- flatter policies that do more work evenly. Returns a function that gives the mean of it over a group's runs.
local function common_bound(list, axis_names)
  local others, least, work = {}, {}, {}
  for _, a in ipairs(axis_names) do
    if not is_policy(a) then others[#others + 1] = a end
  end
  for _, r in ipairs(list) do
    local labels = {}
    for i, a in ipairs(others) do labels[i] = r.axes[a] or "" end
    local key, own = table.concat(labels, "\0"), value(r, "bound_s")
    work[r] = key
    if own and (not least[key] or own < least[key]) then least[key] = own end
  end
  return function(runs)
    local n, sum = 0, 0.0
    for _, r in ipairs(runs) do
      local bound = value(r, "step_s") and least[work[r]]
      if bound then n, sum = n + 1, sum + bound end
    end
    return n > 0 and sum / n or nil
  end
end

-- A run's own bound is not what `bound = true` shows.
local own_figures = { bound_s = "own bound", over_bound = "over own bound" }

-- "step_s" reads as step, in whatever unit the column says.
local function short(figure)
  local metric, part = figure:match("^([%w_]+)(.*)$")
  if own_figures[metric] then return own_figures[metric] .. part end
  return metric_unit[figure] == "s" and figure:gsub("_s$", "") or figure
end

local function number(v)
  if not is_finite(v) then return "-" end -- nothing there, or 0/0
  local a = math.abs(v)
  if a >= 1000 then return string.format("%.0f", v) end
  if a >= 100 then return string.format("%.1f", v) end
  if a >= 10 then return string.format("%.2f", v) end
  return string.format("%.3f", v)
end

-- Colours of series, apart for most who see colours otherwise.
local palette = { "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666" }

return {
  unit = metric_unit, value = value, check_metric = check_metric, aggregate = aggregate, group = group,
  policy_axes = policy_axes, is_policy = is_policy, common_bound = common_bound,
  scale_of = scale_of, short = short, number = number, is_finite = is_finite, palette = palette,
}
