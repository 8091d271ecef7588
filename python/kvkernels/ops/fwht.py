"""fwht: fast Walsh-Hadamard transform over the last dim."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.formats._hadamard import hadamard_matrix
from kvkernels.ops._refusal import refused

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMATS = ()

_op = torch.ops.kvkernels.fwht.default


def fwht(x: Tensor, scale: float | None = None) -> Tensor:
    """scale * H x over the last dim, H the symmetric Hadamard matrix of that size (entries +-1).

    x       [..., n], n = m * 2^k with m in 1, 12, 20, 28 (40 * 2^k is 20 * 2^(k+1)); float32, float16, bfloat16 or
            float64; contiguous in the last dim. Computed in float32 (float64: in float64).
    scale   None: 1 / sqrt(n). H is then orthonormal and its own inverse: fwht(fwht(x)) is x.

    Returns a new contiguous tensor of x's shape and dtype; an empty x gives an empty one. Differentiable: H is
    symmetric, so the gradient is fwht of the gradient. ValueError: another dtype, a size without such a matrix, a last
    dim with gaps.

    H_{2^k} is in Sylvester's order, H_n = H_m (x) H_{2^k} with H_m from Paley's second construction.
    Source: Paley 1933, "On orthogonal matrices", J. Math. Phys. 12.
    """
    try:
        if scale is None:
            n = x.shape[-1] if x.dim() else 1
            scale = n**-0.5 if n else 1.0
        return _op(x, scale)
    except Exception as e:
        raise refused(fwht, e, locals()) from None


@torch.library.register_fake("kvkernels::fwht")
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.scale = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _op(grad.contiguous(), ctx.scale), None


torch.library.register_autograd("kvkernels::fwht", _backward, setup_context=_setup_context)


def reference(x: Tensor, scale: float | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    n = x.shape[-1]
    return (x.to(dtype) @ hadamard_matrix(n).to(dtype)) * (n**-0.5 if scale is None else scale)


def cases() -> list[dict[str, Any]]:
    sizes = (1, 2, 4, 8, 12, 16, 20, 28, 32, 40, 48, 64, 80, 96, 112, 128, 160, 256, 448, 512, 1024, 2048, 2560, 8192)
    return [
        *({"rows": (3,), "n": n, "dtype": "float32"} for n in sizes),
        *({"rows": (2, 5), "n": n, "dtype": d} for n in (64, 96, 128) for d in ("float16", "bfloat16", "float64")),
        {"rows": (), "n": 64, "dtype": "float32"},
        {"rows": (0, 4), "n": 64, "dtype": "float32"},
        {"rows": (257,), "n": 128, "dtype": "float32", "scale": 1.0},
        {"rows": (7,), "n": 128, "dtype": "float32", "gap": 8},
        {"rows": (3, 4), "n": 128, "dtype": "bfloat16", "gap": 8},
        {"rows": (3, 4), "n": 128, "dtype": "float32", "swap": True},
        {"rows": (3, 4, 5), "n": 64, "dtype": "float32", "swap": True},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """gap: unused columns between rows; swap: the two outer dims transposed."""
    gen = torch.Generator().manual_seed(seed)
    n, gap = case["n"], case.get("gap", 0)
    x = torch.randn(*case["rows"], n + gap, generator=gen).to(getattr(torch, case["dtype"]))[..., :n]
    if case.get("swap"):
        x = x.transpose(0, 1)
    return (x,), ({"scale": case["scale"]} if "scale" in case else {})


def cost(case: dict[str, Any]) -> tuple[int, int]:
    n, rows = case["n"], 1
    for r in case["rows"]:
        rows *= r
    odd = n
    while odd % 2 == 0:
        odd //= 2
    m = 1 if odd == 1 else 4 * odd
    item = getattr(torch, case["dtype"]).itemsize
    return 2 * rows * n * item, rows * n * (m - 1 + (n // m).bit_length() - 1 + 1)
