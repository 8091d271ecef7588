"""What stands for pages when some of them are chosen."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("minmax", "mean", "channels")  # SummaryKind


class PageSummaries(NamedTuple):
    """One record per page (or segment) and KV head: from `page_summaries`, for `score_pages` and `score_tokens`.

    kind       "minmax": largest and smallest value of every channel; "mean"; "channels": some channels of every token
    bits       16 (bfloat16), 8, or 4 (channels only), with a bfloat16 scale of each vector below 16
    page_size, head_dim   of the keys
    records    uint8 [num_pages, Hkv, record_bytes], one for each pool of the cache; of segments one of
               [B * num_segments, Hkv, record_bytes]
    channels   int32 [Hkv, r] of kind "channels", else None
    segments   int32 [B, num_segments + 1], where each segment begins and the last one ends; None: pages

    A record, include/kvkernels/summary.h: minmax [max | min | 2 scales], mean [mean | scale], channels [r rows of
    page_size numbers | a scale of every token], padded to 16 bytes. A token at 4 bits is (code - 7.5) * scale, two
    tokens a byte, the first one low.
    """

    kind: str
    bits: int
    page_size: int
    head_dim: int
    records: tuple[Tensor, ...]
    channels: Tensor | None = None
    segments: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all records, used or not."""
        return sum(r.nbytes for r in self.records)

    def __repr__(self) -> str:
        counts = " + ".join(str(r.shape[0]) for r in self.records)
        of = "segments" if self.segments is not None else "pages"
        extent = f"{self.page_size} tokens a page" if self.segments is None else f"page_size {self.page_size}"
        return (
            f"PageSummaries({self.kind}, {self.bits} bits; records of {counts} {of}, head_dim {self.head_dim}, "
            f"{extent}, {self.nbytes / 1e6:.2f} MB)"
        )


def record_bytes(kind: str, bits: int, page_size: int, head_dim: int, channels: int = 0) -> int:
    """Of one page and KV head; channels: how many of them a record of that kind has."""
    numbers = {"minmax": 2 * head_dim, "mean": head_dim, "channels": channels * page_size}[kind]
    scales = 0 if bits == 16 else {"minmax": 2, "mean": 1, "channels": page_size}[kind]
    return -(-(numbers * bits // 8 + 2 * scales) // 16) * 16


# The definition, in plain PyTorch.


def encode(kind: str, bits: int, keys: Tensor, page_size: int, channels: Tensor | None = None) -> Tensor:
    """The records uint8 [Hkv, record_bytes] of the keys of a run, float32 [Hkv, tokens, D]."""
    if kind == "minmax":
        parts = [(keys.amax(1) + 0.0, "up"), (keys.amin(1) + 0.0, "down")]  # no -0, which a maximum may or may not keep
    elif kind == "mean":
        total = torch.zeros_like(keys[:, 0])
        for token in range(keys.shape[1]):
            total = total + keys[:, token]
        parts = [(total / keys.shape[1], "nearest")]
    else:
        assert channels is not None
        labels = keys.gather(2, channels.long()[:, None].expand(-1, keys.shape[1], -1))
        parts = [(F.pad(labels, (0, 0, 0, page_size - labels.shape[1])), "nearest")]
    codes, scales = zip(*(_encode(x, bits, rounding) for x, rounding in parts))
    if kind == "channels":
        codes = tuple(c.transpose(1, 2).contiguous() for c in codes)
        if bits == 4:
            codes = tuple(c[..., 0::2] | c[..., 1::2] << 4 for c in codes)
    flat = [part.contiguous().view(torch.uint8).flatten(1) for part in (*codes, *(s for s in scales if s is not None))]
    record = torch.cat(flat, 1)
    return F.pad(record, (0, -record.shape[1] % 16))


def _encode(x: Tensor, bits: int, rounding: str) -> tuple[Tensor, Tensor | None]:
    """Numbers [..., n] -> codes, and a scale [..., 1] of each vector below 16 bits."""
    if bits == 16:
        return _to_bf16(x, rounding), None
    top = 127.0 if bits == 8 else 7.5
    most = x.abs().amax(-1, keepdim=True)
    stored = torch.where(most.isfinite(), _to_bf16(most / top, "up"), _NAN)
    scale = _from_bf16(stored)
    codes = x / scale
    if bits == 8:
        rounded = {"up": torch.ceil, "down": torch.floor, "nearest": torch.round}[rounding](codes)
        codes = rounded.clamp(-127, 127)
    else:
        codes = (codes + 7.5).round().clamp(0, 15)
    codes = torch.where(scale > 0, codes, 0).to(torch.int8 if bits == 8 else torch.uint8)
    return codes, stored


_NAN = torch.tensor(0x7FC0, dtype=torch.int16)  # bfloat16


def _to_bf16(x: Tensor, rounding: str) -> Tensor:
    """float32 -> the bits of a bfloat16. "up": the next that is not below."""
    bits = x.contiguous().view(torch.int32)
    if rounding == "nearest":
        bits = bits + 0x7FFF + (bits >> 16 & 1)
    else:
        bits = bits + torch.where((bits >= 0) == (rounding == "up"), 0xFFFF, 0)
    return torch.where(x.isnan(), _NAN, (bits >> 16).to(torch.int16))


def _from_bf16(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16).float()


def decode(summaries: PageSummaries, record: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Records [Hkv, record_bytes] -> (max, min) or (mean,), each [Hkv, D], or (labels,) [Hkv, page_size, r]."""
    kind, bits, D, page_size = summaries.kind, summaries.bits, summaries.head_dim, summaries.page_size
    heads = record.shape[0]
    if kind == "channels":
        assert summaries.channels is not None
        shape: tuple[int, ...] = (summaries.channels.shape[1], page_size)
    else:
        shape = (2 if kind == "minmax" else 1, D)
    numbers = shape[0] * shape[1]
    codes = record[:, : numbers * bits // 8].contiguous()
    if bits == 16:
        x = codes.view(torch.bfloat16).to(dtype).view(heads, *shape)
    else:
        count = page_size if kind == "channels" else shape[0]
        at = numbers * bits // 8
        scale = record[:, at : at + 2 * count].contiguous().view(torch.bfloat16).to(dtype)
        if bits == 8:
            x = codes.view(torch.int8).to(dtype).view(heads, *shape)
        else:
            x = torch.stack((codes & 15, codes >> 4), -1).to(dtype).view(heads, *shape) - 7.5
        x = x * (scale[:, None] if kind == "channels" else scale[:, :, None])
    return (x.transpose(1, 2),) if kind == "channels" else x.unbind(1)
