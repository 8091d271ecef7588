"""Paged keys and values: pools of pages, one format each, behind one page table."""

import ctypes
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvkernels.formats import Format, format

MAX_POOLS = 8  # a page-table entry is pool << 28 | page with a clear sign bit
PAGE_BITS = 28
PAGE_MASK = (1 << PAGE_BITS) - 1
TWO_CACHES = 1 << 16  # of a pool's format code: K and V are two tensors

FORMAT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16"}

Pool = Tensor | tuple[Tensor, Tensor]


HUGE_PAGE = 2 << 20  # x86-64
MADV_HUGEPAGE = 14  # <sys/mman.h>


def zero_pool(shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """uint8 zeros. On Linux a large pool in main memory asks for huge pages before it is first touched: pages of a
    sequence lie anywhere in it, and with 4 KB of memory per TLB entry most of them would begin with a miss."""
    pool = torch.empty(tuple(shape), dtype=torch.uint8, device=device)
    if type(pool) is Tensor and pool.device.type == "cpu" and pool.nbytes > 2 * HUGE_PAGE and sys.platform == "linux":
        begin = -(-pool.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (pool.data_ptr() + pool.nbytes) // HUGE_PAGE * HUGE_PAGE
        # a hint: a kernel that does not know it changes nothing
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)
    return pool.zero_()


class KVTransform(NamedTuple):
    """The basis of keys in formats that rotate: k' = H (diag(balance) (k - centre))[order]; attention turns q instead.

    centre, balance: float32 [Hkv, D], constants of a layer; `calibrate_keys` measures them. Values are not centred.
    order:           int32 [Hkv, D], a permutation of the channels of every head, or None for channels as they come:
                     stored channel j is channel order[j]. Only formats of two halves (m31, m42, m21) look at it: the
                     first half gets more bits, so channels of large balanced variance come first.
    """

    centre: Tensor
    balance: Tensor
    order: Tensor | None = None


def check_transform(
    transform: KVTransform | None, num_kv_heads: int, head_dim: int, device: torch.device | str | None
) -> None:
    """That it fits keys of [num_kv_heads, head_dim] on this device (None: torch's default); `order` has to be a
    permutation, which is looked at on the CPU only."""
    if transform is None:
        return
    if not isinstance(transform, KVTransform):
        raise TypeError(f"transform must be a KVTransform, of calibrate_keys, or None; got {type(transform).__name__}")
    shape = (num_kv_heads, head_dim)
    where = torch.empty(0, device=device).device
    for (name, x), dtype in zip(transform._asdict().items(), (torch.float32, torch.float32, torch.int32)):
        if x is None and name == "order":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"transform.{name} must be a tensor; got {type(x).__name__}")
        if x.dtype != dtype:
            raise TypeError(f"transform.{name} must be {dtype}; got {x.dtype}")
        if x.shape != shape:
            raise ValueError(
                f"transform.{name} must be [Hkv, D] = {list(shape)}, those of the keys; got {list(x.shape)}"
            )
        if x.device != where:
            raise ValueError(f"transform.{name} must be on {where}, where the pages are; got {x.device}")
    order = transform.order
    if type(order) is Tensor and order.device.type == "cpu":
        wrong = order.sort(1).values != torch.arange(head_dim)
        if wrong.any():
            head = int(wrong.any(1).nonzero()[0])
            raise ValueError(
                f"transform.order[{head}] must be a permutation of the channels 0 to {head_dim - 1}; "
                f"got {order[head].tolist()}"
            )


class PagedKV(NamedTuple):
    """Keys and values of many sequences as pages.

    pools:     up to 8, one per format. uint8 [num_pages, Hkv, page_bytes], or for 16-bit formats a pair of tensors
               (k_cache, v_cache) [num_pages, Hkv, page_size, D] of any strides with a contiguous last dim
    formats:   the format of each pool
    page_size: tokens per page, the same in all pools; a multiple of 16 where a pool is packed
    transform: the basis of rotated keys, or None for centre 0, balance 1

    A page table holds `entry(pool, page)`: one sequence may have its first and last pages in 16 bits, its middle in 2.
    """

    pools: tuple[Pool, ...]
    formats: tuple[Format, ...]
    page_size: int
    transform: KVTransform | None = None

    @classmethod
    def empty(
        cls,
        formats: str | Format | Sequence[str | Format],
        num_pages: int | Sequence[int],
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        device: torch.device | str | None = None,
        transform: KVTransform | None = None,
    ) -> "PagedKV":
        """Zero-filled pools, one per format. num_pages: for every pool, or one number per pool."""
        one = isinstance(formats, (str, Format))  # a Format is a tuple, but not of formats
        kinds = tuple(format(f) for f in ((formats,) if one else formats))  # type: ignore[arg-type]
        sizes = (num_pages,) * len(kinds) if isinstance(num_pages, int) else tuple(num_pages)
        if not 1 <= len(kinds) <= MAX_POOLS:
            raise ValueError(f"a PagedKV has 1 to {MAX_POOLS} pools (3 bits of a page-table entry); got {len(kinds)}")
        if len(sizes) != len(kinds):
            raise ValueError(f"num_pages must be one int or one per format; got {len(sizes)} for {len(kinds)} formats")
        for n in sizes:
            if not 0 <= n <= 1 << PAGE_BITS:
                raise ValueError(f"num_pages must be 0 to 2^{PAGE_BITS} (bits of a page-table entry); got {n}")
        if num_kv_heads < 1:
            raise ValueError(f"num_kv_heads must be at least 1; got {num_kv_heads}")
        check_transform(transform, num_kv_heads, head_dim, device)
        pools = tuple(
            zero_pool((n, num_kv_heads, f.page_bytes(page_size, head_dim)), device)
            for n, f in zip(sizes, kinds, strict=True)
        )
        return cls(pools, kinds, page_size, transform)

    @classmethod
    def from_caches(
        cls, k_cache: Tensor, v_cache: Tensor, layout: str = "NHD", transform: KVTransform | None = None
    ) -> "PagedKV":
        """Two 16-bit caches as one pool, without a copy.

        layout: "NHD" for [num_pages, page_size, Hkv, D] (vLLM, flash-attn), "HND" for [num_pages, Hkv, page_size, D].
        bfloat16 or float16; strides are free but for a contiguous last dim. K and V may differ in dtype.
        """
        if layout not in ("NHD", "HND"):
            raise ValueError(f'layout must be "NHD" or "HND"; got {layout!r}')
        dims = "[num_pages, page_size, Hkv, D]" if layout == "NHD" else "[num_pages, Hkv, page_size, D]"
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if cache.dtype not in FORMAT_OF_DTYPE:
                raise TypeError(f"{name} must be bfloat16 or float16; got {cache.dtype}")
            if cache.dim() != 4:
                raise ValueError(f"{name} must be {dims}, 4 dims; got {list(cache.shape)}")
            if cache.stride(-1) != 1:
                raise ValueError(f"{name} must be contiguous in its last dim; got strides {list(cache.stride())}")
        if k_cache.shape != v_cache.shape:
            raise ValueError(
                f"v_cache must have the shape of k_cache, {list(k_cache.shape)}; got {list(v_cache.shape)}"
            )
        if k_cache.device != v_cache.device:
            raise ValueError(f"v_cache must be on the device of k_cache, {k_cache.device}; got {v_cache.device}")
        fmt = Format(FORMAT_OF_DTYPE[k_cache.dtype], FORMAT_OF_DTYPE[v_cache.dtype])
        if layout == "NHD":
            k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        page_size, head_dim = k_cache.shape[2:]
        fmt.check(page_size, head_dim)
        check_transform(transform, k_cache.shape[1], head_dim, k_cache.device)
        return cls(((k_cache, v_cache),), (fmt,), page_size, transform)

    @property
    def num_kv_heads(self) -> int:
        return self._tensors(0)[0].shape[1]

    @property
    def head_dim(self) -> int:
        """Of two caches, their last dim; of packed pages, the one whose pages have this many bytes."""
        pool, fmt = self.pools[0], self.formats[0]
        if isinstance(pool, tuple):
            return pool[0].shape[-1]
        for head_dim in fmt.head_dims:
            if fmt.page_bytes(self.page_size, head_dim) == pool.shape[-1]:
                return head_dim
        raise ValueError(
            f"a pool of {fmt.name} pages must be uint8 [num_pages, Hkv, page_bytes]; pages of {pool.shape[-1]} bytes "
            f"fit no head_dim ({', '.join(map(str, fmt.head_dims))}) at page_size {self.page_size}"
        )

    @property
    def device(self) -> torch.device:
        return self._tensors(0)[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, used or not."""
        return sum(t.nbytes for pool in range(len(self.pools)) for t in self._tensors(pool))

    def code(self, pool: int) -> int:
        """The format of a pool as the ops take it: Format.code, plus bit 16 where K and V are two tensors."""
        return self.formats[pool].code | (TWO_CACHES if isinstance(self.pools[pool], tuple) else 0)

    def entry(self, pool: int, page: int) -> int:
        """The page-table entry of a page."""
        if not 0 <= pool < len(self.pools):
            raise ValueError(f"pool must be 0 to {len(self.pools) - 1}; got {pool}")
        if not 0 <= page < self._tensors(pool)[0].shape[0]:
            raise ValueError(
                f"page must be below {self._tensors(pool)[0].shape[0]}, the pages of pool {pool}; got {page}"
            )
        return pool << PAGE_BITS | page

    def _tensors(self, pool: int) -> tuple[Tensor, ...]:
        tensors = self.pools[pool]
        return tensors if isinstance(tensors, tuple) else (tensors,)
