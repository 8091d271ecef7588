"""The grids of formats whose every token is coded by itself, and the page side made of them (twin of core/grid.h,
core/scale.h and core/token_codes.h, bit for bit).

    +-----------------------------+-----------------------+------------------------------------+
    | plane 0: [page_size]        | plane 1 (3 bits only) | scales: [page_size][ceil(D / 128)] |
    |   low bits, or trits        |   [page_size]         |   fp16 or e5m3                     |
    +-----------------------------+-----------------------+------------------------------------+

x = s * (code - offset), one scale per token and 128 channels: of keys the least-squares one; of values on coarse grids
(at most 2 bits) the one that makes <x, decoded> = <x, x>. Everything is fp32 without fused multiply-add; sums are
folded in halves. A zero group decodes to 0, a scale past the largest clips, a group with NaN or Inf decodes to NaN.
Source of the values' scale: Gao and Long 2024, arXiv:2405.12497 (RaBitQ).
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


def pack_trits(codes: Tensor) -> Tensor:
    """uint8 codes [..., n] in 0, 1, 2 -> bytes [..., ceil(n / 5)]: ceil(256 v / 243), v = 81 t0 + 27 t1 + ... + t4."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5)).int()
    v = (padded * torch.tensor([81, 27, 9, 3, 1], device=codes.device)).sum(-1)
    return ((v * 256 + 242) // 243).to(torch.uint8)


def unpack_trits(data: Tensor, n: int) -> Tensor:
    powers = torch.tensor([1, 3, 9, 27, 81], device=data.device)
    return ((data.int().unsqueeze(-1) * powers & 255) * 3 >> 8).to(torch.uint8).flatten(-2)[..., :n]


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


class ScaleF16:
    """fp16 as it is."""

    BYTES = 2
    LARGEST = MAX_SCALE

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        """fp32 0 .. LARGEST -> the nearest stored scale, as fp16."""
        return x.half()

    @staticmethod
    def to_bytes(scale: Tensor) -> Tensor:
        return f16_bytes(scale)

    @staticmethod
    def from_bytes(data: Tensor, columns: int) -> Tensor:
        return bytes_f16(data, columns)


class ScaleE5M3:
    """8 bits: fp16 without its sign, the mantissa rounded to 3 bits."""

    BYTES = 1
    LARGEST = 61440.0

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        h = x.half().view(torch.int16)
        return ((h + 0x3F + (h >> 7 & 1)) & ~0x7F).view(torch.float16)

    @staticmethod
    def to_bytes(scale: Tensor) -> Tensor:
        return (scale.contiguous().view(torch.int16) >> 7).to(torch.uint8).flatten(-2)

    @staticmethod
    def from_bytes(data: Tensor, columns: int) -> Tensor:
        return (data.to(torch.int16) << 7).view(torch.float16).float().unflatten(-1, (-1, columns))


Scale = type[ScaleF16] | type[ScaleE5M3]


class MidRise:
    """B bits: levels at +-s/2, +-3s/2, ...; of one bit the sign."""

    def __init__(self, bits: int):
        self.bits = bits
        self.half_levels = 2 ** (bits - 1)
        self.offset = self.half_levels - 0.5
        self.planes = (2, 1) if bits == 3 else (bits,)
        self.unbiased_values = bits <= 2

    def start(self, x: Tensor, squares: Tensor) -> Tensor:
        if self.bits <= 3:  # rms times the optimum for a Gaussian; of one bit, any
            return (squares * (1.0 / x.shape[-1])).sqrt() * {1: 1.0, 2: 0.9957, 3: 0.586}[self.bits]
        return x.abs().amax(-1, keepdim=True) * (1.0 / self.half_levels)

    def level(self, y: Tensor) -> Tensor:
        return y.floor().clamp(-self.half_levels, self.half_levels - 1) + 0.5

    def rows(self, n: int) -> tuple[int, ...]:
        """Bytes of n channels in each plane."""
        return tuple(n * width // 8 for width in self.planes)

    def pack(self, codes: Tensor) -> list[Tensor]:
        shifts = [sum(self.planes[:i]) for i in range(len(self.planes))]
        return [pack_bits((codes >> s) & (2**w - 1), w) for s, w in zip(shifts, self.planes, strict=True)]

    def unpack(self, planes: list[Tensor], n: int) -> Tensor:
        codes = unpack_bits(planes[0], self.planes[0])
        return codes | unpack_bits(planes[1], 1) << 2 if len(planes) == 2 else codes


class Ternary:
    """Levels -s, 0, s; five to a byte."""

    offset = 1.0
    unbiased_values = True

    def start(self, x: Tensor, squares: Tensor) -> Tensor:
        return (squares * (1.0 / x.shape[-1])).sqrt() * 1.224  # threshold at 0.612 rms, the optimum for a Gaussian

    def level(self, y: Tensor) -> Tensor:
        return (y + 0.5).floor().clamp(-1, 1)

    def rows(self, n: int) -> tuple[int, ...]:
        return (-(-n // 5),)

    def pack(self, codes: Tensor) -> list[Tensor]:
        return [pack_trits(codes)]

    def unpack(self, planes: list[Tensor], n: int) -> Tensor:
        return unpack_trits(planes[0], n)


Grid = MidRise | Ternary


def encode_groups(grid: Grid, scale: Scale, x: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Groups x [..., n] fp32, n a power of two up to 128 -> codes uint8 [..., n], scales fp16 [..., 1]."""
    finite = x.isfinite().all(-1, keepdim=True)
    x = x.where(finite, 0.0)
    squares = fold_sum(x * x)
    levels = grid.level(x * (1.0 / grid.start(x, squares).clamp(TINY_SCALE, MAX_SCALE)))
    mass = (levels * levels).sum(-1, keepdim=True)
    least_squares = torch.where(mass > 0, fold_sum(x * levels) / mass, 0.0)
    if unbiased:
        levels = grid.level(x * (1.0 / least_squares.clamp(min=TINY_SCALE)))
        dot = fold_sum(x * levels)
        ratio = (squares / dot).nan_to_num(nan=scale.LARGEST, posinf=scale.LARGEST)
        stored = scale.rounded(torch.where(dot > 0, ratio.clamp(max=scale.LARGEST), 0.0))
    else:
        stored = scale.rounded(least_squares.clamp(max=scale.LARGEST))
        s = stored.float()
        levels = grid.level(x * torch.where(s > 0, 1.0 / s, 0.0))
    codes = (levels + grid.offset).where(finite, 0.0).to(torch.uint8)
    return codes, nan_f16(stored, ~finite)


class TokenCodes:
    """One side of a page whose every token is coded by itself."""

    def __init__(self, grid: Grid, scale: Scale = ScaleF16):
        self.grid = grid
        self.scale = scale

    def whole_pages(self, side: str) -> bool:
        return False

    def rows(self, head_dim: int) -> tuple[int, ...]:
        """Bytes of a token in each plane, and of its scales."""
        groups = -(-head_dim // SCALE_GROUP)
        planes = self.grid.rows(min(head_dim, SCALE_GROUP))
        return (*(groups * row for row in planes), groups * self.scale.BYTES)

    def side_bytes(self, side: str, page_size: int, head_dim: int) -> int:
        return page_size * sum(self.rows(head_dim))

    def encode(self, side: str, x: Tensor, page_size: int) -> Tensor:
        unbiased = side == "v" and self.grid.unbiased_values
        grouped = x.unflatten(-1, (-1, min(x.shape[-1], SCALE_GROUP)))
        codes, scale = encode_groups(self.grid, self.scale, grouped, unbiased)
        planes = [plane.flatten(-3) for plane in self.grid.pack(codes)]
        return torch.cat([*planes, self.scale.to_bytes(scale.squeeze(-1))], -1)

    def decode(self, side: str, data: Tensor, page_size: int, head_dim: int) -> Tensor:
        rows, groups = self.rows(head_dim), -(-head_dim // SCALE_GROUP)
        *planes, scale_bytes = data.split([page_size * row for row in rows], -1)
        by_group = [plane.unflatten(-1, (page_size, groups, -1)) for plane in planes]
        codes = self.grid.unpack(by_group, min(head_dim, SCALE_GROUP))
        scale = self.scale.from_bytes(scale_bytes, groups).unsqueeze(-1)
        return (scale * (codes.float() - self.grid.offset)).flatten(-2)

    def token_bytes(self, side: str, token: int, page_size: int, head_dim: int) -> Tensor:
        positions, offset = [], 0
        for row in self.rows(head_dim):
            positions.append(offset + token * row + torch.arange(row))
            offset += page_size * row
        return torch.cat(positions)
