"""Bringing pages from host memory into a cache of slots: all of them, some, none. 8 KV heads of 128."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import kvkernels as kk
from bench.pages import HKV, D, pool_of, scattered
from bench.race import Contestant, Race


def races(threads: int, quick: bool) -> Iterator[Race]:
    length, page = 4096 if quick else 131072, 16
    n, listed = length // page, length // page // 16
    table = scattered([n])
    _, store = kk.offload(pool_of("bf16", n, page), 0, slots=2 * listed, batch=1, max_pages=n)
    size = float(kk.format("bf16").page_bytes(page, D) * HKV)
    lists = [torch.arange(i * listed, (i + 1) * listed).int().expand(1, HKV, -1) for i in range(4)]
    turn = [0]

    def all_new() -> Tensor:
        turn[0] = (turn[0] + 1) % len(lists)
        return kk.gather_pages(store, table, lists[turn[0]])

    def one_in_eight() -> Tensor:
        turn[0] = (turn[0] + 1) % 4
        moved = lists[0].clone()
        moved[..., : listed // 8] += (turn[0] + 1) * listed
        return kk.gather_pages(store, table, moved.sort(-1).values)

    def none_new() -> Tensor:
        return kk.gather_pages(store, table, lists[0])

    contestants = [
        Contestant("all new", all_new, 0.0, 0.0, copies=listed * size),
        Contestant("1/8 new", one_in_eight, 0.0, 0.0, copies=listed // 8 * size),
    ]
    yield Race("gather_pages", f"L{length} page {page}, {listed} pages", threads, contestants, [])
    resident = [Contestant("none new", none_new, 4.0 * lists[0].numel(), 0.0)]
    yield Race("gather_pages", f"L{length} page {page}, {listed} pages", threads, resident, [])
