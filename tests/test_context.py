"""A sequence of the delta rule cut into segments: over threads, devices, and ranks of torch.distributed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import kvkernels as kk

Inputs = dict[str, Tensor]


def make(B: int = 1, T: int = 150, H: int = 2, HV: int = 4, K: int = 32, V: int = 24, gate: str = "head") -> Inputs:
    gen = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, B, T, H, K, generator=gen)
    return {
        "q": q,
        "k": torch.nn.functional.normalize(k.abs(), dim=-1),
        "v": torch.randn(B, T, HV, V, generator=gen),
        "beta": 2 * torch.rand(B, T, HV, generator=gen),
        "g": -0.1 * torch.rand(B, T, HV, *((K,) if gate == "channel" else ()), generator=gen),
    }


def of(x: Inputs, tokens: slice) -> Inputs:
    return {name: t[:, tokens] for name, t in x.items()}


def context(x: Inputs, **options: Any) -> kk.DeltaContext:
    return kk.delta_context(x["k"], x["v"], x["beta"], x["g"], **options)


def close(got: Tensor, truth: Tensor, factor: float = 1.0) -> None:
    """Relative to the size of the whole: the same sums in another order."""
    assert (got - truth).norm() <= factor * 2e-6 * truth.norm()


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_state_and_transition(gate: str) -> None:
    x = make(B=2, gate=gate)
    start = torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(1))
    c = context(x)
    for before in (None, start):
        _, after = kk.delta_rule(**x, initial_state=before, output_final_state=True)
        close(c.after(before), after)
    first, second = context(of(x, slice(0, 70))), context(of(x, slice(70, None)))
    both = first.then(second)
    close(both.state, c.state)
    close(both.transition, c.transition)


def test_empty_segment_changes_nothing() -> None:
    x = make(T=0)
    c = context(x)
    assert torch.equal(c.state, torch.zeros(1, 4, 32, 24))
    assert torch.equal(c.transition, torch.eye(32).expand(1, 4, 32, 32))


def test_segments_side_by_side() -> None:
    x = make(gate="channel")
    cuts = torch.tensor([0, 40, 40, 101, 150], dtype=torch.int32)
    start = torch.randn(4, 32, 24, generator=torch.Generator().manual_seed(2))
    truth = kk.delta_rule(**x, initial_state=start[None], output_final_state=True)
    states = context(x, cu_seqlens=cuts).initial_states(start)
    assert states.shape == (4, 4, 32, 24)
    o, final = kk.delta_rule(**x, initial_state=states, cu_seqlens=cuts, output_final_state=True)
    close(o, truth[0])
    close(final[-1], truth[1][0])


def test_gradients_flow_through_contexts() -> None:
    x = {name: t.requires_grad_() for name, t in make(T=90).items()}
    gen = torch.Generator().manual_seed(3)
    weight = torch.randn(1, 90, 4, 24, generator=gen)
    (kk.delta_rule(**x) * weight).sum().backward()
    truth = [t.grad for t in x.values()]
    for t in x.values():
        t.grad = None
    cuts = torch.tensor([0, 33, 90], dtype=torch.int32)
    states = context(x, cu_seqlens=cuts).initial_states()
    (kk.delta_rule(**x, cu_seqlens=cuts, initial_state=states) * weight).sum().backward()
    for t, expected in zip(x.values(), truth):
        assert t.grad is not None
        assert expected is not None
        close(t.grad, expected, factor=10)


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole = make(B=2)
    mine = {n: t.requires_grad_() for n, t in of(whole, slice(0, 64) if rank == 0 else slice(64, None)).items()}
    start = torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(4))
    before = context(mine).gather(initial_state=start)
    o, final = kk.delta_rule(**mine, initial_state=before, output_final_state=True)
    (o * o).sum().backward()
    torch.save((o, final, [t.grad for t in mine.values()]), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.once
def test_two_ranks(tmp_path: Path) -> None:
    """One all-gather forward, one all-reduce backward: as one process over the whole sequence."""
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    x = {name: t.requires_grad_() for name, t in make(B=2).items()}
    start = torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(4))
    o, final = kk.delta_rule(**x, initial_state=start, output_final_state=True)
    (o * o).sum().backward()
    parts = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    close(torch.cat([p[0] for p in parts], 1), o)
    close(parts[1][1], final)
    for i, t in enumerate(x.values()):
        assert t.grad is not None
        close(torch.cat([p[2][i] for p in parts], 1), t.grad, factor=10)


def test_autocast_leaves_contexts_alone() -> None:
    x = make()
    cuts = torch.tensor([0, 40, 101, 150], dtype=torch.int32)
    c = context(x, cu_seqlens=cuts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = c.initial_states()
        both = c.then(c)
    assert torch.equal(states, c.initial_states())
    assert both.transition.dtype == torch.float32
