"""Keys of two grids: the first half of the channels, in the order of `KVTransform.order`, in a fine one, the second in
a coarse one; each half is rotated by itself and stored as a side of its own (twin of core/halves.h).

    +-----------------------------------------+-----------------------------------------+
    | stored channels 0 .. D/2: a side of     | stored channels D/2 .. D: a side of     |
    |   `first` with head dim D/2             |   `second` with head dim D/2            |
    +-----------------------------------------+-----------------------------------------+

Source: channels reordered as in Su et al. 2025, arXiv:2501.16383 (RotateKV), bits by the range of the channel as in Tao
et al. 2025, arXiv:2503.16257 (VidKV); the combination measured for this library.
"""

import torch
from torch import Tensor

from kvkernels.formats._grid import TokenCodes


class Halves:
    def __init__(self, first: TokenCodes, second: TokenCodes):
        self.parts = (first, second)

    def whole_pages(self, side: str) -> bool:
        return False

    def side_bytes(self, side: str, page_size: int, head_dim: int) -> int:
        return sum(part.side_bytes(side, page_size, head_dim // 2) for part in self.parts)

    def encode(self, side: str, x: Tensor, page_size: int) -> Tensor:
        halves = zip(self.parts, x.chunk(2, -1), strict=True)
        return torch.cat([part.encode(side, half, page_size) for part, half in halves], -1)

    def decode(self, side: str, data: Tensor, page_size: int, head_dim: int) -> Tensor:
        sizes = [part.side_bytes(side, page_size, head_dim // 2) for part in self.parts]
        halves = zip(self.parts, data.split(sizes, -1), strict=True)
        return torch.cat([part.decode(side, half, page_size, head_dim // 2) for part, half in halves], -1)

    def token_bytes(self, side: str, token: int, page_size: int, head_dim: int) -> Tensor:
        first, second = (part.token_bytes(side, token, page_size, head_dim // 2) for part in self.parts)
        return torch.cat([first, second + self.parts[0].side_bytes(side, page_size, head_dim // 2)])
