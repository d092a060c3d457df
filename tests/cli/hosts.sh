#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Machine host on several hosts: two network namespaces of this computer, with a bridge between them whose speed is
# known. Skipped where namespaces, virtual links or traffic control are not permitted.
. "$(dirname "$0")/lib.sh"
[ -e "$top_builddir/hw/host.so" ] || skip_all "built without MPI or OpenBLAS"
command -v mpirun >/dev/null || skip_all "no mpirun"
command -v ip >/dev/null && command -v tc >/dev/null || skip_all "no ip or tc (iproute2)"
unshare --uts true 2>/dev/null || skip_all "not permitted here: unshare --uts"
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0 # MPI's, from code that is no longer loaded
export TMPDIR=$work
cd "$work" || exit 99

id=ml$((BASHPID % 100000))
net=10.$((BASHPID / 250 % 200 + 20)).$((BASHPID % 250))
remove()
{
    for i in 1 2; do
        ip link del "${id}v$i"
        ip netns del "${id}h$i"
    done
    ip link del "${id}b"
    rm -rf --one-file-system "$work"
} 2>/dev/null
trap remove EXIT
build()
{
    ip link add "${id}b" type bridge && ip addr add "$net.254/24" dev "${id}b" && ip link set "${id}b" up || return
    for i in 1 2; do
        ip netns add "${id}h$i" && ip link add "${id}v$i" type veth peer name eth0 netns "${id}h$i" &&
            ip link set "${id}v$i" master "${id}b" up && ip -n "${id}h$i" addr add "$net.$i/24" dev eth0 &&
            ip -n "${id}h$i" link set eth0 up && ip -n "${id}h$i" link set lo up || return
    done
    tc -n "${id}h1" qdisc add dev eth0 root tbf rate 100mbit burst 32kb latency 100ms &&
        tc -n "${id}h1" qdisc del dev eth0 root
}
build 2>err || skip_all "not permitted here: $(tail -n 1 err)"

cat >agent <<'EOF'
#!/bin/sh
# agent HOST COMMAND...: what ssh is to mpirun, for network namespaces; under a name of its own, which the names of
# Open MPI's files are made of
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host && $*"
EOF
chmod +x agent
export MOELAB_MPIRUN="mpirun --mca plm_rsh_agent $work/agent --mca plm_rsh_no_tree_spawn 1 --host ${id}h1,${id}h2
    --mca oob_tcp_if_include $net.0/24 --mca btl_tcp_if_include $net.0/24 --mca btl tcp,self"
cat >two.lua <<'EOF'
local moe = require "moelab"
moe.experiment {
  model = { layers = 2, experts = 8, top_k = 2, d_model = 512, d_expert = 64, n_heads = 1, d_head = 64,
            precision = "fp32" },
  machine = moe.machine "star-50GBps" { nodes = 2 }, executor = "host", verify = true, repetitions = 3,
  workload = moe.decode { trace = moe.synth { layers = 2, experts = 8, top_k = 2, requests = 16,
                                              tokens_per_request = 20 },
                          batch_per_device = 128, steps = 1, context = 64 },
}:run()
EOF

# figure DIR METRIC: its mean
figure() { sed -n "s/.*\"$2\":{[^}]*\"mean\":\([0-9.e+-]*\).*/\1/p" "$1/runs.jsonl"; }
# rate MBIT: of what either host sends
rate()
{
    for i in 1 2; do
        tc -n "${id}h$i" qdisc replace dev eth0 root tbf rate "$1mbit" burst 32kb latency 400ms || exit 99
    done
}
for mbit in 1000 100; do
    rate $mbit
    ok "two hosts, $mbit Mbit/s" "$moelab" run two.lua --out at-$mbit --run-timeout 60
    ok "... verified" grep -Eq '"verified":[1-9][0-9.]*e-' at-$mbit/runs.jsonl
done
# About as many bytes each way; what one host sends takes bytes / 2 / rate, and no less than nine tenths of that.
bytes=$(figure at-100 inter_node_bytes)
ok "bytes crossed the link" test "${bytes%.*}" -gt 500000
ok "no faster than the link" awk -v s="$(figure at-100 a2a_s)" -v b="$bytes" \
    'BEGIN { exit !(s > 0.9 * b / 2 * 8 / 100e6) }'
ok "a slower link takes longer" awk -v slow="$(figure at-100 a2a_s)" -v fast="$(figure at-1000 a2a_s)" \
    'BEGIN { exit !(slow > 2 * fast) }'
same() { [ "$(figure at-100 "$1")" = "$(figure at-1000 "$1")" ]; }
ok "of the same decisions" same routes
run_expect 2 'machine host: no nowhere-to-be-found on PATH' \
    env MOELAB_MPIRUN="nowhere-to-be-found --x" "$moelab" run two.lua
plan
