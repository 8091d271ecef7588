"""The grid of u8, u4, u3, u2 and the page side made of it (twin of core/midrise.h and core/token_codes.h, bit for bit).

    +----------------------+----------------------+-----------------------------------------+
    | plane 0: [page_size] | plane 1 (u3 only):   | scales: fp16 [page_size][ceil(D / 128)] |
    |   low bits per token |   high bit per token |                                         |
    +----------------------+----------------------+-----------------------------------------+

x = s * (code - (2^B - 1) / 2), one least-squares scale per token and 128 channels. Everything is fp32 without fused
multiply-add; sums are folded in halves. A zero group decodes to 0, a scale past 65504 clips, a group that holds NaN or
Inf decodes to NaN.
"""

import torch
from torch import Tensor

SCALE_GROUP = 128
TINY_SCALE = 2.0**-24  # the least positive fp16
MAX_SCALE = 65504.0  # the largest


def fold_sum(x: Tensor) -> Tensor:
    """Sum over the last dim (a power of two) in the order x[i] + x[i + n/2], then halves of halves; keeps the dim."""
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] below 2^bits -> bytes [..., n * bits / 8], little-endian and linear."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(data: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def f16_bytes(x: Tensor) -> Tensor:
    """fp16 [..., a, b] -> its bytes [..., 2 a b]."""
    return x.contiguous().view(torch.uint8).flatten(-2)


def bytes_f16(data: Tensor, columns: int) -> Tensor:
    """Bytes [..., 2 a columns] -> fp32 [..., a, columns]."""
    return data.contiguous().view(torch.float16).float().unflatten(-1, (-1, columns))


def nan_f16(x: Tensor, where: Tensor) -> Tensor:
    """fp16 x with the NaN 0x7e00 put in; Tensor.half() would leave the bits of a NaN to the instruction set."""
    return torch.where(where, torch.tensor(0x7E00, dtype=torch.int16, device=x.device), x.view(torch.int16)).view(
        torch.float16
    )


def encode_groups(bits: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Groups x [..., n] fp32, n a power of two up to 128 -> codes uint8 [..., n], scales fp16 [..., 1]."""
    levels = 2 ** (bits - 1)
    finite = x.isfinite().all(-1, keepdim=True)
    x = x.where(finite, 0.0)
    if bits <= 3:  # rms times the optimum for a Gaussian
        start = (fold_sum(x * x) * (1.0 / x.shape[-1])).sqrt() * {2: 0.9957, 3: 0.586}[bits]
    else:
        start = x.abs().amax(-1, keepdim=True) * (1.0 / levels)
    centres = (x * (1.0 / start.clamp(TINY_SCALE, MAX_SCALE))).floor().clamp(-levels, levels - 1) + 0.5
    least_squares = fold_sum(x * centres) / (centres * centres).sum(-1, keepdim=True)
    scale = nan_f16(least_squares.clamp(max=MAX_SCALE).half(), ~finite)
    s = scale.float()
    inverse = torch.where(s > 0, 1.0 / s, 0.0)
    codes = (x * inverse).floor().clamp(-levels, levels - 1) + levels
    return codes.where(finite, 0.0).to(torch.uint8), scale


class TokenCodes:
    """One side of a page whose every token is coded by itself."""

    def __init__(self, bits: int):
        self.bits = bits
        self.planes = (2, 1) if bits == 3 else (bits,)

    def whole_pages(self, side: str) -> bool:
        return False

    def side_bytes(self, side: str, page_size: int, head_dim: int) -> int:
        return page_size * (head_dim * self.bits // 8 + 2 * -(-head_dim // SCALE_GROUP))

    def encode(self, side: str, x: Tensor, page_size: int) -> Tensor:
        grouped, scale = encode_groups(self.bits, x.unflatten(-1, (-1, min(x.shape[-1], SCALE_GROUP))))
        codes, shift, parts = grouped.flatten(-2), 0, []
        for width in self.planes:
            parts.append(pack_bits((codes >> shift) & (2**width - 1), width).flatten(-2))
            shift += width
        return torch.cat([*parts, f16_bytes(scale.squeeze(-1))], -1)

    def decode(self, side: str, data: Tensor, page_size: int, head_dim: int) -> Tensor:
        sizes = [page_size * head_dim * width // 8 for width in self.planes]
        *planes, scale_bytes = data.split([*sizes, data.shape[-1] - sum(sizes)], -1)
        codes = torch.zeros((), dtype=torch.uint8, device=data.device)
        shift = 0
        for plane, width in zip(planes, self.planes, strict=True):
            codes = codes | unpack_bits(plane, width) << shift
            shift += width
        scale = bytes_f16(scale_bytes, -(-head_dim // SCALE_GROUP)).unsqueeze(-1)
        centred = codes.float() - (2 ** (self.bits - 1) - 0.5)
        return (scale * centred.unflatten(-1, (*scale.shape[-3:-1], -1))).flatten(-2)

    def token_bytes(self, side: str, token: int, page_size: int, head_dim: int) -> Tensor:
        positions, offset = [], 0
        for row in (*(head_dim * width // 8 for width in self.planes), 2 * -(-head_dim // SCALE_GROUP)):
            positions.append(offset + token * row + torch.arange(row))
            offset += page_size * row
        return torch.cat(positions)
