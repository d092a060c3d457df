-- SPDX-License-Identifier: Apache-2.0
--
-- moelab_plot.lua - runs:plot: the data, a gnuplot script that anyone can run again, the picture. Part of moelab.lua.
local native, check, figures, Runs = ...
local fail, here, at_key, options_of, text_of = check.fail, check.here, check.at_key, check.options_of, check.text_of

local function one_line(s) return (tostring(s):gsub("%c", " ")) end

-- A string of gnuplot's. In double quotes it runs what is between backquotes: they must not get there.
local function quote(s)
  s = one_line(s):gsub("`", "'"):gsub("[\\\"]", "\\%0"):gsub("_", "\\\\_")
  return "\"" .. s .. "\""
end

-- How a label of an axis reads: a cache is a share of all experts, whatever is drawn over it.
local function tick(axis, label)
  return axis == "cache" and tonumber(label) and string.format("%g %%", 100 * tonumber(label)) or label
end

local palette = figures.palette

local function plot_series(self, o, where)
  local x_labels = self.axis[o.x].labels
  local series = {}
  local names = o.group and self.axis[o.group].labels or { type(o.y) == "string" and o.y or o.ylabel }
  for _, name in ipairs(names) do
    local runs = o.group and self:filter { [o.group] = name } or self
    local points = {}
    for i, x in ipairs(x_labels) do
      local mean, spread = figures.aggregate(runs:filter { [o.x] = x }.list, o.y)
      points[i] = { mean = mean, spread = spread }
    end
    local top = o.group and name == o.ceiling
    local shown = o.group and tick(o.group, name) or name
    series[#series + 1] = { name = top and shown .. " (ceiling)" or shown, points = points, bound = top }
  end
  if o.bound then
    local bound_of = figures.common_bound(self.list, self.axis_names)
    local per_group = o.group and not figures.is_policy(o.group) -- other work: another bound
    for g, name in ipairs(per_group and names or { "perfect balance" }) do
      local runs, points = per_group and self:filter { [o.group] = name } or self, {}
      for i, x in ipairs(x_labels) do
        points[i] = { mean = bound_of(runs:filter { [o.x] = x }.list), spread = 0 }
      end
      series[#series + 1] = { name = "bound: " .. (per_group and tick(o.group, name) or name), points = points,
                              bound = true, of = per_group and g }
    end
  end
  return x_labels, series
end

--- Draws a figure: writes NAME.dat and NAME.gp, and NAME.png if gnuplot is there.
---   x      axis along the bottom                 y      figure (mean over steps and over other axes), or a
---                                                       function of a run that returns a number or nil
---   group  axis: one colour per label            kind   "bars" (default) or "lines" (x must be numbers)
---   file   "NAME.png"                            title, xlabel, ylabel; percent = true for shares
---   bound  true: adds the bound, one per label of a group that is no policy; ceiling: label of the group that none
---          can beat, drawn dashed; logx, logy
function Runs:plot(o)
  local where = here()
  o = options_of(where, "runs:plot", o, {
    x = "string", y = "string|function", group = "string", file = "string", title = "string", xlabel = "string",
    ylabel = "string", kind = "string", bound = "boolean", ceiling = "string", logx = "boolean", logy = "boolean",
    percent = "boolean" }, { "x", "y", "file" })
  local stem = o.file:match("^([%w_][%w_.-]*)%.png$")
  if not stem then fail(at_key(where, "file"), "runs:plot.file: expected \"NAME.png\", found \"%s\"", o.file) end
  self:check_axes(where, "runs:plot", { o.x, o.group })
  local own = type(o.y) == "function"
  if own and not o.ylabel then fail(text_of(where), "runs:plot: ylabel is missing: y is a function") end
  local metric = not own and figures.check_metric(where, "runs:plot", o.y)
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
  local scale, unit = 1, ""
  if metric then scale, unit = figures.scale_of(figures.unit[metric], largest) end
  if o.percent then scale, unit = 0.01, "%" end
  local function cell(v) return figures.is_finite(v) and string.format("%.9g", v / scale) or "NaN" end

  local dat = { "# " .. one_line(o.title or self.name), "# " .. one_line(o.x) .. "\t" }
  for _, s in ipairs(series) do dat[2] = dat[2] .. quote(s.name) .. "\tspread\t" end
  for i, x in ipairs(x_labels) do
    local row = { lines and x or quote((one_line(tick(o.x, x)):gsub("\"", "'"))) } -- data have no escaped quotes
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
    "set ylabel " .. quote((o.ylabel or figures.short(metric)) .. (unit ~= "" and " (" .. unit .. ")" or "")),
    "set key below center horizontal Left reverse samplen 2 spacing 1.3 width 2 height 0.7",
    "set grid ytics lt 1 lw 1 lc rgb \"#dddddd\"", "set border 3", "set tics nomirror out",
  }
  gp[#gp + 1] = o.logy and "set logscale y" or o.percent and "set yrange [0:100]" or "set yrange [0:*]"
  local parts = {}
  if lines then
    local ticks, least, most = {}, math.huge, -math.huge
    for i, x in ipairs(x_labels) do
      if not tonumber(x) then
        fail(at_key(where, "x"), "runs:plot: kind \"lines\" needs numbers on %s, found \"%s\"", o.x, x)
      end
      least, most = math.min(least, tonumber(x)), math.max(most, tonumber(x))
      ticks[i] = string.format("\"%s\" %s", (tick(o.x, x):gsub("%%", "%%%%")), x) -- gnuplot takes it for a format
    end
    gp[#gp + 1] = "set xtics (" .. table.concat(ticks, ", ") .. ")"
    if o.logx and least > 0 then -- a logarithmic axis would go on to the next power of ten
      local beside = least < most and (most / least) ^ 0.03 or 2
      gp[#gp + 1] = "set logscale x"
      gp[#gp + 1] = string.format("set xrange [%.9g:%.9g]", least / beside, most * beside)
    else
      if o.logx then gp[#gp + 1] = "set logscale x" end
      gp[#gp + 1] = "set offsets graph 0.02, graph 0.02, 0, 0"
    end
    for i, s in ipairs(series) do
      local style = s.bound and string.format("lw 2 dt 2 pt 0 lc rgb \"%s\"", s.of and
                                              palette[(s.of - 1) % #palette + 1] or "#000000") or
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
  if #parts > 0 then native.draw(stem) end
end

return quote
