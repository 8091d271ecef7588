"""kivi2: 2-bit affine codes, unrotated. K per channel over the tokens of a page, V per token and group of 32 channels.

K side: codes [page_size][D/4 B] | scale fp16 [D] | zero fp16 [D]; V side: codes | scale fp16 [page_size][D/32] | zero
likewise. x = zero + scale * code. A constant group decodes to its own value in fp16, one with NaN or Inf to NaN.
Source: Liu et al. 2024, arXiv:2402.02750 (KIVI).
"""

import torch
from torch import Tensor

from kvkernels.formats._grid import MAX_SCALE, bytes_f16, f16_bytes, nan_f16, pack_bits, unpack_bits

NAME = "kivi2"
NUMBER = 6
BITS = 2
PACKED = True
ROTATED = False
KEYS_ONLY = False
PARTS = 1

V_GROUP = 32


def whole_pages(side: str) -> bool:
    return side == "k"


def side_bytes(side: str, page_size: int, head_dim: int) -> int:
    return page_size * head_dim // 4 + 4 * (head_dim if side == "k" else page_size * head_dim // V_GROUP)


def _affine(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups along dim -> codes uint8, scale and zero fp16 with that dim of size 1."""
    finite = x.isfinite().all(dim, keepdim=True)
    x = x.where(finite, 0.0)
    # + 0.0: -0.0 becomes 0.0, since which of the two zeros a minimum picks is not defined
    low, high = x.amin(dim, keepdim=True) + 0.0, x.amax(dim, keepdim=True) + 0.0
    zero = low.clamp(-MAX_SCALE, MAX_SCALE).half()
    span = high - zero.float()
    # a tensor, since dividing by a number may multiply by its rounded reciprocal
    scale = ((span / torch.full_like(span, 3.0)).clamp(0.0, MAX_SCALE) + 0.0).half()
    s = scale.float()
    codes = ((x - zero.float()) * torch.where(s > 0, 1.0 / s, 0.0)).round().clamp(0, 3)
    return codes.where(finite, 0.0).to(torch.uint8), nan_f16(scale, ~finite), nan_f16(zero, ~finite)


def encode(side: str, x: Tensor, page_size: int) -> Tensor:
    if side == "k":
        codes, scale, zero = _affine(x, -2)
    else:
        grouped, scale, zero = _affine(x.unflatten(-1, (-1, V_GROUP)), -1)
        codes, scale, zero = grouped.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)
    return torch.cat([pack_bits(codes, 2).flatten(-2), f16_bytes(scale), f16_bytes(zero)], -1)


def decode(side: str, data: Tensor, page_size: int, head_dim: int) -> Tensor:
    size = page_size * head_dim // 4
    code_bytes, scale_bytes, zero_bytes = data.split([size, *2 * [(data.shape[-1] - size) // 2]], -1)
    codes = unpack_bits(code_bytes, 2).float().unflatten(-1, (page_size, head_dim))
    columns = head_dim if side == "k" else head_dim // V_GROUP
    scale, zero = bytes_f16(scale_bytes, columns), bytes_f16(zero_bytes, columns)
    if side == "v":
        scale, zero = scale.repeat_interleave(V_GROUP, -1), zero.repeat_interleave(V_GROUP, -1)
    return zero + scale * codes


def token_bytes(side: str, token: int, page_size: int, head_dim: int) -> Tensor:
    if side == "k":
        raise ValueError("kivi2 codes the keys of a page at once: a single token has no bytes of its own")
    positions, offset = [], 0
    for row in (head_dim // 4, head_dim // V_GROUP * 2, head_dim // V_GROUP * 2):
        positions.append(offset + token * row + torch.arange(row))
        offset += page_size * row
    return torch.cat(positions)
