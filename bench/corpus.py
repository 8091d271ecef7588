"""English text for measurements on a real model, out of Debian packages: `python -m bench.corpus` lists it.

Novels (Jane Austen), an FAQ on political theory, a handbook of system administration, and a dictionary of slang. The
packages are fetched with apt-get, which needs no root to download, and unpacked with dpkg-deb; the plain text is kept
in build/. Only on Debian and its kin.
"""

from __future__ import annotations

import gzip
import html
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import build

CACHE = build.ROOT / "build" / "corpus"


def paragraphs(text: str) -> str:
    """One line per paragraph, an empty one between them; headings, page numbers and the like dropped."""
    joined = (re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in joined if len(p) > 80)


def from_html(page: str) -> str:
    page = re.sub(r"(?is)<(script|style|head|pre)[^>]*>.*?</\1>", " ", page)
    page = re.sub(r"(?i)</(p|h\d|li|div|dd|dt|tr|blockquote)>", "\n\n", page)
    return html.unescape(re.sub(r"<[^>]+>", "", page)).replace("\xa0", " ")


def novels(folder: Path) -> str:
    """An R package: blocks of 4 bytes of length and a zlib stream, in them strings after a type word and a length."""
    data = next(folder.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")).read_bytes()
    books = []
    while data:
        stream = zlib.decompressobj()
        raw = stream.decompress(data[4:])
        data = stream.unused_data
        lines, end = [], 0
        for mark in re.finditer(rb"\0[\0-\xff]{2}\x09(....)", raw, re.S):  # a string's flags, 9 = CHARSXP
            (length,) = struct.unpack(">i", mark[1])
            if mark.start() >= end and 0 <= length < 2000:
                end = mark.end() + length
                lines.append(raw[mark.end() : end].decode("utf-8", "replace"))
        books.append("\n".join(lines))
    return "\n\n".join(book for book in books if len(book) > 200_000)


def pages(pattern: str) -> Callable[[Path], str]:
    return lambda folder: "\n\n".join(
        from_html(path.read_text(encoding="utf-8", errors="replace")) for path in sorted(folder.glob(pattern))
    )


def slang(folder: Path) -> str:
    return gzip.decompress(next(folder.glob("usr/share/doc/jargon-text/jargon.txt.gz")).read_bytes()).decode("utf-8")


class Source(NamedTuple):
    name: str
    package: str
    read: Callable[[Path], str]


SOURCES = (
    Source("novels", "r-cran-janeaustenr", novels),
    Source("faq", "anarchism", pages("usr/share/doc/anarchism/html/*.html")),
    Source("handbook", "debian-handbook", pages("usr/share/doc/debian-handbook/html/en-US/*.html")),
)
CALIBRATION = Source("slang", "jargon-text", slang)  # on which nothing is measured


def text(source: Source) -> str:
    path = CACHE / f"{source.name}.txt"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for step in (["apt-get", "download", source.package], ["sh", "-c", "dpkg-deb -x *.deb unpacked"]):
                done = subprocess.run(step, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if done.returncode:
                    raise SystemExit(f"bench: `{' '.join(step)}` failed\n{done.stdout}")
            found = paragraphs(source.read(Path(folder, "unpacked")))
        part = path.with_suffix(".part")
        part.write_text(found, encoding="utf-8")
        part.rename(path)
    return path.read_text(encoding="utf-8")


def chunks(tokenizer: Any, source: Source, count: int, tokens: int) -> list[Tensor]:
    """`count` runs of `tokens` token ids from equally spaced places of the text, each from the start of a paragraph."""
    whole = text(source)
    found = []
    for i in range(count):
        begin = whole.index("\n\n", int(len(whole) * (i + 0.5) / count * 0.98)) + 2
        ids = tokenizer(whole[begin : begin + 10 * tokens], add_special_tokens=False).input_ids
        if len(ids) < tokens:
            raise SystemExit(f"bench: {source.name} has only {len(ids)} tokens from character {begin}; need {tokens}")
        found.append(torch.tensor(ids[:tokens]))
    return found


if __name__ == "__main__":
    for each in (*SOURCES, CALIBRATION):
        print(f"{each.name:10} {len(text(each)) / 1e6:5.1f} M characters   {text(each)[100_000:100_070]!r}")
