"""Top-k of rows of scores, against torch.topk (which sorts what it found and forces nothing)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kvkernels as kk
from bench.race import Contestant, Race

CASES = ((8, 8, 8192, 512), (8, 8, 8192, 64), (8, 8, 131072, 2048), (1, 8, 8192, 512))
QUICK = ((1, 2, 1024, 64),)


def races(threads: int, quick: bool) -> Iterator[Race]:
    for batch, heads, n, k in QUICK if quick else CASES:
        scores = torch.randn(batch, heads, n)
        lens = torch.full((batch,), n, dtype=torch.int32)
        size = 4.0 * (scores.numel() + batch * heads * k)
        contestants = [
            Contestant("select_pages", partial(kk.select_pages, scores, lens, k, page_size=1), size, 0.0),
            Contestant("torch.topk", partial(torch.topk, scores, k, sorted=False), size, 0.0, peer=True),
        ]
        yield Race("select_pages", f"{batch * heads} rows of {n}, k {k}", threads, contestants, ["torch.topk"])
