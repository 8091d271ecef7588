"""quant_attention over one token, warm: what a call costs before any work."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kvkernels as kk
from bench import peers
from bench.pages import HKV, HQ, PAGE, D
from bench.race import Contestant, Race


def races(threads: int, quick: bool) -> Iterator[Race]:
    q = torch.randn(1, HQ, D, dtype=torch.bfloat16)
    out = torch.empty_like(q)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    flops = 4.0 * HQ * D
    contestants = []
    for name in ("bf16", "u2"):
        kv = kk.PagedKV.empty([name], 1, HKV, D, PAGE)
        reads = HKV * kv.formats[0].bits_per_element(PAGE, D) / 8 * 2 * D
        contestants.append(Contestant(name, partial(kk.quant_attention, q, kv, table, lens), reads, flops))
        contestants.append(
            Contestant(f"{name} out=", partial(kk.quant_attention, q, kv, table, lens, out=out), reads, flops)
        )
    k, v = (torch.randn(1, HKV, 1, D, dtype=torch.bfloat16) for _ in "kv")
    contestants.append(Contestant("sdpa bf16", partial(peers.sdpa, q, k, v), 4.0 * HKV * D, flops, peer=True))
    yield Race("call_overhead", "B1 L1", threads, contestants, ["sdpa bf16"], cold=False, inner=50 if quick else 500)
