#!/usr/bin/python3
"""Train the tiny MoE model on one thread, resumably.

    train.py TOKENS OUT     TOKENS from bpe.py; OUT gets start.pt (the untrained
                            network), last.pt (checkpoint) and curve.csv

The batch of step n depends only on the seed and n, so an interrupted run that
is resumed from last.pt sees the same batches as one that was not.
"""
import argparse
import csv
import math
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F

from corpus import DOMAINS
from model import Config, Model, parameters

SEED = 20240607
STEPS = 5000
BATCH = 16               # sequences of the full context, 2,048 tokens a step
RATE, WARMUP = 3e-3, 200
DECAY = 0.1
CLIP = 1.0
BALANCE = 1e-3           # coefficient of the balance loss, which is the mean of the layers
EVAL_EVERY, EVAL_BATCHES = 200, 2  # batches of BATCH sequences per domain
COLUMNS = ["step", "tokens", "held_out_loss", "train_loss", "balance_loss", "skew", "seconds"]


def read(folder, suffix):
    return {d: np.load(os.path.join(folder, "%s.%s.npy" % (d, suffix))) for d in DOMAINS}


def shares(texts):
    """How often a sequence comes from each domain: the square root of its size,
    so that the large ones do not drown the small ones."""
    s = np.sqrt([len(texts[d]) for d in DOMAINS])
    return s / s.sum()


def batch(texts, share, n, context):
    """Batch n: BATCH random windows -> inputs and targets [BATCH, context]."""
    rng = np.random.default_rng([SEED, n])
    rows = []
    for d in rng.choice(len(DOMAINS), BATCH, p=share):
        ids = texts[DOMAINS[d]]
        at = rng.integers(len(ids) - context)
        rows.append(ids[at:at + context + 1])
    rows = torch.from_numpy(np.stack(rows).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def held_out_loss(model, texts, share, batches=EVAL_BATCHES):
    """Nats per token on held-out text: per domain evenly spaced windows, and the
    mean with the shares of the training mixture."""
    context = model.config.context
    losses = []
    model.eval()
    with torch.no_grad():
        for d in DOMAINS:
            ids = texts[d]
            starts = np.linspace(0, len(ids) - context - 1, batches * BATCH).astype(int)
            total = 0.0
            for group in np.array_split(starts, batches):
                rows = torch.from_numpy(
                    np.stack([ids[s:s + context + 1] for s in group]).astype(np.int64))
                logits, _, _ = model(rows[:, :-1])
                total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
            losses.append(total / batches)
    model.train()
    return float(np.dot(losses, share)), dict(zip(DOMAINS, losses))


def unigram_entropy(train, held, share):
    """Nats per token of held-out text under the training mixture's unigram
    frequencies: what a model without context would score."""
    p = sum(s * np.bincount(train[d], minlength=Config.vocab) / len(train[d])
            for s, d in zip(share, DOMAINS))
    p = (p + 1e-7) / (p + 1e-7).sum()
    return float(sum(s * -np.log(p[held[d]]).mean() for s, d in zip(share, DOMAINS)))


def rate(n, steps):
    """Linear warm-up, then half a cosine down to a twentieth."""
    if n < WARMUP:
        return RATE * (n + 1) / WARMUP
    x = (n - WARMUP) / max(1, steps - WARMUP)
    return RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * x)))


def save(path, what):
    torch.save(what, path + ".tmp")
    os.replace(path + ".tmp", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--stop", type=int, help="stop early here (to measure the speed)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    os.makedirs(args.out, exist_ok=True)
    config = Config()
    model = Model(config)
    train, held = read(args.tokens, "train"), read(args.tokens, "held")
    share = shares(train)

    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY},
                                   {"params": plain, "weight_decay": 0.0}],
                                  lr=RATE, betas=(0.9, 0.95), foreach=True)
    last = os.path.join(args.out, "last.pt")
    curve = os.path.join(args.out, "curve.csv")
    first, spent, rows = 0, 0.0, []
    if os.path.exists(last):
        state = torch.load(last)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent, rows = state["step"], state["seconds"], state["curve"]
        print("resumed at step %d" % first)
    else:
        save(os.path.join(args.out, "start.pt"), {"model": model.state_dict(), "step": 0})
        print("parameters", parameters(model))
        print("shares", dict(zip(DOMAINS, np.round(share, 3))))
        print("unigram entropy %.3f" % unigram_entropy(train, held, share))

    began = time.time()
    losses, balances, loads = [], [], 0
    n = first
    while True:
        if n % EVAL_EVERY == 0 or n == args.steps:
            loss, by_domain = held_out_loss(model, held, share)
            seconds = spent + time.time() - began
            if not rows or rows[-1][0] != n:
                since = ["", "", ""]  # nothing was trained before step 0
                if losses:
                    skew = (loads.max(1)[0] / loads.mean(1)).mean().item()
                    since = [round(np.mean(losses), 4), round(np.mean(balances), 4), round(skew, 3)]
                rows.append([n, n * BATCH * config.context, round(loss, 4)] + since
                            + [round(seconds, 1)])
            losses, balances, loads = [], [], 0
            print("step %5d held-out %.4f" % (n, loss), dict(zip(COLUMNS, rows[-1])),
                  {d: round(v, 3) for d, v in by_domain.items()}, flush=True)
            with open(curve, "w", newline="") as f:
                csv.writer(f, lineterminator="\n").writerows([COLUMNS] + rows)
            if n != first:
                save(last, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                            "step": n, "steps": args.steps, "seconds": seconds, "curve": rows,
                            "by_domain": by_domain, "seed": SEED, "balance": BALANCE,
                            "unigram": unigram_entropy(train, held, share)})
        if n == args.steps or n == args.stop:
            break
        x, y = batch(train, share, n, config.context)
        for group in optimizer.param_groups:
            group["lr"] = rate(n, args.steps)
        logits, balance, load = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        balances.append(float(balance))
        loads = loads + torch.stack(load).float()
        n += 1
        if n % 20 == 0:
            print("step %5d loss %.3f, %.0f tokens/s" % (
                n, losses[-1], (n - first) * BATCH * config.context / (time.time() - began)),
                flush=True)


if __name__ == "__main__":
    sys.exit(main())
