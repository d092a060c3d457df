#!/usr/bin/python3
"""What is particular about the routing in a trace; numpy only.

    stats.py NAME=TRACE_DIR ...     prints Markdown tables that compare traces

The measures (E experts, k per token, L layers; p_e is the share of tokens that
choose expert e of a layer, so that sum_e p_e = k):

skew      Load of the busiest expert over the mean load, per layer, averaged
          over the layers; "pooled" is the same over all (layer, expert) pairs.
overlap   |A and B| / k for the expert sets A, B of consecutive tokens of one
          request in one layer. "by popularity" is its expectation for tokens
          drawn independently with the layer's popularity, sum_e p_e^2 / k;
          "same request" is its mean over all pairs of tokens of a request, near
          or far; "uniform" is k / E.
affinity  Mutual information, in bits, of an expert that a token uses in a layer
          and one that it uses in the next layer (all k x k pairs count equally);
          and how often the likeliest partner in the next layer is used: the mean
          of max_f P(f in layer l+1 | e in layer l) over the uses of e. Both also
          with the next layer taken from a random other token, which shows what
          popularity and the finite sample alone give.
cache     Hit rates of LRU and of Belady's optimum over all uses, where an object
          is a (layer, expert) pair: requests one after the other, tokens in
          order, layers in order, the experts of a token as they are stored.
          Every miss is loaded, into 10, 25 or 50 % of all L x E objects.
domains   Jensen-Shannon divergence, in bits, of the expert usage of two halves
          (even and odd requests) of different domains and of the same domain,
          averaged over layers and pairs.
"""
import argparse
import collections
import heapq
import json
import os
import sys

import numpy as np

SIZES = (0.10, 0.25, 0.50)


class Trace:
    def __init__(self, folder):
        with open(os.path.join(folder, "trace.json")) as f:
            self.about = json.load(f)
        read = lambda name: np.load(os.path.join(folder, name), allow_pickle=False)
        self.experts = read("experts.npy").astype(np.int64)   # [N, L, k]
        self.offsets = read("offsets.npy")                    # [R+1]
        self.E = self.about["experts"]
        self.N, self.L, self.k = self.experts.shape
        self.chosen = np.zeros((self.N, self.L, self.E), bool)
        np.put_along_axis(self.chosen, self.experts, True, -1)
        self.popularity = self.chosen.mean(0)                 # p_e, [L, E]
        path = os.path.join(folder, "domains.npy")
        self.domains = np.load(path) if os.path.exists(path) else None

    def requests(self):
        return zip(self.offsets[:-1], self.offsets[1:])


def skew(t):
    load = t.popularity
    return {"mean": float((load.max(1) / load.mean(1)).mean()),
            "pooled": float(load.max() / load.mean()),
            "layers": (load.max(1) / load.mean(1)).tolist(),
            "unused": int((load == 0).sum())}


def overlap(t):
    """Per layer: measured, by popularity, in the same request, uniform."""
    pairs, same = [], []
    for a, b in t.requests():
        c = t.chosen[a:b]
        pairs.append((c[1:] & c[:-1]).sum(-1))
        n, uses = b - a, c.sum(0)                              # [L, E]
        if n > 1:
            same.append(((n, (uses * (uses - 1)).sum(-1) / (n * (n - 1)) / t.k)))
    weights = [n for n, _ in same]
    return {"layers": (np.concatenate(pairs).mean(0) / t.k).tolist(),
            "popularity": ((t.popularity ** 2).sum(1) / t.k).tolist(),
            "request": np.average([s for _, s in same], axis=0, weights=weights).tolist(),
            "uniform": t.k / t.E}


def joint(a, b):
    """[N, E] choices of two layers -> joint distribution of a used pair [E, E]."""
    counts = a.astype(np.float64).T @ b.astype(np.float64)
    return counts / counts.sum()


def information(p):
    """Mutual information in bits of a joint distribution."""
    outer = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    q = p > 0
    return float((p[q] * np.log2(p[q] / outer[q])).sum())


def affinity(t):
    shuffled = np.random.default_rng(1).permutation(t.N)
    result = collections.defaultdict(list)
    for layer in range(t.L - 1):
        a, b = t.chosen[:, layer], t.chosen[:, layer + 1]
        for name, other in (("", b), ("_random", b[shuffled])):
            p = joint(a, other)
            result["bits" + name].append(information(p))
            # max_f P(f | e) times k, weighted by the uses of e
            result["partner" + name].append(float(p.max(1).sum() * t.k))
    return dict(result)


def stream(t):
    """Objects layer * E + expert in the order of their use."""
    return (t.experts + (np.arange(t.L) * t.E)[None, :, None]).ravel().tolist()


def lru(uses, capacity):
    cache, hits = collections.OrderedDict(), 0
    for x in uses:
        if x in cache:
            hits += 1
            cache.move_to_end(x)
        else:
            if len(cache) >= capacity:
                cache.popitem(last=False)
            cache[x] = None
    return hits / len(uses)


def belady(uses, capacity):
    """Evicts the object whose next use is farthest. The heap's entries go stale
    when their object is used again; those are skipped."""
    n = len(uses)
    following, last = [n] * n, {}
    for i in range(n - 1, -1, -1):
        following[i] = last.get(uses[i], n)
        last[uses[i]] = i
    cache, heap, hits = {}, [], 0
    for i, x in enumerate(uses):
        if x in cache:
            hits += 1
        elif len(cache) >= capacity:
            while True:
                at, victim = heapq.heappop(heap)
                if cache.get(victim) == -at:
                    del cache[victim]
                    break
        cache[x] = following[i]
        heapq.heappush(heap, (-following[i], x))
    return hits / n


def cache(t):
    uses = stream(t)
    result = {}
    for share in SIZES:
        capacity = round(share * t.L * t.E)
        result[share] = (lru(uses, capacity), belady(uses, capacity), capacity)
    return result


def divergence(p, q):
    """Jensen-Shannon, bits, over the last axis."""
    def kl(a, b):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(a > 0, a * np.log2(a / b), 0).sum(-1)
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def domains(t):
    if t.domains is None:
        return None
    halves = {}
    for d in range(int(t.domains.max()) + 1):
        mine = [(a, b) for r, (a, b) in enumerate(t.requests()) if t.domains[r] == d]
        for h in (0, 1):
            uses = sum(t.chosen[a:b].sum(0) for a, b in mine[h::2])     # [L, E]
            halves[d, h] = uses / uses.sum(1, keepdims=True)
    count = int(t.domains.max()) + 1
    within = [divergence(halves[d, 0], halves[d, 1]).mean() for d in range(count)]
    between = [divergence(halves[d, 0], halves[e, 1]).mean()
               for d in range(count) for e in range(count) if d != e]
    return {"between": float(np.mean(between)), "within": float(np.mean(within))}


def measure(folder):
    t = Trace(folder)
    return {"about": t.about, "tokens": t.N, "requests": len(t.offsets) - 1,
            "shape": (t.L, t.E, t.k), "skew": skew(t), "overlap": overlap(t),
            "affinity": affinity(t), "cache": cache(t), "domains": domains(t)}


def table(names, runs):
    """The comparison, one column a trace."""
    mean = lambda v: sum(v) / len(v)
    two, three = (lambda v: "%.2f" % v), (lambda v: "%.3f" % v)
    rows = [
        ("tokens, requests", lambda r: "%d, %d" % (r["tokens"], r["requests"])),
        ("layers, experts, chosen", lambda r: "%d, %d, %d" % r["shape"]),
        ("skew, mean of layers", lambda r: two(r["skew"]["mean"])),
        ("skew, pooled", lambda r: two(r["skew"]["pooled"])),
        ("(layer, expert) pairs never used", lambda r: "%d" % r["skew"]["unused"]),
        ("overlap of consecutive tokens", lambda r: three(mean(r["overlap"]["layers"]))),
        ("... last layer", lambda r: three(r["overlap"]["layers"][-1])),
        ("... any two tokens of a request", lambda r: three(mean(r["overlap"]["request"]))),
        ("... chance by popularity", lambda r: three(mean(r["overlap"]["popularity"]))),
        ("... chance if uniform", lambda r: three(r["overlap"]["uniform"])),
        ("affinity of adjacent layers, bits", lambda r: three(mean(r["affinity"]["bits"]))),
        ("... with random tokens", lambda r: three(mean(r["affinity"]["bits_random"]))),
        ("likeliest partner is used", lambda r: three(mean(r["affinity"]["partner"]))),
        ("... with random tokens", lambda r: three(mean(r["affinity"]["partner_random"]))),
    ]
    for share in SIZES:
        percent = "%d %%" % round(100 * share)
        rows.append(("LRU hits, %s of objects" % percent,
                     lambda r, s=share: "%s (%d objects)" % (three(r["cache"][s][0]),
                                                             r["cache"][s][2])))
        rows.append(("Belady hits, %s of objects" % percent,
                     lambda r, s=share: three(r["cache"][s][1])))
    rows += [
        ("divergence between domains, bits",
         lambda r: three(r["domains"]["between"]) if r["domains"] else "-"),
        ("... within a domain", lambda r: three(r["domains"]["within"]) if r["domains"] else "-"),
    ]
    return markdown(["measure"] + names, [[n] + [f(r) for r in runs] for n, f in rows])


def layers(names, runs):
    """Overlap, its chance and the skew, layer by layer."""
    head = ["layer"]
    for n in names:
        head += ["%s: overlap" % n, "chance", "skew"]
    rows = []
    for layer in range(max(r["shape"][0] for r in runs)):
        row = [str(layer)]
        for r in runs:
            if layer < r["shape"][0]:
                row += ["%.3f" % r["overlap"]["layers"][layer],
                        "%.3f" % r["overlap"]["popularity"][layer],
                        "%.2f" % r["skew"]["layers"][layer]]
            else:
                row += [""] * 3
        rows.append(row)
    return markdown(head, rows)


def markdown(head, rows, text=1):
    """The first `text` columns are words, the others numbers."""
    lines = ["| " + " | ".join(head) + " |",
             "|---" * text + "|--:" * (len(head) - text) + "|"]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", metavar="NAME=TRACE_DIR")
    args = parser.parse_args()
    names, folders = zip(*(a.split("=", 1) for a in args.traces))
    runs = [measure(f) for f in folders]
    print(table(list(names), runs))
    print(layers(list(names), runs))


if __name__ == "__main__":
    sys.exit(main())
