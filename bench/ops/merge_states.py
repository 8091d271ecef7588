"""Merging partial attention results, against the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kvkernels as kk
from bench.race import Contestant, Race

HQ, D = 32, 128


def plain(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(lses, 0)
    return ((lses - lse).exp().unsqueeze(-1) * outs).sum(0), lse


def races(threads: int, quick: bool) -> Iterator[Race]:
    for parts, batch in ((4, 64),) if quick else ((2, 2048), (16, 256)):
        outs, lses = torch.randn(parts, batch, HQ, D), torch.randn(parts, batch, HQ)
        reads = 4.0 * (outs.numel() + lses.numel())
        writes = reads / parts
        flops = 2.0 * outs.numel()
        contestants = [
            Contestant("merge_states", partial(kk.merge_states, outs, lses), reads - writes, flops, copies=writes),
            Contestant("torch", partial(plain, outs, lses), reads - writes, flops, copies=writes, peer=True),
        ]
        yield Race("merge_states", f"{parts} x B{batch} Hq{HQ} fp32", threads, contestants, ["torch"])
