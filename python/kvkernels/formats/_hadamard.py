"""Hadamard matrices and the fast Walsh-Hadamard transform in plain PyTorch (twin of core/fwht.h and core/hadamard.h).

Sizes are m * 2^k with m in 1, 12, 20, 28: H = H_m (x) H_{2^k}, where H_{2^k} is Sylvester's and H_m is Paley's second
construction. Both are symmetric with entries +-1, so H H = n I and the transform is its own inverse up to 1/n.
Source: Paley 1933, "On orthogonal matrices", J. Math. Phys. 12.
"""

from functools import lru_cache

import torch
from torch import Tensor

# odd part of n -> (m, field of Paley's construction), m = 2 (q + 1)
_PALEY = {3: (12, 5), 5: (20, 9), 7: (28, 13)}


def _field(q: int) -> list[list[int]]:
    """GF(q) as a table: entry [i][j] is the index of (element i) - (element j). GF(9): a + b i is element a + 3 b."""
    if q == 9:
        return [[(i - j) % 3 + 3 * ((i // 3 - j // 3) % 3) for j in range(9)] for i in range(9)]
    return [[(i - j) % q for j in range(q)] for i in range(q)]


def _squares(q: int) -> set[int]:
    if q == 9:  # (a + b i)^2 = a^2 - b^2 + 2 a b i
        return {(a * a - b * b) % 3 + 3 * (2 * a * b % 3) for a in range(3) for b in range(3)}
    return {x * x % q for x in range(q)}


def _paley(q: int) -> Tensor:
    squares = _squares(q)
    jacobsthal = [[0 if d == 0 else 1 if d in squares else -1 for d in row] for row in _field(q)]
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[0, 0] = 0
    core[1:, 1:] = torch.tensor(jacobsthal)
    wings = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    centre = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, wings) + torch.kron(torch.eye(q + 1, dtype=torch.float64), centre)


def split_size(n: int) -> tuple[int, int]:
    """n = m * 2^k -> (m, 2^k)."""
    odd = n
    while odd > 1 and odd % 2 == 0:
        odd //= 2
    m = 1 if odd == 1 else _PALEY.get(odd, (0, 0))[0]
    if n < 1 or m == 0 or n % m:
        raise ValueError(f"fwht size must be m * 2^k with m one of 1, 12, 20, 28; got {n}")
    return m, n // m


@lru_cache
def hadamard_matrix(n: int) -> Tensor:
    """The matrix of fwht, float64 [n, n], entries +-1, symmetric."""
    m, power = split_size(n)
    h = _paley(_PALEY[m // 4][1]) if m > 1 else torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while power > 1:
        h, power = torch.kron(h, two), power // 2
    return h


def fwht_scale(n: int) -> float:
    """1 / sqrt(n) for n a power of two, rounded to fp32: the number every encoder multiplies with."""
    root_half = torch.tensor(0.5, dtype=torch.float32).sqrt().item()
    log2 = n.bit_length() - 1
    return 2.0 ** -(log2 // 2) * (root_half if log2 % 2 else 1.0)


def fwht(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * H x over the last dim. Stages run from stride 1 upwards: at sizes 2^k fp32 gives the kernels' bits."""
    m, power = split_size(x.shape[-1])
    stride = 1
    while stride < power:
        a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    if m > 1:
        x = (hadamard_matrix(m).to(x) @ x.unflatten(-1, (m, power))).flatten(-2)
    return x * scale
