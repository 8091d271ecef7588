"""Prompts and training steps of the delta rule against the plain PyTorch of transformers, and vLLM where it can.

Work is counted as the chunk form needs it, chunks of 32 tokens, one state per value head: the same for all contestants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kvkernels as kk
from bench import peers
from bench.race import Contestant, Race

CHUNK = 32


class Case(NamedTuple):
    rule: str  # GDN, KDA, DeltaNet
    tokens: int
    heads: int
    value_heads: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    D: int = 128

    @property
    def label(self) -> str:
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        work = "fwd+bwd" if self.backward else "fwd"
        return f"{self.rule} {work} T{self.tokens} H{self.heads} HV{self.value_heads} {dtype}"

    @property
    def flops(self) -> float:
        state, within = 6.0 * self.D**2, 2.0 * CHUNK * self.D
        keys = self.heads if self.rule != "KDA" else self.value_heads  # products of keys are shared where decays are
        forward = self.tokens * (self.value_heads * (state + within) + keys * within)
        # Backward: two of the three products with the state again, then two for each of the three; likewise within.
        again = self.tokens * (self.value_heads * (2 / 3 * state + within / 2) + keys * within)
        return forward + again + 2 * forward if self.backward else forward


FULL = (
    Case("GDN", 2048, 16, 32, torch.bfloat16),
    Case("GDN", 2048, 16, 32),
    Case("DeltaNet", 2048, 16, 16),
    Case("KDA", 256, 32, 32, torch.bfloat16),
    Case("KDA", 256, 32, 32),
    Case("GDN", 8192, 1, 1),
    Case("GDN", 1024, 16, 32, backward=True),
    Case("KDA", 256, 32, 32, backward=True),
)
QUICK = (Case("GDN", 64, 1, 2, torch.bfloat16, D=32), Case("KDA", 64, 2, 2, backward=True, D=32))


def inputs(case: Case) -> dict[str, Tensor]:
    """Positive keys: near to each other, as in fla's tests."""
    T, H, HV, D = case.tokens, case.heads, case.value_heads, case.D
    x = {"q": torch.rand(1, T, H, D), "k": torch.rand(1, T, H, D), "v": torch.randn(1, T, HV, D)}
    found = {name: t.to(case.dtype) for name, t in x.items()}
    found["beta"] = torch.rand(1, T, HV).to(case.dtype)
    if case.rule != "DeltaNet":
        found["g"] = 0.1 * F.logsigmoid(torch.randn(1, T, HV, *((D,) if case.rule == "KDA" else ())))
    return found


def step(case: Case, function: Callable[..., Any], x: dict[str, Tensor]) -> None:
    """A forward pass, and the gradients of its sum."""
    if not case.backward:
        with torch.no_grad():
            function(**x)
        return
    leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
    o = function(**leaves)
    o.backward(torch.ones_like(o))


def races(threads: int, quick: bool) -> Iterator[Race]:
    theirs = peers.hf_delta_rules()
    for case in QUICK if quick else FULL:
        torch.manual_seed(0)
        x = inputs(case)
        sizes = float(sum(t.numel() * t.element_size() for t in x.values()))
        wrote = float(x["v"].numel() * x["v"].element_size())
        if case.backward:
            sizes, wrote = 2 * sizes + wrote, wrote + sizes

        floor = (sizes + wrote, case.flops)
        rate = "bf16" if case.dtype == torch.bfloat16 else "fma"

        ours: Callable[..., Any] = partial(kk.delta_rule, qk_l2norm=True)
        run = partial(step, case, ours, x)
        contestants = [Contestant("chunk", run, *floor, rate=rate)]
        if not case.backward:
            run = partial(step, case, partial(ours, mode="recurrent"), x)
            contestants.append(Contestant("recurrent", run, *floor, rate=rate))
        if case.rule in theirs:
            run = partial(step, case, theirs[case.rule], x)
            contestants.append(Contestant("HF", run, *floor, rate=rate, peer=True))
        vllm = peers.vllm_gdn(case.value_heads, case.D) if case.rule == "GDN" and case.D == 128 else None
        if vllm is not None and case.dtype == torch.bfloat16:
            run = partial(step, case, vllm, x)
            contestants.append(Contestant("vLLM", run, *floor, rate=rate, peer=True))
        yield Race("delta_rule", case.label, threads, contestants, ["HF", "vLLM"])
