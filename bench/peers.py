"""What a user would run instead, on contiguous K and V [B, Hkv, L, D]: the kindest case for all of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, Hq, D] -> [B, Hq, D]."""
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)


def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA with the query heads of a KV head as rows of one query: right without a mask, K is read once."""
    b, hq, d = q.shape
    hkv = k.shape[1]
    return F.scaled_dot_product_attention(q.view(b, hkv, hq // hkv, d), k, v).view(b, hq, d)


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped matmul and softmax: K and V are read once for the heads that share them, the softmax is in fp32."""
    b, hq, d = q.shape
    hkv = k.shape[1]
    grouped = q.view(b, hkv, hq // hkv, d)
    scores = grouped @ k.transpose(-1, -2)
    weights = torch.softmax(scores.float() * d**-0.5, -1).to(v.dtype)
    return (weights @ v).view(b, hq, d)


def flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """flex_attention, compiled for the shapes of its first call; a new function forgets those of others."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)


def hf_caches(k: Tensor, v: Tensor, q: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A decode step on transformers' quantised caches, 2 bits, for each backend that is installed; none without.

    The step is what the cache does per layer and token: append one, dequantise all, then SDPA.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    if importlib.util.find_spec("transformers") is None:
        return found
    from transformers import cache_utils

    for name, needs in (("Quanto", "optimum.quanto"), ("HQQ", "hqq")):
        try:
            importlib.import_module(needs)
        except ImportError:
            continue
        layer = getattr(cache_utils, f"{name}QuantizedLayer")(
            nbits=2, axis_key=0 if name == "Quanto" else 1, axis_value=0 if name == "Quanto" else 1, q_group_size=64
        )
        layer.update(k.clone(), v.clone())

        def step(layer: Any = layer) -> Tensor:
            keys, values = layer.update(k[:, :, :1], v[:, :, :1])
            return sdpa(q, keys, values)

        found[f"HF {name.lower()} 2-bit"] = step
    return found
