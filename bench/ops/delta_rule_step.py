"""Decode: one token per sequence. Bound by the states' way from memory and back; warm, one layer's states lie in cache.

Cold, all is: for one sequence the interpreter on its way to the kernel then costs as much as the state. Layers: calls
take turns on the states of many layers, so that these come from memory and the code does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kvkernels as kk
from bench import peers
from bench.race import Contestant, Race

H, HV, D = 16, 32, 128


LAYERS = 64  # times 1 MB at least: more than caches hold
CASES = ((1, "warm"), (1, "cold"), (1, "layers"), (8, "warm"), (8, "cold"), (64, "cold"))


Call = Callable[[], object]


def steps(batch: int) -> list[tuple[str, torch.dtype, Callable[[Tensor], Call | None]]]:
    """Names, dtypes of states, and what makes a call of a state; None where that is not installed."""
    torch.manual_seed(0)
    q, k = torch.rand(2, batch, H, D).bfloat16()
    v, beta = torch.randn(batch, HV, D).bfloat16(), torch.rand(batch, HV).bfloat16()
    g = 0.1 * F.logsigmoid(torch.randn(batch, HV))
    slots = torch.arange(batch, dtype=torch.int32)
    theirs = peers.hf_delta_step()

    def ours(state: Tensor) -> Call:
        return partial(kk.delta_rule_step, q, k, v, beta, g, state=state, slots=slots, qk_l2norm=True)

    def hf(state: Tensor) -> Call | None:
        if theirs is None:
            return None
        return partial(theirs, *(x.unsqueeze(1) for x in (q, k, v)), g.unsqueeze(1), beta.unsqueeze(1), state)

    def vllm(state: Tensor) -> Call | None:
        return peers.vllm_delta_step(q, k, v, state)

    f32, bf16 = torch.float32, torch.bfloat16
    return [("fp32 state", f32, ours), ("bf16 state", bf16, ours), ("HF", f32, hf), ("vLLM", f32, vllm)]


def races(threads: int, quick: bool) -> Iterator[Race]:
    for batch, kind in ((1, "cold"),) if quick else CASES:
        contestants = []
        for name, dtype, step in steps(batch):
            states = [torch.zeros(batch, HV, D, D, dtype=dtype) for _ in range(LAYERS if kind == "layers" else 1)]
            calls = [call for call in map(step, states) if call is not None]
            if not calls:
                continue
            size = float(states[0].numel() * states[0].element_size())
            reads, flops = 0.0 if kind == "warm" else size, 6.0 * states[0].numel()
            contestants.append(Contestant(name, calls, reads, flops, peer=name in ("HF", "vLLM")))
        label = f"B{batch} H{H} HV{HV} {kind}"
        inner = 200 // batch if kind == "warm" else 1  # the first is not warm
        yield Race("delta_rule_step", label, threads, contestants, ["HF", "vLLM"], cold=kind == "cold", inner=inner)
