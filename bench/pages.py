"""The shape of the attention cases (Llama-3-8B's heads) and how their pages are made."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

import kvkernels as kk

HQ, HKV, D, PAGE = 32, 8, 128, 64


def data(kv: kk.PagedKV, pool: int) -> Tensor:
    """The bytes of a pool that is one tensor."""
    return cast(Tensor, kv.pools[pool])


def attend(q: Tensor, kv: kk.PagedKV, table: Tensor, lens: Tensor) -> Tensor:
    """quant_attention without lse."""
    return kk.quant_attention(q, kv, table, lens)


def layers(size: float) -> int:
    """Of how many layers with so many bytes of keys and values a case is made: 8, or what 512 MB hold."""
    return int(min(8, max(1, 2**29 // size)))


def paged(k: Tensor, v: Tensor, name: str, batch: int) -> tuple[kk.PagedKV, Tensor]:
    """k, v [L, HKV, D] bf16 as one sequence, `batch` times over, its pages scattered over the pool; and the table."""
    pages = k.shape[0] // PAGE
    sides = [x.view(pages, PAGE, HKV, D).transpose(1, 2).reshape(pages, HKV, -1) for x in (k, v)]
    kv = kk.PagedKV.empty(["bf16", name], [pages, pages * batch], HKV, D, PAGE)
    data(kv, 0).copy_(torch.cat(sides, -1).view(torch.uint8))
    order = torch.randperm(pages * batch, generator=torch.Generator().manual_seed(1))
    first = order[:pages]
    kk.pack_pages(kv, 0, 1, torch.stack([torch.arange(pages), first], 1).int())
    for copy in range(1, batch):
        data(kv, 1)[order[copy * pages : (copy + 1) * pages]] = data(kv, 1)[first]
    return kk.PagedKV((kv.pools[1],), (kv.formats[1],), PAGE), order.view(batch, pages).int()


def scattered(blocks: list[int]) -> Tensor:
    """A page table whose sequences have so many pages, each anywhere in a pool of sum(blocks)."""
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).int()
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    for row, pages in zip(table, order.split(blocks), strict=True):
        row[: len(pages)] = pages
    return table


def pool_of(name: str, count: int, page: int) -> kk.PagedKV:
    """So many pages of random numbers in a format that can be written token by token."""
    kv = kk.PagedKV.empty(name, count, HKV, D, page)
    for slots in torch.arange(count * page).split(8192):
        k, v = (torch.randn(len(slots), HKV, D, dtype=torch.bfloat16) for _ in "kv")
        kk.write_kv(k, v, kv, 0, slots)
    return kv
