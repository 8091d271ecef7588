"""Paged keys and values: pools of pages, one format each, behind one page table."""

import ctypes
import operator
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from kvkernels.formats import CODECS, HEAD_DIMS, PACKED_HEAD_DIMS, PAGE_ALIGN, Format, format

MAX_POOLS = 8  # a page-table entry is pool << 28 | page with a clear sign bit
PAGE_BITS = 28
PAGE_MASK = (1 << PAGE_BITS) - 1
TWO_CACHES = 1 << 16  # of a pool's format code: K and V are two tensors
OFFLOADED = 1 << 17  # the pool is a cache of pages that are in main memory

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


# Functions of what PagedKV has as properties: torch.compile of torch 2.10 does not trace into a property of a
# NamedTuple, neither PagedKV's nor Format's.


def format_code(fmt: Format, pool: Pool) -> int:
    """PagedKV.code, but for bit 17."""
    code = CODECS[fmt.k].NUMBER | CODECS[fmt.v].NUMBER << 8
    return code | TWO_CACHES if isinstance(pool, tuple) else code


def head_dim_of(kv: "PagedKV") -> int:
    """PagedKV.head_dim."""
    pool, fmt = kv.pools[0], kv.formats[0]
    if isinstance(pool, tuple):
        return pool[0].shape[-1]
    packed = CODECS[fmt.k].PACKED or CODECS[fmt.v].PACKED
    for n in PACKED_HEAD_DIMS if packed else HEAD_DIMS:
        if -(-fmt.data_bytes(kv.page_size, n) // PAGE_ALIGN) * PAGE_ALIGN == pool.shape[-1]:
            return n
    raise ValueError(
        f"a pool of {fmt.name} pages must be uint8 [num_pages, Hkv, page_bytes]; pages of {pool.shape[-1]} bytes "
        f"fit no head_dim ({', '.join(map(str, fmt.head_dims))}) at page_size {kv.page_size}"
    )


def _int(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int; got {value!r}") from None


class PagedKV(NamedTuple):
    """Keys and values of many sequences as pages.

    pools:     up to 8, one per format. uint8 [num_pages, Hkv, page_bytes], or for 16-bit formats a pair of tensors
               (k_cache, v_cache) [num_pages, Hkv, page_size, D] of any strides with a contiguous last dim
    formats:   the format of each pool
    page_size: tokens per page, the same in all pools; a multiple of 16 where a pool is packed
    transform: the basis of rotated keys, or None for centre 0, balance 1
    offloaded: numbers of the pools that are caches of pages in main memory, of `offload`: only sparse_attention with
               entries reads them

    A page table holds `entry(pool, page)`: one sequence may have its first and last pages in 16 bits, its middle in 2.
    """

    pools: tuple[Pool, ...]
    formats: tuple[Format, ...]
    page_size: int
    transform: KVTransform | None = None
    offloaded: tuple[int, ...] = ()

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
        """Zero-filled pools, one per format. num_pages: for every pool, or one number per pool; may be 0."""
        one = isinstance(formats, (str, Format))  # a Format is a tuple, but not of formats
        kinds = tuple(format(f) for f in ((formats,) if one else formats))  # type: ignore[arg-type]
        many = num_pages if isinstance(num_pages, Sequence) else (num_pages,) * len(kinds)
        sizes = tuple(_int("num_pages", n) for n in many)
        num_kv_heads, head_dim = _int("num_kv_heads", num_kv_heads), _int("head_dim", head_dim)
        page_size = _int("page_size", page_size)
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
            if not isinstance(cache, Tensor):
                raise TypeError(f"{name} must be a tensor; got {type(cache).__name__}")
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
        """Hkv, the same in all pools."""
        return self._tensors(0)[0].shape[1]

    @property
    def head_dim(self) -> int:
        """Of two caches, their last dim; of packed pages, the one whose pages have this many bytes."""
        return head_dim_of(self)

    @property
    def device(self) -> torch.device:
        """Where the pools are."""
        return self._tensors(0)[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, used or not."""
        return sum(t.nbytes for pool in range(len(self.pools)) for t in self._tensors(pool))

    def code(self, pool: int) -> int:
        """The format of a pool as the ops take it: Format.code, plus bit 16 where K and V are two tensors, and bit 17
        where it is offloaded."""
        return format_code(self.formats[pool], self.pools[pool]) | (OFFLOADED if pool in self.offloaded else 0)

    @overload
    def entry(self, pool: int, page: int) -> int: ...

    @overload
    def entry(self, pool: int, page: Tensor) -> Tensor: ...

    def entry(self, pool: int, page: int | Tensor) -> int | Tensor:
        """The page-table entry of a page, or int32 entries of a tensor of pages. ValueError: a pool or page that is not
        there, seen in tensors on the CPU."""
        pool = _int("pool", pool)
        if not 0 <= pool < len(self.pools):
            raise ValueError(f"pool must be 0 to {len(self.pools) - 1}; got {pool}")
        if isinstance(page, Tensor):
            if page.is_floating_point() or page.dtype == torch.bool:
                raise TypeError(f"page must be an int or a tensor of ints; got {page.dtype}")
            seen = page.device.type == "cpu" and page.numel() > 0 and not torch.compiler.is_compiling()
            ends = [int(page.min()), int(page.max())] if seen else []
            entries: int | Tensor = page.int() | pool << PAGE_BITS
        else:
            ends = [_int("page", page)]
            entries = ends[0] | pool << PAGE_BITS
        for n in ends:
            if not 0 <= n < self._tensors(pool)[0].shape[0]:
                raise ValueError(
                    f"page must be below {self._tensors(pool)[0].shape[0]}, the pages of pool {pool}; got {n}"
                )
        return entries

    def __repr__(self) -> str:
        try:
            pools = [
                f"{fmt.name}{' (two caches)' if isinstance(pool, tuple) else ''}: {self._tensors(i)[0].shape[0]} pages"
                for i, (fmt, pool) in enumerate(zip(self.formats, self.pools))
            ]
            shape = f"{self.num_kv_heads} heads of {self.head_dim}, {self.page_size} tokens a page"
            basis = "" if self.transform is None else ", transform"
            return f"PagedKV({'; '.join(pools)}; {shape}{basis}, {self.nbytes / 1e6:.2f} MB)"
        except Exception:  # whatever is wrong with it, a debugger may print it
            return f"PagedKV{tuple.__repr__(self)}"

    def _tensors(self, pool: int) -> tuple[Tensor, ...]:
        tensors = self.pools[pool]
        return tensors if isinstance(tensors, tuple) else (tensors,)
