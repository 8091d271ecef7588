"""merge_states: join partial attention results."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _args

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ()

_op = torch.ops.kvkernels.merge_states.default


def merge_states(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge S partial attention results over disjoint keys into the result over all of them.

    lse = ln sum_s exp(lse_s), out = sum_s exp(lse_s - lse) out_s. Associative: any order of merging gives the same.

    outs   [S, ..., D] float32, float16 or bfloat16, or S tensors [..., D]
    lses   [S, ...] float32, or S tensors [...]: natural log of the softmax denominator, as quant_attention returns it

    Returns out [..., D] in outs' dtype and lse [...] float32, computed in float32. A state with lse = -inf (an empty
    range) weighs nothing, whatever its out holds, NaN included; if all are empty, or S = 0, out = 0 and lse = -inf.
    ValueError: shapes or dtypes that do not fit, an input that requires grad (there is no backward).

    Source: Dao et al. 2022, arXiv:2205.14135 (FlashAttention); Ye et al. 2025, arXiv:2501.01005 (FlashInfer).
    """
    if not isinstance(outs, Tensor):
        outs = torch.stack(tuple(outs))
    if not isinstance(lses, Tensor):
        lses = torch.stack(tuple(lses))
    if torch.is_grad_enabled():
        _args.refuse_grad("merge_states", outs=outs, lses=lses)
    if outs.dim() < 2:
        raise ValueError(f"merge_states: outs must be [S, ..., D], got {list(outs.shape)}")
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    lse = torch.empty(outs.shape[1:-1], dtype=torch.float32, device=outs.device)
    try:
        _op(outs, lses, out, lse)
    except RuntimeError as e:
        raise _args.refused("merge_states", e) from None
    return out, lse


@torch.library.register_fake("kvkernels::merge_states")
def _(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    _args.same_device("merge_states", outs=outs, lses=lses, out=out, lse=lse)


def reference(outs: Tensor, lses: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    lses = lses.to(torch.float64 if dtype == torch.float64 else torch.float32)
    lse = torch.logsumexp(lses, 0) if len(lses) else torch.full(lses.shape[1:], -math.inf, dtype=lses.dtype)
    weight = torch.exp(lses - lse).where(lses > -math.inf, 0.0).to(dtype).unsqueeze(-1)
    return (outs.to(dtype).where(weight > 0, 0.0) * weight).sum(0), lse


def cases() -> list[dict[str, Any]]:
    return [
        {"S": 2, "N": (3, 8), "D": 128, "dtype": "float32"},
        {"S": 5, "N": (2, 3, 4), "D": 64, "dtype": "float16"},
        {"S": 3, "N": (7,), "D": 80, "dtype": "bfloat16"},
        {"S": 1, "N": (4, 2), "D": 256, "dtype": "float32"},
        {"S": 0, "N": (4, 2), "D": 64, "dtype": "float32"},
        {"S": 4, "N": (0, 2), "D": 64, "dtype": "float32"},
        {"S": 4, "N": (), "D": 3, "dtype": "float32"},
        {"S": 64, "N": (33,), "D": 128, "dtype": "float32"},
        {"S": 6, "N": (5, 4), "D": 128, "dtype": "float32", "empty": True},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """empty: some states are empty and hold NaN; in the first row all are."""
    gen = torch.Generator().manual_seed(seed)
    outs = torch.randn(case["S"], *case["N"], case["D"], generator=gen).to(getattr(torch, case["dtype"]))
    lses = 4 * torch.randn(case["S"], *case["N"], generator=gen)
    if case.get("empty"):
        dead = torch.rand(lses.shape, generator=gen) < 0.4
        dead[:, 0] = True
        lses[dead] = -math.inf
        outs[dead] = math.nan
    return (outs, lses), {}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    n = math.prod(case["N"])
    item = getattr(torch, case["dtype"]).itemsize
    return n * (case["S"] + 1) * (case["D"] * item + 4), n * case["S"] * (2 * case["D"] + 4)
