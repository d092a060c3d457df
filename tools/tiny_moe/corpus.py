#!/usr/bin/python3
"""Gather the texts that the tiny MoE model learns from, out of Debian packages.

Every source is in the public domain or under a permissive licence; SOURCES
names the package, the files taken from it and where the licence is written.
The texts come out as documents (chapters, modules, blocks of dictionary
entries), a few of which are held out: the model never sees them in training,
and the trace is captured from them.

    corpus.py --root ROOT OUT       writes OUT/<domain>.jsonl
    corpus.py --packages            prints the packages' names

ROOT is a directory the packages were unpacked into; a file that is not there
is looked for in the running system.
"""
import argparse
import gzip
import hashlib
import html.parser
import json
import os
import re
import struct
import subprocess
import sys
import zlib

# package, what is read from it, domain, licence, where the package says so
# (under /usr/share/doc/PACKAGE/)
SOURCES = [
    ("bible-kjv-text", "usr/lib/bible.data", "scripture",
     "public domain (King James Version, 1611)", "copyright"),
    ("r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", "novel",
     "public domain text (Jane Austen), packaged under MIT", "copyright"),
    ("wordnet-base", "usr/share/wordnet/data.{noun,verb,adj,adv}", "gloss",
     "WordNet 3.0 licence (permissive, notice kept)", "copyright"),
    ("dict-jargon", "usr/share/dictd/jargon.dict.dz", "lexicon",
     "public domain (the Jargon File 4.4.7)", "copyright"),
    ("dict-devil", "usr/share/dictd/devil.dict.dz", "lexicon",
     "public domain (Ambrose Bierce, 1911)", "copyright"),
    ("sqlite3-doc", "usr/share/doc/sqlite3/*.html", "manual",
     "public domain", "copyright"),
    ("libsqlite3-dev", "usr/include/sqlite3.h", "c",
     "public domain", "copyright"),
    ("libstb-dev", "usr/include/stb/*.h", "c",
     "public domain or Expat", "copyright"),
    ("libpython3.11-stdlib", "usr/lib/python3.11/**/*.py", "python",
     "Python Software Foundation License", "../libpython3.11-minimal/copyright"),
    ("libpython3.11-minimal", "usr/lib/python3.11/**/*.py", "python",
     "Python Software Foundation License", "copyright"),
    ("python3-distutils", "usr/lib/python3.11/distutils/**/*.py", "python",
     "Python Software Foundation License", "copyright"),
]
# The program that unpacks bible.data; nothing of it enters the corpus.
READER = "bible-kjv"

DOMAINS = ["scripture", "novel", "gloss", "lexicon", "manual", "c", "python"]
HELD_OUT = 0.02  # share of each domain's bytes that is never trained on

# Parts of Python's library under licences of their own (the end of its copyright
# file lists them), and parts that are tables rather than programs.
PYTHON_SKIP = re.compile(
    r"^(logging/|multiprocessing/|sqlite3/|async|tarfile|turtle|test/|lib2to3/|"
    r"pydoc_data/|encodings/|config-|idlelib/|dist-packages/|site-packages/|"
    r"ensurepip/|lib-dynload/|_sysconfigdata)")
# Pages of sqlite3-doc that repeat sqlite3.h or the change log.
MANUAL_SKIP = re.compile(r"^(changes|hlr\d+|capi3ref|toc|.*matrix.*|sitemap|keyword_index|"
                         r"requirements|cves|syntax.*|.*_toc)\.html$")


def packages():
    return sorted({s[0] for s in SOURCES} | {READER})


class Root:
    """Finds the files of packages below a directory, else in the system."""

    def __init__(self, root):
        self.roots = [root, "/"]

    def path(self, name):
        for root in self.roots:
            path = os.path.join(root, name)
            if os.path.exists(path):
                return path
        sys.exit("corpus.py: %s is missing (looked below %s).\n"
                 "Unpack or install the packages first, see README.md:\n"
                 "  apt-get download %s" % (name, " and ".join(self.roots), " ".join(packages())))

    def read(self, name):
        with open(self.path(name), "rb") as f:
            return f.read()

    def files(self, folder, suffix):
        """All files with a suffix below a folder of the first root that has any."""
        for root in self.roots:
            top = os.path.join(root, folder)
            found = [os.path.join(at, name) for at, _, names in os.walk(top)
                     for name in names if name.endswith(suffix)]
            if found:
                return sorted((os.path.relpath(path, top), path) for path in found)
        self.path(folder + "/*" + suffix)  # complains


def scripture(root):
    """One document per chapter: "1 In the beginning ...", a line per verse."""
    data = os.path.dirname(root.path("usr/lib/bible.data"))
    out = subprocess.run([root.path("usr/bin/bible"), "-p", data, "-l10000", "gen1:1-rev22:21"],
                         stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL)
    text = out.stdout.decode("latin-1")
    chapters = re.split(r"\n\s*\n(?=\S[^\n]* \d+\n)", "\n\n" + text.strip())
    for chapter in chapters:
        lines = [line.strip() for line in chapter.strip().splitlines() if line.strip()]
        if lines:
            yield lines[0], "\n".join(lines) + "\n"


def novel(root):
    """One document per chapter, from R's lazy-load database of six novels.

    Each entry of Rdata.rdb is a big-endian length, a 'z'-less zlib stream and an
    R serialisation (XDR) of one vector of lines; the CHARSXP items are found by
    their type byte, which is all that is needed of the format.
    """
    blob = root.read("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    at = 0
    while at < len(blob):
        stream = zlib.decompressobj()
        raw = stream.decompress(blob[at + 4:])
        at = len(blob) - len(stream.unused_data)
        # header: "X\n", version 3, two R versions, the encoding's name
        pos = 14 + 4 + struct.unpack(">i", raw[14:18])[0]
        kind, count = struct.unpack(">ii", raw[pos:pos + 8])
        if kind & 255 != 16:  # STRSXP
            continue
        pos += 8
        lines = []
        for _ in range(count):
            _, size = struct.unpack(">Ii", raw[pos:pos + 8])
            lines.append(raw[pos + 8:pos + 8 + max(size, 0)].decode("utf-8"))
            pos += 8 + max(size, 0)
        text = "\n".join(lines)
        title = lines[0].title()
        for n, chapter in enumerate(re.split(r"\n(?=CHAPTER |Chapter )", text)):
            if n and len(chapter) > 400:
                # the lines are wrapped; paragraphs are what a reader sees
                paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", chapter)]
                yield "%s %d" % (title, n), "\n\n".join(p for p in paragraphs if p) + "\n"


def gloss(root):
    """WordNet's "words: meaning" lines, a document per 100 consecutive entries."""
    for part in ("noun", "verb", "adj", "adv"):
        lines = []
        for line in root.read("usr/share/wordnet/data." + part).decode("utf-8").splitlines():
            if line.startswith("  "):  # the licence at the head of each file
                continue
            fields, meaning = line.split(" | ", 1)
            fields = fields.split(" ")
            words = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
            words = [re.sub(r"\([a-z]+\)$", "", w).replace("_", " ") for w in words]
            lines.append(", ".join(words) + ": " + meaning.strip())
        yield from blocks(part, lines, 100, "\n")


def lexicon(root):
    """Two dictionaries for amusement, a document per 20 consecutive entries."""
    for name in ("jargon", "devil"):
        text = gzip.decompress(root.read("usr/share/dictd/%s.dict.dz" % name)).decode("utf-8")
        # entries begin at the margin after an empty line
        entries = re.split(r"\n\n+(?=\S)", text)
        if name == "devil":
            entries = [e for e in entries if re.match(r"[A-Z][A-Z'-]+, ", e)]
        else:
            entries = entries[4:]  # the notices of the package
        entries = [re.sub(r"\n    (?=\S)", "\n", e) for e in entries]
        yield from blocks(name, entries, 20, "\n\n")


def blocks(name, entries, size, join):
    for at in range(0, len(entries), size):
        yield "%s %d" % (name, at), join.join(entries[at:at + size]) + "\n"


class Page(html.parser.HTMLParser):
    """The readable text of one page of SQLite's documentation."""
    BLOCK = {"p", "li", "h1", "h2", "h3", "h4", "tr", "br", "div", "ul", "ol", "table",
             "blockquote", "dl", "dt", "dd"}
    HIDDEN = {"script", "style", "head", "svg"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden, self.pre = [], 0, 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in self.HIDDEN
        self.pre += tag == "pre"
        if tag in self.BLOCK or tag == "pre":
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.hidden -= tag in self.HIDDEN and self.hidden > 0
        self.pre -= tag == "pre" and self.pre > 0
        if tag in self.BLOCK or tag == "pre":
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def manual(root):
    for name, path in root.files("usr/share/doc/sqlite3", ".html"):
        if "/" in name or MANUAL_SKIP.match(name):
            continue
        with open(path, encoding="utf-8", errors="replace") as f:
            page = Page()
            page.feed(f.read())
        text = "".join(page.parts)
        # every page starts with the same navigation, which ends here
        text = re.split(r"Search Changelog", text, 1)[-1]
        text = re.sub(r"This page last modified.*", "", text, flags=re.S)
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"\n\s*\n\s*", "\n\n", text).strip() + "\n"
        if len(text) > 1000:
            yield from pieces(name, text, 30000)


def c(root):
    yield from pieces("sqlite3.h", root.read("usr/include/sqlite3.h").decode("utf-8"), 30000)
    for name, path in root.files("usr/include/stb", ".h"):
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read().replace("\r\n", "\n")
        if text.count("\n") and text.count(",") < 0.08 * len(text):  # not a table of numbers
            yield from pieces(name, text, 30000)


def python(root):
    for name, path in root.files("usr/lib/python3.11", ".py"):
        if PYTHON_SKIP.match(name) or "/test" in name or "/_generated" in name:
            continue
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
        if len(text) > 500:
            yield from pieces(name, text, 60000)


def pieces(name, text, size):
    """Long files as contiguous pieces, cut at line ends."""
    count = max(1, round(len(text) / size))
    start = 0
    for n in range(count):
        end = len(text) if n == count - 1 else text.index("\n", len(text) * (n + 1) // count) + 1
        yield (name if count == 1 else "%s part %d" % (name, n + 1)), text[start:end]
        start = end


def split(documents):
    """Mark the held-out documents: in the order of their names' SHA-256, the
    first ones up to the share HELD_OUT of the bytes (and two at the least)."""
    total = sum(len(d["text"].encode()) for d in documents)
    taken = count = 0
    for d in sorted(documents, key=lambda d: hashlib.sha256(d["name"].encode()).digest()):
        size = len(d["text"].encode())
        d["held_out"] = count < 2 or taken + size <= HELD_OUT * total
        if d["held_out"]:
            taken, count = taken + size, count + 1
    return taken, total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="/", help="directory the packages were unpacked into")
    parser.add_argument("--packages", action="store_true", help="print the packages needed")
    parser.add_argument("out", nargs="?")
    args = parser.parse_args()
    if args.packages:
        print(" ".join(packages()))
        return
    if not args.out:
        parser.error("OUT is missing")
    root = Root(args.root)
    for package, _, domain, licence, notice in SOURCES:
        root.path(os.path.normpath("usr/share/doc/%s/%s" % (package, notice)))
    os.makedirs(args.out, exist_ok=True)
    for domain in DOMAINS:
        documents = [{"name": n, "text": t} for n, t in globals()[domain](root)]
        taken, total = split(documents)
        with open(os.path.join(args.out, domain + ".jsonl"), "w", encoding="utf-8") as f:
            for d in documents:
                f.write(json.dumps(d, ensure_ascii=False) + "\n")
        print("%-10s %5d documents %9d bytes, of which %3d documents %7d bytes held out"
              % (domain, len(documents), total, sum(d["held_out"] for d in documents), taken))


if __name__ == "__main__":
    main()
