#!/usr/bin/python3
"""Fill the generated parts of doc/tiny-moe.md, and the data of its picture.

    page.py --trace TRACE --untrained TRACE [--other NAME=TRACE] [--tokens TOKENS]

Every figure on the page lies between `<!-- name -->` and `<!-- end -->` and is
replaced here from the traces, from curve.csv and from bpe.py's output; the page
is never edited by hand there.
"""
import argparse
import csv
import os
import re

import numpy as np

import stats
from corpus import DOMAINS, SOURCES

HERE = os.path.dirname(os.path.abspath(__file__))
PAGE = os.path.join(HERE, "..", "..", "doc", "tiny-moe.md")


def network(about):
    p = about["parameters"]
    return stats.markdown(["network", ""], [
        ["layers", "%d" % about["layers"]],
        ["channels, attention heads", "%d, %d" % (about["d_model"], about["heads"])],
        ["experts in each layer, chosen per token", "%d, %d" % (about["experts"], about["top_k"])],
        ["channels inside an expert", "%d" % about["expert_hidden"]],
        ["vocabulary, context", "%d, %d tokens" % (about["vocab"], about["context"])],
        ["parameters", "%s, of which %s in experts" % (million(p["total"]),
                                                       million(p["experts"]))],
        ["parameters that a token uses", million(p["active_per_token"])],
    ])


def million(n):
    return "%.2f million" % (n / 1e6)


def training(about, rows):
    t = about["training"]
    return stats.markdown(["training", ""], [
        ["steps, tokens", "%d, %s" % (t["steps"], million(t["tokens"]))],
        ["time on one thread", "%.0f minutes (%.0f tokens/s)" % (t["seconds"] / 60,
                                                                 t["tokens"] / t["seconds"])],
        ["coefficient of the balance loss", "%g" % t["balance_loss"]],
        ["held-out loss before training", "%.2f nats a token" % float(rows[0]["held_out_loss"])],
        ["unigram model on the same text", "%.2f" % t["unigram_entropy"]],
        ["**held-out loss after training**", "**%.2f**" % t["held_out_loss"]],
        ["loss on training text, last stretch", "%.2f" % float(rows[-1]["train_loss"])],
        ["skew on training text, last stretch", "%.2f" % float(rows[-1]["skew"])],
    ])


def texts(tokens, about):
    """Package, licence, and what each domain holds."""
    rows = []
    for package, _, domain, licence, _ in SOURCES:
        rows.append([domain, package, licence])
    out = stats.markdown(["domain", "Debian package", "licence, as its copyright file says"], rows, 3)
    if tokens:
        out += "\n" + stats.markdown(
            ["domain", "tokens to learn from", "held out", "held-out loss"],
            [[d] + ["%d" % len(np.load(os.path.join(tokens, "%s.%s.npy" % (d, s)), mmap_mode="r"))
                    for s in ("train", "held")]
             + ["%.2f" % about["training"]["held_out_loss_by_domain"][d]] for d in DOMAINS])
    return out


def picture(about, rows, names, runs):
    """picture.dat for plot.gp: a block with the loss of the unigram model, then one
    a trace with depth (0 to 1), overlap and chance of its layers."""
    with open(os.path.join(HERE, "picture.dat"), "w") as f:
        f.write('"unigram model"\n')
        for row in (rows[0], rows[-1]):
            f.write("%s %g\n" % (row["tokens"], about["training"]["unigram_entropy"]))
        for name, r in zip(names, runs):
            o = r["overlap"]
            f.write('\n\n"%s"\n' % name)
            for i, (a, b) in enumerate(zip(o["layers"], o["popularity"])):
                f.write("%.4f %.4f %.4f\n" % (i / (len(o["layers"]) - 1), a, b))


def fill(text, parts):
    for name, body in parts.items():
        pattern = re.compile(r"(<!-- %s -->\n).*?(<!-- end -->)" % name, re.S)
        text, n = pattern.subn(lambda m: m.group(1) + body + m.group(2), text)
        assert n == 1, "doc/tiny-moe.md has no single part called %s" % name
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", required=True)
    parser.add_argument("--untrained", required=True)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=TRACE")
    parser.add_argument("--tokens")
    args = parser.parse_args()
    folders = {"tiny-moe": args.trace, "the same, untrained": args.untrained}
    folders.update(a.split("=", 1) for a in args.other)
    names = list(folders)
    runs = [stats.measure(f) for f in folders.values()]
    with open(os.path.join(HERE, "curve.csv"), newline="") as f:
        rows = list(csv.DictReader(f))

    about = runs[0]["about"]
    picture(about, rows, names, runs)
    parts = {"network": network(about), "training": training(about, rows),
             "texts": texts(args.tokens, about), "routing": stats.table(names, runs),
             "layers": stats.layers(names[:2], runs[:2])}
    with open(PAGE) as f:
        text = fill(f.read(), parts)
    with open(PAGE, "w") as f:
        f.write(text)


if __name__ == "__main__":
    main()
