-- SPDX-License-Identifier: Apache-2.0
--
-- moelab_against.lua - `moelab run --machine A --against B`: the same runs on both, phase by phase. Part of moelab.lua.
-- compare, pair, orderings and summary are functions of their arguments alone.
local native, check, figures, Runs, quote = ...
local keys_of = check.keys_of

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
-- Steps that are this near each other, relative to the longer one, differ by rounding.
local ROUNDING = 1e-9

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
      local spread = figures.value(measured, p[1] .. ".spread")
      rows[#rows + 1] = { phase = p[2], metric = p[1], measured = m, simulated = s, spread = spread,
                          error = m > 0 and s / m - 1 or nil }
    end
  end
  return rows
end

--- The rows of a run that was executed on both; or nil and why it cannot be compared, and "differ" if that is because
--- of its decisions.
function against.pair(measured, simulated, a, b)
  local failed = {}
  for _, one in ipairs { { measured, a }, { simulated, b } } do
    if one[1].status ~= "ok" then
      failed[#failed + 1] = "failed on " .. one[2] .. (one[1].error and ": " .. one[1].error or "")
    end
  end
  if #failed > 0 then return nil, table.concat(failed, "; ") end
  if measured.decisions ~= simulated.decisions then
    return nil, string.format("decisions %s on %s and %s on %s: a policy decides by time, or by more than its inputs",
                              measured.decisions, a, simulated.decisions, b), "differ"
  end
  local rows = against.compare(measured, simulated)
  if #rows == 0 or rows[1].metric ~= "step_s" then return nil, "a step takes no time" end
  return rows
end

local function is_less(x, y) return y - x > ROUNDING * math.max(x, y) end

--- Over pairs { label, rows }: does the order by simulated steps agree with that by measured ones, wherever these are
--- further apart than either's spread? Returns how many such pairs of runs there are, and those that do not agree: two
--- steps that are simulated alike have no order.
function against.orderings(list)
  local n, wrong = 0, {}
  for i, a in ipairs(list) do
    for j = i + 1, #list do
      local x, y, b = a.rows[1], list[j].rows[1], list[j]
      local noise = math.max((x.spread or 0) * x.measured, (y.spread or 0) * y.measured)
      local less, more = is_less(x.measured, y.measured), is_less(y.measured, x.measured)
      if (less or more) and math.abs(x.measured - y.measured) > noise then
        n = n + 1
        if not (less and is_less(x.simulated, y.simulated) or more and is_less(y.simulated, x.simulated)) then
          wrong[#wrong + 1] = { a.label, b.label }
        end
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
    if worst then
      rows[#rows + 1] = { phase = p[2], metric = p[1], n = #errors, median = median(errors), worst = worst }
    end
  end
  return rows
end

-- No sign where nothing is left of the figure.
local function percent(v, signed)
  local text = v and string.format(signed and "%+.1f" or "%.1f", 100 * v)
  return text and (text == "-0.0" and "+0.0" or text) .. " %" or "-"
end

-- "batch_per_device 8, offload lru"; "machine.nodes" where another axis ends so too.
local function label_of(run, axis_names)
  local parts, ends = {}, {}
  for _, a in ipairs(axis_names) do
    local last = a:match("[^.]+$")
    ends[last] = (ends[last] or 0) + 1
  end
  for _, a in ipairs(axis_names) do
    local last = a:match("[^.]+$")
    if run.axes[a] then parts[#parts + 1] = (ends[last] > 1 and a or last) .. " " .. run.axes[a] end
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
  local text, aside = Runs.lay_out(rows, 1), one.measured.set_aside
  if one.simulated.pace then
    text = text .. string.format("    the computer took %.2f times as long for a probe as when it was calibrated, " ..
                                 "and so does what is simulated\n", one.simulated.pace)
  end
  if aside then
    text = text .. string.format("    %d attempts that others disturbed were made again, and %d repetitions stayed " ..
                                 "disturbed\n", aside, one.measured.disturbed or 0)
  end
  if one.measured.stolen then
    text = text .. string.format("    a hypervisor took up to %.0f %% of processor time\n", 100 * one.measured.stolen)
  end
  return text
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

-- How many bytes an element of this model has, where machine host has 4, and in what it is computed: nil if in fp32.
local function other_precision(model)
  local list = {}
  if model.precision ~= "fp32" then list[1] = "precision " .. model.precision end
  for _, k in ipairs { "weight_bytes", "dispatch", "act_bytes", "combine", "combine_bytes" } do
    local v = model[k]
    if v ~= nil and v ~= "fp32" and v ~= 4 then
      list[#list + 1] = string.format(type(v) == "number" and "%s %.4g" or "%s %s", k, v)
    end
  end
  return #list > 0 and table.concat(list, ", ")
end

--- What has to be known of the executions to read the table: lines, each once.
function against.notes(list, a, b)
  local lines, seen = {}, {}
  local function note(...)
    local line = string.format(...)
    if not seen[line] then lines[#lines + 1], seen[line] = line, true end
  end
  for _, one in ipairs(list) do
    for _, side in ipairs { { one.measured, one.simulated, b }, { one.simulated, one.measured, a } } do
      local model = side[1].machine == "host" and side[2].spec and side[2].spec.model
      local other = model and other_precision(model)
      if other then
        note("%s has a model of %s; machine host computes in fp32, 4 bytes an element: errors are of both.",
             side[3], other)
      end
    end
  end
  local mpirun = native.option("mpirun")
  for _, one in ipairs(list) do
    for _, run in ipairs { one.measured, one.simulated } do
      if run.machine == "cuda" and run.devices == 1 then
        note("One GPU: what is measured is computing and loading. Nothing was exchanged, and nothing here is about " ..
             "all-to-all between GPUs.")
      elseif run.machine == "host" and run.devices == 1 then
        note("Machine %s had one rank: nothing was exchanged.", run.machine)
      elseif run.machine == "host" and mpirun then
        note("Ranks of machine host were started by \"%s\": those that share a computer share its memory, and what " ..
             "they exchange says nothing about a network.", mpirun)
      elseif run.machine == "host" then
        note("Ranks of machine host share this computer's memory: nothing here is about a network between hosts.")
      elseif run.virtual_ranks then
        note("Virtual ranks share one GPU: they have a part of it each, exchanges are copies within its memory, and " ..
             "nothing here is about all-to-all between GPUs. A machine file from \"moelab calibrate --gpu --ranks " ..
             "%d\" says the same of them.", run.devices)
      end
    end
  end
  return lines
end

-- ---- files: of all experiments of the scenario so far --------------------------------------------------------------

local told = { text = {}, list = {}, experiments = {}, n_runs = 0 }

local function write_csv()
  local lines = { "experiment,run,phase,measured_s,simulated_s,error,spread" }
  local function cell(s) return "\"" .. s:gsub("\"", "\"\"") .. "\"" end
  for _, one in ipairs(told.list) do
    for _, r in ipairs(one.rows) do
      lines[#lines + 1] = string.format("%s,%s,%s,%.9g,%.9g,%s,%s", cell(one.experiment), cell(one.label), r.phase,
                                        r.measured, r.simulated, r.error and string.format("%.6g", r.error) or "",
                                        r.spread and string.format("%.6g", r.spread) or "")
    end
  end
  native.write("against.csv", table.concat(lines, "\n") .. "\n")
end

-- Text as JSON has it; what is a list, empty ones too, is made by list_of().
local List = {}
local function list_of(t) return setmetatable(t, List) end

local function json(v, indent)
  if type(v) == "string" then
    return "\"" .. v:gsub("[%c\"\\]", function(c) return string.format("\\u%04x", c:byte()) end) .. "\""
  end
  if math.type(v) == "float" then return string.format("%.17g", v) end
  if type(v) ~= "table" then return tostring(v) end
  local parts, inner = {}, indent .. " "
  for i, k in ipairs(getmetatable(v) == List and v or keys_of(v)) do
    parts[i] = inner .. (getmetatable(v) == List and json(k, inner) or json(k, inner) .. ": " .. json(v[k], inner))
  end
  local open, close = "{", "}"
  if getmetatable(v) == List then open, close = "[", "]" end
  return #parts == 0 and open .. close or open .. "\n" .. table.concat(parts, ",\n") .. "\n" .. indent .. close
end

-- One experiment for against.json: figures as runs.jsonl has them.
local function as_table(name, list, left_out, said)
  local o = { name = name, runs = list_of {}, left_out = list_of(left_out), summary = list_of {},
              notes = list_of(said) }
  for i, one in ipairs(list) do
    local phases_of = list_of {}
    for k, r in ipairs(one.rows) do
      phases_of[k] = { phase = r.phase, metric = r.metric, measured_s = r.measured, simulated_s = r.simulated,
                       error = r.error, spread = r.spread }
    end
    o.runs[i] = { label = one.label, runs = list_of(one.runs), decisions = one.measured.decisions, phases = phases_of }
  end
  for i, r in ipairs(against.summary(list)) do
    o.summary[i] = { phase = r.phase, metric = r.metric, runs = r.n, median = r.median, largest = r.worst.error,
                     where = r.worst.label }
  end
  local n, wrong = against.orderings(list)
  for i, w in ipairs(wrong) do wrong[i] = list_of(w) end
  o.orderings = { pairs = n, agree = n - #wrong, disagree = list_of(wrong) }
  return o
end

local function draw(a, b)
  local dat, most = { "# measured simulated spread, ms" }, 0
  for _, one in ipairs(told.list) do
    local r = one.rows[1]
    most = math.max(most, r.measured, r.simulated)
    dat[#dat + 1] = string.format("%.9g %.9g %.9g", r.measured * 1e3, r.simulated * 1e3,
                                  (r.spread or 0) / 2 * r.measured * 1e3)
  end
  native.write("against.dat", table.concat(dat, "\n") .. "\n")
  native.write("against.gp", table.concat({
    "# gnuplot against.gp  redraws against.png",
    "set terminal pngcairo size 900,800 font \"DejaVu Sans,13\" background \"white\"", "set output \"against.png\"",
    "set title " .. quote("Steps on " .. a .. " and on " .. b), "set size square",
    "set xlabel " .. quote("step on " .. a .. " (ms)"), "set ylabel " .. quote("step on " .. b .. " (ms)"),
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

-- The runs of `a` alone, as if there had been no --against: executors are an axis only if the scenario has them as one.
local function runs_of(runs, list, a, has_executors)
  local names, axis = {}, {}
  for _, name in ipairs(runs.axis_names) do
    if name ~= "executor" or has_executors then
      names[#names + 1] = name
      axis[name] = name == "executor" and { labels = { a }, seen = { [a] = true } } or runs.axis[name]
    end
  end
  return setmetatable({ name = runs.name, list = list, axis_names = names, axis = axis }, Runs)
end

--- What simulates a run of machine host takes the computer as fast as that run found it: core/sweep.c looks there.
function against.set_pace(experiment, a, b)
  local of = { [a] = {}, [b] = {} }
  for i in ipairs(experiment.specs) do
    local list = of[experiment.axes[i].executor]
    list[#list + 1] = i
  end
  for i, at in ipairs(of[b]) do
    local machine = experiment.specs[at].machine
    if a == "host" and machine.description.probe_s then experiment.specs[at].pace_of = of[a][i] - 1 end
  end
end

--- Prints and writes the comparison; `runs` are of both executors. Returns those of the first.
function against.report(runs, a, b, has_executors)
  local of, list, left_out, names = { [a] = {}, [b] = {} }, {}, {}, {}
  for i, r in ipairs(runs.list) do
    local to = of[r.axes.executor]
    to[#to + 1] = { run = r, at = told.n_runs + i - 1 } -- as runs.jsonl counts
  end
  told.n_runs = told.n_runs + #runs.list
  for _, name in ipairs(runs.axis_names) do
    if name ~= "executor" then names[#names + 1] = name end
  end
  local measured_runs = {}
  for i, m in ipairs(of[a]) do
    local s, label = of[b][i], label_of(m.run, names)
    local rows, why, differ = against.pair(m.run, s.run, a, b)
    if rows then
      list[#list + 1] = { experiment = runs.name, label = label, rows = rows, measured = m.run, simulated = s.run,
                          runs = { m.at, s.at } }
    else
      left_out[#left_out + 1] = { label = label, runs = list_of { m.at, s.at }, why = why }
      if differ then native.differ(runs.name .. ": " .. label .. ": " .. why) end
    end
    measured_runs[i] = m.run
  end
  local text = { string.format("\n%s: measured on %s, simulated on %s\n\n", runs.name, a, b) }
  local said = against.notes(list, a, b)
  for _, one in ipairs(list) do text[#text + 1] = print_run(one) .. "\n" end
  if #list > 0 then text[#text + 1] = print_summary(list, a, b) end
  for _, line in ipairs(said) do text[#text + 1] = "  " .. line .. "\n" end
  for _, one in ipairs(left_out) do
    text[#text + 1] = string.format("  left out: %s: %s\n", one.label, (one.why:gsub("%c", " ")))
  end
  if not native.option("quiet") then print(table.concat(text)) end
  for _, one in ipairs(list) do told.list[#told.list + 1] = one end
  told.text[#told.text + 1] = table.concat(text)
  told.experiments[#told.experiments + 1] = as_table(runs.name, list, left_out, said)
  native.write("against.txt", table.concat(told.text))
  local all = { measured = a, simulated = b, experiments = list_of(told.experiments) }
  native.write("against.json", json(all, "") .. "\n")
  write_csv()
  if #told.list > 0 then draw(a, b) end
  for _, r in ipairs(runs.list) do r.spec = nil end
  return runs_of(runs, measured_runs, a, has_executors)
end

return against
