"""Summaries of all pages of a prompt, and of the page that a new token went to. 8 KV heads of 128."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kvkernels as kk
from bench.pages import HKV, D, pool_of, scattered
from bench.race import Contestant, Race


def races(threads: int, quick: bool) -> Iterator[Race]:
    length, page = 1024 if quick else 32768, 16
    n = length // page
    channels = torch.arange(0, D, 16, dtype=torch.int32).expand(HKV, -1).contiguous()
    table, lens = scattered([n]), torch.tensor([length], dtype=torch.int32)
    for name in ("bf16", "u2"):
        kv = pool_of(name, n, page)
        keys = float(kk.format(name).data_bytes(page, D) // 2 * n * HKV)
        contestants = []
        for kind, bits in (("minmax", 16), ("minmax", 8), ("mean", 16), ("channels", 16)):
            chosen = channels if kind == "channels" else None
            out = kk.page_summaries(kv, table, lens, kind, bits=bits, channels=chosen)
            run = partial(kk.page_summaries, kv, table, lens, kind, bits=bits, channels=chosen, out=out)
            # written: the records; counted as half of a copied byte's two trips
            contestants.append(Contestant(f"{kind}, {bits} bits", run, keys, 0.0, copies=out.nbytes / 2))
        yield Race("page_summaries", f"L{length} page {page} {name}", threads, contestants, [])
