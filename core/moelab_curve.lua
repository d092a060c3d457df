-- SPDX-License-Identifier: Apache-2.0
--
-- moelab_curve.lua - runs:curve: a figure over the steps of gates that are trained. Part of moelab.lua.
local native, check, figures, Runs, quote = ...
local fail, here, at_key, options_of, text_of, keys_of =
  check.fail, check.here, check.at_key, check.options_of, check.text_of, check.keys_of

local MAX_POINTS, PART = 400, 40

-- Mean over runs at each step, as far as all go, then over windows: { step, value }. A window is `over` steps, or on a
-- logarithmic axis the PARTth part of the steps before it.
local function curve_of(list, name, over, logx)
  local lists, n, first = {}, math.huge, 0
  for _, r in ipairs(list) do
    if r.status == "ok" then
      lists[#lists + 1] = r.curve[name]
      n, first = math.min(n, #r.curve[name]), r.curve.first
    end
  end
  local points = {}
  local from = 1
  while #lists > 0 and from <= n do
    local upto, sum = math.min(from + (logx and math.max(1, from // PART) or over) - 1, n), 0.0
    for i = from, upto do
      for _, l in ipairs(lists) do sum = sum + l[i] end
    end
    points[#points + 1] = { first + (from + upto) / 2, sum / (#lists * (upto - from + 1)) }
    from = upto + 1
  end
  return points
end

--- Draws a figure over steps, of runs with a workload of moe.gate: writes NAME.dat and NAME.gp, and NAME.png if gnuplot
--- is there. Runs that differ in other axes (seeds) are averaged, step by step.
---   y      "task_loss", "max_vio", ...: what runs have a curve of      group  axis: one line per label
---   file   "NAME.png"                                                 title, ylabel; logx, logy
---   over   steps that a point is the mean of; not given: as many as make 400 points at most. With logx it is a
---          fortieth of the steps before it
function Runs:curve(o)
  local where = here()
  o = options_of(where, "runs:curve", o, { y = "string", group = "string", file = "string", title = "string",
                                           ylabel = "string", logx = "boolean", logy = "boolean", over = "number" },
                 { "y", "file" })
  local stem = o.file:match("^([%w_][%w_.-]*)%.png$")
  if not stem then fail(at_key(where, "file"), "runs:curve.file: expected \"NAME.png\", found \"%s\"", o.file) end
  if o.over and not (o.over >= 1 and o.over == math.floor(o.over)) then
    fail(at_key(where, "over"), "runs:curve.over: expected a number of steps, found %g", o.over)
  end
  self:check_axes(where, "runs:curve", { o.group })
  local longest = 0
  for _, r in ipairs(self.list) do
    if r.status == "ok" and not r.curve then
      fail(text_of(where), "runs:curve: expected runs with a workload of moe.gate: others have no curve")
    end
    local c = r.status == "ok" and r.curve or {}
    if r.status == "ok" and not (o.y ~= "first" and c[o.y]) then
      c.first = nil
      fail(at_key(where, "y"), "runs:curve.y: no curve of \"%s\"; there are %s", o.y, table.concat(keys_of(c), ", "))
    end
    longest = math.max(longest, #(c[o.y] or {}))
  end
  local over = math.floor(o.over or math.max(1, math.ceil(longest / MAX_POINTS)))
  local dat, parts = { "# " .. (o.title or self.name):gsub("%c", " ") .. ": step, " .. o.y }, {}
  local last, least, most = 1, math.huge, 0
  for i, name in ipairs(o.group and self.axis[o.group].labels or { o.y }) do
    local runs = o.group and self:filter { [o.group] = name } or self
    local points = curve_of(runs.list, o.y, over, o.logx)
    if #points > 0 then -- gnuplot refuses a series without a point: all its runs failed
      if #parts > 0 then dat[#dat + 1] = "\n" end -- two empty lines part data sets
      dat[#dat + 1] = "# " .. name:gsub("%c", " ")
      for _, p in ipairs(points) do
        dat[#dat + 1] = string.format("%.9g\t%.9g", p[1], p[2])
        least, most = p[2] > 0 and math.min(least, p[2]) or least, math.max(most, p[2])
      end
      last = math.max(last, points[#points][1])
      parts[#parts + 1] = string.format("\"%s.dat\" index %d with lines lw 2 lc rgb \"%s\" title %s", stem, #parts,
                                        figures.palette[(i - 1) % #figures.palette + 1], quote(name))
    end
  end
  native.write(stem .. ".dat", table.concat(dat, "\n") .. "\n")
  local gp = {
    "# gnuplot " .. stem .. ".gp  redraws " .. o.file,
    "set terminal pngcairo size 1000,620 font \"DejaVu Sans,13\" background \"white\"",
    "set output \"" .. o.file .. "\"", "set title " .. quote(o.title or self.name) .. " font \",15\"",
    "set xlabel " .. quote(not o.logx and over > 1 and "step (mean over " .. over .. ")" or "step"),
    "set ylabel " .. quote(o.ylabel or figures.short(o.y)),
    "set key below center horizontal Left reverse samplen 2 spacing 1.3 width 2 height 0.7",
    "set grid ytics lt 1 lw 1 lc rgb \"#dddddd\"", "set border 3", "set tics nomirror out",
    o.logy and least < most and
    string.format("set logscale y%s\nset yrange [%.9g:%.9g]", most / least < 50 and " 2" or "",
                  least / 1.1, most * 1.1) or "set yrange [0:*]",
    o.logx and string.format("set logscale x\nset xrange [1:%.9g]", math.max(2, last)) or "set xrange [0:*]",
  }
  gp[#gp + 1] = #parts > 0 and "plot " .. table.concat(parts, ", \\\n     ") or "# nothing to plot: every run failed"
  native.write(stem .. ".gp", table.concat(gp, "\n") .. "\n")
  if #parts > 0 then native.draw(stem) end
end
