"""Sequences with common beginnings: reading those once against reading them once per sequence. Heads of 128."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kvkernels as kk
from bench.pages import D, layers
from bench.race import Contestant, Race, Run


class Tree(NamedTuple):
    """nodes[i] runs of tokens[i] tokens on level i, each shared by equally many of the next; the last are sequences."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    heads: tuple[int, int] = (32, 8)
    page: int = 16
    format: str = "bf16"

    @property
    def label(self) -> str:
        shape = " ".join(f"{n}x{t}" for n, t in zip(self.nodes, self.tokens, strict=True))
        return f"{shape}, {self.heads[0]}/{self.heads[1]} heads, {self.format}"


PREFIXES = (1024, 4096, 16384)
CASES = (
    *(Tree((1, 16), (prefix, 128)) for prefix in PREFIXES),
    Tree((1, 16), (4096, 128), (32, 32)),
    Tree((1, 16), (4096, 128), (32, 4)),
    Tree((1, 16), (4096, 128), format="u2"),
    Tree((4, 32), (4096, 128)),
    # a tree of FastTree's kernel benchmark and its upper levels alone, with two of its pairs of heads
    Tree((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256), page=8),
    *(Tree((1, 4, 16, 64), (256, 8, 256, 64), heads, page=8) for heads in ((32, 8), (32, 32))),
    Tree((1, 2, 4, 8, 16, 32), (1024, 512, 256, 128, 64, 32)),
    Tree((1, 16), (0, 4096)),  # nothing is shared
)
QUICK = (Tree((1, 4), (256, 32)),)


def table_of(tree: Tree, shared: bool) -> tuple[Tensor, int]:
    """The page table, and how many pages it names; not shared: every sequence has pages of its own."""
    leaves, next_page, columns = tree.nodes[-1], 0, []
    for nodes, tokens in zip(tree.nodes, tree.tokens, strict=True):
        runs, pages = nodes if shared else leaves, tokens // tree.page
        ids = torch.arange(next_page, next_page + runs * pages, dtype=torch.int32).view(runs, pages)
        columns.append(ids.repeat_interleave(leaves // runs, 0))
        next_page += runs * pages
    table = torch.cat(columns, 1)
    scatter = torch.randperm(next_page, generator=torch.Generator().manual_seed(1)).int()
    return scatter[table.long()], next_page


def pages_of(tree: Tree, count: int) -> kk.PagedKV:
    heads, page = tree.heads[1], tree.page
    k, v = (torch.randn(count, page, heads, D, dtype=torch.bfloat16) for _ in "kv")
    kv = kk.PagedKV.from_caches(k, v)
    if tree.format == "bf16":
        return kv
    packed = kk.PagedKV.empty(tree.format, count, heads, D, page)
    both = kk.PagedKV((*kv.pools, *packed.pools), (*kv.formats, *packed.formats), page)
    kk.pack_pages(both, 0, 1, torch.arange(count, dtype=torch.int32)[:, None].expand(-1, 2).contiguous())
    return packed


def races(threads: int, quick: bool) -> Iterator[Race]:
    for tree in QUICK if quick else CASES:
        torch.manual_seed(0)
        batch = tree.nodes[-1]
        q = torch.randn(batch, tree.heads[0], D, dtype=torch.bfloat16)
        length = sum(tree.tokens)
        lens = torch.full((batch,), length, dtype=torch.int32)
        per_token = tree.heads[1] * kk.format(tree.format).page_bytes(tree.page, D) / tree.page
        once = per_token * sum(n * t for n, t in zip(tree.nodes, tree.tokens, strict=True))
        flops = 4.0 * batch * length * tree.heads[0] * D
        rate = "bf16" if tree.format == "bf16" else "int8"

        table, count = table_of(tree, shared=True)
        held = [pages_of(tree, count) for _ in range(layers(once))]
        plan = kk.plan_prefix(table, lens, tree.page)

        own, own_count = table_of(tree, shared=False)
        runs: dict[str, Run] = {
            "prefix": [partial(kk.prefix_attention, q, kv, table, lens, plan=plan) for kv in held],
            "prefix, with its plan": [partial(kk.prefix_attention, q, kv, table, lens) for kv in held],
            "per sequence": [partial(kk.quant_attention, q, kv, table, lens) for kv in held],
        }
        contestants = [Contestant(name, run, once, flops, rate=rate) for name, run in runs.items()]
        against = ["per sequence"]
        if own_count > count:
            # the same without any page in common: no cache can help
            apart = [pages_of(tree, own_count) for _ in held]
            run = [partial(kk.quant_attention, q, kv, own, lens) for kv in apart]
            contestants.append(Contestant("no page in common", run, per_token * batch * length, flops, rate=rate))
            against.append("no page in common")
        yield Race("prefix_attention", tree.label, threads, contestants, against)
