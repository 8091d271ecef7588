"""bf16: bfloat16 numbers as they are. fp32 input is rounded to nearest even; NaN becomes 0x7fc0, Inf stays."""

import torch
from torch import Tensor

from kvkernels.formats._rows16 import bytes_to_rows, rows_to_bytes, side_bytes, token_bytes, whole_pages

NAME = "bf16"
NUMBER = 0
BITS = 16
PACKED = False
ROTATED = False
KEYS_ONLY = False
PARTS = 1

__all__ = ["decode", "encode", "side_bytes", "token_bytes", "whole_pages"]


def encode(side: str, x: Tensor, page_size: int) -> Tensor:
    # Which NaN a conversion gives depends on the instruction set, so the bits are set here.
    bits = x.bfloat16().view(torch.int16).masked_fill(x.isnan(), 0x7FC0)
    return rows_to_bytes(bits)


def decode(side: str, data: Tensor, page_size: int, head_dim: int) -> Tensor:
    return bytes_to_rows(data, torch.bfloat16, head_dim)
