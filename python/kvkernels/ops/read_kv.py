"""read_kv: decode tokens of a pool."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import format, formats
from kvkernels.ops import _args, _reference
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PagedKV, head_dim_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = tuple(f.name for f in formats())

_op = torch.ops.kvkernels.read_kv.default


def read_kv(
    kv: PagedKV,
    pool: int,
    slots: Tensor,
    dtype: torch.dtype = torch.float32,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of T tokens of one pool, un-rotated and with the key transform undone.

    kv, pool   which pool of which cache
    slots      int64 [T]: page * page_size + offset in the page. Negative: the row is zero.
    dtype      of the result: float32, float16 or bfloat16
    out        where to write k and v: contiguous [T, Hkv, D], of any of these dtypes; then dtype does not count

    Returns k, v [T, Hkv, D]; T = 0 gives empty ones. ValueError: dtypes, shapes or devices that do not fit, a pool kv
    does not have, a slot past the pool (seen on CPU).

    Source: the formats' own definitions, kvkernels/formats.
    """
    try:
        first, second, code = _args.one_pool("read_kv", kv, pool)
        head_dim = head_dim_of(kv)
        if out is None:
            shape = (slots.shape[0] if slots.dim() else 0, first.shape[1], head_dim)
            out = (
                torch.empty(shape, dtype=dtype, device=first.device),
                torch.empty(shape, dtype=dtype, device=first.device),
            )
        k, v = out
        if torch.is_grad_enabled():
            _args.refuse_grad("read_kv", k_cache=first, v_cache=second, k=k, v=v)
        centre, balance, order = kv.transform or _args.NO_TRANSFORM
        _op(first, second, code, kv.page_size, head_dim, slots, centre, balance, order, k, v)
        _args.written(k, v)
        return k, v
    except Exception as e:
        raise refused(read_kv, e, locals()) from None


@torch.library.register_fake("kvkernels::read_kv")
def _(pool: Tensor, pool_v: Tensor | None, format: int, page_size: int, head_dim: int, slots: Tensor,
      centre: Tensor | None, balance: Tensor | None, order: Tensor | None, k: Tensor, v: Tensor) -> None:  # fmt: skip
    _args.same_device("read_kv", pool=pool, pool_v=pool_v, slots=slots, centre=centre, balance=balance, order=order,
                      k=k, v=v)  # fmt: skip


def reference(kv: PagedKV, pool: int, slots: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    k = torch.zeros(len(slots), kv.num_kv_heads, kv.head_dim, dtype=dtype)
    v = torch.zeros_like(k)
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, token = _reference.locate_slot(kv, pool, slot, f"slots[{t}]")
        page_k, page_v = _reference.read_page(kv, pool, page, kv.head_dim, dtype)
        k[t], v[t] = page_k[:, token], page_v[:, token]
    return k, v


def cases() -> list[dict[str, Any]]:
    base = {"T": 21, "Hkv": 2, "D": 128, "page_size": 32, "dtype": "float32"}
    return [
        *(
            {**base, "format": name, "D": d, "transform": d == 128}
            for name in FORMATS
            for d in _reference.head_dims(name)
        ),
        *({**base, "format": name, "dtype": t} for name in ("u2", "bf16") for t in ("float16", "bfloat16")),
        *({**base, "format": name, "transform": True} for name in ("u3/u2", "bf16/t1", "kivi2/f16")),
        *({**base, "format": name, "page_size": 1, "D": d} for name in ("bf16", "f16 NHD") for d in (80, 96, 112, 192)),
        *({**base, "format": name} for name in ("bf16 HND", "bf16/f16 NHD")),
        {**base, "format": "u2", "T": 0},
        {**base, "format": "u2", "T": 150, "Hkv": 3, "page_size": 16},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gen = torch.Generator().manual_seed(seed)
    T, heads, D, page_size = case["T"], case["Hkv"], case["D"], case["page_size"]
    transform = _reference.random_transform(heads, D, gen) if case.get("transform") else None
    pages = T // page_size + 2
    pool = _reference.random_pool(case["format"], pages, heads, page_size, D, transform, gen)
    kv = PagedKV((pool,), (format(case["format"].partition(" ")[0]),), page_size, transform)
    slots = torch.randint(0, pages * page_size, (T,), generator=gen)
    slots[3::11] = -1
    return (kv, 0, slots), {"dtype": getattr(torch, case["dtype"])}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    fmt, D, page_size = format(case["format"].partition(" ")[0]), case["D"], case["page_size"]
    vectors = case["T"] * case["Hkv"]
    item = getattr(torch, case["dtype"]).itemsize
    stages = D.bit_length() - 1
    rotations = fmt.rotated_k + fmt.rotated_v
    return vectors * (2 * D * item + fmt.data_bytes(page_size, D) // page_size), vectors * rotations * D * (stages + 3)
