"""Decoding a whole sequence back to bf16, against a plain copy of as many keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

import kvkernels as kk
from bench.pages import HKV, PAGE, D, data, paged
from bench.race import Contestant, Race

FORMATS = ("bf16", "u4", "u2", "kivi2")


def races(threads: int, quick: bool) -> Iterator[Race]:
    length = 2048 if quick else 32768
    k, v = (torch.randn(length, HKV, D, dtype=torch.bfloat16) for _ in "kv")
    k_copy, v_copy = torch.zeros_like(k), torch.zeros_like(v)
    out = torch.zeros_like(k), torch.zeros_like(v)
    size = 2.0 * k.numel() * k.element_size()

    def copy() -> None:
        k_copy.copy_(k)
        v_copy.copy_(v)

    contestants = []
    for name in FORMATS:
        kv, table = paged(k, v, name, 1)
        slots = (table[0].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()
        rotation = 2.0 * k.numel() * math.log2(D) if kv.formats[0].rotated_k else 0.0
        # written: 16-bit rows, whatever was read; counted as half of a copied byte's two trips
        stored = float(data(kv, 0).numel())
        contestants.append(
            Contestant(
                name,
                partial(kk.read_kv, kv, 0, slots, out=out),
                reads=0.0,
                flops=rotation,
                copies=(stored + size) / 2,
                serial=True,
            )
        )
    contestants.append(Contestant("copy", copy, 0.0, 0.0, copies=size, peer=True))
    yield Race("read_kv", f"T{length}", threads, contestants, ["copy"])
