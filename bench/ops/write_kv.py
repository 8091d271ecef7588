"""Writing a prompt into pages, against a plain copy of the same keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

import kvkernels as kk
from bench.pages import HKV, PAGE, D
from bench.race import Contestant, Race

FORMATS = ("bf16", "u8", "u4", "u3", "u2", "t1", "b1", "m31/u2.e5m3")


def races(threads: int, quick: bool) -> Iterator[Race]:
    length = 2048 if quick else 32768
    k, v = (torch.randn(length, HKV, D, dtype=torch.bfloat16) for _ in "kv")
    k_copy, v_copy = torch.empty_like(k), torch.empty_like(v)
    slots = torch.arange(length)
    order = torch.stack([torch.randperm(D) for _ in range(HKV)]).int()
    transform = kk.KVTransform(torch.randn(HKV, D), torch.rand(HKV, D) + 0.5, order)
    size = 2.0 * k.numel() * k.element_size()
    rotation = 2.0 * k.numel() * math.log2(D)  # additions of one Walsh-Hadamard transform per row of K and of V

    def copy() -> None:
        k_copy.copy_(k)
        v_copy.copy_(v)

    contestants = []
    for name in FORMATS:
        kv = kk.PagedKV.empty([name], length // PAGE, HKV, D, PAGE, transform=transform)
        contestants.append(
            Contestant(
                name,
                partial(kk.write_kv, k, v, kv, 0, slots),
                reads=0.0,
                flops=0.0 if name == "bf16" else rotation,
                copies=size,
                serial=True,
            )
        )
    contestants.append(Contestant("copy", copy, 0.0, 0.0, copies=size, peer=True))
    yield Race("write_kv", f"T{length}", threads, contestants, ["copy"])
