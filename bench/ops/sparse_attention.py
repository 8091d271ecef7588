"""Sparse decode at a budget of 1/16, selection included, against dense decode of the same pages. Llama-3-8B's heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kvkernels as kk
from bench.pages import HKV, HQ, D, data, pool_of, scattered
from bench.race import Contestant, Race

BUDGET = 16  # one page, or token, of so many is read
LABELS = D // 16  # channels of a label cache
ALL_LAYERS = 2e9  # bytes of the keys and values of layers that take turns; 1/16 of them is several times L3


class Case(NamedTuple):
    batch: int
    length: int
    page: int
    format: str = "bf16"

    @property
    def pages(self) -> int:
        return self.length // self.page

    @property
    def label(self) -> str:
        return f"B{self.batch} L{self.length} page {self.page} {self.format}"


CASES = (
    *(Case(1, length, page) for length in (32768, 131072) for page in (16, 64)),
    *(Case(1, length, 16, "u2") for length in (32768, 131072)),
    Case(8, 32768, 16),
)
QUICK = (Case(2, 2048, 16), Case(1, 2048, 16, "u2"))  # 128 tokens are read: more than are always listed


def in_torch(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, page: int, count: int) -> Tensor:
    """Quest as a careful user writes it on contiguous K and V [B, Hkv, L, D], bounds [B, Hkv, n, 2 D]."""
    group = q.view(len(q), HKV, -1, D)
    both = torch.cat([group.clamp_min(0), group.clamp_max(0)], -1)
    scores = (both @ bounds.transpose(-1, -2)).amax(2)
    scores[..., -1] = torch.inf
    chosen = scores.topk(count, -1, sorted=False).indices
    rows = (chosen[..., None] * page + torch.arange(page)).flatten(2)[..., None].expand(-1, -1, -1, D)
    return F.scaled_dot_product_attention(group, k.gather(2, rows), v.gather(2, rows)).flatten(1, 2)


class Problem(NamedTuple):
    """A case's tensors, and the ways to decode a step of it."""

    case: Case
    q: Tensor
    kv: kk.PagedKV
    table: Tensor
    lens: Tensor
    bounds: kk.PageSummaries
    bounds8: kk.PageSummaries
    labels: kk.PageSummaries

    def dense(self) -> Tensor:
        return kk.quant_attention(self.q, self.kv, self.table, self.lens)

    def select_pages(self, scores: Tensor) -> Tensor:
        return kk.select_pages(scores, self.lens, self.case.pages // BUDGET, page_size=self.case.page)

    def select_tokens(self, scores: Tensor) -> Tensor:
        return kk.select_tokens(scores, self.lens, self.case.length // BUDGET)

    def score_pages(self, bounds: kk.PageSummaries) -> Tensor:
        return kk.score_pages(self.q, bounds, self.table, self.lens)

    def score_tokens(self) -> Tensor:
        return kk.score_tokens(self.q, self.labels, self.table, self.lens)

    def read_pages(self, pages: Tensor) -> Tensor:
        return kk.sparse_attention(self.q, self.kv, self.table, self.lens, pages=pages)

    def read_tokens(self, tokens: Tensor) -> Tensor:
        return kk.sparse_attention(self.q, self.kv, self.table, self.lens, tokens=tokens)

    def by_pages(self, bounds: kk.PageSummaries) -> Tensor:
        return self.read_pages(self.select_pages(self.score_pages(bounds)))

    def by_tokens(self) -> Tensor:
        return self.read_tokens(self.select_tokens(self.score_tokens()))

    @property
    def dense_bytes(self) -> float:
        case = self.case
        return float(case.batch * case.pages * HKV * kk.format(case.format).page_bytes(case.page, D))

    def ways(self) -> dict[str, tuple[Callable[[], object], float]]:
        """Whole steps, and the bytes that they read."""
        read = self.dense_bytes / BUDGET
        pages, tokens = self.select_pages(self.score_pages(self.bounds)), self.select_tokens(self.score_tokens())
        return {
            "dense": (self.dense, self.dense_bytes),
            "min/max": (partial(self.by_pages, self.bounds), read + self.bounds.nbytes),
            "min/max, 8 bits": (partial(self.by_pages, self.bounds8), read + self.bounds8.nbytes),
            "labels, tokens": (self.by_tokens, read + self.labels.nbytes),
            "pages again": (partial(self.read_pages, pages), read),
            "tokens again": (partial(self.read_tokens, tokens), read),
        }

    def parts(self) -> dict[str, tuple[Callable[[], object], float]]:
        """Parts of these steps."""
        pages, tokens = self.score_pages(self.bounds), self.score_tokens()
        return {
            "only score_pages": (partial(self.score_pages, self.bounds), self.bounds.nbytes),
            "only select_pages": (partial(self.select_pages, pages), pages.nbytes),
            "only select_tokens": (partial(self.select_tokens, tokens), tokens.nbytes),
        }


def problem(case: Case, device: torch.device) -> Problem:
    torch.manual_seed(0)
    q = torch.randn(case.batch, HQ, D, dtype=torch.bfloat16, device=device)
    kv, table = pool_of(case.format, case.batch * case.pages, case.page), scattered([case.pages] * case.batch)
    kv, table = kv._replace(pools=tuple(data(kv, i).to(device) for i in range(len(kv.pools)))), table.to(device)
    return with_records(case, q, kv, table)


def with_records(case: Case, q: Tensor, kv: kk.PagedKV, table: Tensor) -> Problem:
    lens = torch.full((case.batch,), case.length, dtype=torch.int32, device=q.device)
    channels = torch.arange(0, D, D // LABELS, dtype=torch.int32, device=q.device).expand(HKV, -1).contiguous()
    bounds, bounds8 = (kk.page_summaries(kv, table, lens, bits=bits) for bits in (16, 8))
    labels = kk.page_summaries(kv, table, lens, "channels", channels=channels)
    return Problem(case, q, kv, table, lens, bounds, bounds8, labels)


def layers_of(first: Problem, size: float) -> list[Problem]:
    """Layers with equal numbers in memory of their own: caches are as cold as in a model, the code is as warm."""
    layers = [first]
    while len(layers) * first.dense_bytes < size:
        copy = kk.PagedKV.empty(first.case.format, len(data(first.kv, 0)), HKV, D, first.case.page)
        data(copy, 0).copy_(data(first.kv, 0))
        layers.append(with_records(first.case, first.q, copy, first.table))
    return layers


def races(threads: int, quick: bool) -> Iterator[Race]:
    for case in QUICK if quick else CASES:
        layers = layers_of(problem(case, torch.device("cpu")), 0 if quick else ALL_LAYERS)
        flops = 4.0 * case.batch * case.length * HQ * D
        rate = "bf16" if case.format == "bf16" else "int8"
        against = ["dense"]
        ways = [layer.ways() for layer in layers]
        if case.format == "bf16":
            against.append("min/max in torch")
            for way in ways:
                k, v = (torch.randn(case.batch, HKV, case.length, D, dtype=torch.bfloat16) for _ in "kv")
                chunks = k.unflatten(2, (case.pages, case.page))
                both = torch.cat([chunks.amax(3), chunks.amin(3)], -1)
                torch_step = partial(in_torch, layers[0].q, k, v, both, case.page, case.pages // BUDGET)
                way[against[1]] = (torch_step, layers[0].dense_bytes / BUDGET + both.nbytes)
        contestants = []
        for name, (_, moved) in ways[0].items():
            run, share = [way[name][0] for way in ways], 1 if name == "dense" else BUDGET
            contestants.append(Contestant(name, run, moved, flops / share, rate=rate, peer=name.endswith("torch")))
        parts = [layer.parts() for layer in layers]
        for name, (_, moved) in parts[0].items():
            contestants.append(Contestant(name, [part[name][0] for part in parts], moved, 0.0))
        yield Race("sparse_attention", case.label, threads, contestants, against, cold=False)
