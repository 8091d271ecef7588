"""Pages that live in main memory, and a cache on the device for those that are selected."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvkernels.paged_kv import PagedKV, zero_pool

ALIGN = 64  # bytes of a page record


class Offloaded(NamedTuple):
    """A pool in main memory and its cache, from `offload`, for `gather_pages`.

    host     uint8 [num_pages, Hkv, page_bytes], the pages that entries of the pool number; pinned where the rest is on
             a GPU
    cache    uint8 [B * slots, Hkv, page_bytes]: every sequence has its own slots, and every KV head its own pages in
             them
    slot_of  int32 [B, Hkv, max_pages], the slot of each page of a sequence, or -1
    page_of  int32 [B, Hkv, slots], the page in each slot, or -1
    hand     int32 [B, Hkv], the slot that is given next
    pool     its number in the cache's page table
    """

    host: Tensor
    cache: Tensor
    slot_of: Tensor
    page_of: Tensor
    hand: Tensor
    pool: int

    def reset(self, b: int) -> None:
        """Sequence b begins anew: none of its slots hold a page. Also for pages that were written again."""
        self.slot_of[b] = -1
        self.page_of[b] = -1
        self.hand[b] = 0


def offload(kv: PagedKV, pool: int, slots: int, batch: int, max_pages: int) -> tuple[PagedKV, Offloaded]:
    """Move one pool to main memory, and leave a cache of `slots` pages per sequence and KV head in its place.

    kv         the pool is copied, its bytes as they are; two 16-bit caches become records
    slots      at least the pages that a list has of one KV head; at most max_pages are of use
    batch      sequences
    max_pages  width of the page table

    Returns kv with the cache as that pool, and what gather_pages takes. Page-table entries stay as they are: those of
    the pool number pages of `host` from now on, so of the ops only sparse_attention with the entries of gather_pages
    takes this kv whole; write_kv, read_kv and pack_pages take its other pools.
    Pages are written to host, or to a 16-bit pool that stays and goes to host when its pages are full. A pool without
    pages gives a host without. ValueError: a pool kv does not have, numbers below 1.
    """
    if not 0 <= pool < len(kv.pools):
        raise ValueError(f"offload: pool must be in [0, {len(kv.pools)}), the pools of kv; got {pool}")
    if pool in kv.offloaded:
        raise ValueError(f"offload: pool {pool} is in main memory already")
    for name, value in (("slots", slots), ("batch", batch), ("max_pages", max_pages)):
        if value < 1:
            raise ValueError(f"offload: {name} must be at least 1; got {value}")
    source = kv.pools[pool]
    records = source if isinstance(source, Tensor) else _records(*source)
    device = records.device
    host = zero_pool(records.shape, "cpu")
    if device.type == "cuda":
        host = host.pin_memory()
    host.copy_(records)
    heads = records.shape[1]
    cache = zero_pool((batch * slots, *records.shape[1:]), device)
    state = Offloaded(
        host,
        cache,
        torch.full((batch, heads, max_pages), -1, dtype=torch.int32, device=device),
        torch.full((batch, heads, slots), -1, dtype=torch.int32, device=device),
        torch.zeros(batch, heads, dtype=torch.int32, device=device),
        pool,
    )
    pools = (*kv.pools[:pool], cache, *kv.pools[pool + 1 :])
    return kv._replace(pools=pools, offloaded=(*kv.offloaded, pool)), state


def _records(k: Tensor, v: Tensor) -> Tensor:
    """Two 16-bit caches [num_pages, Hkv, page_size, D] as records of pages."""
    sides = [x.contiguous().view(torch.uint8).flatten(2) for x in (k, v)]
    size = sum(side.shape[2] for side in sides)
    padding = sides[0].new_zeros(*sides[0].shape[:2], -size % ALIGN)
    return torch.cat((*sides, padding), 2)
