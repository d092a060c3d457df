#!/usr/bin/python3
"""Check that the shipped trace is whole and agrees with itself; numpy only.

    check.py [TRACE_DIR]        default: scenarios/traces/tiny-moe of this tree

Exits 0 if all is well, 1 with the first thing that is not, 77 without numpy.
"""
import hashlib
import json
import os
import sys

try:
    import numpy as np
except ImportError:
    print("check.py: skipped, python3-numpy is not installed")
    sys.exit(77)

HERE = os.path.dirname(os.path.abspath(__file__))
SHIPPED = os.path.join(HERE, "..", "..", "scenarios", "traces", "tiny-moe")
LIMIT = 8 << 20  # bytes of the whole directory


class Wrong(Exception):
    pass


def need(condition, message, *values):
    if not condition:
        raise Wrong(message % values)


def shapes(about):
    """name -> (dtype, shape) as trace.json says."""
    n, r = about["tokens"], about["requests"]
    layers, experts, k = about["layers"], about["experts"], about["top_k"]
    d = about["d_model"]
    return {"experts": ("|u1", (n, layers, k)), "weights": ("<f2", (n, layers, k)),
            "logits": ("<f2", (n, layers, experts)), "token_ids": ("<i4", (n,)),
            "positions": ("<i4", (n,)), "offsets": ("<i8", (r + 1,)),
            "domains": ("|u1", (r,)), "importance": ("<f4", (n,)),
            "hidden": ("<f2", (about["hidden_tokens"], layers, d)),
            "gate": ("<f4", (layers, experts, d))}


def load(folder):
    """-> trace.json and the arrays, each as trace.json describes it."""
    with open(os.path.join(folder, "trace.json")) as f:
        about = json.load(f)
    arrays = {}
    for name, (dtype, shape) in shapes(about).items():
        file = name + ".npy"
        path = os.path.join(folder, file)
        with open(path, "rb") as f:
            blob = f.read()
        need(hashlib.sha256(blob).hexdigest() == about["files"].get(file),
             "%s: its SHA-256 is not the one in trace.json", file)
        need(blob[6:8] == b"\1\0", "%s: not npy version 1.0", file)
        a = np.load(path, allow_pickle=False)
        need(a.dtype.str == dtype and a.shape == shape, "%s: found %s %s, expected %s %s",
             file, a.dtype.str, a.shape, dtype, shape)
        need(a.ndim == 1 or not np.isfortran(a), "%s: not in C order", file)
        need(a.dtype.kind != "f" or np.isfinite(a).all(), "%s: NaN or infinity", file)
        arrays[name] = a
    return about, arrays


def routing(t):
    """The experts are softmax-top-k of the logits, exactly; the weights their
    renormalised probabilities; the logits the gates' view of the hidden states.
    -> largest error of the last."""
    logits = t["logits"].astype(np.float32)
    k = t["experts"].shape[2]
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]  # ties: lower expert
    wrong = np.argwhere((order != t["experts"]).any(-1))
    need(not len(wrong), "experts.npy: token %d layer %d is not the top-k of logits.npy",
         *(wrong[0] if len(wrong) else (0, 0)))
    chosen = np.take_along_axis(logits, order, -1)
    p = np.exp(chosen - chosen.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    need(np.abs(p - t["weights"]).max() < 1e-3, "weights.npy: not the softmax of logits.npy")
    again = np.einsum("nld,led->nle", t["hidden"].astype(np.float32), t["gate"])
    error = float(np.abs(again - logits[:len(again)]).max())
    need(error < 2e-2, "hidden.npy: times gate.npy it is %g away from logits.npy", error)
    return error


def structure(about, t):
    """Requests, positions, ids and sizes."""
    offsets, n = t["offsets"], about["tokens"]
    need(offsets[0] == 0 and offsets[-1] == n and (np.diff(offsets) > 0).all(),
         "offsets.npy: not rising from 0 to %d", n)
    starts = np.repeat(offsets[:-1], np.diff(offsets))
    need((t["positions"] == np.arange(n) - starts).all(),
         "positions.npy: not the positions in the requests")
    need(np.diff(offsets).max() <= about["context"], "offsets.npy: a request beyond the context")
    need(0 <= t["token_ids"].min() and t["token_ids"].max() < about["vocab"],
         "token_ids.npy: outside of the vocabulary")
    need(t["experts"].max() < about["experts"], "experts.npy: an expert out of range")
    ranked = np.sort(t["experts"], -1)
    need((ranked[..., 1:] != ranked[..., :-1]).all(), "experts.npy: an expert twice in a row")
    need((np.diff(t["weights"].astype(np.float32), axis=-1) <= 0).all(),
         "weights.npy: not falling")
    need(t["domains"].max() < len(about["domains"]), "domains.npy: no such domain")
    need(0 <= t["importance"].min() and t["importance"].max() <= 1,
         "importance.npy: outside of 0..1")
    need(about["hidden_tokens"] in offsets, "hidden.npy: not whole requests")


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else SHIPPED
    try:
        about, t = load(folder)
        structure(about, t)
        error = routing(t)
        size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
        need(size <= LIMIT, "%d bytes, more than %d", size, LIMIT)
    except (Wrong, OSError, KeyError, ValueError) as e:
        print("check.py: %s: %s" % (os.path.basename(os.path.normpath(folder)), e))
        return 1
    print("%s: %d tokens of %d requests in %d domains, %d layers, top %d of %d, %d bytes; "
          "top-k of the logits repeats every expert, hidden @ gate^T within %.4f"
          % (about["model"], about["tokens"], about["requests"], len(set(t["domains"].tolist())),
             about["layers"], about["top_k"], about["experts"], size, error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
