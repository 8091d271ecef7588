"""Finding what sequences share, once per step and for all layers: against reading the page table once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kvkernels as kk
from bench.race import Contestant, Race

PAGE = 16


def grouped(table: Tensor, prefix: int) -> Tensor:
    """The least that must be done: compare every row with its neighbour."""
    return (table[1:, :prefix] == table[:-1, :prefix]).all(1)


def races(threads: int, quick: bool) -> Iterator[Race]:
    for batch, prefix, own in ((8, 16, 2),) if quick else ((16, 256, 8), (256, 512, 8), (256, 0, 520), (1024, 64, 8)):
        pages = torch.arange(prefix + batch * own, dtype=torch.int32)
        table = torch.cat([pages[:prefix].expand(batch, -1), pages[prefix:].view(batch, own)], 1)
        lens = torch.full((batch,), table.shape[1] * PAGE, dtype=torch.int32)
        reads = 4.0 * batch * (prefix if prefix else 1)
        contestants = [
            Contestant("plan_prefix", partial(kk.plan_prefix, table, lens, PAGE), reads, 0.0),
            Contestant("torch compare", partial(grouped, table, max(prefix, 1)), reads, 0.0, peer=True),
        ]
        label = f"B{batch}, {prefix} pages shared, {own} own"
        yield Race("plan_prefix", label, threads, contestants, ["torch compare"], cold=False, inner=5)
