"""Decode: one token per sequence. Bound by the states' way from memory; warm, one layer's states lie in cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import kvkernels as kk
from bench import peers
from bench.race import Contestant, Race

H, HV, D = 16, 32, 128


def races(threads: int, quick: bool) -> Iterator[Race]:
    theirs = peers.hf_delta_step()
    for batch, cold in ((1, True),) if quick else ((1, False), (1, True), (8, False), (8, True), (64, True)):
        torch.manual_seed(0)
        q, k = torch.rand(2, batch, H, D).bfloat16()
        v, beta = torch.randn(batch, HV, D).bfloat16(), torch.rand(batch, HV).bfloat16()
        g = 0.1 * F.logsigmoid(torch.randn(batch, HV))
        slots = torch.arange(batch, dtype=torch.int32)
        contestants = []
        for dtype in (torch.float32, torch.bfloat16):
            pool = torch.zeros(batch, HV, D, D, dtype=dtype)
            run = partial(kk.delta_rule_step, q, k, v, beta, g, state=pool, slots=slots, qk_l2norm=True)
            moved = float(pool.numel() * pool.element_size()) if cold else 0.0
            name = "fp32 state" if dtype == torch.float32 else "bf16 state"
            contestants.append(Contestant(name, run, moved, 6.0 * pool.numel()))
        if theirs is not None:
            state = torch.zeros(batch, HV, D, D)
            step = partial(theirs, *(x.unsqueeze(1) for x in (q, k, v)), g.unsqueeze(1), beta.unsqueeze(1), state)
            moved = float(state.numel() * 4) if cold else 0.0
            contestants.append(Contestant("HF", step, moved, 6.0 * state.numel(), peer=True))
        state = torch.zeros(batch, HV, D, D)
        vllm = peers.vllm_delta_step(q, k, v, state)
        if vllm is not None:
            moved = float(state.numel() * 4) if cold else 0.0
            contestants.append(Contestant("vLLM", vllm, moved, 6.0 * state.numel(), peer=True))
        label = f"B{batch} H{H} HV{HV} {'cold' if cold else 'warm'}"
        inner = 1 if cold else 200 // batch  # calls per timing: the first of them is not warm
        yield Race("delta_rule_step", label, threads, contestants, ["HF", "vLLM"], cold=cold, inner=inner)
