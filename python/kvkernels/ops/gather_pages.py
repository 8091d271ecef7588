"""gather_pages: bring selected pages from main memory into a cache on the device, those that are not there."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import formats
from kvkernels.offloaded import Offloaded
from kvkernels.ops import _args, _reference
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PAGE_BITS, PAGE_MASK

DTYPES = ()  # pages only
FORMATS = tuple(f.name for f in formats())

_op = torch.ops.kvkernels.gather_pages.default


def gather_pages(offloaded: Offloaded, page_table: Tensor, pages: Tensor) -> Tensor:
    """Bring the listed pages from main memory into the cache, those that it has not, for sparse_attention.

    offloaded   of offload; cache, slot_of, page_of and hand are changed in place
    page_table  int32 [B, max_pages], as wide as offload was told. Entries of the offloaded pool number pages of host
    pages       int32 [B or 1, Hkv or 1, K] of select_pages: ascending, distinct, up to the first negative one; K is at
                most the slots of a sequence

    Returns entries int32 [B, Hkv, K], -1 behind a list: where each KV head finds its pages, for
    sparse_attention(q, kv, page_table, seq_lens, pages=pages, entries=entries) with the kv of offload. Pages of other
    pools keep their entries, and take no slot. Of the offloaded pool, a page that is there stays; any other takes the
    next slot, round about, that holds no page of the list. Enqueued on the current stream, like attention: nothing is
    waited for, and on CUDA the kernel reads host memory by itself, page by page. K = 0 does nothing.

    A page that was written again in host is not brought again by itself: offloaded.reset(b). ValueError: dtypes, shapes
    or devices that do not fit; host memory that is not pinned beside a cache on a GPU; pages, entries or a state that
    are wrong (seen on CPU).

    Source: Sun et al. 2024, arXiv:2410.21465 (ShadowKV: values in main memory, landmarks on the device).
    """
    try:
        host, cache, slot_of, page_of, hand, pool = offloaded
        on_gpu = cache.is_cuda and not host.is_cuda
        if on_gpu and not torch.compiler.is_compiling() and not host.is_pinned():
            raise ValueError("gather_pages: host must be pinned memory, because cache is on a GPU; got pageable memory")
        entries = torch.empty((*hand.shape, pages.shape[-1]), dtype=torch.int32, device=hand.device)
        _op(host, cache, page_table, pool, pages, slot_of, page_of, hand, entries)
        _args.written(cache, slot_of, page_of, hand)
        return entries
    except Exception as e:
        raise refused(gather_pages, e, locals()) from None


@torch.library.register_fake("kvkernels::gather_pages")
def _(host: Tensor, cache: Tensor, page_table: Tensor, pool: int, pages: Tensor, slot_of: Tensor, page_of: Tensor,
      hand: Tensor, entries: Tensor) -> None:  # fmt: skip
    _args.same_device("gather_pages", cache=cache, page_table=page_table, pages=pages, slot_of=slot_of,
                      page_of=page_of, hand=hand, entries=entries)  # fmt: skip


def reference(offloaded: Offloaded, page_table: Tensor, pages: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The definition, also in place. dtype is not used: bytes are copied."""
    host, cache, slot_of, page_of, hand, pool = offloaded
    B, heads, slots = page_of.shape
    lists = pages.expand(B, heads, -1)
    entries = torch.full(lists.shape, -1, dtype=torch.int32)
    for b in range(B):
        for h in range(heads):
            wanted = []
            for page in lists[b, h].tolist():
                if page < 0:
                    break
                wanted.append(page)
            for i, page in enumerate(wanted):
                entry = int(page_table[b, page])
                if entry >> PAGE_BITS == pool:
                    if slot_of[b, h, page] < 0:
                        slot = int(hand[b, h])
                        while int(page_of[b, h, slot]) in wanted:
                            slot = (slot + 1) % slots
                        hand[b, h] = (slot + 1) % slots
                        if page_of[b, h, slot] >= 0:
                            slot_of[b, h, page_of[b, h, slot]] = -1
                        page_of[b, h, slot], slot_of[b, h, page] = page, slot
                        cache[b * slots + slot, h] = host[entry & PAGE_MASK, h]
                    entry = pool << PAGE_BITS | b * slots + int(slot_of[b, h, page])
                entries[b, h, i] = entry
    return entries


def cases() -> list[dict[str, Any]]:
    """steps: lists that were gathered before. resident: every so many pages is one of another pool."""
    base = {"B": 2, "Hkv": 2, "K": 5, "slots": 7, "max_pages": 20, "bytes": 192, "pool": 0, "steps": 0}
    return [
        base,
        *({**base, "steps": steps} for steps in (1, 6)),
        {**base, "steps": 3, "pool": 2, "resident": 3},
        {**base, "steps": 4, "slots": 5},
        {**base, "steps": 2, "shared": "heads", "bytes": 4160},
        {**base, "steps": 2, "shared": "both"},
        {**base, "K": 40, "slots": 48, "max_pages": 300, "steps": 3, "bytes": 64},
        {**base, "strided": True, "steps": 1},
        {**base, "K": 0},
        {**base, "B": 0},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pages of host that are not listed, and entries of such, must not be read."""
    gen = torch.Generator().manual_seed(seed)
    B, heads, K, slots, width, pool = (case[k] for k in ("B", "Hkv", "K", "slots", "max_pages", "pool"))
    host = torch.randint(0, 256, (B * width + 3, heads, case["bytes"]), dtype=torch.uint8, generator=gen)
    if case.get("strided"):
        host = torch.cat((host, host), 2)[:, :, case["bytes"] :]
    cache = torch.zeros(B * slots, heads, case["bytes"], dtype=torch.uint8)
    table = (torch.randperm(len(host), generator=gen)[: B * width].view(B, width) + (pool << PAGE_BITS)).int()
    if "resident" in case:
        table[:, :: case["resident"]] += 1 << PAGE_BITS
    state = Offloaded(
        host,
        cache,
        torch.full((B, heads, width), -1, dtype=torch.int32),
        torch.full((B, heads, slots), -1, dtype=torch.int32),
        torch.zeros(B, heads, dtype=torch.int32),
        pool,
    )
    shape = {"heads": (B, 1), "both": (1, 1)}.get(case.get("shared", ""), (B, heads))
    lists = [_random_lists(shape, K, width, gen) for _ in range(case["steps"] + 1)]
    for pages in lists[:-1]:
        reference(state, table, pages)
    listed = torch.zeros(B, heads, width + 1, dtype=torch.bool)
    listed.scatter_(2, lists[-1].expand(B, heads, K).long().where(lists[-1] >= 0, width), True)
    table[~listed[..., :width].any(1)] = _reference.NO_PAGE
    return (state, table, lists[-1]), {}


def _random_lists(shape: tuple[int, int], K: int, width: int, gen: torch.Generator) -> Tensor:
    """Of K pages or fewer; half of them where the lists before had many too."""
    lists = torch.full((*shape, K), -1, dtype=torch.int32)
    weight = 1.0 / torch.arange(1, width + 1)
    for row in lists.flatten(0, 1):
        count = int(torch.randint(0, K + 1, (1,), generator=gen)) if torch.rand(1, generator=gen) < 0.3 else K
        if count:
            row[:count] = torch.multinomial(weight, count, generator=gen).sort().values
    return lists


def cost(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the records that are read and written, if none is there."""
    return 2 * case["B"] * case["Hkv"] * case["K"] * case["bytes"], 0
