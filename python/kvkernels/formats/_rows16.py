"""A page side of 16-bit numbers as they are, [page_size][D] (twin of core/rows16.h)."""

import torch
from torch import Tensor


def side_bytes(side: str, page_size: int, head_dim: int) -> int:
    return page_size * head_dim * 2


def whole_pages(side: str) -> bool:
    return False


def rows_to_bytes(x: Tensor) -> Tensor:
    """16-bit [..., page_size, D] -> uint8 [..., 2 page_size D]."""
    return x.contiguous().view(torch.uint8).flatten(-2)


def bytes_to_rows(data: Tensor, dtype: torch.dtype, head_dim: int) -> Tensor:
    return data.contiguous().view(dtype).unflatten(-1, (-1, head_dim)).float()


def token_bytes(side: str, token: int, page_size: int, head_dim: int) -> Tensor:
    return torch.arange(token * head_dim * 2, (token + 1) * head_dim * 2)
