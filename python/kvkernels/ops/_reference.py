"""What the references and the input makers share: pages one at a time, with every id checked."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import PACKED_HEAD_DIMS, codec, decode_page, encode_page, format
from kvkernels.paged_kv import PAGE_BITS, KVTransform, PagedKV

POISON = 0xFF  # as a byte of a 16-bit number or of an fp16 scale it makes NaN
NO_PAGE = 0x7FFFFFFF  # a page-table entry that must not be looked at: pool 7, page 2^28 - 1


def read_page(kv: PagedKV, pool: int, page: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [Hkv, page_size, D] of a page as the user wrote them."""
    data = kv.pools[pool]
    if isinstance(data, tuple):
        return data[0][page].to(dtype), data[1][page].to(dtype)
    basis = torch.float64 if dtype == torch.float64 else torch.float32
    k, v = decode_page(kv.formats[pool], data[page], kv.page_size, head_dim, kv.transform, basis)
    return k.to(dtype), v.to(dtype)


def token_positions(kv: PagedKV, pool: int, token: int, head_dim: int) -> Tensor:
    """Bytes of a record that belong to one token alone. The keys of whole-page formats have none."""
    fmt = kv.formats[pool]
    v = fmt.v_offset(kv.page_size, head_dim) + codec(fmt.v).token_bytes("v", token, kv.page_size, head_dim)
    if codec(fmt.k).whole_pages("k"):
        return v
    return torch.cat((codec(fmt.k).token_bytes("k", token, kv.page_size, head_dim), v))


def locate(kv: PagedKV, entry: int, where: str) -> tuple[int, int]:
    """Page-table entry -> pool, page; ValueError for one that does not exist."""
    pool, page = entry >> 28, entry & 0x0FFFFFFF
    if entry < 0 or pool >= len(kv.pools):
        raise ValueError(f"{where} = {entry} means pool {pool}, but there are {len(kv.pools)}")
    pages = num_pages(kv, pool)
    if page >= pages:
        raise ValueError(f"{where} means page {page} of pool {pool}, which has {pages} pages")
    return pool, page


def num_pages(kv: PagedKV, pool: int) -> int:
    data = kv.pools[pool]
    return (data[0] if isinstance(data, tuple) else data).shape[0]


def locate_slot(kv: PagedKV, pool: int, slot: int, where: str) -> tuple[int, int]:
    """Slot -> page, token in the page."""
    page, token = divmod(slot, kv.page_size)
    if page >= num_pages(kv, pool):
        raise ValueError(f"{where} = {slot}, but pool {pool} has {num_pages(kv, pool)} pages of {kv.page_size} tokens")
    return page, token


def randn(shape: tuple[int, ...], gen: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=gen).to(dtype)


def random_transform(num_kv_heads: int, head_dim: int, gen: torch.Generator) -> KVTransform:
    shape = (num_kv_heads, head_dim)
    order = torch.stack([torch.randperm(head_dim, generator=gen) for _ in range(num_kv_heads)])
    return KVTransform(randn(shape, gen), torch.exp(0.5 * randn(shape, gen)), order.int())


def head_dims(name: str) -> tuple[int, ...]:
    """Head dims of the cases of a format; 128 alone where its grids and scales are those of others that have all."""
    return (128,) if name.endswith(".e5m3") or name == "m21/u2" else PACKED_HEAD_DIMS


def random_pool(name: str, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int,
                transform: KVTransform | None, gen: torch.Generator) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A pool full of random tokens. name "u2", "u3/u2", or "bf16 NHD" / "f16 HND": two caches in that layout."""
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    k, v = randn(shape, gen), randn(shape, gen)
    fmt_name, _, layout = name.partition(" ")
    fmt = format(fmt_name)
    if not layout:
        return encode_page(fmt, k, v, transform)
    caches = (k.to(cache_dtype(fmt.k)), v.to(cache_dtype(fmt.v)))
    if layout == "NHD":  # stored [num_pages, page_size, Hkv, D]
        caches = (caches[0].transpose(1, 2).contiguous().transpose(1, 2),
                  caches[1].transpose(1, 2).contiguous().transpose(1, 2))  # fmt: skip
    return caches


def cache_dtype(name: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "f16": torch.float16}[name]


def poison_page(kv: PagedKV, pool: int, page: int, heads: slice = slice(None)) -> None:
    data = kv.pools[pool]
    for part in data if isinstance(data, tuple) else (data,):
        part[page, heads] = float("nan") if part.dtype.is_floating_point else POISON


def poison_tokens(kv: PagedKV, pool: int, page: int, tokens: Iterable[int], head_dim: int,
                  heads: slice = slice(None)) -> None:  # fmt: skip
    """Of a page, in all KV heads or some."""
    data = kv.pools[pool]
    for token in tokens:
        if isinstance(data, tuple):
            for part in data:
                part[page, heads, token] = float("nan")
        else:
            where = token_positions(kv, pool, token, head_dim)
            data[page, heads][:, where] = POISON


def random_cache(
    case: dict[str, Any], gen: torch.Generator, seen: Callable[[int], Iterable[int]]
) -> tuple[PagedKV, Tensor]:
    """A cache and a page table for sequences of case["lens"] tokens, whose pages go round the pools. What must not be
    read is poisoned: pages of nobody and tokens past the end; entries of pages that seen(length) lacks are no pages."""
    heads, D, page_size = case["Hkv"], case["D"], case["page_size"]
    lens, names = case["lens"], case["formats"]
    transform = random_transform(heads, D, gen) if case.get("transform") else None
    pages = [-(-n // page_size) for n in lens]
    count = sum(-(-n // len(names)) for n in pages) + 2
    pools = tuple(random_pool(name, count, heads, page_size, D, transform, gen) for name in names)
    kv = PagedKV(pools, tuple(format(name.partition(" ")[0]) for name in names), page_size, transform)

    free = [torch.randperm(count, generator=gen).tolist() for _ in names]
    table = torch.full((len(lens), max(pages, default=0) + 2), NO_PAGE, dtype=torch.int32)
    for b, length in enumerate(lens):
        for i in seen(length):
            pool = (b + i) % len(names)
            page = free[pool].pop()
            table[b, i] = pool << PAGE_BITS | page
            poison_tokens(kv, pool, page, range(max(0, length - i * page_size), page_size), D)
    for pool, rest in enumerate(free):
        for page in rest:
            poison_page(kv, pool, page)
    return kv, table


def keys_of(kv: PagedKV, page_table: Tensor, b: int, begin: int, end: int, dtype: torch.dtype, D: int) -> Tensor:
    """Keys [Hkv, end - begin, D] of tokens of a sequence."""
    size = kv.page_size
    if end > page_table.shape[1] * size:
        raise ValueError(f"page_table is too narrow: sequence {b} has {end} tokens in pages of {size}")
    parts = []
    for i in range(begin // size, -(-end // size)):
        page = read_page(kv, *locate(kv, int(page_table[b, i]), f"page_table[{b}, {i}]"), D, dtype)[0]
        parts.append(page[:, max(0, begin - i * size) : end - i * size])
    return torch.cat(parts, 1) if parts else torch.zeros(kv.num_kv_heads, 0, D, dtype=dtype)
