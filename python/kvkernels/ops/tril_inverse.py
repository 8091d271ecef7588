"""tril_inverse: inverses of unit lower triangular matrices."""

import math
from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _delta
from kvkernels.ops._refusal import refused

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ()

METHODS = {"substitution": 0, "blocked": 1, "blocked_tf32": 2, "blocked_bf16x3": 3}  # TrilMethod
BLOCK = 16

_op = torch.ops.kvkernels.tril_inverse.default


def tril_inverse(A: Tensor, *, method: str = "blocked") -> Tensor:
    """(I + tril(A, -1))^-1 of each matrix; what A has on and above the diagonal is not read.

    A       [..., n, n] float32, float16 or bfloat16, n 1 to 128
    method  "substitution": row by row. The others substitute within 16 x 16 blocks and merge them pairwise,
            X_21 = -X_22 A_21 X_11, with products in "blocked": float32; "blocked_tf32": operands rounded to 10 mantissa
            bits; "blocked_bf16x3": operands as two bfloat16 terms, the product of the small ones left out

    Returns [..., n, n] contiguous in A's dtype, zeros above the diagonal; sums are float32. For 64 keys that all but
    repeat, or are all positive, and beta 1 to 2, the error relative to the inverse is below 1e-6 ("substitution",
    "blocked"), 6e-5 ("blocked_bf16x3") and 4e-3 ("blocked_tf32"): no powers of A are formed, which grow without bound
    where the inverse does not. The gradient is that of A's lower part. ValueError: shapes or dtypes that do not fit, an
    unknown method.

    Source: Sobczyk et al. 2026, arXiv:2605.21325.
    """
    try:
        number = _delta.option("tril_inverse", "method", method, METHODS)
        return _op(A, number)
    except Exception as e:
        raise refused(tril_inverse, e, locals()) from None


@torch.library.register_fake("kvkernels::tril_inverse")
def _(A: Tensor, method: int) -> Tensor:
    return torch.empty_like(A, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (inverse,) = ctx.saved_tensors
    x = inverse.float().mT
    return -_delta.product(_delta.product(x, grad.float()), x).tril(-1).to(inverse.dtype), None


torch.library.register_autograd("kvkernels::tril_inverse", _backward, setup_context=_setup_context)


def _product(a: Tensor, b: Tensor, method: str) -> Tensor:
    if method == "blocked_tf32":
        # 10 mantissa bits of 23, to nearest, ties away from zero, as cvt.rna.tf32 rounds.
        a, b = (((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b))
    elif method == "blocked_bf16x3":
        (a, a_small), (b, b_small) = ((big, (x - big).bfloat16().float()) for x in (a, b)
                                      for big in (x.bfloat16().float(),))  # fmt: skip
        return a_small @ b + a @ b_small + a @ b
    return a @ b


def reference(A: Tensor, *, method: str = "blocked", dtype: torch.dtype = torch.float64) -> Tensor:
    """In float64 the inverse, whatever the method; else in float32 by the method."""
    n = A.shape[-1]
    exact = dtype == torch.float64
    wide = torch.float64 if exact else torch.float32
    eye = torch.eye(n, dtype=wide)
    lower = A.to(wide).tril(-1)
    if exact or method == "substitution" or n <= BLOCK:
        return torch.linalg.solve_triangular(lower + eye, eye.expand_as(lower), upper=False, unitriangular=True).to(
            dtype
        )
    size = 1 << (n - 1).bit_length()
    padded = torch.nn.functional.pad(lower, (0, size - n, 0, size - n))

    def inverse(a: Tensor) -> Tensor:
        m = a.shape[-1]
        if m <= BLOCK:
            one = torch.eye(m, dtype=wide).expand_as(a)
            return torch.linalg.solve_triangular(a + one, one, upper=False, unitriangular=True)
        half = m // 2
        first, last = inverse(a[..., :half, :half]), inverse(a[..., half:, half:])
        corner = -_product(last, _product(a[..., half:, :half], first, method), method)
        return torch.cat((torch.cat((first, torch.zeros_like(first)), -1), torch.cat((corner, last), -1)), -2)

    return inverse(padded)[..., :n, :n].to(dtype)


def cases() -> list[dict[str, Any]]:
    base = {"batch": (3,), "n": 64, "dtype": "float32"}
    return [
        *({**base, "method": m} for m in METHODS),
        *({**base, "n": n, "method": m, "batch": (2,)} for n in (1, 15, 16, 17, 33, 128) for m in ("substitution",
                                                                                                 "blocked")),
        *({**base, "n": 100, "method": m, "batch": (2, 1)} for m in METHODS),
        *({**base, "dtype": d, "method": m, "n": 48} for d in ("float16", "bfloat16") for m in ("blocked",
                                                                                               "blocked_bf16x3")),
        {**base, "n": 32, "transposed": True},
        {**base, "batch": (0, 2), "n": 16},
        {**base, "batch": (), "n": 20},
    ]  # fmt: skip


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """beta_i k_i.k_j of keys that have much in common, NaN on and above the diagonal; transposed: so in memory."""
    gen = torch.Generator().manual_seed(seed)
    n = case["n"]
    keys = torch.nn.functional.normalize(torch.randn(*case["batch"], n, 32, generator=gen) + 1, dim=-1)
    a = torch.rand(*case["batch"], n, 1, generator=gen) * (keys @ keys.mT)
    a = a.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(), math.nan).to(getattr(torch, case["dtype"]))
    if case.get("transposed"):
        a = a.mT.contiguous().mT
    return (a,), ({"method": case["method"]} if "method" in case else {})


def cost(case: dict[str, Any]) -> tuple[int, int]:
    n, count = case["n"], math.prod(case["batch"])
    return 2 * count * n * n * getattr(torch, case["dtype"]).itemsize, count * n**3 // 3
