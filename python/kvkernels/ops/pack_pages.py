"""pack_pages: re-encode whole pages in another format."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import encode_page, format, formats
from kvkernels.ops import _args, _reference
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PagedKV, head_dim_of

DTYPES = ()  # pages only
FORMATS = tuple(f.name for f in formats())

_op = torch.ops.kvkernels.pack_pages.default


def pack_pages(kv: PagedKV, src: int, dst: int, pairs: Tensor) -> None:
    """Re-encode pages of one pool into pages of another, e.g. 16 bits to 2 when they leave the recent window.

    kv         pool `dst` is written in place; kv.transform is undone (src rotated) and applied (dst rotated) on keys
    src, dst   pool numbers; they may be the same if no page is both read and written
    pairs      int32 [N, 2]: source page, destination page, which no other pair has. A pair with a negative entry is
               skipped.

    Whole pages are read and written: unwritten tokens of a source page are coded as they are, so for formats that code
    the keys of a page at once (kivi2) a page should be full. N = 0 does nothing. ValueError: dtypes, shapes or devices
    that do not fit, a pool kv does not have, a page past a pool, written twice, or read and written (seen on CPU).

    Source: the formats' own definitions, kvkernels/formats.
    """
    try:
        src_first, src_second, src_code = _args.one_pool("pack_pages", kv, src, "src")
        dst_first, dst_second, dst_code = _args.one_pool("pack_pages", kv, dst, "dst")
        if torch.is_grad_enabled():
            _args.refuse_grad("pack_pages", src_k=src_first, src_v=src_second, dst_k=dst_first, dst_v=dst_second)
        centre, balance, order = kv.transform or _args.NO_TRANSFORM
        _op(src_first, src_second, src_code, dst_first, dst_second, dst_code, kv.page_size, head_dim_of(kv), pairs,
            centre, balance, order)  # fmt: skip
        _args.written(dst_first, dst_second)
    except Exception as e:
        raise refused(pack_pages, e, locals()) from None


@torch.library.register_fake("kvkernels::pack_pages")
def _(src: Tensor, src_v: Tensor | None, src_format: int, dst: Tensor, dst_v: Tensor | None, dst_format: int,
      page_size: int, head_dim: int, pairs: Tensor, centre: Tensor | None, balance: Tensor | None,
      order: Tensor | None) -> None:  # fmt: skip
    _args.same_device("pack_pages", src=src, src_v=src_v, dst=dst, dst_v=dst_v, pairs=pairs, centre=centre,
                      balance=balance, order=order)  # fmt: skip


def reference(kv: PagedKV, src: int, dst: int, pairs: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Also in place. Bytes have no tolerance: the definition is the float32 of kvkernels/formats, whatever `dtype`."""
    data, fmt, head_dim = kv.pools[dst], kv.formats[dst], kv.head_dim
    for i, (s, d) in enumerate(pairs.tolist()):
        if s < 0 or d < 0:
            continue
        for name, pool, page in (("src", src, s), ("dst", dst, d)):
            if page >= _reference.num_pages(kv, pool):
                raise ValueError(f"pairs[{i}]: {name} page {page}, but there are {_reference.num_pages(kv, pool)}")
        k, v = _reference.read_page(kv, src, s, head_dim, torch.float32)
        if isinstance(data, tuple):
            data[0][d], data[1][d] = k.to(data[0].dtype), v.to(data[1].dtype)
            continue
        used = fmt.data_bytes(kv.page_size, head_dim)
        data[d][:, :used] = encode_page(fmt, k, v, kv.transform)[:, :used]


def cases() -> list[dict[str, Any]]:
    base = {"N": 5, "Hkv": 2, "D": 128, "page_size": 32}
    return [
        *(
            {**base, "src": ("bf16", "f16 NHD")[i % 2], "dst": name, "transform": True}
            for i, name in enumerate(FORMATS)
        ),
        *({**base, "src": name, "dst": "bf16", "D": (64, 256)[i % 2]} for i, name in enumerate(FORMATS)),
        *({**base, "src": "u8", "dst": name, "transform": True} for name in ("u2", "m31/u2", "kivi2", "bf16 HND")),
        *({**base, "src": "m31/u2", "dst": name, "transform": True} for name in ("m42/t1", "b1", "f16 NHD")),
        *({**base, "src": "bf16 NHD", "dst": name, "page_size": 16} for name in ("kivi2/u2", "u4/f16", "u2/kivi2")),
        {**base, "src": "bf16", "dst": "f16", "page_size": 3, "D": 96},
        {**base, "src": "bf16", "dst": "u2", "N": 0},
        {**base, "src": "bf16", "dst": "u2", "N": 40, "Hkv": 3, "page_size": 64},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gen = torch.Generator().manual_seed(seed)
    N, heads, D, page_size = case["N"], case["Hkv"], case["D"], case["page_size"]
    transform = _reference.random_transform(heads, D, gen) if case.get("transform") else None
    names = (case["src"], case["dst"])
    pools = tuple(_reference.random_pool(name, N + 2, heads, page_size, D, transform, gen) for name in names)
    kv = PagedKV(pools, tuple(format(name.partition(" ")[0]) for name in names), page_size, transform)
    pairs = torch.stack([torch.randperm(N + 2, generator=gen)[:N] for _ in range(2)], 1).to(torch.int32)
    pairs[2::7, 0] = -1
    pairs[4::7, 1] = -5
    return (kv, 0, 1, pairs), {}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    heads, D, page_size = case["Hkv"], case["D"], case["page_size"]
    src, dst = (format(case[name].partition(" ")[0]) for name in ("src", "dst"))
    rotations = src.rotated_k + src.rotated_v + dst.rotated_k + dst.rotated_v
    pages = case["N"] * heads
    moved = src.data_bytes(page_size, D) + dst.data_bytes(page_size, D)
    return pages * moved, pages * page_size * rotations * D * (D.bit_length() + 4)
