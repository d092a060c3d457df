#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Ranks that the user starts: mpirun -n 2 moelab run. Rank 0 reads the scenario and writes results, the others follow.
. "$(dirname "$0")/lib.sh"
[ -e "$top_builddir/hw/host.so" ] || skip_all "built without MPI or OpenBLAS"
command -v mpirun >/dev/null || skip_all "no mpirun"
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0 # MPI's, from code that is no longer loaded
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_MCA_mpi_yield_when_idle=1
scenario=$top_srcdir/tests/cli/host.lua
cd "$work" || exit 99

# figures FILE REGEX: what each run has of it, sorted
figures() { grep -Eo "$2" "$1/runs.jsonl" | sort; }
hashes() { figures "$1" '"decisions":"[0-9a-f]+"'; }

ok "the scenario on ranks of our own" "$moelab" run "$scenario" --out own
ok "... and on the user's" mpirun -n 2 "$moelab" run "$scenario" --out led
ok "four runs verified by each" test "$(figures own '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 4 -a \
    "$(figures led '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 4
hashes own >own.txt
hashes led >led.txt
ok "the same decisions" diff own.txt led.txt
ok "the same results directory" diff <(cd own && find . -type f | sort) <(cd led && find . -type f | sort)
run_expect 2 '3 MPI ranks, expected one for each of the 2 devices' mpirun -n 3 "$moelab" run "$scenario" --out three
ok "nothing is written" test ! -e three
ok "a simulation is rank 0's alone" mpirun -n 2 "$moelab" run "$scenario" --machine flow --allow-extrapolation \
    --out flow
hashes flow >flow.txt
ok "... and decides the same" diff flow.txt own.txt
run_expect 0 'measured on host, simulated on flow' mpirun -n 2 "$moelab" run "$scenario" --machine host \
    --against flow --allow-extrapolation --out both
run_expect 2 'nowhere.lua' mpirun -n 2 "$moelab" run nowhere.lua
run_expect 2 'calibrate: this is an MPI rank already' mpirun -n 1 "$moelab" calibrate --out m.lua

# one NAME KEYS: a scenario
one()
{
    cat >"$1.lua" <<EOF
local moe = require "moelab"
moe.experiment {
  name = "$1",
  model = { layers = 2, experts = 8, top_k = 2, d_model = 16, d_expert = 8, n_heads = 1, d_head = 16 },
  machine = moe.machine "star-50GBps" { nodes = 2 }, executor = "host", verify = true,
  workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 4,
                                              tokens_per_request = 60 },
                          batch_per_device = 8, steps = 3 },
  $2
}:run()
EOF
}

# policy NAME BODY [FILE]: a placement whose place() is BODY and then puts every expert on device `device`
policy()
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
    const char *given = getenv("OMPI_COMM_WORLD_RANK");
    int device = 0, rank = given ? atoi(given) : 0;
    (void)stats; (void)rank;
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
    "${CC:-cc}" -shared -fPIC -I"$top_srcdir/core" -o "${3:-.}/$1.so" "$1.c" || exit 99
}

# A policy that fails on one rank fails the run on all, with its number, and the runs after it go on.
export MOELAB_PLUGIN_PATH=$work
policy picky 'if (rank == 1) return env->host->fail(env, MOE_EINVAL, "not on this rank");'
one fails 'placement = moe.each { "picky", "contiguous" },'
run_expect 1 'run 1 of "fails" failed: .*rank 1: placement picky: not on this rank' \
    mpirun -n 2 "$moelab" run fails.lua --out fails
ok "... but not the next run" test "$(figures fails '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 1
run_expect 1 'rank 1: .*not on this rank' "$moelab" run fails.lua --out fails2

# A rank that dies ends the others, soon.
policy dies 'if (rank == 1) kill(getpid(), SIGKILL);'
one deadly 'placement = "dies",'
began=$SECONDS
run_expect 137 'process rank 1 .*exited on signal 9' mpirun -n 2 "$moelab" run deadly.lua --out deadly
ok "... within seconds" test $((SECONDS - began)) -lt 20

# A run that does not end within its time fails, with every rank; what was measured before it is kept.
policy stuck 'if (rank == 1) for (;;) usleep(1000);'
one stays 'placement = moe.each { "contiguous", "stuck", "round-robin" },'
run_expect 1 'run 2 of "stays" failed: .*did not end within 8 s \(--run-timeout\)' \
    mpirun -n 2 "$moelab" run stays.lua --out led-stays --run-timeout 8
ok "... the run before it is kept" test "$(figures led-stays '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 1
ok "... the one after it was not begun" grep -q 'not begun: a run before it did not end' led-stays/runs.jsonl
mkdir tmp
run_expect 1 'run 2 of "stays" failed: .*did not end within 8 s' \
    env TMPDIR="$PWD/tmp" "$moelab" run stays.lua --out own-stays --run-timeout 8
ok "... with ranks of our own the others go on" \
    test "$(figures own-stays '"verified":[1-9][0-9.]*e-[0-9]+' | wc -l)" = 2
ok "... no directory of a run is left" test -z "$(ls -d tmp/moelab-* 2>/dev/null)"
sleep 1
ok "... and no rank" test -z "$(pgrep -f "rank $PWD/tmp/moelab-")"

# Ranks that are not the same say so before they begin: another build of a policy, another scenario.
mkdir other
policy twin ''
policy twin 'device = 1;' other
one twins 'placement = "twin",'
run_expect 2 'rank 1 has another placement twin than rank 0: found [0-9a-f]{16}, expected [0-9a-f]{16}' mpirun \
    -n 1 -x MOELAB_PLUGIN_PATH="$work" "$moelab" run twins.lua --out twins : \
    -n 1 -x MOELAB_PLUGIN_PATH="$work/other:$work" "$moelab" run twins.lua --out twins
cp "$moelab" other/moelab && printf '\0' >>other/moelab && ln -s "$top_builddir/hw" "$top_builddir/plugins" other
one same ''
run_expect 2 'rank 1 has another moelab than rank 0' mpirun -n 1 "$moelab" run same.lua --out same : \
    -n 1 other/moelab run same.lua --out same
plan
