#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Capture the routing of a mixture-of-experts model of Hugging Face transformers as a moelab trace.

    python3 -m venv VENV && VENV/bin/pip install -r tools/requirements-hf.txt
    VENV/bin/python tools/capture_hf.py --random olmoe OUT        # a small model with random weights; no network
    VENV/bin/python tools/capture_hf.py --model ID_OR_DIR --prompts FILE OUT

Routers are found by what they are and what they return: modules whose class is named ...Router or ...Gate, that have
`top_k`, and whose output is (logits [T, E], weights [T, K], ids [T, K]). Each gets a forward hook; the expert module
beside it gets one before its forward, and the ids that it is called with have to be those captured. A request is one
prompt, read in one forward pass (prefill), and then --decode tokens, one pass each, the likeliest every time.

Written (N tokens, L MoE layers, E experts, K chosen, R requests, D hidden width):
    experts.npy u1|u2 [N, L, K] by falling weight   weights.npy   f4 [N, L, K]   logits.npy f4 [N, L, E]
    token_ids.npy i4 [N]   positions.npy i4 [N]     offsets.npy   i8 [R+1]
    hidden.npy f4 [--hidden, L, D] and gate.npy f4 [L, E, D], with --hidden
    trace.json  also "prefill": how many of each request's tokens were prefill; the others were decoded

Exit 0: captured; 1: captured ids are not those that the experts were given; 2: bad usage, or no router found.
"""
import argparse
import datetime
import json
import pathlib
import shutil
import sys

try:
    import numpy as np
    import torch
    import transformers
except ImportError as e:
    print(f"capture_hf.py: {e}; install tools/requirements-hf.txt", file=sys.stderr)
    sys.exit(2)

SMALL = dict(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.1)
RANDOM = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "olmoe": dict(num_experts=64, num_experts_per_tok=8),
    "deepseek_v3": dict(n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=32,
                        first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=32, kv_lora_rank=32,
                        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16),
    "llama": {},  # has no router: to see what is said of that
}


class Bad(Exception):
    """What the user has to put right."""


class Layer:
    """One router: what it gave in the pass that is under way, and all that it gave before."""

    def __init__(self, name, router):
        self.name, self.router = name, router
        self.logits, self.weights, self.ids, self.hidden = [], [], [], []
        self.compared = self.different = 0

    def routed(self, module, args, output):
        """Forward hook of the router; args[0] is [T, D] or [1, T, D]."""
        if not (isinstance(output, tuple) and len(output) == 3 and all(torch.is_tensor(x) for x in output)):
            raise Bad(f"{self.name} ({type(module).__name__}): found an output other than (logits, weights, ids)")
        logits, weights, ids = output
        if (ids.dim() != 2 or logits.dim() != 2 or ids.shape != weights.shape or ids.is_floating_point()
                or len(ids) != len(logits)):
            raise Bad(f"{self.name} ({type(module).__name__}): found logits {tuple(logits.shape)}, weights "
                      f"{tuple(weights.shape)}, ids {tuple(ids.shape)}, expected [T, E], [T, K], [T, K]")
        self.logits.append(logits.float().cpu().numpy())
        self.weights.append(weights.float().cpu().numpy())
        self.ids.append(ids.cpu().numpy())
        self.hidden.append(args[0].reshape(-1, args[0].shape[-1]).float().cpu().numpy())

    def used(self, module, args, kwargs):
        """Before the experts run: the ids [T, K] that they are called with."""
        for x in list(args) + list(kwargs.values()):
            if torch.is_tensor(x) and not x.is_floating_point() and x.dim() == 2:
                same = x.shape == self.ids[-1].shape and (np.sort(x.cpu().numpy()) == np.sort(self.ids[-1])).all(-1)
                self.compared += len(self.ids[-1])
                self.different += int((~np.broadcast_to(same, len(self.ids[-1]))).sum())
                return


def attach(model):
    """Hooks on every router, in the order of the layers -> [Layer]."""
    modules = dict(model.named_modules())
    layers = []
    for name, module in modules.items():
        if type(module).__name__.endswith(("Router", "Gate")) and isinstance(getattr(module, "top_k", None), int):
            layer = Layer(name, module)
            module.register_forward_hook(layer.routed)
            experts = modules.get(name.rpartition(".")[0] + ".experts")
            if experts is not None:
                experts.register_forward_pre_hook(layer.used, with_kwargs=True)
            layers.append(layer)
    if not layers:
        raise Bad(f"{type(model).__name__}: found no router: no module of a class named ...Router or ...Gate that has "
                  "top_k")
    return layers


def load(args):
    """-> model, its name, a tokenizer or None."""
    if args.random:
        torch.manual_seed(args.seed)
        config = transformers.AutoConfig.for_model(args.random, **(SMALL | RANDOM[args.random]))
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, buffer in model.named_buffers():  # all 0 without training, and then nothing would come of it
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.03)
        return model.eval(), f"{args.random}, random weights, seed {args.seed}", None
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model) if args.prompts else None
    except (OSError, ValueError) as e:
        raise Bad(f"{args.model}: {e}") from None
    return model.eval(), args.model, tokenizer


def requests(args, model, tokenizer):
    """Token ids of each prompt: those of --prompts, a line each, or random ones."""
    if args.prompts:
        if tokenizer is None:
            raise Bad("--prompts: a model with random weights has no tokenizer")
        found = [tokenizer(line)["input_ids"] for line in pathlib.Path(args.prompts).read_text().splitlines() if line]
        if not found:
            raise Bad(f"{args.prompts}: found no line, expected one prompt a line")
        return found
    generator = torch.Generator().manual_seed(args.seed)
    draw = lambda n: torch.randint(model.config.get_text_config().vocab_size, (n,), generator=generator).tolist()
    return [draw(args.prompt_tokens + i % 3) for i in range(args.requests)]


def read(model, prompt, n_decode):
    """One request through the model -> the ids of all tokens that entered it."""
    ids, cache = list(prompt), None
    feed = torch.tensor([prompt])
    for step in range(n_decode + 1):
        with torch.no_grad():
            out = model(feed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        feed = out.logits[:, -1:].argmax(-1)
        if step < n_decode:
            ids.append(int(feed))
    return ids


def arrays(layers, lengths, tokens, n_hidden):
    """What the trace holds, by file."""
    n = sum(lengths)
    experts, weights, logits = [], [], []
    for layer in layers:
        ids, w, x = (np.concatenate(a) for a in (layer.ids, layer.weights, layer.logits))
        if len(ids) != n:
            raise Bad(f"{layer.name}: found routes of {len(ids)} tokens, expected {n}")
        order = np.argsort(-w, 1, kind="stable")
        experts.append(np.take_along_axis(ids, order, 1))
        weights.append(np.take_along_axis(w, order, 1))
        logits.append(x)
        if x.shape != logits[0].shape or ids.shape != experts[0].shape:
            raise Bad(f"{layer.name}: found {x.shape[1]} experts, {ids.shape[1]} chosen, expected "
                      f"{logits[0].shape[1]} and {experts[0].shape[1]} as in {layers[0].name}")
    out = dict(experts=np.stack(experts, 1).astype(np.uint8 if logits[0].shape[1] <= 256 else np.uint16),
               weights=np.stack(weights, 1).astype(np.float32), logits=np.stack(logits, 1).astype(np.float32),
               token_ids=np.array(tokens, np.int32), offsets=np.cumsum([0] + lengths).astype(np.int64),
               positions=np.concatenate([np.arange(m) for m in lengths]).astype(np.int32))
    if n_hidden:
        gates = [getattr(layer.router, "weight", None) for layer in layers]
        out["hidden"] = np.stack([np.concatenate(layer.hidden)[:n_hidden] for layer in layers], 1)
        if all(g is not None and g.shape == (logits[0].shape[1], out["hidden"].shape[2]) for g in gates):
            out["gate"] = np.stack([g.detach().float().numpy() for g in gates])
    return out


def write(folder, data, meta):
    """All of it, or nothing."""
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True)
    try:
        for name, array in data.items():
            np.save(part / f"{name}.npy", np.ascontiguousarray(array))
        (part / "trace.json").write_text(json.dumps(meta, indent=2) + "\n")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part)
        raise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--random", choices=sorted(RANDOM), help="a small model of this shape with random weights")
    what.add_argument("--model", help="an id of the hub, or a directory")
    parser.add_argument("--prompts", help="text, one prompt a line; without it random token ids")
    parser.add_argument("--requests", type=int, default=8, help="how many random prompts")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of a random prompt, and up to 2 more")
    parser.add_argument("--decode", type=int, default=8, help="tokens after each prompt")
    parser.add_argument("--hidden", type=int, default=0, help="keep what enters the routers, for so many tokens")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, least in (("requests", 1), ("prompt_tokens", 1), ("decode", 0), ("hidden", 0)):
        if getattr(args, name) < least:
            raise Bad(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected {least} or more")
    if args.out.exists():
        raise Bad(f"{args.out}: is there already")
    model, name, tokenizer = load(args)
    layers = attach(model)
    prompts = requests(args, model, tokenizer)
    runs = [read(model, prompt, args.decode) for prompt in prompts]
    lengths = [len(ids) for ids in runs]
    data = arrays(layers, lengths, sum(runs, []), args.hidden)
    n, n_layers, k = data["experts"].shape
    compared, different = (sum(getattr(layer, x) for layer in layers) for x in ("compared", "different"))
    meta = dict(model=name, layers=n_layers, experts=data["logits"].shape[2], top_k=k, requests=len(runs), tokens=n,
                prefill=[len(p) for p in prompts], router=type(layers[0].router).__name__,
                routers=[layer.name for layer in layers], captured=str(datetime.date.today()),
                source=f"tools/capture_hf.py, transformers {transformers.__version__}, torch {torch.__version__}",
                rows_compared_with_experts=compared)
    if different:
        print(f"capture_hf.py: the experts were given other ids than captured in {different} of {compared} rows",
              file=sys.stderr)
        return 1
    write(args.out, data, meta)
    print(f"{args.out}: {n} tokens of {len(runs)} requests, {n_layers} layers, top {k} of {meta['experts']} "
          f"({meta['router']}); {compared} rows compared with what the experts were given, {different} differ")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Bad, OSError) as e:
        print(f"capture_hf.py: {e}", file=sys.stderr)
        sys.exit(2)
