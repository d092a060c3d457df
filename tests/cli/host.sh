#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Two MPI ranks run the same task graphs as the simulated machines, and what they compute is right.
. "$(dirname "$0")/lib.sh"
[ -e "$top_builddir/hw/host.so" ] || skip_all "built without MPI or OpenBLAS"
command -v mpirun >/dev/null || skip_all "no mpirun"
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0 # MPI's, from code that is no longer loaded
scenario=$top_srcdir/tests/cli/host.lua
cd "$work" || exit 99

# figures FILE REGEX: what each run has of it, sorted
figures() { grep -Eo "$2" "$1/runs.jsonl" | sort; }

ok "layers that ranks compute equal the reference" "$moelab" run "$scenario" --out host --jobs 1
# Not 0: ranks compute in single precision with OpenBLAS, the reference in double.
ok "every run was verified" test "$(figures host '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 4
ok "by machine host" test "$(figures host '"machine":"host"' | wc -l)" = 4
# A tenth of a GFLOP: 20 us would be 5 TFLOP/s of one thread. And no clock says the same four times.
figures host '"probe_s":[0-9.e-]+' | cut -d: -f2 >probes
ok "probes that compute" test "$(awk '$1 > 2e-5 && $1 < 1' probes | wc -l)" = 4
ok "... each of its own time" test "$(uniq probes | wc -l)" = 4

run_expect 2 'host.lua:[0-9]+: model gemm: rows of a weight matrix: 48 is outside .*64 to .*--allow-extrapolation' \
    "$moelab" run "$scenario" --machine flow --out flow
ok "nothing is written" test ! -e flow
ok "the same scenario, simulated" "$moelab" run "$scenario" --machine flow --out flow --allow-extrapolation
ok "every result is marked" \
    test "$(figures flow '"extrapolated":\["model gemm: rows of a weight matrix: 48 ' | wc -l)" = 4
figures host '"decisions":"[0-9a-f]+"' >host.decisions
figures flow '"decisions":"[0-9a-f]+"' >flow.decisions
ok "four hashes of decisions" test "$(wc -l <host.decisions)" = 4
ok "the same decisions on both" diff host.decisions flow.decisions
ok "by machine flow, which verifies nothing" test "$(figures flow '"(machine":"flow"|verified)"?' | wc -l)" = 4

# one FILE KEYS: a scenario with one run
one()
{
    cat >"$1.lua" <<EOF
local moe = require "moelab"
moe.experiment {
  model = { layers = 2, experts = 8, top_k = 2, d_model = 16, d_expert = 8, n_heads = 1, d_head = 16 },
  machine = moe.machine "star-50GBps" { nodes = 2 }, executor = "host", verify = true,
  workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 4,
                                              tokens_per_request = 60 },
                          batch_per_device = 8, steps = 6 },
  $2
}:run()
EOF
}

one moving 'placement = moe.plugin("eplb", { replicas = 12, interval = 2 }),'
ok "replicas, and weights that move" "$moelab" run moving.lua --out moving
ok "moved" test "$(figures moving '"migration_s":\{"max":[0-9.]*[1-9]' | wc -l)" = 1
one three 'machine = moe.machine "star-50GBps" { nodes = 3 },'
ok "three ranks" "$moelab" run three.lua
one nodes 'machine = moe.machine "h800-ib" { nodes = 2, devices = 2 }, dispatch = "node-dedup",'
ok "tokens passed on within nodes" "$moelab" run nodes.lua --out nodes
ok "... arrive as they were" test "$(figures nodes '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 1
one offload 'offload = moe.each { "lru", "belady" }, cache = moe.each { 0.125, 0.5 },'
ok "experts loaded from files, in the slots of others" "$moelab" run offload.lua --out offload
ok "... are what they are" test "$(figures offload '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 4
ok "... and their way is timed" test "$(figures offload '"load_s":\{"max":[0-9.e-]*[1-9]' | wc -l)" = 4
ok "several times" test "$(figures offload '"step_s":\{[^}]*"spread":[0-9.]+' | wc -l)" = 4
if [ -d /dev/shm ] && [ -w /dev/shm ]; then # a file system that is all cache: nothing can be read past that
    ok "experts in memory are copied from the mapping" env TMPDIR=/dev/shm "$moelab" run offload.lua --out mapped
    ok "... as they are" test "$(figures mapped '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 4
fi
ok "no file is left" test -z "$(ls "${TMPDIR:-/tmp}" | grep moelab-experts)"
run_expect 2 'cannot make /nowhere/moelab-' env TMPDIR=/nowhere "$moelab" run offload.lua
one lua 'placement = moe.policy { kind = "placement", name = "mine", place = function() end },'
run_expect 2 'lua\.lua:2: machine host: placement mine is written in Lua' "$moelab" run lua.lua
one many 'machine = moe.machine "star-50GBps" { nodes = 300 },'
run_expect 2 'machine host: 300 devices, expected at most 256' "$moelab" run many.lua
one plain ''
run_expect 2 'no mpirun on PATH' env PATH=/nowhere "$moelab" run plain.lua
run_expect 2 'PMIX_RANK is set, so this is a rank already' env PMIX_RANK=0 "$moelab" run plain.lua
run_expect 2 'moelab rank: expected SPEC RESULT' "$moelab" rank

# placement NAME BODY: a policy whose place() is BODY and then puts every expert on device 0
placement()
{
    cat >"$1.c" <<EOF
#include <moelab.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>
struct state { const struct moe_env *env; };
static int init(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    ((struct state *)self)->env = env;
    return 0;
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
    one "$1" "placement = \"$1\","
}
export MOELAB_PLUGIN_PATH=$work
placement on-one ''
ok "a device without experts" "$moelab" run on-one.lua

# What mpirun says between lines of dashes is not for the user, who has not called it, unless nobody else says a word.
# told N: the last command said N lines, the last of which counts failed runs, and none of them is mpirun's. Without
# /sys, as in a chroot, hwloc complains in every process.
told()
{
    ok "... in $1 lines, without mpirun's own" test "$(grep -vc '^\[hwloc/' err)" = "$1" -a \
        "$(grep -Eci -- '-----|primary job|mpirun|MPI_ABORT|orte' err)" = 0
}
rank='const char *rank = getenv("OMPI_COMM_WORLD_RANK");' # NULL in the process that counts what ranks will hold
placement dies "$rank if (rank && *rank == 49) kill(getpid(), SIGKILL);"
run_expect 1 'dies.lua:2: machine host: the ranks ended without a result: rank 1 was ended by signal 9 \(Killed\)' \
    "$moelab" run dies.lua
told 2
placement aborts "$rank if (rank && *rank == 49) abort();"
run_expect 1 'aborts.lua:2: .*: rank 1 was ended by signal 6 \(Aborted\)' "$moelab" run aborts.lua
ok "... without mpirun's own" test "$(grep -Ec -- '-----|noticed' err)" = 0 # handlers may have printed more
placement leaves "$rank if (rank && *rank == 49) _exit(3);"
run_expect 1 'leaves.lua:2: .*: rank 1 ended with exit code 3' "$moelab" run leaves.lua
told 2
placement speaks "$rank if (rank && *rank == 49) { write(2, \"my last words\\n\", 14); _exit(3); }"
run_expect 1 '^my last words' "$moelab" run speaks.lua
told 3
placement differs "$rank device = rank && *rank == 49;" # on device 1 for rank 1 alone
run_expect 1 'rank 1 decided otherwise than rank 0' "$moelab" run differs.lua
told 2
placement crashes 'kill(getpid(), SIGKILL);'
run_expect 1 'placement crashes, in place: crashed: Killed' "$moelab" run crashes.lua
told 2

# An mpirun that does not come to start a rank.
mkdir bin
line=$(printf -- '-%.0s' {1..74})
printf '#!/bin/sh\nprintf "%%s\\n" "%s" "There are not enough slots available" "for two." "%s" >&2\nexit 1\n' \
    "$line" "$line" >bin/mpirun
chmod +x bin/mpirun
run_expect 1 'plain.lua:2: .*: There are not enough slots available' env PATH="$work/bin:$PATH" "$moelab" run plain.lua
ok "... and the rest of what it said" test "$(grep -c "^for two" err)" = 1
plan
