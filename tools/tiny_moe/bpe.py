#!/usr/bin/python3
"""A byte-level byte-pair encoding learned from scratch.

Text is UTF-8 bytes, seen as Latin-1 characters so that a byte is a character.
It is first cut into words (a word takes the space before it along, as in GPT-2);
merges never cross a word's border. Tokens 0..255 are the bytes, token 256+i is
the i-th merge.

    bpe.py CORPUS OUT       writes OUT/merges.txt, OUT/<domain>.{train,held}.npy
                            and OUT/documents.json
"""
import argparse
import collections
import heapq
import json
import os
import re

import numpy as np

from corpus import DOMAINS

VOCAB = 2048
SAMPLE = 600_000  # bytes of each domain that the merges are learned from

WORD = re.compile(r" ?[A-Za-z\x80-\xff]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+")


def words(text):
    return WORD.findall(text.encode("utf-8").decode("latin-1"))


def learn(counts, merges):
    """The `merges` most frequent pairs, one after the other; equal counts go to
    the pair of lower ids, so the result does not depend on any order.

    counts: {word: occurrences}. Only the words that hold a pair are touched when
    the pair is merged; the heap's entries may be stale and are checked on leaving.
    """
    spelled = [[ord(ch) for ch in w] for w in counts]
    freq = list(counts.values())
    total = collections.Counter()
    where = collections.defaultdict(set)
    for n, s in enumerate(spelled):
        for pair in zip(s, s[1:]):
            total[pair] += freq[n]
            where[pair].add(n)
    heap = [(-c, p) for p, c in total.items()]
    heapq.heapify(heap)
    learned = []
    while len(learned) < merges and heap:
        c, pair = heapq.heappop(heap)
        if total[pair] != -c:
            if total[pair] > 0:
                heapq.heappush(heap, (-total[pair], pair))
            continue
        new = 256 + len(learned)
        learned.append(pair)
        changed = set()
        for n in where.pop(pair):
            s = spelled[n]
            for p in zip(s, s[1:]):
                total[p] -= freq[n]
            s = spelled[n] = merge(s, pair, new)
            for p in zip(s, s[1:]):
                total[p] += freq[n]
                where[p].add(n)
                changed.add(p)
        for p in changed:
            heapq.heappush(heap, (-total[p], p))
    return learned


def merge(s, pair, new):
    out, i = [], 0
    while i < len(s):
        if i + 1 < len(s) and s[i] == pair[0] and s[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(s[i])
            i += 1
    return out


class Codec:
    """Encodes text with learned merges, remembering every word it has seen."""

    def __init__(self, merges):
        self.rank = {tuple(p): i for i, p in enumerate(merges)}
        self.bytes = [bytes([b]) for b in range(256)]
        for a, b in merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.seen = {}

    def word(self, w):
        s = [ord(ch) for ch in w]
        while len(s) > 1:
            rank, pair = min((self.rank.get(p, 1 << 30), p) for p in zip(s, s[1:]))
            if rank == 1 << 30:
                break
            s = merge(s, pair, 256 + rank)
        return s

    def encode(self, text):
        ids = []
        for w in words(text):
            if w not in self.seen:
                self.seen[w] = self.word(w)
            ids.extend(self.seen[w])
        return ids

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")


def load(path):
    with open(os.path.join(path, "merges.txt")) as f:
        return Codec([tuple(map(int, line.split())) for line in f])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("out")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    texts = {}
    for domain in DOMAINS:
        with open(os.path.join(args.corpus, domain + ".jsonl"), encoding="utf-8") as f:
            texts[domain] = [json.loads(line) for line in f]

    # an even sample of the training text of every domain
    counts = collections.Counter()
    for domain in DOMAINS:
        train = [d for d in texts[domain] if not d["held_out"]]
        share = SAMPLE / sum(len(d["text"]) for d in train)
        for d in train:
            counts.update(words(d["text"][:int(len(d["text"]) * share) + 1]))
    merges = learn(counts, VOCAB - 256)
    with open(os.path.join(args.out, "merges.txt"), "w") as f:
        f.writelines("%d %d\n" % p for p in merges)

    codec = Codec(merges)
    listing = {}
    for domain in DOMAINS:
        for held, suffix in ((False, "train"), (True, "held")):
            ids, documents = [], []
            for d in texts[domain]:
                if d["held_out"] == held:
                    start = len(ids)
                    ids.extend(codec.encode(d["text"]))
                    documents.append([d["name"], start, len(ids)])
            np.save(os.path.join(args.out, "%s.%s.npy" % (domain, suffix)),
                    np.array(ids, np.uint16))
            if held:
                listing[domain] = documents
            print("%-10s %-5s %8d tokens" % (domain, suffix, len(ids)))
    with open(os.path.join(args.out, "documents.json"), "w") as f:
        json.dump(listing, f, indent=1)
    assert codec.decode(codec.encode(texts["lexicon"][0]["text"])) == texts["lexicon"][0]["text"]


if __name__ == "__main__":
    main()
