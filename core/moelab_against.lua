-- SPDX-License-Identifier: Apache-2.0
--
-- moelab_against.lua - `moelab run --machine A --against B`: the same runs on both, phase by phase. Part of moelab.lua.
local native, check, figures, Runs, quote = ...
local fail = check.fail

local against = {}

-- Phases in the order in which a layer has them; a step's sum need not be theirs, since some overlap.
local phases = {
  { "step_s", "step" }, { "attention_s", "attention" }, { "gate_s", "gate" }, { "permute_s", "permute" },
  { "dispatch_s", "dispatch" }, { "load_s", "load" }, { "experts_s", "experts" }, { "shared_s", "shared experts" },
  { "combine_s", "combine" }, { "unpermute_s", "unpermute" }, { "collective_s", "collectives" },
  { "migration_s", "migration" }, { "other_s", "dense, head" },
}
against.phases = phases

-- What is this small a part of its step is noise to whoever looks for what takes time.
local LEAST_SHARE = 0.002

local function median(list)
  table.sort(list)
  local n = #list
  if n == 0 then return nil end
  return n % 2 == 1 and list[(n + 1) // 2] or (list[n // 2] + list[n // 2 + 1]) / 2
end

--- One run on both: { { phase, measured, simulated, error, spread }, ... }; phases that neither has are left out.
function against.compare(measured, simulated)
  local rows = {}
  local step = figures.value(measured, "step_s") or 0
  for _, p in ipairs(phases) do
    local m, s = figures.value(measured, p[1]), figures.value(simulated, p[1])
    if m and s and math.max(m, s) > LEAST_SHARE * step then
      local spread = measured.metrics[p[1]].spread
      rows[#rows + 1] = { phase = p[2], metric = p[1], measured = m, simulated = s, spread = spread,
                          error = m > 0 and s / m - 1 or nil }
    end
  end
  return rows
end

--- Over pairs { label, rows }: does the order by simulated steps agree with that by measured ones, wherever these are
--- further apart than either's spread? Returns how many such pairs of runs there are, and those that do not agree.
function against.orderings(list)
  local n, wrong = 0, {}
  for i, a in ipairs(list) do
    for j = i + 1, #list do
      local x, y, b = a.rows[1], list[j].rows[1], list[j]
      local noise = math.max((x.spread or 0) * x.measured, (y.spread or 0) * y.measured)
      if math.abs(x.measured - y.measured) > noise then
        n = n + 1
        if (x.measured < y.measured) ~= (x.simulated < y.simulated) then wrong[#wrong + 1] = { a.label, b.label } end
      end
    end
  end
  return n, wrong
end

--- Per phase over all runs: median and largest |error|, and where that was.
function against.summary(list)
  local rows = {}
  for _, p in ipairs(phases) do
    local errors, worst = {}, nil
    for _, one in ipairs(list) do
      for _, r in ipairs(one.rows) do
        if r.metric == p[1] and r.error then
          errors[#errors + 1] = math.abs(r.error)
          if not worst or math.abs(r.error) > math.abs(worst.error) then
            worst = { error = r.error, label = one.label }
          end
        end
      end
    end
    if worst then rows[#rows + 1] = { phase = p[2], n = #errors, median = median(errors), worst = worst } end
  end
  return rows
end

local function percent(v, signed)
  return v and string.format(signed and "%+.1f %%" or "%.1f %%", 100 * v) or "-"
end

local function label_of(run, axis_names)
  local parts = {}
  for _, a in ipairs(axis_names) do
    if a ~= "executor" then parts[#parts + 1] = a:gsub("^.*%.", "") .. " " .. (run.axes[a] or "") end
  end
  return #parts > 0 and table.concat(parts, ", ") or "the run"
end

local function print_run(one)
  local rows = { { one.label, "measured", "simulated", "error", "spread" } }
  local scale, unit = figures.scale_of("s", one.rows[1].measured)
  for i = 2, 3 do rows[1][i] = rows[1][i] .. " (" .. unit .. ")" end
  for _, r in ipairs(one.rows) do
    rows[#rows + 1] = { "  " .. r.phase, figures.number(r.measured / scale), figures.number(r.simulated / scale),
                        percent(r.error, true), percent(r.spread) }
  end
  return Runs.lay_out(rows, 1)
end

local function print_summary(list, a, b)
  local rows = { { "|error| of " .. b, "runs", "median", "largest", "where" } }
  for _, r in ipairs(against.summary(list)) do
    rows[#rows + 1] = { "  " .. r.phase, tostring(r.n), percent(r.median), percent(r.worst.error, true), r.worst.label }
  end
  local text = Runs.lay_out(rows, 1)
  local n, wrong = against.orderings(list)
  local said = "\n  %d pairs of runs differ on %s by more than their spread; %d of them have the same order on %s\n"
  text = text .. said:format(n, a, n - #wrong, b)
  for _, w in ipairs(wrong) do text = text .. string.format("    not so: %s; %s\n", w[1], w[2]) end
  return text
end

-- What one machine cannot measure.
local function limits(run)
  if run.machine == "host" then
    return "  Ranks of machine host share this computer's memory: nothing here is about a network between hosts.\n"
  end
  if run.virtual_ranks then
    return "  Virtual ranks share one GPU: nothing here is about all-to-all between GPUs.\n"
  end
  return ""
end

local function write_csv(list)
  local lines = { "run,phase,measured_s,simulated_s,error,spread" }
  for _, one in ipairs(list) do
    for _, r in ipairs(one.rows) do
      lines[#lines + 1] = string.format("\"%s\",%s,%.9g,%.9g,%s,%s", one.label:gsub("\"", "'"), r.phase, r.measured,
                                        r.simulated, r.error and string.format("%.6g", r.error) or "",
                                        r.spread and string.format("%.6g", r.spread) or "")
    end
  end
  native.write("against.csv", table.concat(lines, "\n") .. "\n")
end

local function draw(list, a, b)
  local dat, most = { "# measured simulated, ms" }, 0
  for _, one in ipairs(list) do
    local r = one.rows[1]
    most = math.max(most, r.measured, r.simulated)
    dat[#dat + 1] = string.format("%.9g %.9g %.9g", r.measured * 1e3, r.simulated * 1e3,
                                  (r.spread or 0) / 2 * r.measured * 1e3)
  end
  native.write("against.dat", table.concat(dat, "\n") .. "\n")
  native.write("against.gp", table.concat({
    "set terminal pngcairo size 900,800 font \"sans,13\" background \"white\"", "set output \"against.png\"",
    "set title " .. quote("Steps on " .. a .. " and on " .. b), "set size square",
    "set xlabel " .. quote("on " .. a .. " (ms)"), "set ylabel " .. quote("on " .. b .. " (ms)"),
    "set grid lt 1 lw 1 lc rgb \"#dddddd\"", "set border 3", "set tics nomirror out",
    "set key top left Left reverse samplen 2",
    string.format("set xrange [0:%.9g]", most * 1.1e3), string.format("set yrange [0:%.9g]", most * 1.1e3),
    "plot x with lines lw 1.5 lc rgb \"#000000\" title \"equal\", \\",
    "     1.15*x with lines dt 2 lc rgb \"#888888\" title \"15 % off\", \\",
    "     0.85*x with lines dt 2 lc rgb \"#888888\" notitle, \\",
    "     \"against.dat\" using 1:2:3 with xerrorbars pt 7 ps 1.2 lc rgb \"#0072B2\" title " ..
    quote("runs, with their spread"),
  }, "\n") .. "\n")
  native.draw("against")
end

--- Prints and writes the comparison; `runs` are of both executors. Returns those of the first.
function against.report(runs, a, b)
  local of, list, failed = { [a] = {}, [b] = {} }, {}, 0
  for _, r in ipairs(runs.list) do
    local to = of[r.axes.executor]
    to[#to + 1] = r
  end
  for i, measured in ipairs(of[a]) do
    local simulated, label = of[b][i], label_of(measured, runs.axis_names)
    if measured.status == "ok" and simulated.status == "ok" then
      if measured.decisions ~= simulated.decisions then
        fail("--against " .. b, "%s: decisions %s on %s and %s on %s: a policy decides by time, or by more than its " ..
             "inputs", label, measured.decisions, a, simulated.decisions, b)
      end
      list[#list + 1] = { label = label, rows = against.compare(measured, simulated), run = measured }
    else
      failed = failed + 1
    end
  end
  if #list > 0 then
    local text = { string.format("\n%s: measured on %s, simulated on %s\n\n", runs.name, a, b) }
    for _, one in ipairs(list) do text[#text + 1] = print_run(one) .. "\n" end
    text[#text + 1] = print_summary(list, a, b) .. limits(list[1].run)
    if failed > 0 then
      text[#text + 1] = string.format("  left out: %d runs that failed on one of the two\n", failed)
    end
    native.write("against.txt", table.concat(text))
    if not native.option("quiet") then print(table.concat(text)) end
    write_csv(list)
    draw(list, a, b)
  end
  return setmetatable({ name = runs.name, list = of[a], axis_names = runs.axis_names, axis = runs.axis }, Runs)
end

return against
