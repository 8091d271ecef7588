"""Inverses of unit lower triangular matrices, as the chunk form of the delta rule has them, against torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kvkernels as kk
from bench.race import Contestant, Race

METHODS = ("substitution", "blocked", "blocked_tf32", "blocked_bf16x3")


def solve(A: Tensor, unit: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(A, unit, upper=False, unitriangular=True)


def races(threads: int, quick: bool) -> Iterator[Race]:
    for n, batch in ((64, 8),) if quick else ((64, 2048), (128, 512)):
        A = (torch.randn(batch, n, n) * n**-0.5).tril(-1)
        flops = batch * n**3 / 3  # n^3 / 6 products, of the half that is not zero
        moved = 4.0 * A.numel()
        contestants = [
            Contestant(method, partial(kk.tril_inverse, A, method=method), 0.0, flops, copies=moved)
            for method in METHODS
        ]
        unit = torch.eye(n).expand_as(A)
        run = partial(solve, A, unit)
        contestants.append(Contestant("solve_triangular", run, 0.0, flops, copies=moved, peer=True))
        yield Race("tril_inverse", f"{batch} x {n} x {n}", threads, contestants, ["solve_triangular"])
