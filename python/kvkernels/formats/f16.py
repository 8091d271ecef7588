"""f16: IEEE half numbers as they are. fp32 is rounded to nearest even; Inf stays, NaN keeps its upper payload bits."""

import torch
from torch import Tensor

from kvkernels.formats._rows16 import bytes_to_rows, rows_to_bytes, side_bytes, token_bytes, whole_pages

NAME = "f16"
NUMBER = 1
BITS = 16
PACKED = False
ROTATED = False
KEYS_ONLY = False
PARTS = 1

__all__ = ["decode", "encode", "side_bytes", "token_bytes", "whole_pages"]


def encode(side: str, x: Tensor, page_size: int) -> Tensor:
    # Which NaN a conversion gives depends on the instruction set, so the bits are set here: quiet, payload shifted.
    word = x.contiguous().view(torch.int32)
    nan = ((word >> 16) & -0x8000 | 0x7E00 | (word >> 13) & 0x3FF).to(torch.int16)
    return rows_to_bytes(torch.where(x.isnan(), nan, x.half().view(torch.int16)))


def decode(side: str, data: Tensor, page_size: int, head_dim: int) -> Tensor:
    return bytes_to_rows(data, torch.float16, head_dim)
