"""merge_states: join partial attention results."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _args
from kvkernels.ops._refusal import refused

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ()


MAX_PARTS = 16  # kMaxMergeParts: tensors of a list that need not be stacked

_op = torch.ops.kvkernels.merge_states.default

States = Tensor | Sequence[Tensor]


def merge_states(
    outs: States, lses: States, *, scale: Tensor | None = None, temperature: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge S partial attention results over disjoint keys into the result over all of them.

    lse = ln sum_s exp(f_s lse_s), out = sum_s exp(f_s lse_s - lse) out_s with f_s = scale_s * temperature_s, 1 unless
    given. With f = 1 associative: any order of merging gives the same.

    outs         [S, ..., D] float32, float16 or bfloat16, or S >= 1 tensors [..., D]; a list of up to 16 is not copied
    lses         likewise [S, ...] float32, or S tensors [...]: natural log of the softmax denominator
    scale        float32 [S] or None
    temperature  float32 [S] or None

    Returns out [..., D] in outs' dtype and lse [...] float32, computed in float32. A state with lse = -inf (an empty
    range) weighs nothing, whatever its out, scale and temperature are, NaN included; if all are empty, or S = 0, out is
    0 and lse -inf. ValueError: shapes or dtypes that do not fit, an input that requires grad (there is no backward).

    Adaptive parallel encoding (APE) is this: contexts that were encoded apart are one state, whose attention is taken
    at temperature T < 1, that is with scale = 1 / (T sqrt(D)), and whose weight (sum_j exp(score_j / T))^(S T) has a
    factor S: temperature = [T, 1], scale = [S, 1], the prefix and the query being the other state. A version of its
    code has a constant times the weight instead of S: add ln(constant) to that state's lse.

    Source: Dao et al. 2022, arXiv:2205.14135 (FlashAttention); Ye et al. 2025, arXiv:2501.01005 (FlashInfer); Yang et
    al. 2025, arXiv:2502.05431 (APE: attention temperature and scaling factor).
    """
    try:
        if isinstance(outs, Tensor) or isinstance(lses, Tensor) or not 1 < len(outs) <= MAX_PARTS:
            outs, lses = [_stacked("outs", outs)], [_stacked("lses", lses)]
        else:
            outs, lses = list(outs), list(lses)
        if torch.is_grad_enabled():
            for x, y in zip(outs, lses):
                _args.refuse_grad("merge_states", outs=x, lses=y, scale=scale, temperature=temperature)
        if len(outs) == 1:  # a stack
            if outs[0].dim() < 2:
                raise ValueError(f"merge_states: outs must be [S, ..., D], got {list(outs[0].shape)}")
            shape = outs[0].shape[1:]
        else:
            shape = outs[0].shape
        out = torch.empty(shape, dtype=outs[0].dtype, device=outs[0].device)
        lse = torch.empty(shape[:-1], dtype=torch.float32, device=outs[0].device)
        _op(outs, lses, scale, temperature, out, lse)
        return out, lse
    except Exception as e:
        raise refused(merge_states, e, locals()) from None


def _stacked(name: str, parts: States) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    if not parts:
        raise ValueError(f"merge_states: {name} must be a tensor or a sequence of at least one, got none")
    first = parts[0]
    for i, x in enumerate(parts):
        if (x.dtype, x.shape) != (first.dtype, first.shape):  # torch.stack would promote dtypes
            kinds = [f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (first, x)]
            raise ValueError(f"merge_states: {name}[{i}] must be {kinds[0]} like {name}[0], got {kinds[1]}")
    return torch.stack(tuple(parts))


@torch.library.register_fake("kvkernels::merge_states")
def _(outs: list[Tensor], lses: list[Tensor], scale: Tensor | None, temperature: Tensor | None, out: Tensor,
      lse: Tensor) -> None:  # fmt: skip
    numbered = {f"outs[{i}]": x for i, x in enumerate(outs)} | {f"lses[{i}]": x for i, x in enumerate(lses)}
    _args.same_device("merge_states", **numbered, scale=scale, temperature=temperature, out=out, lse=lse)


def reference(
    outs: States,
    lses: States,
    *,
    scale: Tensor | None = None,
    temperature: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    outs, lses = (x if isinstance(x, Tensor) else torch.stack(tuple(x)) for x in (outs, lses))
    lses = lses.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for factor in (scale, temperature):
        if factor is not None:
            factor = factor.to(lses.dtype).view(-1, *(1,) * (lses.dim() - 1))
            lses = torch.where(lses > -math.inf, lses * factor, lses)
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
        *(
            {"S": S, "N": (5, 4), "D": 72, "dtype": "bfloat16", "empty": True, "list": True}
            for S in (1, 2, MAX_PARTS, MAX_PARTS + 1)
        ),
        {"S": 3, "N": (), "D": 40, "dtype": "float32", "list": True},
        *(
            {"S": 4, "N": (6, 3), "D": 64, "dtype": "float32", "empty": True, **factors, "list": as_list}
            for factors in ({"scale": True}, {"temperature": True}, {"scale": True, "temperature": True})
            for as_list in (False, True)
        ),
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """empty: some states are empty and hold NaN; in the first row all are, and the first state has a scale of NaN."""
    gen = torch.Generator().manual_seed(seed)
    outs = torch.randn(case["S"], *case["N"], case["D"], generator=gen).to(getattr(torch, case["dtype"]))
    lses = 4 * torch.randn(case["S"], *case["N"], generator=gen)
    if case.get("empty"):
        dead = torch.rand(lses.shape, generator=gen) < 0.4
        dead[:, 0] = True
        lses[dead] = -math.inf
        outs[dead] = math.nan
    options = {k: 0.2 + torch.rand(case["S"], generator=gen) for k in ("scale", "temperature") if case.get(k)}
    if options and case.get("empty"):  # whatever stands beside an empty state
        lses[0], outs[0] = -math.inf, math.nan
        next(iter(options.values()))[0] = math.nan
    return (tuple(outs), tuple(lses)) if case.get("list") else (outs, lses), options


def cost(case: dict[str, Any]) -> tuple[int, int]:
    n = math.prod(case["N"])
    item = getattr(torch, case["dtype"]).itemsize
    return n * (case["S"] + 1) * (case["D"] * item + 4), n * case["S"] * (2 * case["D"] + 4)
