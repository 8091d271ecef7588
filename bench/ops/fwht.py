"""Walsh-Hadamard transform of rows, against a matmul with the Hadamard matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

import kvkernels as kk
from bench.race import Contestant, Race


def races(threads: int, quick: bool) -> Iterator[Race]:
    for dim in (128,) if quick else (64, 128, 256, 4096):
        rows = 2**16 // dim if quick else 2**24 // dim
        x = torch.randn(rows, dim)
        matrix = kk.fwht(torch.eye(dim))
        size = float(x.numel() * x.element_size())
        ours = Contestant("fwht", partial(kk.fwht, x), 0.0, x.numel() * math.log2(dim), copies=size)
        theirs = Contestant(
            "matmul", partial(torch.matmul, x, matrix), 0.0, 2.0 * x.numel() * dim, copies=size, peer=True
        )
        yield Race("fwht", f"{rows} x {dim} fp32", threads, [ours, theirs], ["matmul"])
