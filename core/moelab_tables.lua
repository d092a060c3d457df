-- SPDX-License-Identifier: Apache-2.0
--
-- moelab_tables.lua - runs: filtering them, tables of them, differences between them. Part of moelab.lua.
local native, check, figures, label_of = ...
local fail, here, text_of, at_key, keys_of, options_of =
  check.fail, check.here, check.text_of, check.at_key, check.keys_of, check.options_of
local metric_unit, check_metric, aggregate, group, scale_of, short, number =
  figures.unit, figures.check_metric, figures.aggregate, figures.group, figures.scale_of, figures.short, figures.number

local Runs = {}
Runs.__index = Runs

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
           #self.axis_names == 0 and "; the experiment has none (moe.each makes one)" or
           "; axes: " .. table.concat(self.axis_names, ", "))
    end
  end
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

-- The two columns that `bound` adds: the bound that a row's runs share with all that do the same work, and how far the
-- row is from it.
local function share_bound(self, groups, cells, columns)
  local bound_of = figures.common_bound(self.list, self.axis_names)
  for i, g in ipairs(groups) do
    local bound, step = bound_of(g.runs), aggregate(g.runs, "step_s")
    cells[i][#columns - 1] = { mean = step and bound, spread = 0, n = 1 }
    cells[i][#columns] = { mean = step and bound and bound > 0 and step / bound or nil, spread = 0, n = 1 }
  end
end

local function runs_in(list, axis, label)
  local some = {}
  for _, r in ipairs(list) do
    if r.axes[axis] == label then some[#some + 1] = r end
  end
  return some
end

-- A bound per column is one line only where the lines are other ways of doing the same work.
local function check_bound(axes, o, where)
  where = at_key(where, "bound")
  local figure = as_list(o.value)[1]
  if figure ~= "step_s" then
    fail(where, "runs:table.bound: with cols, expected value = \"step_s\", found \"%s\"", tostring(figure))
  end
  if #axes == 0 then fail(where, "runs:table.bound: with cols, expected rows, found none") end
  for _, a in ipairs(axes) do
    if not figures.is_policy(a) then
      fail(where, "runs:table.bound: with cols, expected rows of policies alone (%s), found \"%s\"",
           table.concat(figures.policy_axes, ", "), a)
    end
  end
end

-- The line that `bound` adds to a table with columns.
local function bound_line(self, axes, columns, o)
  local row, bound_of = { "bound" }, figures.common_bound(self.list, self.axis_names)
  for i = 2, #axes do row[i] = "" end
  for c, col in ipairs(columns) do
    local bound = bound_of(runs_in(self.list, o.cols, col.label))
    row[#axes + c] = number(bound and bound / col.scale) .. (o.best and "  " or "")
  end
  return row
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
---   rows   axis, or list of axes, for the lines; without: every axis but cols, {}: one line for all runs
---   cols   axis for the columns, or none
---   value  figure, or list of figures when there are no cols
---   best   "min" or "max": marks the best of each column's first axis group with *
---   bound  true: adds the bound, the least bound_s of all runs that differ in policies alone, and how far step_s is
---          from it; with cols (value "step_s", rows of policies) a last line with the bound of each column
---   ceiling  label of the last axis that no real policy can beat: not a candidate for best; with cols, a last line
---            says how much of it the best reaches
---   title  printed above; percent = true for shares
function Runs:table(o)
  local where = here()
  o = options_of(where, "runs:table", o, {
    rows = "string|table", cols = "string", value = "string|table", best = "string", bound = "boolean",
    ceiling = "string", title = "string", file = "string", percent = "boolean" }, { "value" })
  if o.best ~= nil and o.best ~= "min" and o.best ~= "max" then
    fail(at_key(where, "best"), "runs:table.best: expected \"min\" or \"max\", found \"%s\"", tostring(o.best))
  end
  local axes = o.rows and as_list(o.rows) or {}
  for _, name in ipairs(o.rows and {} or self.axis_names) do
    if name ~= o.cols then axes[#axes + 1] = name end
  end
  if #axes == 0 then o.best = nil end -- one line is the best of nothing
  self:check_axes(where, "runs:table", axes)
  if o.cols then self:check_axes(where, "runs:table", { o.cols }) end
  local columns = table_columns(self, o, where)
  if o.bound and o.cols then check_bound(axes, o, where) end
  if o.bound and not o.cols then
    columns[#columns + 1] = { figure = "bound_s", title = "bound" }
    columns[#columns + 1] = { figure = "over_bound", title = "over bound" }
  end
  local groups = group(self.list, axes)
  local cells, missing = {}, false
  for i, g in ipairs(groups) do
    cells[i] = {}
    for c, col in ipairs(columns) do
      local runs = col.label and runs_in(g.runs, o.cols, col.label) or g.runs
      local mean, spread, n = aggregate(runs, col.figure)
      cells[i][c] = { mean = mean, spread = spread, n = n }
    end
  end
  if o.bound and not o.cols then share_bound(self, groups, cells, columns) end
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
      missing = missing or x.mean == nil
      if x.n > 1 then text = text .. " ±" .. number(x.spread / col.scale) end
      local w = winners[c .. "\0" .. prefix]
      row[#row + 1] = text .. (w and w.row == i and " *" or o.best and "  " or "")
    end
    rows[#rows + 1] = row
  end
  if o.bound and o.cols then rows[#rows + 1] = bound_line(self, axes, columns, o) end
  if o.ceiling and o.best and o.cols and #axes == 1 then
    rows[#rows + 1] = reached(groups, cells, columns, winners, o)
  end
  local text = (o.title and o.title .. "\n" or "") .. (caption and "  " .. caption .. "\n" or "") ..
               lay_out(rows, #axes)
  if o.best then text = text .. "  * best" .. (o.best == "min" and " (least)" or " (most)") .. "\n" end
  if missing then text = text .. "  - no figure: the run failed or the figure does not apply\n" end
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
  local function named(labels) -- "nodes 2, placement round-robin"; "machine.nodes" where another axis ends so too
    local parts = {}
    for i, a in ipairs(others) do
      local last, n = a:match("[^.]+$"), 0
      for _, b in ipairs(others) do n = n + (b:match("[^.]+$") == last and 1 or 0) end
      parts[i] = (n > 1 and a or last) .. " " .. labels[i]
    end
    return #parts > 0 and " (worst: " .. table.concat(parts, ", ") .. ")" or ""
  end
  local worst, n, at = 0, 0, nil
  local first = self.axis[o.over].labels[1]
  for _, g in ipairs(group(self.list, others)) do
    local base
    for _, r in ipairs(g.runs) do
      if r.axes[o.over] == first then base = figures.value(r, o.value) end
    end
    for _, r in ipairs(g.runs) do
      local v = figures.value(r, o.value)
      if base and v and r.axes[o.over] ~= first then
        n = n + 1
        local d = base == 0 and math.abs(v) or math.abs(v - base) / math.abs(base)
        if d > worst or not at then worst, at = math.max(d, worst), g.labels end
      end
    end
  end
  local labels = table.concat(self.axis[o.over].labels, " and ")
  if n == 0 then return 0, "" end -- one label alone: nothing to compare
  local text = string.format("%s%s: %s differs by at most %.2g %% over %d pairs of runs%s\n",
                             o.title and o.title .. ": " or "", labels, o.value, 100 * worst, n, named(at))
  if not native.option("quiet") then print(text) end
  return worst, text
end

Runs.lay_out = lay_out

return Runs
