#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Hold moelab's routers against those of Hugging Face transformers.

    python3 -m venv VENV && VENV/bin/pip install -r tools/requirements-hf.txt
    VENV/bin/python tools/conform_hf.py [--write-golden tests/data/hf] [--write-doc doc/conformance.md] [NAME...]

Each model's own router module is built with random weights and run on random hidden states [T, H], all in float32.
Its logits [T, E] and correction bias [E] go to `moelab eval router` with the settings that state the same rule. Per
token the sets of experts have to be equal and weights within 1e-5, relative. A token whose sets differ only by experts
with scores closer than a few float32 roundings counts as a tie. Exit 0: all conform; 1: one does not; 2: bad usage.
"""
import argparse
import datetime
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import torch
    import transformers
except ImportError as e:
    print(f"conform_hf.py: {e}; install tools/requirements-hf.txt", file=sys.stderr)
    sys.exit(2)

HIDDEN = 64        # H of the routers
SPREAD = 1.5       # standard deviation of logits
TIE = 2.0 ** -21   # relative gap of scores that float32 sums in another order may turn around
TOLERANCE = 1e-5   # of weights, relative
GOLDEN_TOKENS = 48
ROOT = pathlib.Path(__file__).resolve().parent.parent

TOP_K = "softmax-top-k"
GROUPS = "group-limited-top-k"
SIGMOID = dict(score="sigmoid")
SOFTMAX = dict(score="softmax")
V3 = dict(n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5)
V3_SET = dict(groups=4, top_groups=2, weight_scale=2.5, **SIGMOID)

# model type, class, E, K, settings of its configuration, plugin, settings of the plugin
MODELS = [
    ("mixtral", "MixtralTopKRouter", 8, 2, {}, TOP_K, {}),
    ("qwen2_moe", "Qwen2MoeTopKRouter", 60, 4, dict(norm_topk_prob=False), TOP_K, dict(renormalise=False)),
    ("qwen3_moe", "Qwen3MoeTopKRouter", 64, 8, dict(norm_topk_prob=True), TOP_K, {}),
    ("olmoe", "OlmoeTopKRouter", 64, 8, dict(norm_topk_prob=False), TOP_K, dict(renormalise=False)),
    ("deepseek_v2", "DeepseekV2TopkRouter", 64, 6,
     dict(topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0), GROUPS,
     dict(groups=8, top_groups=3, best_of_group=1, renormalise=False, weight_scale=16.0, **SOFTMAX)),
    ("deepseek_v3", "DeepseekV3TopkRouter", 64, 8, V3, GROUPS, V3_SET),
    ("glm4_moe", "Glm4MoeTopkRouter", 64, 8, V3, GROUPS, V3_SET),
    ("dots1", "Dots1TopkRouter", 64, 6, V3, GROUPS, V3_SET),
    ("switch_transformers", "SwitchTransformersTop1Router", 32, 1, dict(expert_capacity=1 << 20), TOP_K,
     dict(renormalise=False)),
    ("nllb-moe", "NllbMoeTop2Router", 32, 2, dict(moe_eval_capacity_token_fraction=1.0), TOP_K, {}),
    ("gpt_oss", "GptOssTopKRouter", 32, 4, {}, TOP_K, {}),
    ("granitemoe", "GraniteMoeTopKRouter", 40, 8, {}, TOP_K, {}),
    ("jamba", "JambaTopKRouter", 16, 2, {}, TOP_K, dict(renormalise=False)),
    ("minimax", "MiniMaxTopKRouter", 32, 2, {}, TOP_K, {}),
    ("minimax_m2", "MiniMaxM2TopKRouter", 64, 8, {}, GROUPS, SIGMOID),
    ("hunyuan_v1_moe", "HunYuanMoEV1Gate", 16, 2, {}, TOP_K, {}),
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", 64, 6, {}, GROUPS, SOFTMAX),
    ("qwen3_next", "Qwen3NextTopKRouter", 64, 8, dict(norm_topk_prob=True), TOP_K, {}),
    ("exaone_moe", "ExaoneMoeTopkRouter", 64, 8, V3, GROUPS, V3_SET),
    ("solar_open", "SolarOpenTopkRouter", 64, 8, V3, GROUPS, V3_SET),
    ("cohere2_moe", "Cohere2MoeTopKRouter", 64, 8, dict(expert_selection_fn="sigmoid", norm_topk_prob=True), GROUPS,
     SIGMOID),
    ("llama4_text", "Llama4Router", 16, 1, {}, GROUPS, dict(renormalise=False, **SIGMOID)),
]
# Once more with hidden states and the gate's matrix as a tensor: the plugin's own products, its own logits.
OWN_GATE = [
    ("mixtral", "MixtralTopKRouter", 8, 2, {}, "shared-router", {}),
    ("olmoe", "OlmoeTopKRouter", 64, 8, dict(norm_topk_prob=False), "shared-router", dict(renormalise=False)),
]
# Rules that no plugin and no setting of one states: said on the page, never counted as conforming.
UNSTATED = [
    ("phimoe", "PhimoeTopKRouter", "sparsemixer: each choice is weighted by a softmax over near rivals alone"),
]


class Bad(Exception):
    """What the user has to put right."""


def build(model_type, cls, n_experts, k, settings):
    """The model's own router with random weights, and the bias [E] that it adds before it selects, or None."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_topk", "moe_k",
             "hidden_size", "d_model")
    config = transformers.AutoConfig.for_model(model_type)
    values = dict.fromkeys(names[:3], n_experts) | dict.fromkeys(names[3:6], k) | dict.fromkeys(names[6:], HIDDEN)
    for name, value in values.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name, value in settings.items():
        if not hasattr(config, name):
            raise Bad(f"{model_type}: its configuration has no {name}")
        setattr(config, name, value)
    folder = model_type.replace("-", "_").removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    router = getattr(module, cls)(config)
    router.eval()
    bias = None
    for p in router.parameters():
        if p.dim() == 2 and p.shape == (n_experts, HIDDEN):
            torch.nn.init.normal_(p, std=SPREAD / HIDDEN ** 0.5)
        elif p.requires_grad:   # gpt-oss: a bias of the logits
            torch.nn.init.normal_(p, std=0.3)
    for name, p in list(router.named_buffers()) + list(router.named_parameters()):
        if name.endswith("e_score_correction_bias"):
            with torch.no_grad():
                bias = p.normal_(std=0.03).reshape(-1)
    if model_type == "minimax_m2":   # its block keeps the bias and hands it in
        bias = torch.randn(n_experts) * 0.03
    return router, bias


def run(model_type, router, bias, k, hidden):
    """hidden [T, H] -> logits [T, E], ids [T, K], weights [T, K], as the module gives them."""
    with torch.no_grad():
        if model_type == "switch_transformers":
            onehot, probs, logits = router(hidden[None])
            return logits[0], onehot[0].argmax(-1, keepdim=True), probs[0]
        if model_type == "nllb-moe":
            _, combine, logits = router(hidden)
            weights, ids = combine.topk(k, -1)
            return logits, ids, weights
        if model_type == "llama4_text":
            dense, logits = router(hidden)
            weights, ids = dense.topk(k, -1)
            return logits, ids, weights
        out = router(hidden, bias) if model_type == "minimax_m2" else router(hidden)
        logits, weights, ids = out
        return logits, ids, weights


def evaluate(args, plugin, settings, job):
    """`moelab eval router` on one input -> ids [T, K], weights [T, K]."""
    with tempfile.TemporaryDirectory() as d:
        folder = pathlib.Path(d)
        if job["gate"] is None:
            np.save(folder / "logits.npy", np.ascontiguousarray(job["logits"], np.float32))
            data = dict(logits="logits.npy", top_k=job["top_k"])
        else:
            np.save(folder / "hidden.npy", np.ascontiguousarray(job["hidden"], np.float32))
            np.save(folder / "gate.npy", np.ascontiguousarray(job["gate"], np.float32))
            data = dict(hidden="hidden.npy", tensors=dict(gate="gate.npy"), top_k=job["top_k"],
                        n_experts=job["logits"].shape[1])
        if job["bias"] is not None:
            data["bias"] = [float(x) for x in job["bias"]]
        (folder / "in.json").write_text(json.dumps(data))
        command = [args.moelab, "eval", "router", plugin, "--input", str(folder / "in.json"),
                   "--out", str(folder / "out")]
        for key, value in settings.items():
            command += ["--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Bad(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
        shape = (len(job["logits"]), job["top_k"])
        return (np.load(folder / "out/experts.npy").reshape(shape), np.load(folder / "out/weights.npy").reshape(shape))


def by_id(ids, weights):
    order = np.argsort(ids, 1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


def choice_scores(logits, bias, settings):
    """What is sorted, in float64 [T, E], for telling ties."""
    x = logits.astype(np.float64)
    if settings.get("score") == "sigmoid":
        p = 1 / (1 + np.exp(-x))
    else:
        p = np.exp(x - x.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
    return p if bias is None else p + bias


def compare(theirs, ours, scores):
    """(ids, weights) of both, sorted by id -> identical tokens, ties, mismatches, largest error of weights."""
    same = (theirs[0] == ours[0]).all(1)
    ties = 0
    for t in np.flatnonzero(~same):
        a = sorted(scores[t, sorted(set(theirs[0][t]) - set(ours[0][t]))])
        b = sorted(scores[t, sorted(set(ours[0][t]) - set(theirs[0][t]))])
        ties += bool(np.allclose(a, b, rtol=TIE, atol=0))
    error = np.abs(theirs[1][same] - ours[1][same]) / np.abs(theirs[1][same])
    return int(same.sum()), ties, int((~same).sum()) - ties, float(error.max())


def golden(path, about, job, settings, ids, weights):
    """One key a line, so that a test reads it without a JSON parser; %.9g keeps a float32 as it is."""
    real = lambda x: "[" + ",".join("%.9g" % v for v in x) + "]"
    n = GOLDEN_TOKENS
    inner = '"logits": [' + ",".join(real(row) for row in job["logits"][:n]) + '], "top_k": %d' % job["top_k"]
    if job["bias"] is not None:
        inner += ', "bias": ' + real(job["bias"])
    flags = " ".join(f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in settings.items())
    lines = [f'"{k}": {json.dumps(v)}' for k, v in about.items()]
    lines += [f'"settings": {json.dumps(flags)}', f'"top_k": {job["top_k"]}', '"input": {' + inner + "}",
              '"experts": [' + ",".join(map(str, ids[:n].ravel())) + "]", '"weights": ' + real(weights[:n].ravel())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def check(args, row, own_gate=False):
    """One model -> whether it conforms, and its line of the page."""
    model_type, cls, n_experts, k, config, plugin, settings = row
    torch.manual_seed(args.seed)
    router, bias = build(model_type, cls, n_experts, k, config)
    hidden = torch.randn(args.tokens, HIDDEN)
    logits, ids, weights = run(model_type, router, bias, k, hidden)
    if logits.shape != (args.tokens, n_experts) or ids.shape != (args.tokens, k):
        raise Bad(f"{cls}: logits {tuple(logits.shape)}, ids {tuple(ids.shape)}, expected [{args.tokens}, {n_experts}] "
                  f"and [{args.tokens}, {k}]")
    job = dict(logits=logits.numpy(), top_k=k, bias=None if bias is None else bias.numpy(), hidden=hidden.numpy(),
               gate=router.weight.detach().numpy() if own_gate else None)
    theirs = by_id(ids.numpy().astype(np.int64), weights.float().numpy())
    ours = by_id(*evaluate(args, plugin, settings, job))
    same, ties, wrong, error = compare(theirs, ours, choice_scores(job["logits"], job["bias"], settings))
    print(f"{model_type}: {cls}: {plugin}: {same} of {args.tokens} tokens identical, {ties} ties, {wrong} mismatches, "
          f"largest weight error {error:.1e}", flush=True)
    if args.write_golden and not own_gate:
        about = dict(model=model_type, router=cls, transformers=transformers.__version__, torch=torch.__version__,
                     seed=args.seed, dtype="float32", plugin=plugin)
        golden(pathlib.Path(args.write_golden) / f"{model_type}.json", about, job, settings, *theirs)
    text = ", ".join(f"{key} = {str(v).lower() if isinstance(v, bool) else v}" for key, v in settings.items())
    line = (f"| {model_type} | `{cls}` | {n_experts}, {k} | `{plugin}` {text or 'as it is'}"
            f"{'' if bias is None else ', its bias as `bias`'}"
            f"{', its hidden states and `gate.npy`' if own_gate else ''} |"
            f" {args.tokens:,} | {same:,} | {ties} | {wrong} | "
            f"{error:.1e} |")
    return wrong == 0 and error <= TOLERANCE, line


def page(args, lines):
    head = f"""# Conformance with Hugging Face transformers

Written by `tools/conform_hf.py --write-doc`; {datetime.date.today()}, transformers {transformers.__version__}, torch \
{torch.__version__} (CPU), numpy {np.__version__}, seed {args.seed}, float32.

Each model's own router module, with random weights (logits with a standard deviation of {SPREAD}) and, where it has
one, a random correction bias, is run on random hidden states; its logits and that bias go to `moelab eval router`, or,
in the last rows, the hidden states and the gate's matrix, of which the plugin makes logits itself. Sets of experts
are compared token by token. A tie is a token whose sets differ only by experts with scores within 2^-21 of each other,
relative; everything else that differs is a mismatch. The weight error is the largest, relative,
over all weights of the tokens with identical sets; {TOLERANCE:g} is allowed. In `tests/data/hf` are the first
{GOLDEN_TOKENS} tokens of each, which a test checks without Python.

| model | router | E, K | plugin and settings | tokens | identical experts | ties | mismatches | weight error |
|---|---|---|---|---|---|---|---|---|
"""
    tail = "\n\nNot stated by any plugin or setting, and so not compared:\n\n" + "".join(
        f"- {m}, `{c}`: {why}\n" for m, c, why in UNSTATED)
    notes = ("\nSwitch and NLLB are run with a capacity that drops nothing: dropping is a balancer's work "
             "(`capacity`). Models of transformers that are in neither list were not tried.\n")
    pathlib.Path(args.write_doc).write_text(head + "\n".join(lines) + tail + notes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="model types; all without")
    parser.add_argument("--moelab", default=str(ROOT / "moelab"))
    parser.add_argument("--tokens", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write-golden", metavar="DIR")
    parser.add_argument("--write-doc", metavar="FILE")
    args = parser.parse_args()
    unknown = set(args.name) - {row[0] for row in MODELS}
    if unknown:
        raise Bad(f"unknown model {sorted(unknown)[0]}, expected {', '.join(row[0] for row in MODELS)}")
    if args.tokens < GOLDEN_TOKENS:
        raise Bad(f"--tokens: found {args.tokens}, expected {GOLDEN_TOKENS} or more")
    if args.write_doc and args.name:
        raise Bad("--write-doc: the page is of all models, found a list of some")
    rows = [row for row in MODELS if not args.name or row[0] in args.name]
    results = [check(args, row) for row in rows]
    results += [check(args, row, own_gate=True) for row in OWN_GATE if not args.name or row[0] in args.name]
    if args.write_doc:
        page(args, [line for _, line in results])
    return 0 if all(good for good, _ in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Bad, OSError) as e:
        print(f"conform_hf.py: {e}", file=sys.stderr)
        sys.exit(2)
