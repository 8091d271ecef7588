"""Decoding on 16-bit caches as other engines hold them, against torch on contiguous K and V. 32 query heads of 128."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kvkernels as kk
from bench import peers
from bench.pages import HQ, D, layers, scattered
from bench.race import Contestant, Race


class Case(NamedTuple):
    lens: tuple[int, ...]
    group: int  # query heads per KV head
    page: int

    @property
    def label(self) -> str:
        lens = f"L{self.lens[0]}" if len(set(self.lens)) == 1 else f"L{max(self.lens)} + {min(self.lens)}s"
        return f"B{len(self.lens)} {lens} G{self.group} page {self.page}"


LONG_AND_SHORT = (65536,) + (1024,) * 15
CASES = (
    *(Case((n,), 4, 16) for n in (128, 1024, 8192, 32768, 131072)),
    *(Case((8192,), group, 16) for group in (1, 8)),
    *(Case((8192,), 4, page) for page in (1, 64)),
    Case((32768,), 8, 64),
    *(Case((n,) * 8, 4, 16) for n in (128, 1024, 8192)),
    Case((8192,) * 8, 1, 16),
    Case((8192,) * 8, 8, 1),
    Case((32768,) * 8, 8, 64),
    Case((128,) * 32, 4, 16),
    Case((1024,) * 32, 1, 16),
    Case((4096,) * 32, 8, 16),
    Case(LONG_AND_SHORT, 4, 16),
)
QUICK = (Case((1024,), 4, 16), Case((900, 100, 17), 4, 1))
# One KV head: a schedule that gives a sequence and head to one thread has nothing to share out.
STREAM_K = Case(LONG_AND_SHORT, HQ, 16)


def caches(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_cache, v_cache [num_blocks, page, Hkv, D] bf16, block_table, seq_lens; blocks of a sequence lie anywhere."""
    heads = HQ // case.group
    blocks = [-(-n // case.page) for n in case.lens]
    table = scattered(blocks)
    k, v = (torch.randn(sum(blocks), case.page, heads, D, dtype=torch.bfloat16) for _ in "kv")
    return k, v, table, torch.tensor(case.lens, dtype=torch.int32)


def contiguous(cache: Tensor, table: Tensor, lens: Tensor) -> list[Tensor]:
    """The same as [1, Hkv, L, D] per sequence, or all in one [B, Hkv, L, D] where their lengths are equal."""
    rows = []
    for blocks, n in zip(table, lens.tolist(), strict=True):
        used = blocks[: -(-n // cache.shape[1])].long()
        rows.append(cache[used].flatten(0, 1)[:n].transpose(0, 1).contiguous()[None])
    return [torch.cat(rows)] if len(set(lens.tolist())) == 1 else rows


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def each(function: Attention, qs: list[Tensor], ks: list[Tensor], vs: list[Tensor]) -> None:
    for q, k, v in zip(qs, ks, vs, strict=True):
        function(q, k, v)


def races(threads: int, quick: bool) -> Iterator[Race]:
    for case in (*QUICK,) if quick else (*CASES, STREAM_K):
        torch.manual_seed(0)
        q = torch.randn(len(case.lens), HQ, D, dtype=torch.bfloat16)
        k, v, table, lens = caches(case)
        count = layers(k.nbytes + v.nbytes)
        held = [(k, v), *((k.clone(), v.clone()) for _ in range(1, count))]
        size = 4.0 * sum(case.lens) * (HQ // case.group) * D
        flops = 4.0 * sum(case.lens) * HQ * D
        decode = [partial(kk.flash_decode, q, *layer, table, lens) for layer in held]
        contestants = [Contestant("flash_decode", decode, size, flops, rate="bf16")]
        if case is STREAM_K:
            # intervals as long as the longest sequence: one per sequence and head
            fixed = [partial(call, split_tokens=max(case.lens)) for call in decode]
            contestants.append(Contestant("fixed split", fixed, size, flops, rate="bf16"))
            yield Race("flash_decode", case.label, threads, contestants, ["fixed split"])
            continue
        flat = [[contiguous(x, table, lens) for x in layer] for layer in held]
        qs = list(q.split(1)) if len(flat[0][0]) > 1 else [q]
        functions: dict[str, Attention] = {
            "sdpa": peers.sdpa,
            "sdpa grouped": peers.sdpa_grouped,
            "matmul": peers.matmul,
        }
        if not quick:  # compiles for seconds
            functions["flex"] = peers.flex()
        for name, function in functions.items():
            run = [partial(each, function, qs, *layer) for layer in flat]
            contestants.append(Contestant(name, run, size, flops, rate="bf16", peer=True))
        yield Race("flash_decode", case.label, threads, contestants, list(functions))
