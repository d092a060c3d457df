-- SPDX-License-Identifier: Apache-2.0
--
-- Numbers drawn without a generator of our own, for scenarios that show what a rule does whatever its input.
local drawn = {}

--- A number in [-1, 1) that depends on all arguments (whole numbers).
function drawn.number(...)
  local x = 0.5
  for _, v in ipairs { ... } do
    x = math.sin(12.9898 * v + 78.233 * x + 1.7) * 43758.5453
    x = x - math.floor(x)
  end
  return 2 * x - 1
end

--- rows x columns of them, times `scale`.
function drawn.matrix(seed, rows, columns, scale)
  local m = {}
  for i = 1, rows do
    m[i] = {}
    for j = 1, columns do m[i][j] = (scale or 1) * drawn.number(seed, i, j) end
  end
  return m
end

--- Experts of token t (from 1) in what moe.eval returned, in order.
function drawn.experts(r, t)
  return { table.unpack(r.experts, r.offsets[t] + 1, r.offsets[t + 1]) }
end

--- The k largest of a list, as a set { [index from 0] = true }.
function drawn.largest(values, k)
  local order, set = {}, {}
  for i = 1, #values do order[i] = i end
  table.sort(order, function(a, b)
    if values[a] ~= values[b] then return values[a] > values[b] end
    return a < b
  end)
  for i = 1, k do set[order[i] - 1] = true end
  return set
end

--- How many of a list are in a set.
function drawn.among(list, set)
  local n = 0
  for _, e in ipairs(list) do n = n + (set[e] and 1 or 0) end
  return n
end

function drawn.dot(a, b)
  local sum = 0
  for i = 1, #a do sum = sum + a[i] * b[i] end
  return sum
end

return drawn
