"""Bringing pages from host memory into a cache of slots: all of them, some, none. 8 KV heads of 128."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import kvkernels as kk
from bench.pages import HKV, D, pool_of, scattered
from bench.race import Contestant, Race


def races(threads: int, quick: bool) -> Iterator[Race]:
    length, page = 4096 if quick else 262144, 16
    n, listed = length // page, length // page // 16
    table = scattered([n])
    # Room for one eighth more than a list: what comes again in four calls has gone.
    _, store = kk.offload(pool_of("bf16", n, page), 0, slots=listed + listed // 8, batch=1, max_pages=n)
    size = float(kk.format("bf16").page_bytes(page, D) * HKV)
    first = torch.arange(listed, dtype=torch.int32).expand(1, HKV, -1)
    new = {"all": cycle([first + i * listed for i in range(4)])}
    eighth = []
    for i in range(1, 5):
        moved = first.clone()
        moved[..., : listed // 8] += i * listed
        eighth.append(moved.sort(-1).values)
    new["1/8"] = cycle(eighth)

    def gather(lists: Iterator[Tensor]) -> Tensor:
        return kk.gather_pages(store, table, next(lists))

    label = f"L{length} page {page}, {listed} pages"
    for share, copied in (("all", listed), ("1/8", listed // 8)):
        contestant = Contestant(f"{share} new", partial(gather, new[share]), 0.0, 0.0, copies=copied * size)
        yield Race("gather_pages", label, threads, [contestant], [])
    there = Contestant("none new", partial(kk.gather_pages, store, table, first), 4.0 * first.numel(), 0.0)
    yield Race("gather_pages", label, threads, [there], [])
