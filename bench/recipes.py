"""Published recipes for caches without kernels here, as functions that code and decode: what they would cost a model.

Each keeps the paper's own choices where they are stated, and says its true bits. They tell whether a format is worth
kernels; rows made with them are marked as simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvkernels.formats import codec, from_stored, to_stored
from kvkernels.ops.fwht import fwht

# x [T, Hkv, D] and the position of its first token -> what a reader of the format sees
Side = Callable[[Tensor, int], Tensor]
# the rotation of RoPE by position (inverse: back), of x [T, H, D] whose first token stands at a position
Rope = Callable[[Tensor, int, bool], Tensor]


class SimulatedSide(NamedTuple):
    """bits: of head dim and page size, with metadata. make: for a number of KV heads, page size and RoPE."""

    bits: Callable[[int, int], float]
    make: Callable[[int, int, Rope], Side]


def defined(side: str, name: str) -> SimulatedSide:
    """A format of this library by its definition in PyTorch."""

    def recode(x: Tensor, position: int) -> Tensor:
        stored = to_stored(side, x.transpose(0, 1).contiguous(), name)
        data = codec(name).encode(side, stored, len(x))
        return from_stored(side, codec(name).decode(side, data, len(x), x.shape[-1]), name).transpose(0, 1)

    return SimulatedSide(
        lambda dim, page: 8 * codec(name).side_bytes(side, page, dim) / (page * dim), lambda heads, page, rope: recode
    )


def in_f16(x: Tensor) -> Tensor:
    return x.half().float()


def affine(x: Tensor, dim: int, bits: int, clip: float = 1.0) -> Tensor:
    """Even levels between the smallest and the largest along dim, both times `clip`; scale and zero in fp16."""
    low, high = clip * x.amin(dim, keepdim=True), clip * x.amax(dim, keepdim=True)
    zero = in_f16(low)
    scale = in_f16((high - low) / (2**bits - 1)).clamp(min=2.0**-24)
    return ((x - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero


def vidkv_keys(heads: int, page: int, rope: Rope) -> Side:
    """Per channel over a page: 2 bits for the half of the channels with the largest range, 1 bit for the others."""

    def recode(x: Tensor, position: int) -> Tensor:
        x = x.unflatten(0, (-1, page))
        mean = in_f16(x.mean(1, keepdim=True))
        sign = torch.where(x < mean, -1.0, 1.0)
        coarse = mean + sign * in_f16((x - mean).abs().mean(1, keepdim=True))
        span = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        wide = torch.zeros_like(span, dtype=torch.bool)
        wide.scatter_(-1, span.topk(x.shape[-1] // 2, -1).indices, True)
        return torch.where(wide, affine(x, 1, 2), coarse).flatten(0, 1)

    return recode


def vidkv_values(heads: int, page: int, rope: Rope) -> Side:
    """Ternary per channel over a page."""

    def recode(x: Tensor, position: int) -> Tensor:
        x = x.unflatten(0, (-1, page))
        squares = x.square().mean(1, keepdim=True)
        level = x.sign() * (x.abs() > 0.612 * squares.sqrt())
        scale = squares * page / (x * level).sum(1, keepdim=True).clamp(min=2.0**-24)
        return (in_f16(scale) * level).flatten(0, 1)

    return recode


def group(dim: int) -> int:
    """RotateKV's, channels to a scale; of 64-dim heads less, so that three of them are whole groups."""
    return 128 if dim % 128 == 0 else 64


def rotatekv_keys(before_rope: bool) -> Callable[[int, int, Rope], Side]:
    """Neighbouring heads rotated together, channels dealt to groups by their mean, 2 bits per token and group."""

    def make(heads: int, page: int, rope: Rope) -> Side:
        together = next(n for n in (4, 3, 2, 1) if heads % n == 0)
        order: list[Tensor] = []  # from the first tokens that are coded

        def recode(x: Tensor, position: int) -> Tensor:
            x = rope(x, position, True) if before_rope else x
            tokens, heads, dim = x.shape
            width = together * dim
            wide = fwht(x.reshape(tokens, -1, width), width**-0.5)
            if not order:
                order.append(wide.mean(0).argsort(-1))
            index = order[0].expand_as(wide)
            groups = wide.gather(-1, index).unflatten(-1, (-1, group(dim)))
            coded = affine(groups, -1, 2, clip=0.8).flatten(-2)
            y = fwht(torch.empty_like(wide).scatter_(-1, index, coded), width**-0.5).view(tokens, heads, dim)
            return rope(y, position, False) if before_rope else y

        return recode

    return make


VALUES_U2 = defined("v", "u2")
ROTATEKV_BITS = SimulatedSide(lambda dim, page: 2 + 32 / group(dim), rotatekv_keys(before_rope=False))
VIDKV_KEYS = SimulatedSide(lambda dim, page: 1.5 + 33 / page, vidkv_keys)  # 1 bit per channel says which are wide

SIMULATED: dict[str, tuple[SimulatedSide, SimulatedSide]] = {
    "vid15": (VIDKV_KEYS, SimulatedSide(lambda dim, page: 8 * -(-dim // 5) / dim + 16 / page, vidkv_values)),
    "vid15/u2": (VIDKV_KEYS, VALUES_U2),
    "rotatekv2/u2": (ROTATEKV_BITS, VALUES_U2),
    "rotatekv2 before RoPE/u2": (ROTATEKV_BITS._replace(make=rotatekv_keys(before_rope=True)), VALUES_U2),
}
