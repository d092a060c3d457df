#!/usr/bin/python3
"""Capture the routing of the tiny MoE model on held-out text as a moelab trace.

    capture.py TOKENS CHECKPOINT OUT

TOKENS is bpe.py's output, CHECKPOINT a file of train.py (last.pt, or start.pt
for the untrained network), OUT the directory of the trace.

Each request is a passage of a held-out document that begins at a line's start
and is read by the model in one forward pass (teacher forcing). Requests go round
the domains in turn. Written (N tokens, L layers, E experts, k chosen, d channels,
R requests, H the tokens of the first requests, one of each domain):

    experts.npy     u8  [N, L, k]  by falling probability
    weights.npy     f16 [N, L, k]  probabilities of the chosen, renormalised
    logits.npy      f16 [N, L, E]  what the router's softmax is taken of
    token_ids.npy   i32 [N]        merges.txt says what they stand for
    positions.npy   i32 [N]        position in the request
    offsets.npy     i64 [R+1]      first token of each request, and N
    domains.npy     u8  [R]        index into trace.json's "domains"
    importance.npy  f32 [N]        attention that a token receives
    hidden.npy      f16 [H, L, d]  what enters the gates
    gate.npy        f32 [L, E, d]  the gates: logits = hidden @ gate^T
"""
import argparse
import hashlib
import json
import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

import bpe
import check
from corpus import DOMAINS
from model import Config, Model, parameters

SEED = 7
PER_DOMAIN = 8           # requests of each domain
SHORTEST, LONGEST = 72, 128


def passages(folder, codec):
    """[(domain index, token ids)], going round the domains.

    The held-out text of a domain is cut into PER_DOMAIN equal stretches; from each
    comes one passage, at the first line start after a random place."""
    rng = np.random.default_rng(SEED)
    newline = [b"\n" in piece for piece in codec.bytes]
    with open(os.path.join(folder, "documents.json")) as f:
        documents = json.load(f)
    found = []
    for n in range(PER_DOMAIN):
        for index, domain in enumerate(DOMAINS):
            ids = np.load(os.path.join(folder, domain + ".held.npy"))
            length = int(rng.integers(SHORTEST, LONGEST + 1))
            low, high = len(ids) * n // PER_DOMAIN, len(ids) * (n + 1) // PER_DOMAIN
            # every start in this stretch whose passage stays in one document
            starts = []
            for _, begin, end in documents[domain]:
                for at in range(max(begin, low), min(end, high) - length + 1):
                    if at == begin or newline[ids[at - 1]]:
                        starts.append(at)
            at = starts[int(rng.integers(len(starts)))]
            found.append((index, ids[at:at + length].astype(np.int32)))
    return found


def fingerprint(folder):
    """SHA-256 of all tokens that were learned from: other versions of the packages
    hold other texts, and so lead to another model."""
    digest = hashlib.sha256()
    for domain in DOMAINS:
        with open(os.path.join(folder, domain + ".train.npy"), "rb") as f:
            digest.update(f.read())
    return digest.hexdigest()


def run(model, ids):
    """One request of T tokens -> what the trace keeps of it, as numpy arrays."""
    record = []
    with torch.no_grad():
        model(torch.from_numpy(ids.astype(np.int64))[None], half=True, record=record)
    stack = lambda key: torch.stack([r[key] for r in record], 1).numpy()  # [T, L, ...]
    attention = torch.stack([r["attention"][0] for r in record])          # [L, heads, T, T]
    # mean over layers and heads, then over the positions after the token itself
    received = attention.mean((0, 1)).tril(-1).sum(0)
    later = torch.arange(len(ids) - 1, -1, -1)
    importance = (received / later.clamp(min=1)).numpy()
    return dict(hidden=stack("hidden").astype(np.float16),
                logits=stack("logits").astype(np.float16),
                weights=stack("weights").astype(np.float16),
                experts=stack("experts").astype(np.uint8),
                importance=importance.astype(np.float32))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens")
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = Config()
    model = Model(config)
    state = torch.load(args.checkpoint)
    model.load_state_dict(state["model"])
    model.eval()
    codec = bpe.load(args.tokens)
    requests = passages(args.tokens, codec)
    runs = [run(model, ids) for _, ids in requests]

    lengths = [len(ids) for _, ids in requests]
    sliced = len(DOMAINS)  # the first round of requests
    t = {key: np.concatenate([r[key] for r in runs])
         for key in ("experts", "weights", "logits", "importance")}
    t["token_ids"] = np.concatenate([ids for _, ids in requests])
    t["positions"] = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    t["offsets"] = np.cumsum([0] + lengths).astype(np.int64)
    t["domains"] = np.array([d for d, _ in requests], np.uint8)
    t["hidden"] = np.concatenate([r["hidden"] for r in runs[:sliced]])
    t["gate"] = np.stack([b.moe.gate.detach().numpy() for b in model.blocks]).astype(np.float32)
    error = check.routing(t)

    os.makedirs(args.out, exist_ok=True)
    files = {}
    for key, array in t.items():
        path = os.path.join(args.out, key + ".npy")
        np.save(path, np.ascontiguousarray(array))
        with open(path, "rb") as f:
            files[key + ".npy"] = hashlib.sha256(f.read()).hexdigest()
    shutil.copyfile(os.path.join(args.tokens, "merges.txt"), os.path.join(args.out, "merges.txt"))

    trained = state["step"] > 0
    training = {"steps": state["step"], "tokens": 0}
    if trained:
        row = state["curve"][-1]
        training = {"steps": state["step"], "planned_steps": state["steps"], "tokens": row[1],
                    "seed": state["seed"], "balance_loss": state["balance"],
                    "held_out_loss": row[2], "unigram_entropy": round(state["unigram"], 4),
                    "held_out_loss_by_domain": {d: round(v, 4)
                                                for d, v in state["by_domain"].items()},
                    "seconds": row[6], "threads": 1,
                    "text_sha256": fingerprint(args.tokens)}
    about = {
        "model": "tiny-moe" if trained else "tiny-moe, untrained",
        "layers": config.layers, "experts": config.experts, "top_k": config.top_k,
        "requests": len(requests), "tokens": sum(lengths),
        "d_model": config.d, "expert_hidden": config.hidden, "heads": config.heads,
        "vocab": config.vocab, "context": config.context, "parameters": parameters(model),
        "router": "softmax over all %d experts, the %d largest, renormalised to sum 1; logits "
                  "are rounded to float16 before, equal ones go to the lower expert"
                  % (config.experts, config.top_k),
        "captured": "routing of every token of %d passages of held-out text, %d of each domain "
                    "in turn, each read in one forward pass (teacher forcing)"
                    % (len(requests), PER_DOMAIN),
        "importance": "attention probability that a token receives, averaged over the layers, "
                      "the heads and the later positions of its request (the token itself "
                      "excluded; 0 for the last token)",
        "hidden": "output of the norm before the gate, for the first hidden_tokens tokens; "
                  "logits = hidden @ gate^T",
        "hidden_tokens": len(t["hidden"]), "hidden_logit_error": round(error, 5),
        "domains": DOMAINS,
        "source": "trained from scratch and captured by tools/tiny_moe of moelab",
        "licence": "Apache-2.0; the token ids stand for short excerpts of texts in the public "
                   "domain or under permissive licences, see NOTICE",
        "training": training,
        "files": files,
    }
    with open(os.path.join(args.out, "trace.json"), "w") as f:
        json.dump(about, f, indent=2)
        f.write("\n")
    print("%d tokens of %d requests, %d bytes; hidden @ gate^T within %.4f of the logits"
          % (sum(lengths), len(requests),
             sum(os.path.getsize(os.path.join(args.out, n)) for n in os.listdir(args.out)), error))


if __name__ == "__main__":
    main()
