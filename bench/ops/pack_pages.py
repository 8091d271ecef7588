"""Re-encoding 16-bit pages that leave the recent window, against a plain copy of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

import kvkernels as kk
from bench.pages import HKV, PAGE, D, data
from bench.race import Contestant, Race

FORMATS = ("u8", "u4", "u3", "u2", "kivi2")


def races(threads: int, quick: bool) -> Iterator[Race]:
    pages = 32 if quick else 512
    values = torch.randn(pages, HKV, 2 * PAGE * D, dtype=torch.bfloat16).view(torch.uint8)
    other = torch.empty_like(values)
    pairs = torch.arange(pages, dtype=torch.int32)[:, None].repeat(1, 2)
    contestants = []
    for name in FORMATS:
        kv = kk.PagedKV.empty(["bf16", name], pages, HKV, D, PAGE)
        data(kv, 0).copy_(values)
        rotation = values.numel() / 2 * math.log2(D) if kv.formats[1].rotated_k else 0.0
        contestants.append(
            Contestant(
                name,
                partial(kk.pack_pages, kv, 0, 1, pairs),
                reads=0.0,
                flops=rotation,
                copies=(values.numel() + data(kv, 1).numel()) / 2,
                serial=True,
            )
        )
    contestants.append(Contestant("copy", partial(other.copy_, values), 0.0, 0.0, copies=values.numel(), peer=True))
    yield Race("pack_pages", f"{pages} pages", threads, contestants, ["copy"])
