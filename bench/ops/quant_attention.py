"""Decode attention: every format against torch on contiguous 16- and 32-bit K and V. Llama-3-8B's heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kvkernels as kk
from bench import peers
from bench.pages import HKV, HQ, PAGE, D, attend, layers, paged
from bench.race import Contestant, Race
from kvkernels.ops.quant_attention import cost

PRESETS = ("m42/u2.e5m3", "m42/t1.e5m3", "m31/u2.e5m3", "m31/t1.e5m3", "m31/b1.e5m3")
FORMATS = ("bf16", "u8", "u4", "u3", "u2", "t1", "b1", *PRESETS, "kivi2")
SHAPES = ((1, 8192), (1, 32768), (8, 8192), (8, 32768))
QUICK_SHAPES = ((1, 2048),)
BOTH = {"sdpa": peers.sdpa, "matmul": peers.matmul}
PEERS = {torch.bfloat16: {**BOTH, "sdpa grouped": peers.sdpa_grouped}, torch.float32: BOTH}


def rope_on_read(q: Tensor, kv: kk.PagedKV, table: Tensor, lens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pages hold one sequence's keys as they are before RoPE; it is applied to what read_kv gives."""
    slots = (table[0].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()
    k, v = kk.read_kv(kv, 0, slots, torch.bfloat16)
    a, b = k.chunk(2, -1)
    k = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    k, v = (x.view(-1, PAGE, HKV, D) for x in (k, v))
    return kk.flash_decode(q, k, v, torch.arange(len(k), dtype=torch.int32)[None], lens)


def races(threads: int, quick: bool) -> Iterator[Race]:
    for batch, length in QUICK_SHAPES if quick else SHAPES:
        torch.manual_seed(0)
        k, v = (torch.randn(length, HKV, D, dtype=torch.bfloat16) for _ in "kv")
        q = torch.randn(batch, HQ, D, dtype=torch.bfloat16)
        lens = torch.full((batch,), length, dtype=torch.int32)
        count = layers(4 * batch * length * HKV * D)
        contestants = []
        for name in FORMATS:
            held = [paged(k, v, name, batch) for _ in range(count)]
            kv, table = held[0]
            case = {"formats": (name,), "lens": (length,) * batch, "Hq": HQ, "Hkv": HKV, "D": D, "page_size": PAGE}
            reads, flops = cost(case | {"Tq": 1, "dtype": "bfloat16"})
            contestants.append(
                Contestant(
                    name,
                    [partial(attend, q, *layer, lens) for layer in held],
                    reads,
                    flops,
                    # 2-bit codes can be multiplied as bytes, 16-bit rows cannot
                    rate="bf16" if name == "bf16" else "int8",
                )
            )
            if name == "m31/u2.e5m3" and batch == 1:
                angle = torch.arange(length)[:, None, None] * 1e4 ** -torch.arange(0, 1, 2 / D)
                cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
                rotated = partial(rope_on_read, q, kv, table, lens, cos, sin)
                contestants.append(Contestant(f"{name}, RoPE on read", rotated, reads, flops, rate="int8"))
        against = ["bf16"]
        flat = [x.transpose(0, 1).expand(batch, -1, -1, -1).contiguous() for x in (k, v)]
        del k, v
        for dtype, functions in PEERS.items():
            short = "bf16" if dtype == torch.bfloat16 else "fp32"
            pairs = [[x.to(dtype, copy=True) for x in flat] for _ in range(count)]
            q_same = q.to(dtype)
            size = 2.0 * flat[0].numel() * q_same.element_size()
            for name, function in functions.items():
                contestants.append(
                    Contestant(
                        f"{name} {short}",
                        [partial(function, q_same, *layer) for layer in pairs],
                        size,
                        4.0 * batch * HQ * length * D,
                        rate="bf16" if short == "bf16" else "fma",
                        peer=True,
                    )
                )
                against.append(f"{name} {short}")
        if batch == 1:
            for name, step in peers.hf_caches(flat[0], flat[1], q).items():
                # at least the codes
                contestants.append(Contestant(name, step, 2.0 * flat[0].numel() * 2 / 8, 0.0, peer=True))
                against.append(name)
        yield Race("quant_attention", f"B{batch} L{length}", threads, contestants, against)
