-- SPDX-License-Identifier: Apache-2.0
--
-- moelab_check.lua - errors that name script, line and key; what a scenario passes in, checked. Part of moelab.lua.
local native = ...

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

-- A value as messages show what was found. Not tostring(): a table's would be an address, or the scenario's function.
local function shown(v)
  if type(v) == "string" then return "\"" .. v .. "\"" end
  return (type(v) == "number" or type(v) == "boolean") and tostring(v) or "a " .. type(v)
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

return {
  fail = fail,
  here = here,
  text_of = text_of,
  at_key = at_key,
  keys_of = keys_of,
  check_keys = check_keys,
  check_type = check_type,
  options_of = options_of,
  shown = shown,
}
