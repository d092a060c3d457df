#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# tools/capture_hf.py on small models with random weights: a trace that moelab accepts, with the ids that the models'
# experts were called with. Needs a Python with tools/requirements-hf.txt: MOELAB_HF_PYTHON=VENV/bin/python.
. "$(dirname "$0")/lib.sh"
python=${MOELAB_HF_PYTHON:-python3}
"$python" -c 'import numpy, torch, transformers' >"$work/import" 2>&1 ||
    skip_all "no Python with torch and transformers (MOELAB_HF_PYTHON)"
export HF_HUB_OFFLINE=1
capture=$top_srcdir/tools/capture_hf.py

# capture_one MODEL ROWS SHAPE: 3 requests of 16, 17 and 18 tokens read and 4 decoded: 63 tokens in each layer
capture_one()
{
    local out=$work/$1
    run_expect 0 "63 tokens of 3 requests.* $2 rows compared with what the experts were given, 0 differ" \
        "$python" "$capture" --random "$1" --requests 3 --prompt-tokens 16 --decode 4 --hidden 20 "$out"
    run_expect 0 "ok: 63 tokens x $3" "$moelab" trace check "$out"
    ok "$1: trace.json says what was prefill" grep -Pzoq '"prefill": \[\s*16,\s*17,\s*18\s*\]' "$out/trace.json"
    # Decoding is in pieces, so the rows have to be in the order of the requests; and gates are those of the layers.
    ok "$1: hidden states times gates are the logits, in order" "$python" "$work/order.py" "$out"
}

cat >"$work/order.py" <<'EOP'
import sys
import numpy as np
d = sys.argv[1]
a = {n: np.load(f"{d}/{n}.npy") for n in ("hidden", "gate", "logits", "positions", "offsets")}
assert a["hidden"].shape[0] == 20
error = np.abs(np.einsum("nld,led->nle", a["hidden"], a["gate"]) - a["logits"][:20]).max()
assert error < 1e-4 and a["logits"].std() > 0.1, error
assert a["offsets"].tolist() == [0, 20, 41, 63] and a["positions"][[0, 19, 20, 62]].tolist() == [0, 19, 0, 21]
EOP
capture_one mixtral 189 '3 layers x top 2 of 8 experts'
run_expect 0 '189 of 189 rows hold the top 2' "$moelab" trace check "$work/mixtral"
capture_one olmoe 189 '3 layers x top 8 of 64 experts'
run_expect 0 '189 of 189 rows hold the top 8' "$moelab" trace check "$work/olmoe"
capture_one deepseek_v3 126 '2 layers x top 4 of 32 experts'

run_expect 2 'LlamaForCausalLM: found no router' "$python" "$capture" --random llama "$work/llama"
ok "nothing is left of a model without routers" test ! -e "$work/llama" -a ! -e "$work/llama.part"
run_expect 2 'is there already' "$python" "$capture" --random olmoe "$work/olmoe"
run_expect 2 'requests: found 0, expected 1 or more' "$python" "$capture" --random olmoe --requests 0 "$work/none"
plan
