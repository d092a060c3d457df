#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# moelab run --against: the same runs on two executors, phase by phase.
. "$(dirname "$0")/lib.sh"
mkdir "$work/here" && cd "$work/here" || exit 99
cat >two.lua <<'EOF'
local moe = require "moelab"
local r = moe.experiment {
  name = "two", model = { layers = 2, experts = 8, top_k = 2, shared = 1, d_model = 128, d_expert = 64, n_heads = 2,
                          d_head = 64, precision = "fp32" },
  machine = moe.machine "dgx-h100" { devices = 2 }, tier = "flow",
  workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 16,
                                              tokens_per_request = 20 },
                          batch_per_device = moe.each { 8, 64 }, steps = 1, context = 64 },
  offload = moe.each { "none", "lru" }, repetitions = 3,
}:run()
assert(#r.list == 4) -- a scenario's own tables have what was measured
EOF
run_expect 2 'against flow: expected --machine with another executor' "$moelab" run two.lua --against flow
run_expect 2 'against flow: expected --machine with another' "$moelab" run two.lua --against flow --machine flow
run_expect 2 'both measure, each on hardware of its own' "$moelab" run two.lua --machine host --against cuda
run_expect 2 'unknown executor|no executor|expected one of' "$moelab" run two.lua --machine flow --against nowhere
run_expect 2 'one of flow|unknown executor|no executor' "$moelab" run two.lua --machine nowhere --against flow
ok "nothing is written" test ! -e results

# The arithmetic, with results made up: files of the prelude, called as it calls them.
cat >made-up.lua <<'EOF'
local function part(name, ...) return assert(loadfile(os.getenv("CORE") .. "/moelab_" .. name .. ".lua"))(...) end
local native = { metrics = function() return { step_s = "s" } end, option = function() end }
local check = part("check", native)
local figures = part("figures", native, check)
local against = part("against", native, check, figures, {}, tostring)
local function near(a, b) assert(a and math.abs(a - b) < 1e-12, tostring(a) .. ", expected " .. tostring(b)) end

-- run(step, spread, more): a result
local function run(step, spread, more)
  local r = { status = "ok", decisions = "1", metrics = { step_s = { mean = step, spread = spread } } }
  for k, v in pairs(more or {}) do r.metrics[k] = { mean = v } end
  return r
end

-- Signed: (simulated - measured) / measured. Phases below 0.2 % of the measured step on both are left out, and those
-- that one of them does not have; what was measured as nothing has no error.
local rows = against.compare(run(10, 0.1, { gate_s = 0.02, dispatch_s = 4, load_s = 0, combine_s = 0.019,
                                            other_s = 1 }),
                             run(8, nil, { gate_s = 0.03, dispatch_s = 5, load_s = 1, combine_s = 0.02 }))
local said = {}
for i, r in ipairs(rows) do said[i] = r.phase end
assert(table.concat(said, " ") == "step gate dispatch load", table.concat(said, " "))
near(rows[1].error, -0.2)
near(rows[1].spread, 0.1)
near(rows[2].error, 0.5)
near(rows[3].error, 0.25)
assert(rows[3].spread == nil and rows[4].error == nil and rows[4].simulated == 1)

-- Pairs: why one cannot be compared.
local bad = { status = "failed", error = "it died" }
local got, why, differ = against.pair(bad, run(1), "host", "flow")
assert(not got and why == "failed on host: it died" and not differ)
got, why = against.pair(run(1), bad, "host", "flow")
assert(not got and why == "failed on flow: it died")
got, why = against.pair(bad, bad, "host", "flow")
assert(not got and why == "failed on host: it died; failed on flow: it died")
local other = run(1)
other.decisions = "2"
got, why, differ = against.pair(run(1), other, "host", "flow")
assert(not got and why:find("decisions 1 on host and 2 on flow", 1, true) and differ)
got, why = against.pair(run(0), run(0), "host", "flow")
assert(not got and why == "a step takes no time")

-- one(label, measured, spread, simulated, more of both)
local function one(label, m, spread, s, more, more_s)
  return { label = label, rows = assert(against.pair(run(m, spread, more), run(s, nil, more_s), "host", "flow")) }
end
-- Spreads are shares of what was measured: 10 +- 1 and 10.9 +- 0.1 are not told apart, 10 and 11.1 are.
local n, wrong = against.orderings { one("a", 10, 0.1, 5), one("b", 10.9, 0.01, 4), one("c", 11.1, 0.01, 6) }
assert(n == 2 and #wrong == 0, n) -- a c, b c
n, wrong = against.orderings { one("a", 10, 0.1, 5), one("b", 10.9, 0.01, 4), one("c", 11.1, 0.01, 4.5) }
assert(n == 2 and #wrong == 1 and wrong[1][1] == "a" and wrong[1][2] == "c", n)
n, wrong = against.orderings { one("c", 11.1, 0.01, 4.5), one("a", 10, 0.1, 5) } -- either way round
assert(n == 1 and #wrong == 1)
for _, list in ipairs { { one("a", 1, 0, 5), one("b", 2, 0, 5) }, { one("a", 2, 0, 5), one("b", 1, 0, 5) } } do
  n, wrong = against.orderings(list) -- what is simulated alike has no order
  assert(n == 1 and #wrong == 1)
end
n = against.orderings { one("a", 1, nil, 1), one("b", 1 + 1e-12, nil, 2) }
assert(n == 0) -- rounding

-- |errors| of steps 0.1, 0.2, 0.4, and 0.3 with an even number; those of experts are of two runs.
local list = { one("a", 10, 0, 11, { experts_s = 2 }, { experts_s = 1 }), one("b", 10, 0, 8),
               one("c", 10, 0, 6, { experts_s = 4 }, { experts_s = 5 }) }
local s = against.summary(list)
assert(#s == 2 and s[1].phase == "step" and s[1].n == 3 and s[2].phase == "experts" and s[2].n == 2)
near(s[1].median, 0.2)
near(s[1].worst.error, -0.4)
near(s[2].median, 0.375)
near(s[2].worst.error, -0.5)
assert(s[1].worst.label == "c" and s[2].worst.label == "a")
list[4] = one("d", 10, 0, 13)
near(against.summary(list)[1].median, 0.25)
assert(#against.summary {} == 0)

-- What an execution cannot say, once each: one GPU, several ranks on one, and nothing where GPUs were as many as ranks.
local function notes(n, virtual)
  local m = { machine = "cuda", devices = n, virtual_ranks = virtual }
  return against.notes({ { measured = m, simulated = { machine = "flow", devices = n } },
                         { measured = m, simulated = { machine = "flow", devices = n } } }, "cuda", "flow")
end
local lines = notes(1, true)
assert(#lines == 1 and lines[1]:find("what is measured is computing and loading", 1, true) and
       lines[1]:find("nothing here is about all-to-all between GPUs", 1, true), lines[1])
lines = notes(8, true)
assert(#lines == 1 and lines[1]:find("Virtual ranks share one GPU", 1, true) and
       lines[1]:find("calibrate --gpu --ranks 8", 1, true), lines[1])
assert(#notes(8, nil) == 0)
EOF
ok "errors, orders and medians of made-up results" env CORE="$top_srcdir/core" "$moelab" run made-up.lua --unsafe

# pairs A B: what is printed and written is what the runs have
pairs()
{
    ok "$1 against $2" "$moelab" run two.lua --machine "$1" --against "$2" --out "$1"
    cp "$work/out" said
    ok "... eight runs" test "$(grep -c '"step_s"' "$1/runs.jsonl")" = 8
    ok "... four comparisons" test "$(grep -c 'offload .*measured .*simulated .*error' said)" = 4
    command -v python3 >/dev/null || { skip "... of figures that the runs have" "no python3"; return; }
    cat >check.py <<'EOF'
import csv, json, sys
runs = {}
for line in open(sys.argv[1] + "/runs.jsonl"):
    r = json.loads(line)
    a = r["axes"]
    label = "batch_per_device %s, offload %s" % (a["workload.batch_per_device"], a["offload"])
    runs[(a["executor"], label)] = r["metrics"]
metric = {"step": "step_s", "attention": "attention_s", "gate": "gate_s", "permute": "permute_s", "load": "load_s",
          "dispatch": "dispatch_s", "experts": "experts_s", "shared experts": "shared_s", "combine": "combine_s",
          "unpermute": "unpermute_s"}
rows = list(csv.DictReader(open(sys.argv[1] + "/against.csv")))
assert {r["experiment"] for r in rows} == {"two"}, rows
assert len({r["run"] for r in rows}) == 4 and sum(r["phase"] == "load" for r in rows) == 2, rows
for r in rows:
    m, s = (runs[(x, r["run"])][metric[r["phase"]]] for x in sys.argv[1:3])
    assert abs(float(r["measured_s"]) / m["mean"] - 1) < 1e-8 and abs(float(r["simulated_s"]) / s["mean"] - 1) < 1e-8, r
    assert abs(float(r["error"]) - (s["mean"] / m["mean"] - 1)) < 1e-4, r
    assert (r["spread"] == "") == ("spread" not in m), r

# against.json has the same to the last digit, names the lines of runs.jsonl, and counts as one would by hand.
lines = [json.loads(line) for line in open(sys.argv[1] + "/runs.jsonl")]
all_ = json.load(open(sys.argv[1] + "/against.json"))
assert [all_["measured"], all_["simulated"]] == sys.argv[1:3] and len(all_["experiments"]) == 1
assert json.load(open(sys.argv[1] + "/manifest.json"))["against"] == {k: all_[k] for k in ("measured", "simulated")}
one = all_["experiments"][0]
assert one["name"] == "two" and one["left_out"] == [] and len(one["runs"]) == 4
flat, errors, steps = [], {}, []
for r in one["runs"]:
    m, s = (lines[i] for i in r["runs"])
    assert (m["axes"].pop("executor"), s["axes"].pop("executor")) == tuple(sys.argv[1:3]) and m["axes"] == s["axes"]
    assert m["decisions"] == s["decisions"] == r["decisions"]
    for p in r["phases"]:
        x, y = m["metrics"][p["metric"]], s["metrics"][p["metric"]]
        assert (p["measured_s"], p["simulated_s"], p.get("spread")) == (x["mean"], y["mean"], x.get("spread")), p
        errors.setdefault(p["phase"], []).append(p["simulated_s"] / p["measured_s"] - 1)
        flat.append((r["label"], p["phase"]))
    x = m["metrics"]["step_s"]
    steps.append((x["mean"], x["mean"] * x.get("spread", 0), s["metrics"]["step_s"]["mean"]))
assert flat == [(r["run"], r["phase"]) for r in rows]
for p in one["summary"]:
    e = sorted(map(abs, errors.pop(p["phase"])))
    assert p["runs"] == len(e) and abs(p["largest"]) == e[-1], p
    assert abs(p["median"] - (e[(len(e) - 1) // 2] + e[len(e) // 2]) / 2) < 1e-12, p
assert not errors
pairs = [(a, b) for i, a in enumerate(steps) for b in steps[i + 1:] if abs(a[0] - b[0]) > max(a[1], b[1])]
agree = sum((a[0] - b[0]) * (a[2] - b[2]) > 0 for a, b in pairs)
o = one["orderings"]
assert (o["pairs"], o["agree"], len(o["disagree"])) == (len(pairs), agree, len(pairs) - agree), o
said = open("said").read()
assert "%d pairs of runs differ on %s by more than their spread; %d of them" % (len(pairs), sys.argv[1], agree) in said
assert said.count("    not so: ") == len(pairs) - agree and all("  " + n in said for n in one["notes"])
EOF
    ok "... of figures that the runs have" python3 check.py "$1" "$2"
    ok "... orders are counted" grep -Eq "[0-9]+ pairs of runs differ on $1 by more than their spread" said
    ok "... what is printed is kept" diff <(sed '$d' said) "$1/against.txt"
    ok "... and drawn" grep -q 'against.dat' "$1/against.gp"
}

if "$moelab" machine show dgx-h100 >/dev/null && [ -x "$top_builddir/hw/moelab-simgrid" ]; then
    pairs flow simgrid
    ok "nothing to say of what was not measured" grep -q '"notes": \[\]' flow/against.json
    ok "two models of one machine agree" grep -Eq '^ *step +4 +0\.[0-9] %' said
fi
if [ -e "$top_builddir/hw/host.so" ] && command -v mpirun >/dev/null; then
    export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0 # MPI's, from code that is no longer loaded
    pairs host flow
    ok "... with what one computer cannot say" grep -q 'nothing here is about a network between hosts' said
    ok "... and nothing of precision, which is the same" test "$(grep -c 'fp32' said)" = 0
    run_expect 0 'flow has a model of precision bf16, weight_bytes 2, act_bytes 2, combine_bytes 2; machine host' \
        "$moelab" run two.lua --machine host --against flow --out bf16 --set model.precision=bf16
    sed -i 's/^assert.*//' two.lua
    run_expect 0 'were started by "mpirun --oversubscribe"' env MOELAB_MPIRUN="mpirun --oversubscribe" \
        "$moelab" run two.lua --machine flow --against host --out order --set offload=none
    run_expect 0 'Machine host had one rank: nothing was exchanged' \
        "$moelab" run two.lua --machine host --against flow --out alone --set machine.devices=1
    ok "quiet is quiet" "$moelab" run two.lua --machine host --against flow --out q --quiet
    ok "... but for warnings" test ! -s "$work/out"
fi

# Policies that decide by what they run on. other NAME BODY: a placement of all experts on device 0, where BODY sees
# whether this is the second executor: a rank, or another process than the first that asked.
other()
{
    cat >"$1.c" <<EOF
#include <moelab.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
struct state { const struct moe_env *env; };
static int init(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    ((struct state *)self)->env = env;
    return 0;
}
static bool is_second(void)
{
    const char *seen = getenv("SEEN");
    long pid = 0;
    FILE *f = seen ? fopen(seen, "r") : NULL;
    if (f) {
        if (fscanf(f, "%ld", &pid) != 1)
            abort();
        fclose(f);
    } else if (seen && (f = fopen(seen, "w"))) {
        fprintf(f, "%ld", pid = (long)getpid());
        fclose(f);
    }
    return seen ? pid != (long)getpid() : getenv("OMPI_COMM_WORLD_RANK") != NULL;
}
static int place(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct moe_env *env = ((struct state *)self)->env;
    int device = 0;
    (void)stats;
    $2
    for (int l = 0; l < env->model->n_layers; l++)
        for (int e = 0; e < env->model->n_experts; e++)
            env->host->place(env, out, l, e, device, 1);
    return 0;
}
const struct moe_plugin moe_plugin = {
    .abi = MOE_ABI, .size = sizeof(struct moe_plugin), .kind = MOE_PLACEMENT, .name = "$1", .summary = "broken",
    .source = "this test", .state_size = sizeof(struct state), .init = init, .ops.placement = { .place = place },
};
EOF
    "${CC:-cc}" -shared -fPIC -I"$top_srcdir/core" -o "$1.so" "$1.c" || exit 99
    # Two experiments, whose files are the same ones.
    cat >"$1.lua" <<EOF
local moe = require "moelab"
for i, placements in ipairs { { "contiguous", "$1" }, { "round-robin" } } do
  local r = moe.experiment {
    name = "part " .. i, model = { layers = 2, experts = 8, top_k = 2, d_model = 128, d_expert = 64, n_heads = 2,
                                   d_head = 64, precision = "fp32" },
    machine = moe.machine "dgx-h100" { devices = 2 },
    workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 4,
                                                tokens_per_request = 20 },
                            batch_per_device = 8, steps = 1, context = 64 },
    placement = moe.each(placements),
  }:run()
  assert(#r.list == #placements and #r.axis_names == 1) -- executors are no axis of this scenario
end
EOF
}
export MOELAB_PLUGIN_PATH=$work/here
other differs 'device = is_second();'
other dies 'if (is_second()) abort();'
# broken A B: what is printed, written, and how it ends
broken()
{
    rm -f "$work/seen"
    run_expect 1 "^moelab: part 1: placement differs: decisions ([0-9a-f]{16}) on $1 and [0-9a-f]{16} on $2: a policy" \
        "$moelab" run differs.lua --machine "$1" --against "$2" --out "differs-$2" --jobs 1
    cp "$work/err" said
    ok "... and says where all are" grep -q "some runs cannot be compared; all are in differs-$2" said
    rm -f "$work/seen"
    run_expect 1 "left out: placement dies: failed on $2: .*(abort|Abort|signal 6)" \
        "$moelab" run dies.lua --machine "$1" --against "$2" --out "dies-$2" --jobs 1
    command -v python3 >/dev/null || { skip "... and others are compared" "no python3"; return; }
    cat >left.py <<'EOF'
import csv, json, sys
kind, a, b = sys.argv[1:]
name = kind + "-" + b
lines = [json.loads(line) for line in open(name + "/runs.jsonl")]
o = json.load(open(name + "/against.json"))
first, second = o["experiments"]
assert [first["name"], second["name"]] == ["part 1", "part 2"], o
assert [r["label"] for r in first["runs"]] == ["placement contiguous"]
assert [r["label"] for r in second["runs"]] == ["placement round-robin"] and second["left_out"] == []
left, = first["left_out"]
assert left["label"] == "placement " + kind
for r, want in ((first["runs"][0], "contiguous"), (left, kind), (second["runs"][0], "round-robin")):
    for i, executor in zip(r["runs"], (a, b)):
        assert lines[i]["run"] == i and lines[i]["axes"] == {"executor": executor, "placement": want}, (r, lines[i])
if kind == "differs":
    x, y = (lines[i]["decisions"] for i in left["runs"])
    assert x != y and "decisions %s on %s and %s on %s" % (x, a, y, b) in left["why"], left
else:
    assert left["why"].startswith("failed on %s: " % b) and lines[left["runs"][1]]["status"] == "failed", left
rows = [r for r in csv.DictReader(open(name + "/against.csv")) if r["phase"] == "step"]
assert [(r["experiment"], r["run"]) for r in rows] == [("part 1", "placement contiguous"),
                                                       ("part 2", "placement round-robin")], rows
text = open(name + "/against.txt").read()
assert text.count("measured on %s, simulated on %s" % (a, b)) == 2 and text.count("left out: placement " + kind) == 1
assert len([r for r in open(name + "/against.dat") if not r.startswith("#")]) == 2
EOF
    for kind in differs dies; do
        ok "... of $kind, the others are compared, experiment by experiment" python3 left.py $kind "$1" "$2"
    done
}
if [ -x "$top_builddir/hw/moelab-simgrid" ]; then
    export SEEN=$work/seen
    broken flow simgrid
    unset SEEN
fi
if [ -e "$top_builddir/hw/host.so" ] && command -v mpirun >/dev/null; then
    broken flow host
fi
plan
