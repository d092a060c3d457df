-- SPDX-License-Identifier: Apache-2.0
--
-- moelab_axes.lua - axes: what a value is called, and all combinations of what varies. Part of moelab.lua.
local check, kinds = ...
local fail, text_of, at_key, keys_of = check.fail, check.text_of, check.at_key, check.keys_of
local Each, Plugin, Machine, Model, Workload, Synth, Label =
  kinds.Each, kinds.Plugin, kinds.Machine, kinds.Model, kinds.Workload, kinds.Synth, kinds.Label

local function is(value, meta) return getmetatable(value) == meta end

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

-- Every combination of `all` with a key that takes each of `parts`; both lists as unfold() returns them.
local function cross(all, key, parts)
  local grown = {}
  for _, a in ipairs(all) do
    for _, p in ipairs(parts) do
      local copy = setmetatable({}, getmetatable(a.value))
      for k, v in pairs(a.value) do copy[k] = v end
      copy[key] = p.value
      local axes = table.move(a.axes, 1, #a.axes, 1, {})
      table.move(p.axes, 1, #p.axes, #axes + 1, axes)
      grown[#grown + 1] = { value = copy, axes = axes }
    end
  end
  return grown
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
      fail(at_key(where, path:match("[%w_]+$") or path), "%s: %s is not a finite number", path,
           value ~= value and "nan" or tostring(value)) -- Lua prints 0/0 with a sign
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
    all = cross(all, k, parts)
  end
  return all
end

return { label_of = label_of, unfold = unfold, cross = cross }
