"""write_kv: rotate, quantise, pack and scatter new keys and values."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import encode_page, format, formats
from kvkernels.ops import _args, _reference
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PagedKV

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = tuple(f.name for f in formats() if not f.whole_pages)

_op = torch.ops.kvkernels.write_kv.default


def write_kv(k: Tensor, v: Tensor, kv: PagedKV, pool: int, slots: Tensor) -> None:
    """Write T tokens into the pages of one pool, in the pool's format.

    k, v    [T, Hkv, D] float32, float16 or bfloat16, keys after RoPE; contiguous in the last dim, not in the memory of
            a page that is written
    kv      its pool number `pool` is written in place; kv.transform is applied to the keys if the format rotates
    slots   int64 [T]: page * page_size + offset in the page. Negative: the token is skipped. Two tokens must not share
            a slot.

    The other tokens of a page keep their bytes. T = 0 does nothing. ValueError: dtypes, shapes or devices that do not
    fit, a pool kv does not have, a slot past the pool or k, v in a page that is written (seen on CPU), inputs that
    require grad, and formats that code the keys of a whole page at once (kivi2): fill a 16-bit page and re-encode it
    with pack_pages.

    Source: rotation and one scale per token as in RotateKV, arXiv:2501.16383; formats in kvkernels/formats.
    """
    try:
        first, second, code = _args.one_pool("write_kv", kv, pool)
        if torch.is_grad_enabled():
            _args.refuse_grad("write_kv", k=k, v=v)
        centre, balance, order = kv.transform or _args.NO_TRANSFORM
        _op(k, v, first, second, code, kv.page_size, slots, centre, balance, order)
        _args.written(first, second)
    except Exception as e:
        raise refused(write_kv, e, locals()) from None


@torch.library.register_fake("kvkernels::write_kv")
def _(k: Tensor, v: Tensor, pool: Tensor, pool_v: Tensor | None, format: int, page_size: int, slots: Tensor,
      centre: Tensor | None, balance: Tensor | None, order: Tensor | None) -> None:  # fmt: skip
    _args.same_device("write_kv", k=k, v=v, pool=pool, pool_v=pool_v, slots=slots, centre=centre, balance=balance,
                      order=order)  # fmt: skip


def reference(k: Tensor, v: Tensor, kv: PagedKV, pool: int, slots: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Also in place. Bytes have no tolerance: the definition is the float32 of kvkernels/formats, whatever `dtype`."""
    data, fmt = kv.pools[pool], kv.formats[pool]
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, token = _reference.locate_slot(kv, pool, slot, f"slots[{t}]")
        if isinstance(data, tuple):
            data[0][page, :, token] = k[t].to(data[0].dtype)
            data[1][page, :, token] = v[t].to(data[1].dtype)
            continue
        whole = torch.zeros(2, k.shape[1], kv.page_size, k.shape[2])
        whole[0, :, token], whole[1, :, token] = k[t].float(), v[t].float()
        record = encode_page(fmt, whole[0], whole[1], kv.transform)
        where = _reference.token_positions(kv, pool, token, k.shape[2])
        data[page][:, where] = record[:, where]


def cases() -> list[dict[str, Any]]:
    base = {"T": 37, "Hkv": 2, "D": 128, "page_size": 32, "dtype": "float32"}
    return [
        *(
            {**base, "format": name, "D": d, "transform": d == 128}
            for name in FORMATS
            for d in _reference.head_dims(name)
        ),
        *({**base, "format": name, "dtype": t} for name in ("u2", "bf16", "f16") for t in ("float16", "bfloat16")),
        *({**base, "format": name, "transform": True} for name in ("u3/u2", "bf16/t1", "u4/f16", "m31/kivi2")),
        *({**base, "format": name, "page_size": 1, "D": d} for name in ("bf16", "f16 NHD") for d in (80, 96, 112, 192)),
        *({**base, "format": name} for name in ("bf16 HND", "bf16/f16 NHD")),
        {**base, "format": "u2", "T": 0},
        {**base, "format": "u2", "T": 300, "Hkv": 3, "page_size": 16},
        {**base, "format": "u4", "gap": True},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """gap: k and v are slices of one larger tensor."""
    gen = torch.Generator().manual_seed(seed)
    T, heads, D, page_size = case["T"], case["Hkv"], case["D"], case["page_size"]
    transform = _reference.random_transform(heads, D, gen) if case.get("transform") else None
    pages = T // page_size + 2
    pool = _reference.random_pool(case["format"], pages, heads, page_size, D, transform, gen)
    kv = PagedKV((pool,), (format(case["format"].partition(" ")[0]),), page_size, transform)
    dtype = getattr(torch, case["dtype"])
    if case.get("gap"):
        both = _reference.randn((T, 2 * heads + 1, D), gen, dtype)
        k, v = both[:, :heads], both[:, heads : 2 * heads]
    else:
        k, v = _reference.randn((T, heads, D), gen, dtype), _reference.randn((T, heads, D), gen, dtype)
    slots = torch.randperm(pages * page_size, generator=gen)[:T]
    slots[3::11] = -1
    return (k, v, kv, 0, slots), {}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    fmt, D, page_size = format(case["format"].partition(" ")[0]), case["D"], case["page_size"]
    vectors = case["T"] * case["Hkv"]
    item = getattr(torch, case["dtype"]).itemsize
    stages = D.bit_length() - 1
    rotations = fmt.rotated_k + fmt.rotated_v
    return vectors * (2 * D * item + fmt.data_bytes(page_size, D) // page_size), vectors * rotations * D * (stages + 8)
